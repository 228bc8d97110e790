"""linear_vjp and delta_vjp are the closed forms, for every subset of gradients, order of contraction and stop_old."""

from itertools import combinations
from typing import Any

import kit
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

import clora_core as core
from clora.testing import Case, Leads, Sizes, cases

NAMES = core.LinearGradients._fields
ORDERS = (None, "rows", "left", "right", "merged")
SUBSETS = [subset for k in range(len(NAMES) + 1) for subset in combinations(NAMES, k)]


def compare(case: Case, ran: kit.Ran, expected: dict[str, Any], wrt: tuple[str, ...], bound: Any) -> None:
    """None where not asked; equal or within bounds where asked."""
    assert [name for name, value in zip(ran.value._fields, ran.value, strict=True) if value is not None] == [
        name for name in ran.value._fields if name in wrt
    ]
    want = [expected[name] for name in ran.value._fields if name in wrt]
    if case.dyadic:
        kit.exact(ran, want)
    else:
        kit.bounded(ran, want, bound)


@given(
    case=cases(),
    wrt=st.one_of(st.just(NAMES), st.sampled_from(SUBSETS)),
    order=st.sampled_from(ORDERS),
    stop_old=st.booleans(),
)
def test_linear_vjp(case: Case, wrt: tuple[str, ...], order: str | None, stop_old: bool) -> None:
    """Every lane, leading axes, subset and order against the exact gradients of sum(g * y)."""
    n, d_out, d_in, r = case.sizes
    if case.tabled:  # JAX compiles for each combination
        wrt = NAMES
    plan = order and core.plan(n, d_out, d_in, r, dtype=case.dtype, wrt=wrt, stop_old=stop_old, order=order)
    how = {"wrt": wrt, "stop_old": stop_old}
    adapter, args = case.adapter(), (case.x, case.W, case.adapter(), case.grad_y)
    expected = oracle.linear_gradients(case.x, case.W, adapter, case.grad_y, stop_old, case.bias.shape)
    for lane in kit.fit(case):
        ran = kit.run("linear_vjp", lane, *args, bias=case.bias, plan=plan or None, **how)
        compare(case, ran, expected, wrt, kit.run("bounds.linear_vjp", lane, *args, bias=case.bias, **how).value)


