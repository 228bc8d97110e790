"""Every function the table calls jit-able runs under jax.jit, jax.vmap, torch.compile(fullgraph) and torch.func.vmap.

A mapped or compiled call gives what the plain call gives: equal on dyadic numbers, and within the rounding of a frame
where the function takes eigenvalues or singular values.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import kit
import numpy as np
import oracle
import pytest

import clora_core as core
from clora.testing import Case, Leads, Sizes

if kit.torch is None or kit.jax is None:
    pytest.skip(kit.NO_FRAMEWORK, allow_module_level=True)
torch, jax = kit.torch, kit.jax
jnp, torch_namespace = jax.numpy, kit.Lane.TORCH.value.xp

ONE = Case(Sizes(4, 4, 5, 2), Leads(), "float32", 5, dyadic=True, tabled=True)
SMALL = {"top": 1, "unit": 1}
A, R_OLD, R_DELTA, B = ADAPTER = ONE.adapter(**SMALL)
U = ONE.draw("u", 4, 2, **SMALL)
C = core.second_moment(U)
MOMENTS = core.record(core.empty_moments(ADAPTER), ADAPTER, C)
ACCURACY = np.abs(ONE.draw("accuracy", 4, 4, top=4))
BASIS = core.Basis(np.asarray([[0, 1], [1, 0]], dtype=np.float32), np.asarray([1, 0], dtype=np.float32))
NEW = ONE.draw("A_new", 4, 2), ONE.draw("B_new", 2, 5)
LAYER = ONE.x, ONE.W, ADAPTER, ONE.grad_y
PENALTIES = [{"form": f, "normalize": n} for f in ("basis", "routing", "output") for n in (False, True)]
METRICS = ("last_accuracy", "average_accuracy", "average_incremental_accuracy", "backward_transfer", "forgetting")
GRADS = core.LinearGradients._fields

# One call of every jit-able function; ints and strings stay outside the transformation.
CALLS: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "routing": [((ADAPTER,), {})],
    "delta": [((ADAPTER,), {})],
    "apply": [((ONE.x, ADAPTER), {})],
    "linear": [((ONE.x, ONE.W, ADAPTER, ONE.bias), {})],
    "linear_vjp": [
        (
            (ONE.x, ONE.W, ADAPTER, ONE.grad_y),
            {"wrt": GRADS, "stop_old": stop, "plan": core.plan(4, 4, 5, 2, order=order)},
        )
        for stop, order in ((True, "rows"), (False, "merged"), (True, "right"))
    ],
    "delta_vjp": [((ADAPTER, ONE.W), {"stop_old": stop}) for stop in (True, False)],
    "begin_task": [((ADAPTER,), {})],
    "end_task": [((ADAPTER,), {})],
    "expand": [((ADAPTER, *NEW), {})],
    "compress": [((ADAPTER, 1), {})],
    "block_routing": [((ONE.bias, (1, 2, 1, 1)), {})],
    "orthogonality": [((ADAPTER,), how) for how in PENALTIES],
    "orthogonality_vjp": [((ADAPTER,), how) for how in PENALTIES],
    "empty_moments": [((ADAPTER,), {})],
    "second_moment": [((U,), {}), ((U,), {"weights": np.asarray([1, 0, 2, 1], dtype=np.float32)})],
    "record": [((MOMENTS, ADAPTER, C), {})],
    "drift": [((ADAPTER, MOMENTS), {"since": since}) for since in ("task-ends", "boundary")],
    "drift_vjp": [((ADAPTER, MOMENTS), {"since": since}) for since in ("task-ends", "boundary")],
    "protected_basis": [((C,), {"energy": 0.5})],
    "project": [((R_DELTA, BASIS), {})],
    "orthonormalize": [((A,), {})],
    "orthonormality_defect": [((A,), {})],
    "merge": [((ONE.W, ADAPTER), {})],
    **{f"metrics.{name}": [((ACCURACY,), {})] for name in METRICS},
    "metrics.forward_transfer": [((ACCURACY,), {}), ((ACCURACY,), {"baseline": ACCURACY[0]})],
    "bounds.routing": [((ADAPTER,), {})],
    "bounds.delta": [((ADAPTER,), {})],
    "bounds.apply": [((ONE.x, ADAPTER), {})],
    "bounds.linear": [((ONE.x, ONE.W, ADAPTER, ONE.bias), {})],
    "bounds.delta_vjp": [((ADAPTER, ONE.W), {})],
    "bounds.linear_vjp": [((ONE.x, ONE.W, ADAPTER, ONE.grad_y), {"wrt": GRADS})],
    "bounds.second_moment": [((U,), {})],
    "bounds.record": [((MOMENTS, ADAPTER, C), {})],
    "bounds.drift": [((ADAPTER, MOMENTS), {})],
    "bounds.drift_vjp": [((ADAPTER, MOMENTS), {})],
    "bounds.orthogonality": [((ADAPTER,), {"form": form}) for form in ("routing", "output")],
    "bounds.project": [((R_DELTA, BASIS), {})],
    "bounds.merge": [((ONE.W, ADAPTER), {})],
}
ROUNDED = ("bounds.", "metrics.")  # a product or quotient, three sums
# The derivative of a frame solves with its triangle, forward and back: the squared condition number of A.
CONDITION = Fraction(float(np.linalg.cond(A)) ** 2).limit_denominator(1000)
NO_ARRAYS = {"plan", "capabilities", "bounds.unit_roundoff", "bounds.gamma", "bounds.orthonormal"}
FLAT = [(name, i) for name, calls in CALLS.items() for i in range(len(calls))]


def stacked(tree: Any) -> Any:
    """Three copies with a new leading axis, the later ones doubled and with signs turned where that is harmless."""
    return kit.tree_map(lambda a: np.stack([a, a, a]), tree)


def view(name: str, value: Any) -> Any:
    """What is unique of a result: a basis by the projector it protects, an adapter from compress by its delta."""
    if name == "protected_basis":
        frame = value.U * value.weights[..., None, :]
        return frame @ np.swapaxes(value.U, -1, -2), value.weights
    if name == "compress":
        A, R_old, _, B = value.adapter
        return A @ R_old @ B, value.error
    return value


def same(name: str, lane: kit.Lane, got: Any, expected: Any) -> None:
    """Equal: the numbers are dyadic. Where a value is rounded after exact sums, within those few roundings of it.

    With eigenvalues or singular values, within their backward error on both sides, which is relative to the norm.
    """
    ran = kit.Ran(name, lane, view(name, kit.tree_map(kit.to_numpy, got)))
    kit.RAN.add((name, lane.value.library))
    expected = view(name, expected)
    if core.capabilities()[name].linalg:
        two = 2 * kit.spectral(5, 5, "float32")
        size = max(1, *(oracle.norm(leaf) for leaf in kit.leaves(expected)))
        kit.bounded(ran, expected, kit.tree_map(lambda a: np.full(np.shape(a), two * size), expected))
    elif name.startswith(ROUNDED):
        kit.bounded(ran, expected, kit.tree_map(lambda a: kit.gamma(4, "float32") * np.abs(oracle.exact(a)), expected))
    else:
        kit.exact(ran, expected)


def prepared(name: str, i: int, lane: kit.Lane) -> tuple[Callable[..., Any], list[Any], Any]:
    """The function of its arrays, the arrays, and NumPy's result."""
    args, kwargs = CALLS[name][i]
    arrays, layout, static = kit.split(args, kwargs)
    expected = kit.run(name, kit.Lane.NUMPY, *args, **kwargs)
    kit.note(expected)
    return kit.traceable(name, layout, static, lane.value.xp), arrays, expected.value


