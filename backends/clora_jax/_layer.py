"""One adapted layer as a pytree node, the arrays it stands beside, and how both are used in a forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

import clora_core as core
from clora_core.errors import OptionError, ShapeError, StateError, message

from ._function import delta, linear

Tree = Any


class Info(NamedTuple):
    """What is static of a layer: its place in the model, and which rules it follows.

    Attributes
    ----------
    name : str
        Path of the module.
    leaf, bias : str
        Paths of the arrays it stands beside; of a head, and where there is one, the bias that it replaces.
    kind : {"linear", "head"}
    layout : {"in,out", "out,in"}
    shape : tuple of int
        Of the weight.
    factors, stop_old, train_routing, scale
        As `attach` took them.
    started : bool
        A task is finished.
    complete : bool
        Every finished task was observed, in all directions that are in use.
    """

    name: str
    leaf: str
    bias: str | None
    kind: str
    layout: str
    shape: tuple[int, ...]
    factors: str
    stop_old: bool
    train_routing: bool
    scale: float
    started: bool = False
    complete: bool = True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """An adapter with its memory, a pytree node of arrays; `attach` makes them, every verb takes trees of them.

    Attributes
    ----------
    adapter : clora_core.Adapter
        A (d_out, r), R_old and R_delta (r, r), B (r, d_in). Of a head A and B are None, and R is [weight, bias],
        (classes, d_in + 1).
    moments : clora_core.Moments or None
        Memory of the finished tasks, over all directions, the spare ones last. None where factors learn in every task.
    spare : (A_spare (d_out, k), B_spare (k, d_in)) or None
        Directions to grow into.
    tap : (C, count) or None
        Zeros whose "gradients" are the sums of u u^T and of the rows; only inside `observe`.
    info : Info
    """

    adapter: core.Adapter
    moments: core.Moments | None
    spare: tuple[Array, Array] | None
    info: Info = dataclasses.field(metadata={"static": True})
    tap: tuple[Array, Array] | None = None

    @property
    def learns(self) -> tuple[str, ...]:
        """What an optimizer may change now."""
        info = self.info
        routing = ("R_delta",) if info.train_routing or info.kind == "head" else ()
        moving = info.factors == "every-task" or (info.factors == "first-task" and not info.started)
        return ("A", *routing, "B") if moving and info.kind == "linear" else routing

    @property
    def rank(self) -> int:
        return self.adapter.R_old.shape[-1]

    def whole(self) -> core.Adapter:
        """The same function with the spare directions included, which no routing uses."""
        return self.adapter if self.spare is None else core.expand(self.adapter, *self.spare, xp=jnp)

    def used(self) -> core.Moments:
        """The memory of the directions in use."""
        assert self.moments is not None
        S, P, q = self.moments
        rows, columns = self.adapter.R_old.shape[-2:]
        return core.Moments(S[:columns, :columns], P[:rows, :columns], q)

    def with_info(self, **changes: Any) -> Layer:
        """A layer under other rules."""
        return dataclasses.replace(self, info=self.info._replace(**changes))

    def still(self) -> core.Adapter:
        """The adapter, what does not learn being constant."""
        stop = {f: lax.stop_gradient(a) for f, a in self.adapter._asdict().items() if f not in self.learns}
        return self.adapter._replace(**stop)

    def __call__(
        self,
        x: Array,
        W: Array,
        bias: Array | None = None,
        *,
        precision: Any = None,
        second_order: bool = False,
    ) -> Array:
        """The layer's output (..., d_out) for x (..., d_in); W and bias as the model has them. A head needs neither."""
        adapter = self.still()
        if self.info.kind == "head":
            y = _head(x, core.routing(adapter, xp=jnp), self.info, precision)
        else:
            info = self.info
            how = {"layout": info.layout, "stop_old": info.stop_old, "second_order": second_order, "name": info.leaf}
            y = linear(x, W, adapter, bias, precision=precision, **how)
        return y if self.tap is None else _observed(y, x, self)


def is_layer(node: Any) -> bool:
    return isinstance(node, Layer)


def map_layers(function: Callable[[Layer], Any], tree: Tree) -> Tree:
    """Every Layer of a tree through the function; the rest as it is."""
    return jax.tree.map(lambda node: function(node) if is_layer(node) else node, tree, is_leaf=is_layer)


def layers(tree: Tree) -> dict[str, Layer]:
    """The layers of a tree by name.

    Raises
    ------
    OptionError
        There is none: the tree is no result of `attach`.
    """
    found = {node.info.name: node for node in jax.tree.leaves(tree, is_leaf=is_layer) if is_layer(node)}
    if not found:
        raise OptionError(
            message(
                "clora_jax",
                "there is no adapter in this tree",
                got=type(tree).__name__,
                needed="what attach returned, or a pytree that holds it",
                cause="params passed where adapters belong",
                fix="pass adapters = clora.attach(params, ...)",
            )
        )
    return found


