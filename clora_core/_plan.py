"""The planner: in which order to contract a layer's forward and backward products. Pure Python on static sizes."""

from __future__ import annotations

from typing import Any, NamedTuple

from ._array import check_option
from .errors import DTypeError, OptionError, RankError, ShapeError, message

ORDERS = ("rows", "left", "right", "merged")
GRADIENTS = ("x", "W", "bias", "A", "R_delta", "B")

# Flops a machine does in the time it moves one byte to or from memory. Two cores with one DDR5 channel: about 100
# float32 GFLOP/s against 10 GB/s; an H200 in float32: 60 TFLOP/s against 4.8 TB/s. Both give about 10.
BALANCE = 10.0


class Product(NamedTuple):
    """One matrix product (rows x inner) @ (inner x columns); inner = 0 stands for a pass that only adds."""

    label: str
    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns

    @property
    def numbers_moved(self) -> int:
        """Operands read and result written, each once; an addition reads and writes its target."""
        if self.inner == 0:
            return 2 * self.rows * self.columns
        return self.rows * self.inner + self.inner * self.columns + self.rows * self.columns


class Plan(NamedTuple):
    """How a training step contracts one adapted layer; made by `plan`, printed as a table, followed by `linear_vjp`.

    Attributes
    ----------
    order : {"rows", "left", "right", "merged"}
        Where R is applied in the forward pass: to the routed rows u, into A, into B, or W + A R B is built first.
    fold_x, fold_A, fold_B : bool
        Backward: fold the r x r product into a factor (True) or apply it to the n rows (False).
    route : {"rows", "A", "B"}
        What dL/dR_delta is contracted from: the rows u and grad_y A, or a product already made for A or B.
    forward, backward : tuple of Product
        The adapter's own products, those of the frozen layer (x W^T, grad_y W) left out.
    kept_numbers : int
        Kept from forward to backward on behalf of the adapter: x if B learns, else u if A or R_delta learns.
    itemsize : int
        Bytes a number.
    """

    order: str
    fold_x: bool
    fold_A: bool
    fold_B: bool
    route: str
    forward: tuple[Product, ...]
    backward: tuple[Product, ...]
    kept_numbers: int
    itemsize: int

    @property
    def flops(self) -> int:
        """Of one step, a multiplication and an addition counted as two."""
        return sum(product.flops for product in self.forward + self.backward)

    @property
    def bytes_moved(self) -> int:
        """Memory traffic of one step, each operand and result once."""
        return self.itemsize * sum(product.numbers_moved for product in self.forward + self.backward)

    @property
    def bytes_kept(self) -> int:
        """Memory between forward and backward that the adapter asks for."""
        return self.itemsize * self.kept_numbers

    def __str__(self) -> str:
        moved = f"{self.bytes_moved:,} bytes moved, {self.bytes_kept:,} bytes kept"
        lines = [f"plan {self.order!r}: {self.flops:,} flops, {moved}"]
        for phase, products in (("forward", self.forward), ("backward", self.backward)):
            lines += [
                f"  {phase:9}{p.label:26}{p.rows:>8} x {p.inner:>6} x {p.columns:>6}{p.flops:>16,} flops"
                for p in products
            ]
        return "\n".join(lines)


def plan(
    n: int,
    d_out: int,
    d_in: int,
    rank: int,
    *,
    dtype: Any = "float32",
    wrt: tuple[str, ...] = ("x", "A", "R_delta", "B"),
    stop_old: bool = True,
    order: str | None = None,
    balance: float = BALANCE,
    xp: Any = None,
) -> Plan:
    """The cheapest order of contraction for one layer and one step.

    Parameters
    ----------
    n, d_out, d_in, rank : int
        Rows in the batch (0 allowed) and sizes of the layer.
    dtype : optional
        Of the arithmetic, as a name or a library's dtype. In half precision "merged" is never chosen: the delta would
        be rounded away.
    wrt : tuple of {"x", "W", "bias", "A", "R_delta", "B"}
        The gradients that will be asked for.
    stop_old : bool
        As in `linear_vjp`. The contraction costs the same either way: the stop-gradient only changes which r x r matrix
        is applied.
    order : optional
        Fix the order and only report its costs.
    balance : float
        Flops that cost as much as moving one byte; 0 plans by flops alone.
    xp : ignored
        Taken for uniformity: nothing here is an array.

    Returns
    -------
    Plan

    Raises
    ------
    ShapeError, RankError, OptionError, DTypeError
        Sizes below 1 (n below 0), an unknown gradient or order, an unknown dtype, "merged" in half precision.

    Notes
    -----
    For the same step without R, plain LoRA takes 6 n r (d_in + d_out) flops; folding adds r x r products only.
    """
    where = "clora_core.plan"
    if n < 0 or d_out < 1 or d_in < 1:
        raise ShapeError(
            message(
                where,
                "the sizes are no layer's",
                got=f"n={n}, d_out={d_out}, d_in={d_in}",
                needed="n >= 0, d_out >= 1, d_in >= 1",
                cause="arguments in another order",
                fix="call plan(n, d_out, d_in, rank)",
            )
        )
    if rank < 1:
        raise RankError(
            message(
                where, "the rank is 0", got=f"rank={rank}", needed="rank >= 1", cause="no adapter", fix="plan nothing"
            )
        )
    wrt = check_wrt(where, wrt)
    itemsize = _itemsize(where, dtype)
    full = itemsize >= 4
    if order is not None:
        check_option(where, "order", order, ORDERS)
        if order == "merged" and not full:
            raise OptionError(
                message(
                    where,
                    "merging in half precision loses the delta",
                    got=f"order='merged', dtype={dtype}",
                    needed="float32 or float64",
                    cause="a half-precision base with a forced plan",
                    fix="use another order, or float32",
                )
            )
        return _with_order(order, n, d_out, d_in, rank, wrt, itemsize)
    plans = [_with_order(o, n, d_out, d_in, rank, wrt, itemsize) for o in ORDERS if full or o != "merged"]
    best, *others = plans
    for other in others:  # not min(), which torch.compile can't follow where n is a symbol
        if _cost(other, balance) < _cost(best, balance):
            best = other
    return best


