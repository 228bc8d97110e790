"""Adapters merged into weights, and back."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import clora_core as core
from clora_core.errors import InvalidValueError, message

from ._errors import option_error
from ._layer import Tree, find, flatten, layers


class Merged(NamedTuple):
    """What `merge` returns: params with the updates in them, what was kept of each, and the params from before."""

    params: Tree
    reports: dict[str, core.MergeReport]
    pristine: Tree


def merge(params: Tree, adapters: Tree, *, on_loss: str = "warn", max_loss: float = 0.1) -> Merged:
    """Merge every adapter into its weight: in float32 or wider, rounded once, from the pristine weight. Heads replace.

    Parameters
    ----------
    params : pytree
        Never merged before.
    adapters : pytree of Layer
    on_loss : {"warn", "raise", "ignore"}
        Where more than ``max_loss`` of an update is lost in the weight's precision, as happens to small updates beside
        bfloat16 weights.
    max_loss : float

    Returns
    -------
    Merged(params, reports, pristine)
        `unmerge` gives ``pristine`` back; the old weights stay in memory as long as it is kept.

    Raises
    ------
    InvalidValueError
        Too much is lost, with ``on_loss="raise"``; a merged weight that is not finite.
    OptionError
        An unknown on_loss; a head that has grown beyond its weight.
    """
    if on_loss not in ("warn", "raise", "ignore"):
        raise option_error("merge", "unknown on_loss", repr(on_loss), "'warn', 'raise' or 'ignore'", "pass one of them")
    names, leaves, treedef = flatten(params)
    reports, lost = {}, []
    for name, layer in layers(adapters).items():
        info, number = layer.info, find(names, leaves, layer.info)
        new: dict[int, Any] = {}
        if info.kind == "head":
            V = core.routing(layer.adapter, xp=jnp)
            weight = V if info.bias is None else V[:, :-1]
            new[number] = _round(weight if info.layout == "out,in" else weight.T, leaves[number])
            if info.bias is not None:
                new[names[info.bias]] = _round(V[:, -1], leaves[names[info.bias]])
        else:
            W = leaves[number] if info.layout == "out,in" else leaves[number].mT
            merged, reports[name] = _merge(W, layer.adapter)
            new[number] = merged if info.layout == "out,in" else merged.mT
            kept, error = float(reports[name].kept.min()), float(reports[name].error.max())  # the worst of a stack
            if error > max_loss:
                lost.append(f"{name} ({kept:.0%} kept, {error:.0%} off)")
        for i, array in new.items():
            if not jnp.isfinite(array).all() and bool(jnp.isfinite(leaves[i]).all()):
                raise InvalidValueError(
                    message(
                        "clora_jax.merge",
                        f"the merged weight of layer {name!r} is not finite",
                        got="NaN or infinity",
                        needed="finite numbers",
                        cause="an update too large for the weight's half precision",
                        fix="merge into a bfloat16 or float32 weight",
                    )
                )
            leaves[i] = array
    if lost and on_loss != "ignore":
        text = message(
            "clora_jax.merge",
            f"the weight's precision loses more than {max_loss:.0%} of an update",
            got=", ".join(lost),
            needed=f"an error of at most {max_loss:.0%}",
            cause="small updates beside half-precision weights",
            fix="keep the adapter unmerged, or merge into float32",
        )
        if on_loss == "raise":
            raise InvalidValueError(text)
        warnings.warn(text, stacklevel=2)
    return Merged(jax.tree.unflatten(treedef, leaves), reports, params)


def unmerge(merged: Merged) -> Tree:
    """The params from before: the same arrays, so the same bits."""
    return merged.pristine


@jax.jit
def _merge(W: Any, adapter: core.Adapter) -> core.Merged:
    wide = jnp.promote_types(W.dtype, adapter.A.dtype)
    adapter = core.Adapter(*(array.astype(wide) for array in adapter))
    return core.merge(W.astype(wide), adapter, dtype=W.dtype, xp=jnp)


def _round(value: Any, like: Any) -> Any:
    if value.shape != like.shape:
        raise option_error(
            "merge",
            "a head has grown beyond its weight",
            value.shape,
            str(like.shape),
            "use the adapters unmerged",
            "new classes",
        )
    value = value.astype(jnp.float32) if like.dtype.itemsize < 4 else value
    return value.astype(like.dtype)
