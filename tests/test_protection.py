"""protected_basis holds the leading directions of what was recorded; project removes them from the routing."""

from fractions import Fraction
from itertools import pairwise
from typing import Any

import kit
import numpy as np
import oracle
import pytest
from hypothesis import assume, event, example, given
from hypothesis import strategies as st

import clora_core as core
from clora.testing import Case, cases


def moment(case: Case) -> np.ndarray:
    """A second moment of a few rows, so often of deficient rank; symmetric to the bit."""
    u = case.draw("u", *case.leads.x, case.sizes.n, case.sizes.r)
    return core.second_moment(u)


@given(case=cases(rows=1), energy=st.sampled_from((0.0, 0.5, 0.95, 1.0)))
def test_basis(case: Case, energy: float) -> None:
    """U is a frame that diagonalises S, descending; the weights are the fewest leading ones that hold the energy."""
    S, r = moment(case), case.sizes.r
    e = kit.spectral(r, r, case.dtype)
    for lane in kit.fit(case, linalg=True):
        ran = kit.run("protected_basis", lane, S, energy=energy)
        U, w = ran.value
        defect = oracle.mul(oracle.t(oracle.exact(U)), U) - oracle.exact(np.eye(r))
        turned = oracle.mul(oracle.t(oracle.exact(U)), S, U)
        for index in np.ndindex(S.shape[:-2]):
            slack = 2 * e * oracle.norm(S[index])
            values = np.diagonal(turned[index])
            assert oracle.norm(defect[index]) <= e
            assert oracle.norm(turned[index] - np.diag(values)) <= slack
            assert all(a >= b - slack for a, b in pairwise(values))
            check_energy(values, w[index], energy, slack)
        kit.note(ran)


def check_energy(values: Any, weights: Any, energy: float, slack: Fraction) -> None:
    """Ones, then zeros; the kept hold the energy, and without the last one they would not."""
    k = int(weights.sum())
    assert weights.tolist() == [1.0] * k + [0.0] * (len(weights) - k)
    total, slack = sum(values), slack * len(weights)
    assert sum(values[:k]) >= Fraction(energy) * total - slack
    assert k == 0 or sum(values[: k - 1]) < Fraction(energy) * total + slack


@example(energies=[4, 3, 2], percent=50)  # of their squares one direction would hold half
@given(energies=st.lists(st.integers(0, 8), min_size=1, max_size=5), percent=st.sampled_from((0, 25, 50, 75, 100)))
def test_energy_criterion_is_exact_on_diagonals(energies: list[int], percent: int) -> None:
    """Eigenvalues are energies already: cumulative sums of them, not of their squares, against the share of all."""
    S = np.diag(np.asarray(energies, dtype=np.float32))
    ordered, total = sorted(energies, reverse=True), sum(energies)
    need = [4 * sum(ordered[:i]) < percent // 25 * total and ordered[i] > 0 for i in range(len(ordered))]
    for lane in kit.lanes("NUMPY", "STRICT_DEVICE1", "TORCH"):
        kit.exact(
            kit.run("protected_basis", lane, S, energy=percent / 100),
            np.asarray(need, dtype=float),
            lambda v: v.weights,
        )


@given(case=cases(rows=1), k=st.integers(0, 4))
def test_projector_is_that_of_exact_arithmetic(case: Case, k: int) -> None:
    """Against float64 by the Davis-Kahan theorem: projectors differ by at most 2 sqrt(2) |E| / gap. No near-ties."""
    S = moment(case)
    assume(S.ndim == 2)
    values, vectors = np.linalg.eigh(S.astype(np.float64))
    k = min(k, case.sizes.r - 1)
    gap = values[::-1][k - 1] - values[::-1][k] if k else values[-1]
    error = kit.spectral(case.sizes.r, case.sizes.r, case.dtype) * oracle.norm(S)
    clear = Fraction(gap) > 8 * error and (k == 0 or values[::-1][k - 1] > 0)
    event("clear gap" if clear else "near-tie")
    assume(clear)
    # an energy strictly between what k - 1 and k directions hold
    ordered = np.clip(values[::-1], 0, None)
    energy = (ordered[:k].sum() - ordered[k - 1] / 2) / ordered.sum() if k else 0.0
    P = vectors[:, ::-1][:, :k] @ vectors[:, ::-1][:, :k].T
    for lane in kit.fit(case, linalg=True):
        if lane.value.jit:
            continue  # compiled anew for every energy
        ran = kit.run("protected_basis", lane, S, energy=float(energy))
        U, w = ran.value
        kit.exact(ran, [Fraction(k)], lambda v: [v.weights.sum()])
        got = oracle.mul(oracle.exact(U * w), oracle.t(oracle.exact(U)))
        assert oracle.norm(got - oracle.exact(P)) <= 3 * error / Fraction(gap) + error


@given(case=cases(rows=1), full=st.booleans())
def test_projection(case: Case, full: bool) -> None:
    """The formula within bounds; and projecting twice is projecting once, within the bounds and the frame's defect."""
    S, r = moment(case), case.sizes.r
    R_delta = case.draw("R_delta", *case.leads.R_delta, case.sizes.d_out, r)
    for lane in kit.fit(case, linalg=True):
        basis = kit.run("protected_basis", lane, S, energy=1.0 if full else 0.5).value
        U, w = (oracle.exact(a) for a in basis)
        P = oracle.mul(U * w[..., None, :], oracle.t(U))
        once = kit.run("project", lane, R_delta, basis)
        first = kit.run("bounds.project", lane, R_delta, basis).value
        kit.bounded(once, oracle.exact(R_delta) - oracle.mul(R_delta, P), first)
        twice = kit.run("project", lane, once.value, basis)
        second = kit.run("bounds.project", lane, once.value, basis).value
        defect = oracle.norm(oracle.mul(oracle.t(U), U) - oracle.exact(np.eye(r)))
        moved = oracle.norm(oracle.exact(twice.value) - oracle.exact(once.value))
        batch = int(np.prod(once.value.shape[:-2]))
        leak = (1 + defect) * ((1 + defect) * defect * oracle.norm(R_delta) * batch + oracle.norm(first))
        assert moved <= leak + oracle.norm(second)


@given(case=cases(dyadic=True), mask=st.integers(0, 15))
def test_projecting_twice_is_projecting_once_exactly(case: Case, mask: int) -> None:
    """With a scaled Hadamard frame there is no rounding at all."""
    H = np.asarray([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=case.dtype) / 2
    w = np.asarray([mask >> i & 1 for i in range(4)], dtype=case.dtype)
    R_delta = case.draw("R_delta", *case.leads.R_delta, case.sizes.d_out, 4)
    P = oracle.mul(oracle.exact(H * w), H.T)
    for lane in kit.fit(case):
        once = kit.run("project", lane, R_delta, core.Basis(H, w))
        kit.exact(once, oracle.exact(R_delta) - oracle.mul(R_delta, P))
        kit.exact(kit.run("project", lane, once.value, core.Basis(H, w)), once.value)


@pytest.mark.parametrize("energy", [0.0, 0.95, 1.0])
def test_nothing_recorded_protects_nothing(energy: float) -> None:
    """S = 0: all weights 0, so project changes nothing."""
    for lane in kit.Lane:
        if lane.value.linalg:
            ran = kit.run("protected_basis", lane, np.zeros((2, 3, 3), dtype=np.float32), energy=energy)
            kit.exact(ran, np.zeros((2, 3)), lambda v: v.weights)
