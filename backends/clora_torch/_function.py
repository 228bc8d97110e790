"""The adapted linear layer as one autograd.Function on the core's closed forms, and the path of any other layer.

Formulas live in clora_core; here stand only what autograd needs and the casts at the border to half precision.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor
from torch.nn import functional

import clora_core as core

FACTORS = ("A", "R_delta", "B")
# Under a compiler, where a plan would guard on the number of rows: every r x r product is folded.
FOLDED = core.Plan("left", True, True, True, "A", forward=(), backward=(), kept_numbers=0, itemsize=4)


@lru_cache(maxsize=4096)
def _plan(n: int, d_out: int, d_in: int, rank: int, dtype: str, wrt: tuple[str, ...], order: str | None) -> core.Plan:
    return core.plan(n, d_out, d_in, rank, dtype=dtype, wrt=wrt, order=order)


def choose_order(n: int, d_out: int, d_in: int, rank: int, dtype: torch.dtype) -> str:
    """The forward pass's order of contraction, from sizes alone.

    Not from what learns: a task's end changes that, and must not change one bit of the function.
    """
    if torch.compiler.is_compiling():
        return FOLDED.order
    return _plan(n, d_out, d_in, rank, str(dtype), ("x", *FACTORS), None).order


def adapted_linear(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    adapter: core.Adapter,
    *,
    stop_old: bool = True,
    dropout: float = 0.0,
    order: str | None = None,
) -> Tensor:
    r"""The adapted layer :math:`y = x W^T + x (A R B)^T + b`, differentiable in all but R_old.

    Parameters
    ----------
    x : tensor, shape (..., d_in)
        Any number of leading axes, none included; half precision is cast up for the adapter's part.
    W : tensor, shape (d_out, d_in)
    bias : tensor, shape (d_out,), or None
    adapter : clora_core.Adapter of float32 or float64 tensors
    stop_old : bool
        A and B learn through R_delta alone (eqs. 11-12 of arXiv:2502.17920); x always sees the whole R.
    dropout : float in [0, 1)
        Probability with which entries of u = x B^T are zeroed, the rest scaled by 1 / (1 - dropout).
    order : {"rows", "left", "right", "merged"}, optional
        Where R is applied, by default the cheapest for these sizes; see `clora_core.plan`.

    Returns
    -------
    tensor, shape (..., d_out), of the dtype of x W^T

    Notes
    -----
    Kept for backward: x once, in its own dtype, where B learns; else the n x r numbers u where A or R_delta learns;
    nothing of size d_out x d_in. First and second derivatives, forward mode and vmap; for the last two, and under any
    transform of torch.func, the two routes are summed separately, within `clora_core.bounds` of the above.
    """
    if dropout > 0.0 or _transformed(x, W, bias, *adapter):
        y = functional.linear(x, W, bias)
        with torch.autocast(x.device.type, enabled=False):
            update = routed(functional.linear, x.to(adapter.B.dtype), adapter, stop_old=stop_old, dropout=dropout)
        return y + update.to(y.dtype)
    d_out, d_in = W.shape
    half = x.dtype != adapter.B.dtype or torch.is_autocast_enabled(x.device.type)
    if order is None:
        rank = adapter.R_old.shape[-1]
        dtype = torch.bfloat16 if half else x.dtype  # a merged weight in half precision would lose the delta
        order = choose_order(x.numel() // d_in, d_out, d_in, rank, dtype)
    tensors = (x, W, bias, *adapter)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _AdaptedLinear.apply(*tensors, stop_old, order)[0]
    return _forward(x, W, bias, adapter, order, keep_u=False)[0]


def routed(
    down: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    adapter: core.Adapter,
    *,
    stop_old: bool = True,
    dropout: float = 0.0,
) -> Tensor:
    r"""The adapter's part :math:`u R^T A^T` of any layer whose routed input u = ``down(x, B)`` is linear in B.

    Parameters
    ----------
    down : callable
        Gives u (..., r), channels last.
    x : tensor
        The layer's input, as ``down`` takes it.
    adapter, stop_old, dropout
        As in `adapted_linear`.

    Returns
    -------
    tensor, shape (..., d_out)

    Notes
    -----
    First and second derivatives, forward mode and vmap. Where A and B learn through R_delta alone, u is made twice,
    once for each route.
    """
    A, R_old, R_delta, B = adapter
    transformed = _transformed(*adapter, x if x.is_floating_point() else None)
    learning = transformed or (torch.is_grad_enabled() and (A.requires_grad or B.requires_grad))
    u = down(x, B)
    keep = functional.dropout(torch.ones_like(u), dropout) if dropout > 0.0 else None
    u = u if keep is None else u * keep
    if not (stop_old and learning):
        return (u @ (R_old + R_delta).T) @ A.T
    past = down(x, B.detach())
    past = past if keep is None else past * keep
    if transformed:
        return (past @ R_old.T) @ A.detach().T + (u @ R_delta.T) @ A.T
    return _TwoRoutes.apply(past, u, A, R_old, R_delta)


def _transformed(*tensors: Tensor | None) -> bool:
    """Whether torch.func or forward-mode differentiation is at work: an autograd.Function would have to know of it."""
    if torch._C._are_functorch_transforms_active():
        return True
    forward_ad = torch.autograd.forward_ad
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def _forward(
    x: Tensor, W: Tensor, bias: Tensor | None, adapter: core.Adapter, order: str, *, keep_u: bool
) -> tuple[Tensor, Tensor | None]:
    """y, and u = x B^T where it was made or is asked for."""
    A, R_old, R_delta, B = adapter
    rows = x.reshape(-1, x.shape[-1])
    if order == "merged":
        u = rows @ B.T if keep_u else None
        y = functional.linear(rows, W + core.delta(adapter, xp=xp), bias)
        return y.view(*x.shape[:-1], W.shape[0]), u
    y = functional.linear(rows, W, bias)
    with torch.autocast(x.device.type, enabled=False):
        wide, R = rows.to(B.dtype), R_old + R_delta
        if order == "right":
            u = wide @ B.T if keep_u else None
            h, up = wide @ (R @ B).T, A
        else:
            u = wide @ B.T
            h, up = (u, A @ R) if order == "left" else (u @ R.T, A)
        y = y.addmm_(h, up.T) if y.dtype == up.dtype else y.add_(h @ up.T)
    return y.view(*x.shape[:-1], W.shape[0]), u


class _AdaptedLinear(torch.autograd.Function):
    """Gradients by `clora_core.linear_vjp`; the frozen weight's share is added in place.

    u is an output, though nobody uses it: autograd then differentiates through what was saved of it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        A: Tensor,
        R_old: Tensor,
        R_delta: Tensor,
        B: Tensor,
        stop_old: bool,
        order: str,
    ) -> tuple[Tensor, Tensor | None]:
        needs = ctx.needs_input_grad
        keep_x = needs[6] or needs[1]
        keep_u = (needs[3] or needs[5]) and not keep_x
        y, u = _forward(x, W, bias, core.Adapter(A, R_old, R_delta, B), order, keep_u=keep_u)
        if not (needs[3] or needs[5]):
            u = None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if keep_x else None, u, W, A, R_old, R_delta, B)
        ctx.stop_old, ctx.order, ctx.shape, ctx.dtype = stop_old, order, x.shape, x.dtype
        return y, u

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_y, grad_u = grads
        needs = ctx.needs_input_grad
        x, u, W, A, R_old, R_delta, B = ctx.saved_tensors
        adapter = core.Adapter(A, R_old, R_delta, B)
        rows: Any = None if x is None else x.reshape(-1, x.shape[-1])
        wide: Any = None if x is None else rows.to(B.dtype)
        dx: Any = None
        dW = db = dA = dR = dB = None
        if grad_y is not None:
            g = grad_y.reshape(-1, W.shape[0])
            wide_g = g.to(A.dtype)
            twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
            wrt = tuple(name for name, i in (("x", 0), ("A", 3), ("R_delta", 5), ("B", 6)) if needs[i])
            if twice:
                wrt = tuple(name for name in wrt if name != "x")
            if torch.compiler.is_compiling():
                plan = FOLDED
            else:
                plan = _plan(g.shape[0], *W.shape, A.shape[-1], str(A.dtype), wrt, ctx.order)
            merged = ctx.order == "merged" and not twice
            out: Any = core.linear_vjp(
                wide, W if merged else None, adapter, wide_g, wrt=wrt, stop_old=ctx.stop_old, plan=plan, u=u, xp=xp
            )
            dA, dR, dB = out.A, out.R_delta, out.B
            if needs[0]:
                W = W.to(g.dtype)
                if twice:
                    dx = g @ W + _two_routes(wide_g, adapter, ctx.stop_old).to(g.dtype)
                elif merged:
                    dx = out.x
                else:
                    dx = out.x.addmm_(g, W) if out.x.dtype == g.dtype else (g @ W).add_(out.x)
            dW = g.mT @ rows.to(g.dtype) if needs[1] else None
            db = g.sum(0) if needs[2] else None
        if grad_u is not None:  # only when gradients of gradients are taken
            dx = _plus(dx, grad_u @ B) if needs[0] else None
            dB = _plus(dB, grad_u.mT @ wide) if needs[6] else None
        dx = None if dx is None else dx.reshape(ctx.shape).to(ctx.dtype)
        return dx, dW, db, dA, None, dR, dB, None, None


