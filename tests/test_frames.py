"""Frames: orthonormal columns, upper triangular coefficients with positive diagonal, and how far columns are off."""

from fractions import Fraction

import kit
import numpy as np
import oracle
from hypothesis import given

from clora.testing import Case, cases


@given(case=cases())
def test_orthonormalize(case: Case) -> None:
    """Q^T Q = I and Q^T F upper triangular with diagonal >= 0, within bounds; that makes Q unique."""
    d, r = case.sizes.d_out, case.sizes.r
    F = case.draw("F", *case.leads.A, d, r)
    e = core_bound(d, r, case.dtype)
    for lane in kit.fit(case, linalg=True):
        ran = kit.run("orthonormalize", lane, F)
        Q = oracle.exact(ran.value)
        T = oracle.mul(oracle.t(Q), F)
        rest = oracle.mul(Q, T) - oracle.exact(F)
        defect = oracle.mul(oracle.t(Q), Q) - oracle.exact(np.eye(r))
        for index in np.ndindex(F.shape[:-2]):
            slack = 2 * e * oracle.norm(F[index])
            assert oracle.norm(defect[index]) <= e
            assert oracle.norm(rest[index]) <= slack
            assert oracle.norm(np.tril(T[index], -1)) <= slack
            assert all(entry >= -slack for entry in np.diagonal(T[index]))
        kit.note(ran)


def core_bound(d: int, r: int, dtype: str) -> Fraction:
    """The core's own bound on the defect of a frame."""
    lane = kit.Lane.NUMPY
    return Fraction(kit.run("bounds.orthonormal", lane, d, r, dtype=dtype).value)


@given(case=cases())
def test_defect(case: Case) -> None:
    """||F^T F - I||: the Gram matrix within gamma, entry by entry, then one norm."""
    d, r = case.sizes.d_out, case.sizes.r
    F = case.draw("F", *case.leads.A, d, r)
    gram = oracle.mul(oracle.t(oracle.exact(F)), F) - oracle.exact(np.eye(r))
    size = oracle.mul(np.abs(oracle.t(oracle.exact(F))), np.abs(oracle.exact(F))) + oracle.exact(np.eye(r))
    expected, bound = np.empty(F.shape[:-2], dtype=object), np.empty(F.shape[:-2], dtype=object)
    for index in np.ndindex(expected.shape):
        expected[index] = oracle.norm(gram[index])
        off = kit.gamma(d + 1, case.dtype) * oracle.norm(size[index])
        bound[index] = off + kit.gamma(r * r + 2, case.dtype) * (expected[index] + off)
    for lane in kit.fit(case):
        kit.bounded(kit.run("orthonormality_defect", lane, F), expected, bound)


def test_defect_of_an_exact_frame_is_zero() -> None:
    """Scaled Hadamard columns are orthonormal without rounding."""
    H = np.asarray([[1, 1], [1, -1], [1, 1], [1, -1]], dtype=np.float32) / 2
    for lane in kit.Lane:
        kit.exact(kit.run("orthonormality_defect", lane, H), np.zeros(()))
