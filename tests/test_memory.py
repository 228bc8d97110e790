"""The moments are what they are defined to be, and the meter is the true mean squared change of recorded outputs."""

from typing import Any

import kit
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

import clora_core as core
from clora.testing import Case, cases

SMALL = {"top": 1, "unit": 1}
LINALG = [lane for lane in kit.Lane if lane.value.linalg and not lane.value.jit]


def adapter_of(case: Case, head: bool) -> core.Adapter:
    """An adapter, or a head: identity factors and a rectangular routing."""
    if not head:
        return case.adapter(**SMALL)
    shape = case.sizes.d_out, case.sizes.d_in
    old, new = (case.draw(k, *getattr(case.leads, k), *shape, **SMALL) for k in ("R_old", "R_delta"))
    return core.Adapter(None, old, new, None)


def history(case: Case, adapter: core.Adapter, tasks: int) -> list[tuple[Any, Any]]:
    """For each finished task: the routing at its end, and the exact second moment of its routed inputs."""
    out = []
    for i in range(tasks):
        rows = 2 ** (i % 3)
        x = oracle.exact(case.draw(f"x{i}", *case.leads.x, rows, case.sizes.d_in, **SMALL))
        u = x if adapter.B is None else oracle.mul(x, oracle.t(oracle.exact(adapter.B)))
        out.append((case.draw(f"R{i}", *adapter.R_delta.shape, **SMALL), oracle.mul(oracle.t(u), u) / rows))
    return out


def moments_of(adapter: core.Adapter, past: list[tuple[Any, Any]], dtype: str) -> core.Moments:
    """The definition of S, P, q, rounded to the dtype."""
    zero = oracle.exact(np.zeros((1, 1)))
    S, P, q = zero, zero, zero[0, 0]
    for R, C in past:
        S, P, q = S + C, P + oracle.mul(R, C), q + oracle.output_change(adapter, C, R)
    return core.Moments(*(np.asarray(m, dtype=dtype) for m in (S, P, q)))


@given(case=cases(), weighted=st.booleans())
def test_second_moment(case: Case, weighted: bool) -> None:
    """Mean of u u^T, weighted or not, no rows and no weight included."""
    u = case.draw("u", *case.leads.x, case.sizes.n, case.sizes.r)
    w = np.abs(case.draw("w", *case.leads.x, case.sizes.n)) * (case.seed % 4 > 0)
    weights = w.astype(case.dtype) if weighted else None
    expected = oracle.second_moment(u, weights)
    for lane in kit.fit(case):
        ran = kit.run("second_moment", lane, u, weights=weights)
        kit.bounded(ran, expected, kit.run("bounds.second_moment", lane, u, weights=weights).value)
        kit.exact(ran, np.swapaxes(ran.value, -1, -2))
        if case.dyadic and not weighted and case.sizes.n in (0, 1, 2, 4):
            kit.exact(ran, expected)


@given(case=cases(), head=st.booleans())
def test_record(case: Case, head: bool) -> None:
    """S + C, P + R C, q + tr(K R C R^T): equal on dyadic numbers, within bounds on real ones."""
    adapter = adapter_of(case, head)
    ((_, C), *past) = history(case, adapter, 3)
    C, before = np.asarray(C, dtype=case.dtype), moments_of(adapter, past, case.dtype)
    R = oracle.routing(adapter)
    S, P, q = (oracle.exact(m) for m in before)
    expected = [S + oracle.exact(C), P + oracle.mul(R, C), q + oracle.output_change(adapter, C, R)]
    for lane in kit.fit(case):
        ran = kit.run("record", lane, before, adapter, C)
        if case.dyadic:
            kit.exact(ran, expected)
        else:
            kit.bounded(ran, expected, kit.run("bounds.record", lane, before, adapter, C).value)


@given(case=cases(), head=st.booleans())
def test_empty_moments(case: Case, head: bool) -> None:
    """Zeros of the right sizes; and the meter reads 0 before the first task."""
    adapter = adapter_of(case, head)
    lead = np.broadcast_shapes(*(a.shape[:-2] for a in adapter if a is not None))
    rows, columns = adapter.R_delta.shape[-2:]
    zeros = [np.zeros((*lead, columns, columns)), np.zeros((*lead, rows, columns)), np.zeros(lead)]
    for lane in kit.fit(case):
        ran = kit.run("empty_moments", lane, adapter)
        kit.exact(ran, zeros)
        for since in ("task-ends", "boundary"):
            kit.exact(kit.run("drift", lane, adapter, ran.value, since=since), zeros[2])


