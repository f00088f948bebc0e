"""Summary of a store as text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dad_fast.store.layout import INDEX, KEPT, READABLE, shard_file
from dad_fast.store.manifest import Manifest
from dad_fast.store.state import file_sizes, finished_shards, missing_shards, some

BAR = 40
BINS = 10


def describe(folder: str | Path) -> Iterator[str]:
    """Yield the lines; reads the whole index. Raises DataError when the folder is no store."""
    folder = Path(folder)
    manifest = Manifest.load(folder)
    geometry = manifest.geometry
    missing = missing_shards(folder, manifest)
    state = "complete" if manifest.complete else "not finished"
    if missing:
        state = f"shards {some(missing)} of {geometry.num_shards:,} missing"
    yield f"{folder}: {manifest.kind} store, {state}"

    index = _read_index(folder, manifest)
    readable = index["flags"] & READABLE != 0
    views = _count(manifest.num_views, "view")
    yield _line("samples", f"{manifest.num_samples:,} in {views}, {manifest.num_classes:,} classes")
    if num_bad := int((~readable).sum()):
        yield _line("unreadable", f"{num_bad:,} of {len(index):,}, stored without outputs")
    blocks = min(manifest.blocks_per_shard, -(-manifest.num_samples // manifest.block_size))
    yield _line(
        "shards",
        f"{geometry.num_shards:,} of {_count(blocks, 'block')} of {manifest.block_size:,} samples",
    )
    if manifest.code_bits:
        grid = "x".join(map(str, manifest.code_grid))
        yield _line(
            "codes", f"{grid} of {manifest.code_bits} bits, {manifest.code_bytes:,} B an image"
        )
    yield _line("outputs", _outputs(manifest))
    if manifest.images != "none":
        stored = int(index["image_bytes"].sum()) / max(1, int(readable.sum()))
        size = "x".join(map(str, manifest.image_size))
        yield _line("images", f"{manifest.images}, {size} pixels, {stored:,.0f} B an image")
    total = sum(max(0, size) for size in file_sizes(folder).values())
    yield _line(
        "on disk", f"{_bytes(total)}, {total / max(1, len(index)):,.0f} B a sample and view"
    )

    if manifest.kind == "adversarial" and readable.any():
        kept = (index["flags"] & KEPT != 0)[readable]
        by_view = _by_view(index["view"][readable], kept, manifest.num_views)
        yield _line("kept", f"{kept.mean():.1%} by the teacher{by_view}")
        changed = index["changed"][readable]
        if not np.isnan(changed).all():
            yield _line("codes changed", f"{np.nanmean(changed):.1%} of an image's on average")
            yield from _histogram(changed[~np.isnan(changed)])

    yield "made by"
    hashes = {**manifest.hashes, "source": manifest.source}
    values = _flat({"settings": manifest.settings, "hash": hashes})
    for name, value in sorted(values.items()):
        yield f"  {name} = {value}"
    yield _line("checksum", manifest.checksum)


def _read_index(folder: Path, manifest: Manifest) -> np.ndarray:
    """Read the INDEX records of all finished shards."""
    parts = [
        np.fromfile(folder / shard_file(shard, "index"), INDEX)
        for shard in finished_shards(folder, manifest)
    ]
    return np.concatenate(parts) if parts else np.empty(0, INDEX)


def _outputs(manifest: Manifest) -> str:
    num_bytes = manifest.data_dtype.itemsize - manifest.code_bytes
    form = manifest.outputs_form
    if not form.k:
        return f"full, {num_bytes:,} B (16-bit logits of {manifest.num_classes:,} classes)"
    mass = f"the others' mass at temperature {form.temperature:g}"
    return f"the {form.k} largest of {manifest.num_classes:,}, and {mass}, {num_bytes:,} B"


def _by_view(views: np.ndarray, kept: np.ndarray, num_views: int) -> str:
    if num_views == 1:
        return ""
    shares = [kept[views == view].mean() for view in range(num_views) if (views == view).any()]
    return f", {min(shares):.1%} to {max(shares):.1%} by view"


def _histogram(values: np.ndarray) -> Iterator[str]:
    """Draw ten bins from 0 to a round share that holds 99.9 % of the values.

    The last bin also holds the larger values.
    """
    needed = np.quantile(values, 0.999)
    top = next((limit for limit in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if limit >= needed), 1.0)
    counts, _ = np.histogram(np.minimum(values, top), bins=BINS, range=(0, top))
    digits = 1 if top <= 0.05 else 0
    for i, count in enumerate(counts):
        low, high = (f"{100 * top * edge / BINS:.{digits}f}" for edge in (i, i + 1))
        upper = f"{high} % and more" if i == BINS - 1 and top < 1 else f"{high} %"
        bar = "#" * round(BAR * count / counts.max())
        yield f"  {low:>5} – {upper:<16} {count / len(values):>6.1%}  {bar}".rstrip()


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {
            key: item
            for part in value
            for key, item in _flat(value[part], f"{name}.{part}" if name else part).items()
        }
    return {name: value}


def _line(name: str, text: str) -> str:
    return f"  {name:<14} {text}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _bytes(number: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number} B"
