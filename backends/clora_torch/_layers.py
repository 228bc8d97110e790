"""What attach makes of a layer: a subclass of the layer's class that adds the part of its adapters.

A layer keeps its identity, its weight and the names of its parameters; only its class is exchanged, as
torch.nn.utils.parametrize and fully_shard do. Nothing of tasks lives here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from clora_core.errors import DTypeError, OptionError, StateError, message

from ._function import adapted_linear, routed
from ._part import LayerAdapter

CHILD = "clora"
_Module: Any = nn.Module if TYPE_CHECKING else object  # mixed in before a class that is one


class Adapted(_Module):
    """Mixin of every class that attach makes. The adapters are children named "clora"."""

    _clora_kind: ClassVar[str]
    _clora_base: ClassVar[Any]
    bias: Any
    _clora_pristine: dict[str, nn.Parameter] | None = None  # the layer's own Parameters while merged

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *rest = super().__reduce_ex__(protocol)
        return (_rebuild, (type(self)._clora_kind, type(self)._clora_base), *rest)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Weights set aside by a merge move and are cast with the model."""
        with torch.no_grad():
            for parameter in (self._clora_pristine or {}).values():
                parameter.data = fn(parameter.data)
        return super()._apply(fn, recurse)

    def parts(self) -> list[LayerAdapter]:
        """The adapters of this layer: one, or one for each adapted part of a fused projection."""
        child: Any = self._modules[CHILD]
        return [child] if isinstance(child, LayerAdapter) else list(child.values())

    def active(self, x: Tensor) -> list[LayerAdapter]:
        """The adapters to apply in this forward pass."""
        if self._clora_pristine is not None:
            return []
        parts = [part for part in self.parts() if part.enabled]
        for part in parts:
            if part.R_delta.device != x.device:
                raise StateError(
                    message(
                        f"clora_torch.{type(self).__name__}",
                        "input and adapter are on different devices",
                        got=f"input on {x.device}, adapter on {part.R_delta.device}",
                        needed="one device",
                        cause="the batch, or a part of the model, was not moved",
                        fix="call model.to(device) after attach, and move the batch",
                    )
                )
            if part.R_delta.dtype != part.R_old.dtype:
                raise StateError(
                    message(
                        f"clora_torch.{type(self).__name__}",
                        "what learns is in another precision than the past",
                        got=f"R_delta {part.R_delta.dtype}, R_old {part.R_old.dtype}",
                        needed="one precision: folding would change the function",
                        cause="fully_shard with MixedPrecisionPolicy(param_dtype=...)",
                        fix="leave param_dtype out; load the base model in bfloat16, or train under torch.autocast",
                    )
                )
        return parts


def _rows_error(got: int, needed: int) -> StateError:
    return StateError(
        message(
            "clora_torch.rows",
            "the batch has another number of rows than rows(...) names",
            got=f"{got} rows",
            needed=f"{needed}, one task name for each",
            cause="a batch of another size, or a model that reshapes the batch before this layer",
            fix="name a task for every row of the batch",
        )
    )


def update_of(down: Any, x: Tensor, part: LayerAdapter) -> Tensor:
    """What one adapter adds to its layer's output, channels last; see `routed`. Keeps u if it is being observed."""
    if part.seen is not None:
        with torch.no_grad():
            part.observe(down(x, part.whole.B))
    if part.R_rows is None:
        drop = part.dropout if part.training else 0.0
        return routed(down, x, part.adapter, stop_old=part.stop_old, dropout=drop)
    u = down(x, part.B)
    if u.shape[0] != part.R_rows.shape[0]:
        raise _rows_error(u.shape[0], part.R_rows.shape[0])
    return (u.reshape(u.shape[0], -1, u.shape[-1]) @ part.R_rows.mT).reshape(u.shape) @ part.A.T


def add_update(y: Tensor, update: Tensor, rows: tuple[int, int] | None) -> Tensor:
    """The layer's output with an update of some of its last axis, or all of it."""
    if rows is None:
        return y + update
    before, own, after = y.tensor_split(rows, dim=-1)
    return torch.cat([before, own + update, after], dim=-1)