def _cost(plan: Plan, balance: float) -> float:
    return plan.flops + balance * plan.bytes_moved


def check_wrt(where: str, wrt: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the gradients asked for, checked; a single name may stand alone."""
    wrt = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    for name in wrt:
        check_option(where, "gradient in wrt", name, GRADIENTS)
    return wrt


def _itemsize(where: str, dtype: Any) -> int:
    name = str(dtype)
    for bits in ("64", "32", "16"):
        if bits in name and "float" in name:
            return int(bits) // 8
    raise DTypeError(
        message(
            where,
            "unknown dtype",
            got=name,
            needed="float64, float32, float16 or bfloat16",
            cause="an integer dtype",
            fix="pass the dtype of the layer's arithmetic",
        )
    )


def _with_order(order: str, n: int, d_out: int, d_in: int, r: int, wrt: tuple[str, ...], itemsize: int) -> Plan:
    x, A, R, B = (name in wrt for name in ("x", "A", "R_delta", "B"))
    build = (
        [Product("A R", d_out, r, r), Product("(A R) B", d_out, r, d_in)]
        if d_out <= d_in
        else [Product("R B", r, r, d_in), Product("A (R B)", d_out, r, d_in)]
    ) + [Product("W + A R B", d_out, 0, d_in)]
    u, add = Product("u = x B^T", n, d_in, r), Product("y += ...", n, 0, d_out)
    forward = {
        "rows": [u, Product("u R^T", n, r, r), Product("(u R^T) A^T", n, r, d_out), add],
        "left": [u, Product("A R", d_out, r, r), Product("u (A R)^T", n, r, d_out), add],
        "right": [Product("R B", r, r, d_in), Product("h = x (R B)^T", n, d_in, r), Product("h A^T", n, r, d_out), add],
        "merged": build,
    }[order]
    fold_x, fold_A, fold_B = n > d_in, n > d_out, n > d_in
    # dL/dR_delta: from the rows, or from the product made for A (d_out) or for B (d_in) if that exists and is smaller
    route = "rows"
    if A and fold_A and not (B and fold_B and d_in < d_out):
        route = "A"
    elif B and fold_B:
        route = "B"
    need_u = A or (R and route == "rows")
    need_v = B or (R and route == "rows") or (x and order != "merged")
    backward: list[Product] = []
    if need_u and order in ("right", "merged"):
        backward.append(u)
    if need_v:
        backward.append(Product("v = g A", n, d_out, r))
    if A:
        if fold_A:
            backward += [Product("M = g^T u", d_out, n, r), Product("M R^T", d_out, r, r)]
        else:
            backward += [Product("u R^T", n, r, r), Product("g^T (u R^T)", d_out, n, r)]
    if B:
        if fold_B:
            backward += [Product("N = v^T x", r, n, d_in), Product("R^T N", r, r, d_in)]
        else:
            backward += [Product("v R", n, r, r), Product("(v R)^T x", r, n, d_in)]
    if R:
        backward.append(
            {
                "rows": Product("v^T u", r, n, r),
                "A": Product("A^T M", r, d_out, r),
                "B": Product("N B^T", r, d_in, r),
            }[route]
        )
    if x and order == "merged":
        backward += build
    elif x:
        if fold_x:
            backward += [Product("R B", r, r, d_in), Product("v (R B)", n, r, d_in)]
        else:
            backward += [Product("v R", n, r, r), Product("(v R) B", n, r, d_in)]
        backward.append(Product("dx += ...", n, 0, d_in))
    kept = n * d_in if B or "W" in wrt else n * r if A or R else 0
    return Plan(order, fold_x, fold_A, fold_B, route, tuple(forward), tuple(backward), kept, itemsize)
