"""Merging the update into the weight, with a report of what the target precision kept of it."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _array as arr
from . import bounds
from ._adapter import Adapter
from ._layer import check_input, delta
from .errors import ShapeError, message

Array = arr.Array


class MergeReport(NamedTuple):
    r"""What one merge stored of the delta; every field is an array of shape (...).

    Attributes
    ----------
    kept : :math:`\langle W' - W, \Delta W\rangle / \|\Delta W\|_F^2`. 1: all of it; 0: none (or there was none).
    error : :math:`\|W' - W - \Delta W\|_F / \|\Delta W\|_F`, relative error of the stored delta; 0 if there was none.
    unchanged : share of the entries of W that came out as they were.
    bound : the largest entry of `bounds.merge`: no entry of the merged weight is further from exact than this.
    """

    kept: Array
    error: Array
    unchanged: Array
    bound: Array


class Merged(NamedTuple):
    """What `merge` returns: the merged weight (..., d_out, d_in) and the report."""

    weight: Array
    report: MergeReport


def merge(W: Array, adapter: Adapter, *, dtype: Any = None, xp: Any = None) -> Merged:
    r"""Merge from the pristine weight: :math:`W' = \mathrm{round}(W + A R B)`.

    Parameters
    ----------
    W : array, shape (..., d_out, d_in)
        The pristine weight, in the adapter's dtype. A half-precision weight is cast up (exactly) by the caller. Never
        a weight that was merged before: the roundings would add up.
    adapter : Adapter
    dtype : optional
        Of the result, by default W's. A narrower one is reached by one rounding of W + A R B through float32.

    Returns
    -------
    Merged(weight, report)

    Notes
    -----
    There is no unmerge by subtraction, which is never exact: keep W. Rounding of the weight: elementwise at most
    `bounds.merge(W, adapter, dtype=dtype)`.
    """
    where = "clora_core.merge"
    xp = arr.namespace(where, xp, W, *adapter)
    check_weight(where, xp, W, adapter)
    dtype = W.dtype if dtype is None else arr.as_dtype(where, dtype, xp)
    limit = bounds.merge(W, adapter, dtype=dtype, xp=xp)  # refuses a dtype that is not floating
    dW = delta(adapter, xp=xp)
    exact = W + dW
    weight = exact
    if dtype != W.dtype:
        if W.dtype == xp.float64 and dtype != xp.float64:
            weight = xp.astype(weight, xp.float32)
        weight = xp.astype(weight, dtype)
    stored = xp.astype(weight, W.dtype) - W
    size = arr.squared_norm(dW, xp)
    same = xp.where(stored == 0, xp.ones_like(stored), xp.zeros_like(stored))
    report = MergeReport(
        kept=arr.ratio(xp.sum(stored * dW, axis=(-2, -1)), size, xp),
        error=arr.safe_sqrt(arr.ratio(arr.squared_norm(stored - dW, xp), size, xp), xp),
        unchanged=xp.mean(same, axis=(-2, -1)),
        bound=xp.max(limit, axis=(-2, -1)),
    )
    return Merged(weight, report)


def check_weight(where: str, xp: Any, W: Array, adapter: Adapter) -> None:
    """Static checks shared by the merge and its bound."""
    check_input(where, xp, None, adapter, W)
    if 0 in W.shape[-2:]:
        raise ShapeError(
            message(
                where,
                "there is no weight to merge into",
                got=f"W {tuple(W.shape)}",
                needed="d_out >= 1 and d_in >= 1",
                cause="an empty slice of a weight",
                fix="leave this layer out",
            )
        )
