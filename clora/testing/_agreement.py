"""Comparing a function over backends on the same masters, and the ledger of how close they came to their bounds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

import clora_core as core

from ._backends import Backend, leaves, run
from ._calls import NearTie, make_call
from ._cases import Case

CLASSES = ("exact", "to 8", "to 64", "above")  # by the longest size; the bound above 64 is the probabilistic one


class Row(NamedTuple):
    """What is known of one function in one backend, or of one verb of one driver."""

    examples: int = 0
    worst: float = 0.0


class Ledger:
    """Worst ratios of error to bound, by subject (a function or a verb), backend and class; and what was skipped."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, str], Row] = {}
        self.skipped: dict[tuple[str, str], int] = {}

    def note(self, subject: str, backend: str, kind: str, ratio: float = 0.0) -> None:
        """One comparison."""
        row = self.rows.get((subject, backend, kind), Row())
        self.rows[subject, backend, kind] = Row(row.examples + 1, max(row.worst, ratio))

    def skip(self, subject: str, reason: str) -> None:
        """One example that says nothing."""
        self.skipped[subject, reason] = self.skipped.get((subject, reason), 0) + 1

    def merge(self, other: Ledger) -> None:
        """Add what another process found."""
        for key, row in other.rows.items():
            mine = self.rows.get(key, Row())
            self.rows[key] = Row(mine.examples + row.examples, max(mine.worst, row.worst))
        for key, count in other.skipped.items():
            self.skipped[key] = self.skipped.get(key, 0) + count

    def worst(self, subject: str) -> dict[str, float]:
        """Class -> the largest ratio over all backends; the exact class has none."""
        out: dict[str, float] = {}
        for (name, _, kind), row in self.rows.items():
            if name == subject and kind != "exact":
                out[kind] = max(out.get(kind, 0.0), row.worst)
        return out

    def dump(self) -> Any:
        """As plain lists, for another process or a file."""
        rows = [[*key, row.examples, row.worst] for key, row in sorted(self.rows.items())]
        return {"rows": rows, "skipped": [[*key, count] for key, count in sorted(self.skipped.items())]}

    @classmethod
    def load(cls, data: Any) -> Ledger:
        """The reverse of `dump`."""
        ledger = cls()
        ledger.rows = {(a, b, c): Row(n, worst) for a, b, c, n, worst in data["rows"]}
        ledger.skipped = {(a, b): n for a, b, n in data["skipped"]}
        return ledger


LEDGER = Ledger()  # of this process; the pytest plugin collects and shows it


def agree(name: str, case: Case, backends: Iterable[Backend], *, ledger: Ledger = LEDGER) -> None:
    """Run a core function on a case in every backend that can; each must give what NumPy gives, within its bound.

    Parameters
    ----------
    name : str
        Dotted name below ``clora_core``: a key of ``clora_core.capabilities()``.
    case : Case
        One example, drawn by `cases`.
    backends : iterable of Backend
    ledger : Ledger
        What is found is noted there.

    Raises
    ------
    AssertionError
        Which function, in which backend, off by how many times its bound.
    """
    try:
        call = make_call(name, case)
    except NearTie as tie:
        ledger.skip(name, str(tie))
        return
    needs = core.capabilities()[name]
    uses_linalg = needs.linalg and not _bare(name, call.kwargs)
    for backend in backends:
        if not case.fits(backend, linalg=uses_linalg) or (backend.compile is not None and not needs.jit):
            continue
        got = call.view(run(name, backend, *call.args, **call.kwargs))
        compare(name, backend.name, got, call.expected, call.allowed, size=call.size, ledger=ledger)


def _bare(name: str, kwargs: dict[str, Any]) -> bool:
    """Options under which a function of the linalg kind needs none of it."""
    if name == "init_adapter":
        return kwargs.get("scheme") != "svd"
    return name.startswith("orthogonality") and kwargs.get("form") != "basis"


def compare(
    subject: str, backend: str, got: Any, expected: Any, allowed: Any, *, size: int = 0, ledger: Ledger | None = LEDGER
) -> None:
    """No number is further from the expected one than allowed; None: all are equal.

    Raises
    ------
    AssertionError
    """
    kind = "exact" if allowed is None else CLASSES[1 + (size > 8) + (size > 64)]
    results, wanted = leaves(got), leaves(expected)
    where = f"{subject} in {backend}"
    _claim(len(results) == len(wanted), f"{where}: {len(results)} arrays, not {len(wanted)}")
    limits = leaves(allowed) if allowed is not None else [None] * len(wanted)
    ratio = 0.0
    for have, want, limit in zip(results, wanted, limits, strict=True):
        if isinstance(want, str):
            _claim(have == want, f"{where}: {have}, not {want}")
            continue
        _claim(np.shape(have) == np.shape(want), f"{where}: {np.shape(have)}, not {np.shape(want)}")
        _claim(np.all(np.isfinite(want)), f"{where}: what is expected is not finite")
        _claim(np.all(np.isfinite(have)), f"{where} is not finite")
        error = np.abs(np.asarray(have, np.float64) - np.asarray(want, np.float64))
        if limit is None:
            _claim(not error.any(), f"{where} is not equal: off by {error.max(initial=0.0):.3g}")
            continue
        limit = np.broadcast_to(np.asarray(limit, np.float64), error.shape)
        _claim(np.all(np.isfinite(limit) & (limit >= 0)), f"{where}: its bound is none")
        part = np.where(error > 0, error / np.where(limit > 0, limit, 1e-300), 0.0)
        ratio = max(ratio, float(part.max(initial=0.0)))
    if ledger is not None:
        ledger.note(subject, backend, kind, ratio)
    _claim(ratio <= 1.0, f"{where} is off by {ratio:.3g} times its bound")


def _claim(holds: Any, otherwise: str) -> None:
    """An assertion that ``python -O`` keeps."""
    if not holds:
        raise AssertionError(otherwise)
