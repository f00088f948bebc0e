"""Shared parts of the two Triton back ends: prepared codebook, error band of 16-bit scores, fp64
settlement.

With z' = s (z - c) and e' = s (e - c) (c the codes' mean, s a power of two) the nearest code has
the lowest score |e'|^2 / 2 - z'.e', which tensor cores compute from fp16 with an error bounded
below. The codes are laid out in SLOTS strips: code = slot * S + i. A kernel scores one code of each
strip per iteration i and keeps the strips' minima [rows, SLOTS], one minimum a score and no index.
No code outside the strips whose minimum lies within the band of the lowest score can win. A row
with one such strip and no near tie is decided at once; the others go to a work list, which `settle`
decides in fp64, by the definition. The codes are therefore exact for all data; hard data only cost
time.

The band. For a code with |e'| <= R the score is off by at most

    E(R) = Z rho + zeta (R + rho) + cross + tau + gamma ((Z + zeta) (R + rho) + R^2 / 2 + tau)

Z = |z'|; zeta = |z' - its fp16 terms|; rho, tau: the largest |e' - its fp16 terms| and error of
|e'|^2 / 2 as represented, both measured in fp64 when preparing; cross bounds the products left out
(z_lo.e_lo). gamma bounds the summation: tensor cores align the products of a step with the
accumulator and cut each at 2^-23 of the largest (or better), in blocks of 4 products at the
smallest; that is 16 cuts for 16 products, and for each of 4 blocks one cut of the accumulator and
one of the sum: 24 * 2^-23 for each k = 16 step, of a magnitude that the sum of all |products|
bounds. fp32 additions in any order are within it. The winner and the code with the lowest computed
score `low` both lie within sqrt(2 (low + E(radius)) + Z^2) of z', so that R = Z + that root, which
for codes near the latent is far below the codebook's radius.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dad_fast.kernels.tuning import architecture, meta_parameters

GAMMA_PER_STEP = 24 * 2.0**-23
SLACK = 1 + 2.0**-6  # for the rounding of the band's own arithmetic in fp32
SETTLE_CHUNK = 128
SETTLE_PROGRAMS = 2048
SETTLE_OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
FLOAT_ARGUMENTS = ("scale", "radius", "rho", "lam", "tau", "floor")


@dataclass(frozen=True)
class Prepared:
    """Codebook prepared for one device.

    The floats are kernel arguments; see the module's docstring.
    """

    codebook: Tensor  # [K, D] float32, as given: the source of z_q
    # [D, SLOTS * S] float32; infinite where a code cannot win (not finite, a later duplicate,
    # none).
    columns: Tensor
    centre: Tensor  # [D] float32
    packed: Tensor  # the back end's fp16 operand
    half_square: Tensor  # [S, SLOTS] float32: |e'|^2 / 2 (triton_gemm)
    slots: int
    strip: int  # S
    scale: float
    radius: float  # max |e'|
    rho: float
    lam: float  # max |e_lo| (triton_small)
    tau: float
    floor: float  # what flushing of subnormals and fp16's smallest step add to an entry of z'

    def floats(self) -> tuple[float, ...]:
        return tuple(getattr(self, name) for name in FLOAT_ARGUMENTS)


@dataclass(frozen=True)
class Centred:
    """Codebook centred and scaled in fp64, in strip order; a back end's prepare() packs it."""

    e: Tensor  # [SLOTS * S, D] float64; 0 where a code cannot win
    valid: Tensor  # [SLOTS * S]
    columns: Tensor
    centre: Tensor
    strip: int
    scale: float
    radius: float
    floor: float


def can_win(codebook: Tensor) -> Tensor:
    """[K] bool: finite, and no equal of a code before it."""
    finite = codebook.isfinite().all(1)
    # Equal values, so that -0 is 0; the others become one row, which is masked anyway.
    _, group = torch.where(finite[:, None], codebook + 0.0, 0.0).unique(dim=0, return_inverse=True)
    index = torch.arange(len(codebook), device=codebook.device)
    first = torch.full_like(index, len(codebook)).scatter_reduce_(
        0, group, index.masked_fill(~finite, len(codebook)), "amin"
    )
    return finite & (first[group] == index)


