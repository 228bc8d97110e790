"""C-LoRA inside flax nnx modules: linear layers exchanged for adapted ones, adapters in Variables of their own.

Kernels, biases and names stay as they are: only a layer's class is exchanged, and one Variable is added.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from ._missing import need

need("flax", where="clora_jax.nnx", extra="flax")

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.core import Tracer

import clora_store as store
from clora_core.errors import StateError, message

from ._attach import attach as attach_to
from ._errors import option_error
from ._history import History
from ._layer import Layer, Tree, layers
from ._store import load as load_onto

KEY = "clora"  # the attribute that holds a layer's adapter


class CLoRAVariable(nnx.Variable[Any]):
    """A `clora_jax.Layer` in an nnx module: what ``nnx.DiffState(0, CLoRAVariable)`` and ``wrt=CLoRAVariable`` mean."""


class CLoRALinear(nnx.Linear):
    """`flax.nnx.Linear` with a C-LoRA adapter.

    Parameters
    ----------
    in_features, out_features, rngs, and the rest : as `flax.nnx.Linear` takes them
    rank : int
    adapter : mapping, optional
        Options of `clora_jax.attach`: factors, scheme, scale, stop_old, train_routing, second_order, max_rank, seed.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        rngs: nnx.Rngs,
        adapter: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, rngs=rngs, **options)
        adapter, key = dict(adapter or {}), rngs.params()
        if "seed" not in adapter:
            if isinstance(key, Tracer):
                got, fix = "a traced key", "pass adapter={'seed': 0}, or make the model outside of jit and vmap"
                what, cause = "the factors are drawn on the host", "nnx.vmap or nnx.jit around the constructor"
                raise option_error("nnx.CLoRALinear", what, got, "a key", fix, cause)
            adapter["seed"] = int(jax.random.randint(key, (), 0, 2**31 - 1))
        (layer,) = attach_to({"kernel": self.kernel.get_value()}, rank=rank, **adapter).values()
        setattr(self, KEY, CLoRAVariable(layer))

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """The adapted layer; ``inputs`` (..., in_features)."""
        _plain(self, out_sharding)
        bias = None if self.bias is None else self.bias[...]
        inputs, kernel, bias = self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        return _call(self, inputs, kernel, bias)


class CLoRALinearGeneral(nnx.LinearGeneral):
    """`flax.nnx.LinearGeneral`, as attention has it, with an adapter of its kernel as a matrix; made by `attach`."""

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """The adapted layer; contracts ``axis``, which must be the last ones."""
        _plain(self, out_sharding)
        count = len(self.in_features)
        leading = inputs.shape[: inputs.ndim - count]
        bias = None if self.bias is None else self.bias[...].reshape(-1)
        kernel = self.kernel[...].reshape(math.prod(self.in_features), math.prod(self.out_features))
        x = inputs.reshape(*leading, kernel.shape[0])
        x, kernel, bias = self.promote_dtype((x, kernel, bias), dtype=self.dtype)
        return _call(self, x, kernel, bias).reshape(*leading, *self.out_features)


ADAPTED = {nnx.Linear: CLoRALinear, nnx.LinearGeneral: CLoRALinearGeneral}


def attach(model: nnx.Module, **options: Any) -> dict[str, Layer]:
    """Exchange linear layers of a model for adapted ones, in place; the function does not change.

    Parameters
    ----------
    model : flax.nnx.Module
    options
        As `clora_jax.attach` takes them. Patterns are over the paths of `flax.nnx.Linear` and `flax.nnx.LinearGeneral`
        modules: "query", "layers.*.mlp.up". The projections of `flax.nnx.MultiHeadAttention` are such modules.

    Returns
    -------
    dict of str to Layer
        As `adapters` gives them at any time.

    Raises
    ------
    OptionError, RankError
        As `clora_jax.attach`; also a layer of another class, or with a dot_general of its own, with the reason.
    StateError
        A layer that has an adapter already.
    """
    modules = _kernels(model)
    made = attach_to(_params(modules), **options)
    for layer in made.values():
        _refuse(layer.info.leaf, modules[layer.info.leaf])
    update(model, made)
    return adapters(model)


def adapters(model: nnx.Module) -> dict[str, Layer]:
    """The adapters of a model, by path: a pytree for every verb of clora_jax.

    Layers are named by their place in the model, also in its Variables, whoever made them.
    """
    found: dict[str, Layer] = {}
    for leaf, module in _kernels(model).items():
        if hasattr(module, KEY):
            layer = getattr(module, KEY).get_value()
            bias = None if layer.info.bias is None else _bias(leaf)
            if (layer.info.leaf, layer.info.bias) != (leaf, bias):
                layer = layer.with_info(name=leaf.rpartition(".")[0] or leaf, leaf=leaf, bias=bias)
                getattr(module, KEY).set_value(layer)
            found[leaf] = layer
    return layers(found)


def update(model: nnx.Module, adapters: Tree) -> None:
    """Put adapters into a model, in place: new ones into layers that are adapted, else the layers are exchanged first.

    Raises
    ------
    OptionError
        An adapter whose layer the model does not have, or has in another shape, or that can't be adapted.
    """
    wanted, modules = layers(adapters), _kernels(model)
    for name, layer in wanted.items():
        module = modules.get(layer.info.leaf)
        if module is None or _matrix(module) != layer.info.shape:
            got = "none" if module is None else f"one of {_matrix(module)}"
            fix, cause = "put adapters on the model they were made for", "another model"
            needed = f"a linear layer of {layer.info.shape}"
            raise option_error("nnx.update", f"the model has no such layer {name!r}", got, needed, fix, cause)
        if not hasattr(module, KEY):
            _refuse(layer.info.leaf, module)
    for layer in wanted.values():
        module = modules[layer.info.leaf]
        if hasattr(module, KEY):
            getattr(module, KEY).set_value(layer)
        else:
            _exchange(module, layer)


