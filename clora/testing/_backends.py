"""Array libraries with their device and mode, and how one function of the core is run in them on NumPy masters."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

import clora_core as core

Array = Any
HALF = {"float16", "bfloat16"}
LIBRARIES = ("numpy", "strict", "torch", "jax", "cupy")


def to_numpy(array: Any) -> Any:
    """An array of any of these libraries as NumPy (half precision as float64, exactly); a Python number as it is."""
    if isinstance(array, bool | int | float | str):
        return array
    if hasattr(array, "detach"):  # torch
        array = array.detach().cpu()
        return (array.double() if str(array.dtype).removeprefix("torch.") in HALF else array).numpy()
    if hasattr(array, "to_device") and type(array).__module__.startswith("array_api_strict"):
        array = array.to_device(type(array.device)())
    array = array.get() if hasattr(array, "get") else np.asarray(array)
    return array.astype(np.float64) if str(array.dtype) in HALF else array


@dataclass(frozen=True)
class Backend:
    """A library with its device and mode: all that the suite needs to know of it.

    Attributes
    ----------
    name : str
        What reports call it.
    xp : namespace
        Of the Array API, as `array_api_compat` gives it.
    put : callable
        ``put(master) -> array``: a copy of a NumPy array there, of the same dtype.
    get : callable
        ``get(array) -> numpy.ndarray``: the way back; half precision as float64.
    library : str
        What several backends of one library have in common; by default the name.
    kind : type or tuple of types, optional
        Of the library's arrays: results that are of another have left the library.
    device : optional
        On which ``put`` puts; results that are elsewhere have left it.
    dtypes : tuple of {"float32", "float64"}
    linalg : bool
        Has the ``linalg`` extension.
    explicit : bool
        Pass ``xp=``; otherwise the core finds the namespace itself.
    compile : callable, optional
        ``compile(function) -> function``, a compiler to run everything under.
    few_shapes : bool
        Every new shape is expensive (it is compiled): only the shapes of a table are run.
    scope : callable
        ``scope() -> context manager`` around everything that runs.
    """

    name: str
    xp: Any
    put: Callable[[np.ndarray], Array]
    get: Callable[[Array], Any] = to_numpy
    library: str = ""
    kind: Any = object
    device: Any = None
    dtypes: tuple[str, ...] = ("float32", "float64")
    linalg: bool = True
    explicit: bool = True
    compile: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
    few_shapes: bool = False
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __post_init__(self) -> None:
        object.__setattr__(self, "library", self.library or self.name)
        object.__setattr__(self, "dtypes", tuple(self.dtypes))

    @property
    def jit(self) -> bool:
        """Runs under a compiler, which no eager function does."""
        return self.compile is not None

    def dtype(self, name: str) -> Any:
        """The library's own dtype of that name."""
        if name == "bfloat16" and self.library == "numpy":
            import ml_dtypes

            return np.dtype(ml_dtypes.bfloat16)
        return getattr(self.xp, name)


def backends(*libraries: str) -> list[Backend]:
    """The backends of these libraries, or of all that are installed: NumPy, array-api-strict, PyTorch, JAX, CuPy.

    CuPy counts as installed where it finds a device. array-api-strict comes with a second device, without the linalg
    extension, without data-dependent shapes and without float64; JAX in 64 and 32 bits, eager and compiled.
    """
    makers = {"numpy": _numpy, "strict": _strict, "torch": _torch, "jax": _jax, "cupy": _cupy}
    wanted = libraries or tuple(library for library in LIBRARIES if installed(library))
    return [backend for library in wanted for backend in makers[library]()]


def installed(library: str) -> bool:
    """Whether a library can be used here."""
    module = {"strict": "array_api_strict"}.get(library, library)
    if importlib.util.find_spec(module) is None:
        return False
    if library != "cupy":
        return True
    import cupy  # pyright: ignore[reportMissingImports]

    try:
        return cupy.cuda.runtime.getDeviceCount() > 0
    except cupy.cuda.runtime.CUDARuntimeError:  # no driver
        return False


