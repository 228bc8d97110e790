"""Which leaves of a pytree a pattern means, and the adapters made for them."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import clora_core as core
from clora_core.errors import RankError, ShapeError, message

from ._errors import option_error
from ._function import LAYOUTS
from ._layer import Info, Layer, Tree, flatten

Pattern = str | re.Pattern[str]
NAMES = {"kernel": "in,out", "weight": "out,in"}  # flax's and equinox's; what "all-linear" means
FACTORS = ("every-task", "first-task", "never")


def attach(
    params: Tree,
    *,
    rank: int,
    max_rank: int | None = None,
    targets: Pattern | Iterable[Pattern] = "all-linear",
    exclude: Pattern | Iterable[Pattern] = (),
    ranks: Mapping[Pattern, int] | None = None,
    heads: Pattern | Iterable[Pattern] = (),
    stacked: Pattern | Iterable[Pattern] = (),
    layout: str | None = None,
    factors: str = "first-task",
    scheme: str = "orthonormal",
    scale: float = 1.0,
    stop_old: bool = True,
    train_routing: bool = True,
    second_order: bool = False,
    seed: int | np.random.Generator = 0,
) -> dict[str, Layer]:
    """C-LoRA adapters for weights of a model, beside its untouched params. The function does not change.

    Parameters
    ----------
    params : pytree
        Any: nested dicts, an equinox module, the state of an nnx module. Weights of two axes are adapted, and
        ``stacked`` ones of three.
    rank : int
        1 <= rank <= min(d_out, d_in) of every matched weight.
    max_rank : int, optional
        How far `expand` may go with meter and protection exact: the directions for it are drawn now.
    targets : str, compiled regex, or several
        The path of a leaf or of the module that holds it, with dots or slashes ("encoder/0/query"), its end ("query"),
        a glob ("encoder.*.query"), a compiled regex (searched), or "all-linear": every leaf named kernel or weight
        that has two axes, heads left out.
    exclude : the same
        Taken out of targets.
    ranks : mapping of pattern to int, optional
        Other ranks for some layers; the last pattern that matches counts.
    heads : the same as targets
        Linear classifiers, learned as frozen value plus trained difference and protected like the adapters, with the
        bias that lies beside the weight.
    stacked : the same as targets
        Weights whose first axis counts layers, for `jax.lax.scan`: each layer has an adapter of its own, stacked as
        well. Attach to the tree that is scanned over, and bind inside of the loop.
    layout : {"in,out", "out,in"}, optional
        Of the weights. By default from their names: kernel is (d_in, d_out), weight is (d_out, d_in).
    factors : {"first-task", "every-task", "never"}
        When A and B learn. "every-task" is the paper; second moments would be stale then, so `drift`, `protect`, `rows`
        and the drift penalty raise.
    scheme : {"orthonormal", "lora", "svd"}
        Start of the factors, see `clora_core.init_adapter`.
    scale : float
        alpha / r in LoRA's terms, folded into A.
    stop_old : bool
        A and B learn through R_delta alone (eqs. 11-12 of arXiv:2502.17920).
    train_routing : bool
        False with ``factors="every-task", scheme="lora", stop_old=False`` is plain LoRA.
    second_order : bool
        Second derivatives by A and B exist, see `linear`.
    seed : int or numpy.random.Generator
        Source of the factors, the same in every framework.

    Returns
    -------
    dict of str to Layer
        Module's path -> its adapter: a pytree to be trained, passed to `bind`, and to every other verb. Arrays are
        float32, or the weight's dtype where that is wider, and sharded as the weight's axes are.

    Raises
    ------
    OptionError
        An unknown option; a target that matches nothing (near names are listed) or a leaf that is no weight.
    RankError
        A rank that does not fit a weight.
    """
    _check(factors, scheme, train_routing, rank, max_rank, layout)
    names, leaves, _ = flatten(params)
    weights = {name: leaves[i] for name, i in names.items() if _floating(leaves[i])}
    head_leaves = _find(weights, heads, "heads") if heads else []
    chosen = _find(weights, targets, "targets", exclude, head_leaves) if targets else []
    stacks = _find(weights, stacked, "stacked") if stacked else []
    chosen = [name for name in weights if name in {*chosen, *stacks}]
    if not chosen and not head_leaves:
        raise option_error("attach", "there is nothing to adapt", "no targets and no heads", "one", "pass targets=")
    rng = seed if isinstance(seed, np.random.Generator) else np.random.default_rng(seed)
    rules = {"factors": factors, "stop_old": stop_old, "train_routing": train_routing, "scale": float(scale)}
    rules |= {"second_order": second_order}
    for pattern in ranks or {}:
        if not any(matches(name, pattern) for name in chosen):
            raise _nothing("ranks", pattern, chosen)
    found: dict[str, Layer] = {}
    for name in chosen:
        own = [r for pattern, r in (ranks or {}).items() if matches(name, pattern)]
        info = place(name, weights[name], layout, "linear", None, rules)
        info = info._replace(name=name) if info.name in found else info  # a module with two weights
        rank_of = own[-1] if own else rank
        found[info.name] = make_layer(weights[name], info, rng, rank_of, max_rank, scheme, stacked=name in stacks)
    for name in head_leaves:
        beside = f"{name.rpartition('.')[0]}.bias".removeprefix(".")
        bias = beside if beside in weights else None
        info = place(name, weights[name], layout, "head", bias, rules)
        found[info.name] = make_head(weights[name], None if bias is None else weights[bias], info)
    return found


def place(leaf: str, W: Any, layout: str | None, kind: str, bias: str | None, rules: dict[str, Any]) -> Info:
    """The static half of a layer."""
    module, _, last = leaf.rpartition(".")
    named = last in NAMES and module
    return Info(
        name=module if named else leaf,
        leaf=leaf,
        bias=bias,
        kind=kind,
        layout=layout or NAMES.get(last, "in,out"),
        shape=tuple(W.shape),
        **rules,
    )


def make_layer(
    W: Any,
    info: Info,
    rng: np.random.Generator,
    rank: int,
    max_rank: int | None = None,
    scheme: str = "orthonormal",
    *,
    stacked: bool = False,
) -> Layer:
    """An adapter for one weight, or for each of a stack."""
    if len(info.shape) != 2 + stacked:
        raise ShapeError(
            message(
                "clora_jax.attach",
                f"the weight {info.leaf!r} is no matrix",
                got=f"{info.shape}",
                needed="a layer's number and two axes" if stacked else "two axes",
                cause="a convolution, an attention's projection, or layers stacked for lax.scan",
                fix="exclude= it; name it in stacked= if its first axis counts layers; clora_jax.nnx.attach knows the "
                "projections of flax",
            )
        )
    d_out, d_in = info.shape[-2:] if info.layout == "out,in" else info.shape[:-3:-1]
    most = min(d_out, d_in)
    if not 1 <= rank <= most:
        raise RankError(
            message(
                "clora_jax.attach",
                f"the rank does not fit layer {info.name!r}",
                got=f"rank={rank}, d_out={d_out}, d_in={d_in}",
                needed=f"1 <= rank <= {most}",
                cause="a small layer among large ones",
                fix="lower rank=, give ranks={pattern: rank}, or exclude= the layer",
            )
        )
    dtype = W.dtype if W.dtype in (jnp.float32, jnp.float64) else jnp.dtype("float32")
    if scheme == "svd":
        wide = jnp.asarray(W, dtype)
        drawn = core.init_adapter(rng, d_out, d_in, rank, scheme=scheme, W=wide if info.layout == "out,in" else wide.mT)
        drawn = core.Adapter(*map(np.asarray, drawn))
    else:
        batch = tuple(info.shape[:-2])
        drawn = core.init_adapter(rng, d_out, d_in, rank, scheme=scheme, batch=batch, dtype=np.dtype(dtype.name))
    drawn = drawn._replace(A=drawn.A * np.asarray(info.scale, drawn.A.dtype))
    by_out, by_in, alike = shardings(W, info.layout)
    A, R_old, R_delta, B = drawn
    adapter = core.Adapter(_put(A, by_out), _put(R_old, alike), _put(R_delta, alike), _put(B, by_in))
    more = 0 if max_rank is None else min(max_rank, most) - rank
    spare = None
    if more > 0:
        A, B = spare_directions(A, B, more, rng, info.scale)
        spare = (_put(A, by_out), _put(B, by_in))
    return Layer(adapter, empty(info, rank + max(more, 0), rank + max(more, 0), alike), spare, info)


def spare_directions(A: Any, B: Any, count: int, rng: np.random.Generator, scale: float) -> tuple[Any, Any]:
    """New directions, orthonormal up to ``scale`` and orthogonal to those there: as clora_torch draws them."""
    out = []
    for factor, size in ((A, scale), (np.swapaxes(B, -1, -2), 1.0)):
        wide = np.asarray(factor, np.float64)
        joint = np.concatenate([wide, rng.standard_normal((*wide.shape[:-1], count))], axis=-1)
        out.append((size * core.orthonormalize(joint)[..., wide.shape[-1] :]).astype(factor.dtype))
    return out[0], np.ascontiguousarray(np.swapaxes(out[1], -1, -2))


def make_head(W: Any, bias: Any, info: Info) -> Layer:
    """Frozen value plus trained difference of a classifier."""
    if len(info.shape) != 2:
        raise option_error(
            "attach",
            f"head {info.name!r} is no linear classifier",
            info.shape,
            "two axes",
            "name a linear layer",
            "a convolution",
        )
    wide = W.dtype if W.dtype in (jnp.float32, jnp.float64) else jnp.float32
    # A copy: a step that is given its adapters by donation must not take the base along.
    weight = jnp.array(W if info.layout == "out,in" else W.T, wide, copy=True)
    if bias is not None and bias.shape != (weight.shape[0],):
        got, fix = f"bias {tuple(bias.shape)}", "rename it, if it is no bias"
        needed, cause = f"({weight.shape[0]},)", "an array beside the weight that is called bias"
        raise option_error("attach", f"the bias of head {info.name!r} does not fit", got, needed, fix, cause)
    V = weight if bias is None else jnp.concatenate([weight, jnp.asarray(bias, wide)[:, None]], axis=1)
    return Layer(core.Adapter(None, V, jnp.zeros_like(V), None), empty(info, V.shape[0], V.shape[1], None), None, info)


def empty(info: Info, rows: int, columns: int, sharding: Any) -> core.Moments | None:
    """No memory yet; in float64 where JAX has it."""
    if info.factors == "every-task":
        return None
    wide = jax.dtypes.canonicalize_dtype(np.float64)
    lead = info.shape[:-2]
    S, P, q = (_put(np.zeros((*lead, *shape), wide), sharding) for shape in ((columns, columns), (rows, columns), ()))
    return core.Moments(S, P, q)


def shardings(W: Any, layout: str) -> tuple[Any, Any, Any]:
    """Of A, of B, and of what every device needs: A is split as the weight's outputs are, B as its inputs."""
    sharding = getattr(W, "sharding", None)
    if isinstance(W, Tracer) or not isinstance(sharding, NamedSharding):
        return None, None, None
    mesh, ndim = sharding.mesh, len(W.shape)
    if AxisType.Explicit in mesh.axis_types:
        fix, cause = "make the mesh with axis_types=(AxisType.Auto,) * axes", "jax.make_mesh's default"
        raise option_error("attach", "the mesh has explicit axes", str(mesh.axis_types), "AxisType.Auto", fix, cause)
    *lead, first, last = (*sharding.spec, *(None,) * ndim)[:ndim]
    out, into = (first, last) if layout == "out,in" else (last, first)
    specs = (PartitionSpec(*lead, out, None), PartitionSpec(*lead, None, into), PartitionSpec())
    by_out, by_in, alike = (NamedSharding(mesh, spec) for spec in specs)
    return by_out, by_in, alike


