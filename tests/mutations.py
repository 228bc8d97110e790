"""Break the core on purpose, one line at a time, and see that the tests notice: ``python tests/mutations.py``.

For each mutant the package is copied to a temporary folder and one line of the copy is changed (the working tree is
never touched). It counts as caught only if the copy still imports, if an output on recorded inputs differs from the
original's, and if a test dies by a failed assertion, not by an error. Prints a table; exits with 1 if one survives.
To add a mutant, add a row to MUTANTS: the file, the line's text before and after, the tests that should notice.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    """One changed line."""

    what: str
    file: str
    before: str
    after: str
    tests: str


MUTANTS = (
    Mutant("transpose: delta", "_layer", "else A @ (R @ B)", "else A @ (arr.transpose(R, xp) @ B)", "test_layer.py"),
    Mutant(
        "transpose lost: apply", "_layer", "arr.transpose(R_old + R_delta, xp))", "(R_old + R_delta))", "test_layer.py"
    ),
    Mutant(
        "sign: fold",
        "_tasks",
        "R = adapter.R_old + adapter.R_delta",
        "R = adapter.R_old - adapter.R_delta",
        "test_life_cycle.py -k boundary",
    ),
    Mutant(
        "fold keeps R_delta", "_tasks", "R, xp.zeros_like(R),", "R, adapter.R_delta,", "test_life_cycle.py -k boundary"
    ),
    Mutant(
        "stop-gradient missing: layer",
        "_vjp",
        "R_factors = R_delta if stop_old else R",
        "R_factors = R",
        "test_gradients.py -k test_linear_vjp",
    ),
    Mutant(
        "stop-gradient missing: delta",
        "_vjp",
        "R_delta if stop_old else R_old + R_delta",
        "R_old + R_delta",
        "test_gradients.py -k delta_vjp",
    ),
    Mutant(
        "broadcast sum lost",
        "_array",
        "array = xp.sum(array, axis=axes)",
        "array = xp.max(array, axis=axes)",
        "test_gradients.py -k test_delta_vjp",
    ),
    Mutant("moment not accumulated", "_moments", "Moments(moments.S + C,", "Moments(C,", "test_memory.py -k record"),
    Mutant("S for P in the meter", "_moments", "- 2 * moments.P", "- 2 * moments.S", "test_memory.py -k drift"),
    Mutant(
        "factor of the meter's gradient", "_moments", "out = 2 * _gram", "out = _gram", "test_memory.py -k gradient"
    ),
    Mutant(
        "projection on the wrong side of the frame",
        "_moments",
        "((R_delta @ U) * weights[..., None, :]) @ arr.transpose(U, xp)",
        "((R_delta @ arr.transpose(U, xp)) * weights[..., None, :]) @ U",
        "test_protection.py -k projection",
    ),
    Mutant(
        "energies squared",
        "_moments",
        "arr.top_energy(values, energy, xp)",
        "arr.top_energy(values * values, energy, xp)",
        "test_protection.py -k energy",
    ),
    Mutant(
        "energy criterion off by one",
        "_array",
        "before < energy * total",
        "before <= energy * total",
        "test_protection.py -k energy",
    ),
    Mutant(
        "singular values not squared", "_orthogonality", "s * s, energy", "s, energy", "test_orthogonality.py -k basis"
    ),
    Mutant(
        "cast lost",
        "_merge",
        "weight = xp.astype(weight, xp.float32)",
        "weight = +weight",
        "test_merge.py -k through_float32",
    ),
    Mutant(
        "dead start", "_adapter", 'if scheme == "lora" else zero', "if not scheme else zero", "test_init.py -k drawn"
    ),
    Mutant("signs of a frame", "_frames", "diagonal < 0", "diagonal > 0", "test_frames.py -k orthonormalize"),
    Mutant("error of compress", "_expansion", "s[..., rank:] * s[..., rank:]", "s[..., rank:]", "test_compress.py"),
    Mutant(
        "best of the task, not before it",
        "metrics",
        "xp.max(accuracy[..., :-1, :-1], axis=-2)",
        "xp.max(accuracy[..., :-1, :-1], axis=-1)",
        "test_metrics.py -k forgetting",
    ),
    Mutant(
        "plan folds on the wrong side",
        "_plan",
        "n > d_in, n > d_out, n > d_in",
        "n > d_in, n > d_in, n > d_in",
        "test_plan.py -k plain_lora",
    ),
    Mutant(
        "roundings forgotten",
        "bounds",
        "return 2 * adapter.A.shape[-1] + 1",
        "return adapter.A.shape[-1] + 1",
        "test_bounds.py -k counts",
    ),
)

PROBE = """
import clora_core as core, numpy as np
rng = np.random.default_rng(0)
normal = lambda *s: rng.standard_normal(s)
a = core.Adapter(normal(2, 5, 3), normal(3, 3), normal(3, 3), normal(3, 4))
x, W, g, u = normal(6, 4), normal(5, 4), normal(2, 6, 5), normal(8, 3)
C = core.second_moment(u)
m = core.record(core.record(core.empty_moments(a), a, C), a._replace(R_delta=normal(3, 3)), C)
basis = core.protected_basis(m.S, energy=0.5)
print(core.delta(a), core.apply(x, a), core.end_task(a), m, core.project(a.R_delta, basis), basis)
print(core.linear_vjp(x, W, a, g), core.delta_vjp(a, normal(2, 5, 4)), core.drift(a, m), core.drift_vjp(a, m))
print([core.orthogonality(a, energy=e) for e in (0.5, 0.7, 0.9)], core.compress(a, 2), core.orthonormalize(u))
print(core.merge(np.ones((1, 1)) + 2.0**-11 + 2.0**-40, core.Adapter(*[np.zeros((1, 1))] * 4), dtype=np.float16))
print(core.init_adapter(rng, 4, 3, 2, scheme="lora"), core.metrics.forgetting(normal(4, 4)), core.bounds.delta(a))
print(core.plan(4, 3, 5, 2), core.protected_basis(np.diag([2.0, 1.0, 1.0]), energy=0.5))
print([core.protected_basis(np.diag([4.0, 3.0, 2.0]), energy=e).weights for e in (0.4, 0.5, 0.6, 0.7)])
"""


def python(folder: str, *args: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds the copy first."""
    env = os.environ | {"PYTHONPATH": folder, "HYPOTHESIS_PROFILE": "quick", "COLUMNS": "400"}
    env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *args], cwd=folder, env=env, capture_output=True, text=True, check=False)


