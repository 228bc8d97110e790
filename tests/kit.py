"""Lanes (a library with its device and mode), running a core function in one, and the two ways to compare.

No test has a tolerance of its own: a result is either equal (`exact`) or within a bound of `clora_core.bounds`
(`bounded`). Both record what was compared where; the audit at the end of a whole run reads it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from enum import Enum
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

import array_api_compat.numpy
import array_api_strict as strict
import ml_dtypes
import numpy as np
import oracle

import clora_core as core

# Which libraries must be there besides NumPy and array-api-strict: "all", "torch", "jax", or "numpy" for no other.
WANTED = os.environ.get("CLORA_LANES", "all")
torch: Any = None
jax: Any = None
if WANTED in ("all", "torch"):
    import array_api_compat.torch
    import torch
if WANTED in ("all", "jax"):
    import jax
    import jax.numpy as jnp

RAN: set[tuple[str, str]] = set()
COMPARED: set[tuple[str, str]] = set()

# Every reason for which a test may be skipped; the run fails on any other.
NO_STUDY = "the study extra is needed"
NO_FRAMEWORK = "PyTorch and JAX are needed"
NO_TORCH = "PyTorch is needed"
NO_JAX = "JAX, optax, flax and equinox are needed"
NO_PEERS = "transformers, accelerate, peft and bitsandbytes are needed"
SKIPS: tuple[str, ...] = () if WANTED == "all" else (NO_STUDY, NO_FRAMEWORK, NO_TORCH, NO_JAX, NO_PEERS)

StrictArray = type(strict.asarray(0.0))
HALF = {"float16", "bfloat16"}


class Spec(NamedTuple):
    """What a lane is made of; ``explicit`` passes xp, otherwise the core finds the namespace itself."""

    library: str
    xp: Any
    device: Any = None
    dtypes: tuple[str, ...] = ("float32", "float64")
    linalg: bool = True
    flags: tuple[tuple[str, Any], ...] = ()
    jit: bool = False
    explicit: bool = False


class Lane(Enum):
    """A library with its device and mode."""

    NUMPY = Spec("numpy", array_api_compat.numpy)
    NUMPY_PLAIN = Spec("numpy", np, explicit=True)
    STRICT = Spec("strict", strict)
    STRICT_BARE = Spec("strict", strict, linalg=False, flags=(("enabled_extensions", ()),))
    STRICT_STATIC = Spec("strict", strict, flags=(("boolean_indexing", False), ("data_dependent_shapes", False)))
    STRICT_DEVICE1 = Spec("strict", strict, device=strict.Device("device1"), explicit=True)
    STRICT_NO_FLOAT64 = Spec("strict", strict, device=strict.Device("no_float64"), dtypes=("float32",))
    if torch is not None:
        TORCH = Spec("torch", array_api_compat.torch)
        TORCH_EXPLICIT = Spec("torch", array_api_compat.torch, explicit=True)
    if jax is not None:
        JAX_X64 = Spec("jax", jnp)
        JAX_X32 = Spec("jax", jnp, dtypes=("float32",), explicit=True)
        JIT_X64 = Spec("jax", jnp, jit=True, explicit=True)
        JIT_X32 = Spec("jax", jnp, dtypes=("float32",), jit=True, explicit=True)

    @property
    def is_jax(self) -> bool:
        """JAX compiles for every new shape, so its lanes run on few shapes."""
        return self.value.library == "jax"

    def scope(self) -> ExitStack:
        """The context the lane runs in: flags of strict, precision of JAX."""
        stack = ExitStack()
        if self.value.flags:
            stack.enter_context(strict.ArrayAPIStrictFlags(**dict(self.value.flags)))
        if self.is_jax:
            stack.enter_context(jax.enable_x64("float64" in self.value.dtypes))
        return stack

    def dtype(self, name: str) -> Any:
        """The lane's own dtype of that name."""
        if name == "bfloat16" and self.value.library == "numpy":
            return np.dtype(ml_dtypes.bfloat16)
        return getattr(self.value.xp, name)

    def put(self, array: np.ndarray) -> Any:
        """A copy of a NumPy master in the lane."""
        if self.value.library == "torch":
            return torch.asarray(np.array(array))
        if self.value.library == "strict":
            device = self.value.device or strict.Device()
            return strict.asarray(np.array(array), dtype=getattr(strict, array.dtype.name), device=device)
        return self.value.xp.asarray(np.array(array))


