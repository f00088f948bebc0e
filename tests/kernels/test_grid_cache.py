"""Cache of the grid: kept, used, rebuilt if damaged, and safe with several processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dad_fast.kernels import CodebookSearch, csrc_status, nearest_code
from dad_fast.kernels.csrc import csrc
from dad_fast.kernels.nearest_code import grid_search
from tests.codebooks import grid_codes, normal

needs_csrc = pytest.mark.skipif(csrc() is None, reason=csrc_status())
pytestmark = pytest.mark.usefixtures("cache")


def cache_file(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "cache" / "codebooks").iterdir()
    return path


def other_codebook(content: bytes, tmp_path: Path) -> bytes:
    """Return a valid file of another codebook of the same shape."""
    _, e = normal(0, 600, 4, seed=9)
    path = tmp_path / "other"
    grid_search.write_grid(path, grid_search.build_grid(e))
    return path.read_bytes()


def resealed(content: bytes, change) -> bytes:
    """Return `content` damaged by `change`, with a right checksum."""
    import hashlib

    head = len(grid_search.VERSION)
    block = bytearray(content[head + 32 :])
    change(block)
    return content[:head] + hashlib.sha256(block).digest() + bytes(block)


def flipped(at: int):
    return lambda content, _: content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def poked(at: int, value: int):
    def change(block: bytearray) -> None:
        block[at] = value

    return lambda content, _: resealed(content, change)


def ids_swapped(content: bytes, _) -> bytes:
    def change(block: bytearray) -> None:
        # The codes of some rows.
        block[-1500:-1400] = block[-1400:-1300]

    return resealed(content, change)


DAMAGE = {
    "empty": lambda content, _: b"",
    "header only": lambda content, _: content[:48],
    "truncated": lambda content, _: content[:-1],
    "cut in half": lambda content, _: content[: len(content) // 2],
    "longer": lambda content, _: content + b"\0",
    "text": lambda content, _: b"not a grid at all\n" * 1000,
    "older version": lambda content, _: content.replace(b"dad-fast grid 1", b"dad-fast grid 0", 1),
    "first byte": flipped(0),
    "checksum": flipped(20),
    "a byte of the header": flipped(120),
    "a byte of the lists": flipped(100_000),
    "the last byte": lambda content, _: content[:-1] + bytes([content[-1] ^ 1]),
    "another codebook": other_codebook,
    "block: magic": poked(0, 0),
    "block: version": poked(8, 99),
    "block: bytes": poked(16, 1),
    "block: num_top": poked(24, 1),
    "block: num_leaves": poked(32, 1),
    "block: num_ids": poked(41, 255),
    "block: table_size": poked(49, 0),
    "block: K": poked(56, 99),
    "block: D": poked(64, 3),
    "block: scale": poked(91, 255),
    "block: cells": poked(104, 8),
    "block: top": poked(256, 77),
    "block: order": ids_swapped,
}


@needs_csrc
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_cache_is_built_again(damage, tmp_path: Path) -> None:
    z, e = normal(200, 600, 4)
    grid = grid_search.prepare(e)
    path = cache_file(tmp_path)
    content = path.read_bytes()
    assert grid_search.read_grid(path, e) is not None
    path.write_bytes(damage(content, tmp_path))
    assert grid_search.read_grid(path, e) is None
    assert torch.equal(grid_codes(z, grid_search.prepare(e)), grid_codes(z, grid))
    assert path.read_bytes() == content


@needs_csrc
def test_every_flipped_bit_is_detected(tmp_path: Path) -> None:
    _z, e = normal(5, 20, 2)
    grid_search.prepare(e)
    path = cache_file(tmp_path)
    content = path.read_bytes()
    for at in range(0, len(content), 61):
        path.write_bytes(flipped(at)(content, None))
        assert grid_search.read_grid(path, e) is None


@needs_csrc
def test_read_only_cache_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    z, e = normal(50, 300, 4)
    assert torch.equal(CodebookSearch(e, "grid").search(z), nearest_code(z, e))


@needs_csrc
def test_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    z, e = normal(50, 300, 4)
    CodebookSearch(e, "grid")
    monkeypatch.setattr(grid_search, "build_grid", lambda e: pytest.fail("built again"))
    assert torch.equal(CodebookSearch(e, "grid").search(z), nearest_code(z, e))


BUILD = """
import sys, torch
torch.set_num_threads(1)
from dad_fast.kernels import CodebookSearch
e = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(3):
    print(int(CodebookSearch(e, "grid").search(2 * e).sum()), flush=True)
"""


@needs_csrc
@pytest.mark.slow  # several processes build at once
def test_concurrent_builds_leave_one_whole_file(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BUILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    # All start within microseconds.
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    results = {process.communicate()[0] for process in processes}
    assert all(process.returncode == 0 for process in processes)
    e = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    assert results == {f"{int(nearest_code(2 * e, e).sum())}\n" * 3}
    # One whole file, and no temporary one.
    assert grid_search.read_grid(cache_file(tmp_path), e) is not None
