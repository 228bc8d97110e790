"""Closed-form gradients of the layer and of the delta, contracted as a Plan says; framework packages train by them."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _array as arr
from ._adapter import Adapter
from ._layer import check_input, delta
from ._plan import Plan, check_wrt
from ._plan import plan as make_plan
from .errors import OptionError, message

Array = arr.Array


class LinearGradients(NamedTuple):
    """Gradients of a scalar loss by `linear_vjp`; None where not asked for. Each has its input's own shape."""

    x: Array | None = None
    W: Array | None = None
    bias: Array | None = None
    A: Array | None = None
    R_delta: Array | None = None
    B: Array | None = None


class DeltaGradients(NamedTuple):
    """Gradients of a scalar loss by `delta_vjp`; None where not asked for. Each has its input's own shape."""

    A: Array | None = None
    R_delta: Array | None = None
    B: Array | None = None


def delta_vjp(
    adapter: Adapter,
    grad_delta: Array,
    *,
    wrt: tuple[str, ...] = ("A", "R_delta", "B"),
    stop_old: bool = True,
    xp: Any = None,
) -> DeltaGradients:
    r"""Gradients through the delta: with :math:`G = \partial L/\partial \Delta W` and :math:`\tilde R`,

    .. math:: dA = G B^T \tilde R^T,\qquad dR_\delta = A^T G B^T,\qquad dB = \tilde R^T A^T G,

    where :math:`\tilde R = R_\delta` if ``stop_old`` (eqs. 11-12) and :math:`R_{old} + R_\delta` if not.

    Parameters
    ----------
    adapter : Adapter
    grad_delta : array, shape (..., d_out, d_in)
    wrt : tuple of {"A", "R_delta", "B"}
    stop_old : bool
        True: A and B learn through R_delta alone.

    Returns
    -------
    DeltaGradients

    Notes
    -----
    Source: arXiv:2502.17920, eqs. 11-12. Rounding: `bounds.delta_vjp`.
    """
    where = "clora_core.delta_vjp"
    xp = arr.namespace(where, xp, *adapter, grad_delta)
    arr.check_adapter(where, xp, adapter)
    wrt = check_wrt(where, wrt)
    for name in wrt:
        arr.check_option(where, "gradient in wrt", name, DeltaGradients._fields)
    A, R_old, R_delta, B = adapter
    arr.check_dtype(where, xp, A=A, grad_delta=grad_delta)
    arr.check_last(
        where,
        name="grad_delta",
        array=grad_delta,
        last=(A.shape[-2], B.shape[-1]),
        needed="(..., d_out, d_in)",
        fix="pass the gradient of the delta (or of the weight)",
    )
    arr.check_covers(where, "grad_delta", grad_delta, *adapter)
    At, Bt = arr.transpose(A, xp), arr.transpose(B, xp)
    Rt = arr.transpose(R_delta if stop_old else R_old + R_delta, xp)
    GB = grad_delta @ Bt if "A" in wrt or "R_delta" in wrt else None
    return DeltaGradients(
        A=arr.sum_to(GB @ Rt, A.shape, xp) if "A" in wrt else None,
        R_delta=arr.sum_to(At @ GB, R_delta.shape, xp) if "R_delta" in wrt else None,
        B=arr.sum_to(Rt @ (At @ grad_delta), B.shape, xp) if "B" in wrt else None,
    )


