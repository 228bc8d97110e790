"""Namespaces, static checks and the array helpers that the mathematics shares. Nothing here reads values of arrays."""

from __future__ import annotations

from types import ModuleType
from typing import Any, TypeAlias

from array_api_compat import array_namespace

from .errors import DTypeError, NamespaceError, OptionError, RankError, ShapeError, message

Array: TypeAlias = Any
Shape: TypeAlias = tuple[int, ...]
FLOATS = ("float64", "float32", "bfloat16", "float16")

# A memo: the namespace is a function of the array's type, and finding it costs more than a small product.
_NAMESPACES: dict[type, Any] = {}


def namespace(where: str, xp: ModuleType | None, *arrays: Array) -> Any:
    """The Array API namespace to compute in: ``xp`` if given, else the one all ``arrays`` share (None is skipped)."""
    if xp is not None:
        if xp.__name__ == "torch":
            raise NamespaceError(
                message(
                    where,
                    "plain torch is not an Array API namespace",
                    got="xp=torch",
                    needed="xp=array_api_compat.torch",
                    cause="torch itself lacks a few names of the standard",
                    fix="import array_api_compat.torch and pass that, or leave xp out",
                )
            )
        return xp
    kind = type(arrays[0])
    for array in arrays:
        if type(array) is not kind and array is not None:
            break
    else:
        if kind in _NAMESPACES:
            return _NAMESPACES[kind]
        arrays = arrays[:1]
    try:
        found = array_namespace(*arrays)
    except TypeError as error:
        raise NamespaceError(
            message(
                where,
                "the arguments are not arrays of one library",
                got=", ".join(_library(array) for array in arrays),
                needed="arrays of a single Array API library",
                cause="a list, or arrays of two libraries, in one call",
                fix="convert them all to one library first (its asarray or from_dlpack)",
            )
        ) from error
    if len(arrays) == 1:
        _NAMESPACES.update({kind: found})
    return found


def _library(array: Array) -> str:
    return f"{type(array).__module__}.{type(array).__qualname__}"


def check_dtype(where: str, xp: Any, **arrays: Array) -> None:
    """All given arrays (None is skipped) have one dtype, float32 or float64."""
    first = None
    for array in arrays.values():
        if array is None:
            continue
        dtype = getattr(array, "dtype", None)
        if first is None:
            first = dtype
            good = dtype is not None and (dtype == xp.float32 or dtype == xp.float64)
        else:
            good = dtype == first
        if not good:
            _raise_dtype(where, arrays)


def one_dtype(xp: Any, first: Array, *others: Array) -> bool:
    """What `check_dtype` checks, without names: quick where all is well."""
    dtype = getattr(first, "dtype", None)
    if dtype is None or not (dtype == xp.float32 or dtype == xp.float64):
        return False
    for other in others:
        if other is not None:
            its = getattr(other, "dtype", None)
            if its is not dtype and its != dtype:
                return False
    return True


def _raise_dtype(where: str, arrays: dict[str, Array]) -> None:
    present = {name: array for name, array in arrays.items() if array is not None}
    strangers = [name for name, array in present.items() if not hasattr(array, "dtype")]
    if strangers:
        raise NamespaceError(
            message(
                where,
                "the arguments are not arrays",
                got=", ".join(f"{name}: {_library(present[name])}" for name in strangers),
                needed="arrays of a single Array API library",
                cause="a list or a Python number where an array belongs",
                fix="convert with the library's asarray",
            )
        )
    raise DTypeError(
        message(
            where,
            "the dtypes do not fit",
            got=", ".join(f"{name}: {array.dtype}" for name, array in present.items()),
            needed="float32 throughout, or float64 throughout",
            cause="integer or half-precision arrays, or two precisions in one call",
            fix="cast all of them to one of the two (half precision is cast at the border by the framework packages)",
        )
    )


