"""`nearest_code` equals the fp64 search bit for bit in every back end."""

from __future__ import annotations

import resource
import sys

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dad_fast.kernels import csrc_status, nearest_code
from dad_fast.kernels.csrc import csrc
from dad_fast.kernels.nearest_code.csrc_search import search_csrc
from dad_fast.kernels.nearest_code.reference import search_reference
from dad_fast.kernels.nearest_code.torch_search import BLOCK_CPU, search_torch
from tests.codebooks import DATA, normal

INSTRUCTION_SETS = csrc().instruction_sets().split() if csrc() is not None else []
BACK_ENDS = {"torch": search_torch} | {
    f"csrc-{name}": (lambda z, e, i=i: search_csrc(z, e, i))
    for i, name in enumerate(INSTRUCTION_SETS)
}
every_back_end = pytest.mark.parametrize("search", BACK_ENDS.values(), ids=BACK_ENDS.keys())


@every_back_end
@pytest.mark.parametrize("data", DATA, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("n", "k", "d"),
    [(101, 257, 1), (101, 300, 3), (101, 2048, 4), (67, 513, 8), (37, 200, 32), (11, 100, 256)],
)
def test_equals_fp64(search, data, n: int, k: int, d: int) -> None:
    z, e = data(n, k, d)
    assert torch.equal(search(z, e), search_reference(z, e))


@every_back_end
@pytest.mark.parametrize("d", [4, 17])
@pytest.mark.parametrize("k", [1, 2, 15, 16, 17, 63, 64, 65, 511, 512, 513, 1024])
def test_sizes_of_codebook(search, k: int, d: int) -> None:
    z, e = normal(9, k, d)
    assert torch.equal(search(z, e), search_reference(z, e))


@every_back_end
def test_16384_codes_of_4_dimensions(search) -> None:
    z, e = normal(784, 16384, 4)
    rows = torch.arange(0, 784, 13)
    assert torch.equal(search(z, e)[rows], search_reference(z[rows], e))


@every_back_end
@pytest.mark.parametrize("d", [4, 32])
def test_no_rows(search, d: int) -> None:
    z, e = normal(0, 5, d)
    assert search(z, e).shape == (0,)


@every_back_end
@pytest.mark.parametrize("d", [4, 32])
def test_not_finite(search, d: int) -> None:
    z, e = normal(40, 300, d)
    z[3, 1], z[5, 0], z[7, 2] = torch.nan, torch.inf, -torch.inf
    e[0, 0], e[17, 3], e[18, 1] = torch.nan, torch.inf, -torch.inf
    codes = search(z, e)
    assert codes[[3, 5, 7]].tolist() == [0, 0, 0]
    assert not torch.isin(
        codes[[i for i in range(40) if i not in (3, 5, 7)]], torch.tensor([0, 17, 18])
    ).any()
    assert torch.equal(codes, search_reference(z, e))
    assert search(z, torch.full_like(e, torch.nan)).eq(0).all()


@every_back_end
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(search, dtype: torch.dtype) -> None:
    z, e = (tensor.to(dtype) for tensor in normal(200, 500, 4))
    assert torch.equal(search(z, e.float()), search_reference(z, e.float()))
    assert torch.equal(search(z, e), search_reference(z, e))


@every_back_end
def test_strides(search) -> None:
    z, e = normal(120, 400, 4)
    wide_z, wide_e = torch.zeros(240, 8), torch.zeros(4, 400)
    wide_z[::2, ::2], wide_e[:] = z, e.T
    assert torch.equal(search(wide_z[::2, ::2], wide_e.T), search(z, e))


@every_back_end
def test_any_number_of_threads(search) -> None:
    z, e = normal(1000, 1500, 4)
    before = torch.get_num_threads()
    try:
        codes = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            codes.append(search(z, e))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*codes)


def test_any_shape() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    @hypothesis.given(
        n=st.integers(0, 150),
        k=st.integers(1, 700),
        d=st.integers(1, 40),
        seed=st.integers(0, 99),
        data=st.sampled_from(DATA),
    )
    def check(n: int, k: int, d: int, seed: int, data) -> None:
        z, e = data(n, k, d) if data is not normal else normal(n, k, d, seed)
        first, *others = [search(z, e) for search in BACK_ENDS.values()]
        assert all(torch.equal(first, other) for other in others)
        rows = torch.arange(n)[:5]
        assert torch.equal(first[rows], search_reference(z[rows], e))

    check()