def linear_vjp(
    x: Array | None,
    W: Array | None,
    adapter: Adapter,
    grad_y: Array,
    *,
    wrt: tuple[str, ...] = ("x", "A", "R_delta", "B"),
    stop_old: bool = True,
    plan: Plan | None = None,
    u: Array | None = None,
    bias: Array | None = None,
    xp: Any = None,
) -> LinearGradients:
    r"""Gradients through the layer :math:`y = x W^T + x (A R B)^T + b`, given :math:`g = \partial L/\partial y`.

    With :math:`u = x B^T,\ v = g A`, and :math:`\tilde R` as in `delta_vjp`:

    .. math::

        dx = g W + v R B,\quad dA = g^T u \tilde R^T,\quad dR_\delta = v^T u,\quad dB = \tilde R^T v^T x,\quad
        dW = g^T x,\quad db = \textstyle\sum_i g_i.

    x always sees the whole R.

    Parameters
    ----------
    x : array, shape (..., n, d_in), or None
        None where neither "B" nor "W" is asked for, and ``u`` is given or neither "A" nor "R_delta" is asked for (then
        at most n x r numbers need be kept); dx then has the leading axes of grad_y.
    W : array, shape (..., d_out, d_in), or None
        None leaves the frozen layer's share g W out of dx (its owner computes it).
    adapter : Adapter
    grad_y : array, shape (..., n, d_out)
    wrt : tuple of {"x", "W", "bias", "A", "R_delta", "B"}
        R_old is frozen and has no gradient.
    stop_old : bool
        True: A and B learn through R_delta alone (eqs. 11-12).
    plan : Plan, optional
        Order of contraction; by default the cheapest for these shapes. One made for other sizes or gradients costs
        more, and gives the same gradients.
    u : array, shape (..., n, r), optional
        The routed input x B^T kept from the forward pass.
    bias : array, optional
        Needed only for its shape, when "bias" is asked for and has leading axes.

    Returns
    -------
    LinearGradients

    Raises
    ------
    OptionError
        A gradient that does not exist or lacks its input.
    ShapeError, DTypeError, NamespaceError

    Notes
    -----
    Where no array but x and grad_y has leading axes, these are flattened to rows. Nothing of size d_out x d_in is made
    unless the plan is "merged" or "W" is asked for. Source: arXiv:2502.17920, eqs. 11-12. Rounding:
    `bounds.linear_vjp`.
    """
    where = "clora_core.linear_vjp"
    xp = arr.namespace(where, xp, x, W, *adapter, grad_y, u, bias)
    wrt = check_wrt(where, wrt)
    _check_vjp(where, xp, x, W, adapter, grad_y, u, bias, wrt)
    A, R_old, R_delta, B = adapter
    d_out, d_in = A.shape[-2], B.shape[-1]
    shape_x = None if x is None else tuple(x.shape)
    leading, n = tuple(grad_y.shape[:-2]), grad_y.shape[-2]
    flat = bool(leading) and all(len(array.shape) == 2 for array in (W, *adapter) if array is not None)
    flat = flat and all(tuple(array.shape[:-2]) == leading for array in (x, u) if array is not None)
    flat = flat and (bias is None or len(bias.shape) == 1)
    if flat:
        x, u, grad_y = (_flatten(array, xp) for array in (x, u, grad_y))
    if plan is None:
        plan = make_plan(grad_y.shape[-2], d_out, d_in, A.shape[-1], dtype=A.dtype, wrt=wrt, stop_old=stop_old)
    route = _route(plan, wrt)
    need_u = "A" in wrt or ("R_delta" in wrt and route == "rows")
    need_v = "B" in wrt or ("R_delta" in wrt and route == "rows") or ("x" in wrt and plan.order != "merged")
    if u is None and need_u:
        u = x @ arr.transpose(B, xp)
    v = grad_y @ A if need_v else None

    R = R_old + R_delta
    R_factors = R_delta if stop_old else R
    dA, dR, dB = _factor_gradients(x, adapter, grad_y, u, v, R_factors, wrt, plan, route, xp)
    dx = dW = db = None
    if "x" in wrt:
        if plan.order == "merged":
            update = delta(adapter, xp=xp)
            dx = grad_y @ (update if W is None else W + update)
        else:
            dx = v @ (R @ B) if plan.fold_x else (v @ R) @ B
            dx = dx if W is None else grad_y @ W + dx
        if flat:
            dx = xp.reshape(dx, (*leading, n, d_in))
        elif shape_x is not None:
            dx = arr.sum_to(dx, shape_x, xp)
    if "W" in wrt and W is not None:
        dW = arr.sum_to(arr.transpose(grad_y, xp) @ x, W.shape, xp)
    if "bias" in wrt:
        db = arr.sum_to(xp.sum(grad_y, axis=-2), (d_out,) if bias is None else bias.shape, xp)
    return LinearGradients(dx, dW, db, dA, dR, dB)


