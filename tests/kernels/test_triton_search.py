"""Triton back ends of the search equal the fp64 search, interpreted or (-m gpu) on a GPU."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")


from dad_fast.kernels import CodebookSearch
from dad_fast.kernels.nearest_code import triton_common, triton_gemm, triton_small
from dad_fast.kernels.nearest_code.reference import search_reference
from dad_fast.kernels.nearest_code.torch_search import search_torch
from tests.codebooks import (
    DATA,
    clustered,
    duplicated,
    far_away,
    huge,
    integers,
    midway,
    mixed_scales,
    normal,
    outside,
    sphere,
    tiny,
)
from tests.interpreter import run_interpreted

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_device = pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu
META = {"rows": 16, "num_warps": 4, "num_stages": 2}
SLOTS = 32
every_back_end = pytest.mark.parametrize(
    "module", [triton_small, triton_gemm], ids=["small", "gemm"]
)


def test_search_under_the_interpreter():
    run_interpreted(__file__)


class Search:
    """Search with its outputs. num_settled: rows that were settled in fp64."""

    def __init__(self, module, z, e, slots=SLOTS, meta=META):
        z, e = z.to(DEVICE), e.contiguous().to(DEVICE)
        state = module.prepare(e, slots)
        self.codes = torch.full((len(z),), -7, dtype=torch.int64, device=DEVICE)
        self.quantized = torch.full_like(z, 7.0)
        self.num_nonfinite = torch.full((1,), 100, dtype=torch.int64, device=DEVICE)
        self.num_settled = 0
        settle, module.settle = module.settle, self._count(module.settle)
        try:
            module.search(
                z.contiguous(), state, self.codes, self.num_nonfinite, self.quantized, meta
            )
        finally:
            module.settle = settle

    def _count(self, settle):
        def counting(latents, state, codes, quantized, num_work, *rest):
            settle(latents, state, codes, quantized, num_work, *rest)
            self.num_settled = int(num_work)

        return counting


def check(module, z, e, **options):
    found = Search(module, z, e, **options)
    expected = search_reference(z, e)
    assert torch.equal(found.codes.cpu(), expected)
    assert torch.equal(found.quantized.cpu().view(torch.int32), e[expected].view(torch.int32))
    return found


def rows_for(data, d):
    """Return the number of rows: few if the interpreter settles most, at about ten per second."""
    if not INTERPRETED:
        return 501
    if data in (clustered, mixed_scales, tiny, outside):
        return 1 if d > 8 else 2
    if data in (integers, far_away, huge, sphere, midway):
        return 5
    return 19 if d <= 8 else 5


def cases(on_a_gpu, interpreted, interpreted_for_some):
    """Parametrize by every kind of data and every (codes, dimensions).

    Under the interpreter: few codes (a few strips and a rest), and the last sizes for two kinds of
    data only.
    """
    every = [(data, *size) for size in (interpreted if INTERPRETED else on_a_gpu) for data in DATA]
    some = (normal, outside) if INTERPRETED else ()
    every += [(data, *size) for size in interpreted_for_some for data in some]
    return pytest.mark.parametrize(
        ("data", "k", "d"), every, ids=lambda x: getattr(x, "__name__", str(x))
    )


@on_device
@cases([(257, 1), (300, 3), (700, 4), (100, 8)], [(196, 4)], [(97, 1), (100, 3), (67, 8)])
def test_small_equals_fp64(data, k, d):
    check(triton_small, *data(rows_for(data, d), k, d))


@on_device
@cases([(300, 3), (100, 8), (500, 32), (90, 64)], [(67, 8)], [(100, 3), (130, 32), (70, 64)])
def test_gemm_equals_fp64(data, k, d):
    check(triton_gemm, *data(rows_for(data, d), k, d))


@on_device
@pytest.mark.parametrize("data", [normal, duplicated, far_away, huge], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("k", "d"), [(70, 256), (40, 300)])
def test_gemm_of_many_dimensions(data, k, d):
    check(triton_gemm, *data(rows_for(data, d), k, d))


@on_device
@every_back_end
@pytest.mark.parametrize("k", [1, 2, 31, 32, 33, 64, 65, 1025])
def test_sizes_of_codebook(module, k):
    check(module, *normal(9, k, 4))


@on_device
def test_16384_codes_of_4_dimensions():
    """Codebook size of the paper, with the table's meta-parameters: few rows are settled."""
    found = check(
        triton_small, *normal(40 if INTERPRETED else 150, 16384, 4), slots=None, meta=None
    )
    assert found.num_settled <= 8


