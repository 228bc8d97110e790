"""Where a layer tells what it was given: an identity whose derivative by a tap is the second moment of the rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from jax import Array, lax

Tap = tuple[Array, Array]  # sum of u u^T, number of rows; zeros where it is put in
PADDING: ContextVar[Array | None] = ContextVar("padding", default=None)
MASKED: ContextVar[list[str] | None] = ContextVar("masked", default=None)


@contextmanager
def padding(mask: Array | None) -> Iterator[None]:
    """Within a forward pass that is observed: rows where ``mask`` is 0 are padding, and not remembered.

    A layer whose input has the mask's shape and one axis more is masked by it.
    """
    token = PADDING.set(mask)
    try:
        yield
    finally:
        PADDING.reset(token)


def observed(y: Array, x: Array, B: Array | None, tap: Tap, *, name: str, constant: bool) -> Array:
    """y; going back through it, the second moment of u = x B^T (of x where B is None) arrives at the tap.

    ``constant`` puts a 1 behind every row, as a classifier with a bias has it.
    """
    mask, hit = PADDING.get(), MASKED.get()
    if mask is not None and mask.shape == x.shape[:-1]:
        weights = mask
        if hit is not None:
            hit.append(name)
    else:
        weights = jnp.ones(x.shape[:-1], bool)
    wide = tap[0].dtype
    u = x.astype(wide) if B is None else x.astype(B.dtype) @ B.mT
    u = jnp.concatenate([u, jnp.ones((*u.shape[:-1], 1), u.dtype)], axis=-1) if constant else u
    u = lax.stop_gradient(u)
    # Zero, but of u: under vmap and shard_map the taps then differ from row to row and device to device, as u does, and
    # what comes back is summed over these.
    nothing = u.reshape(-1)[:0].sum().astype(wide)
    return _tap(y, u, weights + nothing, jax.tree.map(lambda tap: tap + nothing, tap))


@jax.custom_vjp
def _tap(y: Array, u: Array, weights: Array, tap: Tap) -> Array:
    return y


def _tap_forward(y: Array, u: Array, weights: Array, tap: Tap) -> tuple[Array, tuple[Array, Array]]:
    return y, (u.astype(tap[0].dtype), weights)


def _tap_backward(kept: tuple[Array, Array], grad_y: Array) -> tuple[Array, None, None, Tap]:
    u, weights = kept
    u, weights = u.reshape(-1, u.shape[-1]), weights.reshape(-1)
    C = jnp.matmul((u * weights[:, None]).T, u, precision=lax.Precision.HIGHEST)
    return grad_y, None, None, ((C + C.T) / 2, weights.sum())


_tap.defvjp(_tap_forward, _tap_backward)