@pytest.mark.parametrize("stop_old", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sizes", [Sizes(2, 4, 5, 2), Sizes(7, 3, 4, 2), Sizes(6, 7, 3, 3), Sizes(9, 2, 2, 1)])
def test_every_subset(order: str | None, stop_old: bool, sizes: Sizes) -> None:
    """All 64 subsets in all orders, on shapes that fold all, some or none of the products; exact, two lanes."""
    case = Case(sizes, Leads(), "float32", 7, dyadic=True, tabled=False)
    args = (case.x, case.W, case.adapter(), case.grad_y)
    expected = oracle.linear_gradients(case.x, case.W, case.adapter(), case.grad_y, stop_old, case.bias.shape)
    for wrt in SUBSETS:
        plan = order and core.plan(*sizes, wrt=wrt, stop_old=stop_old, order=order, balance=0)
        for lane in kit.lanes("NUMPY", "TORCH"):
            ran = kit.run("linear_vjp", lane, *args, wrt=wrt, stop_old=stop_old, plan=plan or None)
            compare(case, ran, expected, wrt, None)


@given(case=cases(), stop_old=st.booleans(), wrt=st.sampled_from(SUBSETS))
def test_without_x_or_without_W(case: Case, stop_old: bool, wrt: tuple[str, ...]) -> None:
    """u alone serves A and R_delta, x and bias need neither; without W the frozen share of dx is left out."""
    wrt = ("x", "bias", "A", "R_delta") if case.tabled else tuple(name for name in wrt if name not in ("B", "W"))
    adapter = case.adapter()
    u = np.asarray(oracle.mul(case.x, oracle.t(oracle.exact(adapter.B))), dtype=case.dtype)
    if not {"A", "R_delta"} & set(wrt):
        u = None
    expected = oracle.linear_gradients(case.x, None, adapter, case.grad_y, stop_old, case.bias.shape)
    expected["x"] = oracle.mul(case.grad_y, oracle.delta(adapter))
    bounds = {"wrt": wrt, "stop_old": stop_old, "bias": case.bias}
    for lane in kit.fit(case):
        ran = kit.run(
            "linear_vjp", lane, None, None, adapter, case.grad_y, wrt=wrt, stop_old=stop_old, u=u, bias=case.bias
        )
        limit = kit.run("bounds.linear_vjp", lane, case.x, None, adapter, case.grad_y, **bounds).value
        if "x" in wrt:
            limit = limit._replace(x=np.broadcast_to(np.max(limit.x, initial=0.0), ran.value.x.shape))
        compare(case, ran, expected, wrt, limit)


@given(case=cases(), stop_old=st.booleans())
def test_delta_vjp(case: Case, stop_old: bool) -> None:
    """Every lane and leading axes against the exact gradients of sum(G * delta)."""
    adapter = case.adapter()
    G = case.draw("G", *case.leads.adapter, case.sizes.d_out, case.sizes.d_in)
    expected = oracle.delta_gradients(adapter, G, stop_old)
    for lane in kit.fit(case):
        ran = kit.run("delta_vjp", lane, adapter, G, stop_old=stop_old)
        limit = kit.run("bounds.delta_vjp", lane, adapter, G, stop_old=stop_old).value
        compare(case, ran, expected, ("A", "R_delta", "B"), limit)


@pytest.mark.parametrize("wrt", [s for k in range(4) for s in combinations(core.DeltaGradients._fields, k)])
@given(case=cases(dyadic=True), stop_old=st.booleans())
def test_delta_vjp_subsets(wrt: tuple[str, ...], case: Case, stop_old: bool) -> None:
    """Every subset of its gradients."""
    adapter = case.adapter()
    G = case.draw("G", *case.leads.adapter, case.sizes.d_out, case.sizes.d_in)
    expected = oracle.delta_gradients(adapter, G, stop_old)
    for lane in kit.lanes("NUMPY", "TORCH"):
        compare(case, kit.run("delta_vjp", lane, adapter, G, wrt=wrt, stop_old=stop_old), expected, wrt, None)


@pytest.mark.parametrize("stop_old", [False, True])
@given(case=cases(dyadic=True, widest=3, rows=1))
def test_finite_differences_in_rationals(stop_old: bool, case: Case) -> None:
    """The loss is multilinear in the arrays, so its central differences are its gradients, without any error.

    With ``stop_old`` the loss is that of eqs. 11-12: the old route holds its own copy of A and B, which stays.
    """
    if oracle.exact(case.x).size * 4 > 100 or case.leads.all:
        case = case._replace(leads=Leads())
    x, W, g, adapter = case.x, case.W, oracle.exact(case.grad_y), case.adapter()
    arrays = {"x": x, "W": W, "bias": case.bias, **adapter._asdict()}

    def loss(name: str, value: Any) -> Any:
        here = {**arrays, name: value}
        A, R_old, R_delta, B = (here[k] for k in adapter._fields)
        frozen = adapter if stop_old else adapter._replace(A=A, B=B)
        old = oracle.mul(frozen.A, R_old, frozen.B)
        y = oracle.mul(here["x"], oracle.t(oracle.exact(here["W"]) + old + oracle.mul(A, R_delta, B)))
        return (g * (y + oracle.exact(here["bias"]))).sum()

    expected = {name: oracle.differences(lambda value, name=name: loss(name, value), arrays[name]) for name in NAMES}
    for lane in kit.fit(case):
        ran = kit.run("linear_vjp", lane, x, W, adapter, case.grad_y, wrt=NAMES, stop_old=stop_old, bias=case.bias)
        compare(case, ran, expected, NAMES, None)


@given(case=cases(dyadic=True), made=st.sampled_from(SUBSETS), asked=st.sampled_from(SUBSETS))
def test_a_plan_made_for_other_gradients(case: Case, made: tuple[str, ...], asked: tuple[str, ...]) -> None:
    """A plan only says in which order to contract: whatever it was made for, the gradients are the same."""
    plan = core.plan(*case.sizes, wrt=made, balance=0)
    expected = oracle.linear_gradients(case.x, case.W, case.adapter(), case.grad_y, True, case.bias.shape)
    for lane in kit.lanes("NUMPY", "TORCH"):
        args = (case.x, case.W, case.adapter(), case.grad_y)
        compare(case, kit.run("linear_vjp", lane, *args, wrt=asked, plan=plan, bias=case.bias), expected, asked, None)


def test_bound_covers_the_rows_that_leading_axes_add() -> None:
    """Stacked inputs are flattened to rows, so their bound may not be below that of the flattened call."""
    case = Case(Sizes(5, 3, 4, 2), Leads(x=(7,)), "float32", 1, dyadic=True, tabled=False)
    flat = (case.x.reshape(35, 4), case.W, case.adapter(), case.grad_y.reshape(35, 3))
    wrt = ("W", "bias", "A", "R_delta", "B")
    stacked = core.bounds.linear_vjp(case.x, case.W, case.adapter(), case.grad_y, wrt=wrt)
    for here, there in zip(kit.leaves(stacked), kit.leaves(core.bounds.linear_vjp(*flat, wrt=wrt)), strict=True):
        assert (here >= there).all()