def _head(x: Array, V: Array, info: Info, precision: Any) -> Array:
    """Logits by [weight, bias], or by one of each row's own."""
    bias = info.bias is not None
    d_in = V.shape[-1] - bias
    rows = V.shape[0] if V.ndim == 3 else None
    if x.ndim < 1 or x.shape[-1] != d_in or (rows is not None and x.shape[0] != rows):
        raise ShapeError(
            message(
                f"clora_jax, head {info.leaf!r}",
                "the shapes do not fit together",
                got=f"x {tuple(x.shape)}",
                needed=f"x (..., d_in={d_in})" if rows is None else f"x ({rows} rows, ..., d_in={d_in})",
                cause="inputs of another layer, or another number of rows than rows() was given",
                fix="pass the classifier's inputs",
            )
        )
    W = (V[..., :-1] if bias else V).astype(x.dtype)
    if V.ndim == 2:
        y = lax.dot_general(x, W, (((x.ndim - 1,), (1,)), ((), ())), precision=precision)
        return y + V[:, -1].astype(y.dtype) if bias else y
    y = jnp.matmul(x.reshape(x.shape[0], -1, d_in), W.mT, precision=precision)
    y = y + V[:, None, :, -1].astype(y.dtype) if bias else y
    return y.reshape(*x.shape[:-1], V.shape[-2])


# --- second moments ----------------------------------------------------------------------------------------------

PADDING: ContextVar[Array | None] = ContextVar("padding", default=None)
MASKED: ContextVar[list[str] | None] = ContextVar("masked", default=None)


@contextmanager
def padding(mask: Array | None) -> Any:
    """Within a forward pass that is observed: rows where ``mask`` is 0 are padding, and not remembered.

    A layer whose input has the mask's shape and one axis more is masked by it.
    """
    token = PADDING.set(mask)
    try:
        yield
    finally:
        PADDING.reset(token)


def _observed(y: Array, x: Array, layer: Layer) -> Array:
    """y; going back through it, the second moment of u arrives at the layer's tap."""
    mask = PADDING.get()
    if mask is not None and mask.shape == x.shape[:-1]:
        hit = MASKED.get()
        if hit is not None:
            hit.append(layer.info.name)
        weights = mask
    else:
        weights = jnp.ones(x.shape[:-1], bool)
    assert layer.tap is not None
    wide = layer.tap[0].dtype
    if layer.info.kind == "head":
        u = x.astype(wide)
        u = jnp.concatenate([u, jnp.ones((*u.shape[:-1], 1), wide)], axis=-1) if layer.info.bias else u
    else:
        B = layer.adapter.B if layer.spare is None else jnp.concatenate([layer.adapter.B, layer.spare[1]])
        u = x.astype(B.dtype) @ B.mT
    u = lax.stop_gradient(u)
    # Zero, but of u: under vmap and shard_map the taps then differ from row to row and device to device, as u does, and
    # what comes back is summed over these.
    nothing = u.reshape(-1)[:0].sum().astype(wide)
    return _tap(y, u, weights + nothing, jax.tree.map(lambda tap: tap + nothing, layer.tap))


@jax.custom_vjp
def _tap(y: Array, u: Array, weights: Array, tap: tuple[Array, Array]) -> Array:
    return y


def _tap_forward(y: Array, u: Array, weights: Array, tap: tuple[Array, Array]) -> Any:
    return y, (u.astype(tap[0].dtype), weights)


def _tap_backward(kept: Any, grad_y: Array) -> Any:
    u, weights = kept
    u, weights = u.reshape(-1, u.shape[-1]), weights.reshape(-1)
    C = jnp.matmul((u * weights[:, None]).T, u, precision=lax.Precision.HIGHEST)
    return grad_y, None, None, ((C + C.T) / 2, weights.sum())


_tap.defvjp(_tap_forward, _tap_backward)


# --- beside the model's own arrays -------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kernel:
    """A weight with its adapter, in the weight's place: ``x @ kernel`` (or ``kernel @ x``) is the adapted layer.

    The low-rank path goes by x: no product of the weight's size is made, unless the plan says so. Everything else that
    is done with a weight needs an array: ``bind(..., materialize=True)``.
    """

    weight: Array
    layer: Layer
    turned: bool = dataclasses.field(default=False, metadata={"static": True})
    __array_ufunc__ = None  # NumPy arrays leave x @ kernel to us

    @property
    def T(self) -> Kernel:
        """The other way round; nothing is computed."""
        return dataclasses.replace(self, turned=not self.turned)

    mT = T

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape[::-1] if self.turned else self.weight.shape

    @property
    def ndim(self) -> int:
        return self.weight.ndim

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    def astype(self, dtype: Any) -> Kernel:
        """The weight in another dtype; the adapter stays as it is."""
        return dataclasses.replace(self, weight=self.weight.astype(dtype))

    @property
    def _takes_rows(self) -> bool:
        return (self.layer.info.layout == "in,out") != self.turned

    def __rmatmul__(self, x: Any) -> Array:
        if not self._takes_rows:
            raise self._wrong_side("x @ kernel")
        return self.layer(jnp.asarray(x), self.weight)

    def __matmul__(self, x: Any) -> Array:
        if self._takes_rows:
            raise self._wrong_side("kernel @ x")
        x = jnp.asarray(x)
        return self.layer(x, self.weight) if x.ndim == 1 else self.layer(x.mT, self.weight).mT

    def _wrong_side(self, used: str) -> StateError:
        return StateError(
            message(
                "clora_jax.bind",
                f"the weight {self.layer.info.leaf!r} is multiplied from its other side",
                got=f"{used} with {self.shape}",
                needed="inputs of the layer, on the side of its inputs",
                cause="a weight used twice, as with tied embeddings, or a wrong layout",
                fix="pass layout= to attach, or bind(..., materialize=True)",
            )
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"clora_jax.bind: the adapted weight {self.layer.info.leaf!r} has no {name!r}: only `x @ kernel` is known "
            "to it. Fix: bind(..., materialize=True) gives an array, at the cost of one product of its size."
        )


