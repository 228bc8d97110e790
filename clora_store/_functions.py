"""The function of a saved adapter at any time, and the difference of two, as low-rank products."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

import clora_core as core
from clora_core.errors import StateError, message

from ._state import Array, State


class Update(NamedTuple):
    """A layer's update as a product left (d_out, k) @ right (k, d_in), in float64."""

    left: Array
    right: Array

    def norm(self) -> float:
        """Frobenius norm, by an orthonormal frame of the columns: Gram matrices would cancel."""
        return float(np.linalg.norm(np.linalg.qr(self.left, mode="r") @ self.right))


def adapter_at(state: State, name: str, task: str | None = None) -> core.Adapter:
    """The adapter of a layer as it is (``task=None``) or as it was when a task ended, in float32 or wider.

    Raises
    ------
    StateError
        No snapshot of that task.
    """
    layer = state.layers[name]
    A, R_old, R_delta, B = layer.adapter
    if task is None:
        return _wide(A, R_old, R_delta, B)
    if task not in state.snapshots:
        known = ", ".join(map(repr, list(state.snapshots)[:20])) or "none"
        raise StateError(
            message(
                "clora_store.adapter_at",
                f"there is no snapshot of task {task!r}",
                got=repr(task),
                needed=f"one of {known}",
                cause="a misspelt name, or a folder saved without snapshots",
                fix="pass the name of a finished task",
            )
        )
    snapshot = state.snapshots[task][name]
    R = snapshot.R
    if layer.kind == "head":
        return _wide(None, R, np.zeros_like(R), None)
    r = R.shape[-1]
    A, B = layer.factors() if snapshot.A is None or snapshot.B is None else (snapshot.A, snapshot.B)
    return _wide(A[:, :r], R, np.zeros_like(R), B[:r])


def _wide(*arrays: Array | None) -> core.Adapter:
    """Half precision is for keeping, not for arithmetic."""
    wide: list[Any] = [a if a is None or a.dtype.itemsize > 2 else a.astype(np.float32) for a in arrays]
    return core.Adapter(*wide)


def difference(now: core.Adapter, before: core.Adapter | None = None) -> Update:
    """The update of an adapter, or what it has more than another: of rank r while A and B are the same, else r + r."""
    A, R_old, R_delta, B = (np.asarray(array, dtype=np.float64) for array in now)
    R = R_old + R_delta
    if before is None:
        return Update(A, R @ B)
    A0, R_old, R_delta, B0 = (np.asarray(array, dtype=np.float64) for array in before)
    R0 = R_old + R_delta
    small = min(A.shape[1], A0.shape[1])
    if np.array_equal(A[:, :small], A0[:, :small]) and np.array_equal(B[:small], B0[:small]):
        r = max(A.shape[1], A0.shape[1])
        wide = (A, B) if A.shape[1] == r else (A0, B0)
        return Update(wide[0], (padded(R, r) - padded(R0, r)) @ wide[1])
    return Update(np.concatenate([A, A0], axis=1), np.concatenate([R @ B, -R0 @ B0], axis=0))


def padded(R: Array, r: int) -> Array:
    """A routing at a higher rank."""
    return np.pad(R, ((0, r - R.shape[0]), (0, r - R.shape[1])))
