"""The life of a task: folding, memory, the meter, going back, growing. Pure functions over trees of layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import clora_core as core
from clora_core.errors import InvalidValueError, MomentsIncomplete, RankError, message

from ._attach import _put
from ._errors import option_error, state_error
from ._layer import MASKED, Layer, Tree, layers, map_layers, padding

Snapshot = Mapping[str, core.Adapter]


@dataclasses.dataclass(frozen=True)
class History:
    """What finished tasks left behind, beside the adapters: names, and the adapter of each layer as it then was.

    Kept on the host's side of a program: no jitted function takes it, so nothing is traced anew as it grows.

    Attributes
    ----------
    snapshots : dict of task to dict of layer to clora_core.Adapter
        In order. While factors stay, A and B are None: those of the adapters in use serve.
    unobserved : tuple of str
        Tasks that were finished without second moments.
    open : str or None
        A task that had begun in the folder this was loaded from: train on, without `begin_task`, and `end_task`.
    """

    snapshots: Mapping[str, Snapshot] = dataclasses.field(default_factory=dict)
    unobserved: tuple[str, ...] = ()
    open: str | None = None
    lost: tuple[str, ...] = ()  # of a folder saved without snapshots: earlier tasks, by name alone
    digest: tuple[tuple[str, str], ...] = ()  # folder -> what was last saved there, or loaded

    @property
    def tasks(self) -> tuple[str, ...]:
        """Finished tasks, in order."""
        return (*self.lost, *self.snapshots)


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
        NaN or infinity in an adapter.
    StateError
        A name that is taken, or second moments of other layers.
    """
    found, history = layers(adapters), history or History()
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
    snapshot = {n: _snapshot(layer) for n, layer in layers(adapters).items()}
    missing = observed is None and any(layer.moments is not None for layer in found.values())
    unobserved = (*history.unobserved, name) if missing else history.unobserved
    snapshots = {**history.snapshots, name: snapshot}
    return adapters, dataclasses.replace(history, snapshots=snapshots, unobserved=unobserved, open=None)


def _fold(layer: Layer) -> Layer:
    return dataclasses.replace(layer, adapter=core.end_task(layer.adapter, xp=jnp))


def _snapshot(layer: Layer) -> core.Adapter:
    """Copies: a step that is given its adapters by donation would take the snapshot along."""
    A, R_old, R_delta, B = layer.adapter
    if layer.info.factors != "every-task":
        A = B = None
    return jax.tree.map(jnp.copy, core.Adapter(A, R_old, R_delta, B))


# --- memory ------------------------------------------------------------------------------------------------------


