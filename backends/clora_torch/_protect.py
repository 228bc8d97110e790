"""What happens after an optimizer's step: protected routings are projected, whatever the optimizer did."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import array_api_compat.torch as xp
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import clora_core as core
from clora_core.errors import OptionError, message

from ._distributed import own_rows
from ._part import LayerAdapter

if TYPE_CHECKING:
    from ._adapter import ContinualAdapter

STAMP = "clora"  # beside an optimizer's state of a parameter, saved with it: how many tasks were finished, and its size


class Watch:
    """Learns which optimizers step the adapter's parameters, and tells the adapter before and after each such step.

    One hook on all optimizers of the process: it survives wrappers (accelerate, schedulers), parameter groups added
    later, fused and foreach steps, and is not called for steps that GradScaler skips.
    """

    def __init__(self, adapter: ContinualAdapter) -> None:
        self.adapter = weakref.ref(adapter)
        self._known: weakref.WeakKeyDictionary[Optimizer, tuple[int, bool]] = weakref.WeakKeyDictionary()
        _hook_once()
        WATCHES.add(self)

    def steps(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer holds a parameter of the adapter."""
        size = sum(len(group["params"]) for group in optimizer.param_groups)
        if self._known.get(optimizer, (-1, False))[0] != size:
            adapter = self.adapter()  # asked each time: fully_shard puts others in the Parameters' places
            own = set() if adapter is None else {id(p) for p in adapter._all()}
            ours = any(id(p) in own for group in optimizer.param_groups for p in group["params"])
            self._known[optimizer] = (size, ours)
        return self._known[optimizer][1]

    def forget(self, parameters: Iterable[Tensor]) -> None:
        """Drop the state of these parameters in every optimizer that stepped them."""
        parameters = list(parameters)
        for optimizer, (_, ours) in self._known.items():
            if ours:
                forget(optimizer, parameters)

    def close(self) -> None:
        """Stop watching."""
        WATCHES.discard(self)


# The adapters that are alive. The hook itself stays: removing it while torch goes through its hooks would be an error.
WATCHES: weakref.WeakSet[Watch] = weakref.WeakSet()


@cache
def _hook_once() -> None:
    register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: _tell(optimizer, "_before_step"))
    register_optimizer_step_post_hook(lambda optimizer, args, kwargs: _tell(optimizer, "_after_step"))


def _tell(optimizer: Optimizer, what: str) -> None:
    for watch in list(WATCHES):
        adapter = watch.adapter()
        if adapter is not None and watch.steps(optimizer):
            getattr(adapter, what)(optimizer)


def forget(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Drop an optimizer's state of these parameters; LBFGS holds that of all parameters as one."""
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.state.clear()
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


def stamp(optimizer: Optimizer, parameters: Iterable[Tensor], tasks: int) -> None:
    """Note how old the state of these parameters is."""
    for parameter in parameters:
        if optimizer.state.get(parameter):
            optimizer.state[parameter][STAMP] = [tasks, parameter.numel()]


def stale(optimizer: Optimizer, parameter: Tensor, tasks: int, *, lasting: bool) -> bool:
    """Whether the state is of another size, or from before the last boundary and not meant to last over it."""
    tasks_then, size = optimizer.state.get(parameter, {}).get(STAMP, [tasks, parameter.numel()])
    lasting = lasting and not isinstance(optimizer, torch.optim.LBFGS)
    return size != parameter.numel() or (tasks_then != tasks and not lasting)


class Frozen:
    """Factors that do not learn any more: where an optimizer writes to one all the same, its bits are put back.

    LBFGS steps along directions from before; DeepSpeed and others fill gradients that are None with zeros, and weight
    decay does the rest.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor, int]] = []

    @torch.no_grad()
    def note(self, factors: Iterable[Tensor]) -> None:
        """Before a step. What was written since the last one was meant to be."""
        factors = list(factors)
        same = len(factors) == len(self._kept) and all(
            f is kept[0] for f, kept in zip(factors, self._kept, strict=True)
        )
        if not same or any(factor._version != version for factor, _, version in self._kept):
            self._kept = [(factor, own_rows(factor).detach().clone(), factor._version) for factor in factors]

    @torch.no_grad()
    def put_back(self) -> None:
        """After a step."""
        for i, (factor, copy, version) in enumerate(self._kept):
            if factor._version != version:
                own_rows(factor).copy_(copy)
                self._kept[i] = factor, copy, factor._version


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
    if not getattr(type(inner).step, "hooked", False):
        raise OptionError(
            message(
                "clora_torch.protect",
                "steps of this optimizer can't be seen",
                got=f"{type(inner).__module__}.{type(inner).__qualname__}, which torch has put no hooks around",
                needed="an optimizer whose __init__ calls torch.optim.Optimizer.__init__",
                cause="a wrapper that only looks like an optimizer",
                fix="pass the optimizer inside of it",
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
        self.full.sort()
        self._versions: list[int] | None = None  # of what was projected last
        self._stacks: list[tuple[list[LayerAdapter], core.Basis]] = []
        for entries in found.values():
            fields = zip(*(basis for _, basis in entries), strict=True)
            parts = [part for part, _ in entries]
            self._stacks.append((parts, core.Basis(*(torch.stack(list(field)) for field in fields))))

    @torch.no_grad()
    def __call__(self) -> None:
        """Project every value in place."""
        for i, (parts, basis) in enumerate(self._stacks):
            values = [own_rows(part.R_delta) for part in parts]
            if basis.U.dtype != values[0].dtype or basis.U.device != values[0].device:  # the model was moved
                basis = core.Basis(*(array.to(values[0]) for array in basis))
                self._stacks[i] = parts, basis
            with torch.autocast(values[0].device.type, enabled=False):
                projected = core.project(torch.stack(values), basis, xp=xp)
            for value, new in zip(values, projected.unbind(), strict=True):
                value.copy_(new)
        self._versions = self._now()

    def _now(self) -> list[int]:
        return [part.R_delta._version for parts, _ in self._stacks for part in parts]

    def touched(self) -> bool:
        """Whether anything was written since."""
        return self._versions != self._now()
