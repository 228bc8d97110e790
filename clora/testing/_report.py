"""The ledger as text: what was compared, how near each came to its bound, and how much room a bound leaves."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path

from clora import pages

from ._agreement import CLASSES, Ledger
from ._calls import BUILDERS

PACKAGES = ("numpy", "array-api-strict", "torch", "jax", "jax-cuda12-plugin", "jax-cuda13-plugin")
PACKAGES += ("cupy-cuda12x", "cupy-cuda13x", "hypothesis")


def summary(ledger: Ledger) -> list[str]:
    """A few lines for a terminal."""
    subjects = {subject for subject, _, _ in ledger.rows}
    count = sum(row.examples for row in ledger.rows.values())
    worst = max((row.worst, subject, backend) for (subject, backend, _), row in ledger.rows.items())
    lines = [
        f"{count} comparisons of {len(subjects)} functions and verbs",
        f"nearest to its bound: {worst[0]:.2f} of it, {worst[1]} in {worst[2]}",
    ]
    if ledger.skipped:
        lines.append(f"near-ties that say nothing: {sum(ledger.skipped.values())}")
    return lines


def markdown(ledger: Ledger) -> str:
    """The tables of docs/agreement.md."""
    subjects = sorted({key[0] for key in ledger.rows})
    functions = [subject for subject in subjects if subject in BUILDERS]
    out = [_machine(), "", "## Functions of the core", ""]
    out += _table(ledger, functions)
    out += ["", "How many times the worst error is contained in the bound, by the longest inner size:", ""]
    out += _tightness(ledger, functions)
    for title, kind in (
        ("Verbs, each judged by itself", "verb: "),
        ("Verbs in whole lives, not synchronised", "life: "),
    ):
        out += ["", f"## {title}", "", *_table(ledger, [subject for subject in subjects if subject.startswith(kind)])]
    ties = [f"- {subject}: {reason}: {count}" for (subject, reason), count in sorted(ledger.skipped.items())]
    out += ["", "## Near-ties", "", *(ties or ["None."])]
    return "\n".join(out) + "\n"


def write(ledger: Ledger, path: str | os.PathLike[str]) -> None:
    """As JSON, or as markdown: in a page that has the marks, between them; the rest of the page stays."""
    file = Path(path)
    if file.suffix == ".json":
        pages.write(file, (json.dumps(ledger.dump(), indent=1) + "\n").encode())
        return
    pages.write_figures(file, markdown(ledger))


def fault(path: str | os.PathLike[str]) -> str | None:
    """Why a report can't be written to a path, with the fix; None if it can."""
    file = Path(path)
    if file.suffix not in (".json", ".md"):
        return f"{file.name} is neither .json nor .md: give it one of the two endings"
    return pages.fault(file) if file.suffix == ".md" or not file.exists() else None


def _machine() -> str:
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        + ", ".join(versions)
        + "."
    )


def _table(ledger: Ledger, subjects: list[str]) -> list[str]:
    columns = sorted({backend for subject, backend, _ in ledger.rows if subject in subjects})
    out = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for subject in subjects:
        cells = []
        for backend in columns:
            rows = {kind: row for (s, b, kind), row in ledger.rows.items() if (s, b) == (subject, backend)}
            bounded = [row.worst for kind, row in rows.items() if kind != "exact"]
            cells.append("" if not rows else "=" if not bounded else f"{max(bounded):.2g}")
        out.append(f"| {subject} | " + " | ".join(cells) + " |")
    return out


def _tightness(ledger: Ledger, subjects: list[str]) -> list[str]:
    out = ["| | " + " | ".join(CLASSES[1:]) + " |", "|---|" + "---|" * (len(CLASSES) - 1)]
    for subject in subjects:
        worst = ledger.worst(subject)
        if worst:
            cells = [f"{1 / worst[kind]:.0f}" if worst.get(kind) else "" for kind in CLASSES[1:]]
            out.append(f"| {subject} | " + " | ".join(cells) + " |")
    return out