def second_moments(forward: Callable[..., Any], adapters: Tree, *args: Any) -> dict[str, tuple[Array, Array]]:
    """Sums of u u^T, and the number of rows, of every layer in one forward pass: what `observe` adds up.

    Pure, to be used inside jit, `jax.lax.scan` or `jax.shard_map` (where sums are already over all devices; with
    ``check_vma=False`` over each one's own rows, to be added by `jax.lax.psum`).
    ``forward(adapters, *args)`` returns anything with floating point leaves that depend on every layer.

    Notes
    -----
    Got by one pass backwards, in which each layer's tap answers with its second moment: so layers inside of scan, vmap
    and checkpoint are reached, and shards of a batch are summed by the compiler.
    """
    taps = {name: _empty_tap(layer) for name, layer in layers(adapters).items()}

    def outputs(taps: dict[str, Any]) -> Array:
        tapped = map_layers(lambda layer: dataclasses.replace(layer, tap=taps[layer.info.name]), adapters)
        leaves = [leaf for leaf in jax.tree.leaves(forward(tapped, *args)) if hasattr(leaf, "dtype")]
        total = [jnp.sum(leaf.astype(jnp.float32)) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
        if not total:
            cause, fix = "a forward pass that ends in argmax, say", "return the logits, or all hidden states"
            raise option_error("observe", "forward returns no floating point array", "none", "one", fix, cause)
        return sum(total[1:], total[0])

    return jax.grad(outputs)(taps)


def _empty_tap(layer: Layer) -> tuple[Array, Array]:
    assert layer.moments is not None
    S = layer.moments.S
    return jnp.zeros_like(S), jnp.zeros(S.shape[:-2], S.dtype)


def observe(
    forward: Callable[..., Any],
    adapters: Tree,
    params: Tree,
    batches: Iterable[Any],
    *,
    mask: Callable[[Any], Array] | None = None,
) -> dict[str, Array]:
    """The second moment C of every layer's routed inputs over a task's data, for `end_task`; after training.

    Parameters
    ----------
    forward : callable
        ``forward(adapters, params, batch)`` runs the model (through `bind`) and returns anything with floating point
        leaves that depend on every layer: logits will do. The same function each time is compiled once.
    adapters, params : pytrees
    batches : iterable of pytrees of arrays
        A pass over the task's inputs.
    mask : callable, optional
        ``mask(batch)``: 1 for rows that count, 0 for padding; layers whose inputs have its shape are masked by it.
        Inside of a model under `jax.vmap` use `padding` instead.

    Returns
    -------
    dict of layer to C, (r, r), spare directions included
        In float64 where JAX has it (``jax_enable_x64``).

    Raises
    ------
    StateError
        No data; a layer that nothing reached; factors that learn in every task, whose moments would be stale.
    """
    _need(adapters, "observe", complete=False)
    leaves, treedef = jax.tree.flatten((adapters, params))
    arrays = [leaf for leaf in leaves if hasattr(leaf, "dtype")]
    rest = tuple(None if hasattr(leaf, "dtype") else leaf for leaf in leaves)  # an equinox module has such leaves
    total: dict[str, tuple[Array, Array]] | None = None
    for batch in batches:
        weights = None if mask is None else jnp.asarray(mask(batch))
        sums = _sums((forward, treedef, rest), arrays, batch, weights)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    if total is None:
        raise state_error("observe", "there was no data to observe", "no batch", "pass the task's inputs again")
    for name, (_, count) in total.items():
        if not float(count) > 0:
            fix = "return from forward what depends on every layer, and check the mask"
            raise state_error("observe", f"nothing reached layer {name!r}", "no row", fix)
    return {name: C / count for name, (C, count) in total.items()}


@partial(jax.jit, static_argnums=0)
def _sums(how: Any, arrays: list[Array], batch: Any, weights: Array | None) -> Any:
    forward, treedef, rest = how
    given = iter(arrays)
    adapters, params = jax.tree.unflatten(treedef, [next(given) if leaf is None else leaf for leaf in rest])
    hit: list[str] = []
    token = MASKED.set(hit)
    try:
        with padding(weights):
            sums = second_moments(forward, adapters, params, batch)
    finally:
        MASKED.reset(token)
    if weights is not None and not hit:
        got, fix = (
            f"mask {weights.shape}",
            "return a mask of the layers' inputs without their last axis, or use padding()",
        )
        raise option_error(
            "observe", "the mask fits no layer", got, "the leading axes of inputs", fix, "a model under vmap"
        )
    return sums


def drift(adapters: Tree, *, since: str = "task-ends") -> dict[str, float]:
    """The forgetting meter of each layer, see `clora_core.drift`; computed in float64 on the host."""
    _need(adapters, "drift")
    out = {}
    for name, layer in layers(adapters).items():
        wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (layer.adapter, layer.used()))
        out[name] = float(core.drift(*wide, since=since))
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
        _need(adapters, "penalty")
    total: Array | None = None
    for layer in layers(adapters).values():
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
        total = scale * value if total is None else total + scale * value
    return jnp.zeros(()) if total is None else total


def _need(adapters: Tree, verb: str, *, complete: bool = True) -> None:
    """Second moments must be there, and cover every task: known from what is static, so also said while tracing."""
    for name, layer in layers(adapters).items():
        if layer.moments is None:
            fix = "attach with factors='first-task' or 'never'"
            what = "the factors learn in every task, so second moments are stale"
            raise state_error(verb, what, "factors='every-task'", fix)
        if complete and not layer.info.complete:
            raise MomentsIncomplete(
                message(
                    f"clora_jax.{verb}",
                    f"layer {name!r} has not seen every finished task in every direction that is in use",
                    got="a task ended without observed=, or a rank grown beyond max_rank",
                    needed="end_task(adapters, observe(...)) at the end of every task",
                    cause="observe left out",
                    fix="observe every task; attach with max_rank= to grow",
                )
            )


# --- going back, mixing, growing ---------------------------------------------------------------------------------


