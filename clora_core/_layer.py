"""The adapted layer as plain formulas: what autodiff differentiates and what every other route must agree with."""

from __future__ import annotations

from typing import Any

from . import _array as arr
from ._adapter import Adapter

Array = arr.Array


def routing(adapter: Adapter, *, xp: Any = None) -> Array:
    r"""The whole routing :math:`R = R_{old} + R_\delta`, shape (..., r, r). One rounding per entry."""
    where = "clora_core.routing"
    xp = arr.namespace(where, xp, *adapter)
    arr.check_adapter(where, xp, adapter, identity=True)
    return adapter.R_old + adapter.R_delta


def delta(adapter: Adapter, *, xp: Any = None) -> Array:
    r"""Update of the weight: :math:`\Delta W = A\,(R_{old} + R_\delta)\,B`.

    Parameters
    ----------
    adapter : Adapter
        Factors A (..., d_out, r), B (..., r, d_in), routings (..., r, r).

    Returns
    -------
    array, shape (..., d_out, d_in), the dtype and device of the adapter.

    Notes
    -----
    R is summed first, then folded into the smaller factor: (A R) B if d_out <= d_in, else A (R B).
    Rounding: elementwise at most `bounds.delta(adapter)`. Source: eq. 3 of arXiv:2502.17920.
    """
    where = "clora_core.delta"
    xp = arr.namespace(where, xp, *adapter)
    arr.check_adapter(where, xp, adapter)
    A, R_old, R_delta, B = adapter
    R = R_old + R_delta
    return (A @ R) @ B if A.shape[-2] <= B.shape[-1] else A @ (R @ B)


def apply(x: Array, adapter: Adapter, *, xp: Any = None) -> Array:
    r"""The low-rank path: :math:`x\,(A R B)^T = ((x B^T) R^T) A^T`.

    Parameters
    ----------
    x : array, shape (..., n, d_in)
        Rows of inputs; n may be 0.
    adapter : Adapter

    Returns
    -------
    array, shape (..., n, d_out)

    Raises
    ------
    ShapeError
        x has no row axis (write ``x[None, :]``) or another d_in.

    Notes
    -----
    Associated from x, so that no product is larger than n x max(d_out, d_in), for any n.
    Rounding: elementwise at most `bounds.apply(x, adapter)`. Source: eqs. 3 and 11 of arXiv:2502.17920.
    """
    where = "clora_core.apply"
    xp = arr.namespace(where, xp, x, *adapter)
    check_input(where, xp, x, adapter)
    return _apply(x, adapter, xp)


def linear(x: Array, W: Array, adapter: Adapter, bias: Array | None = None, *, xp: Any = None) -> Array:
    r"""The adapted layer: :math:`y = x W^T + x (A R B)^T + b`.

    Parameters
    ----------
    x : array, shape (..., n, d_in)
    W : array, shape (..., d_out, d_in)
        The frozen weight.
    adapter : Adapter
    bias : array, shape (..., d_out), optional

    Returns
    -------
    array, shape (..., n, d_out)

    Notes
    -----
    Value and derivatives of autodiff are those of the full routing R; eqs. 11-12's stop-gradient is in `linear_vjp`.
    Rounding: elementwise at most `bounds.linear(x, W, adapter, bias)`. Source: eq. 3 of arXiv:2502.17920.
    """
    where = "clora_core.linear"
    xp = arr.namespace(where, xp, x, W, *adapter, bias)
    check_input(where, xp, x, adapter, W, bias)
    y = x @ arr.transpose(W, xp) + _apply(x, adapter, xp)
    return y if bias is None else y + bias[..., None, :]


def _apply(x: Array, adapter: Adapter, xp: Any) -> Array:
    A, R_old, R_delta, B = adapter
    u = x @ arr.transpose(B, xp)
    return (u @ arr.transpose(R_old + R_delta, xp)) @ arr.transpose(A, xp)


def check_input(
    where: str, xp: Any, x: Array, adapter: Adapter, W: Array | None = None, bias: Array | None = None
) -> None:
    """Static checks shared by the layer and its gradients."""
    arr.check_adapter(where, xp, adapter)
    A, _, _, B = adapter
    if not arr.one_dtype(xp, A, x, W, bias):
        arr.check_dtype(where, xp, A=A, x=x, W=W, bias=bias)
    d_out, d_in = A.shape[-2], B.shape[-1]
    if x is not None and (len(x.shape) < 2 or x.shape[-1] != d_in):
        arr.check_last(
            where,
            name="x",
            array=x,
            last=(-1, d_in),
            needed=f"(..., n, d_in={d_in})",
            fix="pass rows (x[None, :] for one vector) of the layer's inputs",
        )
    if W is not None:
        arr.check_last(
            where,
            name="W",
            array=W,
            last=(d_out, d_in),
            needed=f"(..., d_out={d_out}, d_in={d_in})",
            fix="transpose W (kernels in (in, out) layout are W^T here)",
        )
    if bias is not None:
        arr.check_last(
            where,
            name="bias",
            array=bias,
            last=(d_out,),
            needed=f"(..., d_out={d_out})",
            fix="pass the layer's own bias",
        )
    for array in (x, W, *adapter):
        if array is not None and len(array.shape) > 2:
            break
    else:
        return
    stacked = {
        name: tuple(array.shape[:-2])
        for name, array in (("x", x), ("W", W), *zip(adapter._fields, adapter, strict=True))
        if array is not None and len(array.shape) > 2
    }
    if bias is not None and len(bias.shape) > 1:
        stacked |= {"bias": tuple(bias.shape[:-1])}
    if len(stacked) > 1:
        arr.broadcast_shapes(where, **stacked)
