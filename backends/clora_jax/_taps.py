"""Where a layer tells what it was given: an identity whose derivative by a tap is the second moment of the rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

# Sum of u u^T, number of rows, number of calls that had a mask that fits: zeros where it is put in.
Tap = tuple[Array, Array, Array]


def empty_tap(S: Array) -> Tap:
    """Zeros for a layer whose memory is ``S``."""
    none = jnp.zeros(S.shape[:-2], S.dtype)
    return jnp.zeros_like(S), none, none


def observed(y: Array, x: Array, B: Array | None, tap: Tap, mask: Array | None, *, constant: bool) -> Array:
    """y; going back through it, the second moment of u = x B^T (of x where B is None) arrives at the tap.

    Rows where ``mask`` is 0 are left out, if it has the shape of x without its last axis. ``constant`` puts a 1 behind
    every row, as a classifier with a bias has it.
    """
    fits = mask is not None and mask.shape == x.shape[:-1]
    weights = mask if mask is not None and fits else jnp.ones(x.shape[:-1], bool)
    wide = tap[0].dtype
    u = x.astype(wide) if B is None else x.astype(B.dtype) @ B.mT
    u = jnp.concatenate([u, jnp.ones((*u.shape[:-1], 1), u.dtype)], axis=-1) if constant else u
    u = lax.stop_gradient(u)
    # Zero, but of u: under vmap and shard_map the taps then differ from row to row and device to device, as u does, and
    # what comes back is summed over these.
    nothing = u.reshape(-1)[:0].sum().astype(wide)
    return _tap(y, u, weights + nothing, nothing + float(fits), jax.tree.map(lambda tap: tap + nothing, tap))


@jax.custom_vjp
def _tap(y: Array, u: Array, weights: Array, masked: Array, tap: Tap) -> Array:
    return y


def _tap_forward(y: Array, u: Array, weights: Array, masked: Array, tap: Tap) -> tuple[Array, Tap]:
    return y, (u.astype(tap[0].dtype), weights, masked)


def _tap_backward(kept: Tap, grad_y: Array) -> tuple[Array, None, None, None, Tap]:
    u, weights, masked = kept
    u, weights = u.reshape(-1, u.shape[-1]), weights.reshape(-1)
    u = jnp.where(weights[:, None] > 0, u, 0)  # padding may hold NaN
    C = jnp.matmul((u * weights[:, None]).T, u, precision=lax.Precision.HIGHEST)
    return grad_y, None, None, None, ((C + C.T) / 2, weights.sum(), masked)


_tap.defvjp(_tap_forward, _tap_backward)
