"""The GPU lane in one command: which of CuPy, PyTorch and JAX can use a CUDA device here, then tests, agreement, speed.

Every part is a process of its own with its own time limit, its output kept in --logs; a part that fails, or that cannot
run, is written down with the reason, and the others still run. The figures go to docs/gpu.md, between its marks.
Exit code: 0, or 1 if anything that could run failed, or 2 if there is no device (then no file is touched).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gpu_page
from gpu_run import CANNOT, FAILED, PASSED, ROOT, Result, execute, probe

sys.path.insert(0, str(ROOT))  # a checkout that is not installed has its own writer of pages, too
from clora import pages

PAGE = ROOT / "docs" / "gpu.md"
LIBRARIES = {"cupy": "CuPy", "torch": "PyTorch", "jax": "JAX"}
ENDING = 15  # seconds that writing the page, and the end of a part that was stopped, may take
TESTING = ("pytest", "hypothesis", "array_api_strict", "array_api_compat")


@dataclass(frozen=True)
class Part:
    """A process of the lane.

    Attributes
    ----------
    name, title : str
    command : tuple of str
        After the interpreter; "{logs}" stands for the folder of the logs.
    libraries : tuple of str
        One of them must see a device.
    modules : tuple of str
        All must be installed.
    weight : float
        Share of the time that is left when the part starts; what it does not use goes to the later parts.
    env : dict
    tests : bool
        Runs pytest (else: prints JSON).
    """

    name: str
    title: str
    command: tuple[str, ...]
    libraries: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    weight: float = 1.0
    env: dict[str, str] = field(default_factory=dict)
    tests: bool = False


def marked() -> list[str]:
    """Files of tests that carry the marker: the others are not even imported, so what they need need not be here."""
    mark = "mark." + "gpu"
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [file.relative_to(ROOT).as_posix() for file in files if mark in file.read_text(encoding="utf-8")]


def parts(profile: str, jobs: int) -> list[Part]:
    """All of them, in the order in which they run: agreement last, since it takes whatever time is left."""
    # A checkout that is not installed has no entry point for the plugin; registered twice, pytest refuses it.
    plugin = () if installed_plugin() else ("-p", "clora.pytest_plugin")
    spread = ("-n", str(jobs)) if jobs > 1 else ()
    pytest = ("-m", "pytest", "-q", *plugin)
    jax = ("benchmarks/jax_lora.py", "layers", "--json", "--dtype")
    needs_jax = {"libraries": ("jax",), "modules": ("flax", "optax", "qwix"), "weight": 2.0}
    return [
        Part(
            "tests",
            "Tests that need a GPU",
            (*pytest, "-m", "gpu", "--junitxml={logs}/tests.xml", *marked()),
            ("cupy", "torch", "jax"),
            TESTING,
            3.0,
            tests=True,
        ),
        Part("cupy", "CuPy: speed", ("benchmarks/cupy_layer.py", "--json"), ("cupy",), weight=1.5),
        Part(
            "torch",
            "PyTorch: speed, bfloat16",
            # "tasks" and "mixed" stay on the CPU whatever --device says
            ("benchmarks/torch_lora.py", "layers", "models", "--json", "--device", "cuda", "--dtype", "bfloat16"),
            ("torch",),
            ("peft",),
            2.0,
        ),
        Part("jax-bfloat16", "JAX: speed, bfloat16", (*jax, "bfloat16"), **needs_jax),
        *(
            Part(
                f"jax-{precision}",
                f"JAX: speed, float32, precision {precision}",
                (*jax, "float32", "--precision", precision),
                **needs_jax,
            )
            for precision in ("tensorfloat32", "highest")
        ),
        Part(
            "agreement",
            "Agreement with NumPy",
            (
                *pytest,
                *spread,
                "--junitxml={logs}/agreement.xml",
                "--clora-report={logs}/agreement.json",
                "tests/test_agreement.py",
            ),
            ("cupy", "torch", "jax"),
            TESTING,
            6.0,
            {"HYPOTHESIS_PROFILE": profile},
            True,
        ),
    ]


def installed_plugin() -> bool:
    """Whether pytest loads clora's plugin by itself."""
    from importlib.metadata import entry_points

    return any(point.name == "clora" for point in entry_points(group="pytest11"))


