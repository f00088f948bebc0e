"""Codebook search against the authors' formula and other nearest-neighbour searches, with the share
of wrong codes.

The record's group is `nearest_code`. A code is wrong if it differs from the fp64 argmin (lowest
index on a tie). Trees and prepared searches are built before timing; the comparison's config has
the cost of building.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bench import Bench
from dad_fast.kernels import CodebookSearch
from dad_fast.kernels.nearest_code import grid_search
from dad_fast.kernels.nearest_code.search import BACK_ENDS

NUM_CODES, CODES_PER_IMAGE = 16384, 784
# Of each parameter, what size tiny keeps: a look in seconds; base has the tables and plots.
OF_TINY = (
    "normal",
    "K = 256",
    8,
    784,
)
CHUNKS = (16, 64, 256, 1024, 4096)
AUTHORS = "authors' formula"
Search = Callable[[], Tensor]


def normal(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)


def uniform(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, d, generator=generator), torch.rand(k, d, generator=generator)


def clustered(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Draw codes from 128 clusters (standard deviation 0.1, normal centres) and latents from the
    same clusters.
    """
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(128, d, generator=generator)
    z, e = (centres[torch.randint(128, (rows,), generator=generator)] for rows in (n, k))
    return z + 0.1 * torch.randn(n, d, generator=generator), e + 0.1 * torch.randn(
        k, d, generator=generator
    )


def off_centre(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    z, e = normal(n, k, d)
    return 3 + 0.3 * z, 3 + 0.3 * e


def authors(z: Tensor, e: Tensor) -> Tensor:
    """Search as taming-transformers does: expanded square, all distances at once."""
    distances = (
        z.square().sum(1, keepdim=True) + e.square().sum(1) - 2 * torch.einsum("nd,kd->nk", z, e)
    )
    return distances.argmin(1)


def chunked(z: Tensor, e: Tensor, rows: int) -> Tensor:
    half_square = e.square().sum(1) / 2
    return torch.cat(
        [torch.addmm(half_square, part, e.T, alpha=-1).argmin(1) for part in z.split(rows)]
    )


def best_chunk(z: Tensor, e: Tensor) -> int:
    """Choose the rows per chunk by timing each candidate once after a warm-up."""
    seconds = {}
    for rows in CHUNKS:
        part = z[: max(rows, 2048)]
        chunked(part, e, rows)
        start = time.perf_counter()
        chunked(part, e, rows)
        if z.is_cuda:
            torch.cuda.synchronize()
        seconds[rows] = (time.perf_counter() - start) / len(part)
    return min(seconds, key=seconds.__getitem__)


def prepared(z: Tensor, e: Tensor) -> dict[str, Search]:
    """Return every back end that runs here, by name; torch's only if there is no other."""
    found: dict[str, Search] = {}
    for name in BACK_ENDS:
        try:
            search = CodebookSearch(e, name)
        except Exception as error:
            print(f"{name}: {error}")
            continue
        if name != "torch" or not found:
            found[f"dad-fast: {name}"] = partial(search.search, z)
    return found


def installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) for package in packages)


def peers(z: Tensor, e: Tensor) -> dict[str, Search]:
    """Return the searches of other installed packages, with as many threads as torch."""
    found: dict[str, Search] = {}
    if installed("vector_quantize_pytorch"):
        from vector_quantize_pytorch import VectorQuantize

        vq = VectorQuantize(dim=e.shape[1], codebook_size=len(e)).to(z.device).eval()
        vq._codebook.embed.data.copy_(e[None])
        found["vector-quantize-pytorch"] = torch.no_grad()(lambda: vq(z[None])[1][0])
    if z.is_cuda:
        return found
    threads = torch.get_num_threads()
    rows, codes = z.numpy(), e.numpy()
    if installed("faiss"):
        import faiss

        faiss.omp_set_num_threads(threads)
        index = faiss.IndexFlatL2(e.shape[1])
        index.add(codes)
        found["faiss IndexFlatL2"] = lambda: torch.from_numpy(index.search(rows, 1)[1][:, 0])
    if e.shape[1] <= 8 and installed("scipy"):
        from scipy.spatial import cKDTree

        tree = cKDTree(codes)
        found["scipy cKDTree"] = lambda: torch.from_numpy(tree.query(rows, workers=threads)[1])
    if e.shape[1] <= 4 and installed("sklearn"):
        from sklearn.neighbors import BallTree, KDTree

        for kind in (KDTree, BallTree):
            forest = kind(codes)
            found[f"scikit-learn {kind.__name__}"] = partial(_nearest_of, forest, rows)
    return found


