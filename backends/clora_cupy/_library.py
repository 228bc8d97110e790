"""CuPy itself, with a device to run on; or an error that says what is missing and what runs instead."""

from __future__ import annotations

import importlib
from typing import Any

from clora_core.errors import MissingDependencyError, message

LEAST = 13
NEEDED = "CuPy 13 or newer with CUDA's libraries, and an NVIDIA GPU with its driver"
TOOLKIT = (
    "python -m pip install 'cupy-cuda12x[ctk]' or 'cupy-cuda13x[ctk]' (from CuPy 14 on), or the CUDA toolkit itself"
)
INSTALL = "python -m pip install 'clora[cupy12]' for CUDA 12 (cupy-cuda12x), 'clora[cupy13]' for CUDA 13 (cupy-cuda13x)"
INSTEAD = "without a GPU, import clora_numpy, which has the same verbs on the CPU"


def load() -> Any:
    """The module ``cupy``, after a look for a device and for the libraries that its wheels do not hold."""
    try:
        cupy = importlib.import_module("cupy")
    except ModuleNotFoundError as error:
        if error.name == "cupy":
            raise _missing("CuPy is not installed", "no module cupy", "an install without the extra", INSTALL) from None
        raise _broken(error) from error
    except ImportError as error:
        raise _broken(error) from error
    version = str(cupy.__version__)
    if int(version.split(".")[0]) < LEAST:
        raise _missing("CuPy is too old", f"CuPy {version}", "an old environment", INSTALL)
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except RuntimeError as error:  # CuPy's CUDARuntimeError is one
        got, cause, fix = _without(cupy)
        raise _missing("CuPy finds no device", f"CuPy {version}, {got} ({_line(error)})", cause, fix) from error
    if count < 1:
        fix = "make one visible"
        raise _missing("CuPy finds no device", f"CuPy {version}, 0 devices", "CUDA_VISIBLE_DEVICES hides them", fix)
    try:
        _libraries(cupy)
    except (ImportError, OSError, RuntimeError) as error:
        cause = "a wheel of CuPy without the toolkit"
        raise _missing("a library of CUDA is not there", f"CuPy {version}, {_line(error)}", cause, TOOLKIT) from error
    return cupy


def _libraries(cupy: Any) -> None:
    """Products, decompositions and kernels each need one; CuPy loads them at first use."""
    importlib.import_module("cupy.cublas")
    _ = cupy.cuda.cusolver
    cupy.cuda.nvrtc.getVersion()


def _without(cupy: Any) -> tuple[str, str, str]:
    """What there is in place of a device, the usual cause, the fix."""
    try:
        driver = cupy.cuda.runtime.driverGetVersion()
    except RuntimeError:
        driver = 0
    if driver == 0:
        return "no NVIDIA driver", "a machine or container without a GPU", "install the driver, or pass the GPU through"
    name = f"a driver for CUDA {driver // 1000}.{driver % 1000 // 10}"
    cause = "a driver older than the wheel of CuPy, or devices that are hidden"
    return name, cause, f"update the driver, or the other wheel: {INSTALL}; or unset CUDA_VISIBLE_DEVICES"


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:120]


def _broken(error: ImportError) -> MissingDependencyError:
    cause = "two CuPy wheels side by side, or a wheel for another CUDA"
    return _missing("CuPy does not import", _line(error), cause, f"uninstall every cupy package, then {INSTALL}")


def _missing(what: str, got: str, cause: str, fix: str) -> MissingDependencyError:
    return MissingDependencyError(
        message("clora_cupy", what, got=got, needed=NEEDED, cause=cause, fix=f"{fix}; {INSTEAD}")
    )


cupy: Any = load()