class _TwoRoutes(torch.autograd.Function):
    """sg(A) R_old u_past + A R_delta u in its derivatives of every order; in its value A (R_old + R_delta) u.

    Two routes that are summed would have other bits after a task is folded.
    """

    @staticmethod
    def forward(ctx: Any, past: Tensor, u: Tensor, A: Tensor, R_old: Tensor, R_delta: Tensor) -> Tensor:
        ctx.save_for_backward(u, A, R_old, R_delta)
        return (u @ (R_old + R_delta).T) @ A.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        u, A, R_old, R_delta = ctx.saved_tensors
        rows, g_rows = u.reshape(-1, u.shape[-1]), g.reshape(-1, g.shape[-1])
        v = g_rows @ A
        dA = g_rows.T @ (rows @ R_delta.T) if ctx.needs_input_grad[2] else None
        dR = v.T @ rows if ctx.needs_input_grad[4] else None
        past = (g @ A.detach()) @ R_old if ctx.needs_input_grad[0] else None
        return past, (v @ R_delta).reshape(u.shape), dA, None, dR


def _two_routes(g: Tensor, adapter: core.Adapter, stop_old: bool) -> Tensor:
    """g A R B where gradients of gradients are taken: A and B are constants to the old route."""
    A, R_old, R_delta, B = adapter
    if not stop_old:
        return ((g @ A) @ (R_old + R_delta)) @ B
    return ((g @ A.detach()) @ R_old) @ B.detach() + ((g @ A) @ R_delta) @ B


def _plus(first: Tensor | None, second: Tensor) -> Tensor:
    return second if first is None else first + second
