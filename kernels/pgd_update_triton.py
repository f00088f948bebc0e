"""`pgd_update` in Triton: formulas, shapes and bytes are in pgd_update.py. Not yet run on a GPU.

Deterministic: every program writes its own partial sums; all programs of a sample add them in the
same order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements a program holds at once: 16 a thread, 4 loads of 16 bytes for each of the tensors.
BLOCK = 4096
NUM_WARPS = 8
MAX_PARTS = 256  # partial sums that an applying program adds up


@triton.jit
def _load(pointer, offset, index, mask):
    return tl.load(pointer + offset + index, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _reduce(
    delta_ptr,  # [B, n] float32
    gradient_ptr,  # [B, n]
    partial_ptr,  # [B, num_parts, 3] float64, out: |d|^2, d.g, |g|^2 of one part
    n,
    num_parts,
    BLOCKS_PER_PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part, sample = tl.program_id(0) % num_parts, (tl.program_id(0) // num_parts).to(tl.int64)
    dd = tl.zeros((BLOCK,), tl.float64)
    dg = tl.zeros((BLOCK,), tl.float64)
    gg = tl.zeros((BLOCK,), tl.float64)
    for i in range(BLOCKS_PER_PART):
        index = (part * BLOCKS_PER_PART + i) * BLOCK + tl.arange(0, BLOCK)
        d = _load(delta_ptr, sample * n, index, index < n).to(tl.float64)
        g = _load(gradient_ptr, sample * n, index, index < n).to(tl.float64)
        dd += d * d
        dg += d * g
        gg += g * g
    out = partial_ptr + (sample * num_parts + part) * 3
    tl.store(out, tl.sum(dd))
    tl.store(out + 1, tl.sum(dg))
    tl.store(out + 2, tl.sum(gg))


@triton.jit
def _total(partial_ptr, sample, num_parts, which: tl.constexpr, PARTS: tl.constexpr):
    part = tl.arange(0, PARTS)
    return tl.sum(
        tl.load(
            partial_ptr + (sample * num_parts + part) * 3 + which, mask=part < num_parts, other=0.0
        )
    )


@triton.jit
def _apply(
    pixels_ptr,  # [B, n] float32
    delta_ptr,  # [B, n] float32
    gradient_ptr,  # [B, n]
    partial_ptr,  # [B, num_parts, 3] float64; unused for L-infinity
    new_delta_ptr,  # [B, n] float32, out
    image_ptr,  # [B, n] float32, out
    eps,
    step_size,
    n,
    num_parts,
    num_blocks,
    L2: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = (tl.program_id(0) // num_blocks).to(tl.int64)
    index = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    mask = index < n
    x = _load(pixels_ptr, sample * n, index, mask)
    d = _load(delta_ptr, sample * n, index, mask)
    g = _load(gradient_ptr, sample * n, index, mask)
    if L2:
        dd = _total(partial_ptr, sample, num_parts, 0, PARTS)
        dg = _total(partial_ptr, sample, num_parts, 1, PARTS)
        gg = _total(partial_ptr, sample, num_parts, 2, PARTS)
        # A non-finite gradient must not act as a small one: 1 / inf would leave most of the image
        # unchanged.
        per_g = tl.where(
            gg == 0.0, 0.0, tl.where(gg == float("inf"), float("nan"), 1.0 / tl.sqrt(gg))
        )
        step = step_size * per_g  # float64
        # |d + step g|; NaN if rounding left less than 0, which then acts like 0.
        length = tl.sqrt(dd + 2.0 * step * dg + step * step * gg)
        shrink = tl.where(length > eps, eps / length, 1.0)
        d = ((d.to(tl.float64) + step * g.to(tl.float64)) * shrink).to(tl.float32)
    else:
        sign = tl.where(g > 0.0, 1.0, 0.0) - tl.where(g < 0.0, 1.0, 0.0)  # of NaN 0, as torch.sign
        d = tl.clamp(d + step_size * sign, -eps, eps, propagate_nan=tl.PropagateNan.ALL)
    image = tl.clamp(x + d, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    new_delta = image - x
    tl.store(new_delta_ptr + sample * n + index, new_delta, mask=mask)
    tl.store(image_ptr + sample * n + index, x + new_delta, mask=mask)


def report_launches(arch: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Two images of 224 px."""
    images = torch.empty(2, 3, 224, 224, device="meta")
    for norm in ("l2", "linf"):
        yield (
            f"pgd_update: {norm}",
            functools.partial(launch, images, images, images, norm, 0.1, 0.1),
        )


def launch(
    pixels: Tensor, delta: Tensor, gradient: Tensor, norm: str, eps: float, step_size: float
) -> tuple[Tensor, Tensor]:
    """Like `pgd_update`, which checks the inputs."""
    # Dense, in the order of the pixels' own strides.
    new_delta, image = torch.empty_like(pixels), torch.empty_like(pixels)
    pixels, delta, gradient = (_laid_out_as(image, tensor) for tensor in (pixels, delta, gradient))
    batch, n = len(pixels), pixels[0].numel()
    num_blocks = triton.cdiv(n, BLOCK)
    blocks_per_part = triton.cdiv(num_blocks, MAX_PARTS)
    num_parts = triton.cdiv(num_blocks, blocks_per_part)
    partial = pixels.new_empty((batch, num_parts, 3), dtype=torch.float64)
    with torch.cuda.device_of(pixels):
        if norm == "l2":
            _reduce[(batch * num_parts,)](
                *(delta, gradient, partial, n, num_parts),
                BLOCKS_PER_PART=blocks_per_part,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
        _apply[(batch * num_blocks,)](
            *(
                pixels,
                delta,
                gradient,
                partial,
                new_delta,
                image,
                eps,
                step_size,
                n,
                num_parts,
                num_blocks,
            ),
            L2=norm == "l2",
            PARTS=triton.next_power_of_2(num_parts),
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return new_delta, image


def _laid_out_as(example: Tensor, tensor: Tensor) -> Tensor:
    """Return `tensor` with the strides of the dense `example`: itself if they match, else a copy."""
    return (
        tensor
        if tensor.stride() == example.stride()
        else torch.empty_like(example, dtype=tensor.dtype).copy_(tensor)
    )
