"""Adapters to and from the folders of clora_store, which knows NumPy arrays alone."""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, distributed, nn

import clora_core as core
import clora_store as store
from clora_core.errors import OptionError, ShapeError, message

from . import _state
from ._distributed import is_split
from ._layers import is_conv1d, kind_of, sizes, weight_name
from ._part import HALF, LayerAdapter
from ._targets import Target

if TYPE_CHECKING:
    from ._adapter import ContinualAdapter


def save(adapter: ContinualAdapter, folder: str | os.PathLike[str], *, overwrite: bool) -> None:
    """See `ContinualAdapter.save`."""
    path = os.path.realpath(folder)
    state = to_state(adapter)._replace(digest=adapter._saved.get(path))
    if any(is_split(part.R_delta) for part in adapter.layers.values()):
        told: list[Any] = [None]
        if distributed.get_rank() == 0:
            try:
                told = [store.save(folder, state, overwrite=overwrite)]
            except Exception as error:  # the others must hear of it, or they wait for ever
                told = [error]
        distributed.broadcast_object_list(told)
        if isinstance(told[0], Exception):
            raise told[0]
        adapter._saved[path] = told[0]
    else:
        adapter._saved[path] = store.save(folder, state, overwrite=overwrite)


def export_peft(adapter: ContinualAdapter, folder: str | os.PathLike[str], **options: Any) -> store.Exported:
    """See `ContinualAdapter.export_peft`."""
    return store.export_peft(to_state(adapter), folder, **options)


def load(
    model: nn.Module,
    folder: str | os.PathLike[str] | store.State,
    *,
    finite: bool = True,
    names: Mapping[str, str] | None = None,
) -> ContinualAdapter:
    """Attach a saved adapter to a model: the function, the memory and the tasks it had, an open task included.

    Parameters
    ----------
    model : torch.nn.Module
        The base model it was trained on, without adapters.
    folder : path or clora_store.State
        What `ContinualAdapter.save` of any framework wrote; or a State, as `clora_store.import_peft` makes one.
    finite : bool
        Refuse NaN and infinity.
    names : mapping of str to str, optional
        Paths of the saved modules -> paths in this model, where these differ.

    Returns
    -------
    ContinualAdapter
        Make a new optimizer from its parameters, and call `protect` again, if used. An open task goes on inside
        ``with adapter.task(name)`` of the same name.

    Raises
    ------
    FormatError
        See `clora_store.load`.
    OptionError, ShapeError
        A layer that the model does not have (near names are listed), or has in another size or kind; nothing changed.

    Notes
    -----
    Adapters take the dtype they would have after `attach`: half precision in the folder becomes float32.
    """
    from ._attach import install, refuse_layer, refuse_second  # attach makes what has a method that saves

    state = folder if isinstance(folder, store.State) else store.load(folder, finite=finite)
    if state is folder:
        store.check(state, "clora_torch.load", finite=finite)
    modules = dict(model.named_modules())
    refuse_second(modules)
    paths = store.places(state, names or {}, "clora_torch.load")
    places = {name: _place(name, layer, paths[name], modules) for name, layer in state.layers.items()}
    _check_places(places)
    options = {"stop_old": True, "train_routing": True, "dropout": 0.0, "scale": 1.0, **state.options}
    spares = _spares(state)
    heads = [target.name for name, target in places.items() if state.layers[name].kind == "head"]
    for target in places.values():
        refuse_layer(target.name, modules, head=target.name in heads)
    for name, target in places.items():
        _check_shape(name, state.layers[name], target, modules[target.name])
    parts = {}
    for name, target in places.items():
        if target.name not in heads:
            like = _like(modules[target.name])
            adapter = core.Adapter(*(_tensor(array, **like) for array in state.layers[name].adapter))
            stop_old, dropout = options["stop_old"], float(options["dropout"])
            parts[target] = LayerAdapter(adapter, rows=target.rows, stop_old=stop_old, dropout=dropout)
            _make_room(parts[target], spares[name], like)
    adapter = install(model, parts, heads, state.factors, options["train_routing"], float(options["scale"]))
    _state.load(adapter, _as_dict(state, spares, places, adapter))
    if not isinstance(folder, store.State) and state.digest is not None:
        adapter._saved[os.path.realpath(folder)] = state.digest
    return adapter


