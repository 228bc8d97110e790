"""An adapter's whole state as one mapping of tensors and plain values, and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from clora_core.errors import StateError, message

from ._distributed import full, like, settle
from ._part import LayerAdapter

if TYPE_CHECKING:
    from ._adapter import ContinualAdapter

FORMAT = "clora_torch/1"
BOOK = ("tasks", "_snapshots", "_unobserved", "_blind", "_observed", "_open", "_resumed", "_projection")
KEYS = ("factors", "tasks", "open", "unobserved", "blind", "observed", "layers", "snapshots")


def dump(adapter: ContinualAdapter) -> dict[str, Any]:
    """See `ContinualAdapter.state_dict`."""
    adapter._need_unmerged("state_dict")
    settle(adapter.model)
    return {
        "format": FORMAT,
        "factors": adapter.factors,
        "tasks": list(adapter.tasks),
        "open": adapter._open,
        "unobserved": list(adapter._unobserved),
        "blind": list(adapter._blind),
        "observed": adapter._observed,
        "layers": {n: {k: full(t).clone() for k, t in part.state_dict().items()} for n, part in adapter.layers.items()},
        "no_snapshots": len(adapter.tasks) - len(adapter._snapshots),
        "snapshots": {
            task: {name: dict(fields) for name, fields in layers.items()} for task, layers in adapter._snapshots.items()
        },
    }


class Memento(NamedTuple):
    """All that a task may change."""

    layers: dict[str, dict[str, Tensor]]
    recorded: dict[str, Any]
    book: dict[str, Any]


def remember(adapter: ContinualAdapter) -> Memento:
    """The adapter before a task."""
    settle(adapter.model)
    parts = adapter.layers.items()
    book = {name: copy.copy(getattr(adapter, name)) for name in BOOK}
    layers = {n: {k: t.detach().clone() for k, t in part.state_dict().items()} for n, part in parts}
    return Memento(layers, {n: part.recorded for n, part in parts}, book)


def go_back(adapter: ContinualAdapter, before: Memento) -> None:
    """Put everything back."""
    settle(adapter.model)
    for name, part in adapter.layers.items():
        part.load_state_dict(split_alike(before.layers[name], part))
        part.recorded = before.recorded[name]
        if part.recorded is not None:
            part.remember()
    adapter.__dict__.update(before.book)
    adapter._groups, adapter._spans = None, {}


@torch.no_grad()
def load(adapter: ContinualAdapter, state: Mapping[str, Any]) -> None:
    """See `ContinualAdapter.load_state_dict`."""
    adapter._need_unmerged("load_state_dict")
    _check(adapter, state)
    settle(adapter.model)
    for name, part in adapter.layers.items():
        saved = state["layers"][name]["R_old"].shape
        if part.A is not None:
            part.set_rank(saved[-1])
        elif saved[0] > part.R_old.shape[0]:
            part.add_outputs(saved[0] - part.R_old.shape[0])
            adapter.model.get_submodule(name).out_features = saved[0]  # type: ignore[assignment]
        part.load_state_dict(split_alike(state["layers"][name], part))
        part.recorded = None
        if state["tasks"]:
            part.remember()
    device = {name: part.R_delta.device for name, part in adapter.layers.items()}
    adapter._snapshots = {
        task: {n: {f: t.to(device[n]).clone() for f, t in fields.items()} for n, fields in layers.items()}
        for task, layers in state["snapshots"].items()
    }
    adapter.tasks, adapter._unobserved, adapter._blind = (list(state[key]) for key in ("tasks", "unobserved", "blind"))
    seen = state["observed"]
    adapter._observed = None if seen is None else {n: C.to(device[n]) for n, C in seen.items()}
    adapter._open = adapter._resumed = state["open"]
    adapter._spans, adapter._groups = {}, None
    adapter._choose_trained()
    if adapter._open is not None:
        adapter._choose_bases()


def _check(adapter: ContinualAdapter, state: Mapping[str, Any]) -> None:
    def no(what: str, got: str, needed: str) -> StateError:
        cause, fix = "another model, rank, targets or factors", "attach as the saved adapter was, then load"
        return StateError(message("clora_torch.load_state_dict", what, got=got, needed=needed, cause=cause, fix=fix))

    if state.get("format") != FORMAT:
        raise no("this is no state of an adapter", repr(state.get("format")), repr(FORMAT))
    missing = [key for key in KEYS if key not in state]
    without = state.get("no_snapshots", 0)  # tasks from a folder that was saved without theirs
    if missing or list(state["snapshots"]) != list(state["tasks"][without:]):
        lacking = ", ".join(missing) or "snapshot for each task"
        raise no("the state is not whole", f"no {lacking}", ", ".join(KEYS))
    if state["factors"] != adapter.factors:
        raise no("another factors mode", repr(state["factors"]), repr(adapter.factors))
    for saved in (state["layers"], *state["snapshots"].values()):
        if set(saved) != set(adapter.layers):
            strange = sorted(set(saved) ^ set(adapter.layers))
            raise no("other layers", ", ".join(strange[:8]) + " in one of the two only", "the same layers")
    for name, part in adapter.layers.items():
        got = {key: tuple(value.shape) for key, value in state["layers"][name].items()}
        needed = _shapes(part, got.get("R_old", ()))
        if got != needed:
            strange = sorted(key for key in {*got, *needed} if got.get(key) != needed.get(key))
            have, want = ({key: shapes.get(key) for key in strange} for shapes in (got, needed))
            raise no(f"{name!r} has another size", str(have), str(want))


def _shapes(part: LayerAdapter, R_old: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Of what a state must hold for one layer whose routing has that shape: a lower rank, or a head with more rows."""
    rows, columns = part.R_old.shape
    if part.A is None or part.B is None:
        rows = max([rows, *R_old[:1]])
        square = (rows, columns)
        return {"R_old": square, "R_delta": square, "S": (columns, columns), "P": square, "q": ()}
    d_out, d_in, most = part.A.shape[0], part.B.shape[1], part.S.shape[-1]
    r = R_old[-1] if R_old and 1 <= R_old[-1] <= most else part.rank
    shapes = {"A": (d_out, r), "B": (r, d_in), "R_old": (r, r), "R_delta": (r, r)}
    if r < most:
        shapes |= {"A_spare": (d_out, most - r), "B_spare": (most - r, d_in)}
    return shapes | {"S": (most, most), "P": (most, most), "q": ()}


def split_alike(values: Mapping[str, Tensor], part: LayerAdapter) -> dict[str, Tensor]:
    """A layer's state for load_state_dict, split where fully_shard has split the layer's own."""
    return {key: like(value, getattr(part, key)) for key, value in values.items()}
