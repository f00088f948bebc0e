"""A small store whose content is a function of (view, row), and processes that write it."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dad_fast.errors import DadFastError
from dad_fast.store import Manifest, RowBlock, StoreRows, StoreWriter

NUM, CLASSES = 45, 5
BAD = {(0, 7), (1, 7), (0, 44)}  # unreadable (view, row)


def make_manifest(**changes: Any) -> Manifest:
    """Two views of 45 samples: 3 + 3 shards, the last of a view with a short block."""
    values: dict[str, Any] = {
        "kind": "adversarial",
        "classes": tuple((i, f"n{i}", f"class {i}") for i in range(CLASSES)),
        "source": "f" * 64,
        "settings": {"attack": {"eps": 0.1, "norm": "l2"}, "seed": 0},
        "hashes": {"teacher": "a" * 64, "discretizer": "b" * 64},
        "num_samples": NUM,
        "num_views": 2,
        "block_size": 8,
        "blocks_per_shard": 2,
        "code_bits": 9,
        "code_grid": (3, 3),
        "images": "raw",
        "image_size": (6, 4),
    }
    return Manifest(**{**values, **changes})


def make_targets(**changes: Any) -> Manifest:
    return make_manifest(
        **{
            "kind": "targets",
            "code_bits": 0,
            "code_grid": (),
            "images": "none",
            "image_size": (),
            **changes,
        }
    )


def key(row: int) -> str:
    return f"n{row % CLASSES}/picture {row} ä.JPEG"


def content(manifest: Manifest, view: int) -> dict[str, np.ndarray]:
    """Return the content of a view: arrays with `num_samples` rows."""
    rng, num = np.random.default_rng(100 + view), manifest.num_samples
    return {
        "labels": np.arange(num) % CLASSES,
        "outputs": (rng.normal(size=(num, manifest.num_classes)) * 8 + 20).astype(np.float32),
        "readable": np.array([(view, row) not in BAD for row in range(num)]),
        "kept": rng.random(num) < 0.7,
        "changed": rng.random(num).astype(np.float32) / 10,
        "codes": rng.integers(0, 256, (num, manifest.code_bytes), dtype=np.uint8),
        "images": rng.integers(0, 256, (num, *(manifest.image_size or (1, 1)), 3), dtype=np.uint8),
    }


def records(manifest: Manifest, block: RowBlock) -> StoreRows:
    part = {
        name: values[block.start : block.stop]
        for name, values in content(manifest, block.view).items()
    }
    if not manifest.code_bits:
        del part["codes"], part["changed"]
    if manifest.images == "none":
        del part["images"]
    return StoreRows(keys=[key(row) for row in range(block.start, block.stop)], **part)


def write(
    folder: str | Path,
    manifest: Manifest,
    rank: int = 0,
    world: int = 1,
    resume: bool = True,
    before_block: Callable[[RowBlock], None] | None = None,
) -> list[int]:
    """Write one process's part of the store; returns the result of `finish`."""
    writer = StoreWriter.open(folder, manifest, resume)
    for number in writer.shards_to_do(rank, world):
        with writer.shard(number) as shard:
            for block in shard.todo():
                if before_block:
                    before_block(block)
                shard.append(records(manifest, block))
    return writer.finish()


def files(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def in_child(function: Callable[[], Any]) -> int:
    """Start `function` in a forked process and return its id.

    The process exits with 0, an error's exit code, or 1.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        function()
        code = 0
    except DadFastError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def exit_code(child: int) -> int:
    """Wait for a process; returns its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
