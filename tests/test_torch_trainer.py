"""transformers' Trainer through the callback: the numbers of a plain loop, and no state that is silently wrong."""

import copy
import importlib.util
import os
from pathlib import Path
from typing import Any

import kit
import pytest

import clora_core as core
from clora_core.errors import OptionError, StateError

if kit.torch is None:
    pytest.skip(kit.NO_TORCH, allow_module_level=True)
if importlib.util.find_spec("accelerate") is None or importlib.util.find_spec("transformers") is None:
    pytest.skip(kit.NO_PEERS, allow_module_level=True)
torch: Any = kit.torch
from torch_processes import PROCESSES, equal_everywhere, together  # noqa: E402
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

import clora_torch as clora  # noqa: E402
from clora_torch.huggingface import TaskCallback  # noqa: E402

CLIP = 0.05  # below most gradients' norms, so that clipping is at work


def bert(dtype: Any = torch.float32) -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForSequenceClassification(config).to(dtype)
    return model, clora.attach(model, rank=8, targets=["query", "value"], heads="classifier", seed=0)


def examples(task: int, count: int = 16) -> list[dict[str, Any]]:
    """Words of a task come from an eighth of the vocabulary of its own; the last two positions are padding."""
    generator = torch.Generator().manual_seed(task)
    mask = (torch.arange(8) < 6).long()
    return [
        {
            "input_ids": 8 * task + torch.randint(0, 8, (8,), generator=generator),
            "attention_mask": mask,
            "labels": torch.tensor(i % 3),
        }
        for i in range(count)
    ]


def summed_loss(outputs: Any, labels: Any, num_items_in_batch: Any) -> Any:
    """The mean over all rows of an optimizer step, which this model's own loss is not under accumulation."""
    return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def trainer(model: Any, folder: Path, task: int, callback: Any, *, own: Any = None, **options: Any) -> Any:
    given = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "optim": "sgd",
        "learning_rate": 0.25,
        "lr_scheduler_type": "constant",
        "max_grad_norm": CLIP,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    args = TrainingArguments(str(folder), **{**given, **options})
    own = {"train_dataset": examples(task), "compute_loss_func": summed_loss, **(own or {})}
    return Trainer(model=model, args=args, callbacks=[callback], **own)


def batches(task: int, rows: int = 4) -> list[dict[str, Any]]:
    data = examples(task)
    return [
        {key: torch.stack([example[key] for example in data[i : i + rows]]) for key in data[0]}
        for i in range(0, len(data), rows)
    ]


def plain_loop(
    model: Any, adapter: Any, task: int, *, accumulate: int = 1, rows: int = 4, penalty: float, energy: float
) -> None:
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.25)
    with adapter.task(f"task-{task}"):
        adapter.protect(optimizer, energy=energy)
        model.train()
        for _ in range(2):
            for i, batch in enumerate(batches(task, rows)):
                inputs = {key: value for key, value in batch.items() if key != "labels"}
                summed_loss(model(**inputs), batch["labels"], rows * accumulate).backward()
                if (i + 1) % accumulate == 0:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                    adapter.penalty(penalty).backward()
                    optimizer.step()
                    model.zero_grad()
        adapter.observe(batches(task))
        adapter.unprotect()


def same(first: Any, second: Any) -> None:
    """Every array of two models has the same bits."""
    one, other = first.state_dict(), second.state_dict()
    assert list(one) == list(other)
    for key in one:
        assert torch.equal(one[key], other[key]), key


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_tasks_as_in_a_plain_loop(tmp_path: Path, accumulate: int) -> None:
    """The same bits: one penalty for each step however many batches it takes, after clipping; nothing leaks."""
    model, adapter = bert()
    other, plain = bert()
    for task in range(2):
        callback = TaskCallback(adapter, penalty=0.5, protect=0.8)
        with adapter.task(f"task-{task}"):
            run = trainer(model, tmp_path, task, callback, gradient_accumulation_steps=accumulate, logging_steps=1,
                          logging_strategy="steps")  # fmt: skip
            run.train()
            if task == 1:
                for part in adapter.layers.values():
                    basis = core.protected_basis(part.S, energy=0.8)
                    R = part.R_delta.detach().double()
                    assert 0 < basis.weights.sum() < len(basis.weights)
                    assert ((R @ basis.U) * basis.weights).norm() <= 1e-6 * R.norm()
                    assert R.norm() > 0
        plain_loop(other, plain, task, accumulate=accumulate, penalty=0.5, energy=0.8)
    same(model, other)
    assert adapter.drift() == plain.drift()
    logs = [log for log in run.state.log_history if "loss" in log]
    assert all(log["drift"] >= 0 for log in logs)
    assert logs[-1]["drift"] > 0