class Ran(NamedTuple):
    """The result of a function in a lane, as NumPy arrays, with the dtype it had."""

    name: str
    lane: Lane
    value: Any


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


def to_numpy(array: Any) -> Any:
    """An array of any lane as NumPy (half precision as float64, exactly); a Python number as it is."""
    if isinstance(array, bool | int | float | str):
        return array
    if torch is not None and isinstance(array, torch.Tensor):
        array = array.detach()
        return (array.double() if str(array.dtype).removeprefix("torch.") in HALF else array).numpy()
    if isinstance(array, StrictArray):
        array = array.to_device(strict.Device())
    array = np.asarray(array)
    return array.astype(np.float64) if str(array.dtype) in HALF else array


def resolve(name: str) -> Callable[..., Any]:
    """A core function by its dotted name, looked up when called."""
    target: Any = core
    for part in name.split("."):
        target = getattr(target, part)
    return target


def is_dynamic(value: Any) -> bool:
    """Whether an argument holds arrays (or None in the place of one)."""
    return value is None or any(isinstance(leaf, np.ndarray | np.generic) for leaf in leaves(value))


@cache
def traceable(name: str, layout: tuple[Any, ...], static: tuple[tuple[str, Any], ...], xp: Any) -> Callable[..., Any]:
    """The function of its array arguments alone; ``layout`` holds the others, or a marker or name where arrays go."""
    function, options = resolve(name), dict(static)

    def call(*arrays: Any) -> Any:
        rest = iter(arrays)
        args = [next(rest) if slot is ARRAY else slot for kind, slot in layout if kind == "arg"]
        keywords = {slot: next(rest) for kind, slot in layout if kind == "key"}
        return function(*args, **keywords, **options, xp=xp)

    return call


ARRAY = "an array goes here"


def split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], tuple[Any, ...], tuple[Any, ...]]:
    """Array arguments; the layout of all; static keywords."""
    arrays = [value for value in (*args, *kwargs.values()) if is_dynamic(value)]
    layout = [("arg", ARRAY if is_dynamic(value) else value) for value in args]
    layout += [("key", key) for key, value in kwargs.items() if is_dynamic(value)]
    static = tuple((key, value) for key, value in kwargs.items() if not is_dynamic(value))
    return arrays, tuple(layout), static


@cache
def _jitted(name: str, layout: tuple[Any, ...], static: tuple[Any, ...], lane: Lane) -> Callable[..., Any]:
    return jax.jit(traceable(name, layout, static, lane.value.xp))


def run(name: str, lane: Lane, *args: Any, **kwargs: Any) -> Ran:
    """Run a core function in a lane on NumPy masters; its results must live there, and the masters must not change."""
    if "dtype" in kwargs and name != "plan":
        kwargs["dtype"] = lane.dtype(kwargs["dtype"])
    arrays, layout, static = split(args, kwargs)
    with lane.scope():
        there = [tree_map(lane.put, value) for value in arrays]
        if lane.value.jit:
            value = _jitted(name, layout, static, lane)(*there)
        else:
            value = traceable(name, layout, static, lane.value.xp if lane.value.explicit else None)(*there)
        _check_home(
            name, lane, value, [leaf.dtype.name for leaf in leaves(arrays)], name == "merge" and kwargs.get("dtype")
        )
        if not lane.value.jit:
            for master, copy in zip(leaves(arrays), leaves(there), strict=True):
                assert np.array_equal(master, to_numpy(copy), equal_nan=True), (
                    f"{name} changed its input in {lane.name}"
                )
        RAN.add((name, lane.value.library))
        return Ran(name, lane, tree_map(to_numpy, value))


def _check_home(name: str, lane: Lane, value: Any, dtypes: list[str], cast: Any) -> None:
    """Results have the inputs' library, dtype and device; a ``dtype`` asked for goes to the first result."""
    for i, leaf in enumerate(leaves(value)):
        if isinstance(leaf, bool | int | float | str):
            continue
        where = f"{name} in {lane.name}"
        assert isinstance(leaf, _array_type(lane.value.library)), f"{where} left the library"
        if dtypes:
            want = cast if cast and i == 0 else lane.dtype(dtypes[0])
            assert leaf.dtype == want, f"{where} gave {leaf.dtype}, not {want}"
        if lane.value.device is not None:
            assert leaf.device == lane.value.device, f"{where} left the device"


