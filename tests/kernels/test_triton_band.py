"""Error band of the Triton back ends, checked for sums as tensor cores compute them.

The sums are aligned, truncated and in blocks. Everything runs in plain torch.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
from dad_fast.kernels.nearest_code import triton_common, triton_gemm, triton_small
from tests.codebooks import DATA


def cut_sum(products, accumulator, block):
    """Sum as the least exact tensor cores.

    Blocks and the accumulator are aligned to the largest exponent, addends truncated to 24 bits.
    """
    for first in range(0, products.shape[-1], block):
        terms = torch.cat([products[..., first : first + block], accumulator[..., None]], -1)
        largest = terms.abs().amax(-1, keepdim=True)
        unit = torch.where(largest > 0, 2.0 ** (largest.clamp_min(1e-300).log2().floor() - 23), 1.0)
        total = ((terms / unit).trunc() * unit).sum(-1)
        unit = torch.where(
            total != 0, 2.0 ** (total.abs().clamp_min(1e-300).log2().floor() - 23), 1.0
        )
        accumulator = (total / unit).trunc() * unit
    return accumulator


@pytest.mark.parametrize("block", [4, 8, 16])
@pytest.mark.parametrize("d", [3, 4, 8])
def test_the_band_bounds_the_error_of_small(d, block):
    for data in DATA:
        z, e = data(40, 64, d)
        state = triton_small.prepare(e, 32)
        exact_z = (z.double() - state.centre.double()) * state.scale
        rounded = (z - state.centre) * state.scale
        norm = rounded.double().norm(dim=1) * triton_common.SLACK
        usable = (norm < 32768) & rounded.isfinite().all(1)
        exact_z, rounded, norm = exact_z[usable], rounded[usable], norm[usable]
        hi = rounded.half()
        lo = (rounded - hi.float()).half()
        width = state.packed.shape[2]
        a = torch.zeros(len(hi), width, dtype=torch.float64)
        a[:, :d], a[:, d : 2 * d], a[:, 2 * d : 3 * d], a[:, 3 * d : 3 * d + 3] = hi, hi, lo, 1
        packed = state.packed.transpose(0, 1).reshape(-1, width).double()
        exact_e = (state.columns.T.double() - state.centre.double()) * state.scale
        valid = state.columns.isfinite().all(0)
        packed, exact_e = packed[valid], exact_e[valid]
        score = cut_sum(
            a[:, None] * packed, torch.zeros(len(a), len(packed), dtype=torch.float64), block
        )
        exact = exact_e.square().sum(1) / 2 - (exact_z[:, None] * exact_e).sum(-1)
        zeta = norm * 2.0**-21 + state.floor * d
        cross = (norm * 2.0**-10 + state.floor * d) * state.lam
        reach = exact_e.norm(dim=1)
        gamma = triton_common.GAMMA_PER_STEP * triton_small.steps(d)
        per_row = [value[:, None] for value in (norm, zeta)]
        bound = triton_common.error_bound.fn(
            *per_row, reach, state.rho, cross[:, None], state.tau, gamma
        )
        assert ((score - exact).abs() <= bound).all(), data.__name__
        assert reach.max() <= state.radius * (1 + 1e-12)


@pytest.mark.parametrize("d", [16, 256])
def test_the_band_bounds_the_error_of_gemm(d):
    for data in DATA:
        z, e = data(20, 64, d)
        state = triton_gemm.prepare(e, 32)
        exact_z = (z.double() - state.centre.double()) * state.scale
        rounded = (z - state.centre) * state.scale
        norm = rounded.double().norm(dim=1) * triton_common.SLACK
        usable = (norm < 32768) & rounded.isfinite().all(1)
        exact_z, rounded, norm = exact_z[usable], rounded[usable], norm[usable]
        zeta = (
            (rounded.double() - rounded.half().double()).norm(dim=1) * triton_common.SLACK
            + norm * 2.0**-23
            + state.floor * d
        )
        valid = state.columns.isfinite().all(0)
        packed = state.packed.transpose(0, 1).flatten(0, 1)[valid].double()
        exact_e = (state.columns.T.double() - state.centre.double())[valid] * state.scale
        half_square = state.half_square.T.flatten()[valid]
        products = rounded.half().double()[:, None] * packed
        score = (
            half_square
            - cut_sum(products, torch.zeros(products.shape[:2], dtype=torch.float64), 4).float()
        )
        exact = exact_e.square().sum(1) / 2 - (exact_z[:, None] * exact_e).sum(-1)
        gamma = triton_gemm.constants(d, {"rows": 16, "slots": 32}, False)["GAMMA"]
        bound = triton_common.error_bound.fn(
            norm[:, None], zeta[:, None], exact_e.norm(dim=1), state.rho, 0.0, state.tau, gamma
        )
        assert ((score.double() - exact).abs() <= bound).all(), data.__name__
