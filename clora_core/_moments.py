"""The memory of all finished tasks in three small arrays, the forgetting meter it gives, and protection from it."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _array as arr
from ._adapter import Adapter

Array = arr.Array
SINCE = ("task-ends", "boundary")


class Moments(NamedTuple):
    r"""What is remembered of all finished tasks; its size depends on neither d nor the number of tasks.

    Attributes
    ----------
    S : array, shape (..., r, r)
        :math:`\sum_t C_t`, C_t the mean of :math:`u u^T` over the routed inputs u = B x of task t.
    P : array, shape (..., r, r)
        :math:`\sum_t R_t C_t`, R_t the routing when task t ended.
    q : array, shape (...)
        :math:`\sum_t \mathrm{tr}(K R_t C_t R_t^T)`, :math:`K = A^T A`: mean squared size of the delta's outputs.

    Notes
    -----
    Valid in the coordinates of B and A at the time of recording: both must stay. Our construction (spec, section 8).
    """

    S: Array
    P: Array
    q: Array


class Basis(NamedTuple):
    """A frame U (..., r, r), eigenvectors in columns, and 0/1 ``weights`` (..., r) that say which are protected."""

    U: Array
    weights: Array


def empty_moments(adapter: Adapter, *, xp: Any = None) -> Moments:
    """The memory before the first task: zeros with the routing's leading axes, dtype and device."""
    where = "clora_core.empty_moments"
    xp = arr.namespace(where, xp, *adapter)
    arr.check_adapter(where, xp, adapter, identity=True)
    shape = _common(where, adapter)
    like = {"dtype": adapter.R_delta.dtype, "device": arr.device_of(adapter.R_delta)}
    rows, columns = adapter.R_delta.shape[-2:]
    return Moments(
        xp.zeros((*shape, columns, columns), **like), xp.zeros((*shape, rows, columns), **like), xp.zeros(shape, **like)
    )


def second_moment(u: Array, *, weights: Array | None = None, xp: Any = None) -> Array:
    r"""Second moment of routed inputs: :math:`C = \frac1n \sum_i u_i u_i^T`.

    Parameters
    ----------
    u : array, shape (..., n, r)
        Rows u = B x. For a stream, average C over batches weighted by their number of rows.
    weights : array, shape (..., n), optional
        Non-negative weights: :math:`\sum_i w_i u_i u_i^T / \sum_i w_i`. 0 leaves a row (padding) out.

    Returns
    -------
    array, shape (..., r, r)
        Symmetric to the last bit: libraries and weights may round its two halves differently, so these are averaged.
        Zero if there are no rows or all weights are 0: nothing was seen, so there is nothing to remember.
    """
    where = "clora_core.second_moment"
    xp = arr.namespace(where, xp, u, weights)
    arr.check_dtype(where, xp, u=u, weights=weights)
    arr.check_last(where, name="u", array=u, last=(-1, -1), needed="(..., n, r)", fix="pass rows x @ B^T")
    if weights is None:
        return _symmetric(arr.transpose(u, xp) @ u, xp) / max(u.shape[-2], 1)
    arr.check_last(
        where, name="weights", array=weights, last=(u.shape[-2],), needed="(..., n)", fix="one weight for each row of u"
    )
    arr.broadcast_shapes(where, u=tuple(u.shape[:-2]), weights=tuple(weights.shape[:-1]))
    total = xp.sum(weights, axis=-1)[..., None, None]
    return arr.ratio(_symmetric(arr.transpose(u * weights[..., None], xp) @ u, xp), total, xp)


