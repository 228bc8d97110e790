"""The GPU lane's processes: asking a library for a device, and running a part with a time limit and its output kept."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PASSED, FAILED, LATE, CANNOT = "passed", "failed", "out of time", "could not run"
GRACE = 15  # seconds in which pytest, interrupted, writes down what it has
PROBE = 60  # seconds for an import and a sum; reading a large library from a cold disk takes tens
TAIL = 25  # lines of output that a failure is shown with

# Each prints JSON, or leaves with the reason. A sum, since a device can be seen and still run nothing.
PROBES = {
    "cupy": """
import json, cupy
runtime = cupy.cuda.runtime
runtime.getDeviceCount() or exit("CuPy finds no device")
assert float(cupy.ones(2).sum()) == 2
version = lambda number: f"{number // 1000}.{number % 1000 // 10}"
print(json.dumps({"device": runtime.getDeviceProperties(0)["name"].decode(), "version": cupy.__version__,
    "CUDA runtime": version(runtime.runtimeGetVersion()), "driver's CUDA": version(runtime.driverGetVersion())}))
""",
    "torch": """
import json, torch
torch.version.cuda or exit(f"PyTorch {torch.__version__} is built without CUDA")
torch.cuda.is_available() or exit(f"PyTorch {torch.__version__} finds no device")
assert torch.ones(2, device="cuda").sum().item() == 2
print(json.dumps({"device": torch.cuda.get_device_name(), "version": torch.__version__,
    "CUDA runtime": torch.version.cuda}))
""",
    "jax": """
import json, jax
device = jax.devices("cuda")[0]
assert float(jax.numpy.ones(2).sum()) == 2
client = " ".join(device.client.platform_version.split())
print(json.dumps({"device": device.device_kind, "version": jax.__version__, "CUDA runtime": client}))
""",
}


class Result(NamedTuple):
    """What became of a part.

    Attributes
    ----------
    name, title, status, reason, command : str
    seconds : float
    counts : dict
        Of tests: passed, failed, skipped, and for the last two the names and the reasons.
    figures : JSON
        What a benchmark printed.
    tail : str
        End of the output of a part that failed.
    report : str
        The file with what clora.testing compared, if the part left one.
    """

    name: str
    title: str
    status: str
    reason: str = ""
    command: str = ""
    seconds: float = 0.0
    counts: dict[str, Any] = {}  # noqa: RUF012  # read only
    figures: Any = None
    tail: str = ""
    report: str = ""


def probe(library: str) -> dict[str, str]:
    """What the library says of its device; or ``error``: the reason for which it has none."""
    if importlib.util.find_spec(library) is None:
        return {"error": "not installed"}
    env = {**os.environ, "JAX_PLATFORMS": "cuda,cpu"}  # with "cuda" alone, a JAX without it names no reason
    command = [sys.executable, "-c", PROBES[library]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PROBE, env=env)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {PROBE} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode} and said nothing"]
        return {"error": readable_paths(lines[-1])[:200]}
    return json.loads(done.stdout.splitlines()[-1])


def readable_paths(text: str) -> str:
    """Without the folders that only this machine has."""
    for path, name in ((ROOT, "."), (sys.prefix, "<python>"), (sys.base_prefix, "<python>"), (Path.home(), "~")):
        if str(path) not in ("/", "/usr"):
            text = text.replace(str(path), name)
    return text


def execute(
    name: str,
    title: str,
    command: Sequence[str],
    logs: Path,
    limit: float,
    *,
    env: dict[str, str],
    tests: bool = False,
    grace: float = GRACE,
) -> Result:
    """Run the interpreter with these arguments, from the root; judge how it ended."""
    kept = {"log": logs / f"{name}.log", "out": logs / f"{name}.{'log' if tests else 'json'}"}
    report = logs / f"{name}.json"
    for old in (*kept.values(), report, logs / f"{name}.xml"):
        old.unlink(missing_ok=True)  # of an earlier run: must not pass for this one's
    start = time.monotonic()
    with kept["log"].open("wb") as log, contextlib.ExitStack() as stack:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=log if tests else stack.enter_context(kept["out"].open("wb")),
            stderr=log,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env={**os.environ, **env},
            start_new_session=True,  # so that what it starts can be ended with it
        )
        late = not _wait(process, limit, grace)
    seconds = time.monotonic() - start
    shown = " ".join(["python", *map(shlex.quote, command)])
    result = Result(name, title, PASSED, "", readable_paths(shown.replace(str(logs), "LOGS")), seconds)
    result = (
        _judge_tests(result, logs, process.returncode) if tests else _judge_figures(result, kept, process.returncode)
    )
    if late:
        done = f"; {_said(result.counts)} until then" if result.counts else ""
        result = result._replace(status=LATE, reason=f"stopped after {limit:.0f} s{done}")
    if result.status != PASSED:
        lines = kept["log"].read_text(encoding="utf-8", errors="replace").splitlines()
        result = result._replace(tail=readable_paths("\n".join(lines[-TAIL:])))
    return result._replace(report=str(report) if tests and report.exists() else "")


def _wait(process: subprocess.Popen[bytes], limit: float, grace: float) -> bool:
    """Whether it ended by itself; else it is interrupted, for pytest to sum up, and ended with all that it started."""
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(limit)
            return True
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _judge_tests(result: Result, logs: Path, code: int) -> Result:
    try:
        counts = junit(logs / f"{result.name}.xml")
    except (OSError, ET.ParseError):
        return result._replace(status=FAILED, reason=f"pytest ended with {code} and left no report of its tests")
    result = result._replace(counts=counts)
    if code == 0:
        return result
    reason = _said(counts) if counts["failed"] else f"pytest ended with {code} though no test failed"
    return result._replace(status=FAILED, reason=reason)


def _judge_figures(result: Result, kept: dict[str, Path], code: int) -> Result:
    if code:
        lines = kept["log"].read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return result._replace(status=FAILED, reason=readable_paths(lines[-1])[:200] if lines else f"ended with {code}")
    try:
        return result._replace(figures=json.loads(kept["out"].read_text(encoding="utf-8")))
    except ValueError as error:
        return result._replace(status=FAILED, reason=f"printed no JSON: {error}")


def junit(file: Path) -> dict[str, Any]:
    """Counts of tests in pytest's own report: passed, failed (errors included), skipped; which, and why."""
    ended: dict[str, str] = {}
    reasons: Counter[str] = Counter()
    for case in ET.parse(file).iter("testcase"):
        if case.get("name") is None:
            continue  # what an interrupt broke off
        name, skipped = f"{case.get('classname')}.{case.get('name')}", case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            ended[name] = "failed"  # one that fails twice, in itself and in its teardown, is there twice
        elif skipped is not None:
            ended[name] = "skipped"
            reasons[skipped.get("message") or skipped.get("type", "")] += 1
        else:
            ended.setdefault(name, "passed")
    counts = Counter(ended.values())
    which = [name for name, end in ended.items() if end == "failed"]
    return {**{end: counts[end] for end in ("passed", "failed", "skipped")}, "which": which, "reasons": dict(reasons)}


def _said(counts: dict[str, Any]) -> str:
    return ", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "skipped"))
