"""Equation 26 in its three readings: each is ||F R_delta||^2 for a matrix F made from what is frozen."""

from __future__ import annotations

from typing import Any

from . import _array as arr
from ._adapter import Adapter

Array = arr.Array
FORMS = ("basis", "routing", "output")


def orthogonality(
    adapter: Adapter, *, form: str = "basis", energy: float = 0.9, normalize: bool = False, xp: Any = None
) -> Array:
    r"""The orthogonality penalty :math:`L_{orth} = \|F R_\delta\|_F^2` of eq. 26.

    ==========  ==============================  ================================================================
    form        F                               L_orth is zero when
    ==========  ==============================  ================================================================
    "basis"     :math:`Q^T`                     R_delta's columns avoid the leading directions of R_old's columns
    "routing"   :math:`R_{old}^T`               R_delta's columns avoid all of R_old's columns
    "output"    :math:`(A R_{old})^T A`         old and new updates are orthogonal in output space, for any A
    ==========  ==============================  ================================================================

    Parameters
    ----------
    adapter : Adapter
    form : {"basis", "routing", "output"}
        "basis": Q holds the fewest leading left singular vectors of R_old whose squared singular values sum to at
        least ``energy`` of all; empty, so the penalty is 0, while R_old = 0.
    energy : float in [0, 1]
        Only for "basis".
    normalize : bool
        Divide by what the penalty would be at most of: ||R_delta||^2 ("basis"), ||R_old||^2 ||R_delta||^2
        ("routing"), ||A R_old||^2 ||A R_delta||^2 ("output"). The result is in [0, 1], and 0 where the divisor is 0.

    Returns
    -------
    array, shape (...)

    Raises
    ------
    OptionError
        Unknown form, or energy outside [0, 1].

    Notes
    -----
    A penalty on R_delta: R_old (and in "output" A) count as constants. Autodiff with respect to R_old through "basis"
    is undefined (singular vectors at equal singular values); use `orthogonality_vjp` or differentiate R_delta alone.
    "basis" needs ``linalg``. With R_old of full rank, "routing" and "output" vanish only at R_delta = 0, and so does
    "basis" with energy=1. Source: arXiv:2502.17920, eq. 26, whose Q is read in these three ways.
    """
    where = "clora_core.orthogonality"
    xp = arr.namespace(where, xp, *adapter)
    F, size, H = _form(where, adapter, form, energy, xp)
    penalty = arr.squared_norm(F @ adapter.R_delta, xp)
    return arr.ratio(penalty, size * arr.squared_norm(H @ adapter.R_delta, xp), xp) if normalize else penalty


def orthogonality_vjp(
    adapter: Adapter,
    grad: Array | None = None,
    *,
    form: str = "basis",
    energy: float = 0.9,
    normalize: bool = False,
    xp: Any = None,
) -> Array:
    r"""Gradient of `orthogonality` with respect to R_delta: :math:`2 F^T F R_\delta`, times ``grad`` (...) if given.

    With ``normalize``, for L = f / (c h) and h = ||H R_delta||^2, it is
    :math:`(2 F^T F R_\delta - (f/h)\, 2 H^T H R_\delta)/(c h)`.

    Returns
    -------
    array, the shape of R_delta (summed over axes along which it was broadcast).
    """
    where = "clora_core.orthogonality_vjp"
    xp = arr.namespace(where, xp, *adapter, grad)
    F, size, H = _form(where, adapter, form, energy, xp)
    R_delta = adapter.R_delta
    arr.check_dtype(where, xp, R_delta=R_delta, grad=grad)
    projected = F @ R_delta
    out = 2 * (arr.transpose(F, xp) @ projected)
    if normalize:
        spread = H @ R_delta
        h = arr.squared_norm(spread, xp)
        share = arr.ratio(arr.squared_norm(projected, xp), h, xp)[..., None, None]
        out = arr.ratio(out - 2 * share * (arr.transpose(H, xp) @ spread), (size * h)[..., None, None], xp)
    if grad is not None:
        arr.broadcast_shapes(where, result=tuple(out.shape[:-2]), grad=tuple(grad.shape))
        out = grad[..., None, None] * out
    return arr.sum_to(out, R_delta.shape, xp)


def _form(where: str, adapter: Adapter, form: str, energy: float, xp: Any) -> tuple[Array, Array, Array]:
    """F of the table above; then c and H of the divisor c ||H R_delta||^2."""
    arr.check_option(where, "form", form, FORMS)
    arr.check_fraction(where, "energy", energy)
    arr.check_adapter(where, xp, adapter)
    A, R_old, R_delta, _ = adapter
    eye = arr.eye_like(R_delta, R_delta.shape[-1], xp)
    if form == "basis":
        U, s, _ = xp.linalg.svd(R_old, full_matrices=False)
        weights = arr.top_energy(s * s, energy, xp)
        return weights[..., :, None] * arr.transpose(U, xp), xp.ones_like(s[..., 0]), eye
    if form == "routing":
        return arr.transpose(R_old, xp), arr.squared_norm(R_old, xp), eye
    old = A @ R_old
    return arr.transpose(old, xp) @ A, arr.squared_norm(old, xp), A
