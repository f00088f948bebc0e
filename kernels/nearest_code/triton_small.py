"""Nearest code for D <= 8 on tensor cores: one MMA step of k = 16 (D <= 4) or 32 scores a latent
against a code.

With the fp16 terms of the centred, scaled latent and code (triton_common.py),

    A = [z_hi, z_hi, z_lo, 1, 1, 1, 0 ...]    B = [-e_hi, -e_lo, -e_hi, three terms of |e|^2 / 2, 0 ...]    score = A.B

which omits only z_lo.e_lo. The loop costs one MMA and one fp32 minimum a score; then each row scans
the strip of its lowest score in fp32 difference form, which decides unless a second strip or a
second code is too close: those rows go to `settle`. Bytes moved per block of rows: 2 * KP a code
(from L2), 4 D a latent, 4 D S for a row's strip, 8 (+ 4 D) out. Not yet run on a GPU.
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
from dad_fast.kernels.tuning import TuningCase, architecture, entries, meta_parameters

MAX_DIM = 8
KERNEL = "nearest_code_small"
SCAN_CHUNKS = {4: 16, 8: 8}  # up to D dimensions: codes scanned at once; more spill


@triton.jit
def score_kernel(
    z_ptr,  # [N, D] float32
    centre_ptr,  # [D] float32
    packed_ptr,  # [strip, SLOTS, KP] float16: B
    columns_ptr,  # [D, SLOTS * strip] float32
    codebook_ptr,  # [K, D] float32
    codes_ptr,  # [N] int64, out
    quantized_ptr,  # [N, D] float32, out
    num_nonfinite_ptr,  # [1] int64, added to
    num_work_ptr,  # [1] int32, zero
    work_ptr,  # [N] int32, out
    slots_ptr,  # [N, SLOTS / 32] int32, out
    num_rows,
    strip,
    scale,
    radius,
    rho,
    lam,
    tau,
    floor,
    D: tl.constexpr,
    KP: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUANTIZE: tl.constexpr,
    GAMMA: tl.constexpr,
    SLACK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    k = tl.arange(0, KP)
    slot = tl.arange(0, SLOTS)

    # A [ROWS, KP], and its norms for the band.
    z = tl.load(
        z_ptr + rows[:, None].to(tl.int64) * D + (k % D)[None, :], mask=inside[:, None], other=0.0
    )
    finite = tl.min((tl.abs(z) < float("inf")).to(tl.int32), 1) != 0
    z = (tl.where(finite[:, None], z, 0.0) - tl.load(centre_ptr + k % D)[None, :]) * scale
    norm = tl.sqrt(tl.sum(tl.where(k[None, :] < D, z * z, 0.0), 1)) * SLACK
    # The entries fit fp16; a latent a thousand radii away is left to `settle`.
    usable = norm < 32768.0
    z = tl.where(usable[:, None], z, 0.0)
    hi = z.to(tl.float16)
    lo = (z - hi.to(tl.float32)).to(tl.float16)
    ones = ((k >= 3 * D) & (k < 3 * D + 3)).to(tl.float16)
    a = tl.where(k[None, :] < 2 * D, hi, tl.where(k[None, :] < 3 * D, lo, ones[None, :]))
    zeta = norm * 4.76837158203125e-07 + floor * D  # 2^-21: rounding of z - c and of two fp16 terms
    cross = (norm * 0.0009765625 + floor * D) * lam  # 2^-10 > |z_lo| / |z'|

    lowest = tl.full((ROWS, SLOTS), float("inf"), tl.float32)
    for i in range(strip):
        b = tl.load(packed_ptr + i * (SLOTS * KP) + slot[None, :] * KP + k[:, None])  # [KP, SLOTS]
        lowest = tl.minimum(lowest, tl.dot(a, b))

    low = tl.min(lowest, 1)
    limit = threshold(low, norm, zeta, radius, rho, cross, tau, GAMMA, SLACK)
    in_band = (lowest <= limit[:, None]) | (usable == 0)[:, None]
    num_strips = tl.sum(in_band.to(tl.int32), 1)
    chosen = tl.min(tl.where(lowest == low[:, None], slot[None, :], SLOTS - 1), 1)

    # The chosen strip in fp32: the lowest distance, its code, and the lowest distance of any other
    # code.
    best = tl.full((ROWS,), float("inf"), tl.float32)
    second = tl.full((ROWS,), float("inf"), tl.float32)
    code = tl.zeros((ROWS,), tl.int32)
    scanned = inside & finite & (num_strips == 1)
    for first in range(0, strip, CHUNK):
        place = first + tl.arange(0, CHUNK)
        index = chosen[:, None] * strip + place[None, :]
        live = scanned[:, None] & (place < strip)[None, :]
        distance = tl.zeros((ROWS, CHUNK), tl.float32)
        for d in tl.static_range(D):
            z_d = tl.load(z_ptr + rows.to(tl.int64) * D + d, mask=inside, other=0.0)
            e_d = tl.load(columns_ptr + d * (SLOTS * strip) + index, mask=live, other=float("inf"))
            distance += (z_d[:, None] - e_d) * (z_d[:, None] - e_d)
        here = tl.min(distance, 1)
        winner = tl.min(tl.where(distance == here[:, None], index, 0x7FFFFFFF), 1)
        runner_up = tl.min(tl.where(index == winner[:, None], float("inf"), distance), 1)
        second = tl.where(here < best, tl.minimum(best, runner_up), tl.minimum(second, here))
        code = tl.where(here < best, winner, code)
        best = tl.minimum(best, here)
    # Each distance is within (D + 2) 2^-24 of its exact value, and 2^-100 is far above what a flush
    # of subnormals loses.
    decided = (
        scanned
        & (best < 1e38)
        & (second > best * (1.0 + (D + 4) * 2.384185791015625e-07) + 7.888609052210118e-31)
    )

    num_nonfinite = tl.sum((inside & (finite == 0)).to(tl.int64))
    if num_nonfinite > 0:
        tl.atomic_add(num_nonfinite_ptr, num_nonfinite)
    done = inside & (decided | (finite == 0))
    code = tl.where(finite, code, 0)
    tl.store(codes_ptr + rows, code.to(tl.int64), mask=done)
    if QUANTIZE:
        write_quantized(codebook_ptr, quantized_ptr, rows, code, done, D, BLOCK_D)
    needed = inside & (done == 0)
    if tl.sum(needed.to(tl.int32)) > 0:
        append_work(num_work_ptr, work_ptr, slots_ptr, rows, needed, in_band, ROWS, SLOTS)


def available(device: torch.device, num_codes: int, dim: int) -> str:
    """Return "" if this back end can search a codebook [num_codes, dim] on the device, else the
    reason.
    """
    if dim > MAX_DIM:
        return f"it is for latents of at most {MAX_DIM} dimensions, not {dim}"
    return unavailable(device, num_codes * steps(dim) * 16)


def unavailable(device: torch.device, num_elements: int) -> str:
    if num_elements >= 1 << 31:
        return "the codebook is too large for 32-bit offsets"
    if device.type != "cuda":
        from triton import knobs

        return "" if knobs.runtime.interpret else f"it needs a CUDA device, not {device.type}"
    if torch.version.hip is not None:
        return "it is written for NVIDIA's tensor cores"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs compute capability 8.0, which {torch.cuda.get_device_name(device)} does not have"
    return ""


def steps(dim: int) -> int:
    """MMA steps of k = 16 that hold 3 D + 3 entries."""
    return -(-(3 * dim + 3) // 16)


def prepare(codebook: Tensor, slots: int | None = None) -> Prepared:
    """codebook [K, D <= 8] float32: prepare it for `search`.

    Synchronises with the host. `slots`: the number of strips (tests).
    """
    dim = codebook.shape[1]
    slots = slots or meta_parameters(KERNEL, architecture(codebook.device), n=1 << 40)["slots"]
    book = centre_codebook(codebook, slots)
    hi = book.e.half()
    lo = (book.e - hi.double()).half()
    exact_square = book.e.square().sum(1) / 2  # [SLOTS * S]
    terms, rest = [], exact_square
    for _ in range(3):
        terms.append(rest.half())
        rest = rest - terms[-1].double()
    packed = hi.new_zeros(len(hi), 16 * steps(dim))
    packed[:, :dim], packed[:, dim : 2 * dim], packed[:, 2 * dim : 3 * dim] = -hi, -lo, -hi
    packed[:, 3 * dim : 3 * dim + 3] = torch.stack(terms, 1)
    packed[:, 3 * dim].masked_fill_(~book.valid, torch.inf)
    return Prepared(
        codebook=codebook,
        columns=book.columns,
        centre=book.centre,
        packed=packed.view(slots, book.strip, -1).transpose(0, 1).contiguous(),
        half_square=exact_square.float().view(slots, book.strip).T.contiguous(),
        slots=slots,
        strip=book.strip,
        scale=book.scale,
        radius=book.radius,
        rho=float((book.e - hi.double() - lo.double()).norm(dim=1).max()) * (1 + 1e-6),
        lam=float(lo.double().norm(dim=1).max()) * (1 + 1e-6),
        tau=float(rest.abs().max()) * (1 + 1e-6),
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

    num_nonfinite, an int64 device tensor, grows by the number of non-finite latents. Two launches
    with fixed grids, no synchronisation with the host: may be captured in a CUDA graph. `meta`
    replaces the table's entry.
    """
    num_rows, dim = latents.shape
    if not num_rows:
        return
    meta = launch_parameters(KERNEL, latents.device, state, n=num_rows) | (meta or {})
    num_work = torch.zeros(1, dtype=torch.int32, device=latents.device)
    work = torch.empty(num_rows, dtype=torch.int32, device=latents.device)
    slots = torch.empty(num_rows, state.slots // 32, dtype=torch.int32, device=latents.device)
    with torch.cuda.device_of(latents):
        score_kernel[(triton.cdiv(num_rows, meta["rows"]),)](
            latents,
            state.centre,
            state.packed,
            state.columns,
            state.codebook,
            codes,
            quantized if quantized is not None else state.codebook,
            num_nonfinite,
            num_work,
            work,
            slots,
            num_rows,
            state.strip,
            *state.floats(),
            **constants(dim, meta, quantized is not None),
            num_warps=meta["num_warps"],
            num_stages=meta["num_stages"],
            enable_fp_fusion=False,
        )
    settle(latents, state, codes, quantized, num_work, work, slots, None)


def constants(dim: int, meta: dict[str, int], quantize: bool) -> dict[str, Any]:
    return {
        "D": dim,
        "KP": 16 * steps(dim),
        "ROWS": meta["rows"],
        "SLOTS": meta["slots"],
        "CHUNK": next(chunk for most, chunk in SCAN_CHUNKS.items() if dim <= most),
        "BLOCK_D": block_of_dimensions(dim),
        "QUANTIZE": quantize,
        "GAMMA": GAMMA_PER_STEP * steps(dim),
        "SLACK": SLACK,
    }


def report_launches(arch: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """D = 4 and 8 with 16384 codes, in every entry of the table."""
    for dim in (4, 8):
        state = prepare(torch.randn(16384, dim))
        for entry in entries(KERNEL, arch):
            latents = torch.empty(entry["max"].get("n", 1 << 18), dim)
            yield (
                f"nearest_code: small, D={dim}",
                functools.partial(search_once, search, latents, state),
            )


def tuning_cases() -> list[TuningCase]:
    """One image and a batch of 256 of the f8 VQGAN (784 latents an image, 16384 codes of 4), for
    the CUDA device at hand.
    """
    codebook = torch.randn(16384, 4, device="cuda")
    counter = torch.zeros(1, dtype=torch.int64, device="cuda")
    states: dict[int, Prepared] = {}
    slots = meta_parameters(KERNEL, architecture("cuda"), n=1 << 40)["slots"]

    def case(num_rows: int, bounds: dict[str, int], candidates: list[dict[str, int]]) -> TuningCase:
        latents = torch.randn(num_rows, 4, device="cuda")
        codes, quantized = (
            torch.empty(num_rows, dtype=torch.int64, device="cuda"),
            torch.empty_like(latents),
        )

        def run(meta: dict[str, int]) -> None:
            key = meta.get("slots", slots)
            if key not in states:
                states[key] = prepare(codebook, key)
            search(latents, states[key], codes, counter, quantized, meta)

        return TuningCase(KERNEL, bounds, candidates, run)

    few = [
        {"rows": rows, "num_warps": warps, "num_stages": 3}
        for rows, warps in ((16, 1), (32, 2), (64, 4), (128, 8))
    ]
    many = [
        {"rows": rows, "slots": slots, "num_warps": warps, "num_stages": stages}
        for rows, slots, warps in (
            (64, 64, 4),
            (64, 128, 4),
            (128, 64, 8),
            (128, 128, 8),
            (64, 256, 8),
        )
        for stages in (2, 3, 4)
    ]
    return [case(784, {"n": 16384}, few), case(256 * 784, {}, many)]
