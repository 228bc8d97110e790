"""Merging updates into weights and taking them out again, with no bit lost."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor, nn

import clora_core as core
from clora_core.errors import DTypeError, InvalidValueError, OptionError, message

from ._layers import matrix, set_matrix, weight_name
from ._part import HALF, LayerAdapter

ON_LOSS = ("warn", "raise", "ignore")


@torch.no_grad()
def merge(
    modules: Mapping[str, Any], names: Mapping[LayerAdapter, str], *, on_loss: str, max_loss: float
) -> dict[str, core.MergeReport]:
    """Merge every module's adapters; nothing is changed before all is computed."""
    core_option(on_loss)
    weights: dict[str, dict[str, Tensor]] = {}
    reports: dict[str, core.MergeReport] = {}
    for name, module in modules.items():
        if module._clora_kind == "head":
            weights[name] = _head(module)
            continue
        weights[name] = {weight_name(module): _weight(name, module, names, reports)} if module.parts() else {}
    lossy = {name: float(report.error) for name, report in reports.items() if float(report.error) > max_loss}
    if lossy and on_loss != "ignore":
        worst = max(lossy, key=lossy.__getitem__)
        text = message(
            "clora_torch.merge",
            f"{len(lossy)} of {len(reports)} layers lose more than {max_loss:.0%} of their update",
            got=f"a relative error of {lossy[worst]:.1%} in {worst!r}",
            needed=f"at most {max_loss:.0%}",
            cause="an update that is small beside a weight in half precision",
            fix="keep the adapter unmerged, merge into a float32 model, or accept it: on_loss='ignore'",
        )
        if on_loss == "raise":
            raise InvalidValueError(text)
        warnings.warn(text, stacklevel=3)
    for name, tensors in weights.items():
        module = modules[name]
        module._clora_pristine = {key: module._parameters[key] for key in tensors}
        for key, value in tensors.items():
            module._parameters[key] = nn.Parameter(value, requires_grad=False)
        for part in module.parts():
            part.merged = True
    return reports


def unmerge(modules: Mapping[str, Any]) -> None:
    """Put every pristine Parameter back: the same objects, so the same bits."""
    for module in modules.values():
        assert module._clora_pristine is not None
        module._parameters.update(module._clora_pristine)
        del module._clora_pristine
        for part in module.parts():
            part.merged = False


def core_option(on_loss: str) -> None:
    """Refuse an unknown on_loss."""
    if on_loss not in ON_LOSS:
        raise OptionError(
            message(
                "clora_torch.merge",
                "unknown on_loss",
                got=repr(on_loss),
                needed="one of " + ", ".join(map(repr, ON_LOSS)),
                cause="a misspelt name",
                fix="pass one of the names listed",
            )
        )


def _weight(name: str, module: Any, names: Mapping[LayerAdapter, str], reports: dict[str, core.MergeReport]) -> Tensor:
    """The merged weight in its own layout and dtype; slices of a fused weight are merged one by one."""
    W = matrix(module)
    if not W.is_floating_point():
        raise DTypeError(
            message(
                "clora_torch.merge",
                f"the weight of layer {name!r} is quantised",
                got=str(W.dtype),
                needed="a floating weight",
                cause="a quantised base model",
                fix="keep the adapter unmerged, or attach it to the unquantised model and merge there",
            )
        )
    out = W.clone()
    for part in module.parts():
        start, stop = part.rows or (0, W.shape[0])
        adapter = core.Adapter(*(array.detach() for array in part.adapter))
        pristine = W[start:stop]
        dtype = pristine.dtype if pristine.dtype in HALF else adapter.A.dtype
        merged = core.merge(pristine.to(adapter.A.dtype), adapter, dtype=dtype, xp=xp)
        out[start:stop] = merged.weight
        reports[names[part]] = merged.report
    return set_matrix(module, out)


def _head(module: Any) -> dict[str, Tensor]:
    (part,) = module.parts()
    V = part.R_old + part.R_delta
    bias = module._parameters["bias"]
    dtype = module._parameters["weight"].dtype
    if bias is None:
        return {"weight": V.to(dtype).clone()}
    return {"weight": V[:, :-1].to(dtype).contiguous(), "bias": V[:, -1].to(dtype).contiguous()}
