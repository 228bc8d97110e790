"""merge rounds W + A R B once, from the pristine W, and reports what the target kept."""

from fractions import Fraction
from typing import Any

import kit
import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import given

import clora_core as core
from clora.testing import Case, Leads, Sizes, cases

HALVES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
CASTING = [lane for lane in kit.Lane if lane.value.library != "strict"]


def rounded(numbers: Any, target: str) -> Any:
    """The nearest number of the target dtype, ties to even, of exact numbers; by bisection of the spacing."""
    digits, smallest = {"float32": (24, -149), "float16": (11, -24), "bfloat16": (8, -133)}[target]
    out = np.empty(np.shape(numbers), dtype=object)
    for index, number in np.ndenumerate(numbers):
        exponent = smallest
        size = abs(number)
        while size >= Fraction(2) ** (exponent + digits):
            exponent += 1
        out[index] = Fraction(round(number / Fraction(2) ** exponent)) * Fraction(2) ** exponent
    return out


@given(case=cases())
def test_weight(case: Case) -> None:
    """W + A R B in W's own dtype: equal or within bounds."""
    W, adapter = case.W, case.adapter()
    expected = oracle.exact(W) + oracle.delta(adapter)
    for lane in kit.fit(case):
        ran = kit.run("merge", lane, W, adapter)
        if case.dyadic:
            kit.exact(ran, expected, lambda v: v.weight)
        else:
            kit.bounded(ran, expected, kit.run("bounds.merge", lane, W, adapter).value, lambda v: v.weight)


@pytest.mark.parametrize("target", ["bfloat16", "float16", "float32"])
@given(case=cases())
def test_one_rounding_to_a_narrower_type(target: str, case: Case) -> None:
    """Ties included: dyadic sums are exact, so the weight is the exact sum rounded through float32 and nothing else."""
    W, adapter = case.W, case.adapter()
    exact = oracle.exact(W) + oracle.delta(adapter)
    expected = rounded(rounded(exact, "float32"), target)
    for lane in kit.fit(case):
        if lane not in CASTING and target != "float32":
            continue
        ran = kit.run("merge", lane, W, adapter, dtype=target)
        if case.dyadic:
            kit.exact(ran, expected, lambda v: v.weight)
        limit = kit.run("bounds.merge", lane, W, adapter, dtype=target).value
        kit.bounded(ran, exact, limit, lambda v: v.weight)
        kit.exact(ran, np.max(limit, axis=(-2, -1)), lambda v: v.report.bound)


@given(case=cases(dyadic=True))
def test_report(case: Case) -> None:
    """kept, error and unchanged are their definitions, for bfloat16 where the lane has it."""
    W, adapter = case.W, case.adapter()
    dW = oracle.delta(adapter)
    for lane in kit.fit(case):
        target = "bfloat16" if lane in CASTING else "float32"
        ran = kit.run("merge", lane, W, adapter, dtype=target)
        stored = oracle.exact(ran.value.weight) - oracle.exact(W)
        size = np.broadcast_to(oracle.exact(oracle.square(dW)), stored.shape[:-2])
        safe = np.where(size == 0, Fraction(1), size)
        kept = np.where(size == 0, Fraction(0), oracle.exact((stored * dW).sum(axis=(-2, -1))) / safe)
        off = np.where(size == 0, Fraction(0), oracle.exact(oracle.square(stored - dW)) / safe)
        d = W.shape[-1] * W.shape[-2]
        g = kit.gamma(2 * d + 8, case.dtype)
        share = np.where(size == 0, Fraction(0), oracle.exact((np.abs(stored * dW)).sum(axis=(-2, -1))) / safe)
        kit.bounded(ran, kept, g * share, lambda v: v.report.kept)
        root = np.asarray([oracle.root(number) for number in off.flat], dtype=object).reshape(off.shape)
        kit.bounded(ran, root, g * root, lambda v: v.report.error)
        same = oracle.exact((stored == 0).sum(axis=(-2, -1)).astype(float)) / d
        kit.bounded(ran, same, kit.gamma(d + 2, case.dtype) * same, lambda v: v.report.unchanged)


@pytest.mark.parametrize(("target", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_float64_goes_through_float32(target: str, bits: int) -> None:
    """Just above a tie the libraries' own casts from float64 disagree; through float32 all lanes give the same."""
    W = np.asarray([[1.0 + 2.0**-bits + 2.0**-40]])
    zero = np.zeros((1, 1))
    for lane in CASTING:
        if "float64" in lane.value.dtypes:
            ran = kit.run("merge", lane, W, core.Adapter(zero, zero, zero, zero), dtype=target)
            kit.exact(ran, np.ones((1, 1)), lambda v: v.weight)


def test_bound_when_the_delta_vanishes() -> None:
    """A delta below the last place of W still counts in the bound: its own rounding is not lost by cancellation."""
    case = Case(Sizes(1, 3, 3, 3), Leads(), "float32", 3, dyadic=False, tabled=False)
    adapter = case.adapter()
    adapter = adapter._replace(A=adapter.A * np.float32(2.0**-30))
    small = core.bounds.merge(case.W * np.float32(0.0), adapter)
    assert (core.bounds.merge(case.W, adapter) >= small).all()


def test_bound_among_the_subnormals_of_float16() -> None:
    """Below 2^-14 the spacing of float16 stays 2^-24: half of it belongs to the bound, however the dtype is written."""
    W = np.asarray([[2.0**-25 * 1.5, 2.0**-26, 2.0**-20 + 2.0**-26]], dtype=np.float32)
    zero = np.zeros((1, 1), dtype=np.float32)
    adapter = core.Adapter(zero, zero, zero, np.zeros((1, 3), dtype=np.float32))
    for lane in CASTING:
        limit = kit.run("bounds.merge", lane, W, adapter, dtype="float16").value
        kit.bounded(kit.run("merge", lane, W, adapter, dtype="float16"), W, limit, lambda v: v.weight)


def test_a_dtype_may_be_named() -> None:
    """By its name or as the library's dtype: the same weight and the same bound, one rounding to float32."""
    rng = np.random.default_rng(0)
    adapter = core.init_adapter(rng, 4, 5, 2, dtype="float64")
    adapter = adapter._replace(R_delta=rng.standard_normal((2, 2)))
    W = rng.standard_normal((4, 5))
    named, given, other = (core.merge(W, adapter, dtype=d) for d in ("float32", np.float32, np.dtype("float32")))
    assert (named.weight == given.weight).all()
    assert named.report == given.report == other.report
    magnitude = np.abs(W) + core.delta(core.Adapter(*(np.abs(a) for a in adapter)))
    assert (
        core.bounds.merge(W, adapter, dtype="float32") <= (2.0**-24 + 2 * core.bounds.gamma(8, 2.0**-53)) * magnitude
    ).all()
