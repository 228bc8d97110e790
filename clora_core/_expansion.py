"""Routing expansion: growing and shrinking the rank, and experts as blocks of the routing."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _array as arr
from ._adapter import Adapter
from ._frames import fix_signs
from .errors import RankError, ShapeError, message

Array = arr.Array


class Compressed(NamedTuple):
    """What `compress` returns: the adapter of lower rank, and the Frobenius norm (...) of the change of its delta."""

    adapter: Adapter
    error: Array


def expand(adapter: Adapter, A_new: Array, B_new: Array, *, xp: Any = None) -> Adapter:
    r"""Grow the rank by k without changing the function: routing expansion.

    :math:`A' = [A\ A_{new}],\quad B' = [B;\ B_{new}],\quad R' = \mathrm{diag}(R, 0)` for both routings.

    Parameters
    ----------
    adapter : Adapter
    A_new : array, shape (..., d_out, k), k >= 1
    B_new : array, shape (..., k, d_in)
        New directions. Orthogonal to the present factors keeps the factors orthonormal; not required.

    Returns
    -------
    Adapter, rank r + k

    Raises
    ------
    ShapeError, RankError
        New factors that do not chain, or k = 0.

    Notes
    -----
    The delta is the same sum of products plus zeros: identical in exact arithmetic, and within `bounds.delta` in
    floating point (the library may sum in another order). Moments recorded before know nothing of the inputs along
    B_new: pad them only if those rows were observed on the old tasks. Source: arXiv:2502.17920, section 3; the form
    of the expansion is our choice.
    """
    where = "clora_core.expand"
    xp = arr.namespace(where, xp, *adapter, A_new, B_new)
    arr.check_adapter(where, xp, adapter)
    A, R_old, R_delta, B = adapter
    arr.check_dtype(where, xp, A=A, A_new=A_new, B_new=B_new)
    fix = "give as many columns in A_new as rows in B_new"
    arr.check_last(where, name="A_new", array=A_new, last=(A.shape[-2], -1), needed="(..., d_out, k)", fix=fix)
    k = A_new.shape[-1]
    if k < 1:
        raise RankError(
            message(
                where,
                "nothing to expand by",
                got="k = 0 new directions",
                needed="k >= 1",
                cause="an empty slice of spare directions",
                fix="skip the call, or draw new directions",
            )
        )
    arr.check_last(where, name="B_new", array=B_new, last=(k, B.shape[-1]), needed=f"(..., k={k}, d_in)", fix=fix)
    named = {**adapter._asdict(), "A_new": A_new, "B_new": B_new}
    arr.broadcast_shapes(where, **{name: tuple(array.shape[:-2]) for name, array in named.items()})
    return Adapter(
        _concat(where, A, A_new, -1, xp), _pad(R_old, k, xp), _pad(R_delta, k, xp), _concat(where, B, B_new, -2, xp)
    )


def _concat(where: str, first: Array, second: Array, axis: int, xp: Any) -> Array:
    batch = arr.broadcast_shapes(where, present=tuple(first.shape[:-2]), new=tuple(second.shape[:-2]))
    return xp.concat([xp.broadcast_to(array, (*batch, *array.shape[-2:])) for array in (first, second)], axis=axis)


def _pad(R: Array, k: int, xp: Any) -> Array:
    """diag(R, 0_k)"""
    r = R.shape[-1]
    right = xp.zeros((*R.shape[:-2], r, k), dtype=R.dtype, device=arr.device_of(R))
    below = xp.zeros((*R.shape[:-2], k, r + k), dtype=R.dtype, device=arr.device_of(R))
    return xp.concat([xp.concat([R, right], axis=-1), below], axis=-2)


def compress(adapter: Adapter, rank: int, *, xp: Any = None) -> Compressed:
    r"""The best approximation of the delta at a lower rank, with its error stated.

    With thin QR :math:`A = Q_A T_A,\ B^T = Q_B T_B` and SVD :math:`T_A R\, T_B^T = U \Sigma V^T`, keeps the leading
    ``rank``: :math:`A' = Q_A U_k,\ R_{old}' = \Sigma_k,\ R_\delta' = 0,\ B' = V_k^T Q_B^T`.

    Parameters
    ----------
    adapter : Adapter
        R_delta is folded in: compress at a task's boundary.
    rank : int
        1 <= rank <= min(r, d_out, d_in).

    Returns
    -------
    Compressed(adapter, error)
        A' and B' orthonormal, the routing diagonal and descending; error (...) is the Frobenius norm of the change of
        the delta, the root of the sum of the squares of the dropped singular values.

    Raises
    ------
    RankError
        rank outside its range.

    Notes
    -----
    Costs O((d_out + d_in) r^2), never a d_out x d_in product. B moves, so moments recorded before are void. Needs
    ``linalg``. Source: Eckart and Young (1936); Golub and Van Loan, 4th ed., theorem 2.4.8.
    """
    where = "clora_core.compress"
    xp = arr.namespace(where, xp, *adapter)
    arr.check_adapter(where, xp, adapter)
    A, R_old, R_delta, B = adapter
    largest = min(A.shape[-1], A.shape[-2], B.shape[-1])
    if not 1 <= rank <= largest:
        raise RankError(
            message(
                where,
                "the rank to compress to does not fit",
                got=f"rank={rank} from rank {A.shape[-1]} (d_out={A.shape[-2]}, d_in={B.shape[-1]})",
                needed=f"1 <= rank <= {largest}",
                cause="compressing to more than there is",
                fix="give a smaller rank, or use expand to grow",
            )
        )
    Q_A, T_A = xp.linalg.qr(A, mode="reduced")
    Q_B, T_B = xp.linalg.qr(arr.transpose(B, xp), mode="reduced")
    core = (T_A @ (R_old + R_delta)) @ arr.transpose(T_B, xp)
    U, s, Vt = xp.linalg.svd(core, full_matrices=False)
    error = arr.safe_sqrt(xp.sum(s[..., rank:] * s[..., rank:], axis=-1), xp)
    A_k, B_k = fix_signs(Q_A @ U[..., :, :rank], Vt[..., :rank, :] @ arr.transpose(Q_B, xp), xp)
    R_k = s[..., :rank, None] * arr.eye_like(s, rank, xp)
    return Compressed(Adapter(A_k, R_k, xp.zeros_like(R_k), B_k), error)


def block_routing(weights: Array, sizes: tuple[int, ...], *, xp: Any = None) -> Array:
    r"""The routing of a mixture of LoRA experts: :math:`R = \mathrm{diag}(w_1 I_{s_1}, \dots, w_m I_{s_m})`.

    Then :math:`A R B = \sum_i w_i A_i B_i`, A_i the columns and B_i the rows of block i.

    Parameters
    ----------
    weights : array, shape (..., m)
        One weight per expert.
    sizes : sequence of m int >= 1
        Rank of each expert.

    Returns
    -------
    array, shape (..., r, r), r = sum of sizes. No arithmetic, so no rounding.

    Raises
    ------
    ShapeError, RankError
        As many sizes as weights are needed, each at least 1.

    Notes
    -----
    Source: arXiv:2502.17920, eqs. 4-5.
    """
    where = "clora_core.block_routing"
    xp = arr.namespace(where, xp, weights)
    arr.check_dtype(where, xp, weights=weights)
    sizes = tuple(sizes)
    m = weights.shape[-1] if len(weights.shape) else 0
    if m != len(sizes) or m == 0:
        raise ShapeError(
            message(
                where,
                "weights and sizes do not match",
                got=f"weights {tuple(weights.shape)}, {len(sizes)} sizes",
                needed="weights (..., m) and m >= 1 sizes",
                cause="one expert forgotten",
                fix="give one weight and one size for each expert",
            )
        )
    if min(sizes) < 1:
        raise RankError(
            message(
                where,
                "an expert has no rank",
                got=f"sizes {sizes}",
                needed="every size >= 1",
                cause="an empty expert",
                fix="leave that expert and its weight out",
            )
        )
    batch = tuple(weights.shape[:-1])
    row = xp.concat([xp.broadcast_to(weights[..., i : i + 1], (*batch, s)) for i, s in enumerate(sizes)], axis=-1)
    eye = arr.eye_like(weights, sum(sizes), xp)
    return xp.where(eye > 0, row[..., None, :], xp.zeros_like(row)[..., None, :])
