"""Where arrays are. Creation in CuPy goes to the current device, whatever the arguments: verbs make theirs current."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from clora_core.errors import DeviceError, DTypeError, NamespaceError, message

from ._library import cupy

Array = Any
Function = TypeVar("Function", bound=Callable[..., Any])


def here(device: Any) -> Any:
    """The context in which ``device`` (a number or a Device) is the current one; its current stream stays."""
    return cupy.cuda.Device(device)


def place(where: str, arrays: dict[str, Array], device: Any = None) -> Any:
    """The device that all arrays (None is skipped) are on; None if there are none.

    Parameters
    ----------
    arrays : dict
        What a message calls them -> arrays.
    device : cupy.cuda.Device, optional
        Where they must be.

    Raises
    ------
    NamespaceError
        One of them is not of CuPy.
    DeviceError
        They are on several devices, or not on ``device``.
    """
    found: dict[str, Any] = {}
    for name, array in arrays.items():
        if array is None:
            continue
        if not isinstance(array, cupy.ndarray):
            kind = type(array)
            raise NamespaceError(
                message(
                    where,
                    f"{name} is no array of CuPy",
                    got=f"{kind.__module__}.{kind.__qualname__}",
                    needed="cupy.ndarray",
                    cause="data or weights still in NumPy, or in another library",
                    fix="cupy.asarray(...), clora_cupy.stage(batches), or clora_cupy.share for arrays on the GPU",
                )
            )
        found[name] = array.device
    wanted: Any = next(iter(found.values())) if device is None and found else device
    if any(int(there) != int(wanted) for there in found.values()):
        raise DeviceError(
            message(
                where,
                "arrays on several devices" if device is None else "an array on another device than the network",
                got=", ".join(f"{name} on device {int(there)}" for name, there in found.items()),
                needed="one device" if device is None else f"device {int(device)}",
                cause="arrays made while another device was current",
                fix="make them inside `with cupy.cuda.Device(n):`, or copy them inside it by cupy.array(x)",
            )
        )
    return wanted


def is_half(dtype: Any) -> bool:
    """float16."""
    return dtype == cupy.float16


def check_dtype(where: str, dtype: Any, *, name: str, like: Any = None) -> None:
    """float16, float32 or float64; and equal to ``like``, if given."""
    if dtype in (cupy.float16, cupy.float32, cupy.float64) and (like is None or dtype == like):
        return
    raise DTypeError(
        message(
            where,
            f"{name} has a dtype that does not fit",
            got=str(dtype),
            needed="float16, float32 or float64" if like is None else f"{like}, as the weight",
            cause="bfloat16, which is taken by clora_torch and clora_jax only, or another precision than the weight's",
            fix="astype float16 or float32" if like is None else f"{name}.astype({str(like)!r})",
        )
    )


def on_device(method: Function) -> Function:
    """The method, run with ``self.device`` current. Not for context managers: what they enclose is the user's."""

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with here(self.device):
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]