def _nearest_of(forest: Any, rows: Any) -> Tensor:
    return torch.from_numpy(forest.query(rows, return_distance=False)[:, 0])


def compare(
    bench: Bench,
    name: str,
    z: Tensor,
    e: Tensor,
    data: str,
    with_peers: bool = True,
    seconds: float = 10.0,
) -> dict[str, float]:
    z, e = z.to(bench.device), e.to(bench.device)
    chunk = best_chunk(z, e)
    functions = {AUTHORS: lambda: authors(z, e)} if with_peers else {}
    functions |= {"torch.cdist": lambda: torch.cdist(z, e).argmin(1)} if with_peers else {}
    functions |= (
        {f"addmm in chunks of {chunk}": lambda: chunked(z, e, chunk)}
        | (peers(z, e) if with_peers else {})
        | prepared(z, e)
    )
    exact = CodebookSearch(e, "torch").search(z[:4096])
    wrong = {
        key: float((search()[:4096] != exact).double().mean()) for key, search in functions.items()
    }
    for key, share in wrong.items():
        assert share == 0 or not key.startswith("dad-fast"), f"{key} is wrong for {share:.2%}"
    config: dict[str, object] = {
        "data": data,
        "num_latents": len(z),
        "num_codes": len(e),
        "dim": e.shape[1],
        "wrong_codes_are_of_the_first": min(4096, len(z)),
    }
    if "dad-fast: grid" in functions or "dad-fast: cuda" in functions:
        start = time.perf_counter()
        grid = grid_search.build_grid(e.cpu())
        config |= {
            "grid_build_seconds": round(time.perf_counter() - start, 2),
            "grid_bytes": grid.numel(),
        }
    # Ratios are then factors of slowdown.
    return bench.compare(
        name,
        functions,
        baseline=next(key for key in functions if key.startswith("dad-fast")),
        work=len(z),
        unit="query",
        config=config,
        notes={key: f"{share:.3%} wrong" for key, share in wrong.items()},
        graph=True,
        seconds=seconds,
    )


def images(bench: Bench) -> int:
    if bench.device.type == "cuda":
        return 64
    return 1 if bench.size == "tiny" else 8


def skip_at_tiny(bench: Bench, parameter: object) -> None:
    if bench.size == "tiny" and parameter not in OF_TINY:
        pytest.skip("not at size tiny")


@pytest.mark.parametrize("data", [normal, uniform, clustered, off_centre], ids=lambda f: f.__name__)
def test_f8(bench: Bench, data: Callable[[int, int, int], tuple[Tensor, Tensor]]) -> None:
    """VQGAN f8: 784 codes an image, 16384 codes of four dimensions."""
    skip_at_tiny(bench, data.__name__)
    z, e = data(CODES_PER_IMAGE * images(bench), NUM_CODES, 4)
    ratios = compare(bench, f"f8, {data.__name__}, {images(bench)} images", z, e, data.__name__)
    if bench.size != "tiny" and "dad-fast: grid" in ratios:
        assert ratios[AUTHORS] > 500 and ratios["torch.cdist"] > 200


@pytest.mark.parametrize("dim", [8, 32, 256])
def test_wide(bench: Bench, dim: int) -> None:
    """256: dimensions of VQGAN f16. 8: limit of trees."""
    skip_at_tiny(bench, dim)
    z, e = normal(
        CODES_PER_IMAGE * (64 if bench.device.type == "cuda" else 1 if bench.size == "tiny" else 2),
        NUM_CODES,
        dim,
    )
    ratios = compare(bench, f"{NUM_CODES} codes of {dim} dimensions", z, e, "normal")
    if bench.size != "tiny" and "dad-fast: csrc" in ratios:
        assert next(ratio for name, ratio in ratios.items() if name.startswith("addmm")) > 1


@pytest.mark.parametrize("num_codes", [16, 64, 256, 1024, 4096, 16384, 65536])
def test_codebook_size(bench: Bench, num_codes: int) -> None:
    """12544 latents, for the plot of time against K."""
    skip_at_tiny(bench, f"K = {num_codes}")
    z, e = normal(CODES_PER_IMAGE * 16, num_codes, 4)
    compare(bench, f"K = {num_codes}", z, e, "normal", with_peers=False, seconds=3)


@pytest.mark.parametrize("num_latents", [1, 49, 784, 12544, 200704])
def test_number_of_latents(bench: Bench, num_latents: int) -> None:
    """16384 codes, for the plot of time against N."""
    skip_at_tiny(bench, num_latents)
    z, e = normal(num_latents, NUM_CODES, 4)
    compare(bench, f"N = {num_latents}", z, e, "normal", with_peers=False, seconds=3)
