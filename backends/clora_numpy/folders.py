"""Adapters to and from the folders of clora_store."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device, is_cupy_array, is_numpy_array, is_torch_array, to_device

import clora_core as core
import clora_store as store
from clora_core.errors import OptionError, ShapeError, StateError, message

from .continual import ContinualAdapter, Kind, _like
from .layers import Head, Layer, Network

Array = Any


def save(adapter: ContinualAdapter, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """See `ContinualAdapter.save`."""
    path = os.path.realpath(folder)
    state = to_state(adapter)._replace(digest=adapter._saved.get(path))
    adapter._saved[path] = store.save(folder, state, overwrite=overwrite)


def export_peft(adapter: ContinualAdapter, folder: str | os.PathLike[str], **options: Any) -> store.Exported:
    """See `ContinualAdapter.export_peft`."""
    return store.export_peft(to_state(adapter), folder, **options)


def load(
    network: Network | Mapping[str, Any] | Sequence[Any],
    folder: str | os.PathLike[str] | store.State,
    *,
    finite: bool = True,
    names: Mapping[str, str] | None = None,
) -> ContinualAdapter:
    """Attach a saved adapter to a network: the function, the memory and the tasks it had, an open task included.

    Parameters
    ----------
    network : Network, or mapping or sequence of modules
        With the base weights it was trained on, without adapters.
    folder : path or clora_store.State
        What a ``save`` of any framework wrote; or a State, as `clora_store.import_peft` makes one.
    finite : bool
        Refuse NaN and infinity.
    names : mapping of str to str, optional
        Names of the saved layers -> names in this network, where these differ.

    Returns
    -------
    ContinualAdapter
        Make a new `Optimizer` for it, and call ``protect`` again, if used. An open task goes on inside
        ``with adapter.task(name)`` of the same name.

    Raises
    ------
    FormatError
        See `clora_store.load`.
    OptionError, ShapeError, StateError
        A layer that the network does not have (near names are listed), has in another size, or that has an adapter;
        nothing changed.
    """
    return load_as(ContinualAdapter, network, folder, finite=finite, names=names)


def load_as(
    kind: type[Kind],
    network: Network | Mapping[str, Any] | Sequence[Any],
    folder: str | os.PathLike[str] | store.State,
    *,
    finite: bool = True,
    names: Mapping[str, str] | None = None,
) -> Kind:
    """`load`, for a package whose ContinualAdapter is a subclass of this one."""
    network = network if isinstance(network, Network) else Network(network)
    state = folder if isinstance(folder, store.State) else store.load(folder, finite=finite)
    if state is folder:
        store.check(state, "clora_numpy.load", finite=finite)
    options = {"stop_old": True, "train_routing": True, "scale": 1.0, **state.options}
    places = store.places(state, names or {}, "clora_numpy.load")
    if len(set(places.values())) < len(places):
        got, fix = ", ".join(map(repr, places.values())), "give every saved layer a name of its own"
        raise OptionError(
            message("clora_numpy.load", "two layers on one", got=got, needed="one each", cause="wrong names", fix=fix)
        )
    modules = {name: _module(name, layer, places[name], network) for name, layer in state.layers.items()}
    arrays = {name: _Border(module) for name, module in modules.items()}
    for name, module in modules.items():
        module.adapter = core.Adapter(*map(arrays[name].fast, state.layers[name].adapter))
        if isinstance(module, Layer):
            module.stop_old = options["stop_old"]
        else:
            missing = module.adapter.R_old.shape[0] - module._start.shape[0]  # classes that came later have logit 0
            xp = array_namespace(module._start)
            rows = xp.zeros((missing, module._start.shape[1]), dtype=module._start.dtype, device=device(module._start))
            module._start = xp.concat([module._start, rows], axis=0)
    layers = {places[name]: module for name, module in modules.items()}
    adapter = kind(network, layers, state.factors, options["train_routing"])
    adapter.scale = float(options["scale"])
    for name, layer in state.layers.items():
        here, border = places[name], arrays[name]
        if layer.spare is not None:
            adapter._spare[here] = border.fast(layer.spare[0]), border.fast(layer.spare[1])
            adapter._moments[here] = core.empty_moments(adapter._whole(here))
        if layer.moments is not None:
            adapter._moments[here] = core.Moments(*map(border.wide, layer.moments))
        adapter._targets[here] = layer.kind, layer.target
    adapter._blind = [places[name] for name, layer in state.layers.items() if not layer.complete]
    adapter.tasks, adapter._unobserved = list(state.tasks), list(state.unobserved)
    wholes = {name: adapter._whole(places[name]) for name in state.layers}  # shared by all snapshots
    for task, snapshots in state.snapshots.items():
        adapter._snapshots[task] = {
            places[name]: _snapshot(snapshot, wholes[name], arrays[name]) for name, snapshot in snapshots.items()
        }
    adapter._kept = dict(state.options), dict(state.provenance)
    adapter._open = adapter._resumed = state.open
    if state.open is not None:
        if all(layer.observed is not None for layer in state.layers.values()):
            adapter._observed = {places[n]: arrays[n].wide(layer.observed) for n, layer in state.layers.items()}
        for here, layer in layers.items():
            adapter._fast[here] = _like(adapter.moments(here), layer.adapter.R_delta)
    adapter._choose_trained()
    if not isinstance(folder, store.State) and state.digest is not None:
        adapter._saved[os.path.realpath(folder)] = state.digest
    return adapter


def to_state(adapter: ContinualAdapter) -> store.State:
    """All of an adapter in NumPy arrays, an open task included."""
    if any(isinstance(layer, Layer) and layer.merged for layer in adapter.layers.values()):
        raise StateError(
            message(
                "clora_numpy.save",
                "the adapters are merged into the weights",
                got="a save of a merged adapter",
                needed="unmerged weights",
                cause="merge() without unmerge()",
                fix="unmerge() first",
            )
        )
    moving = adapter.factors == "every-task"
    layers = {}
    for name, layer in adapter.layers.items():
        kind, target = adapter._targets.get(name) or _target(name, layer)
        spare = adapter._spare.get(name)
        layers[name] = store.Layer(
            kind=kind,
            target=target,
            adapter=core.Adapter(*map(_host, layer.adapter)),
            spare=None if spare is None else (_host(spare[0]), _host(spare[1])),
            moments=None if moving else core.Moments(*map(_host, adapter._moments[name])),
            observed=_host(adapter._observed[name]) if adapter._observed is not None and not moving else None,
            complete=name not in adapter._blind,
        )
    snapshots = {}
    for task, adapters in adapter._snapshots.items():
        snapshots[task] = {
            name: store.Snapshot(_host(R_old), *((_host(A), _host(B)) if moving and A is not None else (None, None)))
            for name, (A, R_old, _, B) in adapters.items()
        }
    options, provenance = adapter._kept
    layer = next((layer for layer in adapter.layers.values() if isinstance(layer, Layer)), None)
    return store.State(
        layers=layers,
        factors=adapter.factors,
        tasks=tuple(adapter.tasks),
        unobserved=tuple(adapter._unobserved),
        open=adapter._open,
        snapshots=snapshots,
        options={
            **options,
            "stop_old": layer is None or layer.stop_old,
            "train_routing": adapter.train_routing,
            "scale": adapter.scale,
        },
        provenance={**provenance, "framework": adapter.framework},
    )


def _snapshot(snapshot: store.Snapshot, whole: core.Adapter, border: _Border) -> core.Adapter:
    """The adapter of a snapshot; factors that stay are views of one array."""
    R = border.fast(snapshot.R)
    zero = border.xp.zeros_like(R)
    if whole.A is None:
        return core.Adapter(None, R, zero, None)
    if snapshot.A is not None:
        return core.Adapter(border.fast(snapshot.A), R, zero, border.fast(snapshot.B))
    r = R.shape[0]
    return core.Adapter(whole.A[:, :r], R, zero, whole.B[:r, :])


class _Border:
    """Arrays as a layer of the network has them: its library and device, its dtype or the wide one of the memory."""

    def __init__(self, module: Layer | Head) -> None:
        example = module.W if isinstance(module, Layer) else module._start
        self.xp, self.device = array_namespace(example), device(example)
        self.dtype = module.adapter_dtype if isinstance(module, Layer) else example.dtype
        dtypes = self.xp.__array_namespace_info__().dtypes(device=self.device, kind="real floating")
        self.widest = dtypes.get("float64", self.dtype)

    def fast(self, array: Array) -> Array:
        """For the layer."""
        return None if array is None else self._to(array, self.dtype)

    def wide(self, array: Array) -> Array:
        """For the memory."""
        return self._to(array, self.widest)

    def _to(self, array: Array, dtype: Any) -> Array:
        standard = array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)  # halves: exactly
        if dtype != self.xp.float64:  # the widest of its device, perhaps
            standard = standard.astype(np.float32)
        return self.xp.astype(self.xp.asarray(np.array(standard), device=self.device), dtype)


def _host(array: Array | None) -> Any:
    """In NumPy, from wherever it is: no library hands over another device's memory unasked."""
    if array is None:
        return None
    if is_numpy_array(array) or is_cupy_array(array) or is_torch_array(array):
        return np.asarray(to_device(array, "cpu"))
    return np.asarray(to_device(array, array_namespace(array).__array_namespace_info__().default_device()))


