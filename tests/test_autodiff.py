"""Autodiff of the plain formulas gives the same exact gradients, in torch and in JAX; so does the two-route layer."""

from collections.abc import Callable
from typing import Any

import kit
import numpy as np
import oracle
import pytest

import clora_core as core
from clora.testing import Case
from clora.testing._cases import TABLE

if kit.torch is None or kit.jax is None:
    pytest.skip(kit.NO_FRAMEWORK, allow_module_level=True)
torch, jax = kit.torch, kit.jax
jnp, torch_namespace = jax.numpy, kit.Lane.TORCH.value.xp

CASES = [Case(sizes, leads, "float64", seed, dyadic=False, tabled=True) for seed, (sizes, leads) in enumerate(TABLE)]
NAMES = core.LinearGradients._fields
ENGINES: dict[str, kit.Lane] = {"torch": kit.Lane.TORCH, "jax": kit.Lane.JAX_X64}


def gradient(lane: kit.Lane, loss: Callable[..., Any], arrays: list[Any]) -> list[Any]:
    """Gradients of a scalar loss with respect to all arrays, by the library's autodiff."""
    with lane.scope():
        there = [lane.put(array) for array in arrays]
        if lane.is_jax:
            return [kit.to_numpy(g) for g in jax.grad(loss, argnums=tuple(range(len(there))))(*there)]
        for array in there:
            array.requires_grad_(True)
        grads = torch.autograd.grad(loss(*there), there, allow_unused=True, materialize_grads=True)
        return [kit.to_numpy(g) for g in grads]


def stop(lane: kit.Lane, array: Any) -> Any:
    """The framework's stop-gradient."""
    return jax.lax.stop_gradient(array) if lane.is_jax else array.detach()


def namespace(lane: kit.Lane) -> Any:
    """The namespace of an engine."""
    return jnp if lane.is_jax else torch_namespace


