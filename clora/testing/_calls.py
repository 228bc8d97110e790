r"""One call of every public function of the core for a case, what it must give, and how far from that it may be.

The reference is NumPy in float64 on the same masters. A result in float32 may be off by its own bound and that of the
reference; one in float64 by twice the bound. Where the numbers are dyadic, or nothing is computed, it must be equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import clora_core as core

from ._backends import Seed, resolve, tree_map
from ._cases import Case, Sizes, cases

Tree = Any
SMALL = {"top": 1, "unit": 1}  # for products of many: still without rounding in float32
DECOMPOSING = {"compress", "init_adapter", "orthogonality", "orthogonality_vjp", "orthonormalize", "protected_basis"}
GRADIENTS = core.LinearGradients._fields
NUMBERS = ("unit_roundoff", "gamma", "orthonormal")  # bounds that take no arrays


def _below(prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in core.capabilities() if name.startswith(prefix)]


class Call(NamedTuple):
    """A call with its expected result.

    Attributes
    ----------
    args, kwargs
        NumPy masters and options. A `Seed` stands for a generator, made anew for every backend.
    expected : tree of arrays
        What ``view`` makes of the right result.
    allowed : tree of arrays, or None
        How far off each number may be; None: it must be equal.
    view : callable
        The part of a result that is determined (eigenvectors are not, their projectors are).
    size : int
        The longest inner size, for reports.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    expected: Tree
    allowed: Tree
    view: Callable[[Any], Tree] = lambda value: value
    size: int = 0


class NearTie(Exception):
    """The result hangs on a comparison of numbers that rounding could turn: nothing can be said."""


def make_call(name: str, case: Case) -> Call:
    """The call of a function for a case.

    Raises
    ------
    NearTie
        An eigenvalue, singular value or energy is too close to another one.
    """
    call = BUILDERS[name](case)
    return call._replace(size=call.size or max(case.sizes))


def strategy(name: str) -> Any:
    """The cases that a function is called with: long ones where nothing is decomposed."""
    return cases(long=name not in DECOMPOSING)


def wide(tree: Tree) -> Tree:
    """In float64."""
    return tree_map(lambda a: np.asarray(a, np.float64), tree)


def _add(*trees: Tree) -> Tree:
    first, *rest = trees
    if isinstance(first, tuple | list):
        return tuple(None if items[0] is None else _add(*items) for items in zip(*trees, strict=True))
    return sum((np.asarray(other, np.float64) for other in rest), start=np.asarray(first, np.float64))


def _exactly(name: str, *args: Any, view: Any = lambda value: value, **kwargs: Any) -> Call:
    """Equal to what NumPy gives: no arithmetic, one rounding of one operation, or numbers without rounding."""
    return Call(args, kwargs, view(resolve(name)(*args, **kwargs)), None, view)


def _method(case: Case) -> str:
    """The worst case proves little of long sums: above 64 the probabilistic bound is held to."""
    return "worst" if max(case.sizes) <= 64 else "probabilistic"


def _bounded(
    name: str, case: Case, *args: Any, bound: Any = None, bound_kwargs: Any = None, exact: Any = None, **kwargs: Any
) -> Call:
    """A sum of products: equal for dyadic numbers, else within ``bounds.<name>``."""
    if case.dyadic if exact is None else exact:
        return _exactly(name, *args, **kwargs)
    limit = bound or resolve(f"bounds.{name}")
    how = {**(kwargs if bound_kwargs is None else bound_kwargs), "method": _method(case)}
    here, there = (list(map(cast, args)) for cast in (lambda t: t, _wide_arrays))
    wide_kwargs = {key: _wide_arrays(value) for key, value in kwargs.items()}
    how64 = {key: _wide_arrays(value) for key, value in how.items()}
    return Call(args, kwargs, resolve(name)(*there, **wide_kwargs), _add(limit(*here, **how), limit(*there, **how64)))


