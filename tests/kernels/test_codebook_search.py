"""CodebookSearch and its grid: every back end available here equals the fp64 search."""

from __future__ import annotations

import copy
import logging
import math
import pickle
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from dad_fast.errors import EnvironmentProblem, UsageError
from dad_fast.kernels import CodebookSearch, csrc_status, nearest_code
from dad_fast.kernels.csrc import csrc, csrc_cuda, csrc_cuda_status
from dad_fast.kernels.nearest_code import csrc_search, grid_search, torch_search
from dad_fast.kernels.nearest_code import search as search_module
from dad_fast.kernels.nearest_code.reference import search_reference
from dad_fast.kernels.nearest_code.torch_search import search_torch
from tests.codebooks import DATA, clustered, grid_codes, midway, normal

INSTRUCTION_SETS = csrc().instruction_sets().split() if csrc() is not None else []
needs_csrc = pytest.mark.skipif(not INSTRUCTION_SETS, reason=csrc_status())
BACK_ENDS = ["torch", *(["grid", "csrc"] if INSTRUCTION_SETS else [])]
every_back_end = pytest.mark.parametrize("backend", BACK_ENDS)


pytestmark = pytest.mark.usefixtures("cache")


@needs_csrc
@pytest.mark.parametrize("data", DATA, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("n", "k", "d"),
    [(101, 300, 1), (101, 700, 2), (101, 300, 3), (101, 600, 4), (33, 1, 4), (33, 7, 3)],
)
def test_grid_equals_fp64(data, n: int, k: int, d: int) -> None:
    z, e = data(n, k, d)
    grid = grid_search.build_grid(e)
    expected = search_reference(z, e)
    for i in range(len(INSTRUCTION_SETS)):
        assert torch.equal(grid_codes(z, grid, i), expected)
    assert torch.equal(grid_codes(e, grid), search_torch(e, e))


@needs_csrc
def test_grid_of_any_codebook_is_exact() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    @hypothesis.given(
        k=st.integers(1, 400),
        d=st.integers(1, 4),
        seed=st.integers(0, 10**6),
        log_scale=st.integers(-44, 37),
        offset=st.sampled_from([0.0, 1.0, 3.0, 1000.0]),
        levels=st.sampled_from([0, 2, 7]),
    )
    def check(k: int, d: int, seed: int, log_scale: int, offset: float, levels: int) -> None:
        z, e = normal(200, k, d, seed)
        if levels:
            # Points of a lattice: ties, duplicates, flat sides.
            z, e = (z * levels).round() / 2, (e * levels).round()
        z[::5] *= 100
        scale = 10.0**log_scale
        z, e = ((tensor.double() + offset) * scale for tensor in (z, e))
        z, e = (tensor.clamp(-3e38, 3e38).float() for tensor in (z, e))
        assert torch.equal(grid_codes(z, grid_search.build_grid(e)), search_torch(z, e))

    check()


@needs_csrc
@pytest.mark.parametrize("d", [1, 2, 3, 4])
def test_latents_on_borders_of_cells(d: int) -> None:
    """Latents on the border of two cells, and the adjacent fp32 numbers on either side."""
    _, e = normal(0, 2000, d)
    grid = grid_search.build_grid(e)
    lo, inverse = grid[72:88].view(torch.float32)[:d], grid[88:104].view(torch.float32)[:d]
    fine = grid[104:120].view(torch.int32)[:d]
    generator = torch.Generator().manual_seed(0)
    cells = (torch.rand(600, d, generator=generator) * (fine + 1)).floor()
    borders = lo + cells / inverse
    z = torch.cat([borders, borders.nextafter(borders + 1), borders.nextafter(borders - 1)])
    assert torch.equal(grid_codes(z, grid), search_torch(z, e))


@needs_csrc
def test_16384_codes_of_4_dimensions() -> None:
    z, e = normal(3000, 16384, 4)
    assert torch.equal(CodebookSearch(e, "grid").search(z), nearest_code(z, e))


@needs_csrc
@pytest.mark.parametrize("flush", [False, True])
def test_subnormals(flush: bool) -> None:
    """Also if the caller makes torch flush them to zero."""
    z, e = (1e-41 * tensor for tensor in normal(200, 300, 4))
    expected = search_torch(z, e)
    if not torch.set_flush_denormal(flush):
        pytest.skip("this processor cannot")
    try:
        codes = CodebookSearch(e, "grid").search(z), CodebookSearch(e, "csrc").search(z)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(codes[0], expected) and torch.equal(codes[1], expected)


