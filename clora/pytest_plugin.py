"""The pytest plugin of the test kit: gathers the ledger from all workers, sums it up, writes it where asked.

Loaded into every pytest run where clora is installed, so it imports no kit: that is loaded by the tests.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest


def pytest_addoption(parser: Any) -> None:
    """``--clora-report``."""
    parser.getgroup("clora").addoption(
        "--clora-report",
        metavar="FILE",
        help="write what clora.testing compared to FILE: JSON, or the tables of a markdown page",
    )


def pytest_configure(config: Any) -> None:
    """Refuse a report that could not be written, before anything runs."""
    path = config.getoption("clora_report", None)
    if path is not None:
        from clora.testing import _report as report

        if fault := report.fault(path):
            raise pytest.UsageError(f"--clora-report: {fault}")


def pytest_sessionfinish(session: Any) -> None:
    """A worker of pytest-xdist hands over its ledger; the session that has it all writes the report."""
    kit = sys.modules.get("clora.testing._agreement")
    if kit is None or not kit.LEDGER.rows:
        return
    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["clora_ledger"] = kit.LEDGER.dump()
    elif config.getoption("clora_report"):
        from clora.testing import _report as report

        report.write(kit.LEDGER, config.getoption("clora_report"))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node: Any) -> None:
    """Gather."""
    data = getattr(node, "workeroutput", {}).get("clora_ledger")
    if data is not None:
        from clora.testing._agreement import LEDGER, Ledger

        LEDGER.merge(Ledger.load(data))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A few lines."""
    kit = sys.modules.get("clora.testing._agreement")
    if kit is not None and kit.LEDGER.rows:
        from clora.testing import _report as report

        terminalreporter.section("clora: agreement with NumPy")
        for line in report.summary(kit.LEDGER):
            terminalreporter.line(line)
    elif path := terminalreporter.config.getoption("clora_report"):
        terminalreporter.line(f"--clora-report: nothing was compared, so {path} was not written")
