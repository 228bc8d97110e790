"""The adapter, its start, and the eager check of its values."""

from __future__ import annotations

from typing import Any, NamedTuple

from array_api_compat import array_namespace

from . import _array as arr
from ._frames import fix_signs, orthonormalize
from .errors import DTypeError, InvalidValueError, OptionError, RankError, message

Array = arr.Array
SCHEMES = ("orthonormal", "lora", "svd")


class Adapter(NamedTuple):
    r"""One C-LoRA adapter: :math:`\Delta W = A\,(R_{old} + R_\delta)\,B`.

    A NamedTuple of arrays, hence a pytree in JAX and in torch with nothing registered. There is no scale: alpha / r
    is folded into A when an adapter is made or imported.

    Attributes
    ----------
    A : array, shape (..., d_out, r)
        Up factor (PEFT's ``lora_B``).
    R_old : array, shape (..., r, r)
        Routing of all finished tasks; frozen.
    R_delta : array, shape (..., r, r)
        Routing of the present task; learned.
    B : array, shape (..., r, d_in)
        Down factor (PEFT's ``lora_A``).

    Notes
    -----
    Leading axes broadcast. A and B may both be None in the life cycle and the memory (`routing`, `begin_task`,
    `end_task`, `empty_moments`, `record`, `drift`, `drift_vjp`): that stands for identity factors, the routing may
    then be rectangular (d_out, d_in), and the adapter is a plain trained matrix such as a classifier head.
    Source: arXiv:2502.17920, eqs. 3-5 and 11-12.
    """

    A: Array
    R_old: Array
    R_delta: Array
    B: Array


def init_adapter(
    rng: Any,
    d_out: int,
    d_in: int,
    rank: int,
    *,
    scheme: str = "orthonormal",
    W: Array | None = None,
    batch: tuple[int, ...] = (),
    dtype: Any = None,
    device: Any = None,
    xp: Any = None,
) -> Adapter:
    r"""A new adapter that leaves the layer's function unchanged and can learn at once.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of randomness. The draw is made in NumPy float64 and rounded once, so that the same generator gives
        the same adapter in every library and on every device.
    d_out, d_in, rank : int
        Sizes; 1 <= rank <= min(d_out, d_in).
    scheme : {"orthonormal", "lora", "svd"}
        "orthonormal": A has orthonormal columns, B orthonormal rows, both uniformly distributed; routing zero.
        "lora": A = 0, R_delta = I, B uniform on +-1/sqrt(d_in) (LoRA's start as PEFT makes it).
        "svd": A and B are the leading singular directions of W (LoRA-XS); routing zero.
    W : array, shape (..., d_out, d_in), optional
        The weight; needed by "svd", otherwise it only supplies default library, dtype and device.
    batch : tuple of int
        Leading axes of every array (stacked layers, experts). For "svd" they are those of W.
    dtype, device, xp
        Of the result. Defaults: those of W; without W float32, the library's default device, NumPy.

    Returns
    -------
    Adapter

    Raises
    ------
    RankError
        rank < 1 or rank > min(d_out, d_in).
    OptionError
        Unknown scheme, or "svd" without W.
    DTypeError, NamespaceError, ShapeError
        See the conventions.

    Notes
    -----
    Every scheme has a non-zero gradient at the start: with the routing zero, dL/dR_delta = A^T G B^T does not vanish;
    with A = 0 and R_delta = I, dL/dA = G B^T does not. Eager only ("svd" needs the ``linalg`` extension of xp).
    """
    where = "clora_core.init_adapter"
    arr.check_option(where, "scheme", scheme, SCHEMES)
    _check_rank(where, rank, d_out, d_in)
    if scheme == "svd" and W is None:
        raise OptionError(
            message(
                where,
                'scheme "svd" needs the weight',
                got="W=None",
                needed="W (..., d_out, d_in)",
                cause="W left out",
                fix="pass W=, or choose another scheme",
            )
        )
    host = array_namespace(rng.standard_normal((0,)))
    if W is None:
        xp = host if xp is None else arr.namespace(where, xp)
    else:
        xp = arr.namespace(where, xp, W)
        arr.check_dtype(where, xp, W=W)
        arr.check_last(where, name="W", array=W, last=(d_out, d_in), needed="(..., d_out, d_in)", fix="transpose W")
        batch = tuple(W.shape[:-2]) if scheme == "svd" else batch
        device = arr.device_of(W) if device is None else device
    if dtype is None:
        dtype = xp.float32 if W is None else W.dtype
    dtype = arr.as_dtype(where, dtype, xp)
    _check_target(where, dtype, xp)

    def put(array: Array) -> Array:
        return xp.asarray(array, dtype=dtype, device=device)

    if scheme == "svd":
        U, _, Vt = xp.linalg.svd(W, full_matrices=False)
        A, B = fix_signs(U[..., :, :rank], Vt[..., :rank, :], xp)
        A, B = xp.astype(A, dtype), xp.astype(B, dtype)
    elif scheme == "lora":
        A = xp.zeros((*batch, d_out, rank), dtype=dtype, device=device)
        B = put(rng.uniform(-(d_in**-0.5), d_in**-0.5, (*batch, rank, d_in)))
    else:
        A = put(orthonormalize(rng.standard_normal((*batch, d_out, rank)), xp=host))
        B = put(host.matrix_transpose(orthonormalize(rng.standard_normal((*batch, d_in, rank)), xp=host)))
    zero = xp.zeros((*batch, rank, rank), dtype=dtype, device=device)
    start = zero + xp.eye(rank, dtype=dtype, device=device) if scheme == "lora" else zero
    return Adapter(A, zero, start, B)


