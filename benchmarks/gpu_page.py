"""What the GPU lane writes: its results as markdown."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from gpu_run import CANNOT, Result

NAMES = {"cupy": "CuPy", "torch": "PyTorch", "jax": "JAX"}
# Distributions that decide what was measured: named, or of a family.
PACKAGES = {
    "numpy",
    "array-api-compat",
    "array-api-strict",
    "hypothesis",
    "pytest",
    "ml-dtypes",
    "peft",
    "flax",
    "optax",
}
PACKAGES |= {"qwix", "triton", "safetensors", "transformers", "equinox"}
FAMILIES = ("cupy", "torch", "jax", "nvidia-", "cuda-")


def block(
    results: Sequence[Result], seen: Mapping[str, Mapping[str, str]], command: str, left_out: Sequence[str]
) -> str:
    """All that stands between the marks."""
    out = [
        f"Measured on {datetime.datetime.now(datetime.UTC).date()} by `{command}`: {driver()}; {platform.system()} "
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}.",
        "",
        *table(_libraries(seen)),
        "",
        "Packages: " + ", ".join(versions()) + ".",
        "",
        *table({r.title: {"result": r.status, "seconds": f"{r.seconds:.0f}", "": r.reason} for r in results}),
    ]
    if left_out:
        out += ["", f"Not asked for, so not run: {', '.join(left_out)}."]
    for result in results:
        if result.status != CANNOT:
            out += ["", f"### {result.title}", "", *_part(result)]
    return "\n".join(out) + "\n"


def driver() -> str:
    """The driver's own words on devices and its version."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    if shutil.which(query[0]):
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            fields = (line.rsplit(", ", 1) for line in done.stdout.strip().splitlines())
            return "; ".join(f"{device}, driver {version}" for device, version in fields)
    file = Path("/proc/driver/nvidia/version")
    return " ".join(file.read_text().splitlines()[0].split()) if file.exists() else "driver unknown (no nvidia-smi)"


def versions() -> list[str]:
    """Name and version of every distribution that matters, each once, the one that is imported first."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = str(distribution.metadata["Name"]).lower().replace("_", "-")
        if name in PACKAGES or name.startswith(FAMILIES):
            found.setdefault(name, distribution.version)
    return [f"{name} {version}" for name, version in sorted(found.items())]


def table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Rows with the union of their columns; floats to three decimals."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    out = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, row in rows.items():
        out.append(f"| {_cell(name)} | " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |")
    return out


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else " ".join(str(value).replace("|", "\\|").split())


def _libraries(seen: Mapping[str, Mapping[str, str]]) -> dict[str, Mapping[str, str]]:
    return {
        NAMES[name]: {"device": f"none: {what['error']}"} if "error" in what else what for name, what in seen.items()
    }


def _part(result: Result) -> list[str]:
    out = [f"`{result.command}`"]
    if result.counts:
        out.append("")
        counts = result.counts
        out += [f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped."]
        out += [f"- skipped, {count}: {reason}" for reason, count in counts["reasons"].items()]
        out += [f"- failed: `{name}`" for name in counts["which"]]
    if result.report:
        out += ["", *agreement(result.report)]
    for name, figures in (result.figures or {}).items():
        if name == "machine":
            out += ["", ", ".join(_said(figures)) + "."]
        else:
            out += ["", f"{name}:", "", *table(rows(figures))]
    if result.tail:
        out += ["", "The end of its output:", "", "````text", result.tail, "````"]
    return out


def _said(figures: Mapping[str, Any]) -> list[str]:
    """Facts of a machine, one after another."""
    out: list[str] = []
    for name, value in figures.items():
        out += _said(value) if isinstance(value, dict) else [f"{name} {value}"]
    return out


def rows(figures: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A benchmark's names and numbers as rows: a group of rows is opened, what is nested in a row is flattened."""
    out: dict[str, dict[str, Any]] = {}
    for name, value in figures.items():
        if not isinstance(value, dict):
            out[name] = {"": value}
        elif all(isinstance(item, dict) for item in value.values()):
            out |= rows(value)
        else:
            out[name] = {}
            for column, item in value.items():
                cells = (
                    {f"{column}, {key}": each for key, each in item.items()}
                    if isinstance(item, dict)
                    else {column: item}
                )
                out[name] |= cells
    return out


def agreement(report: str) -> list[str]:
    """For every backend: how many comparisons, and which came nearest to its bound."""
    try:
        found = json.loads(Path(report).read_text(encoding="utf-8"))["rows"]
        backends: dict[str, dict[str, Any]] = {}
        for subject, backend, _, examples, worst in sorted(found, key=lambda row: (row[1], row[4])):
            row = backends.setdefault(backend, {"comparisons": 0, "worst error / bound": 0.0, "in": "all equal"})
            row["comparisons"] += examples
            if worst > 0:
                row |= {"worst error / bound": worst, "in": subject}
    except (ValueError, KeyError, TypeError) as error:
        return [f"The report of the agreement could not be read: {error}."]
    return table(backends)
