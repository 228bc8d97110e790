"""nn.MultiheadAttention, which reads the weights of its projections without calling them, as layers that adapt."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from clora_core.errors import OptionError, message

from ._layers import KINDS, Adapted, LayerAdapter, add_update, update_of


class AdaptedAttention(Adapted):
    """nn.MultiheadAttention over adapted projections: in_proj_weight, whole or by rows, and out_proj, which it calls.

    The attention itself is torch's scaled_dot_product_attention, or softmax(q k^T / sqrt(d) + mask) v where the weights
    are asked for.
    """

    _clora_kind = "attention"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention.forward: the output, and the attention's weights or None."""
        parts = self.active(query)
        if not (parts or (isinstance(self.out_proj, Adapted) and self.out_proj.active(query))):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if is_causal and attn_mask is None:
            raise OptionError(
                message(
                    "clora_torch.AdaptedAttention",
                    "is_causal is a hint about a mask, not a mask",
                    got="is_causal=True, attn_mask=None",
                    needed="attn_mask",
                    cause="taken for the is_causal of scaled_dot_product_attention",
                    fix="pass attn_mask=nn.Transformer.generate_square_subsequent_mask(length), too",
                )
            )
        inputs = self._batch_first(query, key, value)
        q, k, v = (
            y.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for y in self._projected(inputs, parts)
        )
        plain_causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if plain_causal else _merged_mask(attn_mask, key_padding_mask, q)
        drop = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.mT / math.sqrt(self.head_dim)
            weights = functional.dropout((scores if mask is None else scores + mask).softmax(-1), drop)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = functional.scaled_dot_product_attention(q, k, v, mask, drop, plain_causal)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if query.dim() == 2:
            return y[0], None if weights is None else weights[0]
        return (y if self.batch_first else y.transpose(0, 1)), weights

    def _batch_first(self, *inputs: Tensor) -> list[Tensor]:
        """(batch, length, width) each; what is one tensor stays one."""
        turned: dict[int, Tensor] = {}
        for x in inputs:
            if id(x) not in turned:
                turned[id(x)] = x[None] if x.dim() == 2 else x if self.batch_first else x.transpose(0, 1)
        return [turned[id(x)] for x in inputs]

    def _projected(self, inputs: list[Tensor], parts: list[LayerAdapter]) -> list[Tensor]:
        """q, k and v; products are shared as far as their inputs are."""
        W, b, width = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        out: list[Tensor] = []
        third = 0
        while third < 3:
            end = next((i for i in range(third, 3) if inputs[i] is not inputs[third]), 3)
            start, stop = third * width, end * width
            x = inputs[third]
            y = functional.linear(x, W[start:stop], None if b is None else b[start:stop])
            for part in parts:
                first, last = part.rows or (0, 3 * width)
                if last <= start or stop <= first:
                    continue
                if first < start or stop < last:
                    raise _several_inputs(first, last)
                with torch.autocast(x.device.type, enabled=False):
                    update = update_of(functional.linear, x.to(part.B.dtype), part).to(y.dtype)
                y = add_update(y, update, (first - start, last - start))
            out += y.chunk(end - third, dim=-1)
            third = end
        return out


KINDS["attention"] = AdaptedAttention


def _merged_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """One additive mask (batch or 1, heads or 1, length, keys) of both; True in a boolean one means: leave out."""
    mask = None
    if attn_mask is not None:
        mask = _additive(attn_mask, q.dtype)
        mask = mask.view(q.shape[0], q.shape[1], *mask.shape[-2:]) if mask.dim() == 3 else mask
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q.dtype).view(q.shape[0], 1, 1, -1)
        mask = padding if mask is None else mask + padding
    return mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)


def _several_inputs(first: int, last: int) -> OptionError:
    return OptionError(
        message(
            "clora_torch.AdaptedAttention",
            "one adapter spans projections of different inputs",
            got=f"rows {first}:{last} of in_proj_weight, with query, key and value that are not one tensor",
            needed="an adapter for each of them",
            cause="cross attention in a model adapted by 'in_proj_weight' as a whole",
            fix="attach to 'in_proj_weight[q]', 'in_proj_weight[k]' and 'in_proj_weight[v]'",
        )
    )
