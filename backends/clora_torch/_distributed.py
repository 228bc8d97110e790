"""Several processes: parameters that fully_shard has split among them, and what they must agree on.

Whatever meets other processes here is a collective: every process must come to it, in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn


def processes() -> int:
    """How many work together; 1 without torch.distributed."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def add_up(values: Tensor) -> Tensor:
    """The sum over all processes, in place: the same bits in each."""
    if processes() > 1:
        distributed.all_reduce(values)
    return values


def is_split(array: Tensor) -> bool:
    """Whether fully_shard has made a DTensor of it (told without an import that would take a second)."""
    return type(array) not in (Tensor, nn.Parameter) and hasattr(array, "full_tensor")


def full(array: Any) -> Any:
    """All of an array, differentiable; where it is split, a collective. None stays."""
    return array.full_tensor() if array is not None and is_split(array) else array


def own_rows(array: Any) -> Tensor:
    """The rows that this process holds of an array, to read and write; all of them where it is not split."""
    return array.to_local() if is_split(array) else array


def like(value: Tensor, target: Any) -> Tensor:
    """An array that every process holds, split as the target is; no communication."""
    if not is_split(target) or is_split(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(target.device)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


def sharded(model: nn.Module) -> list[Any]:
    """The modules that fully_shard was called on: their forward passes are collectives."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # whoever has called it has imported it
    return [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]


def settle(model: nn.Module) -> None:
    """Put the split parameters back in their places.

    A forward pass may leave whole copies of them there (fully_shard's root does by default), and what is written to a
    copy, or its gradient, is lost.
    """
    for module in sharded(model):
        module.reshard()


@torch.no_grad()
def fingerprint(arrays: Iterable[Any]) -> Tensor:
    """One integer of all bits: other bits, another number, but for coincidence."""
    total = torch.zeros((), dtype=torch.int64)
    for array in map(full, arrays):
        if array is not None:
            wide = array.detach() if array.device.type == "mps" else array.detach().double()  # a cast is no change
            bits = wide.contiguous().view(torch.int64 if wide.dtype == torch.float64 else torch.int32)
            total = total.to(array.device) * 3 + bits.sum(dtype=torch.int64)
    return total
