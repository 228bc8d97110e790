"""One pass over a task's data, which leaves an r x r second moment of routed inputs for each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from clora_core.errors import InvalidValueError, OptionError, StateError, message

from ._distributed import add_up, fingerprint, processes, sharded
from ._part import LayerAdapter, widen

Mask = str | Callable[[Any], Tensor] | None


def observe(
    model: nn.Module,
    layers: Mapping[str, LayerAdapter],
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None,
    mask: Mask,
) -> dict[str, Tensor]:
    """Second moments C of every layer; see `ContinualAdapter.observe`."""
    if isinstance(batches, Mapping | Tensor):
        raise OptionError(
            message(
                "clora_torch.observe",
                "one batch, where batches are meant",
                got=type(batches).__name__,
                needed="an iterable of batches",
                cause="the batch passed itself",
                fix="pass [batch]",
            )
        )
    device = next(iter(layers.values())).R_delta.device
    together = processes() > 1 and bool(sharded(model))  # no process can make a forward pass alone
    count, batch = 0, None

    def run() -> None:
        rows = _mask(batch, mask)
        for part in layers.values():
            part.mask = rows
        (forward or call)(model, batch)

    with _watching(model, layers.values()):
        for batch in batches:
            batch = moved(batch, device)
            if together:
                _some_have(True, not count, device)
            run()
            count += 1
        sums = {name: part.seen for name, part in layers.items()}
        while together and _some_have(False, not count, device):
            run()  # the last batch again, uncounted
    if processes() > 1:  # all of it before anything raises, so that all processes raise alike
        _need_alike(layers.values(), device)
        sums = {name: _added(*seen) for name, seen in sums.items() if seen is not None}
        count = int(add_up(torch.tensor(count, device=device)))
    if not count:
        raise StateError(
            message(
                "clora_torch.observe",
                "there was no data to observe",
                got="no batch",
                needed="at least one batch of the task's inputs",
                cause="an exhausted generator: one that training ran through is empty",
                fix="pass a DataLoader or a list, which can be run through again",
            )
        )
    return {name: _mean(name, *seen) for name, seen in sums.items() if seen is not None}


@contextmanager
def _watching(model: nn.Module, parts: Iterable[LayerAdapter]) -> Iterator[None]:
    """Evaluation mode, no gradients, sums at zero; every module's mode is put back."""
    parts = list(parts)
    modes = {module: module.training for module in model.modules()}
    for part in parts:
        r = part.S.shape[-1]
        zero = widen(torch.zeros((r, r), device=part.R_delta.device))
        part.seen = (zero, zero.new_zeros(()))
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for part in parts:
            part.seen = part.mask = None
        for module, mode in modes.items():
            module.training = mode


def _some_have(own: bool, first: bool, device: torch.device) -> bool:
    """Whether any process has a batch left."""
    having = int(add_up(torch.tensor(int(own), device=device)))
    if first and 0 < having < processes():
        raise StateError(
            message(
                "clora_torch.observe",
                "some processes have no batch",
                got=f"batches in {having} of {processes()} processes",
                needed="at least one in each, under fully_shard",
                cause="fewer batches than processes",
                fix="pass smaller batches, or the same batches in every process: the mean does not change",
            )
        )
    return having > 0


def _added(total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    both = add_up(torch.cat([total.reshape(-1), count.reshape(1)]))
    return both[:-1].reshape(total.shape), both[-1]


def _need_alike(parts: Iterable[LayerAdapter], device: torch.device) -> None:
    own = fingerprint(array for part in parts for array in (part.R_old, part.R_delta)).to(device)
    bounds = torch.stack([own, -own])
    distributed.all_reduce(bounds, distributed.ReduceOp.MAX)
    if bool(bounds.sum() != 0):
        raise StateError(
            message(
                "clora_torch.observe",
                "the processes have different adapters",
                got="routings with other bits",
                needed="the same in every process",
                cause="the model was called in place of its DistributedDataParallel wrapper, so that gradients were "
                "not averaged; or processes seeded differently",
                fix="call the wrapper while training; seed every process alike before making the model",
            )
        )


def _mean(name: str, total: Tensor, count: Tensor) -> Tensor:
    if not bool(count > 0):
        raise StateError(
            message(
                "clora_torch.observe",
                f"layer {name!r} saw no data",
                got="no row",
                needed="at least one row of input that the mask keeps",
                cause="a layer that the forward pass leaves out, or a mask of zeros",
                fix="pass forward=, a function (model, batch) that runs the layer, or leave the layer out of targets",
            )
        )
    C = total / count
    if not bool(torch.isfinite(C).all()):
        raise InvalidValueError(
            message(
                "clora_torch.observe",
                f"the inputs of layer {name!r} are not finite",
                got="NaN or infinity",
                needed="finite numbers",
                cause="a diverged model, or data with NaN",
                fix="check the data and the learning rate; nothing was recorded",
            )
        )
    return C


def call(model: nn.Module, batch: Any) -> Any:
    """The forward pass a batch stands for: model(**mapping), model(first of a tuple), or model(tensor)."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [moved(value, device) for value in batch]
    return batch


def _mask(batch: Any, mask: Mask) -> Tensor | None:
    if callable(mask):
        return mask(batch)
    if isinstance(mask, str):
        if not isinstance(batch, Mapping) or mask not in batch:
            raise OptionError(
                message(
                    "clora_torch.observe",
                    "a batch lacks the mask",
                    got=f"mask={mask!r}, " + (f"keys {list(batch)}" if isinstance(batch, Mapping) else "no mapping"),
                    needed="mappings that hold it, or a function of the batch",
                    cause="another name for the mask",
                    fix="pass the mask's key, or mask=lambda batch: ...",
                )
            )
        return batch[mask]
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None