def judge(mutant: Mutant, original: str) -> tuple[bool, str]:
    """Whether it was caught, and by what."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "clora_core"
        shutil.copytree(ROOT / "clora_core", copy, ignore=shutil.ignore_patterns("__pycache__"))
        file = copy / f"{mutant.file}.py"
        text = file.read_text()
        if text.count(mutant.before) < 1:
            return False, "the line to change is gone: update the table"
        file.write_text(text.replace(mutant.before, mutant.after, 1))
        probe = python(folder, "-c", PROBE)
        if probe.returncode:
            return False, "does not run: " + probe.stderr.strip().splitlines()[-1]
        if probe.stdout == original:
            return False, "changes no output"
        path, *rest = mutant.tests.split()
        args = [str(ROOT / "tests" / path), *rest, "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
        done = python(folder, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), *args)
        failed = re.findall(r"^FAILED (?:.*::)(\S+) - (?:AssertionError|assert )", done.stdout, flags=re.MULTILINE)
        return bool(failed), failed[0] if failed else f"no assertion failed (pytest says {done.returncode})"


def main() -> int:
    """All mutants, one line each."""
    original = python(str(ROOT), "-c", PROBE).stdout
    survivors = 0
    for mutant in MUTANTS:
        start = time.perf_counter()
        caught, by = judge(mutant, original)
        survivors += not caught
        verdict = "caught" if caught else "SURVIVED"
        print(f"{mutant.what:44} {verdict:9} {by:60} {time.perf_counter() - start:5.1f} s", flush=True)
    print(f"{len(MUTANTS) - survivors} of {len(MUTANTS)} caught")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
