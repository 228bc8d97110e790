"""Adapters to and from the folders of clora_store, which knows NumPy arrays alone."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import clora_core as core
import clora_store as store
from clora_core.errors import ShapeError, message

from ._attach import NAMES, _put, place, shardings
from ._errors import option_error, state_error
from ._history import History
from ._layer import Info, Layer, Tree, flatten, layers


def save(
    folder: str | os.PathLike[str], adapters: Tree, history: History | None = None, *, overwrite: bool = False
) -> History:
    """Write all of the adapters into a folder that every framework of clora reads; atomically, see `clora_store.save`.

    Parameters
    ----------
    folder : path
        Made where it does not exist. Saving to it again replaces what is there in one step.
    adapters : pytree of Layer
        As the last task left them, or as they are within the next.
    history : History, optional
        Needed once a task is finished.
    overwrite : bool
        Replace the adapter of another run.

    Returns
    -------
    History
        To go on with: it knows what was saved where, so that the next save may replace it.

    Raises
    ------
    StateError
        The history is missing; adapters of an earlier task, of mixed rows, of several rules, stacked ones; and what
        `clora_store.save` says.
    """
    history = history or History()
    path = os.path.realpath(folder)
    state = to_state(adapters, history)._replace(digest=dict(history.digest).get(path))
    return _note(history, path, store.save(folder, state, overwrite=overwrite))


def export_peft(
    folder: str | os.PathLike[str], adapters: Tree, history: History | None = None, **options: Any
) -> store.Exported:
    """Write the present function, or that of ``task=``, as a PEFT LoRA folder; see `clora_store.export_peft`."""
    return store.export_peft(to_state(adapters, history or History()), folder, **options)


def load(
    folder: str | os.PathLike[str] | store.State,
    params: Tree,
    *,
    finite: bool = True,
    names: Mapping[str, str] | None = None,
    layout: str | None = None,
) -> tuple[dict[str, Layer], History]:
    """Adapters from a folder that any framework of clora wrote, for these params.

    Parameters
    ----------
    folder : path or clora_store.State
    params : pytree
        The base model it was trained on; only shapes, dtypes and shardings are read.
    finite : bool
        Refuse NaN and infinity.
    names : mapping of str to str, optional
        Paths of the saved modules -> paths in this tree, where these differ.
    layout : {"in,out", "out,in"}, optional
        As in `attach`.

    Returns
    -------
    adapters, history
        A task that is open in the folder (``history.open``) goes on: train without `begin_task`, observe, `end_task`.

    Raises
    ------
    FormatError
        See `clora_store.load`.
    OptionError, ShapeError
        A layer that the params do not have (near names are listed), have in another size, or of a kind that is not
        adapted here.
    """
    state = folder if isinstance(folder, store.State) else store.load(folder, finite=finite)
    if state is folder:
        store.check(state, "clora_jax.load", finite=finite)
    leaf_numbers, leaves, _ = flatten(params)
    places = store.places(state, names or {}, "clora_jax.load")
    options = {"stop_old": True, "train_routing": True, "scale": 1.0, **state.options}
    rules = {"factors": state.factors} | {k: options[k] for k in ("stop_old", "train_routing", "scale")}
    out: dict[str, Layer] = {}
    here: dict[str, str] = {}
    for name, layer in state.layers.items():
        leaf = _leaf(name, places[name], leaf_numbers, layer)
        info = _info(name, layer, leaf, leaf_numbers, leaves, layout, rules)
        if info.name in out:
            got, fix = f"{name!r} and another on {info.name!r}", "give every saved path a path of its own"
            raise option_error(
                "load", "two saved layers belong to one module", got, "one each", fix, "names= that meet"
            )
        info = info._replace(
            started=bool(state.tasks), complete=layer.complete and (layer.moments is None or not state.unobserved)
        )
        info = info._replace(blind=not layer.complete)
        out[info.name] = _layer(layer, leaves[leaf_numbers[leaf]], info)
        here[name] = info.name
    snapshots = {
        task: {here[name]: _snapshot(s, out[here[name]]) for name, s in snapshot.items()}
        for task, snapshot in state.snapshots.items()
    }
    lost = state.tasks[: len(state.tasks) - len(snapshots)]
    history = History(snapshots, state.unobserved, state.open, tuple(lost))
    if not isinstance(folder, store.State) and state.digest is not None:
        history = _note(history, os.path.realpath(folder), state.digest)
    return out, history


def to_state(adapters: Tree, history: History) -> store.State:
    """All of the adapters in NumPy arrays."""
    found = layers(adapters)
    first = next(iter(found.values())).info
    _check_saved(found, history)
    out = {}
    for name, layer in found.items():
        info = layer.info
        out[name] = store.Layer(
            kind=info.kind,
            target=store.Target(info.leaf, info.shape, info.layout, bias=info.bias),
            adapter=core.Adapter(*map(_host, layer.adapter)),
            spare=None if layer.spare is None else (_host(layer.spare[0]), _host(layer.spare[1])),
            moments=None if layer.moments is None else core.Moments(*(_host(a) for a in layer.moments)),
            complete=not info.blind,
        )
    snapshots = {
        task: {
            name: store.Snapshot(_host(R), *((None, None) if A is None else (_host(A), _host(B))))
            for name, (A, R, _, B) in snapshot.items()
        }
        for task, snapshot in history.snapshots.items()
    }
    linear = next((layer.info for layer in found.values() if layer.info.kind == "linear"), first)
    return store.State(
        layers=out,
        factors=first.factors,
        tasks=history.tasks,
        unobserved=history.unobserved,
        open=history.open,
        snapshots=snapshots,
        options={"stop_old": linear.stop_old, "train_routing": linear.train_routing, "scale": linear.scale},
        provenance={"framework": f"jax {jax.__version__}"},
    )


def _check_saved(found: Mapping[str, Layer], history: History) -> None:
    """What is written must be the present, whole, and under one set of rules."""
    stack = next((name for name, layer in found.items() if layer.adapter.R_old.ndim > 2), None)
    if stack is not None:
        got, fix = f"R {found[stack].adapter.R_old.shape}", "save a tree of single layers: unstack params and adapters"
        raise state_error("save", f"layer {stack!r} is a stack of layers, or goes row by row", got, fix)
    if any(layer.info.started for layer in found.values()) and not history.tasks:
        got, fix = "adapters with finished tasks, and no history of them", "pass the history that end_task returned"
        raise state_error("save", "the history is missing", got, fix)
    infos = [layer.info for layer in found.values() if layer.info.kind == "linear"]
    rules = {(info.factors, info.stop_old, info.train_routing, info.scale) for info in infos}
    if len(rules) > 1:
        got, fix = "several factors=, stop_old=, train_routing= or scale=", "save them into a folder each"
        raise state_error("save", "a folder holds adapters of one set of rules", got, fix)
    if not history.snapshots or history.open is not None:
        return
    last = history.snapshots[history.tasks[-1]]
    for name, layer in found.items():
        R_old = layer.adapter.R_old
        R = last[name].R_old if name in last else R_old
        rows, columns = R.shape
        # Grown since, perhaps: the rest is zero.
        if rows > R_old.shape[0] or not bool((R_old[:rows, :columns] == R).all()):
            got, fix = f"layer {name!r} is not as task {history.tasks[-1]!r} left it", "restore the last task first"
            raise state_error("save", "these adapters are those of an earlier task", got, fix)


def _note(history: History, path: str, digest: str) -> History:
    return dataclasses.replace(history, digest=tuple({**dict(history.digest), path: digest}.items()))


def _host(array: Any) -> Any:
    return None if array is None else np.asarray(array)


def _leaf(name: str, module: str, names: Mapping[str, int], layer: store.Layer) -> str:
    """The path of the array that a saved layer stands beside."""
    if layer.kind not in ("linear", "head") or layer.target.rows is not None:
        got = layer.kind if layer.target.rows is None else f"rows {layer.target.rows} of a fused projection"
        fix = "use it with clora_torch, or merge it into the checkpoint (clora merge)"
        raise option_error(
            "load",
            f"layer {name!r} is of a kind that is not adapted here",
            got,
            "a linear layer or head",
            fix,
            "an adapter of another model",
        )
    for leaf in (module, *(f"{module}.{last}".removeprefix(".") for last in NAMES), layer.target.weight):
        if leaf in names:
            return leaf
    modules = sorted({n.rpartition(".")[0] if n.rpartition(".")[2] in NAMES else n for n in names})
    near = [n for n in modules if n.endswith(f".{module}")] or difflib.get_close_matches(module, modules, n=3)
    needed = f"a path of this tree (near: {', '.join(map(repr, near[:5])) or 'none'})"
    fix = "load onto the model it was trained on, or pass names={saved path: path here}"
    raise option_error(
        "load", f"there is no weight for layer {name!r}", repr(module), needed, fix, "another model, or other names"
    )


def _info(
    name: str,
    layer: store.Layer,
    leaf: str,
    names: Mapping[str, int],
    leaves: list[Any],
    layout: str | None,
    rules: Any,
) -> Info:
    W = leaves[names[leaf]]
    beside = f"{leaf.rpartition('.')[0]}.bias".removeprefix(".")
    bias = beside if layer.kind == "head" and beside in names else None
    layout = layout or (layer.target.layout if leaf == layer.target.weight else None)
    info = place(leaf, W, layout, layer.kind, bias, rules)
    shape = tuple(W.shape) if info.layout == "out,in" else tuple(W.shape)[::-1]
    one_sided = layer.kind == "head" and (bias is None) != (layer.target.bias is None)
    if shape != layer.target.whole or one_sided:
        raise ShapeError(
            message(
                "clora_jax.load",
                f"weight {leaf!r} is not the one that layer {name!r} was saved from",
                got="a bias in one of the two only"
                if one_sided
                else f"(d_out, d_in) = {shape}, read as {info.layout!r}",
                needed=f"(d_out, d_in) = {layer.target.whole}",
                cause="another model, or a weight in the other layout",
                fix="load onto the model it was trained on, or pass layout=",
            )
        )
    return info


def _layer(layer: store.Layer, W: Any, info: Info) -> Layer:
    by_out, by_in, alike = shardings(W, info.layout)
    dtype = W.dtype if W.dtype in (jnp.float32, jnp.float64) else jnp.dtype("float32")
    wide = jax.dtypes.canonicalize_dtype(np.float64)

    def put(array: Any, sharding: Any, to: Any = dtype) -> Any:
        return None if array is None else _put(_cast(array, to), sharding)

    A, R_old, R_delta, B = layer.adapter
    adapter = core.Adapter(put(A, by_out), put(R_old, alike), put(R_delta, alike), put(B, by_in))
    spare = None if layer.spare is None else (put(layer.spare[0], by_out), put(layer.spare[1], by_in))
    moments = None if layer.moments is None else core.Moments(*(put(a, alike, wide) for a in layer.moments))
    return Layer(adapter, moments, spare, info)


def _cast(array: Any, dtype: Any) -> Any:
    """One rounding, through float32."""
    standard = array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)
    return standard.astype(np.dtype(dtype.name if hasattr(dtype, "name") else dtype))


def _snapshot(snapshot: store.Snapshot, layer: Layer) -> core.Adapter:
    like = layer.adapter

    def put(array: Any, other: Any) -> Any:
        return None if array is None else _put(_cast(array, like.R_old.dtype), getattr(other, "sharding", None))

    R: Any = put(snapshot.R, like.R_old)
    return core.Adapter(put(snapshot.A, like.A), R, jnp.zeros_like(R), put(snapshot.B, like.B))