def record(moments: Moments, adapter: Adapter, C: Array, *, xp: Any = None) -> Moments:
    r"""Add a finished task: :math:`S + C,\ P + R C,\ q + \mathrm{tr}(K R C R^T)`, with R the routing now.

    Parameters
    ----------
    moments : Moments
    adapter : Adapter
        As the task leaves it (before or after `end_task`: the sum R is the same).
    C : array, shape (..., r, r)
        `second_moment` of the task's routed inputs.

    Returns
    -------
    Moments

    Notes
    -----
    What is added to q is a mean of squares; where rounding leaves it below zero, zero is added.
    """
    where = "clora_core.record"
    xp = arr.namespace(where, xp, *moments, *adapter, C)
    _check(where, adapter, moments, xp)
    columns = adapter.R_delta.shape[-1]
    arr.check_dtype(where, xp, R_delta=adapter.R_delta, C=C)
    arr.check_last(
        where, name="C", array=C, last=(columns, columns), needed="(..., r, r)", fix="pass second_moment(x @ B^T)"
    )
    S, P, q = moments
    leading = {"S": S.shape[:-2], "P": P.shape[:-2], "q": q.shape, "C": C.shape[:-2]}
    _common(where, adapter, **{name: tuple(shape) for name, shape in leading.items()})
    R = adapter.R_old + adapter.R_delta
    RC = R @ C
    size = xp.sum(_gram_times(adapter.A, RC, xp) * R, axis=(-2, -1))
    size = xp.where(size < 0, xp.zeros_like(size), size)  # written so that NaN stays NaN
    return Moments(moments.S + C, moments.P + RC, moments.q + size)


def drift(adapter: Adapter, moments: Moments, *, since: str = "task-ends", xp: Any = None) -> Array:
    r"""The forgetting meter: mean squared change of the layer's output on all recorded inputs, summed over tasks.

    ``since="task-ends"``, since each task ended: :math:`\mathrm{tr}(K R S R^T) - 2\,\mathrm{tr}(K R P^T) + q`.
    ``since="boundary"``, since the present task began: :math:`\mathrm{tr}(K R_\delta S R_\delta^T)`.

    Parameters
    ----------
    adapter : Adapter
    moments : Moments
    since : {"task-ends", "boundary"}

    Returns
    -------
    array, shape (...), squared units of the layer's output; 0 before the first task.

    Raises
    ------
    ShapeError
        Moments of another rank.
    OptionError
        Unknown ``since``.

    Notes
    -----
    Exact for the recorded inputs of this layer as long as A and B stay; the inputs of deeper layers move when earlier
    layers drift. "task-ends" is a difference of large terms: in floating point it may come out slightly negative, by
    no more than `bounds.drift`. Constant size, cost O(r^3 + d_out r^2). Our construction (spec, section 8).
    """
    where = "clora_core.drift"
    xp = arr.namespace(where, xp, *adapter, *moments)
    arr.check_option(where, "since", since, SINCE)
    _check(where, adapter, moments, xp)
    if since == "boundary":
        R = adapter.R_delta
        return xp.sum(_gram_times(adapter.A, R, xp) * (R @ moments.S), axis=(-2, -1))
    R = adapter.R_old + adapter.R_delta
    change = R @ moments.S - 2 * moments.P
    return xp.sum(_gram_times(adapter.A, R, xp) * change, axis=(-2, -1)) + moments.q


def drift_vjp(
    adapter: Adapter, moments: Moments, grad: Array | None = None, *, since: str = "task-ends", xp: Any = None
) -> Array:
    r"""Gradient of `drift` with respect to R_delta, times ``grad`` (...) if given.

    :math:`2 K (R S - P)` for "task-ends", :math:`2 K R_\delta S` for "boundary" (S is symmetric).

    Returns
    -------
    array, the shape of R_delta (summed over axes along which it was broadcast).

    Notes
    -----
    A has no gradient here: where A moves, moments are void and there is no meter to differentiate.
    """
    where = "clora_core.drift_vjp"
    xp = arr.namespace(where, xp, *adapter, *moments, grad)
    arr.check_option(where, "since", since, SINCE)
    _check(where, adapter, moments, xp)
    arr.check_dtype(where, xp, R_delta=adapter.R_delta, grad=grad)
    if since == "boundary":
        change = adapter.R_delta @ moments.S
    else:
        change = (adapter.R_old + adapter.R_delta) @ moments.S - moments.P
    out = 2 * _gram_times(adapter.A, change, xp)
    if grad is not None:
        arr.broadcast_shapes(where, result=tuple(out.shape[:-2]), grad=tuple(grad.shape))
        out = grad[..., None, None] * out
    return arr.sum_to(out, adapter.R_delta.shape, xp)


