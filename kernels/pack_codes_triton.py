"""Packing and unpacking of codes in Triton; the order of the bits is in pack_codes.py. Not yet run
on a GPU.

One lane makes one byte (packing) or one code (unpacking) out of all the codes or bytes that share
bits with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dad_fast.kernels.pack_codes import packed_bytes

BLOCK = 1024
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def pack_kernel(
    codes_ptr,  # [rows, length]
    packed_ptr,  # [rows, row_bytes] uint8, out
    num_out_of_range_ptr,  # [1] int64, added to
    length,
    row_bytes,
    BITS: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = byte * 8 // BITS
    value = tl.zeros((BLOCK,), tl.int64)
    wrong = tl.zeros((BLOCK,), tl.int64)
    for j in tl.static_range((7 + BITS - 1) // BITS + 1):
        i = first + j
        shift = i * BITS - byte * 8  # of the code against the byte
        shared = (byte < row_bytes) & (i < length) & (shift < 8)
        code = tl.load(codes_ptr + row * length + i, mask=shared, other=0).to(tl.int64)
        if COUNT:  # by the byte with the code's first bit
            wrong += (shared & (shift >= 0) & ((code < 0) | ((code >> BITS) > 0))).to(tl.int64)
        code = code & ((1 << BITS) - 1)
        value |= tl.where(shift >= 0, code << tl.maximum(shift, 0), code >> tl.maximum(-shift, 0))
    tl.store(packed_ptr + row * row_bytes + byte, (value & 255).to(tl.uint8), mask=byte < row_bytes)
    if COUNT:
        num_wrong = tl.sum(wrong)
        if num_wrong > 0:
            tl.atomic_add(num_out_of_range_ptr, num_wrong)


@triton.jit
def unpack_kernel(
    packed_ptr,  # [rows, row_bytes] uint8
    codes_ptr,  # [rows, length] int64, out
    length,
    row_bytes,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = i * BITS // 8
    word = tl.zeros((BLOCK,), tl.int64)
    for j in tl.static_range((7 + BITS + 7) // 8):
        here = (i < length) & (first + j < row_bytes)
        word |= tl.load(packed_ptr + row * row_bytes + first + j, mask=here, other=0).to(
            tl.int64
        ) << (8 * j)
    tl.store(
        codes_ptr + row * length + i, (word >> (i * BITS % 8)) & ((1 << BITS) - 1), mask=i < length
    )


def _grid(rows: int, columns: int) -> tuple[int, int]:
    return rows, triton.cdiv(columns, BLOCK)


def pack(codes: Tensor, bits: int, num_out_of_range: Tensor | None) -> Tensor:
    """Pack codes [..., L] as uint8 [..., ceil(L * bits / 8)]; add to num_out_of_range (int64, one
    element) if given.
    """
    length = codes.shape[-1]
    row_bytes = packed_bytes(length, bits)
    packed = torch.empty(*codes.shape[:-1], row_bytes, dtype=torch.uint8, device=codes.device)
    if packed.numel():
        codes = codes.contiguous()
        counter = packed if num_out_of_range is None else num_out_of_range
        count = num_out_of_range is not None
        with torch.cuda.device_of(codes):
            pack_kernel[_grid(packed.numel() // row_bytes, row_bytes)](
                codes,
                packed,
                counter,
                length,
                row_bytes,
                BITS=bits,
                COUNT=count,
                BLOCK=BLOCK,
                **OPTIONS,
            )
    return packed


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """packed uint8 [..., ceil(length * bits / 8)] -> int64 [..., length]."""
    codes = torch.empty(*packed.shape[:-1], length, dtype=torch.int64, device=packed.device)
    if codes.numel():
        packed = packed.contiguous()
        with torch.cuda.device_of(packed):
            unpack_kernel[_grid(codes.numel() // length, length)](
                packed, codes, length, packed.shape[-1], BITS=bits, BLOCK=BLOCK, **OPTIONS
            )
    return codes


def report_launches(arch: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """14 bits, for 16384 codes; 10, for 1024."""
    counter = torch.empty(1, dtype=torch.int64, device="meta")
    for bits, length in ((10, 196), (14, 784)):
        codes = torch.empty(2, length, dtype=torch.int64, device="meta")

        def run(codes: Tensor = codes, bits: int = bits, length: int = length) -> None:
            unpack(pack(codes, bits, counter), bits, length)

        yield f"pack_codes: {bits} bits", run
