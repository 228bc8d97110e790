"""C-LoRA inside equinox modules: a module is a pytree, so the model carries its adapters, and verbs take the model."""

from __future__ import annotations

from typing import Any

from ._missing import need

need("equinox", where="clora_jax.equinox", extra="equinox")

import equinox as eqx
import jax
from jax import Array

from ._attach import attach as attach_to
from ._attach import listed, matches
from ._errors import option_error
from ._layer import Layer, Tree, layers, path_name


class CLoRALinear(eqx.Module):
    """`equinox.nn.Linear` with a C-LoRA adapter.

    Attributes
    ----------
    linear : equinox.nn.Linear
        Frozen: its weight and bias have no gradient.
    clora : clora_jax.Layer
    """

    linear: eqx.nn.Linear
    clora: Layer

    def __call__(self, x: Array, *, key: Any = None) -> Array:
        """The adapted layer for one vector x (in_features,), as equinox has it; `jax.vmap` for more."""
        weight, bias = jax.lax.stop_gradient((self.linear.weight, self.linear.bias))
        x = x[None] if self.linear.in_features == "scalar" else x
        y = self.clora(x, weight, None if self.clora.info.kind == "head" else bias)
        return y[0] if self.linear.out_features == "scalar" else y


def attach(model: Tree, **options: Any) -> Tree:
    """The model with linear layers exchanged for adapted ones, new, as equinox has it. The function does not change.

    Parameters
    ----------
    model : equinox.Module
    options
        As `clora_jax.attach` takes them; paths are those of attributes: "layers.0", "attention.query_proj".

    Returns
    -------
    equinox.Module
        Itself a tree of adapters: ``clora_jax.begin_task(model)``, ``clora_jax.protect(tx).init(model)``,
        ``equinox.filter_grad`` and so on take it. ``clora_jax.layers(model)`` are the adapters alone.
    """
    if options.get("targets", "all-linear") == "all-linear":  # weights of embeddings, too, are called weight
        heads = options.get("heads", ())
        paths = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_linear)
        names = [f"{path_name(path)}.weight".removeprefix(".") for path, node in paths if type(node) is eqx.nn.Linear]
        targets = [name for name in names if not (heads and any(matches(name, head) for head in listed(heads)))]
        options = {**options, "targets": targets}
    return put(model, attach_to(model, **options))


def _is_linear(node: Any) -> bool:
    return isinstance(node, eqx.nn.Linear | CLoRALinear)


def put(model: Tree, adapters: Tree) -> Tree:
    """The model with these adapters, new (of `clora_jax.load`, say) or in the place of those it has."""
    given = layers(adapters)
    paths, treedef = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_linear)
    out = []
    for path, node in paths:
        if isinstance(node, CLoRALinear):
            name = node.clora.info.name
            out.append(CLoRALinear(node.linear, given[name]) if name in given else node)
        else:
            name = path_name(path)
            plain = type(node) is eqx.nn.Linear  # a subclass may have a forward pass of its own
            out.append(CLoRALinear(node, given[name]) if plain and name in given else node)
    missing = set(given) - {node.clora.info.name for node in out if isinstance(node, CLoRALinear)}
    if missing:
        names = [path_name(path) for path, node in paths if type(node) is eqx.nn.Linear]
        fix, cause = "attach to equinox.nn.Linear layers, or use clora_jax.bind", "a weight of another module"
        what, needed = f"{min(missing)!r} is no linear layer of equinox", f"one of {', '.join(map(repr, names))}"
        raise option_error("equinox.put", what, repr(min(missing)), needed, fix, cause)
    return jax.tree.unflatten(treedef, out)


def detach(model: Tree) -> Tree:
    """The model without adapters: its own linear layers."""

    def is_ours(node: Any) -> bool:
        return isinstance(node, CLoRALinear)

    return jax.tree.map(lambda node: node.linear if is_ours(node) else node, model, is_leaf=is_ours)