def to_state(adapter: ContinualAdapter) -> store.State:
    """All of an adapter in NumPy arrays, an open task included."""
    book = _state.dump(adapter)
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in adapter.model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    remembers = adapter.factors != "every-task"
    layers = {}
    for name, part in adapter.layers.items():
        arrays = {field: _array(tensor) for field, tensor in book["layers"][name].items()}
        module_name = name if part.rows is None else name[: name.rindex("[")]
        kind, target = _target(module_name, adapter.model.get_submodule(module_name), part, names)
        layers[name] = store.Layer(
            kind=kind,
            target=target,
            adapter=core.Adapter(*(arrays.get(field) for field in core.Adapter._fields)),
            spare=(arrays["A_spare"], arrays["B_spare"]) if "A_spare" in arrays else None,
            moments=core.Moments(arrays["S"], arrays["P"], arrays["q"]) if remembers else None,
            observed=_array(book["observed"][name]) if book["observed"] is not None and remembers else None,
            complete=name not in book["blind"],
        )
    fields = {"R_old": "R", "A": "A", "B": "B"}
    part = next(iter(adapter.layers.values()))
    adapted = next((part for part in adapter.layers.values() if part.A is not None), part)
    base = str(getattr(getattr(adapter.model, "config", None), "_name_or_path", "") or type(adapter.model).__name__)
    base = os.path.basename(base) if os.path.isabs(base) else base  # a path of this machine says nothing elsewhere
    return store.State(
        layers=layers,
        factors=adapter.factors,
        tasks=tuple(book["tasks"]),
        unobserved=tuple(book["unobserved"]),
        open=book["open"],
        snapshots={
            task: {
                n: store.Snapshot(**{fields[f]: _array(t.to(adapter.layers[n].R_old.dtype)) for f, t in s.items()})
                for n, s in snapshots.items()
            }
            for task, snapshots in book["snapshots"].items()
        },
        options={
            "stop_old": adapted.stop_old,
            "dropout": float(adapted.dropout),
            "train_routing": adapter.train_routing,
            "scale": float(adapter.scale),
        },
        provenance={"framework": f"torch {torch.__version__}", "base": base},
    )


def _target(
    name: str, module: Any, part: LayerAdapter, names: Mapping[nn.Parameter, list[str]]
) -> tuple[str, store.Target]:
    own = kind_of(module) or "linear"
    kind = "head" if part.A is None else "linear" if own == "attention" else own
    weight = getattr(module, weight_name(module))
    label = f"{name}.{weight_name(module)}".removeprefix(".")
    quantised = not weight.is_floating_point()
    return kind, store.Target(
        weight=label,
        shape=sizes(module) if quantised else tuple(weight.shape),
        layout="in,out" if own == "embedding" or is_conv1d(type(module)) else "out,in",
        rows=part.rows,
        bias=f"{name}.bias".removeprefix(".") if kind == "head" and module.bias is not None else None,
        tied=tuple(other for other in names.get(weight, ()) if other != label),
    )


def _place(name: str, layer: store.Layer, module: str, modules: Mapping[str, nn.Module]) -> Target:
    """Where in the model a saved layer belongs."""
    if module not in modules:
        near = [n for n in modules if n.endswith(f".{module}")] or difflib.get_close_matches(module, modules, n=3)
        raise OptionError(
            message(
                "clora_torch.load",
                f"the model has no module for layer {name!r}",
                got=repr(module),
                needed=f"one of its modules (near: {', '.join(map(repr, near[:5])) or 'none'})",
                cause="another model, or one wrapped in another",
                fix="load onto the model it was trained on, or pass names={saved path: path here}",
            )
        )
    return Target(module, layer.target.rows, layer.adapter.R_old.shape[-1])


def _check_shape(name: str, layer: store.Layer, target: Target, module: Any) -> None:
    got, needed = tuple(sizes(module)), layer.target.whole
    bias = layer.kind == "head" and (module.bias is None) != (layer.target.bias is None)
    if got != needed or bias:
        raise ShapeError(
            message(
                "clora_torch.load",
                f"module {target.name!r} is not the one that layer {name!r} was saved from",
                got="a bias in one of the two only" if bias else f"(d_out, d_in) = {got}",
                needed=f"(d_out, d_in) = {needed}",
                cause="another model, or another version of it",
                fix="load onto the model it was trained on",
            )
        )


