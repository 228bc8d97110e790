"""The second moments of what layers are given, by one pass through the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ._errors import option_error, state_error
from ._layer import Layer, Tree, layers, map_layers, need_moments
from ._taps import MASKED, padding


def second_moments(forward: Callable[..., Any], adapters: Tree, *args: Any) -> dict[str, tuple[Array, Array]]:
    """Sums of u u^T, and the number of rows, of every layer in one forward pass: what `observe` adds up.

    Pure, to be used inside jit, `jax.lax.scan` or `jax.shard_map` (where sums are already over all devices; with
    ``check_vma=False`` over each one's own rows, to be added by `jax.lax.psum`).
    ``forward(adapters, *args)`` returns anything with floating point leaves that depend on every layer.

    Notes
    -----
    Got by one pass backwards, in which each layer's tap answers with its second moment: so layers inside of scan, vmap
    and checkpoint are reached, and shards of a batch are summed by the compiler.
    """
    taps = {name: _empty_tap(layer) for name, layer in layers(adapters).items()}

    def outputs(taps: dict[str, Any]) -> Array:
        tapped = map_layers(lambda layer: dataclasses.replace(layer, tap=taps[layer.info.name]), adapters)
        leaves = [leaf for leaf in jax.tree.leaves(forward(tapped, *args)) if hasattr(leaf, "dtype")]
        total = [jnp.sum(leaf.astype(jnp.float32)) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
        if not total:
            cause, fix = "a forward pass that ends in argmax, say", "return the logits, or all hidden states"
            raise option_error("observe", "forward returns no floating point array", "none", "one", fix, cause)
        return sum(total[1:], total[0])

    return jax.grad(outputs)(taps)


def _empty_tap(layer: Layer) -> tuple[Array, Array]:
    assert layer.moments is not None
    S = layer.moments.S
    return jnp.zeros_like(S), jnp.zeros(S.shape[:-2], S.dtype)


def observe(
    forward: Callable[..., Any],
    adapters: Tree,
    params: Tree,
    batches: Iterable[Any],
    *,
    mask: Callable[[Any], Array] | None = None,
) -> dict[str, Array]:
    """The second moment C of every layer's routed inputs over a task's data, for `end_task`; after training.

    Parameters
    ----------
    forward : callable
        ``forward(adapters, params, batch)`` runs the model (through `bind`) and returns anything with floating point
        leaves that depend on every layer: logits will do. The same function each time is compiled once.
    adapters, params : pytrees
    batches : iterable of pytrees of arrays
        A pass over the task's inputs.
    mask : callable, optional
        ``mask(batch)``: 1 for rows that count, 0 for padding; layers whose inputs have its shape are masked by it.
        Inside of a model under `jax.vmap` use `padding` instead.

    Returns
    -------
    dict of layer to C, (r, r), spare directions included
        In float64 where JAX has it (``jax_enable_x64``).

    Raises
    ------
    StateError
        No data; a layer that nothing reached; factors that learn in every task, whose moments would be stale.
    """
    need_moments(adapters, "observe", complete=False)
    leaves, treedef = jax.tree.flatten((adapters, params))
    arrays = [leaf for leaf in leaves if hasattr(leaf, "dtype")]
    rest = tuple(None if hasattr(leaf, "dtype") else leaf for leaf in leaves)  # an equinox module has such leaves
    total: dict[str, tuple[Array, Array]] | None = None
    for batch in batches:
        weights = None if mask is None else jnp.asarray(mask(batch))
        sums = _sums((forward, treedef, rest), arrays, batch, weights)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    if total is None:
        raise state_error("observe", "there was no data to observe", "no batch", "pass the task's inputs again")
    for name, (_, count) in total.items():
        if not float(count) > 0:
            fix = "return from forward what depends on every layer, and check the mask"
            raise state_error("observe", f"nothing reached layer {name!r}", "no row", fix)
    return {name: C / count for name, (C, count) in total.items()}


@partial(jax.jit, static_argnums=0)
def _sums(how: Any, arrays: list[Array], batch: Any, weights: Array | None) -> Any:
    forward, treedef, rest = how
    given = iter(arrays)
    adapters, params = jax.tree.unflatten(treedef, [next(given) if leaf is None else leaf for leaf in rest])
    hit: list[str] = []
    token = MASKED.set(hit)
    try:
        with padding(weights):
            sums = second_moments(forward, adapters, params, batch)
    finally:
        MASKED.reset(token)
    if weights is not None and not hit:
        got, fix = (
            f"mask {weights.shape}",
            "return a mask of the layers' inputs without their last axis, or use padding()",
        )
        raise option_error(
            "observe", "the mask fits no layer", got, "the leading axes of inputs", fix, "a model under vmap"
        )
    return sums
