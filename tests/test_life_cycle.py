"""A boundary changes no bit of the function; expansion changes nothing; a power of two moves freely."""

import kit
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

import clora_core as core
from clora.testing import Case, cases


@pytest.mark.parametrize("name", ["begin_task", "end_task"])
@given(case=cases(dyadic=False))
def test_boundary_keeps_the_function_bit_for_bit(name: str, case: Case) -> None:
    """delta, apply and linear after the fold equal those before it, on random numbers of either dtype."""
    adapter = case.adapter()
    for lane in kit.fit(case):
        ran = kit.run(name, lane, adapter)
        folded = ran.value
        kit.exact(ran, np.zeros_like(folded.R_old), lambda value: value.R_delta)
        kit.exact(ran, [adapter.A, adapter.B], lambda value: [value.A, value.B])
        kit.exact(ran, kit.run("routing", lane, adapter).value, lambda value: value.R_old)
        for function, args in {"delta": (), "apply": (case.x,), "linear": (case.x, case.W)}.items():
            before = kit.run(function, lane, *args, adapter)
            kit.exact(kit.run(function, lane, *args, folded), before.value)


@given(case=cases())
def test_boundary_of_identity_factors(case: Case) -> None:
    """A head (no factors, a rectangular routing) folds the same way."""
    shape = case.sizes.d_out, case.sizes.d_in
    head = core.Adapter(None, case.draw("old", *shape), case.draw("new", *shape), None)
    for lane in kit.fit(case):
        total = kit.run("routing", lane, head)
        bound = kit.run("bounds.routing", lane, head).value
        kit.bounded(total, oracle.routing(head), bound)
        for name in ("begin_task", "end_task"):
            ran = kit.run(name, lane, head)
            kit.exact(ran, core.Adapter(None, total.value, np.zeros(shape), None))


@given(case=cases(), k=st.integers(1, 3))
def test_expansion_keeps_the_function(case: Case, k: int) -> None:
    """Equal on dyadic numbers, within `bounds.delta` of the same exact delta on real ones; old blocks untouched."""
    adapter = case.adapter()
    k = 2 if case.tabled else k
    A_new = case.draw("A_new", *case.leads.A, case.sizes.d_out, k)
    B_new = case.draw("B_new", k, case.sizes.d_in)
    r = case.sizes.r
    for lane in kit.fit(case):
        ran = kit.run("expand", lane, adapter, A_new, B_new)
        new = ran.value
        kit.exact(
            ran, list(adapter), lambda v: [v.A[..., :r], v.R_old[..., :r, :r], v.R_delta[..., :r, :r], v.B[..., :r, :]]
        )
        kit.exact(
            ran, [A_new, np.broadcast_to(B_new, new.B[..., r:, :].shape)], lambda v: [v.A[..., r:], v.B[..., r:, :]]
        )
        for R in (new.R_old, new.R_delta):
            assert not R[..., r:, :].any()
            assert not R[..., :, r:].any()
        got = kit.run("delta", lane, new)
        if case.dyadic:
            kit.exact(got, oracle.delta(adapter))
        else:
            kit.bounded(got, oracle.delta(adapter), kit.run("bounds.delta", lane, new).value)


@given(case=cases(), counts=st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_block_routing_is_a_mixture_of_experts(case: Case, counts: list[int]) -> None:
    """diag(w_i I), without arithmetic; and A R B = sum w_i A_i B_i (eqs. 4-5)."""
    sizes = (2, 1) if case.tabled else tuple(counts)
    lead = case.leads.adapter
    weights = case.draw("weights", *lead, len(sizes))
    r = sum(sizes)
    A, B = case.draw("A", case.sizes.d_out, r), case.draw("B", r, case.sizes.d_in)
    blocks = np.split(np.arange(r), np.cumsum(sizes)[:-1])
    mixture = sum(
        oracle.exact(weights)[..., i, None, None] * oracle.mul(A[:, rows], B[rows]) for i, rows in enumerate(blocks)
    )
    expected = np.zeros((*lead, r, r))
    for i, rows in enumerate(blocks):
        expected[..., rows, rows] = weights[..., i, None]
    for lane in kit.fit(case):
        ran = kit.run("block_routing", lane, weights, sizes)
        kit.exact(ran, expected)
        adapter = core.Adapter(A, ran.value, np.zeros_like(ran.value), B)
        got = kit.run("delta", lane, adapter)
        kit.bounded(got, mixture, kit.run("bounds.delta", lane, adapter).value)
        if case.dyadic:
            kit.exact(got, mixture)


@given(case=cases(dyadic=False), seed=st.integers(0, 2**32 - 1))
def test_a_power_of_two_moves_freely_between_factor_and_routing(case: Case, seed: int) -> None:
    """delta(A D, D^-1 R, B) == delta(A, R, B) on any numbers when D holds powers of two: the scale is a convention."""
    A, R_old, R_delta, B = case.adapter()
    D = 2.0 ** np.random.default_rng(seed).integers(-3, 4, case.sizes.r).astype(case.dtype)
    moved = core.Adapter(A * D, R_old / D[:, None], R_delta / D[:, None], B)
    for lane in kit.fit(case):
        kit.exact(kit.run("delta", lane, moved), kit.run("delta", lane, core.Adapter(A, R_old, R_delta, B)).value)
