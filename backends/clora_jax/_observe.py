"""The second moments of what layers are given, by one pass through the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from clora_core.errors import InvalidValueError, message

from ._errors import option_error, state_error
from ._layer import Tree, layers, map_layers, need_moments
from ._taps import Tap, empty_tap


def masked(adapters: Tree, mask: Array) -> Tree:
    """Adapters that leave padding out while they are observed: rows where ``mask`` is 0 are not remembered.

    A layer whose input has the mask's shape and one axis more is masked by it. `observe` does this with its ``mask=``;
    inside a model under `jax.vmap`, where every row has a mask of its own, use it on what `bind` is given.
    """
    return map_layers(lambda layer: dataclasses.replace(layer, mask=mask), adapters)


def second_moments(forward: Callable[..., Any], adapters: Tree, *args: Any) -> dict[str, Tap]:
    """Sum of u u^T, number of rows, and of calls with a mask, of every layer in one forward pass, for `observe`.

    Pure, to be used inside jit, `jax.lax.scan` or `jax.shard_map` (where sums are already over all devices; with
    ``check_vma=False`` over each one's own rows, to be added by `jax.lax.psum`).
    ``forward(adapters, *args)`` returns anything with floating point leaves that depend on every layer.

    Notes
    -----
    Got by one pass backwards, in which each layer's tap answers with its second moment: so layers inside of scan, vmap
    and checkpoint are reached, and shards of a batch are summed by the compiler. Calls of a layer that no derivative
    leads to, behind `jax.lax.stop_gradient` or argmax, are not seen.
    """
    need_moments(adapters, "observe", complete=False)
    taps: dict[str, Tap] = {}
    for name, layer in layers(adapters).items():
        assert layer.moments is not None
        taps[name] = empty_tap(layer.moments.S)

    def outputs(taps: dict[str, Tap]) -> Array:
        tapped = map_layers(lambda layer: dataclasses.replace(layer, tap=taps[layer.info.name]), adapters)
        leaves = [leaf for leaf in jax.tree.leaves(forward(tapped, *args)) if hasattr(leaf, "dtype")]
        inexact = [jnp.real(leaf) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        total = [jnp.sum(leaf.astype(jnp.float32)) for leaf in inexact]
        if not total:
            cause, fix = "a forward pass that ends in argmax, say", "return the logits, or all hidden states"
            raise option_error("observe", "forward returns no floating point array", "none", "one", fix, cause)
        return sum(total[1:], total[0])

    return jax.grad(outputs)(taps)


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
        leaves that depend on every layer: logits will do. The same function each time is compiled once. Calls of a
        layer behind `jax.lax.stop_gradient` are not seen.
    adapters, params : pytrees
    batches : iterable of pytrees of arrays
        A pass over the task's inputs.
    mask : callable, optional
        ``mask(batch)``: 1 for rows that count, 0 for padding; layers whose inputs have its shape are masked by it.
        Inside of a model under `jax.vmap` use `masked` instead.

    Returns
    -------
    dict of layer to C, (r, r), spare directions included
        In float64 where JAX has it (``jax_enable_x64``).

    Raises
    ------
    StateError
        No data; a layer that nothing reached; factors that learn in every task, whose moments would be stale.
    OptionError
        A mask that fits no layer; a forward pass without floating point outputs.
    InvalidValueError
        NaN or infinity among what a layer was given.
    """
    need_moments(adapters, "observe", complete=False)
    leaves, treedef = jax.tree.flatten((adapters, params))
    arrays = [leaf for leaf in leaves if hasattr(leaf, "dtype")]
    rest = tuple(None if hasattr(leaf, "dtype") else leaf for leaf in leaves)  # an equinox module has such leaves
    total: dict[str, Tap] | None = None
    shape = None
    for batch in batches:
        weights = None if mask is None else jnp.asarray(mask(batch))
        shape = None if weights is None else weights.shape
        sums = _sums((forward, treedef, rest), arrays, batch, weights)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    if total is None:
        raise state_error("observe", "there was no data to observe", "no batch", "pass the task's inputs again")
    if mask is not None and not any(bool((hit > 0).any()) for _, _, hit in total.values()):
        fix = "return a mask of the layers' inputs without their last axis, or use masked()"
        needed, cause = "the leading axes of inputs", "a model under vmap"
        raise option_error("observe", "the mask fits no layer", f"mask {shape}", needed, fix, cause)
    for name, (C, count, _) in total.items():
        if not bool((count > 0).all()):
            fix = "return from forward what depends on every layer, and check the mask"
            raise state_error("observe", f"nothing reached layer {name!r}", "no row", fix)
        check_moment(name, C, "observe")
    return {name: C / count[..., None, None] for name, (C, count, _) in total.items()}


def check_moment(name: str, C: Array, verb: str) -> None:
    """A second moment is finite, symmetric, and has no negative squares."""
    good = bool(jnp.isfinite(C).all()) and bool((jnp.diagonal(C, axis1=-2, axis2=-1) >= 0).all())
    if not (good and bool((C.mT == C).all())):
        raise InvalidValueError(
            message(
                f"clora_jax.{verb}",
                f"the second moment of layer {name!r} is none",
                got="NaN, infinity, or a matrix that is no sum of u u^T",
                needed="finite numbers, symmetric, squares that are not negative",
                cause="a diverged model, or NaN in the data",
                fix="check the inputs; pass what observe returns",
            )
        )


@partial(jax.jit, static_argnums=0)
def _sums(how: Any, arrays: list[Array], batch: Any, weights: Array | None) -> dict[str, Tap]:
    forward, treedef, rest = how
    given = iter(arrays)
    adapters, params = jax.tree.unflatten(treedef, [next(given) if leaf is None else leaf for leaf in rest])
    adapters = adapters if weights is None else masked(adapters, weights)
    return second_moments(forward, adapters, params, batch)