@given(case=cases(dyadic=True), head=st.booleans(), tasks=st.integers(1, 3))
def test_drift_is_the_true_change_of_outputs(case: Case, head: bool, tasks: int) -> None:
    """Against the mean squared change of this layer's output, row by row, in rationals."""
    adapter = adapter_of(case, head)
    tasks = 2 if case.tabled else tasks
    past = history(case, adapter, tasks)
    moments = moments_of(adapter, past, case.dtype)
    A = oracle.exact(np.eye(adapter.R_delta.shape[-2])) if head else oracle.exact(adapter.A)

    def change_of_rows(i: int, D: Any) -> Any:
        x = oracle.exact(case.draw(f"x{i}", *case.leads.x, 2 ** (i % 3), case.sizes.d_in, **SMALL))
        u = x if head else oracle.mul(x, oracle.t(oracle.exact(adapter.B)))
        moved = oracle.mul(u, oracle.t(D), oracle.t(A))
        return (moved * moved).sum(axis=(-2, -1)) / 2 ** (i % 3)

    R, new = oracle.routing(adapter), oracle.exact(adapter.R_delta)
    truth = {
        "task-ends": sum((change_of_rows(i, R - oracle.exact(past[i][0])) for i in range(tasks)), start=0),
        "boundary": sum((change_of_rows(i, new) for i in range(tasks)), start=0),
    }
    for lane in kit.fit(case):
        for since, total in truth.items():
            ran = kit.run("drift", lane, adapter, moments, since=since)
            kit.exact(ran, np.broadcast_to(oracle.exact(total), ran.value.shape))
            used = (adapter.A, adapter.R_delta, moments.S, *(() if since == "boundary" else (adapter.R_old, moments.P)))
            assert ran.value.shape == np.broadcast_shapes(*(a.shape[:-2] for a in used if a is not None))


@pytest.mark.parametrize("since", ["task-ends", "boundary"])
@given(case=cases(), head=st.booleans())
def test_drift_and_its_gradient(since: str, case: Case, head: bool) -> None:
    """The meter within bounds of its formula; its gradient equal to central differences of the sum of grad * drift."""
    adapter = adapter_of(case, head)
    past = history(case, adapter, 2)
    moments = moments_of(adapter, past, case.dtype)
    S, P, q = (oracle.exact(m) for m in moments)
    K = oracle.gram(adapter.A, adapter.R_delta.shape[-2])

    def meter(R_delta: Any) -> Any:
        if since == "boundary":
            return oracle.exact(oracle.trace(oracle.mul(K, R_delta, S, oracle.t(R_delta))))
        R = oracle.exact(adapter.R_old) + R_delta
        P_part = oracle.trace(oracle.mul(K, R, oracle.t(P)))
        return oracle.exact(oracle.trace(oracle.mul(K, R, S, oracle.t(R))) - 2 * P_part + q)

    value = meter(oracle.exact(adapter.R_delta))
    grad = case.draw("grad", *np.shape(value), **SMALL)
    small = adapter.R_delta.size <= 16
    if small:
        slope = oracle.differences(lambda R: np.sum(oracle.exact(grad) * meter(R)), adapter.R_delta)
    for lane in kit.fit(case):
        ran = kit.run("drift", lane, adapter, moments, since=since)
        kit.bounded(ran, value, kit.run("bounds.drift", lane, adapter, moments, since=since).value)
        if small:
            ran = kit.run("drift_vjp", lane, adapter, moments, grad, since=since)
            limit = kit.run("bounds.drift_vjp", lane, adapter, moments, grad, since=since).value
            kit.bounded(ran, slope, limit)
            if case.dyadic:
                kit.exact(ran, slope)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("lane", kit.lanes("NUMPY", "TORCH", "JAX_X32"))
def test_many_rows_in_one_direction_are_valid(lane: kit.Lane, weighted: bool) -> None:
    """20 000 rows of rank one in float32: rounding puts eigenvalues below zero by far more than r roundings."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        u = (rng.standard_normal((20_000, 1)) @ rng.standard_normal((1, 3))).astype(np.float32)
        weights = np.abs(rng.standard_normal(20_000)).astype(np.float32) if weighted else None
        adapter = core.init_adapter(rng, 4, 5, 3)
        C = kit.run("second_moment", lane, u, weights=weights).value
        ran = kit.run("validate", lane, adapter, moments=core.Moments(C, np.zeros_like(C), np.zeros((), C.dtype)))
        kit.exact(ran, list(adapter))


@given(case=cases(dyadic=False, rows=1), head=st.booleans(), weighted=st.booleans())
def test_what_is_recorded_is_valid(case: Case, head: bool, weighted: bool) -> None:
    """`validate` accepts whatever second_moment and record made, also where the routing avoids all recorded inputs."""
    adapter = adapter_of(case, head)
    columns = adapter.R_delta.shape[-1]
    u = case.draw("u", case.sizes.n, columns) * np.asarray(3.7, dtype=case.dtype)
    weights = np.abs(case.draw("w", case.sizes.n)) if weighted else None
    for lane in LINALG:
        if lane not in kit.fit(case):
            continue
        C = kit.run("second_moment", lane, u, weights=weights).value
        U = np.linalg.svd(u.astype(np.float64))[2].T  # R D, D projecting off the inputs seen
        off = U[:, case.sizes.n :] @ U[:, case.sizes.n :].T
        avoiding = adapter._replace(
            R_old=(adapter.R_old @ off).astype(case.dtype), R_delta=(adapter.R_delta @ off).astype(case.dtype)
        )
        for here in (adapter, avoiding):
            moments = kit.run("record", lane, kit.run("empty_moments", lane, here).value, here, C).value
            ran = kit.run("validate", lane, here, moments=moments)
            kit.exact(ran, list(here))


def test_moments_of_an_empty_stack_are_valid() -> None:
    """No layer has no fault."""
    adapter = core.init_adapter(np.random.default_rng(0), 4, 3, 2, batch=(0,))
    moments = core.empty_moments(adapter)
    assert moments.S.shape == (0, 2, 2)
    assert core.validate(adapter, moments=moments) is adapter
