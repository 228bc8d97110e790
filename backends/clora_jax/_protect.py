"""Optax transformations that change what learns alone, and keep it out of protected directions."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import clora_core as core
from clora_core.errors import StateError

from ._errors import option_error, state_error
from ._layer import Layer, Tree, each, is_layer, need_moments


def _labels(found: list[Layer]) -> Tree:
    """ "learns" or "still", for every array of the layers."""

    def label(layer: Layer) -> Layer:
        still = jax.tree.map(lambda _: "still", layer)
        learns = dict.fromkeys(layer.learns, "learns")
        return dataclasses.replace(still, adapter=still.adapter._replace(**learns))

    return [label(layer) for layer in found]


def learning(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """``tx`` for what learns now, nothing for the rest: R_old, the memory, factors that are fixed, other params.

    Plain ``tx`` would let weight decay wear away what does not learn. Initialise it at the start of every task.
    """
    inner: Any = optax.partition({"learns": tx, "still": optax.set_to_zero()}, _labels)

    def init(params: Tree) -> Any:
        return inner.init(each(params))

    def update(updates: Tree, state: Any, params: Tree = None, **extra: Any) -> tuple[Tree, Any]:
        steps, given = each(updates), None if params is None else each(params)
        if given is not None and [layer.info for layer in steps] != [layer.info for layer in given]:
            raise _other("gradients and adapters are of different trees")
        try:
            steps, state = inner.update(steps, state, given, **extra)
        except ValueError as error:
            if "pytree" not in str(error):
                raise
            raise _other("the optimizer's state belongs to another task, or to other adapters") from error
        return _still(updates, steps), state

    return optax.GradientTransformationExtraArgs(init, update)


def _other(what: str) -> StateError:
    fix = "call tx.init(adapters) after every begin_task, and pass whole trees"
    return state_error("protect", what, "another structure", fix)


def _still(updates: Tree, steps: list[Layer]) -> Tree:
    """These steps for the layers, in order, and none for whatever else the tree holds."""
    given = iter(steps)

    def step(node: Any) -> Any:
        return next(given) if is_layer(node) else jnp.zeros_like(node) if hasattr(node, "dtype") else node

    return jax.tree.map(step, updates, is_leaf=is_layer)


class Protected(NamedTuple):
    """State of `protect`: that of the transformation inside, and a basis for each layer."""

    inner: Any
    bases: list[core.Basis]


def protect(
    tx: optax.GradientTransformation, *, energy: float = 0.95, head_energy: float | None = None
) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose every step leaves R_delta out of the directions that past inputs came from.

    Parameters
    ----------
    tx : optax.GradientTransformation
        A whole optimizer, weight decay, clipping and schedule included: what it returns is what is projected.
    energy : float in [0, 1]
        Share of all recorded inputs that the protected directions hold, see `clora_core.protected_basis`.
    head_energy : float, optional
        The same for heads, by default ``energy``.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        ``state = tx.init(adapters)`` at the start of every task takes the directions from the adapters' memory (none
        before the first task's end); ``updates, state = tx.update(grads, state, adapters)``, then
        ``optax.apply_updates``. Nothing but what learns is changed. ``tx.init`` under jit is traced once.

    Raises
    ------
    OptionError
        An energy outside of [0, 1]; at ``update``, adapters left out.
    MomentsIncomplete, StateError
        At ``init``: second moments that do not cover every task, or that would be stale.

    Notes
    -----
    The value is projected, R_delta (I - U diag(w) U^T), and the update is what leads to it: projecting gradients leaks
    under Adam, momentum and weight decay. In the applied value what is left in a protected direction is the rounding
    of one addition.
    """
    for value in (energy, energy if head_energy is None else head_energy):
        if not 0.0 <= value <= 1.0:
            raise option_error("protect", "energy is no share", value, "between 0 and 1", "pass 0.95, say")
    inner: Any = learning(tx)

    def init(params: Tree) -> Any:
        need_moments(params, "protect")
        return Protected(inner.init(params), [basis(layer) for layer in each(params)])

    def basis(layer: Layer) -> core.Basis:
        own = energy if head_energy is None or layer.info.kind != "head" else head_energy
        found = core.protected_basis(layer.used().S, energy=own, xp=jnp)
        return core.Basis(*(array.astype(layer.adapter.R_delta.dtype) for array in found))

    def update(updates: Tree, state: Any, params: Tree = None, **extra: Any) -> tuple[Tree, Any]:
        if params is None:
            got, fix = "tx.update(grads, state)", "call tx.update(grads, state, adapters)"
            what, cause = "the value that is projected is missing", "params left out"
            raise option_error("protect", what, got, "the adapters", fix, cause)
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        projected = []
        for step, layer, basis in zip(each(updates), each(params), state.bases, strict=True):
            value = layer.adapter.R_delta
            new = core.project(value + step.adapter.R_delta, basis, xp=jnp)
            projected.append(dataclasses.replace(step, adapter=step.adapter._replace(R_delta=new - value)))
        return _still(updates, projected), Protected(inner_state, state.bases)

    return optax.GradientTransformationExtraArgs(init, update)


def full(state: Any, adapters: Tree) -> list[str]:
    """Layers that have no direction left to learn in, of a state of `protect`, on the host."""
    pairs = zip(each(adapters), state.bases, strict=True)
    return [layer.info.name for layer, (_, weights) in pairs if bool(jnp.all(weights > 0))]