@on_device
@pytest.mark.parametrize("d", [32, 256])
def test_gemm_with_the_meta_parameters_of_the_table(d):
    found = check(triton_gemm, *normal(130 if d == 32 else 5, 512, d), slots=None, meta=None)
    assert found.num_settled <= 20


@on_device
@every_back_end
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 100])
def test_numbers_of_rows(module, n):
    check(module, *normal(n, 100, 4))


@on_device
@every_back_end
def test_few_normal_latents_are_settled(module):
    n, limit = (25, 2) if INTERPRETED else (100, 5)
    limit *= 1 if module is triton_small else 4
    assert Search(module, *normal(n, 1024, 4)).num_settled <= limit


@on_device
@every_back_end
def test_latents_far_from_every_code(module):
    z, e = normal(4, 100, 4)
    z[::2] *= 1e4
    z[1] *= 1e35
    assert check(module, z, e).num_settled >= 3


@on_device
@every_back_end
def test_ties_within_and_across_strips(module):
    """Strips hold four consecutive codes; ties across strips are at equal and other positions."""
    z, e = normal(6, 128, 4)
    e[5], e[6] = z[0] + 0.25, z[0] - 0.25
    e[40], e[44] = z[1] - 0.25, z[1] + 0.25
    e[80], e[90], e[100] = z[2] + 0.25, z[2] - 0.25, z[2] + torch.tensor([0.25, -0.25, 0.25, 0.25])
    e = (e * 64).round() / 64
    z = (z * 64).round() / 64
    assert check(module, z, e).num_settled >= 3


@on_device
@every_back_end
def test_not_finite(module):
    z, e = normal(20, 50, 4)
    z[3, 1] = z[19] = torch.nan
    z[5, 0], z[7, 2] = torch.inf, -torch.inf
    e[0, 0] = torch.nan
    e[17, 3] = torch.inf
    e[18, 1] = e[49] = -torch.inf
    found = Search(module, z, e)
    assert torch.equal(found.codes.cpu(), search_reference(z, e))
    assert found.codes[[3, 5, 7, 19]].tolist() == [0] * 4
    assert found.num_nonfinite.item() == 104
    assert Search(module, z[:2], torch.full_like(e, torch.nan)).codes.eq(0).all()


@on_device
@every_back_end
def test_inputs_unchanged_and_same_twice(module):
    z, e = (tensor.to(DEVICE) for tensor in normal(20, 100, 4))
    before = z.clone(), e.clone()
    first, again = Search(module, z, e), Search(module, z, e)
    assert torch.equal(first.codes, again.codes) and torch.equal(first.quantized, again.quantized)
    assert torch.equal(z, before[0]) and torch.equal(e, before[1])


@on_device
@pytest.mark.parametrize("d", [4, 32])
def test_codebook_search_by_triton(d):
    """Images in 16 bits and with odd strides, z_q, the counter, the operators, compilation."""
    _, e = normal(1, 70, d)
    search = CodebookSearch(e.to(DEVICE), "triton")
    assert search.backend == "triton"
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, d, 1, 3, generator=generator).to(DEVICE)
    images[1, 0, 0, 2] = torch.nan
    for latents in (images, images.contiguous(memory_format=torch.channels_last), images.half()):
        before = search.num_nonfinite.item()
        codes, quantized = search.search_and_quantize(latents)
        rows = latents.permute(0, 2, 3, 1).reshape(-1, d).cpu().float()
        expected = search_reference(rows, e).view(2, 1, 3)
        assert torch.equal(codes.cpu(), expected)
        assert torch.equal(search.search(latents).cpu(), expected)
        assert torch.equal(quantized.cpu(), e[expected].permute(0, 3, 1, 2))
        assert search.num_nonfinite.item() == before + 2
    compiled = torch.compile(lambda z: search.search(2 * z), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images), search.search(2 * images))
    flat = torch.randn(5, d, device=DEVICE)
    torch.library.opcheck(
        torch.ops.dad_fast.codebook_search.default, (flat, search.num_nonfinite, search._handle)
    )