def _numpy() -> list[Backend]:
    import array_api_compat.numpy as compat

    how: dict[str, Any] = {"put": np.array, "library": "numpy", "kind": (np.ndarray, np.generic)}
    return [Backend("numpy", compat, **how, explicit=False), Backend("numpy plain", np, **how)]


def _strict() -> list[Backend]:
    import array_api_strict as strict

    def put(device: Any, array: np.ndarray) -> Array:
        return strict.asarray(np.array(array), dtype=getattr(strict, array.dtype.name), device=device)

    def make(name: str, device: Any = None, flags: dict[str, Any] | None = None, **how: Any) -> Backend:
        scope = partial(strict.ArrayAPIStrictFlags, **flags) if flags else nullcontext
        home = device or strict.Device()
        how |= {"library": "strict", "kind": type(strict.asarray(0.0)), "device": home, "scope": scope}
        return Backend(name, strict, partial(put, home), **how)

    return [
        make("strict", explicit=False),
        make("strict, no linalg", flags={"enabled_extensions": ()}, linalg=False, explicit=False),
        make("strict, static", flags={"boolean_indexing": False, "data_dependent_shapes": False}, explicit=False),
        make("strict, device 1", strict.Device("device1")),
        make("strict, no float64", strict.Device("no_float64"), dtypes=("float32",), explicit=False),
    ]


def _torch() -> list[Backend]:
    import array_api_compat.torch as compat
    import torch

    def make(name: str, device: str, explicit: bool) -> Backend:
        def put(array: np.ndarray) -> Array:
            return torch.asarray(np.array(array), device=device)

        where = torch.device("cuda", 0) if device == "cuda" else None
        return Backend(name, compat, put, library="torch", kind=torch.Tensor, device=where, explicit=explicit)

    cuda = [make("torch, cuda", "cuda", True)] if torch.cuda.is_available() else []
    return [make("torch", "cpu", False), make("torch, xp given", "cpu", True), *cuda]


def _jax() -> list[Backend]:
    import jax
    import jax.numpy as jnp

    def make(name: str, wide: bool, compiled: bool, explicit: bool) -> Backend:
        def scope() -> ExitStack:
            stack = ExitStack()
            stack.enter_context(jax.enable_x64(wide))
            # On a GPU float32 products default to TF32, which no bound for float32 covers.
            stack.enter_context(jax.default_matmul_precision("highest"))
            return stack

        return Backend(
            name if jax.default_backend() == "cpu" else f"{name}, {jax.default_backend()}",
            jnp,
            lambda array: jnp.asarray(np.array(array)),
            library="jax",
            kind=jax.Array,
            device=jax.devices()[0],
            dtypes=("float32", "float64") if wide else ("float32",),
            explicit=explicit,
            compile=jax.jit if compiled else None,
            few_shapes=True,
            scope=scope,
        )

    return [
        make("jax, 64 bit", wide=True, compiled=False, explicit=False),
        make("jax, 32 bit", wide=False, compiled=False, explicit=True),
        make("jax, 64 bit, jit", wide=True, compiled=True, explicit=True),
        make("jax, 32 bit, jit", wide=False, compiled=True, explicit=True),
    ]


def _cupy() -> list[Backend]:
    import array_api_compat.cupy as compat
    import cupy  # pyright: ignore[reportMissingImports]

    return [Backend("cupy", compat, cupy.asarray, kind=cupy.ndarray, explicit=False)]


