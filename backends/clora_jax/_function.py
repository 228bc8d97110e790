"""The adapted linear layer under JAX's transformations: one custom_jvp, associated from x. Formulas are clora_core's.

The derivative is written forwards; JAX transposes it into `clora_core.linear_vjp`'s products in the order of a Plan.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

import clora_core as core
from clora_core._plan import BALANCE
from clora_core.errors import DTypeError, OptionError, ShapeError, StateError, message

LAYOUTS = ("out,in", "in,out")
FACTORS = ("A", "R_delta", "B")


class How(NamedTuple):
    """What is static of one call."""

    layout: str
    order: str
    stop_old: bool
    precision: Any


@lru_cache(maxsize=4096)
def _plan(n: int, d_out: int, d_in: int, rank: int, dtype: str, wrt: tuple[str, ...]) -> core.Plan:
    return core.plan(n, d_out, d_in, rank, dtype=dtype, wrt=wrt)


@lru_cache(maxsize=4096)
def choose_order(n: int, d_out: int, d_in: int, rank: int, dtype: str) -> str:
    """The forward pass's order of contraction, from sizes alone.

    Not from what learns: a task's end changes that, and must not change one bit of the function. As `clora_core.plan`
    chooses, but for two things that XLA does: it keeps the merged weight for the backward pass, where the planner would
    build it again; and it does not fuse a product over n rows, so R is folded into A rather than applied to the rows
    while that costs less than a fiftieth of the frozen product (4 to 8 % of a step at n = 512 and 2048, by
    benchmarks/jax_lora.py).
    """
    how: dict[str, Any] = {"dtype": dtype, "wrt": ("x", *FACTORS)}
    best = core.plan(n, d_out, d_in, rank, **how)
    if dtype in ("float32", "float64"):
        merged = core.plan(n, d_out, d_in, rank, order="merged", **how)
        again = merged.backward[-len(merged.forward) :]
        if _cost(merged) - _cost(merged._replace(forward=(), backward=again)) < _cost(best):
            return "merged"
    folded = 50 * rank * rank * (d_out - n) <= n * d_out * d_in
    return "left" if best.order == "rows" and folded else best.order


def _cost(plan: core.Plan) -> float:
    return plan.flops + BALANCE * plan.bytes_moved


def linear(
    x: Array,
    W: Array,
    adapter: core.Adapter,
    bias: Array | None = None,
    *,
    layout: str = "out,in",
    stop_old: bool = True,
    second_order: bool = False,
    order: str | None = None,
    precision: Any = None,
    name: str | None = None,
) -> Array:
    r"""The adapted layer :math:`y = x W^T + x (A R B)^T + b`, differentiable in all but R_old, forwards and backwards.

    Parameters
    ----------
    x : array, shape (..., d_in)
        Any number of leading axes, none included.
    W : array, shape (d_out, d_in), or (d_in, d_out) where ``layout="in,out"``
        The frozen weight, of x's dtype. Stacked layers go through `jax.vmap` or `jax.lax.scan`.
    adapter : clora_core.Adapter of float32 or float64 arrays
        R may have a leading axis, that of x's first: every row by a routing of its own.
    bias : array, shape (d_out,), optional
    layout : {"out,in", "in,out"}
        Of W: PyTorch's and equinox's, or flax's.
    stop_old : bool
        A and B learn through R_delta alone (eqs. 11-12 of arXiv:2502.17920); x always sees the whole R.
    second_order : bool
        Compute the two routes apart, so that second derivatives by A and B exist; costs one more pass, and other bits
        after a fold. Without it they raise where ``stop_old``; those by x and R_delta always exist.
    order : {"rows", "left", "right", "merged"}, optional
        Where R is applied, by default the cheapest for these sizes; see `clora_core.plan`.
    precision
        As `jax.lax.dot_general` takes it, for every product. None: JAX's default, which on a GPU rounds float32 to
        TF32, unless ``jax.default_matmul_precision`` says otherwise.
    name : str, optional
        Of the layer, for messages.

    Returns
    -------
    array, shape (..., d_out), of the dtype of x W^T

    Raises
    ------
    ShapeError, DTypeError, OptionError
        While tracing: arguments that do not fit.
    StateError
        While tracing a second derivative that ``second_order`` is needed for.

    Notes
    -----
    Nothing of size d_out x d_in is made unless the plan is "merged". Half-precision x and W: the adapter's part is
    computed in the adapter's dtype and rounded once, into y. Rounding: `clora_core.bounds.linear`.
    """
    check(x, W, adapter, bias, layout, name)
    y_dtype = jnp.result_type(x, W)
    x, W = x.astype(y_dtype), W.astype(y_dtype)
    own = adapter.R_old.ndim > 2 or adapter.R_delta.ndim > 2
    if own or second_order:
        y = _dot(x, W, int(layout == "out,in"), precision)
        update = _rows(x.astype(adapter.B.dtype), adapter, stop_old, precision)
        y = (y.astype(jnp.promote_types(y_dtype, update.dtype)) + update).astype(y_dtype)
    else:
        d_out, rank = adapter.A.shape
        sizes = math.prod(x.shape[:-1]), d_out, adapter.B.shape[1], rank
        if order is not None:
            core.plan(*sizes, dtype="float32", order=order)  # refuses an unknown one
        else:
            order = choose_order(*sizes, str(y_dtype if y_dtype == adapter.B.dtype else "bfloat16"))
        y = _adapted(How(layout, order, stop_old, precision), x, W, *adapter)
    return y if bias is None else y + bias.astype(y_dtype)


def apply(x: Array, adapter: core.Adapter, *, stop_old: bool = True, precision: Any = None) -> Array:
    r"""The low-rank path alone, :math:`x (A R B)^T`; see `linear`. x (..., d_in) -> (..., d_out)."""
    d_out, d_in = adapter.A.shape[-2], adapter.B.shape[-1]
    check(x, jax.ShapeDtypeStruct((d_out, d_in), x.dtype), adapter, None, "out,in")
    return _rows(x.astype(adapter.B.dtype), adapter, stop_old, precision).astype(x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _delta(stop_old: bool, A: Array, R_old: Array, R_delta: Array, B: Array) -> Array:
    return core.delta(core.Adapter(A, R_old, R_delta, B), xp=jnp)


@_delta.defjvp
def _delta_jvp(stop_old: bool, primals: Any, tangents: Any) -> Any:
    A, R_old, R_delta, B = primals
    dA, _, dR, dB = tangents
    R = R_delta if stop_old else R_old + R_delta
    left, right = A @ R, R @ B
    return _delta(stop_old, *primals), dA @ right + (A @ dR) @ B + left @ dB


def delta(adapter: core.Adapter, *, layout: str = "out,in", stop_old: bool = True) -> Array:
    r"""Update of the weight, :math:`A R B`, (d_out, d_in) or its transpose; A and B learn as in `linear`."""
    dW = _delta(stop_old, *adapter)
    return dW.mT if layout == "in,out" else dW


# --- the layer ---------------------------------------------------------------------------------------------------


# XLA for CPUs takes five times as long for a product of shape (d, r) as for its transpose, and folds a transpose that
# follows into the product. So everything of r columns is made as (r, d), and turned round within an r x r product:
# that of R with A is therefore always folded, whatever the plan says of A.


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _adapted(how: How, x: Array, W: Array, A: Array, R_old: Array, R_delta: Array, B: Array) -> Array:
    K, R = int(how.layout == "out,in"), R_old + R_delta
    dot = partial(_dot, precision=how.precision)
    if how.order == "merged":
        return dot(x, W + _update(A, R, B, how), K)
    y, wide = dot(x, W, K), x.astype(B.dtype)
    if how.order == "left":
        update = dot(dot(wide, B, 1), _turned(R, A, how), 0)
    elif how.order == "right":
        update = dot(dot(wide, dot(R, B, 0), 1), A, 1)
    else:
        update = dot(dot(dot(wide, B, 1), R, 1), A, 1)
    return (y.astype(jnp.promote_types(y.dtype, update.dtype)) + update).astype(y.dtype)


def _turned(R: Array, A: Array, how: How) -> Array:
    """(A R)^T, (r, d_out)."""
    return lax.dot_general(R, A, (((0,), (1,)), ((), ())), precision=how.precision)


def _update(A: Array, R: Array, B: Array, how: How) -> Array:
    """A R B in the layout of W, R folded into the smaller factor as `clora_core.delta` does."""
    dot = partial(lax.dot_general, precision=how.precision)
    if A.shape[0] <= B.shape[1]:
        left, right = _turned(R, A, how), B
    else:
        left, right = A.T, _dot(R, B, 0, how.precision)
    pair = (left, right) if how.layout == "out,in" else (right, left)
    return dot(*pair, (((0,), (0,)), ((), ())))


def _adapted_jvp(how: How, primals: Any, tangents: Any) -> Any:
    """dy, in products whose transposes are those of the plan: every r x r product stands where the plan puts it."""
    x, W, A, R_old, R_delta, B = primals
    dx, dW, dA, _, dR, dB = (None if isinstance(t, SymbolicZero) else t for t in tangents)
    y = _adapted(how, *primals)
    K, dot = int(how.layout == "out,in"), partial(_dot, precision=how.precision)
    (d_out, r), d_in = A.shape, B.shape[1]
    wrt = tuple(n for n, t in (("x", dx), ("A", dA), ("R_delta", dR), ("B", dB)) if t is not None)
    plan = _plan(math.prod(x.shape[:-1]), d_out, d_in, r, str(A.dtype), wrt)  # where to fold, whatever the order
    R = R_old + R_delta
    learns = R_delta if how.stop_old else R
    wide = x.astype(B.dtype)
    u: Any = dot(wide, B, 1) if dA is not None or (dR is not None and plan.route != "B") else None
    inner: list[Array] = []  # (..., r), all to be multiplied by A: their transposes share v = g A
    outer: list[Array] = []  # (..., d_out)
    out = jnp.zeros_like(y)
    if dx is not None:
        still = (_once(A), _once(B)) if how.stop_old else (A, B)
        if how.order == "merged":
            out = out + dot(dx, W + _update(still[0], R, still[1], how), K)
        else:
            out = out + dot(dx, W, K)
            small = dx.astype(B.dtype)
            routed = dot(small, dot(R, still[1], 0), 1) if plan.fold_x else dot(dot(small, still[1], 1), R, 1)
            outer.append(dot(routed, still[0], 1))
    if dW is not None:
        out = out + dot(x, dW, K)
    if dB is not None:
        inner.append(dot(wide, dot(learns, dB, 0), 1) if plan.fold_B else dot(dot(wide, dB, 1), learns, 1))
    if dR is not None and plan.route == "A":
        outer.append(dot(u, _turned(dR, A, how), 0))
    elif dR is not None:
        inner.append(dot(wide, dot(dR, B, 0), 1) if plan.route == "B" else dot(u, dR, 1))
    if dA is not None:
        outer.append(dot(u, _turned(learns, dA, how), 0))
    if inner:
        outer.append(dot(sum(inner[1:], inner[0]), A, 1))
    for term in outer:
        out = out + term.astype(out.dtype)
    return y, out


_adapted.defjvp(_adapted_jvp, symbolic_zeros=True)


def _dot(x: Array, M: Array, axis: int, precision: Any = None) -> Array:
    """x (..., d) contracted with that axis of M: x M (0) or x M^T (1)."""
    return lax.dot_general(x, M, (((x.ndim - 1,), (axis,)), ((), ())), precision=precision)


@jax.custom_jvp
def _once(factor: Array) -> Array:
    """The factor, which can't be differentiated through."""
    return factor


