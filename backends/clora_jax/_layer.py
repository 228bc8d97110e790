"""One adapted layer as a pytree node, and its place in the model's own tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

import clora_core as core
from clora_core.errors import MomentsIncomplete, OptionError, ShapeError, message

from ._errors import option_error, state_error
from ._function import linear
from ._taps import Tap, observed

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
    second_order : bool
        The two routes are computed apart, see `linear`.
    started : bool
        A task is finished.
    complete : bool
        Every finished task was observed, in all directions that are in use.
    blind : bool
        Directions are in use that an earlier task knows nothing of.
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
    second_order: bool = False
    started: bool = False
    complete: bool = True
    blind: bool = False


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
    tap, mask : arrays or None
        Zeros whose "gradients" are the sum of u u^T and the number of rows; which rows count. Only inside `observe`.
    info : Info
    """

    adapter: core.Adapter
    moments: core.Moments | None
    spare: tuple[Array, Array] | None
    info: Info = dataclasses.field(metadata={"static": True})
    tap: Tap | None = None
    mask: Array | None = None

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
        return core.Moments(S[..., :columns, :columns], P[..., :rows, :columns], q)

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
    ) -> Array:
        """The layer's output (..., d_out) for x (..., d_in); W and bias as the model has them. A head needs neither."""
        adapter = self.still()
        if self.info.kind == "head":
            y = _head(x, core.routing(adapter, xp=jnp), W.dtype, self.info, precision)
        else:
            info = self.info
            how = {"layout": info.layout, "stop_old": info.stop_old, "second_order": info.second_order}
            y = linear(x, W, adapter, bias, precision=precision, name=info.leaf, **how)
        if self.tap is None:
            return y
        B = None if self.adapter.B is None else self.whole().B
        return observed(y, x, B, self.tap, self.mask, constant=self.info.bias is not None)


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
        There is none, or two have one name.
    """
    found: dict[str, Layer] = {}
    for layer in each(tree):
        if layer.info.name in found:
            what, got = "two layers have one name", repr(layer.info.name)
            fix = "attach once to the whole tree; clora_jax.nnx.adapters(model) names layers by their place"
            raise option_error("layers", what, got, "a name for each", fix, "trees that were attached to one by one")
        found[layer.info.name] = layer
    return found


def each(tree: Tree) -> list[Layer]:
    """The layers of a tree, in its order."""
    found = [node for node in jax.tree.leaves(tree, is_leaf=is_layer) if is_layer(node)]
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


def _head(x: Array, V: Array, dtype: Any, info: Info, precision: Any) -> Array:
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
    dtype = jnp.result_type(x, dtype)  # that of the base's own product
    x, W = x.astype(dtype), (V[..., :-1] if bias else V).astype(dtype)
    if V.ndim == 2:
        y = lax.dot_general(x, W, (((x.ndim - 1,), (1,)), ((), ())), precision=precision)
        return y + V[:, -1].astype(y.dtype) if bias else y
    y = jnp.matmul(x.reshape(x.shape[0], -1, d_in), W.mT, precision=precision)
    y = y + V[:, None, :, -1].astype(y.dtype) if bias else y
    return y.reshape(*x.shape[:-1], V.shape[-2])


def path_name(path: Any) -> str:
    """A leaf's path with dots: of dicts, lists, modules and nnx variables alike."""
    parts = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    tree = jax.tree_util
    if len(path) > 1 and isinstance(path[-2], tree.DictKey) and path[-1] == tree.GetAttrKey("value"):
        parts.pop()  # an nnx State is a dict of Variables
    return ".".join(parts)


def flatten(params: Tree) -> tuple[dict[str, int], list[Any], Any]:
    """Leaf's name -> its number, the leaves, the treedef.

    Raises
    ------
    OptionError
        Two arrays of one name, as keys with dots make them.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    names: dict[str, int] = {}
    for i, (path, leaf) in enumerate(paths):
        name = path_name(path)
        if name in names and hasattr(leaf, "dtype"):
            cause, fix = "a key with a dot in it", "rename the key"
            raise option_error("attach", "two arrays have one path", repr(name), "a path for each", fix, cause)
        names[name] = i
    return names, [leaf for _, leaf in paths], treedef


def find(names: dict[str, int], leaves: list[Any], info: Info) -> int:
    """The number of a layer's leaf, of the right shape."""
    number = names.get(info.leaf)
    missing = next((leaf for leaf in (info.leaf, info.bias) if leaf is not None and leaf not in names), None)
    if number is None or missing is not None or tuple(leaves[number].shape) not in (info.shape, info.shape[-2:]):
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


def need_moments(adapters: Tree, verb: str, *, complete: bool = True) -> None:
    """Second moments must be there, and cover every task: known from what is static, so also said while tracing."""
    for layer in each(adapters):
        name = layer.info.name
        if layer.moments is None:
            fix = "attach with factors='first-task' or 'never'"
            what = "the factors learn in every task, so second moments are stale"
            raise state_error(verb, what, "factors='every-task'", fix)
        if complete and not layer.info.complete:
            raise MomentsIncomplete(
                message(
                    f"clora_jax.{verb}",
                    f"layer {name!r} has not seen every finished task in every direction that is in use",
                    got="a task ended without observed=, or a rank grown beyond max_rank",
                    needed="end_task(adapters, observe(...)) at the end of every task",
                    cause="observe left out",
                    fix="observe every task; attach with max_rank= to grow",
                )
            )