# --- running ---------------------------------------------------------------------------------------------------


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply to the leaves of tuples, lists and NamedTuples; None stays."""
    if isinstance(tree, tuple | list):
        items = [tree_map(function, item) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return None if tree is None else function(tree)


def leaves(tree: Any) -> list[Any]:
    """The leaves of a tree without None."""
    if isinstance(tree, tuple | list):
        return [leaf for item in tree for leaf in leaves(item)]
    return [] if tree is None else [tree]


def resolve(name: str) -> Callable[..., Any]:
    """A core function by its dotted name, looked up when called."""
    target: Any = core
    for part in name.split("."):
        target = getattr(target, part)
    return target


ARRAY = "an array goes here"


class Seed(int):
    """Stands for a NumPy generator of that seed, made anew for every call."""


def is_dynamic(value: Any) -> bool:
    """Whether an argument holds arrays (or None in the place of one)."""
    return value is None or any(isinstance(leaf, np.ndarray | np.generic) for leaf in leaves(value))


def split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], tuple[Any, ...], tuple[Any, ...]]:
    """Array arguments; the layout of all; static keywords."""
    arrays = [value for value in (*args, *kwargs.values()) if is_dynamic(value)]
    layout = [("arg", ARRAY if is_dynamic(value) else value) for value in args]
    layout += [("key", key) for key, value in kwargs.items() if is_dynamic(value)]
    static = tuple((key, value) for key, value in kwargs.items() if not is_dynamic(value))
    return arrays, tuple(layout), static


@cache
def traceable(name: str, layout: tuple[Any, ...], static: tuple[tuple[str, Any], ...], xp: Any) -> Callable[..., Any]:
    """The function of its array arguments alone; ``layout`` holds the others, or a marker or name where arrays go."""
    function, options = resolve(name), dict(static)

    def call(*arrays: Any) -> Any:
        rest = iter(arrays)
        args = [next(rest) if slot is ARRAY else slot for kind, slot in layout if kind == "arg"]
        args = [np.random.default_rng(slot) if isinstance(slot, Seed) else slot for slot in args]
        keywords = {slot: next(rest) for kind, slot in layout if kind == "key"}
        return function(*args, **keywords, **options, xp=xp)

    return call


@cache
def _compiled(name: str, layout: tuple[Any, ...], static: tuple[Any, ...], backend: Backend) -> Callable[..., Any]:
    assert backend.compile is not None
    return backend.compile(traceable(name, layout, static, backend.xp))


def run(name: str, backend: Backend, *args: Any, **kwargs: Any) -> Any:
    """Run a core function in a backend on NumPy masters; return its result in NumPy arrays.

    Parameters
    ----------
    name : str
        Dotted name below ``clora_core``.
    backend : Backend
    args, kwargs
        Of the function: trees of NumPy arrays, and whatever else it takes. ``dtype`` is a name.

    Raises
    ------
    AssertionError
        A result is of another library, dtype or device than the inputs, or an input was written to.
    """
    cast = kwargs.get("dtype") if name == "merge" else None
    if "dtype" in kwargs and name != "plan":
        kwargs["dtype"] = backend.dtype(kwargs["dtype"])
        cast = kwargs["dtype"] if cast else None
    arrays, layout, static = split(args, kwargs)
    with backend.scope():
        there = [tree_map(backend.put, value) for value in arrays]
        if backend.compile is not None and arrays:
            value = _compiled(name, layout, static, backend)(*there)
        else:
            value = traceable(name, layout, static, backend.xp if backend.explicit else None)(*there)
        check_home(name, backend, value, [leaf.dtype.name for leaf in leaves(arrays)], cast)
        if backend.compile is None:
            for master, copy in zip(leaves(arrays), leaves(there), strict=True):
                assert np.array_equal(master, backend.get(copy), equal_nan=True), (
                    f"{name} changed its input in {backend.name}"
                )
        return tree_map(partial(fetch, backend), value)


def fetch(backend: Backend, leaf: Any) -> Any:
    """A result's leaf in NumPy; a Python number as it is."""
    return leaf if isinstance(leaf, bool | int | float | str) else backend.get(leaf)


def check_home(name: str, backend: Backend, value: Any, dtypes: Iterable[str], cast: Any = None) -> None:
    """Results have the inputs' library, dtype and device; a dtype asked for (``cast``) goes to the first result."""
    dtypes = list(dtypes)
    for i, leaf in enumerate(leaves(value)):
        where = f"{name} in {backend.name}"
        if not dtypes and isinstance(leaf, bool | int | float | str):  # of Python numbers, a Python number
            continue
        assert isinstance(leaf, backend.kind), f"{where} left the library"
        if dtypes:
            want = cast if cast is not None and i == 0 else backend.dtype(dtypes[0])
            dtype = getattr(leaf, "dtype", None)  # a number has none
            assert dtype == want, f"{where} gave {dtype}, not {want}"
        if backend.device is not None:
            assert leaf.device == backend.device, f"{where} left the device"