def test_the_table_is_complete() -> None:
    """Every jit-able function of the capability table that takes arrays is called here."""
    jitable = {name for name, needs in core.capabilities().items() if needs.jit}
    assert set(CALLS) | NO_ARRAYS == jitable


@pytest.mark.parametrize(("name", "i"), FLAT)
def test_jax(name: str, i: int) -> None:
    """jit, vmap and both; vmap over three copies of every array."""
    lane = kit.Lane.JIT_X32
    function, arrays, expected = prepared(name, i, lane)
    with lane.scope():
        there = kit.tree_map(lane.put, arrays)
        same(name, lane, jax.jit(function)(*there), expected)
        three = kit.tree_map(lane.put, stacked(arrays))
        mapped = jax.jit(jax.vmap(function))(*three)
        same(name, lane, mapped, stacked(expected))


@pytest.mark.parametrize(("name", "i"), FLAT)
def test_torch(name: str, i: int) -> None:
    """compile(fullgraph=True) and torch.func.vmap."""
    lane = kit.Lane.TORCH_EXPLICIT
    function, arrays, expected = prepared(name, i, lane)
    there = kit.tree_map(lane.put, arrays)
    torch._dynamo.reset()
    same(name, lane, torch.compile(function, fullgraph=True, backend="eager")(*there), expected)
    three = kit.tree_map(lane.put, stacked(arrays))
    same(name, lane, torch.func.vmap(function)(*three), stacked(expected))


