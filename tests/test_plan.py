"""The planner counts what is executed, finds the least, and says so."""

from itertools import combinations
from typing import Any

import kit
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import clora_core as core
from clora_core._plan import GRADIENTS, ORDERS

SUBSETS = [subset for k in range(len(GRADIENTS) + 1) for subset in combinations(GRADIENTS, k)]
sizes = st.tuples(st.integers(0, 12), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))


class Shape(tuple):
    """The shape of an array to be made; a leaf, unlike other tuples."""

    def __new__(cls, *shape: int) -> "Shape":
        """From its sizes."""
        return super().__new__(cls, shape)


class Counting(np.ndarray):
    """An ndarray that notes the flops of every matrix product."""

    flops = 0

    def __matmul__(self, other: Any) -> Any:
        Counting.flops += 2 * self.shape[0] * self.shape[1] * other.shape[1]
        return super().__matmul__(other)


def made(tree: Any) -> Any:
    """Ones in place of every Shape."""
    if isinstance(tree, Shape):
        return np.ones(tree, dtype=np.float32).view(Counting)
    return type(tree)(*(made(item) for item in tree))


def counted(call: Any, *args: Any, **how: Any) -> int:
    """Flops of the products of one call."""
    Counting.flops = 0
    call(*(made(arg) for arg in args), **how, xp=np)
    return Counting.flops


@given(size=sizes, wrt=st.sampled_from(SUBSETS), order=st.sampled_from(ORDERS))
def test_flops_are_those_executed(size: tuple[int, int, int, int], wrt: tuple[str, ...], order: str) -> None:
    """linear_vjp does the products that the plan lists, no more and no fewer; so do delta and apply going forward."""
    n, d_out, d_in, r = size
    plan = core.plan(*size, wrt=wrt, order=order)
    adapter = core.Adapter(*(Shape(*s) for s in ((d_out, r), (r, r), (r, r), (r, d_in))))
    how: dict[str, Any] = {"wrt": wrt, "plan": plan}
    if order in ("rows", "left"):  # these keep u from the forward pass
        how["u"] = np.ones((n, r), dtype=np.float32).view(Counting)
    got = counted(core.linear_vjp, Shape(n, d_in), Shape(d_out, d_in), adapter, Shape(n, d_out), **how)
    frozen = 2 * n * d_out * d_in * (("x" in wrt) + ("W" in wrt))  # grad_y W and grad_y^T x are the layer's own
    assert got - frozen == sum(product.flops for product in plan.backward)
    forward = sum(product.flops for product in plan.forward)
    if order == "rows":
        assert counted(core.apply, Shape(n, d_in), adapter) == forward
    if order == "merged":
        assert counted(core.delta, adapter) == forward


@given(size=sizes)
def test_folding_costs_plain_lora_plus_small_products(size: tuple[int, int, int, int]) -> None:
    """6 n r (d_in + d_out) flops as in plain LoRA, plus r x r products with the smaller of rows and factor."""
    n, d_out, d_in, r = size
    lora = 6 * n * r * (d_in + d_out)
    small = 2 * r * r * (min(n, d_out) + 2 * min(n, d_in))
    source = 2 * r * r * min([n] + [d_out] * (n > d_out) + [d_in] * (n > d_in))
    left, rows = (core.plan(*size, order=order).flops for order in ("left", "rows"))
    assert left == lora + small + source + 2 * r * r * d_out
    assert rows == lora + small + source + 2 * r * r * n
    assert core.plan(*size, balance=0).flops <= min(left, rows)


@given(size=sizes, wrt=st.sampled_from(SUBSETS), balance=st.sampled_from([0.0, 1.0, 10.0]), stop_old=st.booleans())
def test_the_cheapest_order_is_taken(
    size: tuple[int, int, int, int], wrt: tuple[str, ...], balance: float, stop_old: bool
) -> None:
    """Least flops plus weighted bytes over all orders; without "merged" in half precision."""
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        orders = ORDERS if dtype in ("float32", "float64") else ORDERS[:-1]
        how: dict[str, Any] = {"wrt": wrt, "dtype": dtype, "balance": balance, "stop_old": stop_old}
        costs = [p.flops + balance * p.bytes_moved for p in (core.plan(*size, order=o, **how) for o in orders)]
        chosen = core.plan(*size, **how)
        assert chosen.flops + balance * chosen.bytes_moved == min(costs)
        assert chosen.order in orders


@pytest.mark.parametrize(("itemsize", "dtype"), [(8, "float64"), (4, "float32"), (2, "float16"), (2, "bfloat16")])
def test_bytes(itemsize: int, dtype: str) -> None:
    """What is kept: x where B or W learns, else the routed rows where A or R learns, else nothing."""
    size = (64, 32, 16, 4)
    for wrt, kept in {("B",): 64 * 16, ("W",): 64 * 16, ("A",): 64 * 4, ("R_delta",): 64 * 4, ("x", "bias"): 0}.items():
        plan = core.plan(*size, dtype=dtype, wrt=wrt, order="rows")
        assert plan.bytes_kept == itemsize * kept
        moved = sum(p.numbers_moved for p in plan.forward + plan.backward)
        assert plan.bytes_moved == itemsize * moved


def test_merged_wins_with_many_rows() -> None:
    """Above n = d_in d_out / (d_in + d_out) rows, building the weight is cheaper."""
    assert core.plan(100_000, 64, 64, 16, balance=0).order == "merged"
    assert core.plan(8, 1024, 1024, 16, balance=0).order != "merged"


def test_a_plan_prints_its_costs() -> None:
    """Totals first, then a line for each product."""
    plan = core.plan(4096, 768, 768, 16)
    lines = str(plan).splitlines()
    assert f"{plan.flops:,} flops" in lines[0]
    assert len(lines) == 1 + len(plan.forward) + len(plan.backward)


@pytest.mark.parametrize("lane", kit.lanes("NUMPY", "STRICT", "TORCH", "JAX_X64"))
def test_every_library_names_its_dtypes(lane: kit.Lane) -> None:
    """A plan for a library's dtype is the plan for its name."""
    for name in ("float32", "float64"):
        ran = kit.Ran("plan", lane, core.plan(8, 4, 4, 2, dtype=lane.dtype(name)))
        kit.RAN.add(("plan", lane.value.library))
        kit.note(ran)
        assert ran.value == core.plan(8, 4, 4, 2, dtype=name)


def test_sizes_may_be_integers_of_a_library() -> None:
    """A shape computed in NumPy plans like the Python number."""
    for position in range(4):
        sizes: list[Any] = [64, 32, 48, 4]
        sizes[position] = np.int64(sizes[position])
        assert core.plan(*sizes) == core.plan(64, 32, 48, 4)