def dot_with_errors(size):
    """Return a dot product for the interpreter with an error of `size` times the bound."""
    import numpy as np
    from triton.runtime.interpreter import TensorHandle

    generator = np.random.default_rng(0)

    def create_dot(self, a, b, accumulator, *rest):
        a, b = a.data.astype(np.float64), b.data.astype(np.float64)
        magnitude = np.abs(a) @ np.where(np.isfinite(b), np.abs(b), 0)
        bound = size * triton_common.GAMMA_PER_STEP * a.shape[1] / 16 * magnitude
        error = bound * generator.choice([-1.0, 1.0], magnitude.shape)
        result = (a @ b + accumulator.data + error).astype(np.float32)
        return TensorHandle(result, accumulator.dtype.scalar)

    return create_dot


@pytest.mark.interpreter
@every_back_end
@pytest.mark.parametrize("separation", [1e-2, 1e-4])
def test_codes_survive_the_worst_rounding(module, separation, monkeypatch):
    """Uses pairs of codes near the resolution of fp16 terms, which a larger error would confuse."""
    from triton.runtime.interpreter import InterpreterBuilder

    z, e = normal(20, 256, 4)
    e = e[torch.arange(256) % 128] + separation * e.flip(0)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot_with_errors(1.0))
    found = check(module, z, e)
    assert module is triton_gemm or found.num_settled < 20 or separation < 1e-3
    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot_with_errors(1e5))
    assert not torch.equal(Search(module, z, e).codes, search_reference(z, e))


def test_codes_that_cannot_win():
    e = torch.tensor(
        [
            [1.0, 0.0],
            [1.0, -0.0],
            [torch.nan, 0.0],
            [2.0, 0.0],
            [1.0, 0.0],
            [torch.inf, 1.0],
            [0.0, 0.0],
        ]
    )
    assert triton_common.can_win(e).tolist() == [True, False, False, True, False, False, True]


def test_available_returns_the_reason():
    cpu = torch.device("cpu")
    assert "at most 8 dimensions" in triton_small.available(cpu, 100, 9)
    assert "32-bit" in triton_gemm.available(cpu, 1 << 24, 256)
    if not INTERPRETED:
        assert "needs a CUDA device" in triton_small.available(cpu, 100, 4)
        assert "needs a CUDA device" in triton_gemm.available(cpu, 100, 4)


@pytest.mark.gpu
@every_back_end
@pytest.mark.parametrize("d", [4, 8, 32, 256])
def test_a_million_queries_on_a_gpu(module, d):
    if module is triton_small and d > 8:
        pytest.skip("not for this back end")
    z, e = torch.randn(1_000_000, d, device="cuda"), torch.randn(16384, d, device="cuda")
    found = Search(module, z, e, slots=None, meta=None)
    for first in range(0, len(z), 1 << 16):
        block = slice(first, first + (1 << 16))
        assert torch.equal(found.codes[block], search_torch(z[block], e))
    assert torch.equal(found.quantized, e[found.codes])
    assert found.num_settled <= 0.1 * len(z)


@pytest.mark.gpu
@every_back_end
def test_captured_in_a_graph_on_a_gpu(module):
    z, e = torch.randn(5000, 4, device="cuda"), torch.randn(1024, 4, device="cuda")
    state, counter = module.prepare(e), torch.zeros(1, dtype=torch.int64, device="cuda")
    codes, quantized = torch.empty(5000, dtype=torch.int64, device="cuda"), torch.empty_like(z)
    module.search(z, state, codes, counter, quantized)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        module.search(z, state, codes, counter, quantized)
    for _ in range(3):
        z.copy_(torch.randn_like(z))
        z[7] = torch.nan
        before = counter.clone()
        graph.replay()
        assert torch.equal(codes, search_torch(z, e)) and torch.equal(quantized, e[codes])
        assert counter.item() == before.item() + 1


@pytest.mark.gpu
@every_back_end
def test_every_candidate_of_the_tuning_tool_is_exact_on_a_gpu(module):
    z, e = torch.randn(3000, 4, device="cuda"), torch.randn(2048, 4, device="cuda")
    expected = search_torch(z, e)
    for case in module.tuning_cases():
        for meta in case.candidates:
            found = Search(module, z, e, slots=meta.get("slots", 128), meta=meta)
            assert torch.equal(found.codes, expected), meta