def _once_jvp(primals: Any, tangents: Any) -> Any:
    if not isinstance(tangents[0], SymbolicZero):
        raise StateError(
            message(
                "clora_jax.linear",
                "second derivatives by A or B are asked for",
                got="stop_old=True, second_order=False",
                needed="the two routes apart, since each has other derivatives",
                cause="a Hessian, or a gradient inside of the loss, while A and B learn",
                fix="pass second_order=True, or stop_old=False, or let only R_delta learn",
            )
        )
    return primals[0], jnp.zeros_like(primals[0])


_once.defjvp(_once_jvp, symbolic_zeros=True)


def _rows(x: Array, adapter: core.Adapter, stop_old: bool, precision: Any) -> Array:
    """The low-rank path as plain JAX: two routes where the old one is stopped; a routing for each row if it has one."""
    A, R_old, R_delta, B = adapter
    dot = partial(_dot, precision=precision)

    def by(u: Array, R: Array) -> Array:
        if R.ndim == 2:
            return dot(u, R, 1)
        rows = u.reshape(u.shape[0], -1, u.shape[-1])
        return jnp.matmul(rows, R.mT, precision=precision).reshape(u.shape)

    if not stop_old:
        return dot(by(dot(x, B, 1), R_old + R_delta), A, 1)
    old = dot(by(dot(x, lax.stop_gradient(B), 1), lax.stop_gradient(R_old)), lax.stop_gradient(A), 1)
    return old + dot(by(dot(x, B, 1), R_delta), A, 1)


