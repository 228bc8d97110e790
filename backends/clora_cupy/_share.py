"""Arrays of PyTorch and JAX on the GPU as CuPy's, and back, through DLPack: the same memory, no copy."""

from __future__ import annotations

import importlib
from typing import Any

from clora_core.errors import DeviceError, DTypeError, NamespaceError, OptionError, message

from ._device import here
from ._library import cupy

LIBRARIES = ("cupy", "torch", "jax")
CUDA = (2, 13)  # DLPack's kDLCUDA and kDLCUDAManaged


def share(tree: Any, to: str = "cupy") -> Any:
    """The same arrays in another library, without a copy.

    Parameters
    ----------
    tree : array, or tuple, list, NamedTuple or dict of arrays
        An `clora_core.Adapter` or `clora_core.Moments`, say; None stays. Of CuPy, PyTorch or JAX, on a GPU. A tensor
        that requires grad is shared as its value, outside of autograd.
    to : {"cupy", "torch", "jax"}

    Returns
    -------
    a tree of the same structure

    Raises
    ------
    OptionError
        An unknown library.
    DeviceError
        An array in the memory of the host, which cannot be had without a copy.
    NamespaceError
        Something that does not speak DLPack, or that a library will not hand over as it is (strides, a sharded array).
    DTypeError
        bfloat16 and other dtypes that CuPy does not take.

    Notes
    -----
    Memory is shared: what one library writes, all see. Nothing in clora writes into arrays, and JAX takes its own for
    constant, so do not write to what is shared with it. Streams are put in order by the protocol: work on the current
    stream of the receiver comes after work on that of the giver, and the host does not wait.
    """
    if to not in LIBRARIES:
        raise OptionError(
            message(
                "clora_cupy.share",
                "unknown library",
                got=repr(to),
                needed="one of " + ", ".join(map(repr, LIBRARIES)),
                cause="a misspelt name",
                fix="pass one of the names listed",
            )
        )
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {key: share(value, to) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        items = [share(value, to) for value in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return _convert(tree, to)


def _convert(array: Any, to: str) -> Any:
    if getattr(array, "requires_grad", False):
        array = array.detach()
    device = _device_of(array)
    if to == "cupy":
        if isinstance(array, cupy.ndarray):
            return array
        receive = cupy.from_dlpack
    else:
        receive = importlib.import_module("torch" if to == "torch" else "jax.dlpack").from_dlpack
    if "bfloat16" in str(getattr(array, "dtype", "")) and "cupy" in (to, type(array).__module__.split(".")[0]):
        raise DTypeError(_no(array, to, "CuPy has no bfloat16 to compute in", "float16, float32, float64, integers"))
    try:
        with here(device):
            return receive(array)
    except (BufferError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        what = f"the array is not handed over: {(str(error).splitlines() or [''])[0][:120]}"
        raise NamespaceError(_no(array, to, what, "a contiguous array, whole on one GPU")) from error


def _device_of(array: Any) -> int:
    if not hasattr(array, "__dlpack_device__"):
        raise NamespaceError(_no(array, "any library", "no array that can be shared", "an array that speaks DLPack"))
    try:
        kind, number = array.__dlpack_device__()
    except (BufferError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise NamespaceError(_no(array, "any library", "the array has no one device", "an array on one GPU")) from error
    if int(kind) not in CUDA:
        text = message(
            "clora_cupy.share",
            "the array is not on a CUDA device",
            got=f"{type(array).__module__}.{type(array).__qualname__} on DLPack device {int(kind)}",
            needed="memory of an NVIDIA GPU",
            cause="a tensor or array still on the host",
            fix="move it first (tensor.cuda(), jax.device_put), or copy it by cupy.asarray",
        )
        raise DeviceError(text)
    return int(number)


def _no(array: Any, to: str, what: str, needed: str) -> str:
    got = f"{type(array).__module__}.{type(array).__qualname__} for {to}"
    cause = "a view with strides, a traced or sharded array, another dtype, or something that is no array"
    return message("clora_cupy.share", what, got=got, needed=needed, cause=cause, fix="make a plain copy of it first")