def check_adapter(where: str, xp: Any, adapter: Any, *, identity: bool = False) -> None:
    """The four arrays chain: A (..., d_out, r), R_old and R_delta (..., r, r), B (..., r, d_in), r >= 1, one dtype.

    With ``identity``, A and B may both be None (identity factors); the routing may then be rectangular.
    """
    A, R_old, R_delta, B = adapter
    if R_old is None or R_delta is None:
        raise NamespaceError(
            message(
                where,
                "a routing is missing",
                got=", ".join(
                    f"{n} {'None' if R is None else 'given'}" for n, R in (("R_old", R_old), ("R_delta", R_delta))
                ),
                needed="arrays R_old and R_delta",
                cause="an adapter put together by hand",
                fix="pass zeros for the one that holds nothing",
            )
        )
    if A is None or B is None:
        if not identity or A is not B:
            raise ShapeError(
                message(
                    where,
                    "a factor is missing",
                    got=f"A {'None' if A is None else 'given'}, B {'None' if B is None else 'given'}",
                    needed="both factors" + (", or None for both (identity factors)" if identity else ""),
                    cause="an adapter with identity factors, which only the life cycle and the memory take",
                    fix="pass an Adapter with arrays A and B",
                )
            )
        check_dtype(where, xp, R_old=R_old, R_delta=R_delta)
        old, new = tuple(R_old.shape), tuple(R_delta.shape)
        if min(len(old), len(new)) < 2 or old[-2:] != new[-2:] or min(old[-2:]) < 1:
            _raise_adapter(where, adapter)
        broadcast_shapes(where, R_old=old[:-2], R_delta=new[:-2])
        return
    if not one_dtype(xp, A, R_old, R_delta, B):
        check_dtype(where, xp, A=A, R_old=R_old, R_delta=R_delta, B=B)
    a, old, new, b = A.shape, R_old.shape, R_delta.shape, B.shape
    if len(a) == len(old) == len(new) == len(b) == 2 and old == new == (a[1], b[0]) and a[1] == b[0] >= 1:
        return
    if min(len(a), len(old), len(new), len(b)) < 2:
        _raise_adapter(where, adapter)
    r = a[-1]
    if not (r >= 1 and r == old[-2] and r == old[-1] and r == new[-2] and r == new[-1] and r == b[-2]):
        _raise_adapter(where, adapter)
    if max(len(a), len(old), len(new), len(b)) > 2:
        broadcast_shapes(where, A=a[:-2], R_old=old[:-2], R_delta=new[:-2], B=b[:-2])


def _raise_adapter(where: str, adapter: Any) -> None:
    got = ", ".join(
        f"{name} {None if array is None else tuple(array.shape)}"
        for name, array in zip(("A", "R_old", "R_delta", "B"), adapter, strict=True)
    )
    A, R_old = adapter[0], adapter[1]
    if A is not None and len(A.shape) >= 2 and (A.shape[-1] == 0 or (len(R_old.shape) >= 2 and R_old.shape[-1] == 0)):
        raise RankError(
            message(
                where,
                "the rank is 0",
                got=got,
                needed="rank r >= 1",
                cause="slicing factors to nothing",
                fix="use a rank of at least 1, or no adapter at all",
            )
        )
    raise ShapeError(
        message(
            where,
            "the adapter's shapes do not chain",
            got=got,
            needed="A (..., d_out, r), R_old (..., r, r), R_delta (..., r, r), B (..., r, d_in)",
            cause="a factor transposed, or A and B swapped (PEFT's lora_A is B here)",
            fix="transpose or swap so that A @ R @ B has the shape of the weight (d_out, d_in)",
        )
    )


def check_last(where: str, *, name: str, array: Array, last: Shape, needed: str, fix: str) -> None:
    """The trailing axes of ``array`` are ``last`` (-1 accepts any size)."""
    shape = tuple(array.shape)
    good = len(shape) >= len(last)
    for have, want in zip(reversed(shape), reversed(last), strict=False):
        good = good and want in (-1, have)
    if not good:
        raise ShapeError(
            message(
                where,
                f"{name} does not fit the adapter",
                got=f"{name} {shape}",
                needed=f"{name} {needed}",
                cause="a transposed array, a missing row axis, or the adapter of another layer",
                fix=fix,
            )
        )


def as_dtype(where: str, dtype: Any, xp: Any) -> Any:
    """The library's dtype for a dtype or the name of one."""
    found = dtype
    if isinstance(dtype, str):
        found = getattr(xp, dtype, None) if dtype in FLOATS else None
    if found is None:
        raise DTypeError(
            message(
                where,
                "the library has no such dtype",
                got=f"dtype={dtype!r}",
                needed="one of " + ", ".join(FLOATS) + " that the library has, or the dtype itself",
                cause="a misspelt name, or bfloat16 on NumPy, which has it only through ml_dtypes",
                fix="pass the dtype itself, for instance ml_dtypes.bfloat16",
            )
        )
    return found


def check_covers(where: str, name: str, array: Array, *others: Array | None, bias: Array | None = None) -> None:
    """The leading axes of all ``others`` (None is skipped) broadcast to those of ``array``, a gradient of a result."""
    stacked = [tuple(other.shape[:-2]) for other in others if other is not None and len(other.shape) > 2]
    if bias is not None and len(bias.shape) > 1:
        stacked.append(tuple(bias.shape[:-1]))
    lead = tuple(array.shape[:-2])
    if stacked and broadcast_shapes(where, **{name: lead}, inputs=_joint(where, stacked)) != lead:
        raise ShapeError(
            message(
                where,
                f"{name} lacks leading axes",
                got=f"{name} with leading axes {lead}, inputs with {_joint(where, stacked)}",
                needed=f"{name} of the shape of the result it is the gradient of",
                cause="a gradient summed or averaged over a stack of layers or a batch",
                fix=f"pass {name} as the loss gave it, one matrix for each of the result",
            )
        )