@pytest.mark.parametrize("stop_old", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_linear(case: Case, engine: str, stop_old: bool) -> None:
    """sum(g * y): `linear` as it is, or W x + sg(A R_old B) x + A R_delta B x with the whole R for x (eqs. 11-12)."""
    lane, xp = ENGINES[engine], namespace(ENGINES[engine])
    arrays = [case.x, case.W, case.bias, *case.adapter()]

    def loss(x: Any, W: Any, bias: Any, A: Any, R_old: Any, R_delta: Any, B: Any) -> Any:
        g = lane.put(case.grad_y)
        if not stop_old:
            return xp.sum(g * core.linear(x, W, core.Adapter(A, R_old, R_delta, B), bias, xp=xp))
        zero = xp.zeros_like(R_old)
        old = core.Adapter(stop(lane, A), stop(lane, R_old), zero, stop(lane, B))
        new = core.Adapter(A, zero, R_delta, B)
        y = core.linear(x, W, old, bias, xp=xp) + core.apply(x, new, xp=xp)
        return xp.sum(g * y)

    got = dict(zip(("x", "W", "bias", *core.Adapter._fields), gradient(lane, loss, arrays), strict=True))
    expected = oracle.linear_gradients(case.x, case.W, case.adapter(), case.grad_y, stop_old, case.bias.shape)
    how: dict[str, Any] = {"wrt": NAMES, "stop_old": stop_old, "bias": case.bias}
    bound = kit.run("bounds.linear_vjp", lane, case.x, case.W, case.adapter(), case.grad_y, **how).value
    closed = kit.run("linear_vjp", lane, case.x, case.W, case.adapter(), case.grad_y, **how)
    for name in NAMES:
        autodiff = kit.Ran("linear", lane, got[name])
        kit.bounded(autodiff, expected[name], getattr(bound, name))
        kit.bounded(closed, expected[name], getattr(bound, name), lambda v, name=name: getattr(v, name))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_delta(case: Case, engine: str) -> None:
    """sum(G * delta)."""
    lane, xp = ENGINES[engine], namespace(ENGINES[engine])
    G = case.draw("G", *case.leads.adapter, case.sizes.d_out, case.sizes.d_in)
    grads = gradient(lane, lambda *a: xp.sum(lane.put(G) * core.delta(core.Adapter(*a), xp=xp)), list(case.adapter()))
    expected = oracle.delta_gradients(case.adapter(), G, stop_old=False)
    bound = kit.run("bounds.delta_vjp", lane, case.adapter(), G, stop_old=False).value
    for name, value in zip(core.Adapter._fields, grads, strict=True):
        if name != "R_old":
            kit.bounded(kit.Ran("delta", lane, value), expected[name], getattr(bound, name))


def moments(case: Case) -> core.Moments:
    """Moments of two recorded tasks with NumPy."""
    adapter = case.adapter()
    out = core.empty_moments(adapter)
    for i in range(2):
        u = case.draw(f"u{i}", *case.leads.x, 4, case.sizes.r)
        out = core.record(
            out, adapter._replace(R_delta=case.draw(f"R{i}", case.sizes.r, case.sizes.r)), core.second_moment(u)
        )
    return out


@pytest.mark.parametrize("since", ["task-ends", "boundary"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_drift(case: Case, engine: str, since: str) -> None:
    """Both the closed form and autodiff are within the bound of the same number."""
    lane, xp = ENGINES[engine], namespace(ENGINES[engine])
    A, R_old, R_delta, B = case.adapter()
    memory = moments(case)
    there = [kit.tree_map(lane.put, tree) for tree in (A, R_old, B, memory)]

    def loss(R: Any) -> Any:
        with_R = core.Adapter(there[0], there[1], R, there[2])
        return xp.sum(core.drift(with_R, there[3], since=since, xp=xp))

    with lane.scope():
        there = [kit.tree_map(lane.put, tree) for tree in (A, R_old, B, memory)]
    (autodiff,) = gradient(lane, loss, [R_delta])
    limit = kit.run("bounds.drift_vjp", lane, case.adapter(), memory, since=since).value
    closed = kit.run("drift_vjp", lane, case.adapter(), memory, since=since)
    kit.bounded(closed, autodiff, 2 * limit)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("form", core._orthogonality.FORMS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_orthogonality(case: Case, engine: str, form: str, normalize: bool) -> None:
    """The closed form is what autodiff makes of the penalty; on the scale of its terms."""
    lane, xp = ENGINES[engine], namespace(ENGINES[engine])
    A, R_old, R_delta, B = case.adapter()

    def loss(R: Any) -> Any:
        with_R = core.Adapter(there[0], there[1], R, there[2])
        return xp.sum(core.orthogonality(with_R, form=form, normalize=normalize, xp=xp))

    with lane.scope():
        there = [lane.put(array) for array in (A, R_old, B)]
    (autodiff,) = gradient(lane, loss, [R_delta])
    closed = kit.run("orthogonality_vjp", lane, case.adapter(), form=form, normalize=normalize)
    # Both sum, over the leading axes and entries, products of F (at most |A|^2 |R_old| large) with F R_delta; the
    # normalised form divides them by the square of A R_old and of A R_delta.
    K = oracle.norm(A) ** 2 if form == "output" else 1
    F = K * oracle.norm(R_old) if form != "basis" else 1
    size = 4 * F * F * oracle.norm(R_delta)
    if normalize:
        parts = [
            core.delta(core.Adapter(A, R, np.zeros_like(R), np.eye(R.shape[-1]))) if form == "output" else R
            for R in (R_old, R_delta)
        ]
        smallest = [min(oracle.square(oracle.exact(p)).flat) for p in parts]
        size = size * (1 + K) / (smallest[1] * (smallest[0] if form != "basis" else 1))
    batch = int(np.prod(case.leads.adapter, dtype=int))
    k = 8 * (case.sizes.r**2 + case.sizes.d_out + batch)
    kit.bounded(closed, autodiff, np.full(autodiff.shape, batch * size * kit.gamma(k, "float64")))


@pytest.mark.parametrize("engine", ENGINES)
def test_no_gradient_is_nan_at_the_start(engine: str) -> None:
    """Zero routing, zero divisor, orthonormal columns: where a square root or a quotient would give NaN."""
    lane, xp = ENGINES[engine], namespace(ENGINES[engine])
    H = np.asarray([[1, 1], [1, -1], [1, 1], [1, -1]]) / 2
    zero = np.zeros((2, 2))
    losses: dict[str, tuple[Any, list[Any]]] = {
        "orthonormality_defect": (lambda F: core.orthonormality_defect(F, xp=xp), [H]),
        **{
            f"orthogonality {form}": (
                lambda R, form=form: core.orthogonality(
                    core.Adapter(lane.put(H), lane.put(zero), R, lane.put(H.T)), form=form, normalize=True, xp=xp
                ),
                [zero],
            )
            for form in ("routing", "output")
        },
        "second_moment": (lambda w: xp.sum(core.second_moment(lane.put(H), weights=w, xp=xp)), [np.zeros(4)]),
        "merge": (
            lambda W: core.merge(W, core.Adapter(*map(lane.put, (H, zero, zero, H.T))), xp=xp).report.error,
            [np.ones((4, 4))],
        ),
    }
    for name, (loss, arrays) in losses.items():
        for value in gradient(lane, loss, arrays):
            assert np.isfinite(value).all(), name
            assert not value.any(), name
