"""What a folder holds: plain NumPy arrays and names, the same for every framework; and the check that they fit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

import clora_core as core

from ._errors import bad, option_error
from ._safetensors import DTYPES, check_finite, dtype_name

Array = np.ndarray[Any, Any]
KINDS = ("linear", "embedding", "conv", "head")
LAYOUTS = ("out,in", "in,out")
FACTORS = ("every-task", "first-task", "never")
OTHER = "a folder put together by hand, or arrays of another layer"
RESAVE = "save the adapter again with the library that made it"


class Target(NamedTuple):
    """Where a layer's update belongs in the base model.

    Attributes
    ----------
    weight : str
        Name of the tensor in the base model's own checkpoint.
    shape : tuple of int
        Of that tensor.
    layout : {"out,in", "in,out"}
        Which axis of it is d_out; further axes (a convolution's kernel) belong to d_in.
    rows : (int, int) or None
        The outputs that are adapted, for one part of a fused projection.
    bias : str or None
        Of a head: the tensor that its last column replaces.
    tied : tuple of str
        Other names of the same tensor.
    """

    weight: str
    shape: tuple[int, ...]
    layout: str = "out,in"
    rows: tuple[int, int] | None = None
    bias: str | None = None
    tied: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """Path of the module that owns the weight."""
        return self.weight.rpartition(".")[0]

    @property
    def whole(self) -> tuple[int, int]:
        """(d_out, d_in) of the weight."""
        first, *rest = self.shape
        return (first, math.prod(rest)) if self.layout == "out,in" else (math.prod(rest), first)

    @property
    def matrix(self) -> tuple[int, int]:
        """(d_out, d_in) of what is adapted."""
        d_out, d_in = self.whole
        return (d_out if self.rows is None else self.rows[1] - self.rows[0]), d_in

    def replaced(self, V: Array) -> dict[str, Array]:
        """Of a head V: name of a tensor -> what takes its place, in the layout of the weight."""
        W = V if self.bias is None else V[:, :-1]
        weight = {self.weight: W if self.layout == "out,in" else W.T}
        return weight if self.bias is None else {**weight, self.bias: V[:, -1]}


class Layer(NamedTuple):
    """One adapted layer: the adapter in use, its memory over all directions (the spare ones last), and its target.

    Attributes
    ----------
    kind : {"linear", "embedding", "conv", "head"}
    target : Target
    adapter : clora_core.Adapter of NumPy arrays
        A and B are None for a head.
    spare : (A_spare (d_out, k), B_spare (k, d_in)) or None
    moments : clora_core.Moments or None
        None where factors learn in every task. S and P are (r + k, r + k); a head's (d_in, d_in), (d_out, d_in).
    observed : array or None
        Second moment C of the open task, where it was observed.
    complete : bool
        False where directions are in use that earlier tasks were not observed in.
    """

    kind: str
    target: Target
    adapter: core.Adapter
    spare: tuple[Array, Array] | None = None
    moments: core.Moments | None = None
    observed: Array | None = None
    complete: bool = True

    def factors(self) -> tuple[Array, Array]:
        """A and B over all directions, the spare ones last."""
        A, B = self.adapter.A, self.adapter.B
        if self.spare is None:
            return A, B
        return np.concatenate([A, self.spare[0]], axis=1), np.concatenate([B, self.spare[1]], axis=0)

    def tensors(self) -> dict[str, Array]:
        """Field -> array, of what there is."""
        fields: dict[str, Array | None] = dict(self.adapter._asdict())
        if self.spare is not None:
            fields |= dict(zip(("A_spare", "B_spare"), self.spare, strict=True))
        if self.moments is not None:
            fields |= self.moments._asdict()
        return {name: array for name, array in {**fields, "C": self.observed}.items() if array is not None}


class Snapshot(NamedTuple):
    """A layer at the end of a task: its routing, and its factors where they learn in every task."""

    R: Array
    A: Array | None = None
    B: Array | None = None

    def tensors(self) -> dict[str, Array]:
        """Field -> array, of what there is."""
        return {name: array for name, array in self._asdict().items() if array is not None}


class State(NamedTuple):
    """An adapter, whole.

    Attributes
    ----------
    layers : dict of name to Layer
    factors : {"first-task", "every-task", "never"}
    tasks : tuple of str
        Finished tasks, in order.
    unobserved : tuple of str
        Those of them that no second moments were taken of.
    open : str or None
        The task that has begun and not ended.
    snapshots : dict of task to dict of layer to Snapshot
        Of the last finished tasks, in order; normally of all.
    options : dict
        What the framework needs to go on (plain JSON): stop_old, train_routing, dropout, scale.
    provenance : dict of str to str
        Where it comes from: library and version, name of the base model, ...
    digest : str or None
        Of the folder it was loaded from.
    """

    layers: dict[str, Layer]
    factors: str = "first-task"
    tasks: tuple[str, ...] = ()
    unobserved: tuple[str, ...] = ()
    open: str | None = None
    snapshots: Mapping[str, Mapping[str, Snapshot]] = {}
    options: Mapping[str, Any] = {}
    provenance: Mapping[str, str] = {}
    digest: str | None = None

    def arrays(self) -> Iterator[tuple[str, Array]]:
        """Every array with its name."""
        for name, layer in self.layers.items():
            for field, array in layer.tensors().items():
                yield f"{name}.{field}", array
        for task, snapshots in self.snapshots.items():
            for name, snapshot in snapshots.items():
                for field, array in snapshot.tensors().items():
                    yield f"{name}.{field} of task {task!r}", array


def places(state: State, names: Mapping[str, str], where: str) -> dict[str, str]:
    """Layer -> path of the module that it goes to: by its name or its module's path in ``names``, else that path.

    Raises
    ------
    OptionError
        A name that no layer has.
    """
    known = {name: layer.target.module for name, layer in state.layers.items()}
    strange = [name for name in names if name not in known and name not in known.values()]
    if strange:
        near = ", ".join(map(repr, list(known)[:8]))
        raise option_error(where, "names= names no layer", repr(strange[0]), f"saved layers: {near}", "correct it")
    return {name: names.get(name, names.get(module, module)) for name, module in known.items()}


def check(state: State, where: str, *, finite: bool = True) -> None:
    """Raise FormatError unless everything in a State fits together.

    Parameters
    ----------
    finite : bool
        Also refuse NaN and infinity.
    """

    def no(what: str, got: object, needed: object) -> Exception:
        return bad(where, what, got, needed, cause=OTHER, fix=RESAVE)

    if state.factors not in FACTORS:
        raise no("unknown factors mode", repr(state.factors), " or ".join(FACTORS))
    if not state.layers:
        raise no("there is no layer", "none", "at least one")
    if len(set(state.tasks)) != len(state.tasks):
        raise no("a task's name occurs twice", f"{len(state.tasks)} tasks", "names of their own")
    if state.open in state.tasks:
        raise no("the open task is finished, too", repr(state.open), "another name")
    if not set(state.unobserved) <= set(state.tasks):
        raise no("an unobserved task is not finished", repr(state.unobserved), "finished tasks")
    if tuple(state.snapshots) != state.tasks[len(state.tasks) - len(state.snapshots) :]:
        got = ", ".join(map(repr, list(state.snapshots)[:8]))
        raise no("snapshots of other tasks, or in another order", got, "those of the last tasks, in order")
    names = [state.tasks, state.open, [(name, layer.target) for name, layer in state.layers.items()]]
    try:
        text = json.dumps([names, dict(state.options), dict(state.provenance)], ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError) as error:
        raise no("names, options or provenance are no plain values", str(error), "what JSON can hold") from None
    _check_options(state.options, where)
    for name, layer in state.layers.items():
        _check_arrays(name, layer, where)
        _check_layer(name, layer, where)
        if layer.observed is not None and state.open is None:
            raise no(f"layer {name!r} was observed in no task", "C, and no open task", "an open task")
    _check_places(state, where)
    for task, snapshots in state.snapshots.items():
        if set(snapshots) != set(state.layers):
            raise no(f"the snapshot of task {task!r} has other layers", f"{len(snapshots)}", f"{len(state.layers)}")
        for name, snapshot in snapshots.items():
            _check_snapshot(name, snapshot, state, f"{where}, task {task!r}")
    for name, array in state.arrays():
        if dtype_name(array.dtype) is None:
            raise no(f"tensor {name!r} has a dtype that no adapter has", array.dtype, ", ".join(DTYPES))
        if finite:
            check_finite(name, array, where)


def _check_options(options: Mapping[str, Any], where: str) -> None:
    """What a framework goes on with is what its attach would take."""
    flags = all(type(options.get(key, True)) is bool for key in ("stop_old", "train_routing"))
    numbers = [options.get("scale", 1.0), options.get("dropout", 0.0)]
    real = all(isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 2.0**100 for x in numbers)
    if not (flags and real and 0 <= numbers[1] < 1):
        got = ", ".join(f"{key}={value!r}"[:80] for key, value in options.items())
        needed = "train_routing and stop_old true or false, scale a number, 0 <= dropout < 1"
        cause, fix = "a folder edited by hand", "correct the options in clora.json"
        raise bad(where, "options that no adapter has", got, needed, cause=cause, fix=fix)


def _check_arrays(name: str, layer: Layer, where: str) -> None:
    """Everything that should be an array is one, and what belongs together is there together."""
    together = (layer.spare or (), layer.moments or ())
    arrays = [layer.adapter.R_old, layer.adapter.R_delta, *(a for pair in together for a in pair)]
    arrays += [a for a in (layer.adapter.A, layer.adapter.B, layer.observed) if a is not None]
    strange = [type(array).__name__ for array in arrays if not isinstance(array, np.ndarray)]
    if strange or type(layer.complete) is not bool:
        got = strange[0] if strange else f"complete={layer.complete!r}"
        raise bad(
            where, f"layer {name!r} holds something else", got, "NumPy arrays, True or False", cause=OTHER, fix=RESAVE
        )


def _check_places(state: State, where: str) -> None:
    """No two layers adapt the same part of the model."""
    taken: dict[str, list[tuple[int, int, str]]] = {}
    for name, layer in state.layers.items():
        start, stop = layer.target.rows or (0, layer.target.matrix[0])
        for first, last, other in taken.get(layer.target.weight, ()):
            if start < last and first < stop:
                got = f"{other!r} and {name!r} on {layer.target.weight!r}"
                raise bad(where, "two layers adapt the same part of a weight", got, "one each", cause=OTHER, fix=RESAVE)
        taken.setdefault(layer.target.weight, []).append((start, stop, name))


def _check_layer(name: str, layer: Layer, where: str) -> None:
    def no(what: str, got: object, needed: object) -> Exception:
        return bad(where, f"layer {name!r}: {what}", got, needed, cause=OTHER, fix=RESAVE)

    target, adapter = layer.target, layer.adapter
    if layer.kind not in KINDS:
        raise no("unknown kind", repr(layer.kind), " or ".join(KINDS))
    if target.layout not in LAYOUTS or not target.shape or 0 in target.shape:
        raise no("no layout of a weight", f"{target.layout!r} {target.shape}", " or ".join(map(repr, LAYOUTS)))
    axes, layout = {"linear": (2, target.layout), "embedding": (2, "in,out"), "head": (2, target.layout)}.get(
        layer.kind, (len(target.shape), "out,in")
    )
    if len(target.shape) != axes or target.layout != layout or (layer.kind == "conv" and axes < 3):
        raise no(f"no weight of kind {layer.kind!r}", f"{target.layout!r} {target.shape}", f"{layout!r}, {axes} axes")
    if layer.kind == "head" and target.rows is not None:
        raise no("a head has rows of its own", target.rows, "none")
    if layer.kind != "head" and target.bias is not None:
        raise no("a bias, which heads alone have", repr(target.bias), "none")
    if target.rows is not None and not 0 <= target.rows[0] < target.rows[1] <= target.whole[0]:
        raise no("rows outside of the weight", target.rows, f"within 0 to {target.whole[0]}")
    d_out, d_in = target.matrix
    shapes: dict[str, tuple[int, ...]]
    if layer.kind == "head":
        # A head may have grown: its rows are its own, at least those of the weight.
        columns = d_in + (target.bias is not None)
        rows = adapter.R_old.shape[0] if adapter.R_old.ndim == 2 else 0
        if rows < d_out or adapter.A is not None or adapter.B is not None or layer.spare is not None:
            raise no("no head of that weight", f"{adapter.R_old.shape}, or factors", f"({d_out} or more, {columns})")
        shapes = {"R_old": (rows, columns), "R_delta": (rows, columns)}
        moments = {"S": (columns, columns), "P": (rows, columns), "q": ()}
    else:
        if adapter.A is None or adapter.B is None:
            raise no("a factor is missing", "A or B is None", "both")
        r = adapter.A.shape[-1] if adapter.A.ndim else 0
        k = 0 if layer.spare is None else layer.spare[1].shape[0] if layer.spare[1].ndim else 0
        if not (1 <= r <= min(d_out, d_in) and (layer.spare is None or 1 <= k <= min(d_out, d_in) - r)):
            raise no("the rank does not fit", f"{r} and {k} spare", f"at least 1, together at most {min(d_out, d_in)}")
        shapes = {"A": (d_out, r), "R_old": (r, r), "R_delta": (r, r), "B": (r, d_in)}
        shapes |= {"A_spare": (d_out, k), "B_spare": (k, d_in)} if layer.spare is not None else {}
        moments = {"S": (r + k, r + k), "P": (r + k, r + k), "q": ()}
    shapes |= moments if layer.moments is not None else {}
    shapes |= {"C": moments["S"]} if layer.observed is not None else {}
    dtypes = set()
    for field, array in layer.tensors().items():
        if array.shape != shapes[field]:
            raise no(f"tensor {name}.{field} has another shape", array.shape, shapes[field])
        if field in adapter._fields or field.endswith("spare"):
            dtypes.add(array.dtype)
    if len(dtypes) > 1:
        raise no("factors and routings of several dtypes", ", ".join(sorted(map(str, dtypes))), "one")


def _check_snapshot(name: str, snapshot: Snapshot, state: State, where: str) -> None:
    def no(what: str, got: object, needed: object) -> Exception:
        return bad(where, f"layer {name!r}: {what}", got, needed, cause=OTHER, fix=RESAVE)

    layer = state.layers[name]
    d_out, d_in = layer.target.matrix
    factors = state.factors == "every-task" and layer.kind != "head"
    if factors != (snapshot.A is not None) or factors != (snapshot.B is not None):
        raise no("factors in a snapshot", "A and B, or none", f"{'A and B' if factors else 'none'}")
    shapes: dict[str, tuple[int, ...]]
    if layer.kind == "head":
        shapes = {"R": layer.adapter.R_old.shape}  # classes that came later have rows of zeros
    else:
        r = snapshot.R.shape[0] if snapshot.R.ndim else 0
        most = layer.adapter.R_old.shape[0] + (0 if layer.spare is None else layer.spare[1].shape[0])
        if not 1 <= r <= (min(d_out, d_in) if factors else most):
            raise no("the rank of a snapshot does not fit", r, f"1 to {most}")
        shapes = {"R": (r, r), "A": (d_out, r), "B": (r, d_in)}
    for field, array in snapshot.tensors().items():
        if array.dtype != layer.adapter.R_old.dtype:
            raise no(f"tensor {field} has another dtype than now", array.dtype, layer.adapter.R_old.dtype)
        if array.shape != shapes[field]:
            raise no(f"tensor {field} has another shape", array.shape, shapes[field])