def load(
    model: nnx.Module, folder: str | os.PathLike[str] | store.State, **options: Any
) -> tuple[dict[str, Layer], History]:
    """Adapters from a folder that any framework of clora wrote, put on a model in place; see `clora_jax.load`."""
    loaded, history = load_onto(folder, _params(_kernels(model)), **options)
    update(model, loaded)
    return loaded, history


def bind(graphdef: nnx.GraphDef[Any], state: Any, adapters: Tree) -> Any:
    """A model from ``graphdef, state = nnx.split(model)`` with these adapters: pure, for jit and grad.

    ``loss(adapters, state, batch)`` then differentiates by adapters alone, and every verb of `clora_jax` takes them.
    """
    given = layers(adapters)

    def replaced(node: Any) -> Any:
        if not isinstance(node, CLoRAVariable):
            return node
        name = node.get_value().info.name
        if name not in given:
            fix, cause = "pass all of them, as adapters(model) gives them before nnx.split", "a part of the tree"
            raise option_error("nnx.bind", f"no adapter for layer {name!r}", ", ".join(given), repr(name), fix, cause)
        return node.replace(given[name])

    state = jax.tree.map(replaced, state, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return nnx.merge(graphdef, state, copy=True)  # counters of dropout and statistics are of this trace then


def detach(model: nnx.Module) -> None:
    """Take every adapter out again: the original layers, their kernels untouched."""
    back = {adapted: plain for plain, adapted in ADAPTED.items()}
    for module in _kernels(model).values():
        if hasattr(module, KEY):
            delattr(module, KEY)
            module.__class__ = back[type(module)]


def _kernels(model: nnx.Module) -> dict[str, Any]:
    """Linear layers by the paths of their kernels; a shared one once."""
    linear = nnx.Linear | nnx.LinearGeneral
    paths = ((path, node) for path, node in nnx.iter_graph(model) if isinstance(node, linear))
    return {".".join(map(str, (*path, "kernel"))): node for path, node in paths}


def _bias(leaf: str) -> str:
    return f"{leaf.removesuffix('kernel')}bias"


def _params(modules: Mapping[str, Any]) -> dict[str, Any]:
    """Kernels as matrices, and biases as vectors, by their paths; one layer for a stack, which is refused later."""
    params: dict[str, Any] = {}
    for leaf, module in modules.items():
        kernel = module.kernel.get_value()
        shape = _matrix(module)
        params[leaf] = kernel.reshape(shape) if kernel.size == math.prod(shape) else jnp.zeros(shape, kernel.dtype)
        if module.bias is not None:
            params[_bias(leaf)] = module.bias.get_value().reshape(-1)
    return params


def _matrix(module: Any) -> tuple[int, int]:
    if isinstance(module, nnx.Linear):
        return module.in_features, module.out_features
    return math.prod(module.in_features), math.prod(module.out_features)


def _refuse(leaf: str, module: Any) -> None:
    name = leaf.rpartition(".")[0]
    if hasattr(module, KEY):
        raise StateError(
            message(
                "clora_jax.nnx.attach",
                f"layer {name!r} has an adapter already",
                got="a second attach",
                needed="a layer without adapter",
                cause="attach called twice",
                fix="detach(model) first, or go on with adapters(model)",
            )
        )
    reason = None
    if type(module) not in ADAPTED:
        reason = f"a {type(module).__name__}, whose forward pass may be its own"
    elif module.kernel.get_value().size != math.prod(_matrix(module)):
        reason = "a stack of layers, as nnx.vmap makes them, or with batch axes"
    elif isinstance(module, nnx.LinearGeneral) and module.axis != tuple(range(-len(module.in_features), 0)):
        reason = "a LinearGeneral that contracts other axes than the last ones, in order"
    elif getattr(module, "dot_general_cls", None) or module.dot_general not in (None, lax.dot_general):
        reason = "a dot_general of its own"
    elif module.preferred_element_type is not None:
        reason = "a preferred_element_type"
    if reason is not None:
        fix, cause = "exclude= it", "a quantised layer, or one of a library's own"
        raise option_error("nnx.attach", f"layer {name!r} can't be adapted", reason, "a plain linear layer", fix, cause)


def _exchange(module: Any, layer: Layer) -> None:
    module.__class__ = ADAPTED[type(module)]
    setattr(module, KEY, CLoRAVariable(layer))


def _call(module: Any, x: Array, kernel: Array, bias: Array | None) -> Array:
    layer = getattr(module, KEY).get_value()
    y = layer(x, kernel, None if layer.info.kind == "head" else bias, precision=module.precision)
    return y.astype(jnp.result_type(x, kernel))


def _plain(module: Any, out_sharding: Any) -> None:
    if out_sharding is not None:
        fix = "constrain the output by jax.lax.with_sharding_constraint, or jax.sharding.reshard"
        raise option_error("nnx", "out_sharding is given", repr(out_sharding), "None", fix, "explicit sharding")
