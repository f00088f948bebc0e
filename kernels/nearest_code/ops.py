"""`nearest_code`: search without preparation, as a torch.library op that compiles as one graph."""

from __future__ import annotations

import torch
from torch import Tensor

from dad_fast.kernels.csrc import csrc
from dad_fast.kernels.nearest_code.csrc_search import search_csrc
from dad_fast.kernels.nearest_code.torch_search import search_torch


@torch.library.custom_op("dad_fast::nearest_code", mutates_args=())
def _nearest_code(latents: Tensor, codebook: Tensor) -> Tensor:
    return search_torch(latents, codebook)


@_nearest_code.register_kernel("cpu")
def _(latents: Tensor, codebook: Tensor) -> Tensor:
    return search_torch(latents, codebook) if csrc() is None else search_csrc(latents, codebook)


@_nearest_code.register_fake
def _(latents: Tensor, codebook: Tensor) -> Tensor:
    return latents.new_empty(latents.shape[0], dtype=torch.int64)


def nearest_code(latents: Tensor, codebook: Tensor) -> Tensor:
    """Return the exact index of the nearest code of each latent; the lowest index wins a tie.

    latents: [N, D], or [B, D, H, W] as an encoder gives them; codebook: [K, D], K >= 1, D >= 1;
    float32, float16 or bfloat16 with any strides, on one device. Returns int64 codes, [N] or [B, H,
    W]. No gradient. Not affected by autocast. A latent that is not finite gets code 0; a code that
    is not finite never wins. D > 16 on CUDA synchronises with the host. Raises ValueError for
    shapes and dtypes that do not fit.
    """
    if (
        latents.ndim not in (2, 4)
        or codebook.ndim != 2
        or latents.shape[1] != codebook.shape[1]
        or 0 in codebook.shape
    ):
        raise ValueError(
            f"latents [N, D] or [B, D, H, W] and codebook [K, D] are needed, not {list(latents.shape)} and {list(codebook.shape)}"
        )
    for tensor in (latents, codebook):
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(
                f"latents and codebook must be float32, float16 or bfloat16, not {tensor.dtype}"
            )
    if latents.ndim == 2:
        return _nearest_code(latents.detach(), codebook.detach())
    batch, dim, height, width = latents.shape
    flat = latents.detach().permute(0, 2, 3, 1).reshape(-1, dim)  # [B H W, D]
    return _nearest_code(flat, codebook.detach()).view(batch, height, width)