def check(x: Array, W: Any, adapter: core.Adapter, bias: Array | None, layout: str, name: str | None = None) -> None:
    """What is static must fit; said before anything is computed."""
    where = "clora_jax.linear" if name is None else f"clora_jax, layer {name!r}"
    if layout not in LAYOUTS:
        raise OptionError(
            message(
                where,
                "unknown layout",
                got=repr(layout),
                needed=" or ".join(map(repr, LAYOUTS)),
                cause="a misspelt name",
                fix="'in,out' for flax's kernels, 'out,in' for equinox's weights",
            )
        )
    wide = [array.dtype for array in adapter]
    if len(set(wide)) > 1 or wide[0] not in (jnp.float32, jnp.float64):
        raise DTypeError(
            message(
                where,
                "the adapter's arrays are not all float32 or all float64",
                got=", ".join(f"{n} {d}" for n, d in zip(adapter._fields, wide, strict=True)),
                needed="one of the two",
                cause="an adapter cast to half precision with the model",
                fix="cast the base alone: the adapter's part is rounded into the layer's dtype",
            )
        )
    A, R_old, R_delta, B = adapter
    d_out, d_in, r = A.shape[-2], B.shape[-1], A.shape[-1]
    weight = (d_out, d_in) if layout == "out,in" else (d_in, d_out)
    routings = {R.shape[-2:] for R in (R_old, R_delta)}
    rows = {R.shape[0] for R in (R_old, R_delta) if R.ndim == 3}
    fits = A.ndim == B.ndim == 2 and B.shape[0] == r and routings == {(r, r)} and max(R_old.ndim, R_delta.ndim) <= 3
    fits = fits and W.shape == weight and x.ndim >= 1 and x.shape[-1] == d_in
    if not fits or (rows and (x.ndim < 2 or rows != {x.shape[0]})) or (bias is not None and bias.shape != (d_out,)):
        parts = {"x": x, "W": W, **adapter._asdict(), **({} if bias is None else {"bias": bias})}
        axes = layout.replace("out", "d_out").replace("in", "d_in")
        raise ShapeError(
            message(
                where,
                "the shapes do not fit together",
                got=", ".join(f"{name} {tuple(array.shape)}" for name, array in parts.items()),
                needed=f"x (..., d_in), W ({axes}), A (d_out, r), R (r, r), B (r, d_in), bias (d_out,)",
                cause="a kernel in the other layout, or an adapter of another layer",
                fix="pass layout='in,out' for flax's kernels; stacked layers go through jax.vmap or lax.scan",
            )
        )