def environment(found: Sequence[str]) -> dict[str, str]:
    """What every part gets: the checkout first on the path, JAX on the device, and no library that takes all memory."""
    here = {name: importlib.util.find_spec(name) is not None for name in ("torch", "jax")}
    path = [str(ROOT), str(ROOT / "backends"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(path),
        # tests/conftest.py puts JAX on the CPU only where nothing is said; with "cuda" alone there would be no CPU
        "JAX_PLATFORMS": "cuda,cpu" if "jax" in found else "cpu",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # CuPy and PyTorch share the device with JAX in one process
        "CLORA_LANES": "all" if all(here.values()) else next((name for name, is_in in here.items() if is_in), "numpy"),
    }


def why_not(part: Part, found: Sequence[str]) -> str | None:
    """The reason for which a part cannot run here, with the fix."""
    if part.libraries and not set(part.libraries) & set(found):
        names = " or ".join(LIBRARIES[name] for name in part.libraries)
        return f"no device for {names}"
    missing = [module for module in part.modules if importlib.util.find_spec(module) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (python -m pip install {' '.join(missing).replace('_', '-')})"
    return None


def lane(todo: Sequence[Part], found: Sequence[str], logs: Path, deadline: float) -> list[Result]:
    """Run the parts one after another; none keeps another from running."""
    results = []
    for i, part in enumerate(todo):
        reason = why_not(part, found)
        if reason is not None:
            result = Result(part.name, part.title, CANNOT, reason)
        else:
            rest = sum(other.weight for other in todo[i:] if why_not(other, found) is None)
            limit = max(1.0, (deadline - time.monotonic()) * part.weight / rest)
            print(f"{part.name}: at most {limit:.0f} s ...", flush=True)
            command = [word.replace("{logs}", str(logs)) for word in part.command]
            result = execute(
                part.name, part.title, command, logs, limit, env=environment(found) | part.env, tests=part.tests
            )
            if part.tests and result.status == PASSED and not result.counts["passed"]:
                # a library without tests for it here is no failure; CuPy has some, and it found a device
                why = "; ".join(result.counts["reasons"])
                result = result._replace(
                    status=FAILED if "cupy" in found else CANNOT, reason=f"every test was skipped: {why}"
                )
        results.append(result)
        print(f"{part.name}: {result.status}{': ' if result.reason else ''}{result.reason}", flush=True)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    names = [part.name for part in parts("quick", 1)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="page whose figures are written (docs/gpu.md)")
    parser.add_argument(
        "--only",
        action="append",
        choices=names,
        metavar="PART",
        help=f"of {', '.join(names)}; may be repeated. Without --out the figures are printed, and no page is written",
    )
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="for everything (540)")
    parser.add_argument("--profile", default="quick", help="of Hypothesis, for the agreement: quick (default), ci, ...")
    parser.add_argument("--jobs", type=int, help="processes of the agreement (half the cores, at most 8; needs xdist)")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "gpu", metavar="FOLDER", help="(build/gpu)")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    # A part is stopped by an interrupt, which a shell's background job would hand down as ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seen = {name: probe(name) for name in LIBRARIES}
    found = [name for name, what in seen.items() if "error" not in what]
    if not found:
        reasons = "; ".join(f"{LIBRARIES[name]}: {what['error']}" for name, what in seen.items())
        print(f"no CUDA device that a library here can use (docs/gpu.md says what to install): {reasons}")
        return 2
    out = options.out or (None if options.only else PAGE)
    if out is not None and (fault := pages.fault(out)):
        parser.error(fault)
    xdist = importlib.util.find_spec("xdist") is not None
    jobs = options.jobs or (max(1, min(8, (os.cpu_count() or 1) // 2)) if xdist else 1)
    todo = [part for part in parts(options.profile, jobs) if not options.only or part.name in options.only]
    logs = options.logs.resolve()
    logs.mkdir(parents=True, exist_ok=True)
    results = lane(todo, found, logs, start + options.budget - ENDING)
    words = sys.argv[1:] if arguments is None else arguments
    # Folders of this machine say nothing elsewhere.
    command = shlex.join(["python", "benchmarks/gpu.py", *(Path(w).name if os.path.isabs(w) else w for w in words)])
    block = gpu_page.block(results, seen, command, [name for name in names if name not in {p.name for p in todo}])
    (logs / "figures.md").write_text(block, encoding="utf-8")
    (logs / "results.json").write_text(json.dumps([r._asdict() for r in results], indent=1) + "\n", encoding="utf-8")
    if out is None:
        print(block)
    else:
        pages.write_figures(out, block)
        print(f"written: {out}")
    return 0 if all(result.status in (PASSED, CANNOT) for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