def _put(array: Any, sharding: Any) -> Any:
    return jnp.asarray(array) if sharding is None else jax.device_put(array, sharding)


def _floating(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape") and jnp.issubdtype(leaf.dtype, jnp.floating)


# --- patterns ----------------------------------------------------------------------------------------------------


def listed(patterns: Pattern | Iterable[Pattern]) -> tuple[Pattern, ...]:
    """One pattern may stand alone."""
    return (patterns,) if isinstance(patterns, str | re.Pattern) else tuple(patterns)


def matches(leaf: str, pattern: Pattern) -> bool:
    """A leaf goes by its own path and by its module's; a name or glob matches all of one, or its end at a dot."""
    if isinstance(pattern, re.Pattern):
        return pattern.search(leaf) is not None or pattern.search(leaf.replace(".", "/")) is not None
    leaf, pattern = leaf.replace("/", "."), pattern.replace("/", ".")
    module, _, last = leaf.rpartition(".")
    names = (leaf, module) if last in NAMES else (leaf,)
    if pattern in names or any(name.endswith(f".{pattern}") for name in names):  # also where it has a glob's letters
        return True
    return any(fnmatch.fnmatchcase(n, p) for n in names if n for p in (pattern, f"*.{pattern}"))


def _find(
    weights: Mapping[str, Any],
    patterns: Pattern | Iterable[Pattern],
    what: str,
    exclude: Pattern | Iterable[Pattern] = (),
    taken: list[str] | None = None,
) -> list[str]:
    """The leaves that patterns mean, in the model's order. Every pattern must match; an exclude may match nothing."""
    linear = [n for n, W in weights.items() if n.rpartition(".")[2] in NAMES and len(W.shape) == 2]
    chosen: set[str] = set()
    for pattern in listed(patterns):
        found = linear if pattern == "all-linear" else [n for n in weights if matches(n, pattern)]
        if len(found) > 1 and pattern != "all-linear":  # a glob takes biases along, which nobody meant
            found = [n for n in found if len(weights[n].shape) > 1] or found
        found = [n for n in found if n not in (taken or ()) and not any(matches(n, e) for e in listed(exclude))]
        if not found:
            raise _nothing(what, pattern, [n for n, W in weights.items() if len(W.shape) > 1])
        chosen |= set(found)
    return [name for name in weights if name in chosen]


def _nothing(what: str, pattern: Pattern, names: Iterable[str]) -> Exception:
    names = list(names)
    text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern.replace("/", ".")
    modules = [n.rpartition(".")[0] if n.rpartition(".")[2] in NAMES else n for n in names]
    ends = sorted({n.rpartition(".")[2] for n in modules if n})
    near = difflib.get_close_matches(text, [*names, *modules, *ends], n=5, cutoff=0.5)
    got = repr(pattern) if isinstance(pattern, str) else f"re.compile({text!r})"
    needed = "a path, its end, a glob, a compiled regex, or 'all-linear'; weights: " + (
        ", ".join(map(repr, names[:12])) or "none"
    )
    cause = "a misspelt name, or one that exclude takes out" + (f"; near: {', '.join(map(repr, near))}" if near else "")
    return option_error("attach", f"{what} matches no weight", got, needed, "pass paths as the tree has them", cause)


def _check(factors: str, scheme: str, train_routing: bool, rank: int, max_rank: int | None, layout: str | None) -> None:
    if factors not in FACTORS:
        raise option_error("attach", "unknown factors mode", repr(factors), " or ".join(map(repr, FACTORS)), "pass one")
    if layout is not None and layout not in LAYOUTS:
        raise option_error("attach", "unknown layout", repr(layout), " or ".join(map(repr, LAYOUTS)), "pass one")
    if not train_routing and factors != "every-task":
        got, cause = f"train_routing=False, factors={factors!r}", "plain LoRA asked for with frozen factors"
        needed, fix = "factors='every-task' where the routing does not learn", "pass factors='every-task'"
        raise option_error("attach", "nothing would learn after the first task", got, needed, fix, cause)
    if scheme == "lora" and factors == "never":
        cause = "A = 0 stays 0 where factors do not learn, and R_delta has no gradient through it"
        got, fix = "scheme='lora', factors='never'", "pass scheme='orthonormal' or 'svd', or let the factors learn"
        raise option_error("attach", "nothing could ever learn", got, "factors that are not zero", fix, cause)
    if max_rank is not None and max_rank < rank:
        got, fix = f"max_rank={max_rank}, rank={rank}", "raise max_rank, or leave it out"
        raise option_error("attach", "max_rank is below rank", got, "max_rank >= rank", fix, "the two exchanged")
