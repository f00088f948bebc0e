"""nn.MultiheadAttention with less work, for equal values and gradients.

PyTorch's module transposes its tokens, copies queries, keys and values, and with frozen weights
multiplies the transposed tokens by one matrix product per token position, forward and backward.
Here tokens stay [B, N, D]: one linear layer, scaled_dot_product_attention on views of its output,
the output projection. open_clip's vision towers are made of such modules.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class BatchFirstAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention(batch_first=True); calls with masks or weights are the plain module's."""

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
        masked = key_padding_mask is not None or attn_mask is not None or is_causal
        if need_weights or masked or query.dim() != 3:
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        # [B, N, D] -> [B, heads, N, head_dim]
        q, k, v = (
            tokens.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
            for tokens in self._project(query, key, value)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out_proj(attended), None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values, each [B, N, D]."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key is value:
            return F.linear(query, weight, bias).chunk(3, dim=2)
        if weight is None:  # keys and values have other widths than queries
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        else:
            weights = weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        inputs = (query, key, value)
        return tuple(F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))


def use_batch_first_attention(model: nn.Module) -> str:
    """Turn every nn.MultiheadAttention of `model` into a BatchFirstAttention, in place.

    Returns "" on success (also the second time), else the reason why `model` stays unchanged.
    """
    found: list[Any] = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    if not found:
        return "it has no nn.MultiheadAttention"
    for attn in found:
        if type(attn) not in (nn.MultiheadAttention, BatchFirstAttention):
            return f"its attention is a {type(attn).__name__}"
        if not attn.batch_first:
            return "its attention takes tokens in another layout"
        if attn.dropout > 0 or attn.bias_k is not None or attn.add_zero_attn:
            return "its attention has dropout or more keys than tokens"
    for attn in found:
        attn.__class__ = BatchFirstAttention
    return ""
