"""compress gives the best adapter of its rank, and states by how much it changed the delta."""

from fractions import Fraction

import kit
import numpy as np
import oracle
from hypothesis import given
from hypothesis import strategies as st

import clora_core as core
from clora.testing import Case, cases


def slack(adapter: core.Adapter, dtype: str) -> Fraction:
    """Rounding of two frames, two products and one singular value decomposition, on the sizes of the factors."""
    A, R, B = (oracle.norm(array) for array in (adapter.A, oracle.routing(adapter), adapter.B))
    d_out, r, d_in = adapter.A.shape[-2], adapter.A.shape[-1], adapter.B.shape[-1]
    return (4 * kit.spectral(max(d_out, d_in, r), r, dtype) + kit.gamma(4 * r + 4, dtype) * r) * A * R * B


@given(case=cases(), share=st.integers(1, 4))
def test_error_and_optimality(case: Case, share: int) -> None:
    """The stated error is the true one and the least possible (Eckart-Young); no random competitor does better."""
    adapter = case.adapter()
    rank = max(1, case.sizes.r * share // 4) if not case.tabled else 1
    expected, room = oracle.delta(adapter), slack(adapter, case.dtype)
    best = np.sqrt((np.linalg.svd(expected.astype(float), compute_uv=False)[..., rank:] ** 2).sum(axis=-1))
    space = np.linalg.qr(np.random.default_rng(case.seed).standard_normal((case.sizes.d_out, rank)))[0]
    rival = expected - oracle.mul(oracle.exact(space), space.T, expected)  # what any other column space leaves
    for lane in kit.fit(case, linalg=True):
        ran = kit.run("compress", lane, adapter, rank)
        kit.bounded(ran, best, np.full(best.shape, room), lambda v: v.error)
        left = expected - oracle.delta(ran.value.adapter)
        for index in np.ndindex(best.shape):
            true = oracle.norm(left[index])
            assert abs(true - Fraction(float(ran.value.error[index]))) <= room
            assert true <= oracle.norm(rival[index]) + room


@given(case=cases())
def test_form(case: Case) -> None:
    """Orthonormal factors, a diagonal and descending routing, nothing in R_delta; at the full rank nothing is lost."""
    adapter, r = case.adapter(), case.sizes.r
    e = kit.spectral(max(case.sizes), r, case.dtype)
    for lane in kit.fit(case, linalg=True):
        ran = kit.run("compress", lane, adapter, r)
        A, R_old, _, B = ran.value.adapter
        kit.exact(ran, np.zeros_like(ran.value.error), lambda v: v.error)
        kit.exact(ran, [R_old * np.eye(r), np.zeros_like(R_old)], lambda v: [v.adapter.R_old, v.adapter.R_delta])
        diagonal = np.diagonal(R_old, axis1=-2, axis2=-1)
        assert (diagonal >= 0).all()
        assert (np.diff(diagonal, axis=-1) <= 0).all()
        for F in (A, np.swapaxes(B, -1, -2)):
            gram = oracle.mul(oracle.t(oracle.exact(F)), F) - oracle.exact(np.eye(r))
            assert all(oracle.norm(gram[index]) <= 4 * e for index in np.ndindex(F.shape[:-2]))
        assert oracle.norm(oracle.delta(ran.value.adapter) - oracle.delta(adapter)) <= slack(adapter, case.dtype) * max(
            1, int(np.prod(np.shape(ran.value.error)))
        )