def _array_type(library: str) -> Any:
    if library == "torch":
        return torch.Tensor
    if library == "jax":
        return jax.Array
    return StrictArray if library == "strict" else np.ndarray | np.generic


def lanes(*names: str) -> list[Lane]:
    """The lanes of these names whose library is there."""
    return [lane for lane in Lane if lane.name in names]


def note(ran: Ran) -> None:
    """Record that a result was compared."""
    COMPARED.add((ran.name, ran.lane.value.library))


def exact(ran: Ran, expected: Any, part: Callable[[Any], Any] = lambda value: value) -> None:
    """The result (or a part of it) equals the expected numbers, every one."""
    for got, want in _pairs(ran, part(ran.value), expected):
        assert all(g == w for g, w in zip(oracle.exact(got).flat, oracle.exact(want).flat, strict=True)), (
            f"{ran.name} in {ran.lane.name} is not equal: {got} against {np.asarray(want, dtype=float)}"
        )


def bounded(ran: Ran, expected: Any, bound: Any, part: Callable[[Any], Any] = lambda value: value) -> None:
    """No number of the result (or of a part of it) is further from the expected one than its bound."""
    bounds = leaves(bound)
    for (got, want), limit in zip(_pairs(ran, part(ran.value), expected), bounds, strict=True):
        error = oracle.exact(np.abs(oracle.exact(got) - oracle.exact(want)))
        limit = np.broadcast_to(oracle.exact(limit), error.shape)
        assert all(e <= b for e, b in zip(error.flat, limit.flat, strict=True)), (
            f"{ran.name} in {ran.lane.name} is off by {_worst(error, limit)} times its bound"
        )


def _pairs(ran: Ran, got: Any, expected: Any) -> list[tuple[Any, Any]]:
    note(ran)
    pairs = list(zip(leaves(got), leaves(expected), strict=True))
    for have, want in pairs:
        assert np.shape(have) == np.shape(want), (
            f"{ran.name} in {ran.lane.name}: {np.shape(have)}, not {np.shape(want)}"
        )
        assert np.all(np.isfinite(have)), f"{ran.name} in {ran.lane.name} is not finite"
    return pairs


def _worst(error: np.ndarray, limit: np.ndarray) -> float:
    return max(float(e / b) if b else float("inf") for e, b in zip(error.flat, limit.flat, strict=True) if e > b)


def at_most(ran: Ran, limit: Any, part: Callable[[Any], Any] = lambda value: value) -> None:
    """Every number of the result is at most ``limit`` in size: for defects."""
    note(ran)
    for got in leaves(part(ran.value)):
        assert all(abs(g) <= Fraction(limit) for g in oracle.exact(got).flat), f"{ran.name} in {ran.lane.name}: {got}"


def spectral(d: int, r: int, dtype: str) -> Fraction:
    """Relative backward error, and defect, of LAPACK's symmetric eigenvalue and singular value decompositions.

    They apply r reflections and then at most 30 sweeps of rotations an eigenvalue (LAPACK's limit), each a unitary
    transformation no less accurate than a reflection: `bounds.orthonormal` of 31 d rows covers all of them.
    """
    return Fraction(core.bounds.orthonormal(31 * max(d, r), r, getattr(np, dtype), xp=np))


def examples(most: int) -> int:
    """For properties whose examples are slow (a compiler runs): no more than these, but in the thorough profile."""
    import hypothesis

    chosen = hypothesis.settings().max_examples
    return chosen if chosen > 1000 else min(most, chosen)


def gamma(k: int, dtype: str) -> Fraction:
    """k roundings in that dtype."""
    return Fraction(core.bounds.gamma(k, core.bounds.unit_roundoff(getattr(np, dtype), np)))


def uncovered() -> list[str]:
    """Public functions that did not run, or were not compared, in two libraries (where they take arrays at all)."""
    out = []
    for name in core.capabilities():
        if name == "capabilities":
            continue  # a table: tests/test_audit.py reads it
        for what, seen in (("run", RAN), ("compared", COMPARED)):
            libraries = sorted(library for function, library in seen if function == name)
            if len(libraries) < 2:
                out.append(f"{name} was {what} in {libraries or 'no library'}; two are needed")
    return out
