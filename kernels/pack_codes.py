"""Codes as a stream of bits: 784 codes of 14 bits take 1372 bytes instead of 6272.

Order of bits: bit j of code i (j = 0 the lowest) is bit t = i * bits + j of a row, and bit t of a
row is bit t % 8 (0 the lowest) of byte t // 8; the bits after the last code are 0. In numpy,
without this module:

    def unpack(packed, bits, length):                       # packed: uint8 [..., bytes]
        stream = np.unpackbits(packed, axis=-1, bitorder="little")[..., : length * bits]
        return stream.reshape(*packed.shape[:-1], length, bits) @ (1 << np.arange(bits, dtype=np.int64))

`pack_torch` and `unpack_torch` work on any device: eight codes fill exactly `bits` bytes, so the
layout of every group is the same. On CUDA one Triton kernel does it (pack_codes_triton.py). Bytes
moved: 8 a code and bits / 8 a code.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

MAX_BITS = 32
DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)
HAS_TRITON = importlib.util.find_spec("triton") is not None


def packed_bytes(length: int, bits: int) -> int:
    """Bytes of a row of `length` codes."""
    return -(-length * bits // 8)


def pack_torch(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [..., L] as uint8 [..., ceil(L * bits / 8)]; of a code out of range, keep the
    lowest bits.
    """
    length = codes.shape[-1]
    groups = -(-length // 8)
    codes = codes.to(torch.int64) & ((1 << bits) - 1)
    codes = torch.nn.functional.pad(codes, (0, 8 * groups - length)).unflatten(-1, (groups, 8))
    # [..., groups, bytes of a group].
    packed = codes.new_empty(*codes.shape[:-1], bits, dtype=torch.uint8)
    for byte in range(bits):
        # The codes with a bit in this byte.
        first, last = 8 * byte // bits, min((8 * byte + 7) // bits, 7)
        value = codes[..., first] >> (8 * byte - first * bits)
        for i in range(first + 1, last + 1):
            value |= codes[..., i] << (i * bits - 8 * byte)
        packed[..., byte] = value & 255
    return packed.flatten(-2)[..., : packed_bytes(length, bits)].contiguous()


def unpack_torch(packed: Tensor, bits: int, length: int) -> Tensor:
    """Unpack uint8 [..., ceil(length * bits / 8)] as int64 [..., length]."""
    groups = -(-length // 8)
    # Holds a code and up to 7 bits before it.
    dtype = torch.int32 if bits <= 24 else torch.int64
    grouped = torch.nn.functional.pad(packed, (0, groups * bits - packed.shape[-1])).unflatten(
        -1, (groups, bits)
    )
    codes = packed.new_empty(*packed.shape[:-1], groups, 8, dtype=torch.int64)
    for i in range(8):
        first, shift = divmod(i * bits, 8)
        word = grouped[..., first].to(dtype)
        for j in range(1, -(-(shift + bits) // 8)):
            word |= grouped[..., first + j].to(dtype) << (8 * j)
        codes[..., i] = (word >> shift) & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :length].contiguous()


def _pack_torch(codes: Tensor, bits: int, num_out_of_range: Tensor | None) -> Tensor:
    out_of_range = (codes < 0) | (codes.to(torch.int64) >> bits > 0)
    if num_out_of_range is not None:
        num_out_of_range += out_of_range.sum()
    elif not codes.is_cuda and out_of_range.any():
        wrong = codes[out_of_range][0].item()
        raise ValueError(f"pack_codes: code {wrong} does not fit {bits} bits")
    return pack_torch(codes, bits)


_pack = torch.library.custom_op(
    "dad_fast::pack_codes", _pack_torch, mutates_args=("num_out_of_range",)
)


@torch.library.custom_op("dad_fast::unpack_codes", mutates_args=())
def _unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    return unpack_torch(packed, bits, length)


_uses_triton = True


def use_triton(on: bool) -> None:
    """Set whether this process packs and unpacks on CUDA by Triton, or by torch."""
    global _uses_triton
    _uses_triton = on


if HAS_TRITON:

    @_pack.register_kernel("cuda")
    def _(codes: Tensor, bits: int, num_out_of_range: Tensor | None) -> Tensor:
        from dad_fast.kernels import pack_codes_triton

        if not _uses_triton:
            return _pack_torch(codes, bits, num_out_of_range)
        return pack_codes_triton.pack(codes, bits, num_out_of_range)

    @_unpack.register_kernel("cuda")
    def _(packed: Tensor, bits: int, length: int) -> Tensor:
        from dad_fast.kernels import pack_codes_triton

        if not _uses_triton:
            return unpack_torch(packed, bits, length)
        return pack_codes_triton.unpack(packed, bits, length)


@_pack.register_fake
def _(codes: Tensor, bits: int, num_out_of_range: Tensor | None) -> Tensor:
    return codes.new_empty(
        *codes.shape[:-1], packed_bytes(codes.shape[-1], bits), dtype=torch.uint8
    )


@_unpack.register_fake
def _(packed: Tensor, bits: int, length: int) -> Tensor:
    return packed.new_empty(*packed.shape[:-1], length, dtype=torch.int64)


def _check_bits(name: str, bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"{name}: a code has 1 to {MAX_BITS} bits, not {bits}")


def pack_codes(codes: Tensor, bits: int, num_out_of_range: Tensor | None = None) -> Tensor:
    """Pack codes [..., L] as uint8 [..., ceil(L * bits / 8)].

    codes: int64, int32, int16 or uint8, any strides, 0 <= code < 2^bits.

    The order of the bits is in the module's docstring. bits: 1 to 32. Raises ValueError for other
    widths, dtypes and, on a CPU, for a code out of range. On a device nothing is read back: the
    lowest `bits` bits of such a code are kept and `num_out_of_range` (int64 on that device), if
    given, grows by the number of such codes; check it at the next synchronisation. On a CPU, too,
    it counts instead of raising.
    """
    _check_bits("pack_codes", bits)
    if codes.ndim == 0 or codes.dtype not in DTYPES:
        raise ValueError(
            f"pack_codes: codes [..., L] in int64, int32, int16 or uint8 are needed, not {list(codes.shape)} in {codes.dtype}"
        )
    return torch.ops.dad_fast.pack_codes(codes, bits, num_out_of_range)


def unpack_codes(packed: Tensor, bits: int, length: int) -> Tensor:
    """Unpack uint8 [..., ceil(length * bits / 8)] from `pack_codes`, any strides, as int64 codes
    [..., length].

    Raises ValueError for other shapes, dtypes and widths. Bits after the last code are ignored.
    Works in CUDA graphs.
    """
    _check_bits("unpack_codes", bits)
    if (
        length < 0
        or packed.ndim == 0
        or packed.dtype != torch.uint8
        or packed.shape[-1] != packed_bytes(length, bits)
    ):
        raise ValueError(
            f"unpack_codes: {length} codes of {bits} bits are uint8 [..., {packed_bytes(max(length, 0), bits)}], "
            f"not {list(packed.shape)} in {packed.dtype}"
        )
    return torch.ops.dad_fast.unpack_codes(packed, bits, length)
