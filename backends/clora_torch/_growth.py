"""Growing between tasks: the rank of every layer, the classes of a head."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from clora_core.errors import OptionError, RankError, message

from ._errors import out_of_order

if TYPE_CHECKING:
    from ._adapter import ContinualAdapter


def expand(adapter: ContinualAdapter, by: int, seed: int | np.random.Generator | None) -> None:
    """See `ContinualAdapter.expand`."""
    by = operator.index(by)
    if adapter._open is not None:
        raise out_of_order("expand", f"task {adapter._open!r} is open", "expand between tasks")
    adapter._need_unmerged("expand")
    adapter._need_whole("expand")
    parts = {name: part for name, part in adapter.layers.items() if part.A is not None}
    for name, part in parts.items():
        largest = min(part.A.shape[0], part.B.shape[1])
        if not 1 <= by <= largest - part.rank:
            raise RankError(
                message(
                    "clora_torch.expand",
                    f"the rank of layer {name!r} can't grow by that",
                    got=f"by={by} at rank {part.rank}",
                    needed=f"1 <= by <= {largest - part.rank}",
                    cause="a small layer among them, or a final rank passed for the growth",
                    fix="expand by less, or leave small layers out of targets",
                )
            )
    rng = np.random.default_rng(int(torch.randint(2**62, ()).item()) if seed is None else seed)
    for name, part in parts.items():
        missing = part.rank + by - part.S.shape[-1]
        if missing > 0:
            part.add_spare(missing, rng, adapter.scale)
            if adapter.tasks and name not in adapter._blind:
                adapter._blind.append(name)
        part.set_rank(part.rank + by)


def grow_head(adapter: ContinualAdapter, name: str, by: int) -> None:
    """See `ContinualAdapter.grow_head`."""
    if name not in adapter.layers or adapter.layers[name].A is not None:
        heads = ", ".join(repr(n) for n, part in adapter.layers.items() if part.A is None) or "none"
        raise out_of_order("grow_head", f"there is no head {name!r} (heads: {heads})", "name it in attach(heads=...)")
    if adapter._open is not None:
        raise out_of_order("grow_head", f"task {adapter._open!r} is open", "grow between tasks")
    adapter._need_unmerged("grow_head")
    adapter._need_whole("grow_head")
    if by < 1:
        raise OptionError(
            message(
                "clora_torch.grow_head",
                "no class to add",
                got=f"by={by}",
                needed="by >= 1",
                cause="a task without new classes",
                fix="skip the call",
            )
        )
    part: Any = adapter.layers[name]
    part.add_outputs(by)
    adapter.model.get_submodule(name).out_features = part.R_old.shape[0]
    for snapshot in adapter._snapshots.values():
        snapshot[name]["R_old"] = padded(name, snapshot[name]["R_old"], part.R_old)


def padded(name: str, R: Tensor, like: Tensor) -> Tensor:
    """A routing of an earlier, smaller rank (or head) at the present one."""
    below, right = like.shape[0] - R.shape[0], like.shape[1] - R.shape[1]
    if min(below, right) < 0:
        raise out_of_order(
            "rows",
            f"layer {name!r} is at the rank of an earlier task, below that of a task asked for",
            "restore(adapter.tasks[-1]) first",
        )
    return functional.pad(R.to(like), (0, right, 0, below))
