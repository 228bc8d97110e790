"""The life of a task: folding, the memory, the meter, growing. Pure functions over trees of layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer

import clora_core as core
from clora_core.errors import InvalidValueError, RankError, message

from ._attach import _put, spare_directions
from ._errors import option_error, state_error
from ._history import History, snapshot_of
from ._layer import Layer, Tree, each, layers, map_layers, need_moments
from ._observe import check_moment


def begin_task(adapters: Tree) -> Tree:
    """Start a task: R_delta is folded into R_old and learns from zero; the function stays, to the bit.

    Initialise the optimizer afterwards (``tx.init(adapters)``): its state of the last task belongs to other numbers.
    Before the first task nothing is folded, since R_delta may hold the start itself. See `clora_core.begin_task`.
    """
    layers(adapters)
    return map_layers(lambda layer: _fold(layer) if layer.info.started else layer, adapters)


def end_task(
    adapters: Tree,
    observed: Mapping[str, Array] | None = None,
    *,
    history: History | None = None,
    name: str | None = None,
) -> tuple[Tree, History]:
    """Finish a task: fold R_delta, add what was observed to the memory, keep a snapshot for `restore`.

    Parameters
    ----------
    adapters : pytree of Layer
    observed : dict of layer to C, optional
        From `observe`. Without it the task is not remembered, and meter and protection raise from then on.
    history : History, optional
        Of the tasks before; none for the first.
    name : str, optional
        Of the task; by default that of the open one of a loaded folder, else "task-0", "task-1", ...

    Returns
    -------
    adapters, history
        New ones; the old stay as they were, so an exception leaves them behind intact.

    Raises
    ------
    InvalidValueError
        NaN or infinity in an adapter; second moments that are none.
    StateError
        A name that is taken, second moments of other layers, a history that is missing, a call under jit.
    """
    found, history = layers(adapters), history or History()
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(adapters)):
        raise state_error("end_task", "it reads values and takes names", "a call under jit", "call it outside of jit")
    if any(layer.info.started for layer in found.values()) and not history.tasks:
        got, fix = "adapters with finished tasks, and no history of them", "pass history=, which end_task returned last"
        raise state_error("end_task", "the history of earlier tasks is missing", got, fix)
    name = name if name is not None else history.open or f"task-{len(history.tasks)}"
    if not isinstance(name, str):
        raise state_error("end_task", "the name of a task is no text", type(name).__name__, "pass str(name)")
    if name in history.tasks:
        raise state_error("end_task", "a task of that name is finished already", repr(name), "choose another name")
    if observed is not None and set(observed) != set(found):
        got = f"second moments of {sorted(observed)[:5]}"
        raise state_error(
            "end_task", "other layers were observed", got, "pass what observe(..., adapters, ...) returned"
        )
    for layer_name, layer in found.items():
        for field, array in layer.adapter._asdict().items():
            if array is not None and not bool(jnp.isfinite(array).all()):
                raise InvalidValueError(
                    message(
                        "clora_jax.end_task",
                        f"{field} of layer {layer_name!r} is not finite",
                        got="NaN or infinity",
                        needed="finite numbers",
                        cause="a diverged training step",
                        fix="lower the learning rate, check the data; go on from the adapters before the task",
                    )
                )
    for layer_name, C in (observed or {}).items():
        check_moment(layer_name, jnp.asarray(C), "end_task")

    def end(layer: Layer) -> Layer:
        layer = _fold(layer)
        if layer.moments is None:
            return layer.with_info(started=True)
        if observed is None:
            return layer.with_info(started=True, complete=False)
        wide = layer.moments.S.dtype
        whole = core.Adapter(*(None if a is None else a.astype(wide) for a in layer.whole()))
        moments = core.record(layer.moments, whole, jnp.asarray(observed[layer.info.name], wide), xp=jnp)
        return dataclasses.replace(layer, moments=moments).with_info(started=True)

    adapters = map_layers(end, adapters)
    snapshot = {n: snapshot_of(layer) for n, layer in layers(adapters).items()}
    unobserved = (*history.unobserved, name) if observed is None else history.unobserved
    snapshots = {**history.snapshots, name: snapshot}
    return adapters, dataclasses.replace(history, snapshots=snapshots, unobserved=unobserved, open=None)


def _fold(layer: Layer) -> Layer:
    return dataclasses.replace(layer, adapter=core.end_task(layer.adapter, xp=jnp))


def drift(adapters: Tree, *, since: str = "task-ends") -> dict[str, float]:
    """The forgetting meter of each layer, see `clora_core.drift`; computed in float64 on the host."""
    need_moments(adapters, "drift")
    out = {}
    for name, layer in layers(adapters).items():
        wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (layer.adapter, layer.used()))
        out[name] = float(np.sum(core.drift(*wide, since=since)))  # of stacked layers: of all
    return out


def penalty(
    adapters: Tree, weight: float = 1.0, *, kind: str = "drift", head_weight: float | None = None, **options: Any
) -> Array:
    """A term of the loss, differentiable in R_delta, to be used under jit and grad; 0 before the first task's end.

    Parameters
    ----------
    adapters : pytree of Layer
    weight : float
    kind : {"drift", "orthogonality"}
        "drift": the meter's change since the task began (``since="boundary"``), heads included. "orthogonality": eq. 26
        of arXiv:2502.17920, `clora_core.orthogonality`; says nothing of heads.
    head_weight : float, optional
        Weight for heads, by default ``weight``.
    options
        ``since`` for "drift"; ``form``, ``energy``, ``normalize`` for "orthogonality".
    """
    known = {"drift": {"since"}, "orthogonality": {"form", "energy", "normalize"}}
    if kind not in known:
        raise option_error("penalty", "unknown kind", repr(kind), " or ".join(map(repr, known)), "pass one of the two")
    if strange := set(options) - known[kind]:
        raise option_error("penalty", "unknown option", min(strange), ", ".join(sorted(known[kind])), "correct it")
    if kind == "drift":
        need_moments(adapters, "penalty")
    total: Array | None = None
    dtype: Any = jnp.float32
    for layer in each(adapters):
        dtype = layer.adapter.R_delta.dtype
        head = layer.info.kind == "head"
        if (head and kind == "orthogonality") or not layer.info.started:
            continue
        scale = weight if head_weight is None or not head else head_weight
        A, R_old, R_delta, B = layer.adapter
        A, R_old, B = (None if a is None else lax.stop_gradient(a) for a in (A, R_old, B))
        adapter = core.Adapter(A, R_old, R_delta, B)
        if kind == "drift":
            moments = core.Moments(*(a.astype(R_delta.dtype) for a in lax.stop_gradient(layer.used())))
            value = core.drift(adapter, moments, **{"since": "boundary", **options}, xp=jnp)
        else:
            value = core.orthogonality(adapter, **options, xp=jnp)
        total = scale * value.sum() if total is None else total + scale * value.sum()
    return jnp.zeros((), dtype) if total is None else total


def expand(adapters: Tree, by: int, *, seed: int | np.random.Generator | None = None) -> Tree:
    """Grow every layer's rank by ``by`` (heads stay), the function unchanged within rounding; between tasks.

    Directions drawn at the start (``max_rank``) are used first, and keep meter and protection exact. Beyond these new
    ones are drawn from ``seed``, of which earlier tasks know nothing: `drift`, `penalty` and `protect` raise from then
    on, if a task is finished. See `clora_core.expand`.

    Raises
    ------
    RankError
        by < 1, or more than a layer has room for.
    OptionError
        New directions are needed, and no seed is given.
    """
    if by < 1:
        raise RankError(
            message(
                "clora_jax.expand", "no rank to add", got=f"by={by}", needed="by >= 1", cause="0", fix="skip the call"
            )
        )
    rng = seed if seed is None or isinstance(seed, np.random.Generator) else np.random.default_rng(seed)

    def grow(layer: Layer) -> Layer:
        if layer.info.kind == "head":
            return layer
        whole, r = layer.whole(), layer.rank
        d_out, d_in = whole.A.shape[-2], whole.B.shape[-1]
        if r + by > min(d_out, d_in):
            raise RankError(
                message(
                    "clora_jax.expand",
                    f"layer {layer.info.name!r} has no room",
                    got=f"rank {r} + {by}, d_out={d_out}, d_in={d_in}",
                    needed=f"at most {min(d_out, d_in)}",
                    cause="a small layer",
                    fix="expand by less",
                )
            )
        new = r + by - whole.A.shape[-1]
        moments, blind = layer.moments, layer.info.blind
        if new > 0:
            if rng is None:
                fix, cause = "pass seed=, or attach with max_rank=", "no max_rank, or one that is reached"
                raise option_error("expand", "new directions must be drawn", "seed=None", "a seed", fix, cause)
            drawn = spare_directions(np.asarray(whole.A), np.asarray(whole.B), new, rng, layer.info.scale)
            A_new, B_new = _put(drawn[0], layer.adapter.A.sharding), _put(drawn[1], layer.adapter.B.sharding)
            whole = core.expand(whole, A_new, B_new, xp=jnp)
            blind = blind or layer.info.started
            if moments is not None:
                S, P, q = moments
                moments = core.Moments(_wider(S, new), _wider(P, new), q)
        A, R_old, R_delta, B = whole
        n = r + by
        R_old, R_delta = (R[..., :n, :n] for R in (R_old, R_delta))  # core.expand has put zeros there
        adapter = core.Adapter(A[..., :n], R_old, R_delta, B[..., :n, :])
        spare = (A[..., n:], B[..., n:, :]) if A.shape[-1] > n else None
        grown = dataclasses.replace(layer, adapter=adapter, spare=spare, moments=moments)
        return grown.with_info(complete=layer.info.complete and not blind, blind=blind)

    layers(adapters)
    return map_layers(grow, adapters)


def _wider(M: Array, by: int) -> Array:
    return jnp.pad(M, [(0, 0)] * (M.ndim - 2) + [(0, by)] * 2)
