"""Lanes (a library with its device and mode), running a core function in one, and the two ways to compare.

No test has a tolerance of its own: a result is either equal (`exact`) or within a bound of `clora_core.bounds`
(`bounded`). Both record what was compared where; the audit at the end of a whole run reads it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import Enum
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import oracle

import clora_core as core
from clora import testing
from clora.testing._backends import (  # noqa: F401  (the tests have them from here)
    check_home,
    installed,
    leaves,
    split,
    to_numpy,
    traceable,
    tree_map,
)

# Which libraries must be there besides NumPy and array-api-strict: "all", "torch", "jax", or "numpy" for no other.
WANTED = os.environ.get("CLORA_LANES", "all")
torch: Any = None
jax: Any = None
if WANTED in ("all", "torch"):
    import torch
if WANTED in ("all", "jax"):
    import jax

RAN: set[tuple[str, str]] = set()
COMPARED: set[tuple[str, str]] = set()

# Every reason for which a test may be skipped; the run fails on any other.
NO_STUDY = "the study extra is needed"
NO_FRAMEWORK = "PyTorch and JAX are needed"
NO_TORCH = "PyTorch is needed"
NO_JAX = "JAX, optax, flax and equinox are needed"
NO_PEERS = "transformers, accelerate, peft and bitsandbytes are needed"
NO_GPU = "a CUDA device is needed"
NO_SECOND_GPU = "a second CUDA device is needed"
NO_CUPY = "CuPy is needed"
SKIPS: tuple[str, ...] = (NO_GPU, NO_SECOND_GPU, NO_CUPY)
SKIPS += () if WANTED == "all" else (NO_STUDY, NO_FRAMEWORK, NO_TORCH, NO_JAX, NO_PEERS)


LANES = {
    "NUMPY": "numpy",
    "NUMPY_PLAIN": "numpy plain",
    "STRICT": "strict",
    "STRICT_BARE": "strict, no linalg",
    "STRICT_STATIC": "strict, static",
    "STRICT_DEVICE1": "strict, device 1",
    "STRICT_NO_FLOAT64": "strict, no float64",
    "TORCH": "torch",
    "TORCH_EXPLICIT": "torch, xp given",
    "JAX_X64": "jax, 64 bit",
    "JAX_X32": "jax, 32 bit",
    "JIT_X64": "jax, 64 bit, jit",
    "JIT_X32": "jax, 32 bit, jit",
}
LIBRARIES = ("numpy", "strict", *(("torch",) if torch is not None else ()), *(("jax",) if jax is not None else ()))


class _Lane(Enum):
    """A `clora.testing.Backend` by a short name."""

    @property
    def is_jax(self) -> bool:
        """JAX compiles for every new shape, so its lanes run on few shapes."""
        return self.value.few_shapes

    def scope(self) -> Any:
        """The context the lane runs in: flags of strict, precision of JAX."""
        return self.value.scope()

    def dtype(self, name: str) -> Any:
        """The lane's own dtype of that name."""
        return self.value.dtype(name)

    def put(self, array: np.ndarray) -> Any:
        """A copy of a NumPy master in the lane."""
        return self.value.put(array)


FOUND = {backend.name: backend for backend in testing.backends(*LIBRARIES)}
Lane: Any = _Lane("Lane", {name: FOUND[full] for name, full in LANES.items() if full in FOUND})


class Ran(NamedTuple):
    """The result of a function in a lane, as NumPy arrays, with the dtype it had."""

    name: str
    lane: Lane
    value: Any


def run(name: str, lane: Lane, *args: Any, **kwargs: Any) -> Ran:
    """Run a core function in a lane on NumPy masters; its results must live there, and the masters must not change."""
    value = testing.run(name, lane.value, *args, **kwargs)
    RAN.add((name, lane.value.library))
    return Ran(name, lane, value)


def fit(case: testing.Case, linalg: bool = False) -> list[Lane]:
    """The lanes that can run a case."""
    return [lane for lane in Lane if case.fits(lane.value, linalg=linalg)]


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


def has_gpu() -> bool:
    """A CUDA device that some library here can use."""
    return installed("cupy") or (torch is not None and torch.cuda.is_available())


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
