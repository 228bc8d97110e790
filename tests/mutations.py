"""Break the code on purpose, one line at a time, and see that the tests notice: ``python tests/mutations.py [WHAT]``.

WHAT is "core" (the default; against exact arithmetic) or "frameworks" (against each other, by the agreement suite; some
ten minutes). For each mutant the packages are copied to a temporary folder and one line of the copy is changed (the
working tree is never touched). It counts as caught only if the copy still runs, if an output on recorded inputs differs
from the original's, and if a test dies by a failed assertion, not by an error. Prints a table; exits with 1 if one
survives. To add a mutant, add a row: the file, the line's text before and after, the tests that should notice.
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

    @property
    def path(self) -> str:
        """Of the file, below the root; a bare name is a file of the core."""
        return self.file if "/" in self.file else f"clora_core/{self.file}.py"


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

LIVES, VERBS = "test_agreement.py -x -k whole_lives", "test_agreement.py -x -k random_verbs"
NUMPY, TORCH, JAX = "backends/clora_numpy/", "backends/clora_torch/", "backends/clora_jax/"
FRAMEWORKS = (
    Mutant("numpy: stop-gradient wrong", NUMPY + "layers.py", "stop_old=self.stop_old)", "stop_old=False)", LIVES),
    Mutant(
        "numpy: sign of the head's gradient",
        NUMPY + "layers.py",
        "xp.matrix_transpose(_rows(grad_y)) @ rows)",
        "-xp.matrix_transpose(_rows(grad_y)) @ rows)",
        LIVES,
    ),
    Mutant(
        "numpy: weight of the penalty lost",
        NUMPY + "continual.py",
        'layer.add_gradient("R_delta", scale * gradient)',
        'layer.add_gradient("R_delta", gradient)',
        LIVES,
    ),
    Mutant(
        "numpy: moment not accumulated",
        NUMPY + "continual.py",
        "core.record(self._moments[name], _wide",
        "core.record(core.empty_moments(_wide(self._whole(name))), _wide",
        LIVES,
    ),
    Mutant(
        "numpy: the complement is projected",
        NUMPY + "continual.py",
        "new[name] = core.project(new[name], self._bases[n])",
        "new[name] = new[name] - core.project(new[name], self._bases[n])",
        LIVES,
    ),
    Mutant(
        "numpy: the last spare direction first",
        NUMPY + "growth.py",
        "A[:, :by], B[:by, :])",
        "A[:, -by:], B[-by:, :])",
        LIVES,
    ),
    Mutant("torch: transpose lost", TORCH + "_function.py", "else (u @ R.T, A)", "else (u @ R, A)", LIVES),
    Mutant(
        "torch: stop-gradient wrong",
        TORCH + "_function.py",
        "stop_old=ctx.stop_old, plan",
        "stop_old=False, plan",
        LIVES,
    ),
    Mutant("torch: the input's gradient without W", TORCH + "_function.py", "out.x.addmm_(g, W) if", "out.x if", LIVES),
    Mutant("torch: projection not written", TORCH + "_protect.py", "value.copy_(new)", "value.copy_(value)", LIVES),
    Mutant("torch: sum for mean", TORCH + "_observe.py", "C = total / count", "C = total + 0 * count", LIVES),
    Mutant(
        "torch: moment not accumulated",
        TORCH + "_part.py",
        "core.Moments(self.S, self.P, self.q), wide",
        "core.Moments(0 * self.S, self.P, self.q), wide",
        LIVES,
    ),
    Mutant("torch: rows in another order", TORCH + "_adapter.py", "stack[index.to", "stack[index.flip(0).to", VERBS),
    Mutant("jax: stop-gradient wrong", JAX + "_function.py", "R_delta if how.stop_old else R\n", "R\n", LIVES),
    Mutant("jax: transpose", JAX + "_function.py", "(((0,), (1,)), ((), ()))", "(((1,), (1,)), ((), ()))", LIVES),
    Mutant(
        "jax: P not accumulated",
        JAX + "_tasks.py",
        "core.record(layer.moments, whole",
        "core.record(layer.moments._replace(P=0 * layer.moments.P), whole",
        LIVES,
    ),
    Mutant("jax: projected update's sign", JAX + "_protect.py", "R_delta=new - value", "R_delta=value - new", LIVES),
    Mutant(
        "jax: loaded moments lose their dtype",
        JAX + "_store.py",
        "(put(a, alike, wide) for a",
        "(put(a, alike) for a",
        LIVES,
    ),
    Mutant(
        "jax: sum for mean",
        JAX + "_observe.py",
        "C / count[..., None, None] for",
        "C + 0 * count[..., None, None] for",
        LIVES,
    ),
    Mutant(
        "jax: penalty of the last layer alone",
        JAX + "_tasks.py",
        "else total + scale * value.sum()",
        "else scale * value.sum()",
        LIVES,
    ),
    Mutant(
        "jax: rows in another order",
        JAX + "_history.py",
        "jnp.stack(table)[index]",
        "jnp.stack(table)[index[::-1]]",
        VERBS,
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


PROBE_FRAMEWORKS = """
import warnings
warnings.simplefilter("ignore")
import numpy as np
from clora import testing
np.set_printoptions(precision=17, threshold=10**6)
for widths, rank, spare, rows, factors, energy, weight in (
    ((5, 6, 4, 3), 2, 1, 4, "first-task", 0.5, 0.125),
    ((4, 4, 4, 2), 1, 2, 6, "never", None, 0.125),
    ((5, 6, 4, 3), 2, 1, 4, "every-task", None, None),
):
    life = testing.Life(1, "float32", widths, rank, spare, factors, energy, weight, rows=rows)
    for driver in testing.drivers("numpy", "torch", "jax"):
        with driver.scope():
            driver.load(life.base(), life.start(), lr=life.lr, energy=life.energy)
            x, target = life.data(0, 0)
            for task in range(2):
                driver.begin_task(f"t{task}")
                for step in range(3):
                    driver.step(*life.data(task, step), life.weight)
                if factors != "every-task":
                    driver.observe([x, x[:2]])
                driver.end_task()
            driver.expand(1, 0)
            print(driver.forward(x), driver.merged(x), dict(driver.state().arrays()))
            if hasattr(driver, "rows") and factors != "every-task":
                print(driver.rows(x[:2], ["t0", "t1"]))
