"""What finished tasks left behind, and going back to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

import clora_core as core

from ._errors import state_error
from ._layer import Layer, Tree, map_layers, need_moments

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


def snapshot_of(layer: Layer) -> core.Adapter:
    """Copies: a step that is given its adapters by donation would take the snapshot along."""
    A, R_old, R_delta, B = layer.adapter
    if layer.info.factors != "every-task":
        A = B = None
    return jax.tree.map(jnp.copy, core.Adapter(A, R_old, R_delta, B))


def restore(adapters: Tree, history: History, name: str) -> Tree:
    """The adapters with the function they had when task ``name`` ended, at the rank of then.

    ``restore(adapters, history, history.tasks[-1])`` comes back to the present. The same bits for the same program.
    """
    snapshot = _of(history, "restore", name)

    def back(layer: Layer) -> Layer:
        A, R, zero, B = _layer_of(snapshot, layer, "restore", name)
        if layer.info.kind == "head":
            return dataclasses.replace(layer, adapter=jax.tree.map(jnp.copy, core.Adapter(None, R, zero, None)))
        A_now, _, _, B_now = layer.whole()
        r = R.shape[-1]
        spare = (A_now[..., r:], B_now[..., r:, :]) if r < A_now.shape[-1] else None
        A, B = (A_now[..., :r], B_now[..., :r, :]) if A is None else (A, B)
        adapter = jax.tree.map(jnp.copy, core.Adapter(A, R, zero, B))
        return dataclasses.replace(layer, adapter=adapter, spare=spare)

    return map_layers(back, adapters)


def rows(adapters: Tree, history: History, tasks: Sequence[str | None]) -> Tree:
    """Adapters for a batch that mixes tasks: row i of every layer's input goes by task ``tasks[i]``, None by the base.

    One product with A and one with B for the whole batch, and an r x r product a row. A row is an entry of the first
    axis of what each layer is given. For inference: nothing learns in them. Another batch of the same length compiles
    nothing anew.
    """
    need_moments(adapters, "rows", complete=False)
    names = list(dict.fromkeys(tasks))
    index = jnp.asarray([names.index(task) for task in tasks])
    snapshots = {name: None if name is None else _of(history, "rows", name) for name in names}

    def mix(layer: Layer) -> Layer:
        shape = layer.adapter.R_old.shape
        if len(shape) > 2:
            got, fix = f"R {shape}", "restore(adapters, history, task), one task at a time"
            raise state_error("rows", f"layer {layer.info.name!r} is a stack of layers", got, fix)
        table = []
        for name, snapshot in snapshots.items():
            if name is None:
                table.append(_base_routing(layer, history))
                continue
            assert snapshot is not None
            R = _layer_of(snapshot, layer, "rows", name).R_old
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


def _layer_of(snapshot: Snapshot, layer: Layer, verb: str, task: str) -> core.Adapter:
    if layer.info.name not in snapshot:
        got, fix = f"layers {sorted(snapshot)[:5]}", "pass the history of these adapters"
        raise state_error(verb, f"task {task!r} knows no layer {layer.info.name!r}", got, fix)
    return snapshot[layer.info.name]


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
