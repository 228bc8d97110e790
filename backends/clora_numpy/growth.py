"""Growing the rank between tasks."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np
from array_api_compat import array_namespace, device

import clora_core as core
from clora_core.errors import OptionError, RankError, StateError, message

from .layers import Layer

if TYPE_CHECKING:
    from .continual import ContinualAdapter

Array = Any


def expand(adapter: ContinualAdapter, by: int, seed: int | np.random.Generator | None) -> None:
    """See `ContinualAdapter.expand`."""
    by = operator.index(by)
    layers = {name: layer for name, layer in adapter.layers.items() if isinstance(layer, Layer)}
    if adapter._open is not None or any(layer.merged for layer in layers.values()):
        raise StateError(
            message(
                "clora_numpy.expand",
                "a task is open, or the adapters are merged",
                got="a call out of order",
                needed="finished tasks and unmerged weights",
                cause="expand in the middle of a task",
                fix="end the task, or unmerge() first",
            )
        )
    ranks = {name: adapter.layers[name].adapter.A.shape[1] for name in layers}
    for name, layer in layers.items():
        r, largest = ranks[name], min(layer.W.shape)
        if not 1 <= by <= largest - r:
            raise RankError(
                message(
                    "clora_numpy.expand",
                    f"the rank of layer {name!r} can't grow by that",
                    got=f"by={by} at rank {r}",
                    needed=f"1 <= by <= {largest - r}",
                    cause="a small layer among them, or a final rank passed for the growth",
                    fix="expand by less, or leave small layers out of targets",
                )
            )
    missing = {name: r + by - adapter._whole(name).A.shape[1] for name, r in ranks.items()}
    if seed is None and max(missing.values()) > 0:
        raise OptionError(
            message(
                "clora_numpy.expand",
                "new directions must be drawn",
                got="seed=None",
                needed="a seed",
                cause="no max_rank, or one that is reached",
                fix="pass seed=, or attach with max_rank=",
            )
        )
    rng = np.random.default_rng(seed)
    for name, layer in layers.items():
        if missing[name] > 0:
            add_spare(adapter, name, *draw_spare(adapter._whole(name), missing[name], rng, adapter.scale))
            if adapter.tasks and name not in adapter._blind:
                adapter._blind.append(name)
        A, B = adapter._spare.pop(name)
        layer.adapter = core.expand(adapter.layers[name].adapter, A[:, :by], B[:by, :])
        forget(adapter, name)
        if by < A.shape[1]:
            adapter._spare[name] = A[:, by:], B[by:, :]


def draw_spare(whole: core.Adapter, count: int, rng: np.random.Generator, scale: float) -> tuple[Array, Array]:
    """Directions (d_out, count), (count, d_in), orthonormal up to the scale and orthogonal to those there.

    Made in NumPy float64 from one generator, as the other frameworks draw them: the same directions everywhere.
    """
    from .folders import _host  # which imports what imports this

    new = []
    for factor, size in ((whole.A, scale), (array_namespace(whole.B).matrix_transpose(whole.B), 1.0)):
        there = _host(factor)
        joint = np.concatenate([there.astype(np.float64), rng.standard_normal((there.shape[0], count))], axis=1)
        drawn = (size * core.orthonormalize(joint)[:, there.shape[1] :]).astype(there.dtype)
        new.append(array_namespace(factor).asarray(drawn, dtype=factor.dtype, device=device(factor)))
    return new[0], array_namespace(new[1]).matrix_transpose(new[1])


def add_spare(adapter: ContinualAdapter, name: str, A: Array, B: Array) -> None:
    """Directions beyond those in use, of which the memory knows nothing yet."""
    xp, count = array_namespace(A), A.shape[1]
    if name in adapter._spare:
        old = adapter._spare[name]
        A, B = xp.concat([old[0], A], axis=1), xp.concat([old[1], B], axis=0)
    adapter._spare[name] = A, B
    S, P, q = adapter._moments[name]
    adapter._moments[name] = core.Moments(_wider(S, count), _wider(P, count), q)


def forget(adapter: ContinualAdapter, name: str) -> None:
    """Drop what optimizers hold of a layer's parameters: it is of another rank."""
    for optimizer in adapter._optimizers:
        for field in ("A", "R_delta", "B"):
            optimizer.state.pop(f"{name}.{field}", None)


def _wider(M: Array, by: int) -> Array:
    xp, like = array_namespace(M), {"dtype": M.dtype, "device": device(M)}
    n = M.shape[0]
    M = xp.concat([M, xp.zeros((n, by), **like)], axis=1)
    return xp.concat([M, xp.zeros((by, n + by), **like)], axis=0)