"""


def python(folder: str, *args: str, profile: str = "quick") -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds the copy first."""
    path = os.pathsep.join([folder, str(Path(folder) / "backends")])
    env = os.environ | {"PYTHONPATH": path, "HYPOTHESIS_PROFILE": profile, "COLUMNS": "400", "JAX_PLATFORMS": "cpu"}
    env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *args], cwd=folder, env=env, capture_output=True, text=True, check=False)


def judge(mutant: Mutant, probe: str, original: str, profile: str) -> tuple[bool, str]:
    """Whether it was caught, and by what."""
    with tempfile.TemporaryDirectory() as folder:
        for package in ("clora_core", "clora_store", "clora", "backends"):
            shutil.copytree(ROOT / package, Path(folder) / package, ignore=shutil.ignore_patterns("__pycache__"))
        file = Path(folder) / mutant.path
        text = file.read_text()
        if text.count(mutant.before) < 1:
            return False, "the line to change is gone: update the table"
        file.write_text(text.replace(mutant.before, mutant.after, 1))
        probed = python(folder, "-c", probe)
        if probed.returncode:
            return False, "does not run: " + probed.stderr.strip().splitlines()[-1]
        if probed.stdout == original:
            return False, "changes no output"
        path, *rest = mutant.tests.split()
        args = [str(ROOT / "tests" / path), *rest, "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
        done = python(folder, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), *args, profile=profile)
        failed = re.findall(r"^FAILED (?:.*::)(\S+) - (?:AssertionError|assert )", done.stdout, flags=re.MULTILINE)
        return bool(failed), failed[0] if failed else f"no assertion failed (pytest says {done.returncode})"


def main() -> int:
    """All mutants of a table, one line each."""
    what = sys.argv[1] if len(sys.argv) > 1 else "core"
    tables = {"core": (MUTANTS, PROBE, "quick"), "frameworks": (FRAMEWORKS, PROBE_FRAMEWORKS, "unshrunk")}
    if what not in tables:
        print(f"{what!r} is no table; one of {', '.join(tables)}")
        return 2
    mutants, probe, profile = tables[what]
    first = python(str(ROOT), "-c", probe)
    if first.returncode:
        print(first.stderr)
        return 2
    survivors = 0
    for mutant in mutants:
        start = time.perf_counter()
        caught, by = judge(mutant, probe, first.stdout, profile)
        survivors += not caught
        verdict = "caught" if caught else "SURVIVED"
        print(f"{mutant.what:44} {verdict:9} {by:60} {time.perf_counter() - start:5.1f} s", flush=True)
    print(f"{len(mutants) - survivors} of {len(mutants)} caught")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