def path_name(path: Any) -> str:
    """A leaf's path with dots: of dicts, lists, modules and nnx variables alike."""
    parts = []
    for key in path:
        for field in ("key", "name", "idx"):
            if hasattr(key, field):
                parts.append(str(getattr(key, field)))
                break
    if parts and isinstance(path[-1], jax.tree_util.GetAttrKey) and parts[-1] in ("value", "raw_value"):
        parts.pop()  # of an nnx Variable
    return ".".join(parts)


def flatten(params: Tree) -> tuple[dict[str, int], list[Any], Any]:
    """Leaf's name -> its number, the leaves, the treedef."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda node: isinstance(node, Kernel))
    return {path_name(path): i for i, (path, _) in enumerate(paths)}, [leaf for _, leaf in paths], treedef


def bind(params: Tree, adapters: Tree, *, materialize: bool = False) -> Tree:
    """The model's params with each adapted weight standing for the adapted layer: what the model's code is called with.

    Parameters
    ----------
    params : pytree
        The one that `attach` was given, or its like; it is not changed.
    adapters : pytree of Layer
    materialize : bool
        False: adapted weights become `Kernel` objects, which know ``x @ kernel`` and ``kernel @ x`` (equinox's layers,
        models written out). True: they become arrays W + A R B, with the derivatives of `linear`, for code that does
        something else with them (flax.linen, einsum); they can't be observed then.

    Returns
    -------
    pytree of the structure of params

    Raises
    ------
    OptionError
        A layer that params do not have, or have in another shape.
    """
    names, leaves, treedef = flatten(params)
    for layer in layers(adapters).values():
        info = layer.info
        W = leaves[find(names, leaves, info)]
        if not materialize and info.kind == "linear":
            leaves[names[info.leaf]] = Kernel(W, layer)
            continue
        if layer.tap is not None and materialize:
            raise StateError(
                message(
                    "clora_jax.observe",
                    "arrays can't be observed",
                    got="bind(..., materialize=True)",
                    needed="the inputs of the layers",
                    cause="a forward pass that materialises the weights",
                    fix="observe with materialize=False, or through the modules of clora_jax.nnx or clora_jax.equinox",
                )
            )
        if info.kind == "head":
            if not materialize:
                # The bias is of a head's output, so it goes into the product, and zeros into its own place.
                leaves[names[info.leaf]] = Kernel(W, layer)
                if info.bias is not None:
                    leaves[names[info.bias]] = jnp.zeros(layer.adapter.R_old.shape[-2:-1], W.dtype)
                continue
            V = core.routing(layer.still(), xp=jnp)
            weight, b = (V[:, :-1], V[:, -1]) if info.bias is not None else (V, None)
            leaves[names[info.leaf]] = (weight.T if info.layout == "in,out" else weight).astype(W.dtype)
            if info.bias is not None and b is not None:
                leaves[names[info.bias]] = b.astype(W.dtype)
            continue
        update = delta(layer.still(), layout=info.layout, stop_old=info.stop_old)
        leaves[names[info.leaf]] = (W.astype(update.dtype) + update).astype(W.dtype)
    return jax.tree.unflatten(treedef, leaves)


def find(names: dict[str, int], leaves: list[Any], info: Info) -> int:
    """The number of a layer's leaf, of the right shape."""
    number = names.get(info.leaf)
    missing = next((leaf for leaf in (info.leaf, info.bias) if leaf is not None and leaf not in names), None)
    if number is None or missing is not None or tuple(leaves[number].shape) != info.shape:
        got = f"no leaf {missing!r}" if missing is not None or number is None else f"{info.leaf} {leaves[number].shape}"
        raise OptionError(
            message(
                "clora_jax.bind",
                f"these params have no place for layer {info.name!r}",
                got=got,
                needed=f"{info.leaf} {info.shape}",
                cause="params of another model, or a part of the tree that attach was given",
                fix="pass the tree that attach was given",
            )
        )
    return number