def _check_places(places: Mapping[str, Target]) -> None:
    """No two layers on the same rows of a module."""
    for (name, one), (other, two) in itertools.combinations(places.items(), 2):
        meet = one.rows is None or two.rows is None or (one.rows[0] < two.rows[1] and two.rows[0] < one.rows[1])
        if one.name == two.name and meet:
            raise OptionError(
                message(
                    "clora_torch.load",
                    "two saved layers belong to one module",
                    got=f"{name!r} and {other!r} on {one.name!r}",
                    needed="a module, or rows, for each",
                    cause="names= that lead to the same path",
                    fix="give every saved path a path of its own",
                )
            )


def _spares(state: store.State) -> dict[str, tuple[Any, Any] | None]:
    """Spare directions; of factors that learn in every task, as many as `restore` needs for the highest rank."""
    out = {name: layer.spare for name, layer in state.layers.items()}
    if state.factors != "every-task":
        return out
    ranks = {name: layer.adapter.R_old.shape[0] for name, layer in state.layers.items()}
    most = {name: layer.factors()[1].shape[0] for name, layer in state.layers.items() if layer.kind != "head"}
    for snapshots in state.snapshots.values():
        for name, (R, A, B) in snapshots.items():
            if A is not None and B is not None and R.shape[0] > most[name]:
                most[name], out[name] = R.shape[0], (A[:, ranks[name] :], B[ranks[name] :])
    return out


def _make_room(part: LayerAdapter, spare: tuple[Any, Any] | None, like: dict[str, Any]) -> None:
    """Room for the memory of all directions, before it is loaded."""
    if spare is not None:
        part.A_spare, part.B_spare = (_tensor(array, **like) for array in spare)
        r = part.rank + spare[1].shape[0]
        part.S, part.P = part.S.new_zeros(r, r), part.P.new_zeros(r, r)


def _as_dict(
    state: store.State,
    spares: Mapping[str, tuple[Any, Any] | None],
    places: Mapping[str, Target],
    adapter: ContinualAdapter,
) -> dict[str, Any]:
    """As `ContinualAdapter.state_dict` gives it, by the names of this model."""
    here = {name: str(target) for name, target in places.items()}
    layers: dict[str, dict[str, Tensor]] = {}
    for name, layer in state.layers.items():
        part = adapter.layers[here[name]]
        kind = {field: getattr(part, field) for field in ("R_delta", "S", "P", "q")}
        arrays = {f: a for f, a in layer._replace(spare=spares[name]).tensors().items() if f != "C"}
        layers[here[name]] = {
            field: _tensor(array, like=kind.get(field, part.R_delta)) for field, array in arrays.items()
        }
        if layer.moments is None:
            layers[here[name]] |= {field: torch.zeros_like(kind[field]) for field in ("S", "P", "q")}
    observed = {here[n]: layer.observed for n, layer in state.layers.items() if layer.observed is not None}
    whole = len(observed) == len(state.layers)
    return {
        "format": _state.FORMAT,
        "factors": state.factors,
        "tasks": list(state.tasks),
        "open": state.open,
        "unobserved": list(state.unobserved),
        "blind": [here[name] for name, layer in state.layers.items() if not layer.complete],
        "observed": {n: _tensor(C, like=adapter.layers[n].S) for n, C in observed.items()} if whole else None,
        "layers": layers,
        "no_snapshots": len(state.tasks) - len(state.snapshots),
        "snapshots": {
            task: {
                here[n]: {f: _tensor(a, like=adapter.layers[here[n]].R_delta) for f, a in _fields(s).items()}
                for n, s in snapshots.items()
            }
            for task, snapshots in state.snapshots.items()
        },
    }


def _fields(snapshot: store.Snapshot) -> dict[str, Any]:
    """As torch names them."""
    fields = snapshot.tensors()
    return {"R_old": fields.pop("R"), **fields}


def _like(module: Any) -> dict[str, Any]:
    """dtype and device that an adapter of the module has, see `attach`."""
    weight = getattr(module, weight_name(module))
    narrow = not weight.is_floating_point() or weight.dtype in HALF
    return {"dtype": torch.float32 if narrow else weight.dtype, "device": weight.device}


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().numpy()


def _tensor(array: Any, *, like: Tensor | None = None, **options: Any) -> Any:
    """A tensor of its own memory; None stays."""
    if array is None:
        return None
    wide = np.asarray(array, dtype=np.float32) if array.dtype in (ml_dtypes.bfloat16, np.float16) else array
    out = torch.from_numpy(np.array(wide))
    return out.to(like) if like is not None else out.to(**options)