def _route(plan: Plan, wrt: tuple[str, ...]) -> str:
    """Where dR_delta comes from: as planned, or from the rows if the plan was made for gradients not asked for here."""
    made = {"A": plan.fold_A and "A" in wrt, "B": plan.fold_B and "B" in wrt}
    return plan.route if made.get(plan.route) else "rows"


def _factor_gradients(
    x: Array,
    adapter: Adapter,
    g: Array,
    u: Array,
    v: Array,
    R: Array,
    wrt: tuple[str, ...],
    plan: Plan,
    route: str,
    xp: Any,
) -> tuple[Array | None, Array | None, Array | None]:
    """dA = g^T u R^T, dR_delta = v^T u, dB = R^T v^T x, every r x r product where the plan puts it."""
    A, _, R_delta, B = adapter
    dA = dR = dB = None
    Rt = arr.transpose(R, xp)
    if "A" in wrt:
        M = arr.transpose(g, xp) @ u if plan.fold_A else None
        dA = arr.sum_to(arr.transpose(g, xp) @ (u @ Rt) if M is None else M @ Rt, A.shape, xp)
        if route == "A" and "R_delta" in wrt:
            dR = arr.transpose(A, xp) @ M
    if "B" in wrt:
        N = arr.transpose(v, xp) @ x if plan.fold_B else None
        dB = arr.sum_to(arr.transpose(v @ R, xp) @ x if N is None else Rt @ N, B.shape, xp)
        if route == "B" and "R_delta" in wrt:
            dR = N @ arr.transpose(B, xp)
    if "R_delta" in wrt:
        dR = arr.sum_to(arr.transpose(v, xp) @ u if route == "rows" else dR, R_delta.shape, xp)
    return dA, dR, dB


def _check_vjp(
    where: str,
    xp: Any,
    x: Array,
    W: Array,
    adapter: Adapter,
    grad_y: Array,
    u: Array,
    bias: Array,
    wrt: tuple[str, ...],
) -> None:
    check_input(where, xp, x, adapter, W, bias)
    A, B = adapter.A, adapter.B
    arr.check_dtype(where, xp, A=A, grad_y=grad_y, u=u)
    arr.check_last(
        where,
        name="grad_y",
        array=grad_y,
        last=(-1, A.shape[-2]),
        needed="(..., n, d_out)",
        fix="pass the gradient of y",
    )
    n = grad_y.shape[-2]
    for name, array, size in (("x", x, B.shape[-1]), ("u", u, A.shape[-1])):
        # The message is made only where it is needed: a compiler takes what is written into a string for a constant.
        if array is not None and tuple(array.shape[-2:]) != (n, size):
            fix = "pass the rows that gave y"
            arr.check_last(where, name=name, array=array, last=(n, size), needed=f"(..., n={n}, {size})", fix=fix)
    arr.check_covers(where, "grad_y", grad_y, x, u, W, *adapter, bias=bias)
    routed = u is None and ("A" in wrt or "R_delta" in wrt)
    rows_missing = x is None and (routed or "B" in wrt or "W" in wrt)
    if rows_missing or (W is None and "W" in wrt):
        raise OptionError(
            message(
                where,
                "a gradient was asked for without the input it needs",
                got=f"wrt={wrt}, "
                + ", ".join(f"{k} {'None' if a is None else 'given'}" for k, a in (("x", x), ("u", u), ("W", W))),
                needed='x for "B" and "W"; x or u for "A" and "R_delta"; W for "W"',
                cause="an input dropped after the forward pass",
                fix="keep x, or ask for fewer gradients",
            )
        )


def _flatten(array: Array | None, xp: Any) -> Array | None:
    if array is None or len(array.shape) == 2:
        return array
    rows = 1
    for size in array.shape[:-1]:
        rows *= size
    return xp.reshape(array, (rows, array.shape[-1]))