def _wide_arrays(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value, np.float64)
    return type(value)(*map(_wide_arrays, value)) if hasattr(value, "_fields") else value


def _relative(name: str, roundings: int, dtype: str, *args: Any, size: Any = None, **kwargs: Any) -> Call:
    """Sums of positive terms, or ``size`` their sum of absolute values, with that many roundings."""
    expected = resolve(name)(*map(_wide_arrays, args), **{key: _wide_arrays(v) for key, v in kwargs.items()})
    size = expected if size is None else size
    limit = gamma(roundings, dtype) + gamma(roundings, "float64")
    return Call(args, kwargs, expected, tree_map(lambda a: limit * np.abs(np.asarray(a, np.float64)), size))


def gamma(k: float, dtype: str) -> float:
    """Relative error of k roundings."""
    return core.bounds.gamma(k, core.bounds.unit_roundoff(dtype))  # type: ignore[arg-type]


def decomposition(d: int, r: int, dtype: str) -> float:
    r"""Error of LAPACK's symmetric eigenvalues, singular values and QR, relative to the Frobenius norm.

    They apply r reflections of length d and, for eigenvalues, rotations in about two sweeps each: the count of
    `bounds.orthonormal`, three times over, with roundings as Higham and Mary take them (independent, mean zero:
    4 sqrt(k) u in the place of k u). The worst case, 30 sweeps and k u, never comes near: it proves nothing.
    """
    u = core.bounds.unit_roundoff(dtype)
    return 2 * math.sqrt(r) * core.bounds.gamma(24 * d * r, u, method="probabilistic")


def _both(function: Callable[[str], float], dtype: str) -> float:
    return function(dtype) + function("float64")


# --- the layer and its gradients -------------------------------------------------------------------------------


