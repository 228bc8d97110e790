"""Every start leaves the function unchanged, can learn at once, and is the same in every library."""

from typing import Any

import kit
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

import clora_core as core
from clora_core.errors import DTypeError

EAGER = [lane for lane in kit.Lane if not lane.value.jit]

TABLED = ((4, 5, 2), (3, 2, 2), (1, 3, 1))  # JAX compiles for every shape


def start(lane: kit.Lane, scheme: str, shape: tuple[int, int, int], dtype: str, seed: int, **how: Any) -> kit.Ran:
    """init_adapter with a generator of the seed."""
    rng, how = np.random.default_rng(seed), {"dtype": dtype, "scheme": scheme, **how}
    device = lane.value.device
    if "W" not in how:
        value = core.init_adapter(rng, *shape, **how | {"dtype": lane.dtype(dtype)}, device=device, xp=lane.value.xp)
        kit.RAN.add(("init_adapter", lane.value.library))
        kit.check_home("init_adapter", lane.value, value, [dtype])
        return kit.Ran("init_adapter", lane, kit.tree_map(kit.to_numpy, value))
    return kit.run("init_adapter", lane, rng, *shape, **how)


@st.composite
def shapes(draw: Any) -> tuple[int, int, int]:
    """d_out, d_in, rank."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from(TABLED))
    d_out, d_in = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    return d_out, d_in, draw(st.integers(1, min(d_out, d_in)))


@pytest.mark.parametrize("scheme", ["orthonormal", "lora"])
@given(shape=shapes(), seed=st.integers(0, 2**32 - 1), batch=st.sampled_from([(), (2,), (2, 3)]), wide=st.booleans())
def test_drawn_starts(scheme: str, shape: tuple[int, int, int], seed: int, batch: tuple[int, ...], wide: bool) -> None:
    """Same bits everywhere; delta = 0; frames or uniform entries; never a dead start."""
    dtype = "float64" if wide else "float32"
    d_out, d_in, r = shape
    first = None
    for lane in EAGER:
        if dtype not in lane.value.dtypes:
            continue
        with lane.scope():
            ran = start(lane, scheme, shape, dtype, seed, batch=batch)
        first = first or ran.value
        kit.exact(ran, list(first))
    A, R_old, R_delta, B = first
    assert (A.shape, R_old.shape, R_delta.shape, B.shape) == tuple(
        (*batch, *end) for end in ((d_out, r), (r, r), (r, r), (r, d_in))
    )
    assert not R_old.any()
    check_alive(first, seed)
    if scheme == "lora":
        assert not A.any()
        assert (R_delta == np.eye(r)).all()
        assert (np.abs(B) * d_in**0.5 <= 1 + 2 * kit.gamma(2, dtype)).all()
    else:
        assert not R_delta.any()
        check_frames(first, core.bounds.orthonormal)


def check_frames(adapter: core.Adapter, bound: Any) -> None:
    """A and the transpose of B have defects within the bound (plus that of rounding float64 to the dtype)."""
    r, dtype = adapter.A.shape[-1], adapter.A.dtype.name
    for F in (adapter.A, np.swapaxes(adapter.B, -1, -2)):
        gram = oracle.mul(oracle.t(oracle.exact(F)), F) - oracle.exact(np.eye(r))
        limit = bound(F.shape[-2], r, getattr(np, dtype), xp=np)
        assert all(oracle.norm(gram[index]) <= limit for index in np.ndindex(F.shape[:-2]))


def check_alive(adapter: core.Adapter, seed: int) -> None:
    """Some gradient does not vanish, with and without the stop-gradient."""
    shape = core.delta(adapter).shape
    assert not core.delta(adapter).any()
    G = np.random.default_rng(seed).standard_normal(shape).astype(adapter.A.dtype)
    for stop_old in (False, True):
        grads = core.delta_vjp(adapter, G, stop_old=stop_old)
        assert all(any(grad[index].any() for grad in grads) for index in np.ndindex(shape[:-2]))


@given(shape=shapes(), seed=st.integers(0, 2**32 - 1), batch=st.sampled_from([(), (2,)]), wide=st.booleans())
def test_svd_start(shape: tuple[int, int, int], seed: int, batch: tuple[int, ...], wide: bool) -> None:
    """A^T W B^T is diagonal and holds the leading singular values of W; the entry of largest size in A is positive."""
    dtype = "float64" if wide else "float32"
    W = np.random.default_rng(seed + 1).standard_normal((*batch, *shape[:2])).astype(dtype)
    e, r = kit.spectral(max(shape), min(shape[:2]), dtype), shape[2]
    values = np.linalg.svd(W.astype(np.float64), compute_uv=False)[..., :r]
    for lane in EAGER:
        if dtype not in lane.value.dtypes or not lane.value.linalg or (lane.is_jax and shape not in TABLED):
            continue
        ran = start(lane, "svd", shape, dtype, seed, W=W)
        A, R_old, R_delta, B = ran.value
        assert R_old.shape == R_delta.shape == (*batch, r, r)
        kit.exact(ran, [np.zeros_like(R_old)] * 2, lambda v: [v.R_old, v.R_delta])
        check_frames(ran.value, lambda d, r, dtype, xp: e)
        turned = oracle.mul(oracle.t(oracle.exact(A)), W, oracle.t(oracle.exact(B)))
        for index in np.ndindex(batch):
            off = oracle.norm(turned[index] - oracle.exact(np.diag(values[index])))
            assert off <= 4 * e * oracle.norm(W[index])
        assert (np.max(A, axis=-2) >= -np.min(A, axis=-2)).all()
        check_alive(ran.value, seed)


def test_the_core_takes_two_dtypes() -> None:
    """Half precision and integers are refused here as everywhere in the core."""
    for lane in kit.lanes("NUMPY", "TORCH", "JAX_X64"):
        for dtype in ("float16", "int32"):
            with pytest.raises(DTypeError):
                start(lane, "lora", (3, 3, 2), dtype, 0)
