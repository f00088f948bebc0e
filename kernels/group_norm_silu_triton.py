"""`group_norm_silu` and `add_group_norm_silu` in Triton: formulas and bytes are in
group_norm_silu.py. Not yet run on a GPU.

Maps are [B, H W, C] here. A chunk is the rows that one program of the first pass sums, channel by
channel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dad_fast.kernels.group_norm_silu import nhwc_empty
from dad_fast.kernels.tuning import TuningCase, architecture, entries, meta_parameters

MERGE_BLOCK = 1024  # partial sums that a merging program holds at once
# CHANNELS alone decides how wide loads are; a variant for each size of map would gain nothing.
SIZES = ("num_rows", "num_chunks", "num_blocks", "chunk_rows")


@triton.jit
def _load_sum(
    x_ptr,
    residual_ptr,
    channel_bias_ptr,
    base,
    offset,
    column,
    mask,
    column_mask,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """x + channel_bias + residual in float32, [ROWS, COLUMNS]; base: the tile's start (int64),
    offset: inside it (int32).
    """
    value = tl.load(x_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(channel_bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
        value = value.to(x_ptr.dtype.element_ty).to(tl.float32)  # as it is stored
    return value


@triton.jit(do_not_specialize=SIZES)
def _sum_chunks(
    x_ptr,  # [B, num_rows, C]
    residual_ptr,  # [B, num_rows, C], or unused
    channel_bias_ptr,  # [C], or unused
    total_ptr,  # [B, num_rows, C], out with HAS_RESIDUAL: x + channel_bias + residual
    # [B, num_chunks, 2, C] float32, out: mean and sum of squared deviations over a chunk's rows.
    partial_ptr,
    num_rows,
    num_chunks,
    CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,  # a chunk has TILES x ROWS rows
):
    batch, chunk = tl.program_id(0) // num_chunks, tl.program_id(0) % num_chunks
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    column_mask = column < CHANNELS
    first = chunk * TILES * ROWS
    end = tl.minimum(first + TILES * ROWS, num_rows)
    row = tl.arange(0, ROWS)[:, None]
    offset = row * CHANNELS + column
    base = (batch.to(tl.int64) * num_rows + first) * CHANNELS
    # [1, COLUMNS], the first row: any value among those summed serves
    pivot = _load_sum(
        x_ptr,
        residual_ptr,
        channel_bias_ptr,
        base,
        column,
        column,
        column_mask,
        column_mask,
        HAS_BIAS,
        HAS_RESIDUAL,
    )
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in range(TILES):
        mask = (first + i * ROWS + row < end) & column_mask
        value = _load_sum(
            x_ptr,
            residual_ptr,
            channel_bias_ptr,
            base,
            offset,
            column,
            mask,
            column_mask,
            HAS_BIAS,
            HAS_RESIDUAL,
        )
        if HAS_RESIDUAL:
            tl.store(total_ptr + base + offset, value.to(total_ptr.dtype.element_ty), mask=mask)
        deviation = tl.where(mask, value - pivot, 0.0)
        total += deviation
        squares += deviation * deviation
        base += ROWS * CHANNELS
    count = (end - first).to(tl.float32)
    mean = tl.sum(total, 0, keep_dims=True) / count  # about the pivot
    squared = tl.maximum(
        tl.sum(squares, 0, keep_dims=True) - count * mean * mean,
        0.0,
        propagate_nan=tl.PropagateNan.ALL,
    )
    out = (batch.to(tl.int64) * num_chunks + chunk) * 2 * CHANNELS + column
    tl.store(partial_ptr + out, pivot + mean, mask=column_mask)
    tl.store(partial_ptr + out + CHANNELS, squared, mask=column_mask)


@triton.jit
def _partial(
    partial_ptr,
    batch,
    group,
    index,
    num_rows,
    num_chunks,
    chunk_rows,
    CHANNELS: tl.constexpr,
    group_size: tl.constexpr,
):
    """Mean, squared deviations and number of rows of the entries `index` of a group: chunk by
    chunk, channel by channel.
    """
    chunk = index // group_size
    inside = chunk < num_chunks
    at = (
        (batch.to(tl.int64) * num_chunks + chunk) * 2 * CHANNELS
        + group * group_size
        + index % group_size
    )
    mean = tl.load(partial_ptr + at, mask=inside, other=0.0)
    squared = tl.load(partial_ptr + at + CHANNELS, mask=inside, other=0.0)
    count = tl.where(inside, tl.minimum(chunk_rows, num_rows - chunk * chunk_rows), 0).to(
        tl.float32
    )
    return mean, squared, count


@triton.jit(do_not_specialize=SIZES)
def _merge_chunks(
    partial_ptr,  # [B, num_chunks, 2, C] float32
    weight_ptr,  # [C]
    # [B, 2, C] float32, out: a channel's mean (its group's), and weight / sqrt(variance + eps).
    moments_ptr,
    num_rows,
    num_chunks,
    chunk_rows,
    num_blocks,  # of BLOCK entries: all chunks and channels of a group
    size,  # float: values in a group
    eps,
    CHANNELS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,  # a power of two, at least CHANNELS / NUM_GROUPS
    BLOCK: tl.constexpr,
):
    group_size: tl.constexpr = CHANNELS // NUM_GROUPS
    batch, group = tl.program_id(0) // NUM_GROUPS, tl.program_id(0) % NUM_GROUPS
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(num_blocks):
        index = i * BLOCK + tl.arange(0, BLOCK)
        mean, _, count = _partial(
            partial_ptr, batch, group, index, num_rows, num_chunks, chunk_rows, CHANNELS, group_size
        )
        total += mean * (count / size)
    group_mean = tl.sum(total)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(num_blocks):
        index = i * BLOCK + tl.arange(0, BLOCK)
        mean, squared, count = _partial(
            partial_ptr, batch, group, index, num_rows, num_chunks, chunk_rows, CHANNELS, group_size
        )
        total += squared + count * (mean - group_mean) * (mean - group_mean)
    per_deviation = tl.rsqrt(tl.sum(total) / size + eps)
    member = tl.arange(0, GROUP)
    channel = group * group_size + member
    weight = tl.load(weight_ptr + channel, mask=member < group_size, other=0.0).to(tl.float32)
    out = moments_ptr + batch.to(tl.int64) * 2 * CHANNELS + channel
    tl.store(out, group_mean + tl.zeros((GROUP,), tl.float32), mask=member < group_size)
    tl.store(out + CHANNELS, weight * per_deviation, mask=member < group_size)


@triton.jit(do_not_specialize=SIZES)
def _apply(
    x_ptr,  # [B, num_rows, C]: x, or with a residual the total
    channel_bias_ptr,  # [C], or unused
    moments_ptr,  # [B, 2, C] float32
    bias_ptr,  # [C]
    y_ptr,  # [B, num_rows, C], out
    num_rows,
    num_blocks,
    CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    batch, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    column_mask = column < CHANNELS
    row = tl.arange(0, ROWS)[:, None]
    mask = (block * ROWS + row < num_rows) & column_mask
    base = (batch.to(tl.int64) * num_rows + block * ROWS) * CHANNELS
    offset = row * CHANNELS + column
    value = _load_sum(
        x_ptr, x_ptr, channel_bias_ptr, base, offset, column, mask, column_mask, HAS_BIAS, False
    )
    moments = moments_ptr + batch.to(tl.int64) * 2 * CHANNELS + column
    mean = tl.load(moments, mask=column_mask, other=0.0)
    factor = tl.load(moments + CHANNELS, mask=column_mask, other=0.0)
    value = (value - mean) * factor + tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(
        tl.float32
    )
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    tl.store(y_ptr + base + offset, value.to(y_ptr.dtype.element_ty), mask=mask)


def launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    channel_bias: Tensor | None,
    meta: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (y, t) like `add_group_norm_silu`, which checks the inputs; without a residual t is x.

    `meta`: see the table.
    """
    y = nhwc_empty(x)
    if x.numel() == 0:
        return y, nhwc_empty(x)
    x, residual = _nhwc(x), None if residual is None else _nhwc(residual)
    weight, bias, channel_bias = (
        weight.contiguous(),
        bias.contiguous(),
        None if channel_bias is None else channel_bias.contiguous(),
    )
    batch, channels, height, width = x.shape
    num_rows = height * width
    meta = meta or meta_parameters("group_norm_silu", architecture(x.device), channels=channels)
    rows, columns = _tile(meta, channels)
    chunk_rows = rows * meta["tiles"]
    num_chunks, num_blocks, strips = (
        triton.cdiv(num_rows, chunk_rows),
        triton.cdiv(num_rows, rows),
        triton.cdiv(channels, columns),
    )
    partial = x.new_empty(batch, num_chunks, 2, channels, dtype=torch.float32)
    moments = x.new_empty(batch, 2, channels, dtype=torch.float32)
    total = x if residual is None else nhwc_empty(x)
    unused = weight if channel_bias is None else channel_bias
    group_size = channels // num_groups
    adds_bias = channel_bias is not None and residual is None
    with torch.cuda.device_of(x):
        _sum_chunks[(batch * num_chunks, strips)](
            *(x, x if residual is None else residual, unused, total, partial, num_rows, num_chunks),
            CHANNELS=channels,
            HAS_BIAS=channel_bias is not None,
            HAS_RESIDUAL=residual is not None,
            ROWS=rows,
            COLUMNS=columns,
            TILES=meta["tiles"],
            num_warps=meta["num_warps"],
            enable_fp_fusion=True,
        )
        _merge_chunks[(batch * num_groups,)](
            *(
                partial,
                weight,
                moments,
                num_rows,
                num_chunks,
                chunk_rows,
                triton.cdiv(num_chunks * group_size, MERGE_BLOCK),
                float(num_rows * group_size),
                eps,
            ),
            CHANNELS=channels,
            NUM_GROUPS=num_groups,
            GROUP=triton.next_power_of_2(group_size),
            BLOCK=MERGE_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
        _apply[(batch * num_blocks, strips)](
            *(total, unused if adds_bias else weight, moments, bias, y, num_rows, num_blocks),
            CHANNELS=channels,
            HAS_BIAS=adds_bias,
            SILU=silu,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=meta["num_warps"],
            enable_fp_fusion=True,
        )
    return y, total


def _nhwc(x: Tensor) -> Tensor:
    """Dense in NHWC: itself where it is, else a copy."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _tile(meta: dict[str, int], channels: int) -> tuple[int, int]:
    """(ROWS, COLUMNS); maps that are narrower than the table's strip have more rows in a tile."""
    columns = min(meta["columns"], triton.next_power_of_2(channels))
    return meta["rows"] * meta["columns"] // columns, columns


def report_launches(arch: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """The widths of f8 and one that is no power of two, in 16 and 32 bits, with and without bias
    and residual.
    """
    for channels, side, dtype, has_bias, has_residual in (
        (128, 224, torch.float16, True, False),
        (256, 112, torch.bfloat16, True, True),
        (512, 28, torch.bfloat16, False, False),
        (512, 28, torch.float32, True, True),
        (96, 56, torch.float16, True, True),
    ):
        x = torch.empty(2, side, side, channels, dtype=dtype, device="meta").permute(0, 3, 1, 2)
        vector = torch.empty(channels, device="meta")
        residual, channel_bias = x if has_residual else None, vector if has_bias else None
        arguments = (x, residual, vector, vector, 32, 1e-6, True, channel_bias)
        name = f"group_norm_silu: {channels} channels, {str(dtype)[6:]}"
        yield name, functools.partial(launch, *arguments)


def tuning_cases() -> list[TuningCase]:
    """The maps of f8 at 224 px, 32 images, in float16, with the bias of the convolution before."""
    cases = []
    sides = {128: 224, 256: 112, 512: 28}
    for entry in entries("group_norm_silu", architecture("cuda")):
        channels = entry["max"].get("channels", 512)
        x = torch.randn(
            32, channels, sides[channels], sides[channels], dtype=torch.float16, device="cuda"
        ).to(memory_format=torch.channels_last)
        weight, bias, channel_bias = torch.rand(3, channels, device="cuda")

        def run(
            meta: dict[str, int],
            x: Tensor = x,
            vectors: tuple[Tensor, Tensor, Tensor] = (weight, bias, channel_bias),
        ) -> None:
            launch(x, None, vectors[0], vectors[1], 32, 1e-6, True, vectors[2], meta)

        candidates = [
            {
                "rows": elements // columns,
                "columns": columns,
                "tiles": tiles,
                "num_warps": num_warps,
            }
            for elements in (2048, 4096, 8192)
            for columns in (64, 128, 256)
            for tiles in (4, 8, 16)
            for num_warps in (4, 8)
        ]
        cases.append(TuningCase("group_norm_silu", entry["max"], candidates, run))
    return cases
