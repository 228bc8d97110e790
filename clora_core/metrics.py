r"""Continual-learning metrics from the full accuracy matrix; each names its published formula.

``accuracy`` (..., T, T): row i after learning task i, column j evaluated on task j; every task is evaluated in every
row, also the unseen. Toolkits disagree on what these names mean; these are the formulas as published, 1-based.
"""

from __future__ import annotations

from typing import Any

from . import _array as arr
from .errors import ShapeError, message

Array = arr.Array


def _matrix(name: str, accuracy: Array, xp: Any) -> tuple[Any, int]:
    where = f"clora_core.metrics.{name}"
    xp = arr.namespace(where, xp, accuracy)
    arr.check_dtype(where, xp, accuracy=accuracy)
    shape = tuple(accuracy.shape)
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < 1:
        raise ShapeError(
            message(
                where,
                "not an accuracy matrix",
                got=f"accuracy {shape}",
                needed="(..., T, T) with T >= 1 tasks",
                cause="rows of an unfinished run, or only the seen tasks evaluated",
                fix="evaluate every task after each task, and pass the square part of an unfinished run",
            )
        )
    return xp, shape[-1]


def last_accuracy(accuracy: Array, *, xp: Any = None) -> Array:
    r"""Last-Acc: :math:`\frac1T \sum_{j=1}^T a_{T,j}`, shape (...).

    Source: "ACC" of Lopez-Paz and Ranzato, Gradient Episodic Memory, NeurIPS 2017, eq. 2.
    """
    xp, _ = _matrix("last_accuracy", accuracy, xp)
    return xp.mean(accuracy[..., -1, :], axis=-1)


def average_accuracy(accuracy: Array, *, xp: Any = None) -> Array:
    r"""Average accuracy over the tasks seen so far: :math:`A_i = \frac1i \sum_{j \le i} a_{i,j}`, shape (..., T).

    Source: Chaudhry et al., Riemannian Walk, ECCV 2018, section 3 (there A_k).
    """
    xp, _ = _matrix("average_accuracy", accuracy, xp)
    seen, count = xp.tril(accuracy), xp.tril(xp.ones_like(accuracy))
    return xp.sum(seen, axis=-1) / xp.sum(count, axis=-1)


def average_incremental_accuracy(accuracy: Array, *, xp: Any = None) -> Array:
    r"""Inc-Acc: the mean over tasks of `average_accuracy`, :math:`\frac1T \sum_i A_i`, shape (...).

    Source: Rebuffi et al., iCaRL, CVPR 2017, section 4.1 ("average incremental accuracy").
    """
    xp, _ = _matrix("average_incremental_accuracy", accuracy, xp)
    return xp.mean(average_accuracy(accuracy, xp=xp), axis=-1)


def backward_transfer(accuracy: Array, *, xp: Any = None) -> Array:
    r"""BWT: :math:`\frac{1}{T-1} \sum_{j<T} (a_{T,j} - a_{j,j})`, shape (...); 0 for one task. Negative is forgetting.

    Source: Lopez-Paz and Ranzato, NeurIPS 2017, eq. 3.
    """
    xp, T = _matrix("backward_transfer", accuracy, xp)
    return xp.sum(accuracy[..., -1, :-1] - _diagonal(accuracy, xp)[..., :-1], axis=-1) / max(T - 1, 1)


def forward_transfer(accuracy: Array, *, baseline: Array | None = None, xp: Any = None) -> Array:
    r"""FWT: :math:`\frac{1}{T-1} \sum_{j>1} (a_{j-1,j} - b_j)`, shape (...); 0 for one task.

    ``baseline`` (..., T): accuracy b_j of the model before any task; zero where left out.

    Source: Lopez-Paz and Ranzato, NeurIPS 2017, eq. 4.
    """
    xp, T = _matrix("forward_transfer", accuracy, xp)
    b = xp.zeros_like(accuracy[..., 0, :]) if baseline is None else baseline
    where = "clora_core.metrics.forward_transfer"
    arr.check_dtype(where, xp, accuracy=accuracy, baseline=b)
    arr.check_last(where, name="baseline", array=b, last=(T,), needed="(..., T)", fix="one number for each task")
    arr.broadcast_shapes(where, accuracy=tuple(accuracy.shape[:-2]), baseline=tuple(b.shape[:-1]))
    before = xp.sum(xp.triu(xp.tril(accuracy, k=1), k=1), axis=-2)
    return xp.sum((before - b)[..., 1:], axis=-1) / max(T - 1, 1)


def forgetting(accuracy: Array, *, xp: Any = None) -> Array:
    r"""Average forgetting: :math:`\frac{1}{T-1} \sum_{j<T} \big(\max_{l<T} a_{l,j} - a_{T,j}\big)`; 0 for one task.

    Source: Chaudhry et al., ECCV 2018, section 3 (there F_k; l runs over all earlier rows).
    """
    xp, T = _matrix("forgetting", accuracy, xp)
    if T == 1:
        return xp.zeros_like(accuracy[..., 0, 0])
    best = xp.max(accuracy[..., :-1, :-1], axis=-2)
    return xp.mean(best - accuracy[..., -1, :-1], axis=-1)


def _diagonal(accuracy: Array, xp: Any) -> Array:
    """The diagonal, without the linalg extension."""
    return xp.sum(xp.tril(xp.triu(accuracy)), axis=-1)