class AdaptedLinear(Adapted):
    """nn.Linear, and transformers' Conv1D whose weight is stored transposed."""

    _clora_kind = "linear"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with the adapter's part."""
        parts = self.active(x)
        base = type(self)._clora_base
        if not parts:
            return super().forward(x, *args, **kwargs)
        part = parts[0]
        fast = is_conv1d(base) or base.forward is nn.Linear.forward
        if fast and part.rows is None and part.seen is None and part.R_rows is None:
            W = matrix(self)
            drop = part.dropout if part.training else 0.0
            return adapted_linear(x, W, self.bias, part.adapter, stop_old=part.stop_old, dropout=drop)
        y = super().forward(x, *args, **kwargs)
        for part in parts:
            with torch.autocast(x.device.type, enabled=False):
                update = update_of(functional.linear, x.to(part.B.dtype), part).to(y.dtype)
            y = add_update(y, update, part.rows)
        return y


class AdaptedEmbedding(Adapted):
    """nn.Embedding as a linear layer of one-hot rows: u are columns of B."""

    _clora_kind = "embedding"

    def forward(self, x: Tensor) -> Tensor:
        """The embedding with the adapter's part."""
        parts = self.active(x)
        y = super().forward(x)
        for part in parts:
            y = y + update_of(_lookup, x, part).to(y.dtype)
        return y


def _lookup(x: Tensor, B: Tensor) -> Tensor:
    return functional.embedding(x, B.T)


class AdaptedConv(Adapted):
    """nn.Conv1d, 2d, 3d without groups: B is a convolution to r channels, A R a 1 x 1 convolution after it."""

    _clora_kind = "conv"

    def forward(self, x: Tensor) -> Tensor:
        """The convolution with the adapter's part."""
        parts = self.active(x)
        y = super().forward(x)
        channel = -len(self.kernel_size) - 1

        def down(x: Tensor, B: Tensor) -> Tensor:
            kernel = B.reshape(B.shape[0], *self.weight.shape[1:])
            return self._conv_forward(x, kernel, None).movedim(channel, -1)

        for part in parts:
            with torch.autocast(x.device.type, enabled=False):
                update = update_of(down, x.to(part.B.dtype), part)
            y = y + update.movedim(-1, channel).to(y.dtype)
        return y


class AdaptedHead(Adapted):
    """A linear classifier that remembers: frozen value plus trained difference, [x, 1] (R_old + R_delta)^T."""

    _clora_kind = "head"

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        parts = self.active(x)
        if not parts:
            return super().forward(x)
        part = parts[0]
        biased = self.bias is not None
        if part.seen is None and part.R_rows is None:
            V = (part.R_old + part.R_delta).to(x.dtype)
            return functional.linear(x, V[:, :-1], V[:, -1]) if biased else functional.linear(x, V)
        rows = functional.pad(x, (0, 1), value=1.0) if biased else x
        if part.R_rows is None:
            part.observe(rows)
            return functional.linear(rows, (part.R_old + part.R_delta).to(x.dtype))
        V = part.R_rows.to(x.dtype)
        if x.shape[0] != V.shape[0]:
            raise _rows_error(x.shape[0], V.shape[0])
        return (rows.reshape(x.shape[0], -1, V.shape[-1]) @ V.mT).reshape(*x.shape[:-1], V.shape[1])


KINDS: dict[str, type[Adapted]] = {
    kind._clora_kind: kind for kind in (AdaptedLinear, AdaptedEmbedding, AdaptedConv, AdaptedHead)
}
_TYPES: dict[tuple[str, type], type] = {}


def adapted_type(kind: str, base: type[nn.Module]) -> type:
    """The subclass of ``base`` that applies adapters of that kind; one for each base."""
    if (kind, base) not in _TYPES:
        name = f"Adapted{base.__name__}"
        _TYPES[kind, base] = type(
            name, (KINDS[kind], base), {"_clora_base": base, "__module__": __name__, "__qualname__": name}
        )
    return _TYPES[kind, base]


def _rebuild(kind: str, base: type[nn.Module]) -> nn.Module:
    """For pickle and deepcopy: classes made here have no importable name."""
    cls: Any = adapted_type(kind, base)
    return cls.__new__(cls)


def is_conv1d(cls: type) -> bool:
    """transformers' Conv1D, told by name so that transformers is never imported."""
    return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers") for c in cls.__mro__)


def kind_of(module: Any) -> str | None:
    """The kind of adapter a module takes, or None."""
    if isinstance(module, nn.Linear) or is_conv1d(type(module)):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.MultiheadAttention):
        return "attention"
    convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return "conv" if convolution else None


