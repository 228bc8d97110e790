"""Putting adapters on a model's layers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch
from torch import nn

import clora_core as core
from clora_core.errors import OptionError, RankError, StateError, message

from . import _attention  # noqa: F401  (registers its kind of layer)
from ._adapter import FACTORS, ContinualAdapter
from ._layers import CHILD, Adapted, adapted_type, kind_of, matrix, refuse, refuse_head, sizes, weight_name
from ._part import HALF, LayerAdapter
from ._targets import Pattern, Target, find, listed, matches, nothing

log = logging.getLogger("clora_torch")


def attach(
    model: nn.Module,
    *,
    rank: int,
    max_rank: int | None = None,
    targets: Pattern | Iterable[Pattern] = "all-linear",
    exclude: Pattern | Iterable[Pattern] = (),
    ranks: Mapping[Pattern, int] | None = None,
    heads: Pattern | Iterable[Pattern] = (),
    factors: str = "first-task",
    scheme: str = "orthonormal",
    scale: float = 1.0,
    stop_old: bool = True,
    train_routing: bool = True,
    dropout: float = 0.0,
    seed: int | np.random.Generator | None = None,
) -> ContinualAdapter:
    """Give layers of a model a C-LoRA adapter each. The function does not change; everything else is frozen.

    Parameters
    ----------
    model : torch.nn.Module
        Loaded, on any device. Its layers stay the same objects with the same weights; `ContinualAdapter.detach` puts
        everything back.
    rank : int
        1 <= rank <= min(d_out, d_in) of every matched layer.
    max_rank : int, optional
        How far `ContinualAdapter.expand` may go with meter and protection exact: the directions for it are drawn now
        and observed in every task. A layer with fewer inputs or outputs gets as many as it has.
    targets : str, compiled regex, or several
        A name, the end of a name at a dot ("query"), a glob ("encoder.*.query"), a compiled regex (searched), or
        "all-linear" (all linear layers but the output layer and the projections of nn.MultiheadAttention).
        "c_attn[q]", "c_attn[0:768]", "in_proj_weight[v]" is one part of a fused projection. Linear, transformers'
        Conv1D, Embedding, Conv1d to Conv3d, nn.MultiheadAttention (its in_proj_weight).
    exclude : the same
        Taken out of targets.
    ranks : mapping of pattern to int, optional
        Other ranks for some layers; the last pattern that matches counts.
    heads : the same as targets
        Linear classifiers that learn as frozen value plus trained difference, and are protected like the adapters.
    factors : {"first-task", "every-task", "never"}
        When A and B learn. "every-task" is the paper; then second moments would be stale, so `drift`, `protect`, `rows`
        and the drift penalty raise.
    scheme : {"orthonormal", "lora", "svd"}
        Start of the factors, see `clora_core.init_adapter`.
    scale : float
        alpha / r in LoRA's terms, folded into A. With frozen factors it sets how far a step of R_delta goes.
    stop_old : bool
        A and B learn through R_delta alone (eqs. 11-12 of arXiv:2502.17920).
    train_routing : bool
        False with ``factors="every-task", scheme="lora", stop_old=False`` is plain LoRA: R stays the identity.
    dropout : float in [0, 1)
        On the routed inputs u (n x r), while training.
    seed : int or numpy.random.Generator, optional
        Source of the factors; by default drawn from torch's generator, so that torch.manual_seed rules.

    Returns
    -------
    ContinualAdapter
        Its ``print`` says what was matched, as does the logger "clora_torch" at level INFO.

    Raises
    ------
    OptionError
        An unknown option; a target that matches nothing (near names are listed); a layer that can't be adapted, with
        the reason (tied weights can: the adapter belongs to the matched layer alone).
    StateError
        A layer that has an adapter already, or whose weight is not loaded.
    RankError
        A rank that does not fit a layer.
    """
    _check(factors, scheme, train_routing, dropout, rank, max_rank)
    modules = dict(model.named_modules())
    refuse_second(modules)
    heads = _heads(modules, listed(heads))
    found = find(model, targets, rank=rank, ranks=ranks or {}, exclude=exclude, heads=heads) if targets else []
    names = sorted({t.name for t in found} | heads)
    if not names:
        raise OptionError(
            message(
                "clora_torch.attach",
                "there is nothing to adapt",
                got="no targets and no heads",
                needed="at least one layer",
                cause="an empty list",
                fix="pass targets='all-linear', or names",
            )
        )
    for name in names:
        refuse_layer(name, modules, head=name in heads)
    if seed is None:
        seed = int(torch.randint(2**62, ()).item())
    rng = np.random.default_rng(seed)
    parts = {t: _part(t, modules[t.name], rng, scheme, scale, stop_old, dropout, max_rank) for t in found}
    return install(model, parts, sorted(heads), factors, train_routing, scale)


def install(
    model: nn.Module,
    parts: Mapping[Target, LayerAdapter],
    heads: Sequence[str],
    factors: str,
    train_routing: bool,
    scale: float,
) -> ContinualAdapter:
    """Put adapters on layers that were found fit for them, turn classifiers into heads, and freeze the rest."""
    modules = dict(model.named_modules())
    frozen = {p: p.requires_grad for p in model.parameters()}
    for parameter in frozen:
        parameter.requires_grad_(False)
    layers: dict[str, LayerAdapter] = {}
    for target, part in parts.items():
        module: Any = modules[target.name]
        if CHILD not in module._modules:
            _adapt(module, nn.ModuleDict() if target.rows else part)
        if target.rows:
            module._modules[CHILD].add_module(f"{target.rows[0]}:{target.rows[1]}", part)
        layers[str(target)] = part
    for name in (name for name in modules if name in heads):
        layers[name] = head(modules[name])
    for name in {*(target.name for target in parts), *heads}:
        parent = modules.get(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention) and CHILD not in parent._modules:
            _adapt(parent, nn.ModuleDict())  # so that it calls its out_proj
    adapter = ContinualAdapter(model, layers, frozen, factors, train_routing, scale)
    log.info("%s", adapter)
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats for m in modules.values()):
        log.warning(
            "the model has BatchNorm layers: their running statistics move in train mode, and restore() does not bring "
            "them back; put them in eval mode while training"
        )
    return adapter


def refuse_second(modules: Mapping[str, nn.Module]) -> None:
    """One adapter per model."""
    held = next((n for n, m in modules.items() if isinstance(m, Adapted)), None)
    if held is not None:
        raise StateError(
            message(
                "clora_torch.attach",
                f"the model has adapters already, on {held!r} for one",
                got="a second attach",
                needed="a model without adapters",
                cause="attach called twice on one model, or a copied model whose adapter was not copied with it",
                fix="name all layers in one attach; or call detach() of the first adapter before",
            )
        )


def refuse_layer(name: str, modules: Mapping[str, nn.Module], *, head: bool) -> None:
    """Raise where a layer can't be adapted, or can't be a head."""
    refuse(name, modules[name], modules.get(name.rpartition(".")[0]))
    if head:
        refuse_head(name, modules[name])


def _heads(modules: Mapping[str, nn.Module], patterns: Sequence[Pattern]) -> set[str]:
    """Names of the linear layers that any pattern means; every pattern must match one."""
    linear = [n for n, m in modules.items() if isinstance(m, nn.Linear)]
    found: set[str] = set()
    for pattern in patterns:
        matched = {n for n in linear if matches(n, pattern)}
        if not matched:
            raise nothing(pattern, pattern, linear)
        found |= matched
    return found


def head(module: Any) -> LayerAdapter:
    """Turn a linear layer into a head that remembers."""
    W, bias = module.weight.detach(), module.bias
    wide = W.float() if W.dtype in HALF else W
    V = wide.clone() if bias is None else torch.cat([wide, bias.detach().to(wide.dtype)[:, None]], dim=1)
    part = LayerAdapter(core.Adapter(None, V, torch.zeros_like(V), None))
    module.__class__ = adapted_type("head", type(module))
    module.add_module(CHILD, part)
    return part


def _adapt(module: nn.Module, child: nn.Module) -> None:
    kind = kind_of(module)
    assert kind is not None
    module.__class__ = adapted_type(kind, type(module))
    module.add_module(CHILD, child)


def _part(
    target: Target,
    module: nn.Module,
    rng: np.random.Generator,
    scheme: str,
    scale: float,
    stop_old: bool,
    dropout: float,
    max_rank: int | None,
) -> LayerAdapter:
    d_out, d_in = sizes(module)
    weight: Any = getattr(module, weight_name(module))
    W = None
    if weight.is_floating_point():
        W = matrix(module).detach()
        W = W.float() if W.dtype in HALF else W
        W = W if target.rows is None else W[slice(*target.rows)]
    d_out = d_out if target.rows is None else target.rows[1] - target.rows[0]
    if not 1 <= target.rank <= min(d_out, d_in):
        raise RankError(
            message(
                "clora_torch.attach",
                f"the rank does not fit layer {str(target)!r}",
                got=f"rank={target.rank} for d_out={d_out}, d_in={d_in}",
                needed=f"1 <= rank <= {min(d_out, d_in)}",
                cause="one rank for all layers, with a small layer (a classifier) among them",
                fix="give it a rank of its own (ranks=), leave it out (exclude=), or make it a head (heads=)",
            )
        )
    like = {"dtype": torch.float32 if W is None else W.dtype, "device": weight.device}
    adapter = core.init_adapter(rng, d_out, d_in, target.rank, scheme=scheme, W=W, **like, xp=xp)
    part = LayerAdapter(adapter._replace(A=scale * adapter.A), rows=target.rows, stop_old=stop_old, dropout=dropout)
    spare = 0 if max_rank is None else min(max_rank, d_out, d_in) - target.rank
    if spare > 0:
        part.add_spare(spare, rng, scale)
    return part


def _check(factors: str, scheme: str, train_routing: bool, dropout: float, rank: int, max_rank: int | None) -> None:
    def no(what: str, got: str, needed: str, cause: str, fix: str) -> OptionError:
        return OptionError(message("clora_torch.attach", what, got=got, needed=needed, cause=cause, fix=fix))

    if factors not in FACTORS:
        names = "one of " + ", ".join(map(repr, FACTORS))
        raise no("unknown factors mode", repr(factors), names, "a misspelt name", "pass one of the names listed")
    if not train_routing and factors != "every-task":
        raise no(
            "nothing would learn after the first task",
            f"train_routing=False, factors={factors!r}",
            "factors='every-task' where the routing does not learn",
            "plain LoRA asked for with frozen factors",
            "pass factors='every-task', or let the routing learn",
        )
    if scheme == "lora" and factors == "never":
        raise no(
            "nothing could ever learn",
            "scheme='lora', factors='never'",
            "factors that are not zero",
            "A = 0 stays 0 where factors do not learn, and R_delta has no gradient through it",
            "pass scheme='orthonormal' or 'svd', or let the factors learn",
        )
    if not 0.0 <= dropout < 1.0:
        raise no("dropout is no probability", repr(dropout), "0 <= dropout < 1", "a percentage", "pass for example 0.1")
    if max_rank is not None and max_rank < rank:
        raise no(
            "no rank to grow to",
            f"max_rank={max_rank}, rank={rank}",
            "max_rank >= rank",
            "the two exchanged",
            "leave max_rank out, or raise it",
        )