def protected_basis(S: Array, *, energy: float = 0.95, xp: Any = None) -> Basis:
    r"""The directions of routed inputs that hold ``energy`` of what was recorded.

    :math:`S = U \Lambda U^T`, eigenvalues descending; weight 1 for the fewest leading directions whose eigenvalues sum
    to at least ``energy`` of the trace, 0 for the rest.

    Parameters
    ----------
    S : array, shape (..., r, r)
        Symmetric positive semidefinite: `Moments.S`.
    energy : float in [0, 1]

    Returns
    -------
    Basis(U, weights)
        No direction is protected where S = 0. The shape does not depend on the data, so it runs under a compiler.

    Notes
    -----
    Eigenvalues of a second moment are energies already and are not squared. Needs ``linalg``.
    Source: GPM, Saha et al., ICLR 2021, eq. 5, whose singular values are of activations, hence squared there.
    """
    where = "clora_core.protected_basis"
    xp = arr.namespace(where, xp, S)
    arr.check_fraction(where, "energy", energy)
    arr.check_dtype(where, xp, S=S)
    last = (S.shape[-1], S.shape[-1]) if len(S.shape) else (-1, -1)
    arr.check_last(where, name="S", array=S, last=last, needed="(..., r, r)", fix="pass Moments.S")
    values, vectors = xp.linalg.eigh(S)
    values = xp.flip(values, axis=-1)
    values = xp.where(values > 0, values, xp.zeros_like(values))
    return Basis(xp.flip(vectors, axis=-1), arr.top_energy(values, energy, xp))


def project(R_delta: Array, basis: Basis, *, xp: Any = None) -> Array:
    r"""Remove the protected directions: :math:`R_\delta (I - U\,\mathrm{diag}(w)\,U^T)`.

    Parameters
    ----------
    R_delta : array, shape (..., m, r)
        The value of the present routing (or of a head's trained difference), not its gradient: projecting gradients
        leaks under Adam and momentum.
    basis : Basis

    Returns
    -------
    array, the shape of R_delta broadcast with the basis.
    """
    where = "clora_core.project"
    U, weights = basis
    xp = arr.namespace(where, xp, R_delta, U, weights)
    check_basis(where, xp, R_delta, basis)
    return R_delta - ((R_delta @ U) * weights[..., None, :]) @ arr.transpose(U, xp)


def check_basis(where: str, xp: Any, R_delta: Array, basis: Basis) -> None:
    """Static checks of a projection."""
    U, weights = basis
    arr.check_dtype(where, xp, R_delta=R_delta, U=U, weights=weights)
    arr.check_last(where, name="R_delta", array=R_delta, last=(-1, -1), needed="(..., m, r)", fix="pass the routing")
    r = R_delta.shape[-1]
    fix = "use the basis of this adapter's moments"
    arr.check_last(where, name="U", array=U, last=(r, r), needed=f"(..., r={r}, r={r})", fix=fix)
    arr.check_last(where, name="weights", array=weights, last=(r,), needed=f"(..., r={r})", fix=fix)
    leading = {"R_delta": R_delta.shape[:-2], "U": U.shape[:-2], "weights": weights.shape[:-1]}
    arr.broadcast_shapes(where, **{name: tuple(shape) for name, shape in leading.items()})


def _symmetric(M: Array, xp: Any) -> Array:
    """The mean of M and its transpose."""
    return (M + arr.transpose(M, xp)) / 2


def _gram_times(A: Array | None, M: Array, xp: Any) -> Array:
    """K M = A^T A M; identity factors have K = I."""
    return M if A is None else (arr.transpose(A, xp) @ A) @ M


def _common(where: str, adapter: Adapter, **more: tuple[int, ...]) -> tuple[int, ...]:
    shapes = {
        name: tuple(array.shape[:-2]) for name, array in zip(adapter._fields, adapter, strict=True) if array is not None
    }
    return arr.broadcast_shapes(where, **shapes, **more)


def _check(where: str, adapter: Adapter, moments: Moments, xp: Any) -> None:
    arr.check_adapter(where, xp, adapter, identity=True)
    S, P, q = moments
    arr.check_dtype(where, xp, R_delta=adapter.R_delta, S=S, P=P, q=q)
    rows, columns = adapter.R_delta.shape[-2:]
    fix = "use the moments recorded with this adapter; after a change of rank or of B they must be recorded again"
    arr.check_last(where, name="S", array=S, last=(columns, columns), needed=f"(..., {columns}, {columns})", fix=fix)
    arr.check_last(where, name="P", array=P, last=(rows, columns), needed=f"(..., {rows}, {columns})", fix=fix)
    _common(where, adapter, S=tuple(S.shape[:-2]), P=tuple(P.shape[:-2]), q=tuple(q.shape))