def refuse(name: str, module: Any, parent: nn.Module | None) -> None:
    """Raise where an adapter would be ignored or wrong, with the reason."""

    def no(reason: str, fix: str, error: type[Exception] = OptionError) -> Exception:
        got = f"{type(module).__module__}.{type(module).__qualname__}"
        text = message(
            "clora_torch.attach",
            f"layer {name!r} can't be adapted",
            got=got,
            needed="Linear, transformers' Conv1D, Embedding, Conv1d to Conv3d or MultiheadAttention, with a floating "
            "weight of its own",
            cause=reason,
            fix=fix,
        )
        return error(text)

    if kind_of(module) is None:
        raise no("a layer of another type", "leave it out of targets")
    refuse_replaced("attach", name, module)
    if not (_quantised(module) or is_conv1d(type(module)) or type(module).forward in STOCK):
        raise no("its forward is its own, so that A R B need not be what an adapter adds", "leave it out of targets")
    if weight_name(module) not in module._parameters:
        raise no(
            "its weight is computed from others (weight_norm, parametrize, prune)",
            "remove the parametrization before attaching",
        )
    for attention in (module, parent):
        if isinstance(attention, nn.MultiheadAttention) and (attention.bias_k is not None or attention.add_zero_attn):
            raise no("an attention with bias_k, bias_v or add_zero_attn", "leave it out of targets")
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is None:
        raise no("an attention with kdim or vdim has no fused projection", "leave it out of targets")
    weight = getattr(module, weight_name(module))
    if not isinstance(weight, Tensor) or weight.device.type == "meta":
        raise no("the weight is not loaded yet (device meta)", "attach after loading the weights", StateError)
    if not weight.is_floating_point() and hasattr(module, "quant_state"):
        return
    if type(weight) not in (Tensor, nn.Parameter) and not _quantised(module):
        raise no(
            f"the weight is a {type(weight).__name__}: a quantised or sharded tensor whose values are not its own",
            "attach before quantising or sharding",
        )
    if not (weight.is_floating_point() or _quantised(module)):
        raise no(f"the weight is {weight.dtype}", "attach to the unquantised model", DTypeError)
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise no("max_norm rewrites the frozen weight at every call", "load the embedding with max_norm=None")
    if getattr(module, "groups", 1) != 1:
        raise no("a grouped convolution has no weight matrix of its own", "leave it out of targets")


def refuse_head(name: str, module: Any) -> None:
    """Raise where a linear layer can't be a head."""
    if not module.weight.is_floating_point():
        raise DTypeError(
            message(
                "clora_torch.attach",
                f"head {name!r} is quantised",
                got=str(module.weight.dtype),
                needed="a floating weight: a head learns all of it",
                cause="a model that was quantised as a whole",
                fix="leave the classifier out of quantisation, or adapt it as a target",
            )
        )


def refuse_replaced(verb: str, name: str, module: nn.Module) -> None:
    """A forward on the object hides that of its class."""
    if "forward" in module.__dict__:
        raise OptionError(
            message(
                f"clora_torch.{verb}",
                f"the forward of layer {name!r} was replaced on the object",
                got="module.forward = ...",
                needed="the forward of its class",
                cause="accelerate's hooks (device_map, offloading)",
                fix="accelerate.hooks.remove_hook_from_module(module), then attach or detach, then dispatch again",
            )
        )


STOCK = {
    cls.forward for cls in (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
}  # what adapters are written for


def _quantised(module: Any) -> bool:
    """bitsandbytes' linear layers: subclasses of nn.Linear that multiply by what they unpack themselves."""
    return isinstance(module, nn.Linear) and type(module).__module__.startswith("bitsandbytes")


def weight_name(module: Any) -> str:
    """The attribute that holds the weight."""
    return "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"


def matrix(module: Any) -> Tensor:
    """The weight as the matrix W (d_out, d_in) that A R B is added to, a view."""
    W = getattr(module, weight_name(module))
    kind = kind_of(module)
    if kind == "embedding" or is_conv1d(type(module)):
        return W.T
    return W.flatten(1) if kind == "conv" else W


def sizes(module: Any) -> tuple[int, int]:
    """d_out and d_in of `matrix`."""
    if _quantised(module):
        return module.out_features, module.in_features
    d_out, d_in = matrix(module).shape
    return d_out, d_in


def set_matrix(module: Any, W: Tensor) -> Tensor:
    """`matrix` turned back to the layout of the weight, contiguous."""
    kind = kind_of(module)
    if kind == "embedding" or is_conv1d(type(module)):
        return W.T.contiguous()
    return W.reshape(getattr(module, weight_name(module)).shape).contiguous()