@every_back_end
def test_not_finite(backend: str) -> None:
    z, e = normal(5000, 300, 4)
    z[3, 1], z[5, 0], z[4000, 2] = torch.nan, torch.inf, -torch.inf
    e[0, 0], e[17, 3] = torch.nan, torch.inf
    search = CodebookSearch(e, backend)
    codes = search.search(z)
    assert codes[[3, 5, 4000]].tolist() == [0, 0, 0] and torch.equal(codes, nearest_code(z, e))
    assert search.num_nonfinite.dtype == torch.int64 and search.num_nonfinite.item() == 3
    search.search_and_quantize(z[:10])
    assert search.num_nonfinite.item() == 5


@every_back_end
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_images_and_quantized(backend: str, dtype: torch.dtype) -> None:
    z, e = torch.randn(2, 4, 5, 3).to(dtype), torch.randn(500, 4).to(dtype)
    search = CodebookSearch(e, backend)
    codes, quantized = search.search_and_quantize(z)
    assert codes.shape == (2, 5, 3)
    assert quantized.shape == z.shape and quantized.dtype == torch.float32
    assert torch.equal(codes, nearest_code(z, e)) and torch.equal(codes, search.search(z))
    assert torch.equal(quantized, e.float()[codes].permute(0, 3, 1, 2))
    flat = z.permute(0, 2, 3, 1).reshape(-1, 4)
    assert torch.equal(search.search(flat), codes.flatten())
    assert torch.equal(search.search_and_quantize(flat)[1], e.float()[codes.flatten()])
    assert search.search(z[:0]).shape == (0, 5, 3)


@every_back_end
def test_operator_contract(backend: str) -> None:
    z, e = normal(40, 300, 4)
    search = CodebookSearch(e, backend)
    for op in (torch.ops.dad_fast.codebook_search, torch.ops.dad_fast.codebook_search_and_quantize):
        torch.library.opcheck(op.default, (z, search.num_nonfinite, search._handle))


@every_back_end
def test_compiles_as_one_graph(backend: str) -> None:
    z, e = torch.randn(2, 4, 6, 5), torch.randn(300, 4)
    z[0, 0, 0, 0] = torch.nan
    search = CodebookSearch(e, backend)
    compiled = torch.compile(
        lambda z: search.search_and_quantize(2 * z), fullgraph=True, backend="aot_eager"
    )
    codes, quantized = compiled(z)
    assert torch.equal(codes, nearest_code(2 * z, e)) and torch.equal(
        quantized, e[codes].permute(0, 3, 1, 2)
    )
    assert search.num_nonfinite.item() == 1


@every_back_end
def test_autocast_and_gradients_have_no_effect(backend: str) -> None:
    z, e = clustered(300, 400, 4)
    search = CodebookSearch(e.requires_grad_(), backend)
    with torch.autocast("cpu", torch.bfloat16):
        codes, quantized = search.search_and_quantize(z.requires_grad_())
    assert torch.equal(codes, search_reference(z, e)) and not quantized.requires_grad


@every_back_end
def test_later_changes_of_the_codebook_have_no_effect(backend: str) -> None:
    z, e = normal(50, 300, 4)
    expected = nearest_code(z, e)
    search = CodebookSearch(e, backend)
    e.zero_()
    assert torch.equal(search.search(z), expected)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda search: pickle.loads(pickle.dumps(search))]
)
def test_copies_give_the_same_codes(copied) -> None:
    z, e = normal(50, 300, 4)
    search = CodebookSearch(e)
    other = copied(search)
    del search
    assert torch.equal(other.search(z), nearest_code(z, e))
    assert other.backend == CodebookSearch(e).backend


def refuses(latents, codebook, codes, num_nonfinite):
    raise RuntimeError("no kernel image is available\nfor execution on the device")


def writes_nothing(latents, codebook, codes, num_nonfinite): ...


def ignores_ties(latents, codebook, codes, num_nonfinite):
    torch_search.search(latents, codebook, codes, num_nonfinite)
    codes[3] += 1


def counts_nothing(latents, codebook, codes, num_nonfinite):
    torch_search.search(latents, codebook, codes, num_nonfinite.clone())


