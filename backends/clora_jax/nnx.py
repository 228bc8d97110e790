"""C-LoRA inside flax nnx modules: linear layers exchanged for adapted ones, adapters in Variables of their own.

Kernels, biases and names stay as they are: only a layer's class is exchanged, and one Variable is added.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from ._missing import need

need("flax", where="clora_jax.nnx", extra="flax")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.core import Tracer

import clora_store as store
from clora_core.errors import StateError, message

from ._attach import Pattern, _check, _find, _nothing, make_head, make_layer, matches, place
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
        Options of `clora_jax.attach`: factors, scheme, scale, stop_old, train_routing, max_rank, seed.
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
        _add(self, "kernel", rank, rngs.params(), **(adapter or {}))

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


def attach(
    model: nnx.Module,
    *,
    rank: int,
    targets: Pattern | Iterable[Pattern] = "all-linear",
    exclude: Pattern | Iterable[Pattern] = (),
    ranks: Mapping[Pattern, int] | None = None,
    heads: Pattern | Iterable[Pattern] = (),
    max_rank: int | None = None,
    factors: str = "first-task",
    scheme: str = "orthonormal",
    scale: float = 1.0,
    stop_old: bool = True,
    train_routing: bool = True,
    second_order: bool = False,
    seed: int | np.random.Generator = 0,
) -> dict[str, Layer]:
    """Exchange linear layers of a model for adapted ones, in place; the function does not change.

    Parameters
    ----------
    model : flax.nnx.Module
    targets, exclude, ranks, heads
        Patterns over the paths of `flax.nnx.Linear` and `flax.nnx.LinearGeneral` modules, as in `clora_jax.attach`:
        "query", "layers.*.mlp.up". The projections of `flax.nnx.MultiHeadAttention` are such modules.
    rank, max_rank, factors, scheme, scale, stop_old, train_routing, second_order, seed
        See `clora_jax.attach`.

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
    _check(factors, scheme, train_routing, rank, max_rank, None)
    modules = dict(_modules(model))
    kernels = {f"{name}.kernel".removeprefix("."): module for name, module in modules.items()}
    shapes = {leaf: np.empty(_matrix(module), bool) for leaf, module in kernels.items()}
    head_leaves = _find(shapes, heads, "heads") if heads else []
    chosen = _find(shapes, targets, "targets", exclude, head_leaves) if targets else []
    for pattern in ranks or {}:
        if not any(matches(leaf, pattern) for leaf in chosen):
            raise _nothing("ranks", pattern, chosen)
    rng = seed if isinstance(seed, np.random.Generator) else np.random.default_rng(seed)
    rules = {"factors": factors, "stop_old": stop_old, "train_routing": train_routing, "scale": float(scale)}
    rules |= {"second_order": second_order}
    made: dict[str, Layer] = {}
    for leaf in [*chosen, *head_leaves]:
        module = kernels[leaf]
        _refuse(leaf, module)
        own = [r for pattern, r in (ranks or {}).items() if matches(leaf, pattern)]
        head = leaf in head_leaves
        made[leaf] = _make(module, leaf, head, rng, own[-1] if own else rank, max_rank, scheme, rules)
    for leaf, layer in made.items():
        _exchange(kernels[leaf], layer)
    return adapters(model)


def adapters(model: nnx.Module) -> dict[str, Layer]:
    """The adapters of a model, by path: a pytree for every verb of clora_jax.

    Layers are named by their place in the model, also in its Variables, whoever made them.
    """
    found: dict[str, Layer] = {}
    for name, module in _modules(model):
        if hasattr(module, KEY):
            layer = getattr(module, KEY).get_value()
            leaf = f"{name}.kernel".removeprefix(".")
            bias = None if layer.info.bias is None else f"{name}.bias".removeprefix(".")
            if (layer.info.leaf, layer.info.bias) != (leaf, bias):
                layer = layer.with_info(name=name or leaf, leaf=leaf, bias=bias)
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
    wanted = layers(adapters)
    modules = {f"{name}.kernel".removeprefix("."): module for name, module in _modules(model)}
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
    params: dict[str, Any] = {}
    for name, module in _modules(model):
        params[f"{name}.kernel".removeprefix(".")] = module.kernel.get_value().reshape(_matrix(module))
        if module.bias is not None:
            params[f"{name}.bias".removeprefix(".")] = module.bias.get_value().reshape(-1)
    loaded, history = load_onto(folder, params, **options)
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
    for _, module in _modules(model):
        if hasattr(module, KEY):
            delattr(module, KEY)
            module.__class__ = back[type(module)]


