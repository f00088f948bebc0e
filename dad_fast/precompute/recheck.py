"""Recomputation of part of a store: on the same kind of device all bits must be equal."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from dad_fast.errors import DataError
from dad_fast.precompute.fill import StoreBuilder
from dad_fast.store import AdversarialStore, RowBlock, Store, StoreRows, TargetStore
from dad_fast.store.images import decode_image

# The only setting that may differ: other devices round differently, which the report quantifies.
DEVICE = "settings.device"


@dataclass
class Drift:
    """Differences between a store and what this machine computes.

    checked: readable records. logit: largest difference. parts: number of records that differ, by
    field. devices: both devices, when they are of different kinds.
    """

    checked: int = 0
    equal: int = 0
    logit: float = 0.0
    parts: Counter[str] = field(default_factory=Counter)
    devices: str = ""

    def __str__(self) -> str:
        text = f"{self.equal:,} of {self.checked:,} records are computed again bit for bit"
        if self.equal == self.checked:
            return text
        parts = ", ".join(f"{name} in {number:,}" for name, number in self.parts.items())
        largest = f"largest difference of a logit {self.logit:.3g}"
        return f"{text}; differing: {parts}; {largest}{self.devices}"


def recheck(filler: StoreBuilder, store: AdversarialStore | TargetStore, share: float) -> Drift:
    """Recompute a random `share` of the blocks of `store`, different ones each call, and compare.

    Raises DataError when the filler's settings differ from the store's, except the device.
    """
    differences = store.manifest.differences(filler.manifest)
    devices = [text for text in differences if text.startswith(DEVICE)]
    if len(differences) > len(devices):
        raise DataError(f"{store.folder}: made with other settings: {'; '.join(differences[:12])}")
    geometry = store.manifest.geometry
    blocks = [block for shard in range(geometry.num_shards) for block in geometry.blocks(shard)]
    numbers = sorted(random.sample(range(len(blocks)), max(1, round(share * len(blocks)))))
    chosen = [blocks[number] for number in numbers]
    drift = Drift(devices=f" ({devices[0]})" if devices else "")
    for block, item in zip(chosen, filler.feed(chosen), strict=True):
        _compare(store, block, filler.records(block, item), drift)
    return drift


def _compare(store: Store, block: RowBlock, again: StoreRows, drift: Drift) -> None:
    manifest, rows, view = store.manifest, np.arange(block.start, block.stop), block.view
    readable = store.readable(rows, view)
    computed = np.zeros(len(block), manifest.data_dtype)
    manifest.outputs_form.encode(np.where(readable[:, None], again.outputs, 0), computed)
    outputs = manifest.outputs_form.decode(computed, manifest.num_classes).astype(np.float32)
    stored = store.outputs(rows, view).astype(np.float32)

    max_differs = computed["max_logit"] != store.max_logits(rows, view)
    differs = {
        "outputs": (outputs != stored).any(1) | max_differs,
        "labels": again.labels != store.labels(rows, view),
    }
    if isinstance(store, AdversarialStore):
        if again.kept is not None:
            differs["kept"] = again.kept != store.kept(rows, view)
        if again.codes is not None:
            differs["codes"] = (again.codes != store.codes(rows, view)).any(1)
        if again.images is not None:
            images = again.images
            if isinstance(images, list):
                size, name = manifest.image_size, "an image just encoded"
                images = np.stack([decode_image(bytes(file), size, name) for file in images])
            differs["images"] = (images != store.images(rows, view)).any((1, 2, 3))

    same = readable.copy()
    for name, found in differs.items():
        same &= ~found
        if number := int((found & readable).sum()):
            drift.parts[name] += number
    drift.checked += int(readable.sum())
    drift.equal += int(same.sum())
    drift.logit = max(drift.logit, float(np.abs(outputs - stored)[readable].max(initial=0)))
