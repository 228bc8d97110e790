"""What the benchmarks share: timing in turn, ratios within a round, and how numbers are printed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any


def timed(
    functions: dict[str, Callable[[], object]], rounds: int, *, settle: Callable[[object], object] = lambda result: None
) -> dict[str, list[float]]:
    """Seconds of each function in every round, A B C A B C ...; two rounds of warming up are not counted.

    ``settle`` waits until a device has done what it was given: it is called before, and with the result.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds + 2):
        for name, function in functions.items():
            settle(None)
            start = time.perf_counter()
            settle(function())
            if i >= 2:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: dict[str, list[float]], a: str, b: str) -> float:
    """Median over rounds of a's time by b's."""
    return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))


def readable(value: Any, indent: int = 0) -> str:
    """Nested names and numbers, one a line."""
    lines = []
    for key, item in value.items():
        if isinstance(item, dict):
            lines += [f"{' ' * indent}{key}", readable(item, indent + 2)]
        else:
            number = f"{item:.3f}" if isinstance(item, float) else f"{item:,}" if isinstance(item, int) else item
            lines.append(f"{' ' * indent}{key:<34} {number}")
    return "\n".join(lines)
