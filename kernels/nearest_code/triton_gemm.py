"""Nearest code for any number of dimensions: a GEMM z'.e' in fp16 with fp32 accumulation whose
scores never leave the registers.

score = |e'|^2 / 2 - z'.e' (z', e' centred and scaled: triton_common.py). Of the scores [ROWS,
SLOTS] of iteration i the kernel keeps the minimum of each strip over all i (one fp32 minimum a
score) and per row the three lowest iterations by their minimum (a second one). If one strip and one
iteration are inside the error band, they give the code without recomputation. The other rows (a few
in a hundred at D = 256) go to `settle` with their strips and, where there are at most two, their
iterations. A first kernel rounds the latents to fp16 and measures, row by row, the rounding error;
prepare() measures that of the codebook. Bytes moved: 8 D a latent in and out of fp16, the codebook
in fp16 for each block of rows (from L2), 8 (+ 8 D with z_q) out. Not yet run on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dad_fast.kernels.nearest_code.triton_common import (
    GAMMA_PER_STEP,
    SLACK,
    Prepared,
    append_work,
    block_of_dimensions,
    centre_codebook,
    launch_parameters,
    search_once,
    settle,
    threshold,
    write_quantized,
)
from dad_fast.kernels.nearest_code.triton_small import unavailable
from dad_fast.kernels.tuning import TuningCase, architecture, entries, meta_parameters

KERNEL = "nearest_code_gemm"
MAX_BLOCK_D = 256
ROUND_ROWS = 32  # of a program of round_kernel
ROUND_OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
LOSES = 3e38  # the score of a code that cannot win


@triton.jit
def round_kernel(
    z_ptr,  # [N, D] float32
    centre_ptr,  # [D] float32
    rounded_ptr,  # [N, BLOCKS * BLOCK_D] float16, out: z', 0 beyond D
    # [N, 2] float32, out: upper bounds of |z'| and |z' - rounded|; |z'| = -1: not finite, -2: too
    # large to be scored.
    norms_ptr,
    num_nonfinite_ptr,  # [1] int64, added to
    num_rows,
    scale,
    floor,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLACK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    square = tl.zeros((ROWS,), tl.float32)
    residual = tl.zeros((ROWS,), tl.float32)
    all_finite = tl.full((ROWS,), 1, tl.int32)
    for first in range(0, WIDTH, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        real = inside[:, None] & (d < D)[None, :]
        z = tl.load(z_ptr + rows[:, None].to(tl.int64) * D + d[None, :], mask=real, other=0.0)
        all_finite = tl.minimum(all_finite, tl.min((tl.abs(z) < float("inf")).to(tl.int32), 1))
        z = tl.where(
            real, (z - tl.load(centre_ptr + d, mask=d < D, other=0.0)[None, :]) * scale, 0.0
        )
        fits = tl.where(tl.abs(z) < 32768.0, z, 0.0)  # a row with another entry is not scored
        rounded = fits.to(tl.float16)
        rest = fits - rounded.to(tl.float32)
        square += tl.sum(z * z, 1)
        residual += tl.sum(rest * rest, 1)
        tl.store(
            rounded_ptr + rows[:, None].to(tl.int64) * WIDTH + d[None, :],
            rounded,
            mask=inside[:, None],
        )
    norm = tl.sqrt(square) * SLACK
    # 2^-23: z - c rounds.
    zeta = tl.sqrt(residual) * SLACK + norm * 1.1920928955078125e-07 + floor * D
    finite = all_finite != 0
    norm = tl.where(finite, tl.where(norm < 32768.0, norm, -2.0), -1.0)
    tl.store(norms_ptr + rows * 2, norm, mask=inside)
    tl.store(norms_ptr + rows * 2 + 1, zeta, mask=inside)
    num_nonfinite = tl.sum((inside & (finite == 0)).to(tl.int64))
    if num_nonfinite > 0:
        tl.atomic_add(num_nonfinite_ptr, num_nonfinite)


@triton.jit
def gemm_kernel(
    rounded_ptr,  # [N, BLOCKS * BLOCK_D] float16: z'
    norms_ptr,  # [N, 2] float32
    packed_ptr,  # [strip, SLOTS, BLOCKS * BLOCK_D] float16: e'
    half_square_ptr,  # [strip, SLOTS] float32
    codebook_ptr,  # [K, D] float32
    codes_ptr,  # [N] int64, out
    quantized_ptr,  # [N, D] float32, out
    num_work_ptr,  # [1] int32, zero
    work_ptr,  # [N] int32, out
    slots_ptr,  # [N, SLOTS / 32] int32, out
    tiles_ptr,  # [N, 2] int32, out
    num_rows,
    strip,
    radius,
    rho,
    tau,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    WRITE_D: tl.constexpr,
    QUANTIZE: tl.constexpr,
    GAMMA: tl.constexpr,
    SLACK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    slot = tl.arange(0, SLOTS)
    k = tl.arange(0, BLOCK_D)
    a_ptr = rounded_ptr + rows[:, None].to(tl.int64) * (BLOCKS * BLOCK_D) + k[None, :]
    if BLOCKS == 1:
        a = tl.load(a_ptr, mask=inside[:, None], other=0.0)  # stays on the chip

    lowest = tl.full((ROWS, SLOTS), 3.4e38, tl.float32)
    first_low = tl.full((ROWS,), 3.4e38, tl.float32)
    second_low = first_low
    third_low = first_low
    first_tile = tl.zeros((ROWS,), tl.int32)
    second_tile = first_tile
    for i in range(strip):
        b_ptr = (
            packed_ptr
            + i * (SLOTS * BLOCKS * BLOCK_D)
            + slot[None, :] * (BLOCKS * BLOCK_D)
            + k[:, None]
        )
        if BLOCKS == 1:
            product = tl.dot(a, tl.load(b_ptr))
        else:
            product = tl.zeros((ROWS, SLOTS), tl.float32)
            for block in range(BLOCKS):
                part = tl.load(a_ptr + block * BLOCK_D, mask=inside[:, None], other=0.0)
                product = tl.dot(part, tl.load(b_ptr + block * BLOCK_D), product)
        score = tl.load(half_square_ptr + i * SLOTS + slot)[None, :] - product
        lowest = tl.minimum(lowest, score)
        tile_low = tl.min(score, 1)
        beats_first = tile_low < first_low
        beats_second = tile_low < second_low
        third_low = tl.where(beats_second, second_low, tl.minimum(third_low, tile_low))
        second_tile = tl.where(beats_first, first_tile, tl.where(beats_second, i, second_tile))
        second_low = tl.where(beats_first, first_low, tl.minimum(second_low, tile_low))
        first_tile = tl.where(beats_first, i, first_tile)
        first_low = tl.minimum(first_low, tile_low)

    norm = tl.load(norms_ptr + rows * 2, mask=inside, other=0.0)
    zeta = tl.load(norms_ptr + rows * 2 + 1, mask=inside, other=0.0)
    finite = norm != -1.0
    usable = norm >= 0.0
    limit = threshold(first_low, norm, zeta, radius, rho, 0.0, tau, GAMMA, SLACK)
    in_band = (lowest <= limit[:, None]) | (usable == 0)[:, None]
    num_strips = tl.sum(in_band.to(tl.int32), 1)
    chosen = tl.min(tl.where(lowest == first_low[:, None], slot[None, :], SLOTS - 1), 1)
    decided = usable & (num_strips == 1) & (second_low > limit) & (first_low < 1e38)
    done = inside & (decided | (finite == 0))
    code = tl.where(finite, chosen * strip + first_tile, 0)
    tl.store(codes_ptr + rows, code.to(tl.int64), mask=done)
    if QUANTIZE:
        write_quantized(codebook_ptr, quantized_ptr, rows, code, done, D, WRITE_D)
    needed = inside & (done == 0)
    if tl.sum(needed.to(tl.int32)) > 0:
        place = append_work(num_work_ptr, work_ptr, slots_ptr, rows, needed, in_band, ROWS, SLOTS)
        # At most two iterations reach the band, so only their codes can win.
        two = usable & (third_low > limit)
        tl.store(tiles_ptr + place * 2, tl.where(two, first_tile, -1), mask=needed)
        tl.store(tiles_ptr + place * 2 + 1, tl.where(two, second_tile, -1), mask=needed)


def blocks_of(dim: int) -> tuple[int, int]:
    """(width, number) of the blocks of dimensions: one block up to MAX_BLOCK_D."""
    width = min(MAX_BLOCK_D, max(16, triton.next_power_of_2(dim)))
    if dim > MAX_BLOCK_D:
        width = 64
    return width, -(-dim // width)


def available(device: torch.device, num_codes: int, dim: int) -> str:
    """Return "" if this back end can search a codebook [num_codes, dim] on the device, else the
    reason.
    """
    width, number = blocks_of(dim)
    reason = unavailable(device, 2 * num_codes * width * number)
    if reason or device.type != "cuda":
        return reason
    meta = meta_parameters(KERNEL, architecture(device), d=dim)
    needed = 2 * width * (meta["rows"] + meta["slots"] * meta["num_stages"])
    offered = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    if needed > offered:
        return f"it needs {needed >> 10} KiB of shared memory a block, and {torch.cuda.get_device_name(device)} has {offered >> 10}"
    return ""


def prepare(codebook: Tensor, slots: int | None = None) -> Prepared:
    """codebook [K, D] float32: prepare it for `search`.

    Synchronises with the host. `slots`: the number of strips (tests).
    """
    dim = codebook.shape[1]
    slots = slots or meta_parameters(KERNEL, architecture(codebook.device), d=dim)["slots"]
    book = centre_codebook(codebook, slots)
    width, number = blocks_of(dim)
    packed = book.e.half()
    exact_square = book.e.square().sum(1) / 2  # [SLOTS * S]
    half_square = exact_square.float()
    tau = float((exact_square - half_square.double()).abs().max()) * (1 + 1e-6)
    half_square = half_square.masked_fill(~book.valid, LOSES)
    return Prepared(
        codebook=codebook,
        columns=book.columns,
        centre=book.centre,
        packed=torch.nn.functional.pad(packed, (0, width * number - dim))
        .view(slots, book.strip, -1)
        .transpose(0, 1)
        .contiguous(),
        half_square=half_square.view(slots, book.strip).T.contiguous(),
        slots=slots,
        strip=book.strip,
        scale=book.scale,
        radius=book.radius,
        rho=float((book.e - packed.double()).norm(dim=1).max()) * (1 + 1e-6),
        lam=0.0,
        tau=tau,
        floor=book.floor,
    )


def search(
    latents: Tensor,
    state: Prepared,
    codes: Tensor,
    num_nonfinite: Tensor,
    quantized: Tensor | None = None,
    meta: dict[str, int] | None = None,
) -> None:
    """Search latents [N, D] float32, contiguous; return codes [N] int64 and, if given, quantized
    [N, D] = codebook[codes].

    num_nonfinite, an int64 device tensor, grows by the number of non-finite latents. Three launches
    with fixed grids, no synchronisation with the host: may be captured in a CUDA graph. `meta`
    replaces the table's entry.
    """
    num_rows, dim = latents.shape
    if not num_rows:
        return
    meta = launch_parameters(KERNEL, latents.device, state, d=dim) | (meta or {})
    num_work = torch.zeros(1, dtype=torch.int32, device=latents.device)
    work = torch.empty(num_rows, dtype=torch.int32, device=latents.device)
    slots = torch.empty(num_rows, state.slots // 32, dtype=torch.int32, device=latents.device)
    tiles = torch.empty(num_rows, 2, dtype=torch.int32, device=latents.device)
    rounded = torch.empty(
        num_rows, state.packed.shape[2], dtype=torch.float16, device=latents.device
    )
    norms = torch.empty(num_rows, 2, dtype=torch.float32, device=latents.device)
    with torch.cuda.device_of(latents):
        round_kernel[(triton.cdiv(num_rows, ROUND_ROWS),)](
            latents,
            state.centre,
            rounded,
            norms,
            num_nonfinite,
            num_rows,
            state.scale,
            state.floor,
            **round_constants(dim),
            **ROUND_OPTIONS,
        )
        gemm_kernel[(triton.cdiv(num_rows, meta["rows"]),)](
            rounded,
            norms,
            state.packed,
            state.half_square,
            state.codebook,
            codes,
            quantized if quantized is not None else state.codebook,
            num_work,
            work,
            slots,
            tiles,
            num_rows,
            state.strip,
            state.radius,
            state.rho,
            state.tau,
            **constants(dim, meta, quantized is not None),
            num_warps=meta["num_warps"],
            num_stages=meta["num_stages"],
            enable_fp_fusion=False,
        )
    settle(latents, state, codes, quantized, num_work, work, slots, tiles)


def round_constants(dim: int) -> dict[str, Any]:
    width, number = blocks_of(dim)
    return {
        "D": dim,
        "WIDTH": width * number,
        "ROWS": ROUND_ROWS,
        "BLOCK_D": min(width, 64),
        "SLACK": SLACK,
    }


def constants(dim: int, meta: dict[str, int], quantize: bool) -> dict[str, Any]:
    width, number = blocks_of(dim)
    return {
        "D": dim,
        "BLOCK_D": width,
        "BLOCKS": number,
        "ROWS": meta["rows"],
        "SLOTS": meta["slots"],
        "WRITE_D": min(32, block_of_dimensions(dim)),
        "QUANTIZE": quantize,
        "GAMMA": GAMMA_PER_STEP * (width * number // 16)
        + 2.0**-22,  # the last: half_square - product rounds
        "SLACK": SLACK,
    }


def report_launches(arch: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """The widest latents of every table entry, and latents of 512 dimensions, which take several
    blocks; 16384 codes.
    """
    for entry in entries(KERNEL, arch):
        dim = entry["max"].get("d", 512)
        arguments = torch.empty(784, dim), prepare(torch.randn(16384, dim))
        yield f"nearest_code: gemm, D={dim}", functools.partial(search_once, search, *arguments)


def tuning_cases() -> list[TuningCase]:
    """256 images of a VQGAN with 14 x 14 latents of 256 dimensions and 16384 codes; narrower and
    wider ones; on the GPU at hand.
    """
    counter = torch.zeros(1, dtype=torch.int64, device="cuda")

    def case(dim: int, bounds: dict[str, int], candidates: list[dict[str, int]]) -> TuningCase:
        latents, codebook = (
            torch.randn(256 * 196, dim, device="cuda"),
            torch.randn(16384, dim, device="cuda"),
        )
        codes, quantized = (
            torch.empty(len(latents), dtype=torch.int64, device="cuda"),
            torch.empty_like(latents),
        )
        states: dict[int, Prepared] = {}

        def run(meta: dict[str, int]) -> None:
            if meta["slots"] not in states:
                states[meta["slots"]] = prepare(codebook, meta["slots"])
            search(latents, states[meta["slots"]], codes, counter, quantized, meta)

        return TuningCase(KERNEL, bounds, candidates, run)

    candidates = [
        {"rows": rows, "slots": slots, "num_warps": warps, "num_stages": stages}
        for rows, slots, warps in (
            (64, 64, 4),
            (128, 64, 4),
            (128, 64, 8),
            (128, 128, 8),
            (256, 64, 8),
        )
        for stages in (2, 3, 4)
    ]
    return [
        case(64, {"d": 64}, candidates),
        case(256, {"d": 256}, candidates),
        case(512, {}, candidates),
    ]