def _linear_vjp(case: Case) -> Call:
    order, stop_old = (None, "rows", "left", "right", "merged")[case.seed % 5], case.seed // 5 % 2 == 0
    wrt = (GRADIENTS, ("x", "A", "R_delta", "B"), ("R_delta",))[case.seed // 10 % 3]
    n, d_out, d_in, r = case.sizes
    kwargs: dict[str, Any] = {"wrt": wrt, "stop_old": stop_old}
    if order is not None:
        kwargs["plan"] = core.plan(n, d_out, d_in, r, dtype=case.dtype, wrt=wrt, stop_old=stop_old, order=order)
    if "bias" in wrt:
        kwargs["bias"] = case.bias
    args = case.x, case.W, case.adapter(), case.grad_y
    bound_kwargs = {key: value for key, value in kwargs.items() if key != "plan"}
    return _bounded("linear_vjp", case, *args, **kwargs, bound_kwargs=bound_kwargs)


def _delta_vjp(case: Case) -> Call:
    _, d_out, d_in, _ = case.sizes
    grad = case.draw("G", *case.leads.adapter, d_out, d_in)
    return _bounded("delta_vjp", case, case.adapter(), grad, stop_old=case.seed % 2 == 0)


def _merge(case: Case) -> Call:
    W, adapter = case.draw("W", *case.leads.adapter, *case.W.shape[-2:]), case.adapter()
    weight = lambda value: value.weight  # noqa: E731
    if case.dyadic:
        parts = lambda value: (value.weight, value.report.unchanged)  # noqa: E731
        return _exactly("merge", W, adapter, view=parts)
    limit = _add(core.bounds.merge(W, adapter, method=_method(case)), core.bounds.merge(*_wide_arrays_all(W, adapter)))
    return Call((W, adapter), {}, weight(core.merge(*_wide_arrays_all(W, adapter))), limit, weight)


def _wide_arrays_all(*trees: Any) -> list[Any]:
    return [_wide_arrays(tree) for tree in trees]


# --- life cycle, expansion -------------------------------------------------------------------------------------


def _expand(case: Case) -> Call:
    k = 1 + case.seed % 2 if not case.tabled else 1
    _, d_out, d_in, _ = case.sizes
    A_new = case.draw("A_new", *case.leads.A, d_out, k)
    B_new = case.draw("B_new", *case.leads.B, k, d_in)
    return _exactly("expand", case.adapter(), A_new, B_new)


def _block_routing(case: Case) -> Call:
    sizes = ((1,), (2, 1), (1, 1, 3))[case.seed % 3]
    return _exactly("block_routing", case.draw("w", *case.leads.A, len(sizes)), sizes)


def _compress(case: Case) -> Call:
    adapter, r = case.adapter(), case.sizes.r
    rank = max(1, r - 1 - case.seed % 2) if not case.tabled else max(1, r - 1)
    expected = core.compress(_wide_arrays(adapter), rank)
    sizes = [np.linalg.norm(wide(a), axis=(-2, -1)) for a in (adapter.A, core.routing(adapter), adapter.B)]
    scale = np.asarray(sizes[0] * sizes[1] * sizes[2])
    values = np.linalg.svd(core.delta(_wide_arrays(adapter)), compute_uv=False)[..., :r]
    d = max(case.sizes.d_out, case.sizes.d_in)
    error = 2 * scale * _both(lambda dtype: decomposition(d, r, dtype), case.dtype)
    gap = values[..., rank - 1] - (values[..., rank] if rank < values.shape[-1] else 0.0)
    if rank < r:
        _clear(gap, 8 * error)
    # The error is a norm of singular values, each of which moves by ||E|| at most (Weyl); the best approximation moves
    # by ||E|| twice, plus what its subspaces turn by, ||E|| / gap, times the norm.
    turned = error * (2 + (4 * values[..., 0] / gap if rank < r else 0.0))
    view = lambda value: (core.delta(_wide_arrays(value.adapter)), value.error)  # noqa: E731
    delta = np.broadcast_to(turned[..., None, None], np.shape(view(expected)[0]))
    return Call((adapter, rank), {}, view(expected), (delta, error * math.sqrt(max(r - rank, 1))), view)


def _clear(gap: Any, noise: Any) -> None:
    if not np.all(gap > noise):
        raise NearTie("a gap within the rounding of a decomposition")


# --- starts ----------------------------------------------------------------------------------------------------


def _init_adapter(case: Case) -> Call:
    scheme = ("orthonormal", "lora", "svd")[case.seed % 3]
    _, d_out, d_in, r = case.sizes
    W = case.draw("W", *case.leads.W, d_out, d_in)
    args = Seed(case.seed), d_out, d_in, r
    if scheme != "svd":
        value = core.init_adapter(np.random.default_rng(case.seed), *args[1:], scheme=scheme, W=W, batch=(2,))
        return Call(args, {"scheme": scheme, "W": W, "batch": (2,)}, value, None)
    U, s, _ = np.linalg.svd(wide(W), full_matrices=False)
    error = np.linalg.norm(wide(W), axis=(-2, -1)) * _both(
        lambda dtype: decomposition(max(d_out, d_in), min(d_out, d_in), dtype), case.dtype
    )
    values = np.concatenate([s, np.zeros((*s.shape[:-1], 1))], axis=-1)
    gap = (values[..., :-1] - values[..., 1:]).min(axis=-1)
    _clear(gap, 8 * error)
    # Each direction by itself: sin of its angle at most ||E|| / gap to either side (Wedin), on both sides; its sign
    # is that of its largest entry, which must be clear of the next.
    tilt = 2 * error / gap
    top = np.sort(np.abs(U), axis=-2)
    if d_out > 1:
        _clear(top[..., -1, :r] - top[..., -2, :r], 2 * tilt[..., None])
    value = core.init_adapter(np.random.default_rng(case.seed), *args[1:], scheme="svd", W=wide(W))
    allowed = tuple(
        np.broadcast_to(tilt[..., None, None], a.shape) * f for a, f in zip(value, (1, 0, 0, 1), strict=True)
    )
    return Call(args, {"scheme": "svd", "W": W}, value, allowed)


def _validate(case: Case) -> Call:
    if case.sizes.r > min(case.sizes.d_out, case.sizes.d_in):
        raise NearTie("the rank is over the layer's")
    u = case.draw("u", *case.leads.x, case.sizes.n, case.sizes.r)
    adapter = case.adapter()
    moments = core.record(core.empty_moments(adapter), adapter, core.second_moment(u))
    return _exactly("validate", adapter, moments=moments)


def _orthonormalize(case: Case) -> Call:
    F = case.draw("F", *case.leads.A, case.sizes.d_out, case.sizes.r)
    values = np.linalg.svd(wide(F), compute_uv=False)
    _clear(values[..., -1], 1e-3 * values[..., 0])
    error = _both(lambda dtype: decomposition(F.shape[-2], F.shape[-1], dtype), case.dtype)
    # A frame moves by at most sqrt(2) times the condition number times the relative perturbation (Higham, Accuracy and
    # Stability, 2nd ed., section 19.9), and is itself orthonormal to within the same error.
    turn = error * (1 + math.sqrt(2) * np.linalg.norm(wide(F), axis=(-2, -1)) / values[..., -1])
    expected = core.orthonormalize(wide(F))
    return Call((F,), {}, expected, np.broadcast_to(turn[..., None, None], expected.shape))


def _orthonormality_defect(case: Case) -> Call:
    F = case.draw("F", *case.leads.A, case.sizes.d_out, case.sizes.r)
    size = np.swapaxes(np.abs(wide(F)), -1, -2) @ np.abs(wide(F)) + np.eye(case.sizes.r)
    norm = np.linalg.norm(size, axis=(-2, -1))
    k = case.sizes.d_out + case.sizes.r**2 + 3
    steps = (
        gamma(k, case.dtype)
        if max(case.sizes) <= 64
        else core.bounds.gamma(k, core.bounds.unit_roundoff(case.dtype), method="probabilistic")
    )
    return Call((F,), {}, core.orthonormality_defect(wide(F)), (steps + gamma(k, "float64")) * norm)


# --- the penalty -----------------------------------------------------------------------------------------------


def _orthogonality(case: Case) -> Call:
    form = ("routing", "output", "basis")[case.seed % 3]
    adapter = case.adapter(**SMALL if form != "basis" else {})
    if form != "basis":
        bound = lambda a, *, form, method: core.bounds.orthogonality(a, form=form, method=method)  # noqa: E731
        return _bounded("orthogonality", case, adapter, form=form, bound=bound)
    P, room = _old_projector(case, adapter)
    how = {"form": form, "energy": _energy(case)}
    R = wide(adapter.R_delta)
    size = np.sum(R * R, axis=(-2, -1))
    expected = np.sum(R * (P @ R), axis=(-2, -1))
    return Call((adapter,), how, expected, room * size + np.zeros_like(expected))


def _orthogonality_vjp(case: Case) -> Call:
    form = ("routing", "output", "basis")[case.seed % 3]
    adapter = case.adapter(**SMALL if form != "basis" else {})
    lead = np.broadcast_shapes(*(np.shape(a)[:-2] for a in adapter[0 if form == "output" else 1 : 3]))
    grad = case.draw("grad", *lead, **SMALL)
    if form == "basis":
        P, room = _old_projector(case, adapter)
        R, G = wide(adapter.R_delta), wide(grad)[..., None, None]
        expected = _sum_to(2 * G * (P @ R), R.shape)
        size = np.abs(G) * (room * np.linalg.norm(R, axis=(-2, -1)))[..., None, None] * np.ones_like(P)
        how = {"form": form, "energy": _energy(case)}
        return Call((adapter, grad), how, expected, 2 * _sum_to(size, R.shape))
    if case.dyadic:
        return _exactly("orthogonality_vjp", adapter, grad, form=form)
    d_out, r = case.sizes.d_out, case.sizes.r
    inner = (2 * r if form == "routing" else 4 * r + 2 * d_out) + 3 + math.prod(lead)
    size = core.orthogonality_vjp(tree_map(lambda a: np.abs(wide(a)), adapter), np.abs(wide(grad)), form=form)
    return _relative("orthogonality_vjp", inner, case.dtype, adapter, grad, size=size, form=form)


def _sum_to(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    array = array.sum(axis=tuple(range(array.ndim - len(shape))))
    return array.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1 and array.shape[i] != 1), keepdims=True)