def _check_target(where: str, dtype: Any, xp: Any) -> None:
    if not (dtype == xp.float32 or dtype == xp.float64):
        raise DTypeError(
            message(
                where,
                "the core does not compute in that dtype",
                got=f"dtype={dtype}",
                needed="float32 or float64",
                cause="the dtype of a half-precision layer passed on",
                fix="make the adapter in float32; the framework packages cast half precision at the border",
            )
        )


def _check_rank(where: str, rank: int, d_out: int, d_in: int) -> None:
    if not 1 <= rank <= min(d_out, d_in):
        raise RankError(
            message(
                where,
                "the rank does not fit the layer",
                got=f"rank={rank} for a layer (d_out={d_out}, d_in={d_in})",
                needed=f"1 <= rank <= {min(d_out, d_in)}",
                cause="one rank for all layers, with a small layer (a classifier head) among them",
                fix="lower the rank for this layer, or leave the layer out",
            )
        )


def validate(adapter: Adapter, *, moments: Any = None, name: str = "adapter", xp: Any = None) -> Adapter:
    """Check the values, eagerly: finite, rank within the layer; second moments finite, symmetric and semidefinite.

    Parameters
    ----------
    adapter : Adapter
        Static facts (shapes, dtypes) are checked as everywhere.
    moments : Moments, optional
        The memory that belongs to the adapter.
    name : str
        What to call the adapter in messages (the layer's path).

    Returns
    -------
    Adapter
        The adapter given.

    Raises
    ------
    RankError
        rank > min(d_out, d_in): directions that the product cannot use.
    InvalidValueError
        NaN or infinity; S not symmetric; S with an eigenvalue below ``-4 sqrt(u) r max(abs(S))``; q negative.

    Notes
    -----
    Rounding alone makes eigenvalues of a mean over n rows negative, by about 4 sqrt(n) u of its size (see
    `bounds`); n is not recorded, and 1/u rows are the most whose sum still grows: hence 4 sqrt(u).
    Reads values, so it cannot run under a compiler. Needs the ``linalg`` extension only when moments are given.
    """
    where = f"clora_core.validate({name})"
    xp = arr.namespace(where, xp, *adapter)
    arr.check_adapter(where, xp, adapter, identity=True)
    if adapter.A is not None:
        _check_rank(where, adapter.A.shape[-1], adapter.A.shape[-2], adapter.B.shape[-1])
    for field, array in zip(adapter._fields, adapter, strict=True):
        if array is not None:
            _check_finite(where, field, array, xp)
    if moments is not None:
        S, P, q = moments
        arr.check_dtype(where, xp, R_delta=adapter.R_delta, S=S, P=P, q=q)
        rows, columns = adapter.R_delta.shape[-2:]
        fix = "use the moments recorded with this adapter"
        arr.check_last(where, name="S", array=S, last=(columns, columns), needed="(..., r, r)", fix=fix)
        arr.check_last(where, name="P", array=P, last=(rows, columns), needed="(..., r, r)", fix=fix)
        for field, array in zip(("S", "P", "q"), (S, P, q), strict=True):
            _check_finite(where, field, array, xp)
        if 0 in S.shape or 0 in q.shape:  # a stack of no layers
            return adapter
        eps, size = xp.finfo(S.dtype).eps, columns * xp.max(xp.abs(S))
        skew, lowest = xp.max(xp.abs(S - arr.transpose(S, xp))), xp.min(xp.linalg.eigvalsh(S))
        if bool(skew > eps * size) or bool(lowest < -((8 * eps) ** 0.5) * size):
            _raise_moment(where, "S is not a symmetric positive semidefinite matrix")
        if bool(xp.any(q < 0)):
            _raise_moment(where, "q is negative")
    return adapter


def _check_finite(where: str, field: str, array: Array, xp: Any) -> None:
    if not bool(xp.all(xp.isfinite(array))):
        raise InvalidValueError(
            message(
                where,
                f"{field} holds values that are not finite",
                got="NaN or infinity",
                needed="finite numbers",
                cause="a diverged training step, or a batch with NaN that was observed",
                fix="go back to the last good state, lower the learning rate, and check the data",
            )
        )


def _raise_moment(where: str, what: str) -> None:
    raise InvalidValueError(
        message(
            where,
            what,
            got="moments that no data can give",
            needed="S = sum of means of u u^T, q = sum of traces of squares",
            cause="moments edited by hand, or of another adapter, or a file damaged",
            fix="record the moments again, or load them from an intact copy",
        )
    )
