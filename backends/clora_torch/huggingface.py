"""C-LoRA under transformers' Trainer: one callback, no subclass. Imported on request; nothing else imports it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clora_core.errors import MissingDependencyError, OptionError, StateError, message

from ._adapter import ContinualAdapter
from ._observe import Mask
from ._protect import unwrapped

try:
    from transformers import TrainerCallback  # pyright: ignore[reportMissingImports]
    from transformers.trainer_utils import has_length  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise MissingDependencyError(
        message(
            "clora_torch.huggingface",
            "transformers is not installed",
            got="no module transformers",
            needed="transformers with accelerate",
            cause="a bare install",
            fix="python -m pip install transformers accelerate",
        )
    ) from error

STATE = "clora.pt"
KEY = "clora"


class TaskCallback(TrainerCallback):
    """The open task of an adapter, trained by a Trainer: penalty, protection, observation and checkpoints.

    Parameters
    ----------
    adapter : ContinualAdapter
        With a task open: ``with adapter.task(name): trainer.train()``.
    penalty : float or callable() -> tensor
        Weight of `ContinualAdapter.penalty`, or what to add in its place. Its gradient is added once for each optimizer
        step, after clipping, whatever the number of accumulated batches or processes.
    protect, head_energy : float, optional
        `ContinualAdapter.protect` with this energy; by default no protection.
    observe : bool or iterable
        What `ContinualAdapter.observe` passes through when training ends (after ``load_best_model_at_end``): the
        Trainer's train dataloader (True), other batches, or nothing (False).
    forward, mask
        As in `ContinualAdapter.observe`.

    Notes
    -----
    Every checkpoint folder gets ``clora.pt``, the adapter's `state_dict`. To resume in the middle of a task, load it
    before the Trainer runs; then ``with adapter.task(name)`` goes on with the task. Logs with a loss get "drift", the
    forgetting meter summed over layers.

    Raises
    ------
    StateError
        When training begins: no task open; an optimizer that steps no parameter of the adapter (DeepSpeed); a
        checkpoint of another task; fp16 without clipping, where gradients may still be scaled.
    OptionError
        When training begins: a train dataloader without length, which may never end, to be observed.
    """

    def __init__(
        self,
        adapter: ContinualAdapter,
        *,
        penalty: float | Callable[[], Tensor] = 0.0,
        protect: float | None = None,
        head_energy: float | None = None,
        observe: bool | Iterable[Any] = True,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        mask: Mask = None,
    ) -> None:
        self.adapter, self.energy, self.head_energy = adapter, protect, head_energy
        self.batches, self.forward, self.mask = observe, forward, mask
        self.penalty: Callable[[], Tensor] | None
        if callable(penalty):
            self.penalty = penalty
        else:
            self.penalty = (lambda: adapter.penalty(penalty)) if penalty else None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Refuse what would be silently wrong, and protect."""
        adapter = self.adapter
        if adapter._open is None:
            raise _error("no task is open", "trainer.train() outside of a task", "with adapter.task(name): ...")
        if not adapter._need_watch().steps(unwrapped(optimizer)):
            raise _error(
                "the optimizer steps no parameter of the adapter",
                "an optimizer of other parameters",
                "give the Trainer the model that attach was called on, and no DeepSpeed",
            )
        own = {"tasks": list(adapter.tasks), "open": adapter._open}
        saved = state.stateful_callbacks.get(KEY, own)
        if state.global_step and saved != own:
            raise _error(
                "the checkpoint belongs to another task",
                f"a checkpoint of task {saved['open']!r} after {saved['tasks']}, an adapter in task {own['open']!r} "
                f"after {own['tasks']}",
                f"adapter.load_state_dict(torch.load(checkpoint + '/{STATE}')) before the Trainer runs",
            )
        state.stateful_callbacks[KEY] = own
        if self.batches is True and not has_length(train_dataloader):
            raise OptionError(
                message(
                    "clora_torch.huggingface.TaskCallback",
                    "the train dataloader may never end",
                    got="observe=True with a dataloader that has no length",
                    needed="batches that end",
                    cause="a streamed dataset",
                    fix="pass observe=batches (a loader over a part will do), or observe=False and call "
                    "adapter.observe(batches) in the task",
                )
            )
        if self.penalty is not None:
            if getattr(args, "fp16", False) and not args.max_grad_norm:
                raise _error(
                    "gradients may be scaled where the penalty is added",
                    "fp16 with max_grad_norm=0",
                    "set max_grad_norm, or train in bf16",
                )
            self.penalty()  # what it refuses, it refuses now
        if self.energy is not None:
            adapter.protect(optimizer, energy=self.energy, head_energy=self.head_energy)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the penalty's gradient: the same in every process, so nothing is left to reduce."""
        if self.penalty is not None:
            self.penalty().backward()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the forgetting meter."""
        if not logs or "loss" not in logs or not self.adapter.tasks:
            return
        with suppress(StateError):  # no meter where tasks were not observed
            logs["drift"] = sum(self.adapter.drift().values())
            state.log_history[-1]["drift"] = logs["drift"]

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the adapter's state beside the model's."""
        adapter_state = self.adapter.state_dict()  # by every process: under fully_shard it is gathered
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            torch.save(adapter_state, folder / STATE)

    def on_train_end(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Take the second moments."""
        batches = train_dataloader if self.batches is True else self.batches
        if batches is not False:
            self.adapter.observe(batches, forward=self.forward, mask=self.mask)
        if self.energy is not None:
            self.adapter.unprotect()  # the next task's callback says what it wants


def _error(what: str, got: str, fix: str) -> StateError:
    return StateError(
        message(
            "clora_torch.huggingface.TaskCallback",
            what,
            got=got,
            needed="a Trainer whose optimizer trains the open task of this adapter",
            cause="a Trainer that runs outside of the task's block, or on another model",
            fix=fix,
        )
    )
