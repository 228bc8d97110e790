"""The task life on a torch model: one adapter for all tasks, its memory, its protection, and going back."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import clora_core as core
from clora_core.errors import InvalidValueError, MomentsIncomplete, OptionError, message

from . import _growth, _merge, _penalty, _state, _store
from ._distributed import full, like, settle
from ._errors import out_of_order
from ._layers import CHILD, Adapted, refuse_replaced
from ._observe import Mask, observe
from ._part import LayerAdapter, wide, widen
from ._protect import Frozen, Projection, Watch, forget, stale, stamp, unwrapped

FACTORS = ("every-task", "first-task", "never")


class ContinualAdapter:
    """All adapters of a model and what they remember; made by `attach`.

    Attributes
    ----------
    model : torch.nn.Module
    layers : dict of name to LayerAdapter
        What learns; A and B of a head are None.
    factors : str
        When A and B learn.
    tasks : list of str
        Finished tasks, in order.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, LayerAdapter],
        required_grad: dict[nn.Parameter, bool],
        factors: str,
        train_routing: bool,
        scale: float,
    ) -> None:
        self.model, self.layers, self.factors, self.train_routing = model, layers, factors, train_routing
        self.scale = scale
        # Nested tensors have no sizes that an adapter could read; torch's encoder makes them in inference.
        self._nested = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder) and _makes_nested(m)]
        for encoder in self._nested:
            encoder.use_nested_tensor = False
        self.tasks: list[str] = []
        self._required_grad = required_grad
        self._open: str | None = None
        self._resumed: str | None = None  # a task that was open in a state that was loaded
        self._observed: dict[str, Tensor] | None = None
        self._unobserved: list[str] = []
        self._blind: list[str] = []  # layers with directions that earlier tasks were not observed in
        self._snapshots: dict[str, dict[str, dict[str, Tensor]]] = {}
        self._groups: list[_penalty.Group] | None = None
        self._spans: dict[tuple[str, float], Tensor] = {}
        self._energies: dict[str, float] | None = None  # what `protect` asked for
        self._projection: Projection | None = None
        self._frozen = Frozen()
        self._watch: Watch | None = Watch(self)
        self._saved: dict[str, str] = {}  # folder -> digest of what this adapter last saved there, or loaded
        self._choose_trained()

    def __getstate__(self) -> dict[str, Any]:
        """A copy travels with a copy of its model; what is bound to optimizers stays behind."""
        return {**self.__dict__, "_watch": None, "_projection": None, "_groups": None, "_frozen": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._watch, self._frozen = Watch(self), Frozen()
        if self._open is not None:
            self._choose_bases()

    def __repr__(self) -> str:
        learned = sum(p.numel() for p in self.parameters())
        lines = [f"{len(self.layers)} adapted layers, {learned:,} numbers learn (factors={self.factors!r}):"]
        for name, part in self.layers.items():
            shape = tuple(part.R_delta.shape)
            lines.append(f"  {name}: " + (f"head {shape}" if part.A is None else f"rank {shape[-1]}"))
        return "\n".join(lines)

    # --- what learns -------------------------------------------------------------------------------------------

    def _all(self) -> list[nn.Parameter]:
        settle(self.model)
        return [parameter for part in self.layers.values() for parameter in part.trained()]

    def _choose_trained(self) -> None:
        settle(self.model)
        moving = self.factors == "every-task" or (self.factors == "first-task" and not self.tasks)
        for part in self.layers.values():
            head = part.A is None
            part.R_delta.requires_grad_(head or self.train_routing)
            for factor in () if head else (part.A, part.B):
                factor.requires_grad_(moving)
                if not moving:  # optimizers leave what has no gradient alone, whatever momentum they hold
                    factor.grad = None

    def parameters(self) -> list[nn.Parameter]:
        """What learns now, for an optimizer. The objects stay the same over all tasks."""
        return [parameter for parameter in self._all() if parameter.requires_grad]

    def state_bytes(self) -> int:
        """Bytes to keep from task to task: adapters and second moments; base weights and snapshots left out."""
        total = 0
        for part in self.layers.values():
            memory = (part.S, part.P, part.q) if self.factors != "every-task" else ()
            kept = [part.A, part.R_old, part.B, part.A_spare, part.B_spare, *memory]
            total += sum(array.nbytes for array in kept if array is not None)
        return total

    # --- life of a task ----------------------------------------------------------------------------------------

    @contextmanager
    def task(self, name: str) -> Iterator[ContinualAdapter]:
        """Begin a task, and end it on leaving; an exception inside leaves the adapter as it was before the task.

        Optimizers then forget what they hold of the adapter's parameters, which may be what went wrong. A task that is
        open in a state that was loaded goes on.
        """
        resumed = self._resumed is not None and self._resumed == name
        if not resumed:
            self._check_begin(name)
        before = _state.remember(self)
        try:
            if not resumed:
                self.begin_task(name)
            self._resumed = None
            yield self
            self.end_task()
        except BaseException:
            _state.go_back(self, before)
            self._need_watch().forget(self._all())
            self._choose_trained()
            for parameter in self._all():
                parameter.grad = None
            raise

    def begin_task(self, name: str) -> None:
        """Fold what is in R_delta, start it from zero, clear its optimizer state, choose the protected directions.

        The state of an optimizer that was loaded from a file is cleared before its next step.
        """
        self._check_begin(name)
        self._choose_bases()  # may refuse or warn, so before anything changes
        if self.tasks:  # before the first task R_delta may hold the start itself, which must stay learnable
            self._fold()
        self._need_watch().forget(part.R_delta for part in self.layers.values())
        self._open, self._observed, self._resumed = name, None, None
        self._spans, self._groups = {}, None
        self._choose_trained()

    def _check_begin(self, name: str) -> None:
        if self._open is not None:
            raise out_of_order("begin_task", f"task {self._open!r} is still open", "end_task() first")
        if not isinstance(name, str):
            raise out_of_order("begin_task", f"the name of a task is a {type(name).__name__}", "pass str(name)")
        if name in self.tasks:
            raise out_of_order("begin_task", f"a task named {name!r} is finished already", "choose another name")
        self._need_unmerged("begin_task")

    @torch.no_grad()
    def _fold(self) -> None:
        settle(self.model)
        for part in self.layers.values():
            folded = core.end_task(part.adapter, xp=xp)
            part.R_old.copy_(folded.R_old)
            part.R_delta.zero_()
            part.R_delta.grad = None

    def end_task(self) -> None:
        """Fold R_delta, add what was observed to the memory, and keep a snapshot of the routing for `restore`."""
        if self._open is None:
            raise out_of_order(
                "end_task", "no task is open", "begin_task(name) first, or use `with adapter.task(name)`"
            )
        self._check_finite()
        if self._observed is not None and self.tasks and self.factors != "every-task":
            self._need_factors("end_task", thorough=True)
        self._reproject()
        self._fold()
        if self._observed is None:
            self._unobserved.append(self._open)
        else:
            for name, part in self.layers.items():  # folded first: the memory holds the sum as rounded
                part.record(self._observed[name])
        fields = ("A", "R_old", "B") if self.factors == "every-task" else ("R_old",)
        self._snapshots[self._open] = {
            name: {f: full(getattr(part, f)).detach().clone() for f in fields if getattr(part, f) is not None}
            for name, part in self.layers.items()
        }
        self.tasks.append(self._open)
        self._open, self._observed, self._resumed = None, None, None
        self._choose_trained()

    def _check_finite(self) -> None:
        for name, part in self.layers.items():
            for field, array in zip(part.adapter._fields, part.adapter, strict=True):
                if array is not None and not bool(torch.isfinite(array).all()):
                    raise InvalidValueError(
                        message(
                            "clora_torch.end_task",
                            f"{field} of layer {name!r} is not finite",
                            got="NaN or infinity",
                            needed="finite numbers",
                            cause="a NaN loss, or a diverged training step",
                            fix="lower the learning rate, check the data; `with adapter.task(...)` puts the state back",
                        )
                    )

    def _before_step(self, optimizer: Optimizer) -> None:
        """Drop what an optimizer holds from before the last boundary, also one that was loaded from a file."""
        parameters, fresh = self._all(), {part.R_delta for part in self.layers.values()}
        for parameter in parameters:
            lasting = parameter.requires_grad and parameter not in fresh
            if stale(optimizer, parameter, len(self.tasks), lasting=lasting):
                forget(optimizer, [parameter])
        self._frozen.note(p for p in parameters if not p.requires_grad)

    def _after_step(self, optimizer: Optimizer) -> None:
        stamp(optimizer, self._all(), len(self.tasks))
        self._observed = None
        self._frozen.put_back()
        if self._projection is not None:
            settle(self.model)
            self._projection()

    def _reproject(self) -> None:
        """Where something wrote to R_delta outside of a step that was seen."""
        if self._projection is not None:
            settle(self.model)
            if self._projection.touched():
                self._projection()

    def observe(
        self, batches: Iterable[Any], *, forward: Callable[[nn.Module, Any], Any] | None = None, mask: Mask = None
    ) -> None:
        """Take the second moments of the open task's routed inputs, when its training is over.

        Parameters
        ----------
        batches : iterable
            A pass over the task's inputs: tensors, tuples or lists whose first item is the input, or mappings for
            ``model(**batch)``. Tensors are moved to the adapter's device.
        forward : callable(model, batch), optional
            Another way to run the model on a batch.
        mask : str or callable(batch), optional
            Key of a mapping, or function, that gives the mask (batch, length) of positions to count; by default
            "attention_mask" where a batch has it. Layers whose inputs have other leading axes count all rows.

        Notes
        -----
        Runs in evaluation mode and puts every module's mode back. Sums in float64 where the device has it; over all
        processes where torch.distributed is initialised. A training step after this makes it void.
        """
        if self._open is None:
            raise out_of_order("observe", "no task is open", "observe inside `with adapter.task(name)`, after training")
        self._need_unmerged("observe")
        self._reproject()
        self._observed = observe(self.model, self.layers, batches, forward=forward, mask=mask)

    # --- memory ------------------------------------------------------------------------------------------------

    def _need_moments(self, verb: str) -> None:
        if self.factors == "every-task":
            raise out_of_order(
                verb,
                "the factors learn in every task (factors='every-task'), so second moments are stale",
                "attach with factors='first-task' or 'never'",
            )
        if self._unobserved:
            raise MomentsIncomplete(
                message(
                    f"clora_torch.{verb}",
                    "tasks were finished without being observed",
                    got=f"no second moments of {', '.join(map(repr, self._unobserved))}",
                    needed="observe(batches) before the end of every task",
                    cause="observe left out, or a training step after it",
                    fix="call adapter.observe(loader) as the last thing in the task",
                )
            )
        if self._blind:
            raise MomentsIncomplete(
                message(
                    f"clora_torch.{verb}",
                    "earlier tasks were not observed in all directions that are now in use",
                    got=f"ranks expanded beyond max_rank in {', '.join(self._blind)}",
                    needed="directions that were drawn before the first task",
                    cause="expand() without max_rank",
                    fix="attach with max_rank=, the rank to grow to at most",
                )
            )
        self._need_factors(verb)

    def _need_factors(self, verb: str, *, thorough: bool = False) -> None:
        for name, part in self.layers.items():
            if part.moved(thorough=thorough):
                raise out_of_order(
                    verb,
                    f"A or B of layer {name!r} moved after tasks were recorded, so second moments are stale",
                    "leave A and B alone after the first task; restore() brings back routings, not factors",
                )

    def drift(self, *, since: str = "task-ends") -> dict[str, float]:
        """The forgetting meter of each layer, see `clora_core.drift`; in float64 where the device has it."""
        self._need_moments("drift")
        with self._exact():
            return {
                name: float(core.drift(wide(part.adapter), part.moments, since=since, xp=xp))
                for name, part in self.layers.items()
            }

    def _exact(self) -> torch.autocast:
        """Without autocast, whose half precision is for the model's products."""
        return torch.autocast(next(iter(self.layers.values())).R_old.device.type, enabled=False)

    def penalty(
        self, weight: float = 1.0, *, kind: str = "drift", head_weight: float | None = None, **options: Any
    ) -> Tensor:
        """A differentiable penalty to add to the loss.

        Parameters
        ----------
        weight : float
        kind : {"drift", "orthogonality"}
            "drift": `clora_core.drift` with ``since="boundary"`` by default, heads included; 0 in the first task.
            "orthogonality": eq. 26, `clora_core.orthogonality`, which says nothing of heads.
        head_weight : float, optional
            Weight for heads, by default ``weight``.
        options
            ``since`` for "drift"; ``form``, ``energy``, ``normalize`` for "orthogonality".

        Returns
        -------
        tensor, shape (): the weighted sum over layers
        """
        _penalty.check(kind, options)
        if self._open is None:
            raise out_of_order("penalty", "no task is open", "call it inside `with adapter.task(name)`")
        settle(self.model)
        with self._exact():
            return self._penalty(weight, kind, head_weight, options)

    def _penalty(self, weight: float, kind: str, head_weight: float | None, options: dict[str, Any]) -> Tensor:
        total = next(iter(self.layers.values())).R_old.new_zeros((), requires_grad=torch.is_grad_enabled())
        if kind == "orthogonality":
            for name, part in self.layers.items():
                if part.A is not None:
                    adapter, form = self._old_span(name, part, **options)
                    total = total + weight * core.orthogonality(adapter, **form, xp=xp).to(total.device)
            return total
        self._need_moments("penalty")
        if self._groups is None or any(map(_penalty.elsewhere, self._groups)):  # a trainer may move the model any time
            self._groups = _penalty.groups(self.layers) if self.tasks else []
        for group in self._groups:
            scale = weight if head_weight is None or not group.head else head_weight
            value = _penalty.drift(group, **{"since": "boundary", **options}).sum()
            total = total + scale * value.to(total)
        return total

    def _old_span(
        self, name: str, part: LayerAdapter, *, form: str = "basis", energy: float = 0.9, normalize: bool = False
    ) -> tuple[core.Adapter, dict[str, Any]]:
        """An adapter and options of equal penalty that need no decomposition at every step: R_old stays within a task.

        ||Q^T R_delta||^2 with Q = U diag(w) is form "routing" of an adapter whose R_old is Q. U and w come from
        R_old R_old^T, whose eigenvalues are the squared singular values of R_old.
        """
        assert part.A is not None
        assert part.B is not None
        A, R_old, R_delta, B = part.adapter
        adapter = core.Adapter(A.detach(), R_old, R_delta, B.detach())
        if form != "basis" or normalize:
            return adapter, {"form": form, "energy": energy, "normalize": normalize}
        if (name, energy) not in self._spans:
            R_old = widen(part.R_old)
            basis = core.protected_basis(R_old @ R_old.T, energy=energy, xp=xp)
            self._spans[name, energy] = (basis.U * basis.weights[None, :]).to(part.R_old.dtype)
        return adapter._replace(R_old=self._spans[name, energy]), {"form": "routing"}

    def protect(self, optimizer: Any, *, energy: float = 0.95, head_energy: float | None = None) -> None:
        """Keep R_delta (and the heads' difference) out of the protected directions after every step of an optimizer.

        The value is projected, R_delta (I - U diag(w) U^T), so nothing leaks whatever the optimizer does (momentum,
        Adam, weight decay, foreach, fused), and after the steps of any other optimizer that moves this adapter. The
        directions hold ``energy`` of all recorded inputs (heads:
        ``head_energy``, by default the same), see `clora_core.protected_basis`. A layer with no direction left is
        reported by a warning when a task begins. Wrappers with an ``.optimizer`` (accelerate) are taken off.
        """
        self._need_moments("protect")
        optimizer = unwrapped(optimizer)
        if not self._need_watch().steps(optimizer):
            raise out_of_order(
                "protect",
                "the optimizer steps no parameter of this adapter",
                "make it from adapter.parameters(), after fully_shard where that is used",
            )
        head_energy = energy if head_energy is None else head_energy
        energies = {n: head_energy if part.A is None else energy for n, part in self.layers.items()}
        Projection(self.layers, energies)  # refuses a wrong energy now, not in a task
        self._energies = energies
        if self._open is not None:
            self._choose_bases()

    def unprotect(self) -> None:
        """Undo `protect`."""
        self._energies = self._projection = None

    def _choose_bases(self) -> None:
        self._projection = None
        if self._energies is None or not self.tasks:
            return
        self._need_moments("protect")
        with self._exact():
            projection = Projection(self.layers, self._energies)
        if projection.full:
            warnings.warn(
                f"no direction is left to learn in for {', '.join(projection.full)}: all are needed to hold the "
                "protected share of the recorded inputs; lower the energy or raise the rank",
                stacklevel=4,
            )
        self._projection = projection

    # --- growing -----------------------------------------------------------------------------------------------

    def expand(self, by: int, *, seed: int | np.random.Generator | None = None) -> None:
        """Raise every layer's rank between tasks, the function unchanged: routing expansion, see `clora_core.expand`.

        Parameters
        ----------
        by : int >= 1
            New directions for each layer; a layer takes what its spare ones (``max_rank``) give first. Beyond these new
            ones are drawn, of which earlier tasks know nothing: `drift`, `penalty` and `protect` then raise
            `MomentsIncomplete`.
        seed : int or numpy.random.Generator, optional
            For what is drawn; by default from torch's generator.

        Raises
        ------
        RankError
            A rank above min(d_out, d_in) of a layer; nothing has changed.

        Notes
        -----
        Parameters stay the same objects with new shapes, and optimizers drop what they hold of them. The output is the
        same within `clora_core.bounds` (sums of another length); `restore` still gives each task's bits.
        """
        _growth.expand(self, by, seed)

    def grow_head(self, name: str, by: int) -> None:
        """Add ``by`` classes to a head between tasks. Their logits are 0 until they learn, in earlier tasks, too."""
        _growth.grow_head(self, name, by)

    # --- going back --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def restore(self, name: str) -> None:
        """The function as it was when task ``name`` ended: the same bits for the same batch, device and threads.

        Covers adapters and heads. Buffers and parameters of the base model are not covered: running statistics of
        BatchNorm, say, move in train mode. ``restore(adapter.tasks[-1])`` comes back to the present.
        """
        if self._open is not None:
            raise out_of_order("restore", f"task {self._open!r} is open", "end the task first")
        self._need_unmerged("restore")
        settle(self.model)
        for n, fields in self._snapshot("restore", name).items():
            part = self.layers[n]
            if part.A is not None:
                part.set_rank(fields["R_old"].shape[-1])
            for field, value in fields.items():
                getattr(part, field).copy_(like(value, getattr(part, field)))
            part.R_delta.zero_()

    def _snapshot(self, verb: str, name: str) -> dict[str, dict[str, Tensor]]:
        if name not in self._snapshots:
            raise out_of_order(
                verb,
                f"there is no finished task {name!r} (finished: {', '.join(map(repr, self.tasks)) or 'none'})",
                "pass the name of a finished task",
            )
        return self._snapshots[name]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model: no adapter, heads as they were at the start."""
        self._need_unmerged("disabled")
        before = {part: part.enabled for part in self.layers.values()}
        try:
            for part in before:
                part.enabled = False
            yield
        finally:
            for part, enabled in before.items():
                part.enabled = enabled

    @contextmanager
    def rows(self, tasks: Sequence[str | None]) -> Iterator[None]:
        """Each row of a batch by the routing of a task of its own; None is the base model.

        Parameters
        ----------
        tasks : sequence of str or None
            One finished task for each row (first axis) of the batches run inside.

        Notes
        -----
        One x B^T and one A for the whole batch; in between, one r x r product per row with its task's routing.
        """
        if self.factors == "every-task":
            raise out_of_order(
                "rows",
                "tasks have different factors (factors='every-task'), so that no product can be shared",
                "attach with factors='first-task' or 'never', or restore() one task after the other",
            )
        self._need_unmerged("rows")
        if isinstance(tasks, str) or not (tasks := list(tasks)):
            raise OptionError(
                message(
                    "clora_torch.rows",
                    "no list of tasks",
                    got=repr(tasks),
                    needed="a task's name, or None, for each row of the batch",
                    cause="one name for the whole batch, or an empty batch",
                    fix="pass [name] * len(batch)",
                )
            )
        names = list(dict.fromkeys(tasks))
        snapshots = [None if name is None else self._snapshot("rows", name) for name in names]
        index = torch.tensor([names.index(name) for name in tasks])
        before = {part: part.R_rows for part in self.layers.values()}
        try:
            for n, part in self.layers.items():
                base = self._base_routing(n, part)
                stack = torch.stack([base if s is None else _growth.padded(n, s[n]["R_old"], base) for s in snapshots])
                part.R_rows = stack[index.to(stack.device)]
            yield
        finally:
            for part, rows in before.items():
                part.R_rows = rows

    def _base_routing(self, name: str, part: LayerAdapter) -> Tensor:
        if part.A is not None:
            return torch.zeros_like(part.R_old)
        module: Any = self.model.get_submodule(name)
        weight, bias = full(module.weight), full(module.bias)
        columns = [weight] if bias is None else [weight, bias[:, None]]
        return _growth.padded(name, torch.cat([c.detach().to(part.R_old.dtype) for c in columns], dim=1), part.R_old)

    # --- merging -----------------------------------------------------------------------------------------------

    def _modules(self) -> dict[str, Any]:
        return {n: m for n, m in self.model.named_modules() if isinstance(m, Adapted)}

    @property
    def merged(self) -> bool:
        """True between `merge` and `unmerge`."""
        return any(part.merged for part in self.layers.values())

    def _need_watch(self) -> Watch:
        if self._watch is None:
            raise out_of_order("detach", "the adapter is detached from its model", "attach again")
        return self._watch

    def _need_unmerged(self, verb: str) -> None:
        self._need_watch()
        if self.merged:
            raise out_of_order(verb, "the adapters are merged into the weights", "unmerge() first")

    def _need_whole(self, verb: str) -> None:
        settle(self.model)
        for part in self.layers.values():
            part.need_whole(verb)

    def merge(self, *, on_loss: str = "warn", max_loss: float = 0.1) -> dict[str, core.MergeReport]:
        """Merge every adapter into its weight, from the pristine weight and with one rounding.

        Parameters
        ----------
        on_loss : {"warn", "raise", "ignore"}
            What to do where the weight's precision loses more than ``max_loss`` of a layer's update.
        max_loss : float
            Relative error of the stored update.

        Returns
        -------
        dict of layer name to MergeReport
            What was kept; heads are merged without loss to report.

        Notes
        -----
        The pristine Parameters are set aside as they are, on their device, and new ones take their places: that costs
        the memory of the adapted weights once more, and leaves tied and shared weights alone. While merged, the model's
        state_dict is that of the plain model. If anything raises, nothing has changed.
        """
        if self._open is not None:
            raise out_of_order("merge", f"task {self._open!r} is open", "end the task first")
        if self.merged:
            raise out_of_order("merge", "the adapters are merged already", "unmerge() first")
        self._need_unmerged("merge")
        self._need_whole("merge")
        if any(part.R_rows is not None or not part.enabled for part in self.layers.values()):
            raise out_of_order("merge", "rows(...) or disabled() is open", "merge outside of it")
        names = {part: name for name, part in self.layers.items()}
        with self._exact():
            return _merge.merge(self._modules(), names, on_loss=on_loss, max_loss=max_loss)

    def unmerge(self) -> None:
        """Put every pristine weight back: the same Parameters, so the same bits."""
        if not self.merged:
            raise out_of_order("unmerge", "the adapters are not merged", "merge() first")
        _merge.unmerge(self._modules())

    def detach(self) -> nn.Module:
        """Take the adapters off: the original model, its layers' classes, weights and requires_grad."""
        watch = self._need_watch()
        self._need_whole("detach")
        if self.merged:
            self.unmerge()
        for name, module in self._modules().items():
            refuse_replaced("detach", name, module)
        for encoder in self._nested:
            encoder.use_nested_tensor = True
        for module in self._modules().values():
            if module._clora_kind == "head":
                module.out_features = module.weight.shape[0]
            module.__class__ = type(module)._clora_base
            del module._modules[CHILD]
        for parameter, flag in self._required_grad.items():
            parameter.requires_grad_(flag)
        watch.close()
        self._watch = None
        return self.model

    # --- saving ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything of the adapter, an open task included, for torch.save; with the optimizer's state, work goes on.

        The model's own state_dict holds the present adapter and memory, too, but neither tasks nor snapshots. Under
        fully_shard every process must call it, and each gets all of it; one of them saves.
        """
        return _state.dump(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, on a model attached in the same way. Call `protect` afterwards, if used.

        Where a task was open, ``with adapter.task(name)`` of the same name goes on with it.
        """
        _state.load(self, state)

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write all of the adapter into a folder that `load`, and every other framework of clora, reads.

        Parameters
        ----------
        folder : path
            Made where it does not exist. Saving to it again replaces what is there in one step; see
            `clora_store.save`, which also says what it raises.
        overwrite : bool
            Replace the adapter of another run.

        Notes
        -----
        Base weights and optimizers are not in it. Under DistributedDataParallel one process saves; under fully_shard
        every process calls it, and the first writes.
        """
        _store.save(self, folder, overwrite=overwrite)

    def export_peft(self, folder: str | os.PathLike[str], **options: Any) -> Any:
        """Write the present function, or that of ``task=``, as a PEFT LoRA folder; see `clora_store.export_peft`."""
        return _store.export_peft(self, folder, **options)


def _makes_nested(encoder: nn.TransformerEncoder) -> bool:
    return encoder.use_nested_tensor and any(isinstance(m, Adapted) for m in encoder.modules())
