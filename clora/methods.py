"""The methods of the demo, each as a row of settings, and the one loop that trains them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import clora_core as core
import clora_numpy
from clora_core.errors import OptionError, message

from .suites import Backbone, Task

CLASSES = 10


@dataclass(frozen=True)
class Method:
    """A method as settings of the NumPy backend; docs/demo.md tells how they were chosen.

    Attributes
    ----------
    title, summary : str
        For people.
    factors, scheme, scale, stop_old, train_routing
        As in `clora_numpy.attach`.
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


def build(method: Method, backbone: Backbone, *, rank: int, seed: int) -> clora_numpy.ContinualAdapter:
    """The backbone with adapters on both hidden layers and a shared head that starts at zero."""
    network = clora_numpy.Network(
        {
            "hidden-1": clora_numpy.Layer(backbone.W1, backbone.b1),
            "relu-1": clora_numpy.Relu(),
            "hidden-2": clora_numpy.Layer(backbone.W2, backbone.b2),
            "relu-2": clora_numpy.Relu(),
            "head": clora_numpy.Head(np.zeros((CLASSES, backbone.W2.shape[0]), np.float32)),
        }
    )
    return clora_numpy.attach(
        network,
        rank=rank,
        rng=np.random.default_rng([seed, 2]),
        factors=method.factors,
        scheme=method.scheme,
        scale=method.scale,
        stop_old=method.stop_old,
        train_routing=method.train_routing,
    )


def steps_per_task(method: Method, task: Task) -> int:
    """Optimizer steps one task takes."""
    return method.epochs * -(-len(task.y_train) // method.batch)


def train(
    method: Method,
    backbone: Backbone,
    stream: list[Task],
    *,
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
    adapter = build(method, backbone, rank=rank, seed=seed)
    network = adapter.network
    lr = clora_numpy.cosine(method.lr, steps_per_task(method, stream[0]))
    rule = clora_numpy.adam(lr) if method.optimizer == "adam" else clora_numpy.sgd(lr, momentum=0.9)
    optimizer = clora_numpy.Optimizer(adapter, rule)
    remembers = method.factors != "every-task"
    if method.energy is not None:
        adapter.protect(optimizer, energy=method.energy, head_energy=method.head_energy)
    rng = np.random.default_rng([seed, 3])
    for task in stream:
        start = time.perf_counter()
        optimizer.state = {}  # each task starts afresh, the schedule included
        with adapter.task(task.name):
            parameters = sum(array.size for array in adapter.parameters().values())
            for _ in range(method.epochs):
                order = rng.permutation(len(task.y_train))
                for rows in np.split(order, range(method.batch, len(order), method.batch)):
                    _, grad = clora_numpy.cross_entropy(
                        network.forward(task.x_train[rows]), task.y_train[rows], smoothing=method.smoothing
                    )
                    network.backward(grad)
                    if method.penalty == "drift":
                        adapter.penalty(method.weight, head_weight=method.head_weight)
                    elif method.penalty is not None:
                        adapter.penalty(method.weight, kind=method.penalty)
                    optimizer.step()
                    on_step()
            if remembers:
                adapter.observe([task.x_train])
        seconds = time.perf_counter() - start
        yield {
            "accuracy": [_accuracy(network, other) for other in stream],
            "parameters": parameters,
            "state_bytes": adapter.state_bytes(),
            "seconds": seconds,
            "drift": adapter.drift() if remembers else {},
            "spectrum": {
                name: np.linalg.svd(core.routing(layer.adapter), compute_uv=False).tolist()
                for name, layer in adapter.layers.items()
                if layer.adapter.A is not None
            },
        }


def _accuracy(network: clora_numpy.Network, task: Task) -> float:
    return float(np.mean(np.argmax(network.forward(task.x_test), axis=1) == task.y_test))
