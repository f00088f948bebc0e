"""Last block for the class token alone, in open_clip's vision towers; see class_token.py."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from open_clip.transformer import (
    Attention,
    CustomResidualAttentionBlock,
    LayerNorm,
    LayerNormFp32,
    LayerScale,
    QuickGELU,
    ResidualAttentionBlock,
    Transformer,
    VisionTransformer,
)
from torch import Tensor, nn

from dad_fast.models.batch_first_attention import BatchFirstAttention
from dad_fast.models.class_token import dropout, unknown_part

NORMS = (nn.Identity, nn.LayerNorm, LayerNorm, LayerNormFp32)
MLP_PARTS = (nn.Linear, nn.GELU, nn.SiLU, QuickGELU, *NORMS)
SCALES = (nn.Identity, LayerScale)


class ClassTokenResidualBlock(ResidualAttentionBlock):
    """open_clip's block with nn.MultiheadAttention: tokens [B, N, D] -> class token [B, 1, D]."""

    def forward(
        self, q_x: Tensor, k_x: None = None, v_x: None = None, attn_mask: None = None
    ) -> Tensor:
        tokens = self.ln_1(q_x)
        x = q_x[:, :1] + self.ls_1(self.attention(tokens[:, :1], tokens, tokens))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class ClassTokenCustomBlock(CustomResidualAttentionBlock):
    """Tokens [B, N, D] -> class token [B, 1, D]."""

    def forward(self, x: Tensor, attn_mask: None = None) -> Tensor:
        cls = x[:, :1] + self.ls_1(self.ln_attn(_attend(self.attn, self.ln_1(x))))
        return cls + self.ls_2(self.mlp(self.ln_2(cls)))


def _attend(attn: Any, tokens: Tensor) -> Tensor:
    """open_clip's own Attention with the first token as its only query: [B, N, D] -> [B, 1, D]."""
    batch, num_tokens, width = tokens.shape
    bias_q = bias_kv = None
    weight_q, weight_kv = attn.in_proj_weight.split((width, 2 * width))
    if attn.in_proj_bias is not None:
        bias_q, bias_kv = attn.in_proj_bias.split((width, 2 * width))
    q = F.linear(tokens[:, :1], weight_q, bias_q)
    q = q.reshape(batch, 1, attn.num_heads, -1).transpose(1, 2)
    kv = F.linear(tokens, weight_kv, bias_kv)
    kv = kv.reshape(batch, num_tokens, 2, attn.num_heads, -1)
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    x = F.scaled_dot_product_attention(attn.ln_q(q), attn.ln_k(k), v)  # [B, heads, 1, head_dim]
    if attn.head_scale is not None:
        x = x * attn.head_scale
    return attn.out_proj(attn.ln_inner(x.transpose(1, 2).reshape(batch, 1, width)))


def keep_class_token_clip(tower: Any) -> str:
    """Apply `class_token.keep_class_token_timm` to an open_clip VisionTransformer."""
    reason = _unsupported(tower)
    if not reason:
        block = tower.transformer.resblocks[-1]
        if type(block) is ResidualAttentionBlock:
            block.__class__ = ClassTokenResidualBlock
        elif type(block) is CustomResidualAttentionBlock:
            block.__class__ = ClassTokenCustomBlock
    return reason


def _unsupported(tower: Any) -> str:
    if type(tower) is not VisionTransformer:
        return f"{type(tower).__name__} is no known vision transformer"
    if tower.pool_type != "tok" or tower.attn_pool is not None:
        return f"its head pools more than a class token (pool_type={tower.pool_type!r})"
    if tower.output_tokens:
        return "it returns its tokens too"
    if type(tower.transformer) is not Transformer or not tower.transformer.batch_first:
        return f"its {type(tower.transformer).__name__} has another layout"
    block = tower.transformer.resblocks[-1]
    if isinstance(block, (ClassTokenResidualBlock, ClassTokenCustomBlock)):
        return ""
    parts = {
        NORMS: (tower.ln_post, block.ln_1, block.ln_2),
        MLP_PARTS: tuple(block.mlp),
        SCALES: (block.ls_1, block.ls_2),
    }
    attn = block.attn
    if type(block) is CustomResidualAttentionBlock:
        if type(attn) is not Attention or attn.scaled_cosine:
            return "its last block has cosine attention"
        parts[NORMS] += (block.ln_attn, attn.ln_q, attn.ln_k, attn.ln_inner)
    elif (
        type(block) is not ResidualAttentionBlock
        or type(attn) not in (nn.MultiheadAttention, BatchFirstAttention)
        or hasattr(block, "ln_1_kv")
    ):
        return f"its last block is a {type(block).__name__}"
    elif attn.dropout > 0:
        return "its last block has dropout"
    return unknown_part(parts) or dropout(block)