def _energy(case: Case) -> float:
    return (0.3, 0.5, 0.9)[case.seed // 3 % 3]


def _old_projector(case: Case, adapter: core.Adapter) -> tuple[np.ndarray, Any]:
    """Q Q^T of the form "basis", and by how much rounding may turn it."""
    R_old = wide(adapter.R_old)
    U, s, _ = np.linalg.svd(R_old)
    return _projector(U, s * s, s, np.linalg.norm(R_old, axis=(-2, -1)), case)


def _projector(U: Any, energies: Any, values: Any, norm: Any, case: Case) -> tuple[np.ndarray, Any]:
    """The projector on the leading directions, and by how much rounding may turn it."""
    r = energies.shape[-1]
    noise = norm * _both(lambda dtype: decomposition(r, r, dtype), case.dtype)
    # of an eigenvalue, or of the square of a singular value
    error = noise * (1 if energies is values else 2 * values[..., 0])
    weights, gap = leading(energies, _energy(case), values, noise, error)
    P = (U * weights[..., None, :]) @ np.swapaxes(U, -1, -2)
    return P, turned(noise, gap) + _both(lambda dtype: decomposition(r, r, dtype), case.dtype)


def leading(energies: Any, energy: float, values: Any, noise: Any, error: Any) -> tuple[Any, Any]:
    """0/1 weights of the fewest leading directions that hold the energy, and the gap below the last of them.

    Parameters
    ----------
    energies, values : arrays, shape (..., r), descending
        What is summed, and the eigenvalues or singular values whose gap counts.
    noise, error : arrays, shape (...)
        How far rounding may move each value, and each energy.

    Raises
    ------
    NearTie
        Rounding could choose other directions.
    """
    r = energies.shape[-1]
    total = energies.sum(axis=-1, keepdims=True)
    before = np.cumsum(energies, axis=-1) - energies
    _clear(np.abs(before[..., 1:] - energy * total), 4 * r * np.asarray(error)[..., None])
    weights = ((before < energy * total) & (energies > 0)).astype(float)
    kept = weights.sum(axis=-1, keepdims=True).astype(int)
    following = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    gap = np.take_along_axis(values, np.maximum(kept - 1, 0), axis=-1) - np.take_along_axis(following, kept, axis=-1)
    gap = np.where((kept == 0) | (kept == r), np.inf, gap)[..., 0]
    _clear(gap, 8 * noise)
    return weights, gap


def turned(noise: Any, gap: Any) -> Any:
    """How far projectors may be apart, in the Frobenius norm: sqrt(2) ||E|| / gap (Davis and Kahan).

    A gap that is clear of eight times the noise may itself have shrunk by a fifth.
    """
    return 1.25 * math.sqrt(2) * noise / gap


# --- memory and protection -------------------------------------------------------------------------------------


def _second_moment(case: Case) -> Call:
    n, r = case.sizes.n, case.sizes.r
    u = case.draw("u", *case.leads.x, n, r)
    weighted = case.seed % 2 == 1
    weights = np.abs(case.draw("w", *case.leads.x, n)) if weighted else None
    exact = case.dyadic and not weighted and n in (1, 2, 4)
    how = {"weights": weights} if weighted else {}
    return _bounded("second_moment", case, u, **how, exact=exact)


def _past(case: Case) -> tuple[core.Adapter, core.Moments, np.ndarray]:
    C = [core.second_moment(case.draw(f"u{i}", *case.leads.x, 4, case.sizes.r, **SMALL)) for i in range(2)]
    adapter = case.adapter(**SMALL)
    if case.seed % 3 == 0:  # identity factors: a head
        adapter = adapter._replace(A=None, B=None)  # type: ignore[arg-type]
    then = adapter._replace(R_delta=case.draw("R_then", *case.leads.R_delta, case.sizes.r, case.sizes.r, **SMALL))
    return adapter, core.record(core.empty_moments(then), then, C[0]), C[1]


def _record(case: Case) -> Call:
    adapter, moments, C = _past(case)
    return _bounded("record", case, moments, adapter, C)


def _drift(case: Case) -> Call:
    adapter, moments, _ = _past(case)
    return _bounded("drift", case, adapter, moments, since=("task-ends", "boundary")[case.seed % 2])


def _drift_vjp(case: Case) -> Call:
    adapter, moments, _ = _past(case)
    since = ("task-ends", "boundary")[case.seed % 2]
    grad = case.draw("g", *np.shape(core.drift(adapter, moments, since=since)), **SMALL)
    return _bounded("drift_vjp", case, adapter, moments, grad, since=since)


def _moment(case: Case) -> np.ndarray:
    return core.second_moment(case.draw("u", *case.leads.x, max(case.sizes.n, 1) + 2, case.sizes.r))


def _protected_basis(case: Case) -> Call:
    S = _moment(case)
    values, U = np.linalg.eigh(wide(S))
    values, U = np.clip(values[..., ::-1], 0.0, None), U[..., ::-1]
    P, room = _projector(U, values, values, np.linalg.norm(wide(S), axis=(-2, -1)), case)

    def view(basis: core.Basis) -> tuple[np.ndarray, np.ndarray]:
        frame, weights = wide(basis)
        return (frame * weights[..., None, :]) @ np.swapaxes(frame, -1, -2), weights.sum(axis=-1)

    return Call((S,), {"energy": _energy(case)}, (P, np.trace(P, axis1=-2, axis2=-1).round()), (
        room[..., None, None] + np.zeros_like(P), np.zeros(P.shape[:-2])
    ), view)  # fmt: skip


def _project(case: Case) -> Call:
    r = case.sizes.r
    R_delta = case.draw("R_delta", *case.leads.R_delta, case.sizes.d_out, r)
    if case.dyadic:  # reflections along the axes: a frame without rounding
        U, weights = np.eye(r, dtype=case.dtype)[:, ::-1].copy(), np.arange(r) % 2
        return _exactly("project", R_delta, core.Basis(U, weights.astype(case.dtype)))
    U = np.linalg.qr(case.draw("U", *case.leads.x, r, r))[0]
    weights = (case.draw("w", *case.leads.x, r) > 0).astype(case.dtype)
    return _bounded("project", case, R_delta, core.Basis(U, weights))


# --- metrics, plans, bounds ------------------------------------------------------------------------------------


def _metric(name: str) -> Callable[[Case], Call]:
    def build(case: Case) -> Call:
        T = (1, 3, 4)[case.seed % 3]
        matrix = np.abs(case.draw("accuracy", *case.leads.x, T, T, top=4))
        kwargs = {"baseline": matrix[..., 0, :].copy()} if name == "forward_transfer" else {}
        # Each is a mean of at most T differences of two numbers of the matrix (or a mean of such means).
        top = np.max(wide(matrix), axis=(-2, -1))
        shape = np.shape(getattr(core.metrics, name)(matrix, **kwargs))
        size = 2 * top[..., None] * np.ones(shape) if len(shape) > top.ndim else 2 * top
        return _relative(f"metrics.{name}", T + 2, case.dtype, matrix, size=size, **kwargs)._replace(size=T)

    return build


def _plan(case: Case) -> Call:
    n, d_out, d_in, r = case.sizes
    return _exactly("plan", n, d_out, d_in, r, dtype=case.dtype, wrt=("A", "R_delta", "B"), view=str)


def _bound_of(name: str) -> Callable[[Case], Call]:
    """A bound is a sum of positive terms with as many roundings as its function: relative to what NumPy gives."""

    def build(case: Case) -> Call:
        case = case._replace(dyadic=False, sizes=case.sizes if max(case.sizes) <= 16 else Sizes(3, 4, 5, 2))
        call = BUILDERS[name](case._replace(seed=case.seed // 3 * 3) if name == "orthogonality" else case)
        n, d_out, d_in, r = case.sizes
        lead = math.prod(case.leads.all)
        roundings = {
            "routing": 0,
            "delta": 2 * r + 4,
            "apply": d_in + 2 * r + 4,
            "linear": d_in + 2 * r + 7,
            "delta_vjp": d_in + d_out + r + lead + 4,
            "linear_vjp": n * lead + d_in + d_out + 2 * r + lead + 8,
            "second_moment": 2 * n + 8,
            "record": d_out + 2 * r + r * r + 8,
            "drift": d_out + 2 * r + r * r + 10,
            "drift_vjp": d_out + 2 * r + lead + 8,
            "orthogonality": 4 * r + 2 * d_out + r * r + 6,
            "project": 2 * r + 6,
            "merge": 2 * r + 8,
        }[name]
        kwargs = {key: value for key, value in call.kwargs.items() if key not in ("plan", "energy")}
        kwargs["method"] = ("worst", "probabilistic")[case.seed % 2]
        expected = resolve(f"bounds.{name}")(*call.args, **kwargs)
        if name == "routing":  # a sum and a product: every library rounds them alike
            return Call(call.args, kwargs, expected, None)
        limit = 2 * gamma(roundings, case.dtype)
        return Call(call.args, kwargs, expected, tree_map(lambda a: limit * np.asarray(a, np.float64), expected))

    return build


def _number(name: str, *args: Any) -> Callable[[Case], Call]:
    return lambda case: _exactly(f"bounds.{name}", *(case.dtype if a == "dtype" else a for a in args))


BUILDERS: dict[str, Callable[[Case], Call]] = {
    "init_adapter": _init_adapter,
    "validate": _validate,
    "routing": lambda case: _exactly("routing", case.adapter()),
    "delta": lambda case: _bounded("delta", case, case.adapter()),
    "apply": lambda case: _bounded("apply", case, case.x, case.adapter()),
    "linear": lambda case: _bounded(
        "linear", case, case.x, case.W, case.adapter(), *((case.bias,) if case.seed % 2 else ())
    ),
    "linear_vjp": _linear_vjp,
    "delta_vjp": _delta_vjp,
    "plan": _plan,
    "begin_task": lambda case: _exactly("begin_task", case.adapter()),
    "end_task": lambda case: _exactly("end_task", case.adapter()),
    "expand": _expand,
    "compress": _compress,
    "block_routing": _block_routing,
    "orthogonality": _orthogonality,
    "orthogonality_vjp": _orthogonality_vjp,
    "empty_moments": lambda case: _exactly("empty_moments", case.adapter()),
    "second_moment": _second_moment,
    "record": _record,
    "drift": _drift,
    "drift_vjp": _drift_vjp,
    "protected_basis": _protected_basis,
    "project": _project,
    "orthonormalize": _orthonormalize,
    "orthonormality_defect": _orthonormality_defect,
    "merge": _merge,
    **{f"metrics.{name}": _metric(name) for name in _below("metrics.")},
    **{f"bounds.{name}": _bound_of(name) for name in _below("bounds.") if name not in NUMBERS},
    "bounds.unit_roundoff": _number("unit_roundoff", "dtype"),
    "bounds.gamma": _number("gamma", 7, 2.0**-24),
    "bounds.orthonormal": _number("orthonormal", 5, 2, "dtype"),
}
