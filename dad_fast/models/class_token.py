"""Last block for the class token alone, in timm's vision transformers.

The head of these models must read no other token. Then queries, output projection, MLP and final
norm of all other tokens are dead work: 10/12 of the block's matrix products and its attention. Keys
and values still use all tokens, so logits and gradients are equal in exact arithmetic. The block
keeps its parameters and their names; its output, and that of the final norm, is [B, 1, D] instead
of [B, N, D].

class_token_clip.py does the same for open_clip's towers.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers import (
    Attention,
    GluMlp,
    LayerNorm,
    LayerNormFp32,
    LayerScale,
    Mlp,
    RmsNorm,
    RmsNormFp32,
    SwiGLU,
)
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

# Modules that act on each token alone, so that fewer tokens give the same values
NORMS = (nn.Identity, nn.LayerNorm, nn.RMSNorm, LayerNorm, LayerNormFp32, RmsNorm, RmsNormFp32)
MLPS = (Mlp, GluMlp, SwiGLU)
SCALES = (nn.Identity, LayerScale)


class ClassTokenBlock(Block):
    """timm's pre-norm block: tokens [B, N, D] -> class token [B, 1, D]."""

    def forward(self, x: Tensor) -> Tensor:
        cls = x[:, :1]
        cls = cls + self.drop_path1(self.ls1(_attend(self.attn, self.norm1(x))))
        return cls + self.drop_path2(self.ls2(self.mlp(self.norm2(cls))))


def _attend(attn: Any, tokens: Tensor) -> Tensor:
    """timm's Attention with the first token as its only query: [B, N, D] -> [B, 1, D]."""
    batch, num_tokens, _ = tokens.shape
    cls, width = tokens[:, :1], attn.attn_dim
    bias_q = bias_kv = None
    weight_q, weight_kv = attn.qkv.weight.split((width, 2 * width))
    if attn.qkv.bias is not None:
        bias_q, bias_kv = attn.qkv.bias.split((width, 2 * width))
    q = F.linear(cls, weight_q, bias_q)
    q = q.reshape(batch, 1, attn.num_heads, attn.head_dim).transpose(1, 2)
    kv = F.linear(tokens, weight_kv, bias_kv)
    kv = kv.reshape(batch, num_tokens, 2, attn.num_heads, attn.head_dim)
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, N, head_dim]
    x = F.scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k), v)
    x = attn.norm(x.transpose(1, 2).reshape(batch, 1, width))
    if attn.gate is not None:
        x = x * attn.gate(cls).sigmoid()
    return attn.proj(x)


def keep_class_token_timm(model: VisionTransformer) -> str:
    """Make the last block of a timm VisionTransformer compute the class token alone, in place.

    Returns "" on success (also the second time), else the reason why the model is not supported and
    stays unchanged.
    """
    reason, block = _unsupported(model), model.blocks[-1]
    if not reason and type(block) is Block:
        block.__class__ = ClassTokenBlock
    return reason


def _unsupported(model: Any) -> str:
    if type(model) is not VisionTransformer:
        return f"{type(model).__name__} has its own forward pass"
    if not model.has_class_token or model.global_pool != "token" or model.attn_pool is not None:
        return f"its head pools more than a class token (global_pool={model.global_pool!r})"
    block = model.blocks[-1]
    if type(block) is ClassTokenBlock:
        return ""
    if type(block) is not Block:
        return f"its last block is a {type(block).__name__}"
    attn = block.attn
    if type(attn) is not Attention or type(attn.qkv) is not nn.Linear:
        return f"its last block has a {type(attn).__name__}"
    parts = {
        NORMS: (model.norm, block.norm1, block.norm2, attn.q_norm, attn.k_norm, attn.norm),
        MLPS: (block.mlp,),
        SCALES: (block.ls1, block.ls2),
    }
    return unknown_part(parts) or dropout(block)


def unknown_part(parts: dict[tuple[type, ...], tuple[nn.Module, ...]]) -> str:
    """Name the first module of `parts` whose class is not among its known classes; "" if there is
    none.
    """
    for known, modules in parts.items():
        for module in modules:
            if type(module) not in known:
                return f"its last block has a {type(module).__name__}"
    return ""


def dropout(block: nn.Module) -> str:
    """Return a reason if dropout inside the block would draw other numbers.

    Drop path draws one number per sample, which stays the same.
    """
    active = any(isinstance(module, nn.Dropout) and module.p > 0 for module in block.modules())
    return "its last block has dropout" if active else ""
