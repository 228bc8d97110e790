"""The drift penalty of all layers in a few batched products: layers of one routing shape are stacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import array_api_compat.torch as xp
import torch
from torch import Tensor

import clora_core as core
from clora_core.errors import OptionError, message

from ._distributed import full
from ._part import LayerAdapter

OPTIONS = {"drift": ("since",), "orthogonality": ("form", "energy", "normalize")}


class Group(NamedTuple):
    """Layers with routings of one shape, dtype and device; their constants, stacked, are those of the open task."""

    parts: list[LayerAdapter]
    head: bool
    root: Tensor | None
    R_old: Tensor
    moments: core.Moments


def groups(layers: Mapping[str, LayerAdapter]) -> list[Group]:
    """All layers, stacked where shapes allow."""
    found: dict[tuple[object, ...], list[LayerAdapter]] = {}
    for part in layers.values():
        key = (tuple(part.R_delta.shape), part.R_delta.dtype, part.R_delta.device, part.A is None)
        found.setdefault(key, []).append(part)
    return [_group(parts) for parts in found.values()]


def _group(parts: list[LayerAdapter]) -> Group:
    dtype, head = parts[0].R_delta.dtype, parts[0].A is None
    factors = [full(part.A).detach() for part in parts if part.A is not None]
    # A enters through K = A^T A alone, so the r x r factor of its QR decomposition serves for all of A.
    root = None if head else torch.stack([torch.linalg.qr(A, mode="r").R for A in factors])
    fields = zip(*(part.moments for part in parts), strict=True)
    moments = core.Moments(*(torch.stack(list(field)).to(dtype) for field in fields))
    return Group(parts, head, root, torch.stack([p.R_old for p in parts]), moments)


def elsewhere(group: Group) -> bool:
    """Whether the model was moved or cast since the group was made."""
    R = group.parts[0].R_old
    return group.R_old.dtype != R.dtype or group.R_old.device != R.device


def check(kind: str, options: Mapping[str, Any]) -> None:
    """Refuse what `ContinualAdapter.penalty` does not know, in the first task, too."""
    _check("kind", kind, tuple(OPTIONS))
    for name, value in options.items():
        _check(f"option of kind={kind!r}", name, OPTIONS[kind])
        if name == "since":
            _check(name, value, core._moments.SINCE)
        if name == "form":
            _check(name, value, core._orthogonality.FORMS)


def _check(what: str, got: object, known: Sequence[object]) -> None:
    if got not in known:
        raise OptionError(
            message(
                "clora_torch.penalty",
                f"unknown {what}",
                got=repr(got),
                needed="one of " + ", ".join(map(repr, known)),
                cause="a misspelt name",
                fix="pass one of the names listed",
            )
        )


def drift(group: Group, since: str) -> Tensor:
    """The forgetting meter of each layer of the group, differentiable in R_delta."""
    R_delta = torch.stack([full(part.R_delta) for part in group.parts])
    adapter = core.Adapter(group.root, group.R_old, R_delta, group.root)
    return core.drift(adapter, group.moments, since=since, xp=xp)
