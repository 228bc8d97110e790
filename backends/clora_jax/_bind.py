"""Adapters in the places of the weights they belong to: what a model's code is called with."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import clora_core as core
from clora_core.errors import StateError, message

from ._function import delta
from ._layer import Layer, Tree, find, flatten, layers


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

    def _no_array(self, *_: Any) -> Any:
        raise TypeError(
            f"clora_jax.bind: the adapted weight {self.layer.info.leaf!r} is no array: only `x @ kernel` is known to "
            "it. Fix: bind(..., materialize=True) gives an array, at the cost of one product of its size."
        )

    __getitem__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __neg__ = _no_array

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
        something else with them (flax.linen, einsum); they can't be observed then. Beside half-precision weights the
        arrays are float32, since most of an update would be rounded away.

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
        number = find(names, leaves, info)
        if materialize:
            leaves[number], bias = _arrays(layer, leaves[number])
        else:  # a head's product has its bias in it, so that zeros are left to be added
            rows, dtype = layer.adapter.R_old.shape[-2], leaves[number].dtype
            leaves[number], bias = Kernel(leaves[number], layer), jnp.zeros(rows, dtype)
        if info.bias is not None:
            leaves[names[info.bias]] = bias
    return jax.tree.unflatten(treedef, leaves)


def _arrays(layer: Layer, W: Array) -> tuple[Array, Array | None]:
    """The adapted weight as an array, and a head's bias."""
    info = layer.info
    if layer.tap is not None:
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
    if info.kind == "linear":
        update = delta(layer.still(), layout=info.layout, stop_old=info.stop_old)
        return W.astype(jnp.promote_types(W.dtype, update.dtype)) + update, None
    V = core.routing(layer.still(), xp=jnp)
    weight, bias = (V, None) if info.bias is None else (V[:, :-1], V[:, -1])
    return (weight.T if info.layout == "in,out" else weight), bias