def _modules(model: nnx.Module) -> Iterable[tuple[str, Any]]:
    """Linear layers with their paths; a shared one once."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Linear | nnx.LinearGeneral):
            yield ".".join(map(str, path)), node


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
    axes = 2 if isinstance(module, nnx.Linear) else len((*module.in_features, *module.out_features))
    if type(module) in ADAPTED and module.kernel.get_value().ndim != axes + len(getattr(module, "batch_axis", ())):
        reason = "a stack of layers, as nnx.vmap makes them"
    elif type(module) not in ADAPTED:
        reason = f"a {type(module).__name__}, whose forward pass may be its own"
    elif isinstance(module, nnx.LinearGeneral):
        count = len(module.in_features)
        if module.batch_axis or sorted(a if a < 0 else a - 100 for a in module.axis) != list(range(-count, 0)):
            reason = "a LinearGeneral that contracts other axes than the last ones, in order"
    own_dot = getattr(module, "dot_general_cls", None) or module.dot_general not in (None, lax.dot_general)
    if reason is None and own_dot:
        reason = "a dot_general of its own"
    if reason is None and module.preferred_element_type is not None:
        reason = "a preferred_element_type"
    if reason is not None:
        fix, cause = "exclude= it", "a quantised layer, or one of a library's own"
        raise option_error("nnx.attach", f"layer {name!r} can't be adapted", reason, "a plain linear layer", fix, cause)


def _make(
    module: Any, leaf: str, head: bool, rng: Any, rank: int, max_rank: int | None, scheme: str, rules: dict[str, Any]
) -> Layer:
    kernel = module.kernel.get_value()
    flat = kernel if kernel.ndim == 2 else kernel.reshape(_matrix(module))
    if head and module.bias is not None:
        beside = f"{leaf.rpartition('.')[0]}.bias".removeprefix(".")
        bias = module.bias.get_value().reshape(-1)
        return make_head(flat, bias, place(leaf, flat, "in,out", "head", beside, rules))
    info = place(leaf, flat, "in,out", "head" if head else "linear", None, rules)
    return make_head(flat, None, info) if head else make_layer(flat, info, rng, rank, max_rank, scheme)


def _exchange(module: Any, layer: Layer) -> None:
    module.__class__ = ADAPTED[type(module)]
    setattr(module, KEY, CLoRAVariable(layer))


def _add(
    module: Any, leaf: str, rank: int, key: Any, *, seed: Any = None, max_rank: int | None = None, **options: Any
) -> None:
    defaults = {"factors": "first-task", "stop_old": True, "train_routing": True, "scale": 1.0, "scheme": "orthonormal"}
    defaults |= {"second_order": False}
    if seed is None:
        if isinstance(key, Tracer):
            got, fix = "a traced key", "pass adapter={'seed': 0}, or make the model outside of jit and vmap"
            raise option_error("nnx.CLoRALinear", "the factors are drawn on the host", got, "a key", fix, "nnx.vmap")
        seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
    if strange := set(options) - set(defaults):
        raise option_error("nnx.CLoRALinear", "unknown option", min(strange), ", ".join(defaults), "correct it")
    rules = {**defaults, **options}
    scheme = rules.pop("scheme")
    _check(rules["factors"], scheme, rules["train_routing"], rank, max_rank, None)
    layer = _make(module, leaf, False, np.random.default_rng(seed), rank, max_rank, scheme, rules)
    setattr(module, KEY, CLoRAVariable(layer))


def _call(module: Any, x: Array, kernel: Array, bias: Array | None) -> Array:
    layer = getattr(module, KEY).get_value()
    y = layer(x, kernel, None if layer.info.kind == "head" else bias, precision=module.precision)
    return y.astype(jnp.result_type(x, kernel))


def _plain(module: Any, out_sharding: Any) -> None:
    if out_sharding is not None:
        fix = "constrain the output by jax.lax.with_sharding_constraint, or jax.sharding.reshard"
        raise option_error("nnx", "out_sharding is given", repr(out_sharding), "None", fix, "explicit sharding")