def test_bfloat16_keeps_what_is_protected(tmp_path: Path) -> None:
    """Under autocast adapters stay float32, and the function at the end of the task is that of the snapshot."""
    model, adapter = bert()
    for task in range(2):
        with adapter.task(f"task-{task}"):
            trainer(model, tmp_path, task, TaskCallback(adapter, penalty=0.5, protect=0.8), bf16=True).train()
            for part in adapter.layers.values() if task else ():
                basis = core.protected_basis(part.S, energy=0.8)
                R = part.R_delta.detach().double()
                assert part.R_delta.dtype == torch.float32
                assert ((R @ basis.U) * basis.weights).norm() <= 1e-6 * R.norm()
    assert list(adapter.drift()) == list(adapter.layers)


class Failing(TrainerCallback):
    """Stops training by an exception at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_an_exception_leaves_the_adapter_as_it_was(tmp_path: Path) -> None:
    """Arrays, memory and tasks; another attempt then gives what a first one gives."""
    model, adapter = bert()
    with adapter.task("task-0"):
        trainer(model, tmp_path, 0, TaskCallback(adapter)).train()
    before = copy.deepcopy(model)
    run = trainer(model, tmp_path, 1, TaskCallback(adapter, penalty=0.5, protect=0.8))
    run.add_callback(Failing(3))
    with pytest.raises(KeyboardInterrupt), adapter.task("task-1"):
        run.train()
    same(model, before)
    assert adapter.tasks == ["task-0"]
    with adapter.task("task-1"):
        trainer(model, tmp_path, 1, TaskCallback(adapter, penalty=0.5, protect=0.8)).train()
    assert adapter.tasks == ["task-0", "task-1"]


def test_resuming_in_the_middle_of_a_task(tmp_path: Path) -> None:
    """A new process, the adapter's state from the checkpoint: the same bits as without the interruption."""
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 3}
    whole, adapter = bert()
    with adapter.task("task-0"):
        trainer(whole, tmp_path / "0", 0, TaskCallback(adapter), **options).train()
    with adapter.task("task-1"):
        trainer(whole, tmp_path / "1", 1, TaskCallback(adapter, penalty=0.5, protect=0.8), **options).train()

    checkpoint = tmp_path / "1" / "checkpoint-3"
    fresh, stranger = bert()
    stranger.begin_task("task-1")
    run = trainer(fresh, tmp_path / "1", 1, TaskCallback(stranger, penalty=0.5, protect=0.8), **options)
    with pytest.raises(ValueError, match="parameter group"):  # by torch: the optimizer's sizes differ already
        run.train(resume_from_checkpoint=str(checkpoint))

    model, resumed = bert()
    resumed.load_state_dict(torch.load(checkpoint / "clora.pt"))
    with resumed.task("task-1"):
        run = trainer(model, tmp_path / "1", 1, TaskCallback(resumed, penalty=0.5, protect=0.8), **options)
        run.train(resume_from_checkpoint=str(checkpoint))
    same(model, whole)
    assert resumed.tasks == adapter.tasks
    for name in adapter.tasks:
        adapter.restore(name)
        resumed.restore(name)
        same(model, whole)


def test_a_checkpoint_of_another_task_is_refused(tmp_path: Path) -> None:
    """Where the optimizer's sizes agree, torch has nothing to say; the callback has."""
    options = {"save_strategy": "steps", "save_steps": 4}
    model, adapter = bert()
    for task in range(2):
        with adapter.task(f"task-{task}"):
            trainer(model, tmp_path / str(task), task, TaskCallback(adapter), **options).train()
    run = trainer(model, tmp_path / "1", 1, TaskCallback(adapter), **options)
    with pytest.raises(StateError, match="belongs to another task"), adapter.task("task-2"):
        run.train(resume_from_checkpoint=str(tmp_path / "1" / "checkpoint-4"))