def restore(adapters: Tree, history: History, name: str) -> Tree:
    """The adapters with the function they had when task ``name`` ended, at the rank of then.

    ``restore(adapters, history, history.tasks[-1])`` comes back to the present. The same bits for the same program.
    """
    snapshot = _of(history, "restore", name)

    def back(layer: Layer) -> Layer:
        A, R, zero, B = snapshot[layer.info.name]
        if layer.info.kind == "head":
            return dataclasses.replace(layer, adapter=core.Adapter(None, R, zero, None))
        if A is not None:
            return dataclasses.replace(layer, adapter=core.Adapter(A, R, zero, B))
        A, _, _, B = layer.whole()
        r = R.shape[0]
        spare = (A[:, r:], B[r:]) if r < A.shape[1] else None
        return dataclasses.replace(layer, adapter=core.Adapter(A[:, :r], R, zero, B[:r]), spare=spare)

    return map_layers(back, adapters)


def rows(adapters: Tree, history: History, tasks: Sequence[str | None]) -> Tree:
    """Adapters for a batch that mixes tasks: row i of every layer's input goes by task ``tasks[i]``, None by the base.

    One product with A and one with B for the whole batch, and an r x r product a row. A row is an entry of the first
    axis of what each layer is given. For inference: nothing learns in them. Another batch of the same length compiles
    nothing anew.
    """
    _need(adapters, "rows", complete=False)
    names = list(dict.fromkeys(tasks))
    index = jnp.asarray([names.index(task) for task in tasks])
    snapshots = {name: None if name is None else _of(history, "rows", name) for name in names}

    def mix(layer: Layer) -> Layer:
        shape = layer.adapter.R_old.shape
        table = []
        for name, snapshot in snapshots.items():
            if name is None:
                table.append(_base_routing(layer, history))
                continue
            assert snapshot is not None
            R = snapshot[layer.info.name].R_old
            if R.shape[0] > shape[0] or R.shape[1] > shape[1]:
                fix = "restore(adapters, history, history.tasks[-1]) first"
                raise state_error(
                    "rows", f"task {name!r} had a higher rank than layer {layer.info.name!r} has", R.shape, fix
                )
            table.append(jnp.pad(R, [(0, want - have) for want, have in zip(shape, R.shape, strict=True)]))
        R = lax.stop_gradient(jnp.stack(table)[index])
        adapter = layer.adapter._replace(R_old=R, R_delta=jnp.zeros_like(layer.adapter.R_delta))
        return dataclasses.replace(layer, adapter=adapter).with_info(stop_old=False)

    return map_layers(mix, adapters)


def _base_routing(layer: Layer, history: History) -> Array:
    if layer.info.kind == "head":
        fix = "pass the name of a task: what a classifier was before the first is not kept"
        raise state_error("rows", f"head {layer.info.name!r} has no base", "None among the tasks", fix)
    return jnp.zeros_like(layer.adapter.R_old)


def _of(history: History, verb: str, name: str) -> Snapshot:
    if name not in history.snapshots:
        known = ", ".join(map(repr, list(history.snapshots)[:20])) or "none"
        raise state_error(verb, f"there is no snapshot of task {name!r}", f"finished: {known}", "name a finished task")
    return history.snapshots[name]


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
        d_out, d_in = whole.A.shape[0], whole.B.shape[1]
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
        new = r + by - whole.A.shape[1]
        moments, complete = layer.moments, layer.info.complete
        if new > 0:
            if rng is None:
                fix, cause = "pass seed=, or attach with max_rank=", "no max_rank, or one that is reached"
                raise option_error("expand", "new directions must be drawn", "seed=None", "a seed", fix, cause)
            drawn = core.init_adapter(rng, d_out, d_in, new, dtype=np.dtype(whole.A.dtype.name))
            by_out, by_in = layer.adapter.A.sharding, layer.adapter.B.sharding
            scale = np.asarray(layer.info.scale, drawn.A.dtype)
            whole = core.expand(whole, _put(scale * drawn.A, by_out), _put(drawn.B, by_in), xp=jnp)
            complete = complete and not layer.info.started
            if moments is not None:
                S, P, q = moments
                moments = core.Moments(jnp.pad(S, (0, new)), jnp.pad(P, (0, new)), q)
        A, R_old, R_delta, B = whole
        n = r + by
        R_old, R_delta = (jnp.pad(R[:r, :r], (0, by)) for R in (R_old, R_delta))
        adapter = core.Adapter(A[:, :n], R_old, R_delta, B[:n])
        spare = (A[:, n:], B[n:]) if A.shape[1] > n else None
        return dataclasses.replace(layer, adapter=adapter, spare=spare, moments=moments).with_info(complete=complete)

    layers(adapters)
    return map_layers(grow, adapters)