@pytest.mark.parametrize(
    ("search", "reason"),
    [
        (refuses, r"it fails here \(no kernel image is available for execution on the device\)"),
        (writes_nothing, "it gives 32 wrong codes of 32 here"),
        (ignores_ties, "it gives 1 wrong codes of 32 here"),
        (counts_nothing, "it counts latents that are not finite wrongly here"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize(("k", "d"), [(200, 4), (3, 20)])
def test_a_back_end_that_fails_here_is_replaced(monkeypatch, caplog, search, reason, k, d) -> None:
    planted = SimpleNamespace(available=lambda *_: "", prepare=lambda e: e, search=search)
    monkeypatch.setitem(sys.modules, "dad_fast.kernels.nearest_code.planted", planted)
    back_ends = {"planted": ("planted",), **search_module.BACK_ENDS}
    monkeypatch.setattr(search_module, "BACK_ENDS", back_ends)
    monkeypatch.setattr(search_module, "_logged", set())
    z, e = normal(50, k, d)
    for _ in range(2):
        found = CodebookSearch(e)
        assert found.backend in BACK_ENDS and found.num_nonfinite == 0
        assert torch.equal(found.search(z), search_torch(z, e))
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert re.fullmatch(f"codebook search: not planted: {reason}", line)
    with pytest.raises(EnvironmentProblem, match=f"planted was asked for, but {reason}"):
        CodebookSearch(e, backend="planted")
    assert re.fullmatch(reason, search_module.problem("planted", "cpu"))
    assert search_module.problem("torch", "cpu") == ""


def test_auto_chooses_and_logs_the_back_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    _, e = normal(0, 333, 4)
    small, wide = CodebookSearch(e[:5]), CodebookSearch(torch.randn(300, 5))
    first, second = CodebookSearch(e), CodebookSearch(e)
    lines = [record.getMessage() for record in caplog.records if "333" in record.getMessage()]
    assert lines == [f"codebook search: {first.backend} for 333 codes of 4 dimensions on cpu"]
    if INSTRUCTION_SETS:
        assert first.backend == second.backend == "grid"
        assert small.backend == wide.backend == "csrc"
        # A grid needs a finite code.
        assert CodebookSearch(torch.full((300, 4), math.nan)).backend == "csrc"


def test_unavailable_back_ends_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, e = normal(0, 300, 4)
    with pytest.raises(UsageError, match="choose one of auto, grid, csrc, cuda, triton, torch"):
        CodebookSearch(e, "fast")
    with pytest.raises(
        EnvironmentProblem,
        match="the back end grid was asked for, but .*at most 4 dimensions, not 5",
    ):
        CodebookSearch(torch.randn(10, 5), "grid")
    with pytest.raises(EnvironmentProblem, match="at most 65536 codes, not 65537"):
        CodebookSearch(torch.randn(65537, 1), "grid")
    with pytest.raises(
        EnvironmentProblem,
        match="the back end cuda was asked for, but it needs a CUDA device, not cpu",
    ):
        CodebookSearch(e, "cuda")
    for module in (grid_search, csrc_search):
        monkeypatch.setattr(module, "csrc", lambda: None)
    for name in ("grid", "csrc"):
        with pytest.raises(
            EnvironmentProblem, match=f"the back end {name} was asked for, but csrc is "
        ):
            CodebookSearch(e, name)
    assert CodebookSearch(e).backend == "torch"
    for wrong in (e[0], e[:0], e.double(), e.long()):
        with pytest.raises(ValueError, match="a codebook"):
            CodebookSearch(wrong)
    search = CodebookSearch(e)
    for wrong in (e[:, :3], e[0], e.double()):
        with pytest.raises(ValueError, match="latents"):
            search.search(wrong)


@needs_csrc
def test_searches_from_several_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    z, e = midway(4000, 2000, 4)
    search = CodebookSearch(e, "grid")
    expected = nearest_code(z, e)
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda _: search.search(z), range(20))
        assert all(torch.equal(codes, expected) for codes in results)


@needs_csrc
def test_grid_does_not_depend_on_the_number_of_threads() -> None:
    _, e = normal(0, 1500, 4)
    before = torch.get_num_threads()
    try:
        grids = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            grids.append(grid_search.build_grid(e))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*grids)


# On a GPU


@pytest.fixture(params=["cuda", "triton", "torch"])
def device_back_end(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and csrc_cuda() is None:
        pytest.skip(csrc_cuda_status())
    return request.param


@pytest.mark.gpu
@pytest.mark.parametrize("data", DATA, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("n", "k", "d"), [(301, 2048, 4), (1, 130, 1), (101, 300, 3), (101, 300, 2)]
)
def test_cuda_equals_fp64(device_back_end: str, data, n: int, k: int, d: int) -> None:
    z, e = data(n, k, d)
    codes, quantized = CodebookSearch(e.cuda(), device_back_end).search_and_quantize(z.cuda())
    expected = search_reference(z, e)
    assert torch.equal(codes.cpu(), expected) and torch.equal(quantized.cpu(), e[expected])


@pytest.mark.gpu
def test_cuda_graph_and_counter(device_back_end: str) -> None:
    z, e = (tensor.cuda() for tensor in normal(5000, 1024, 4))
    z[7] = torch.nan
    search = CodebookSearch(e, device_back_end)
    expected = search.search(z)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        codes = search.search(z)
    z.copy_(z.flip(0))
    before = search.num_nonfinite.item()
    graph.replay()
    assert torch.equal(codes, expected.flip(0)) and search.num_nonfinite.item() == before + 1