def test_the_best_model_is_what_is_observed(tmp_path: Path) -> None:
    """load_best_model_at_end loads before the memory is taken: moments are those of the weights that stay."""
    model, adapter = bert()
    scores = iter([1.0, 0.0])
    with adapter.task("task-0"):
        run = trainer(
            model,
            tmp_path,
            0,
            TaskCallback(adapter),
            own={"eval_dataset": examples(0, 4), "compute_metrics": lambda _: {"score": next(scores)}},
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_score",
            greater_is_better=True,
            num_train_epochs=1,
        )
        run.train()
        observed = {name: C.clone() for name, C in adapter._observed.items()}
        adapter.observe(batches(0))
        assert all(torch.equal(adapter._observed[name], C) for name, C in observed.items())
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    adapter.drift()


def in_parallel(rank: int) -> None:
    """Two tasks in float64 under torchrun's environment and alone, with the same rows in every step."""
    import tempfile

    keys = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    os.environ.update({key: str(value) for key, value in keys.items()})
    model, adapter = bert(torch.float64)
    with tempfile.TemporaryDirectory() as folder:
        for task in range(2):
            with adapter.task(f"task-{task}"):
                run = trainer(model, Path(folder), task, TaskCallback(adapter, penalty=0.5, protect=0.8))
                run.train()
                assert isinstance(run.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    alone, single = bert(torch.float64)
    for task in range(2):
        plain_loop(alone, single, task, rows=4 * PROCESSES, penalty=0.5, energy=0.8)
    for one, other in zip(model.state_dict().values(), alone.state_dict().values(), strict=True):
        assert (one - other).abs().max() <= 2.0**-36 * other.abs().max()
    equal_everywhere({key: value for key, value in model.state_dict().items() if "clora" in key})


def test_two_processes(tmp_path: Path) -> None:
    """The Trainer's own DistributedDataParallel, a wrapper for each task: one process's numbers."""
    together(in_parallel, tmp_path)


class Endless(torch.utils.data.IterableDataset):
    """A stream of one task's examples."""

    def __iter__(self) -> Any:
        while True:
            yield from examples(0)


def outside(model: Any, adapter: Any, folder: Path) -> None:
    trainer(model, folder, 0, TaskCallback(adapter)).train()


def half(model: Any, adapter: Any, folder: Path) -> None:
    run = trainer(model, folder, 0, TaskCallback(adapter, penalty=0.5), max_grad_norm=0.0)
    run.args.fp16 = True  # only a GPU has it
    with adapter.task("task-0"):
        run.train()


def stranger(model: Any, adapter: Any, folder: Path) -> None:
    other, _ = bert()
    with adapter.task("task-0"):
        trainer(other, folder, 0, TaskCallback(adapter)).train()


def endless(model: Any, adapter: Any, folder: Path) -> None:
    run = trainer(model, folder, 0, TaskCallback(adapter), max_steps=1, own={"train_dataset": Endless()})
    with adapter.task("task-0"):
        run.train()


def unobserved(model: Any, adapter: Any, folder: Path) -> None:
    adapter.begin_task("before")
    adapter.end_task()
    with adapter.task("task-0"):
        trainer(model, folder, 0, TaskCallback(adapter, penalty=0.5)).train()


ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    "no task open": (outside, StateError, "no task is open"),
    "fp16 without clipping": (half, StateError, "set max_grad_norm"),
    "another model": (stranger, StateError, "no parameter of the adapter"),
    "a dataset without end": (endless, OptionError, "may never end"),
    "a task without memory": (unobserved, StateError, "without being observed"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_would_be_silently_wrong_is_refused(tmp_path: Path, name: str) -> None:
    """Before the first step; the adapter has no task open afterwards."""
    call, error, words = ERRORS[name]
    model, adapter = bert()
    with pytest.raises(error) as caught:
        call(model, adapter, tmp_path)
    assert words in str(caught.value)
    assert adapter._open is None
