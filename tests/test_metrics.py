"""The metrics are their published formulas, entry by entry in rationals; one example shows how far they disagree."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import kit
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import clora_core as core


def mean(numbers: list[Fraction]) -> Fraction:
    """0 for no numbers."""
    return sum(numbers, start=Fraction(0)) / max(len(numbers), 1)


# a[i][j]: after task i, on task j; indices from 0.
FORMULAS: dict[str, Callable[[Any, int], Any]] = {
    "last_accuracy": lambda a, T: mean(a[T - 1]),
    "average_accuracy": lambda a, T: [mean(a[i][: i + 1]) for i in range(T)],
    "average_incremental_accuracy": lambda a, T: mean([mean(a[i][: i + 1]) for i in range(T)]),
    "backward_transfer": lambda a, T: mean([a[T - 1][j] - a[j][j] for j in range(T - 1)]),
    "forward_transfer": lambda a, T: mean([a[j - 1][j] for j in range(1, T)]),
    "forgetting": lambda a, T: mean([max(a[i][j] for i in range(T - 1)) - a[T - 1][j] for j in range(T - 1)]),
}


def lanes(T: int, dtype: str) -> list[kit.Lane]:
    """JAX compiles for every T: three of them."""
    return [lane for lane in kit.Lane if dtype in lane.value.dtypes and (not lane.is_jax or T in (1, 3, 4))]


@pytest.mark.parametrize("name", FORMULAS)
@given(T=st.integers(1, 6), batch=st.booleans(), seed=st.integers(0, 2**32 - 1), wide=st.booleans())
def test_formula(name: str, T: int, batch: bool, seed: int, wide: bool) -> None:
    """Equal where every divisor is a power of two; elsewhere within the roundings of the sums and divisions."""
    dtype = "float64" if wide else "float32"
    accuracy = (np.random.default_rng(seed).integers(0, 65, (*(2,) * batch, T, T)) / 64).astype(dtype)
    matrices = accuracy.reshape(-1, T, T)
    rows = [FORMULAS[name]([[Fraction(float(v)) for v in row] for row in matrix], T) for matrix in matrices]
    expected = np.asarray(rows, dtype=object)
    expected = expected.reshape((*accuracy.shape[:-2], *expected.shape[1:]))
    # Every formula is a mean of at most T differences of numbers in [0, 1], of means: two sums and two divisions.
    bound = np.full(expected.shape, 2 * kit.gamma(2 * T + 5, dtype))
    for lane in lanes(T, dtype):
        ran = kit.run(f"metrics.{name}", lane, accuracy)
        kit.bounded(ran, expected, bound)
        if (T == 4 and name == "last_accuracy") or T <= 2:
            kit.exact(ran, expected)


@given(T=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
def test_forward_transfer_over_a_baseline(T: int, seed: int) -> None:
    """b_j is subtracted for every task but the first."""
    rng = np.random.default_rng(seed)
    accuracy, baseline = rng.integers(0, 65, (T, T)) / 64, rng.integers(0, 65, T) / 64
    expected = mean([Fraction(accuracy[j - 1][j]) - Fraction(baseline[j]) for j in range(1, T)])
    for lane in lanes(T, "float64"):
        ran = kit.run("metrics.forward_transfer", lane, accuracy, baseline=baseline)
        kit.bounded(ran, expected, kit.gamma(T + 4, "float64"))


def test_one_matrix_many_numbers() -> None:
    """Five tasks, per cent: the names disagree, so a number without its formula says nothing."""
    accuracy = np.asarray(
        [[96, 8, 4, 12, 8], [80, 96, 12, 8, 4], [72, 88, 96, 4, 12], [84, 72, 80, 96, 8], [64, 80, 72, 88, 96]],
        dtype=np.float64,
    )
    expected = {
        "last_accuracy": Fraction(400, 5),
        "average_accuracy": [Fraction(96), Fraction(88), Fraction(256, 3), Fraction(83), Fraction(80)],
        "average_incremental_accuracy": (96 + 88 + Fraction(256, 3) + 83 + 80) / 5,
        "backward_transfer": Fraction(-80, 4),
        "forward_transfer": Fraction(8 + 12 + 4 + 8, 4),
        "forgetting": Fraction(32 + 16 + 24 + 8, 4),
    }
    for name, value in expected.items():
        for lane in kit.lanes("NUMPY", "TORCH"):
            want = np.asarray(value, dtype=object)
            bound = np.full(want.shape, 200 * kit.gamma(16, "float64"))
            kit.bounded(kit.run(f"metrics.{name}", lane, accuracy), want, bound)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_entry_a_formula_does_not_name_has_no_say(bad: float) -> None:
    """backward_transfer ends before the last task: a_TT is not in it, and with one task nothing is."""
    matrix = np.asarray([[0.5, 0.25], [0.75, bad]])
    assert core.metrics.backward_transfer(matrix) == 0.25
    assert core.metrics.backward_transfer(np.asarray([[bad]])) == 0
    assert core.metrics.forgetting(matrix) == -0.25