def differentiable() -> list[tuple[str, int]]:
    """Calls of the functions that the table calls differentiable."""
    return [(name, i) for name, i in FLAT if core.capabilities()[name].gradients != "none"]


@pytest.mark.parametrize(("name", "i"), differentiable())
def test_gradients_agree(name: str, i: int) -> None:
    """jax.grad and torch.func.grad of the sum of all results, for what the table says may be differentiated."""
    kind = core.capabilities()[name].gradients
    got = []
    for lane, xp in ((kit.Lane.JAX_X64, jnp), (kit.Lane.TORCH_EXPLICIT, torch_namespace)):
        function, arrays, _ = prepared(name, i, lane)
        arrays = kit.tree_map(lambda a: np.asarray(a, dtype=np.float64), arrays)
        with lane.scope():
            there = kit.tree_map(lane.put, arrays)

            def total(arrays: list[Any], function: Any = function, xp: Any = xp) -> Any:
                return sum(xp.sum(leaf) for leaf in kit.leaves(first(function(*arrays))))

            if kind == "R_delta":
                rest = there[0]
                grads = grad(lane)(lambda R, rest=rest, total=total: total([rest._replace(R_delta=R)]))(rest.R_delta)
            else:
                grads = grad(lane)(total)(there)
            got.append([kit.to_numpy(leaf) for leaf in kit.leaves(kit.tree_map(lambda g: g, grads))])
    rounding = kit.spectral(5, 5, "float64") * CONDITION if kind == "simple" else kit.gamma(40, "float64")
    for mine, theirs in zip(*got, strict=True):
        assert np.isfinite(mine).all()
        ran = kit.Ran(name, kit.Lane.JAX_X64, mine)
        if kind == "all" and not name.startswith((*ROUNDED, "merge", "orthonormality")):
            kit.exact(ran, theirs)
        else:
            kit.bounded(ran, theirs, np.full(mine.shape, rounding * max(1, oracle.norm(mine))))


def first(value: Any) -> Any:
    """Of compress the error alone: its factors have free signs."""
    return value.error if isinstance(value, core.Compressed) else value


def grad(lane: kit.Lane) -> Any:
    """The library's functional gradient."""
    return jax.grad if lane.is_jax else torch.func.grad


def test_gradients_compile_once_for_any_number_of_rows() -> None:
    """The planner's choice follows a symbolic n: one graph while the same plan stays best."""
    adapter = core.init_adapter(np.random.default_rng(0), 8, 6, 2, dtype="float64", xp=torch_namespace)
    W = torch.ones(8, 6, dtype=torch.float64)

    def gradient(x: Any, g: Any) -> Any:
        return core.linear_vjp(x, W, adapter, g, xp=torch_namespace).A

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(gradient, fullgraph=True, backend="eager")
    for n in (20, 30, 40):
        x, g = torch.ones(n, 6, dtype=torch.float64), torch.ones(n, 8, dtype=torch.float64)
        for array in (x, g):
            torch._dynamo.mark_dynamic(array, 0)
        assert torch.equal(compiled(x, g), gradient(x, g))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