def test_images() -> None:
    generator = torch.Generator().manual_seed(0)
    z, e = torch.randn(2, 4, 5, 3, generator=generator), torch.randn(50, 4, generator=generator)
    codes = nearest_code(z, e)
    assert codes.shape == (2, 5, 3) and codes.dtype == torch.int64
    assert torch.equal(codes, nearest_code(z.contiguous(memory_format=torch.channels_last), e))
    assert codes[1, 4, 2] == (z[1, :, 4, 2] - e).square().sum(1).argmin()


@pytest.mark.parametrize("d", [4, 32])
def test_inputs_unchanged_and_same_twice(d: int) -> None:
    z, e = normal(200, 300, d)
    z[0, 0] = torch.nan
    copies = z.clone(), e.clone()
    first = [search(z, e) for search in BACK_ENDS.values()]
    again = [search(z, e) for search in BACK_ENDS.values()]
    assert torch.equal(z.nan_to_num(7), copies[0].nan_to_num(7)) and torch.equal(e, copies[1])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("d", [4, 32])
def test_operator_contract(d: int) -> None:
    z, e = normal(20, 30, d)
    torch.library.opcheck(torch.ops.dad_fast.nearest_code.default, (z, e))
    torch.library.opcheck(torch.ops.dad_fast.nearest_code.default, (z.half(), e.T.contiguous().T))


def test_compiles_as_one_graph() -> None:
    z, e = torch.randn(2, 4, 6, 5), torch.randn(30, 4)
    compiled = torch.compile(
        lambda z, e: nearest_code(2 * z, e) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(z, e), nearest_code(2 * z, e) + 1)


@pytest.mark.parametrize("d", [4, 32])
def test_autocast_and_gradients_have_no_effect(d: int) -> None:
    z, e = normal(300, 400, d)
    expected = search_reference(z, e)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_code(z, e), expected)
        assert torch.equal(search_torch(z, e), expected)
    codes = nearest_code(z.requires_grad_(), e.requires_grad_())
    assert torch.equal(codes, expected) and not codes.requires_grad


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                LargestTensor.numel = max(LargestTensor.numel, tensor.numel())
        return out


@pytest.mark.parametrize("d", [4, 32])
def test_torch_never_holds_all_distances(d: int) -> None:
    z, e = normal(1000, 2000, d)
    LargestTensor.numel = 0
    with LargestTensor():
        search_torch(z, e)
    assert LargestTensor.numel <= max(BLOCK_CPU, e.numel(), z.numel()) < len(z) * len(e)


@pytest.mark.skipif(not INSTRUCTION_SETS, reason=csrc_status())
@pytest.mark.parametrize(("n", "d"), [(20_000, 4), (4000, 64)])
def test_csrc_never_holds_all_distances(n: int, d: int) -> None:
    z, e = normal(n, 16_384, d)
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    search_csrc(z, e)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before
    assert grown < 64 << 20 < 4 * len(z) * len(e)


def test_wrong_arguments_are_refused() -> None:
    z, e = normal(3, 5, 4)
    for latents, codebook in [
        (z[0], e),
        (z, e[0]),
        (z, e[:, :3]),
        (z, e[:0]),
        (z[:, :0], e[:, :0]),
    ]:
        with pytest.raises(ValueError, match="are needed, not"):
            nearest_code(latents, codebook)
    for latents, codebook in [(z.double(), e), (z, e.long())]:
        with pytest.raises(ValueError, match="must be float32, float16 or bfloat16"):
            nearest_code(latents, codebook)


@pytest.mark.gpu
@pytest.mark.parametrize("data", DATA, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("n", "k", "d"), [(301, 2048, 4), (1, 1, 1), (101, 300, 3), (67, 200, 32), (501, 1000, 256)]
)
def test_cuda_equals_fp64(data, n: int, k: int, d: int) -> None:
    z, e = data(n, k, d)
    assert torch.equal(nearest_code(z.cuda(), e.cuda()).cpu(), search_reference(z, e))


@pytest.mark.gpu
def test_cuda_small_dimensions_are_captured_in_a_graph() -> None:
    z, e = (tensor.cuda() for tensor in normal(784, 1024, 4))
    expected = nearest_code(z, e)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        codes = nearest_code(z, e)
    codes.zero_()
    graph.replay()
    assert torch.equal(codes, expected)
