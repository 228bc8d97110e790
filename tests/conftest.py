"""Profiles of Hypothesis, one thread for each library, and the audit of what a whole run compared."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import kit
import pytest

if kit.torch is not None:
    kit.torch.set_num_threads(1)

SLOW = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large, hypothesis.HealthCheck.filter_too_much]
QUIET: dict[str, Any] = {"deadline": None, "suppress_health_check": SLOW}
hypothesis.settings.register_profile("ci", max_examples=40, derandomize=True, database=None, **QUIET)
hypothesis.settings.register_profile(
    "quick", max_examples=8, derandomize=True, report_multiple_bugs=False, database=None, **QUIET
)
# As many as ci, and no search for the smallest example: tests/mutations.py wants to know that one fails.
UNSHRUNK = [phase for phase in hypothesis.Phase if phase not in (hypothesis.Phase.shrink, hypothesis.Phase.explain)]
hypothesis.settings.register_profile(
    "unshrunk", max_examples=40, derandomize=True, database=None, phases=UNSHRUNK, **QUIET
)
hypothesis.settings.register_profile("thorough", max_examples=10_000, **QUIET)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

FOUND: list[str] = []  # what the audit of the whole run has to say


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker hands over what it ran and compared; the session that has it all judges it."""
    config: Any = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["ran"], config.workeroutput["compared"] = sorted(kit.RAN), sorted(kit.COMPARED)
    elif whole(session):
        FOUND.extend(kit.uncovered())
    if FOUND and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Collect what a worker of pytest-xdist hands over."""
    output = getattr(node, "workeroutput", {})
    kit.RAN.update(map(tuple, output.get("ran", ())))
    kit.COMPARED.update(map(tuple, output.get("compared", ())))


def whole(session: pytest.Session) -> bool:
    """All tests were asked for (no file, no -k, no -m, no last-failed), and all of them ran."""
    option: Any = session.config.option
    if (
        option.deselect
        or option.ignore
        or option.ignore_glob
        or option.keyword
        or option.markexpr
        or getattr(option, "lf", False)
        or option.collectonly
    ):
        return False
    everything = session.config.args_source == pytest.Config.ArgsSource.TESTPATHS
    here = [os.path.abspath(arg) for arg in session.config.args] == [os.path.dirname(os.path.abspath(__file__))]
    return (everything or here) and not session.shouldstop and not session.shouldfail


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU say so where there is none."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not kit.has_gpu():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason=kit.NO_GPU))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A skip needs a reason from the list."""
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason not in kit.SKIPS:
            FOUND.append(f"{report.nodeid} was skipped for a reason that kit.SKIPS does not list: {reason}")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say loudly what is missing, and what no GPU has seen."""
    skipped = [report for report in terminalreporter.stats.get("skipped", ()) if kit.NO_GPU in str(report.longrepr)]
    if skipped:
        terminalreporter.line(f"{len(skipped)} tests were skipped: {kit.NO_GPU} (nox -s gpu)")
    if FOUND:
        terminalreporter.section("audit")
        for line in FOUND:
            terminalreporter.line(line, red=True)


@pytest.fixture(autouse=True)
def _one_precision() -> Iterator[None]:
    """No lane leaves JAX's precision or strict's flags behind."""
    from array_api_strict import get_array_api_strict_flags

    def state() -> tuple[Any, Any]:
        return kit.jax and kit.jax.config.jax_enable_x64, get_array_api_strict_flags()

    before = state()
    yield
    assert state() == before
