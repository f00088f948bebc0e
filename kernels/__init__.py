"""Kernels and their references: one file per op.

Imports torch only; uses Triton and csrc if available.
"""

# The checkout's root is on sys.path, but the name `kernels` belongs to another package.
if __name__ != "dad_fast.kernels":
    raise ImportError("this folder is imported as dad_fast.kernels")

from dad_fast.kernels.csrc import csrc_status
from dad_fast.kernels.nearest_code import CodebookSearch, nearest_code
from dad_fast.kernels.pack_codes import pack_codes, packed_bytes, unpack_codes

__all__ = [
    "CodebookSearch",
    "csrc_status",
    "nearest_code",
    "pack_codes",
    "packed_bytes",
    "unpack_codes",
]
