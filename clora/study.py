"""Running methods side by side over a stream, and the result file they leave. Nothing here draws or prints."""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np

from clora_core import metrics

from . import methods, trainers
from .suites import Backbone, Task

SCHEMA = "clora-study/1"
PACKAGES = ("clora", "numpy", "array-api-compat", "scikit-learn", "mlxtend")


def new_result(
    *, suite: str, tasks: int, seed: int, rank: int, backend: str, command: str, backbone: Backbone
) -> dict[str, Any]:
    """A result with no method in it yet."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    if backend not in versions:  # CuPy's wheels have other names than the module
        versions[backend] = importlib.import_module(backend).__version__
    return {
        "schema": SCHEMA,
        "suite": suite,
        "tasks": tasks,
        "seed": seed,
        "rank": rank,
        "backend": backend,
        "versions": {"python": platform.python_version()} | versions,
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
        "command": command,
        "backbone_accuracy": float(backbone.accuracy),
        "complete": False,
        "methods": {},
    }


def run_method(
    result: dict[str, Any],
    name: str,
    backbone: Backbone,
    stream: list[Task],
    *,
    on_step: Callable[[], None] = lambda: None,
    on_task: Callable[[str, list[float]], None] = lambda name, row: None,
) -> None:
    """Train one method; ``result`` takes what is known after every task, so that an interrupt loses none of it."""
    method = methods.get_method(name)
    rows: list[dict[str, Any]] = []
    how = {name: result[name] for name in ("backend", "rank", "seed")}
    for row in methods.train(method, backbone, stream, **how, on_step=on_step):
        rows.append(row)
        result["methods"][name] = _summary(method, rows, len(stream))
        on_task(name, row["accuracy"])


def _summary(method: methods.Method, rows: list[dict[str, Any]], tasks: int) -> dict[str, Any]:
    """Metrics over the finished tasks; see `clora_core.metrics` for each formula."""
    accuracy = [row["accuracy"] for row in rows]
    seen = np.asarray(accuracy)[:, : len(rows)]
    return {
        "title": method.title,
        "summary": method.summary,
        "finished": len(rows),
        "complete": len(rows) == tasks,
        "accuracy": accuracy,
        "last_accuracy": float(metrics.last_accuracy(seen)),
        "average_incremental_accuracy": float(metrics.average_incremental_accuracy(seen)),
        "backward_transfer": float(metrics.backward_transfer(seen)),
        "forward_transfer": float(metrics.forward_transfer(seen, baseline=np.full(len(rows), 1 / trainers.CLASSES))),
        "forgetting": float(metrics.forgetting(seen)),
        "learned": float(np.mean(np.diagonal(seen))),
        "parameters": rows[-1]["parameters"],
        "state_bytes": rows[-1]["state_bytes"],
        "state_bytes_by_task": [row["state_bytes"] for row in rows],
        "seconds": sum(row["seconds"] for row in rows),
        "drift_by_task": [row["drift"] for row in rows],
        "spectrum": rows[-1]["spectrum"],
        "settings": {
            key: value for key, value in vars(method).items() if key not in ("title", "summary") and value is not None
        },
    }


def to_json(result: dict[str, Any]) -> str:
    """The result as JSON text; a number that is not finite is refused, since JSON has none."""
    return json.dumps(result, indent=1, allow_nan=False) + "\n"


def human_bytes(count: float) -> str:
    """1120408 -> '1.07 MiB'."""
    power = min(int(math.log(max(count, 1), 1024)), 3)
    return f"{count / 1024**power:.{0 if power == 0 else 2}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"