def centre_codebook(codebook: Tensor, slots: int) -> Centred:
    """codebook [K, D] float32 -> its fp64 form in strips. Synchronises with the host."""
    num_codes, dim = codebook.shape
    strip = -(-num_codes // slots)
    valid = can_win(codebook)
    some = valid.any()
    exact = codebook.double().masked_fill(~valid[:, None], 0.0)
    centre = (exact.sum(0) / valid.sum().clamp_min(1)).float()
    e = (exact - centre.double()).masked_fill(~valid[:, None], 0.0)
    largest = float(e.abs().max()) if some else 0.0
    exponent = 5 - int(torch.tensor(largest, dtype=torch.float64).log2().floor()) if largest else 0
    # The largest entry comes to [32, 64), with room above and below in fp16.
    scale = 2.0 ** min(max(exponent, -125), 126)
    e = torch.nn.functional.pad(e * scale, (0, 0, 0, slots * strip - num_codes))
    columns = codebook.new_full((dim, slots * strip), torch.inf)
    columns[:, :num_codes] = codebook.masked_fill(~valid[:, None], torch.inf).T
    valid = torch.nn.functional.pad(valid, (0, slots * strip - num_codes))
    radius = float(e.norm(dim=1).max()) * (1 + 1e-6)
    return Centred(
        e, valid, columns, centre, strip, scale, radius, floor=2.0**-24 + 2.0**-126 * (1 + scale)
    )


def launch_parameters(
    kernel: str, device: torch.device, state: Prepared, **shape: int
) -> dict[str, int]:
    return meta_parameters(kernel, architecture(device), **shape) | {"slots": state.slots}


@triton.jit
def error_bound(norm, zeta, reach, rho, cross, tau, gamma):
    """E(reach) of the module's docstring; norm, zeta, cross [rows]; reach a scalar or [rows]."""
    return (
        norm * rho
        + zeta * (reach + rho)
        + cross
        + tau
        + gamma * ((norm + zeta) * (reach + rho) + 0.5 * reach * reach + tau)
    )


@triton.jit
def threshold(low, norm, zeta, radius, rho, cross, tau, gamma, SLACK: tl.constexpr):
    """[rows]: no code with a higher computed score can be the nearest."""
    square = (
        2.0 * (low + error_bound(norm, zeta, radius, rho, cross, tau, gamma) * SLACK) + norm * norm
    )
    square += (tl.abs(low) + norm * norm) * 9.5367431640625e-07  # 2^-20: the cancellation above
    reach = tl.minimum((norm + tl.sqrt(tl.maximum(square, 0.0))) * SLACK, radius)
    return low + 2.0 * SLACK * error_bound(norm, zeta, reach, rho, cross, tau, gamma)


@triton.jit
def write_quantized(
    codebook_ptr, quantized_ptr, rows, codes, live, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """quantized[rows] = codebook[codes] where live."""
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        mask = live[:, None] & (d[None, :] < D)
        values = tl.load(
            codebook_ptr + codes[:, None].to(tl.int64) * D + d[None, :], mask=mask, other=0.0
        )
        tl.store(quantized_ptr + rows[:, None].to(tl.int64) * D + d[None, :], values, mask=mask)


@triton.jit
def append_work(
    num_work_ptr,
    work_ptr,
    slots_ptr,
    rows,
    needed,
    in_band,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Append the needed rows [ROWS] to the work list, with their strips in the band [ROWS, SLOTS];
    return their places.
    """
    count = needed.to(tl.int32)
    place = tl.atomic_add(num_work_ptr, tl.sum(count)) + tl.cumsum(count, 0) - count
    tl.store(work_ptr + place, rows, mask=needed)
    column = tl.arange(0, SLOTS)
    bits = tl.where(in_band, (tl.full((ROWS, SLOTS), 1, tl.int32) << (column % 32)[None, :]), 0)
    # The bits are distinct, so the sum is the union.
    words = tl.sum(tl.reshape(bits, (ROWS, SLOTS // 32, 32)), 2)
    word = tl.arange(0, SLOTS // 32)
    tl.store(
        slots_ptr + place[:, None].to(tl.int64) * (SLOTS // 32) + word[None, :],
        words,
        mask=needed[:, None],
    )
    return place


@triton.jit
def settle_kernel(
    z_ptr,  # [N, D] float32
    columns_ptr,  # [D, SLOTS * strip] float32
    codebook_ptr,  # [K, D] float32
    codes_ptr,  # [N] int64, out
    quantized_ptr,  # [N, D] float32, out
    num_work_ptr,  # [1] int32
    work_ptr,  # [N] int32: rows
    slots_ptr,  # [N, SLOTS / 32] int32: the strips that may hold the nearest code
    tiles_ptr,  # [N, 2] int32: the places in a strip that may hold it; -1: any place
    strip,
    D,  # not a constant: unrolling gains nothing here
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    """Find the nearest code of each listed row among its strips, in fp64 by the definition, without
    contraction.
    """
    lane = tl.arange(0, CHUNK)
    for item in range(tl.program_id(0), tl.load(num_work_ptr), tl.num_programs(0)):
        row = tl.load(work_ptr + item).to(tl.int64)
        best = tl.full((CHUNK,), float("inf"), tl.float64)
        code = tl.full((CHUNK,), 0x7FFFFFFF, tl.int32)
        for slot in range(SLOTS):
            word = tl.load(slots_ptr + item * (SLOTS // 32) + slot // 32)
            if ((word >> (slot % 32)) & 1) != 0:
                for first in range(0, strip, CHUNK):
                    place = first + lane
                    live = place < strip
                    if TILES:
                        first_tile, second_tile = (
                            tl.load(tiles_ptr + item * 2),
                            tl.load(tiles_ptr + item * 2 + 1),
                        )
                        first_tile = tl.where(first_tile < 0, place, first_tile)
                        live = live & ((place == first_tile) | (place == second_tile))
                    index = slot * strip + place
                    distance = tl.zeros((CHUNK,), tl.float64)
                    for d in range(D):
                        z = tl.load(z_ptr + row * D + d).to(tl.float64)
                        e = tl.load(
                            columns_ptr + d * (SLOTS * strip) + index, mask=live, other=float("inf")
                        ).to(tl.float64)
                        distance += (z - e) * (z - e)
                    # A lane visits its codes in ascending order, so the first of equals stays.
                    closer = distance < best
                    best = tl.where(closer, distance, best)
                    code = tl.where(closer, index, code)
        low = tl.min(best, 0)
        winner = tl.min(tl.where(best == low, code, 0x7FFFFFFF), 0)
        winner = tl.where(low < float("inf"), winner, 0)
        tl.store(codes_ptr + row, winner.to(tl.int64))
        if QUANTIZE:
            for first in range(0, D, BLOCK_D):
                d = first + tl.arange(0, BLOCK_D)
                values = tl.load(codebook_ptr + winner.to(tl.int64) * D + d, mask=d < D, other=0.0)
                tl.store(quantized_ptr + row * D + d, values, mask=d < D)


def block_of_dimensions(dim: int) -> int:
    return min(256, triton.next_power_of_2(dim))


def settle_constants(
    dim: int, slots: int, strip: int, tiles: bool, quantize: bool
) -> dict[str, Any]:
    chunk = min(SETTLE_CHUNK, max(16, triton.next_power_of_2(strip)))
    return {
        "SLOTS": slots,
        "CHUNK": chunk,
        "BLOCK_D": block_of_dimensions(dim),
        "TILES": tiles,
        "QUANTIZE": quantize,
    }


def settle(
    latents: Tensor,
    state: Prepared,
    codes: Tensor,
    quantized: Tensor | None,
    num_work: Tensor,
    work: Tensor,
    slots: Tensor,
    tiles: Tensor | None,
) -> None:
    """Launch `settle_kernel` with a fixed grid, because only the device knows the length of the
    list.
    """
    dim = latents.shape[1]
    with torch.cuda.device_of(latents):
        settle_kernel[(min(len(latents), SETTLE_PROGRAMS),)](
            latents,
            state.columns,
            state.codebook,
            codes,
            quantized if quantized is not None else state.codebook,
            num_work,
            work,
            slots,
            tiles if tiles is not None else work,
            state.strip,
            dim,
            **settle_constants(
                dim, state.slots, state.strip, tiles is not None, quantized is not None
            ),
            **SETTLE_OPTIONS,
        )


def search_once(search: Callable[..., None], latents: Tensor, state: Prepared) -> None:
    """Search with z_q, for a record of the launches."""
    codes = torch.empty(len(latents), dtype=torch.int64)
    search(latents, state, codes, torch.zeros(1, dtype=torch.int64), torch.empty_like(latents))
