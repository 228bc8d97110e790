"""What happens after an optimizer's step: protected routings are projected, whatever the optimizer did."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

import clora_core as core
from clora_core.errors import OptionError, message

from ._distributed import own_rows
from ._part import LayerAdapter


class Watch:
    """Learns which optimizers step the adapter's parameters, and calls ``after(optimizer)`` after each such step.

    One hook on all optimizers of the process: it survives wrappers (accelerate, schedulers), parameter groups added
    later, fused and foreach steps, and is not called for steps that GradScaler skips.
    """

    def __init__(self, parameters: Callable[[], list[nn.Parameter]], after: Callable[[Optimizer], None]) -> None:
        self._parameters = weakref.WeakMethod(parameters)  # asked each time: fully_shard puts others in their places
        self._known: weakref.WeakKeyDictionary[Optimizer, tuple[int, bool]] = weakref.WeakKeyDictionary()
        self.after = weakref.WeakMethod(after)
        _hook_once()
        WATCHES.add(self)

    def steps(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer holds a parameter of the adapter."""
        size = sum(len(group["params"]) for group in optimizer.param_groups)
        if self._known.get(optimizer, (-1, False))[0] != size:
            parameters = self._parameters()
            own = {id(p) for p in parameters()} if parameters is not None else set()
            ours = any(id(p) in own for group in optimizer.param_groups for p in group["params"])
            self._known[optimizer] = (size, ours)
        return self._known[optimizer][1]

    def forget(self, parameters: Iterable[Tensor]) -> None:
        """Drop the state of these parameters in every optimizer that stepped them."""
        parameters = list(parameters)
        for optimizer, (_, ours) in self._known.items():
            for parameter in parameters if ours else ():
                optimizer.state.pop(parameter, None)

    def close(self) -> None:
        """Stop watching."""
        WATCHES.discard(self)


# The adapters that are alive. The hook itself stays: removing it while torch goes through its hooks would be an error.
WATCHES: weakref.WeakSet[Watch] = weakref.WeakSet()


@cache
def _hook_once() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for watch in list(WATCHES):
        after = watch.after()
        if after is not None and watch.steps(optimizer):
            after(optimizer)


def unwrapped(optimizer: Any) -> Optimizer:
    """The torch optimizer inside wrappers such as accelerate's."""
    inner = optimizer
    while not isinstance(inner, Optimizer) or hasattr(inner, "accelerator_state"):
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise OptionError(
                message(
                    "clora_torch.protect",
                    "this is no torch optimizer",
                    got=f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
                    needed="a torch.optim.Optimizer, or a wrapper that holds one as .optimizer",
                    cause="a scheduler or a whole trainer passed in its place",
                    fix="pass the optimizer whose step() updates the adapter",
                )
            )
    return inner


class Projection:
    """Removes protected directions from R_delta, in one batched product for each shape of routing."""

    def __init__(self, layers: Mapping[str, LayerAdapter], energies: Mapping[str, float]) -> None:
        found: dict[tuple[object, ...], list[tuple[LayerAdapter, core.Basis]]] = {}
        self.full: list[str] = []
        for name, part in layers.items():
            basis = core.protected_basis(part.moments.S, energy=energies[name], xp=xp)
            if bool((basis.weights > 0).all()):
                self.full.append(name)
            R = own_rows(part.R_delta)  # rows are projected one by one
            key = (tuple(R.shape), R.dtype, R.device)
            found.setdefault(key, []).append((part, core.Basis(*(a.to(R.dtype) for a in basis))))
        self._stacks: list[tuple[list[LayerAdapter], core.Basis]] = []
        for entries in found.values():
            fields = zip(*(basis for _, basis in entries), strict=True)
            parts = [part for part, _ in entries]
            self._stacks.append((parts, core.Basis(*(torch.stack(list(field)) for field in fields))))

    @torch.no_grad()
    def __call__(self) -> None:
        """Project every value in place."""
        for parts, basis in self._stacks:
            values = [own_rows(part.R_delta) for part in parts]
            projected = core.project(torch.stack(values), basis, xp=xp)
            for value, new in zip(values, projected.unbind(), strict=True):
                value.copy_(new)
