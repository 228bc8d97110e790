"""Frames: matrices with orthonormal columns, unique by a fixed choice of signs."""

from __future__ import annotations

from typing import Any

from . import _array as arr
from .errors import ShapeError, message

Array = arr.Array


def orthonormalize(F: Array, *, xp: Any = None) -> Array:
    r"""The orthonormal frame Q of :math:`F = Q\,T`, T upper triangular with diagonal >= 0.

    Parameters
    ----------
    F : array, shape (..., d, r), d >= r
        Columns to orthonormalise, in order.

    Returns
    -------
    array, shape (..., d, r)
        Unique where F has full rank. Defect at most ``bounds.orthonormal(d, r)``.

    Raises
    ------
    ShapeError
        d < r.

    Notes
    -----
    Householder QR, then each column times the sign of T's diagonal (a zero counts as positive). Needs ``linalg``.
    Source: Golub and Van Loan, Matrix Computations, 4th ed., theorem 5.2.3 (uniqueness of the thin QR).
    """
    where = "clora_core.orthonormalize"
    xp = arr.namespace(where, xp, F)
    arr.check_dtype(where, xp, F=F)
    shape = tuple(F.shape)
    if len(shape) < 2 or shape[-2] < shape[-1]:
        _raise_wide(where, shape)
    Q, T = xp.linalg.qr(F, mode="reduced")
    diagonal = xp.linalg.diagonal(T)
    one = xp.ones_like(diagonal)
    return Q * xp.where(diagonal < 0, -one, one)[..., None, :]


def orthonormality_defect(F: Array, *, xp: Any = None) -> Array:
    r"""How far columns are from orthonormal: :math:`\|F^T F - I\|_F`.

    Parameters
    ----------
    F : array, shape (..., d, r)
        Columns to measure. For the rows of B pass its transpose.

    Returns
    -------
    array, shape (...)
        0 exactly for orthonormal columns with exact arithmetic; its derivative there is taken as 0.
    """
    where = "clora_core.orthonormality_defect"
    xp = arr.namespace(where, xp, F)
    arr.check_dtype(where, xp, F=F)
    if len(F.shape) < 2:
        _raise_wide(where, tuple(F.shape))
    gram = arr.transpose(F, xp) @ F
    return arr.safe_sqrt(arr.squared_norm(gram - arr.eye_like(F, F.shape[-1], xp), xp), xp)


def fix_signs(U: Array, Vt: Array, xp: Any) -> tuple[Array, Array]:
    """Flip pairs of singular vectors so that the entry of largest size in each column of U is positive."""
    top = xp.max(U, axis=-2, keepdims=True)
    bottom = xp.min(U, axis=-2, keepdims=True)
    one = xp.ones_like(top)
    sign = xp.where(-bottom > top, -one, one)
    return U * sign, Vt * arr.transpose(sign, xp)


def _raise_wide(where: str, shape: tuple[int, ...]) -> None:
    raise ShapeError(
        message(
            where,
            "F cannot have orthonormal columns",
            got=f"F {shape}",
            needed="F (..., d, r) with d >= r",
            cause="rows where columns are meant, as with B",
            fix="pass the transpose",
        )
    )
