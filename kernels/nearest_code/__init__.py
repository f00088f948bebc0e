"""Exact nearest-code search: codes[n] = argmin_k sum_d (z[n, d] - e[k, d])^2.

z [N, D] latents, e [K, D] codebook, both float32, float16 or bfloat16; codes [N] int64. "Exact" is
the argmin of the fp64 distance, each term rounded after the square and summed in order of d (no
fused multiply-add); the lowest index wins a tie. A latent that is not finite gets code 0; a code
that is not finite never wins (if all are such: code 0). Every back end gives the same codes, bit
for bit; each has a module of its own.
"""

from dad_fast.kernels.nearest_code.ops import nearest_code
from dad_fast.kernels.nearest_code.search import CodebookSearch

__all__ = ["CodebookSearch", "nearest_code"]
