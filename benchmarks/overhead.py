"""What calling the core costs over the same formula written by hand in NumPy, and what importing it costs.

Every pair is timed in turn, A B A B ..., and reported as medians and as the ratio or difference of each pair's median,
so that a machine whose speed drifts slows both alike. ``python benchmarks/overhead.py --help``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

import clora_core as core

IMPORT = "import time, numpy; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def interleaved(first: Callable[[], object], second: Callable[[], object], rounds: int, calls: int) -> dict[str, float]:
    """Median seconds a call of each, and the medians over rounds of their difference and ratio."""
    times: list[tuple[float, float]] = []
    for _ in range(rounds):
        pair = []
        for function in (first, second):
            start = time.perf_counter()
            for _ in range(calls):
                function()
            pair.append((time.perf_counter() - start) / calls)
        times.append((pair[0], pair[1]))
    return {
        "core_us": 1e6 * statistics.median(a for a, _ in times),
        "hand_us": 1e6 * statistics.median(b for _, b in times),
        "difference_us": 1e6 * statistics.median(a - b for a, b in times),
        "ratio": statistics.median(a / b for a, b in times),
    }


def calls(rounds: int) -> dict[str, dict[str, float]]:
    """`delta` and `apply` against NumPy by hand, tiny (the overhead alone) and at a transformer's shape."""
    rng = np.random.default_rng(0)
    results = {}
    for label, n, d, r, repeat in (("tiny, n=4, d=8, r=2", 4, 8, 2, 2000), ("n=512, d=768, r=16", 512, 768, 16, 5)):
        adapter = core.init_adapter(rng, d, d, r)
        adapter = adapter._replace(R_delta=rng.standard_normal((r, r)).astype(np.float32))
        A, R_old, R_delta, B = adapter
        x = rng.standard_normal((n, d)).astype(np.float32)
        results[f"delta, {label}"] = interleaved(
            lambda a=adapter: core.delta(a),
            lambda A=A, o=R_old, n=R_delta, B=B: (A @ (o + n)) @ B,
            rounds,
            repeat,
        )
        results[f"apply, {label}"] = interleaved(
            lambda x=x, a=adapter: core.apply(x, a),
            lambda x=x, A=A, o=R_old, n=R_delta, B=B: ((x @ B.T) @ (o + n).T) @ A.T,
            rounds,
            repeat,
        )
    return results


def imports(rounds: int) -> dict[str, float]:
    """Median milliseconds of a first import after NumPy, in new processes."""
    result = {}
    for module in ("clora_core", "clora_numpy"):
        runs = [subprocess.check_output([sys.executable, "-c", IMPORT.format(module)]) for _ in range(rounds)]
        result[module] = 1e3 * statistics.median(map(float, runs))
    return result


def main() -> None:
    """Print the figures, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few rounds: that it runs, not what it measures")
    parser.add_argument("--rounds", type=int, default=101, help="interleaved rounds of each pair")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    rounds = 5 if options.smoke else options.rounds
    result = {
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "calls": calls(rounds),
        "import_ms": imports(3 if options.smoke else 11),
    }
    if options.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{result['machine']}, Python {result['versions']['python']}, NumPy {np.__version__}")
    for name, row in result["calls"].items():
        print(
            f"{name:28} core {row['core_us']:9.2f} us   by hand {row['hand_us']:9.2f} us   "
            f"difference {row['difference_us']:+8.2f} us   ratio {row['ratio']:.3f}"
        )
    for module, milliseconds in result["import_ms"].items():
        print(f"import {module:21} {milliseconds:.1f} ms after numpy")


if __name__ == "__main__":
    main()
