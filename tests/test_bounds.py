"""The bounds are what the theorem says: gamma_k on absolute values, no smaller, and hardly larger."""

from fractions import Fraction
from typing import Any

import kit
import numpy as np
import oracle
import pytest
from hypothesis import given

import clora_core as core
from clora.testing import Case, cases


def size_of(array: Any) -> Any:
    """Absolute values."""
    return np.abs(oracle.exact(array))


def square(case: Case, name: str) -> np.ndarray:
    """An r x r array."""
    return case.draw(name, case.sizes.r, case.sizes.r)


def moments(case: Case) -> core.Moments:
    """Any moments: only their sizes matter here."""
    r = case.sizes.r
    return core.Moments(case.draw("S", r, r), case.draw("P", r, r), case.draw("q"))


def drift_size(adapter: Any, m: Any) -> Any:
    """The three terms of the meter with positive signs."""
    a, (S, P, q) = oracle.magnitude(adapter), (size_of(part) for part in m)
    R, K = oracle.routing(a), oracle.mul(oracle.t(a.A), a.A)
    return oracle.trace(oracle.mul(K, R, S, oracle.t(R))) + 2 * oracle.trace(oracle.mul(K, R, oracle.t(P))) + q


# name -> its arguments, the sizes of its terms, and how many roundings each product passes at least and at most.
TABLE: dict[str, Any] = {
    "routing": (lambda c: (c.adapter(),), lambda a: oracle.routing(oracle.magnitude(a)), lambda s: (1, 1)),
    "delta": (lambda c: (c.adapter(),), lambda a: oracle.delta(oracle.magnitude(a)), lambda s: (2 * s.r + 1,) * 2),
    "apply": (
        lambda c: (c.x, c.adapter()),
        lambda x, a: oracle.apply(size_of(x), oracle.magnitude(a)),
        lambda s: (s.d_in + 2 * s.r + 1,) * 2,
    ),
    "linear": (
        lambda c: (c.x, c.W, c.adapter(), c.bias),
        lambda x, W, a, b: oracle.linear(
            *(np.abs(oracle.exact(k)) for k in (x, W)), oracle.magnitude(a), np.abs(oracle.exact(b))
        ),
        lambda s: (s.d_in + 2, s.d_in + 2 * s.r + 4),
    ),
    "merge": (
        lambda c: (c.W, c.adapter()),
        lambda W, a: size_of(W) + oracle.delta(oracle.magnitude(a)),
        lambda s: (1, 2 * s.r + 2),
    ),
    "second_moment": (
        lambda c: (c.draw("u", c.sizes.n, c.sizes.r),),
        lambda u: oracle.second_moment(size_of(u)),
        lambda s: (s.n + 1, max(s.n, 1) + 3),
    ),
    "drift": (
        lambda c: (c.adapter(), moments(c)),
        drift_size,
        lambda s: (s.d_out + 2 * s.r + 2, s.d_out + 2 * s.r + s.r**2 + 6),
    ),
    "project": (
        lambda c: (
            c.draw("R", c.sizes.r, c.sizes.r),
            core.Basis(c.draw("U", c.sizes.r, c.sizes.r), np.ones(c.sizes.r, c.dtype)),
        ),
        lambda R, b: size_of(R) + oracle.mul(size_of(R), size_of(b.U), size_of(b.U.T)),
        lambda s: (2 * s.r + 1, 2 * s.r + 2),
    ),
}


@pytest.mark.parametrize("name", TABLE)
@given(case=cases())
def test_counts(name: str, case: Case) -> None:
    """From the worst that the least count of roundings can do, to gamma of the stated count and its own evaluation."""
    arguments, size, count = TABLE[name]
    args = arguments(case)
    least, most = count(case.sizes)
    sizes = size(*args)
    u = Fraction(core.bounds.unit_roundoff(case.dtype))
    low = (1 + u / (1 + u)) ** least - 1  # the relative error of rounding to nearest is at most u / (1 + u)
    high = kit.gamma(most, case.dtype) * (1 + 3 * kit.gamma(2 * most + 4, case.dtype))
    for lane in kit.fit(case):
        ran = kit.run(f"bounds.{name}", lane, *args)
        middle, width = sizes * (high + low) / 2, sizes * (high - low) / 2
        kit.bounded(ran, middle, width)


def test_unit_roundoff_and_gamma() -> None:
    """The definitions, in every library's names; and infinite where no bound exists."""
    for lane in kit.Lane:
        for name, p in {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}.items():
            if lane.value.library == "strict" and p < 24:
                continue
            ran = kit.Ran("bounds.unit_roundoff", lane, core.bounds.unit_roundoff(lane.dtype(name), lane.value.xp))
            kit.RAN.add((ran.name, lane.value.library))
            kit.exact(ran, Fraction(1, 2**p))
        if lane.value.jit:
            continue  # Python numbers: nothing to compile
        for k in (0, 1, 7):
            ran = kit.run("bounds.gamma", lane, k, 2.0**-24)
            kit.bounded(ran, Fraction(k, 2**24 - k), Fraction(k, 2**24) * 4 * Fraction(1, 2**53))
    assert core.bounds.gamma(4, 0.25) == float("inf")


@pytest.mark.parametrize("name", ["routing", "delta", "apply", "linear", "second_moment", "drift", "project", "merge"])
@given(case=cases(dyadic=False))
def test_probabilistic_is_never_above_the_worst_case(name: str, case: Case) -> None:
    """min(4 sqrt(k), k) for k: equal below 16 roundings, smaller above."""
    args = TABLE[name][0](case)
    for lane in kit.fit(case):
        worst = kit.run(f"bounds.{name}", lane, *args).value
        likely = kit.run(f"bounds.{name}", lane, *args, method="probabilistic").value
        assert (likely <= worst).all()
    assert core.bounds.gamma(400, 2.0**-24, method="probabilistic") < core.bounds.gamma(81, 2.0**-24)


@pytest.mark.parametrize("d", [1024, 4096])
def test_the_probabilistic_bound_holds_for_long_sums(d: int) -> None:
    """Layers as wide as real ones, in float32 against float64, whose own error is 2^-29 of the bound."""
    rng = np.random.default_rng(d)
    adapter = core.init_adapter(rng, 8, d, 4)._replace(R_delta=rng.standard_normal((4, 4)).astype(np.float32))
    x, W = (rng.standard_normal(s).astype(np.float32) for s in ((3, d), (8, d)))
    exact = core.linear(*(kit.tree_map(lambda a: a.astype(np.float64), tree) for tree in (x, W, adapter)))
    for lane in kit.lanes("NUMPY", "TORCH"):
        bound = kit.run("bounds.linear", lane, x, W, adapter, method="probabilistic").value
        kit.bounded(kit.run("linear", lane, x, W, adapter), exact, bound * (1 + 2.0**-20))


def test_frame_bound() -> None:
    """Grows with both sizes and the dtype's roundoff, and is a number in every library."""
    for lane in (lane for lane in kit.Lane if not lane.value.jit):
        small, tall, wide = (
            kit.run("bounds.orthonormal", lane, *size, dtype="float32") for size in ((4, 2), (8, 2), (4, 4))
        )
        e, g = Fraction(2**6, 2**24 - 2**6), Fraction(5, 2**24 - 5)
        e = e * oracle.root(Fraction(2))
        kit.bounded(small, 2 * e + e * e + (1 + e) ** 2 * g * 2, Fraction(1, 2**60))
        assert small.value < min(tall.value, wide.value)
