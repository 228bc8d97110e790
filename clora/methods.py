"""The methods of the demo, each as a row of settings, and the one loop that trains them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from clora_core.errors import OptionError, message

from .suites import Backbone, Task
from .trainers import Trainer, trainer


@dataclass(frozen=True)
class Method:
    """A method as settings of a backend; docs/demo.md tells how they were chosen.

    Attributes
    ----------
    title, summary : str
        For people.
    factors, scheme, scale, stop_old, train_routing
        As in the backend's `attach`.
    lr : float
        Learning rate, falling to 0 over each task along half a cosine.
    optimizer : {"adam", "sgd"}
        SGD with momentum 0.9.
    penalty : {"drift", "orthogonality", None}
    weight, head_weight : float
        Of the penalty.
    energy, head_energy : float, optional
        Share of the recorded energy that projection protects; None: no projection.
    """

    title: str
    summary: str
    factors: str
    lr: float
    scheme: str = "orthonormal"
    scale: float = 1.0
    stop_old: bool = True
    train_routing: bool = True
    optimizer: str = "adam"
    penalty: str | None = None
    weight: float = 0.0
    head_weight: float | None = None
    energy: float | None = None
    head_energy: float | None = None
    epochs: int = 5
    batch: int = 32
    smoothing: float = 0.1


SEQUENTIAL = Method(
    "Sequential LoRA",
    "one plain LoRA adapter (R = I), trained on task after task with nothing to protect it",
    factors="every-task",
    scheme="lora",
    stop_old=False,
    train_routing=False,
    lr=1e-3,
)
PAPER = Method(
    "C-LoRA as in the paper",
    "R_old + R_delta, stop-gradient, orthogonality penalty (eq. 26, basis); A and B learn in every task",
    factors="every-task",
    penalty="orthogonality",
    weight=0.01,
    lr=1e-3,
)
METHODS = {
    "sequential-lora": SEQUENTIAL,
    "sequential-lora-slow": replace(
        SEQUENTIAL,
        title="Sequential LoRA, slow",
        summary="the same at the learning rate that forgets least for what it learns: small steps protect, too",
        lr=2e-4,
    ),
    "c-lora-paper": PAPER,
    "c-lora-paper-sgd": replace(
        PAPER,
        title="C-LoRA as in the paper, SGD",
        summary="the same with SGD and momentum, where the theorem on the gradients of A and B applies",
        optimizer="sgd",
        lr=2e-3,
    ),
    "c-lora-projected": Method(
        "C-LoRA, projected",
        "A and B are fixed frames; after every step R_delta is projected off the directions of past inputs",
        factors="never",
        scale=0.3,
        lr=2e-3,
        energy=0.8,
        head_energy=0.97,
    ),
    "c-lora": Method(
        "C-LoRA, drift penalty",
        "A and B are fixed frames; the forgetting meter of past inputs is a penalty",
        factors="never",
        penalty="drift",
        weight=0.1,
        head_weight=0.05,
        lr=8e-3,
    ),
}
DEMO = tuple(METHODS)


def get_method(name: str) -> Method:
    """The settings of a method, or an OptionError that lists the names."""
    if name not in METHODS:
        raise OptionError(
            message(
                "clora.methods",
                "no such method",
                got=repr(name),
                needed="one of " + ", ".join(map(repr, METHODS)),
                cause="a misspelt name",
                fix="pass one of the names listed",
            )
        )
    return METHODS[name]


def steps_per_task(method: Method, task: Task) -> int:
    """Optimizer steps one task takes."""
    return method.epochs * -(-len(task.y_train) // method.batch)


def train(
    method: Method,
    backbone: Backbone,
    stream: list[Task],
    *,
    backend: str = "numpy",
    rank: int,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, Any]]:
    """Learn the stream; after each task yield what is known of it.

    Yields
    ------
    dict
        ``accuracy`` (on every task, also the unseen), ``state_bytes``, ``parameters``, ``seconds`` (of training and
        observing, evaluation left out), ``drift`` (per layer; empty where the method has no memory), ``spectrum``
        (singular values of R per layer).
    """
    trained = trainer(backend, method, backbone, rank=rank, seed=seed)
    remembers = method.factors != "every-task"
    rng = np.random.default_rng([seed, 3])
    for task in stream:
        start = time.perf_counter()
        trained.begin(steps_per_task(method, task))
        with trained.task(task.name):
            parameters = trained.parameters()
            for _ in range(method.epochs):
                order = rng.permutation(len(task.y_train))
                for rows in np.split(order, range(method.batch, len(order), method.batch)):
                    trained.step(task.x_train[rows], task.y_train[rows])
                    on_step()
            if remembers:
                trained.observe(task.x_train)
        seconds = time.perf_counter() - start
        yield {
            "accuracy": [_accuracy(trained, other) for other in stream],
            "parameters": parameters,
            "state_bytes": trained.state_bytes(),
            "seconds": seconds,
            "drift": trained.drift() if remembers else {},
            "spectrum": {name: np.linalg.svd(R, compute_uv=False).tolist() for name, R in trained.routings().items()},
        }


def _accuracy(trained: Trainer, task: Task) -> float:
    return float(np.mean(np.argmax(trained.predict(task.x_test), axis=1) == task.y_test))