def _joint(where: str, shapes: list[Shape]) -> Shape:
    return broadcast_shapes(where, **{f"input {i}": shape for i, shape in enumerate(shapes)})


def check_option(where: str, name: str, value: object, options: tuple[object, ...]) -> None:
    """``value`` is one of ``options``."""
    if value not in options:
        raise OptionError(
            message(
                where,
                f"unknown {name}",
                got=repr(value),
                needed="one of " + ", ".join(map(repr, options)),
                cause="a misspelt name",
                fix=f"pass one of the names listed as {name}",
            )
        )


def check_fraction(where: str, name: str, value: float) -> None:
    """A Python number in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise OptionError(
            message(
                where,
                f"{name} is not a fraction",
                got=repr(value),
                needed=f"0 <= {name} <= 1",
                cause="a percentage, or a count",
                fix=f"pass the share of the energy to keep, for instance {name}=0.9",
            )
        )


def broadcast_shapes(where: str, **shapes: Shape) -> Shape:
    """The common broadcast of leading axes, or a ShapeError that names each."""
    out: list[int] = []
    for k in range(1, max(len(shape) for shape in shapes.values()) + 1):
        size = 1
        for shape in shapes.values():
            here = shape[-k] if k <= len(shape) else 1
            if here != 1 and size not in (1, here):
                raise ShapeError(
                    message(
                        where,
                        "the leading axes do not broadcast",
                        got=", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items()),
                        needed="leading axes equal, or 1, or absent",
                        cause="stacks of layers or experts of different lengths",
                        fix="add or repeat axes so that they broadcast",
                    )
                )
            size = here if here != 1 else size
        out.append(size)
    return tuple(reversed(out))


def device_of(array: Array) -> Any:
    """The array's device; None where it has none to tell (a JAX tracer), which lets the library choose."""
    return getattr(array, "device", None)


def eye_like(array: Array, n: int, xp: Any) -> Array:
    """Identity (n, n) with the dtype and device of ``array``."""
    return xp.eye(n, dtype=array.dtype, device=device_of(array))


def transpose(array: Array, xp: Any) -> Array:
    """The last two axes swapped. ``.mT`` is left alone: not every library has it."""
    return array.T if array.ndim == 2 else xp.matrix_transpose(array)


def squared_norm(array: Array, xp: Any) -> Array:
    """Squared Frobenius norm over the last two axes."""
    return xp.sum(array * array, axis=(-2, -1))


def safe_sqrt(square: Array, xp: Any) -> Array:
    """Square root with derivative 0 instead of infinity at 0."""
    positive = square > 0
    one = xp.ones_like(square)
    return xp.where(positive, xp.sqrt(xp.where(positive, square, one)), xp.zeros_like(square))


def ratio(numerator: Array, denominator: Array, xp: Any) -> Array:
    """numerator / denominator, and 0 where the denominator is 0, with finite derivatives everywhere."""
    positive = denominator > 0
    safe = xp.where(positive, denominator, xp.ones_like(denominator))
    return xp.where(positive, numerator / safe, xp.zeros_like(numerator))


def sum_to(array: Array, shape: Shape, xp: Any) -> Array:
    """Sum over the axes along which ``shape`` was broadcast to the shape of ``array`` (adjoint of broadcasting)."""
    shape = tuple(shape)
    if tuple(array.shape) == shape:
        return array
    extra = len(array.shape) - len(shape)
    axes = tuple(range(extra)) + tuple(
        extra + i for i, size in enumerate(shape) if size == 1 and array.shape[extra + i] != 1
    )
    if axes:
        array = xp.sum(array, axis=axes)
    return xp.reshape(array, shape)


def top_energy(energies: Array, energy: float, xp: Any) -> Array:
    """0/1 weights of the fewest leading entries (descending, non-negative) whose sum is at least ``energy`` of all."""
    r = energies.shape[-1]
    # Sums over a triangle: array-api-compat looks for its namespace in cumulative_sum, of which torch.compile warns.
    square = xp.broadcast_to(energies[..., None, :], (*energies.shape[:-1], r, r))
    before, total = xp.sum(xp.tril(square, k=-1), axis=-1), xp.sum(energies, axis=-1, keepdims=True)
    keep = (before < energy * total) & (energies > 0)
    return xp.where(keep, xp.ones_like(energies), xp.zeros_like(energies))
