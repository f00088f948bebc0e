"""Kernels and their references: one file per op. Imports torch only; Triton and csrc are used where they are found."""

from dad_fast.kernels.csrc import csrc_status
from dad_fast.kernels.nearest_code import nearest_code

__all__ = ["csrc_status", "nearest_code"]