def _target(name: str, layer: Layer | Head) -> tuple[str, store.Target]:
    if isinstance(layer, Layer):
        return "linear", store.Target(f"{name}.weight", (layer.W.shape[0], layer.W.shape[1]))
    classes, columns = layer._start.shape
    return "head", store.Target(f"{name}.weight", (classes, columns - 1), bias=f"{name}.bias")


def _module(name: str, layer: store.Layer, here: str, network: Network) -> Any:
    """The module of the network that a saved layer belongs to, checked."""

    def no(kind: type[Exception], what: str, got: str, needed: str, fix: str) -> Exception:
        cause = "another network, or another version of it"
        return kind(message("clora_numpy.load", what, got=got, needed=needed, cause=cause, fix=fix))

    own = {n: m for n, m in network.modules.items() if isinstance(m, Head if layer.kind == "head" else Layer)}
    if here not in own:
        near = ", ".join(map(repr, difflib.get_close_matches(here, own, n=3) or list(own)[:5])) or "none"
        kind = "Head" if layer.kind == "head" else "Layer"
        what = f"the network has no {kind} for layer {name!r}"
        raise no(OptionError, what, repr(here), f"one of its {kind}s (near: {near})", "pass names={saved: here}")
    module = own[here]
    if isinstance(module, Layer):
        if module.adapter is not None:
            raise no(StateError, f"layer {here!r} has an adapter already", "a second one", "none", "make it afresh")
        got, needed = tuple(module.W.shape), layer.target.matrix
    else:
        got, needed = tuple(module._start.shape), layer.target.matrix
        if layer.target.bias is None:
            fix = "give the classifier a bias (of zeros) before it is first attached to"
            raise no(ShapeError, f"head {name!r} has no bias", "a weight alone", "a weight and a bias", fix)
        needed = (needed[0], needed[1] + 1)
    if got != needed:
        raise no(ShapeError, f"layer {name!r} has another size here", str(got), str(needed), "load it onto its network")
    return module
