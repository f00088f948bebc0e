"""`dad-fast store`: inspect, verify, draw and merge stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dad_fast.config.options import StoreOptions
from dad_fast.data.sources.base import UNLABELLED
from dad_fast.errors import DataError, UsageError
from dad_fast.loggers.progress import count_progress
from dad_fast.store.layout import hash_keys
from dad_fast.store.reader import AdversarialStore, open_store
from dad_fast.store.state import some
from dad_fast.store.summary import describe
from dad_fast.store.verify import merge, verify


def run(given: StoreOptions) -> int:
    """Run the action `given.action` and return the exit code."""
    return {"info": _info, "verify": _verify, "sheet": _sheet, "merge": _merge}[given.action](given)


def _info(given: StoreOptions) -> int:
    for line in describe(given.folders[0]):
        print(line, flush=True)
    return 0


def _verify(given: StoreOptions) -> int:
    folder = given.folders[0]
    problems = verify(folder, count_progress("verified bytes"))
    for problem in problems:
        print(problem)
    if problems:
        plural = "s" if len(problems) > 1 else ""
        raise DataError(f"{folder}: {len(problems):,} problem{plural}, listed above")
    print(f"{folder}: every byte is as it was written")
    return 0


def _merge(given: StoreOptions) -> int:
    missing = merge(given.folders, given.output, count_progress("merged shards"))
    if missing:
        print(
            f"{given.output}: shards {some(missing)} are still missing; merge the parts that hold "
            "them, or run the command that makes them"
        )
    else:
        print(f"{given.output}: complete")
    return 0


def _sheet(given: StoreOptions) -> int:
    store = open_store(given.folders[0])
    if not isinstance(store, AdversarialStore):
        raise UsageError(
            f"{store.folder}: holds the teacher's outputs only, so there is nothing to see"
        )

    target = Path(given.output or f"{store.folder.resolve().name}-sheet.png")
    if target.suffix.lower() != ".png" or not target.absolute().parent.is_dir():
        raise UsageError(f"--output {target}: name a .png in a folder that exists")
    if given.view >= store.num_views:
        raise UsageError(f"--view {given.view}: the store has the views 0 to {store.num_views - 1}")

    manifest, view = store.manifest, given.view
    if manifest.images == "none" and not given.discretizer:
        raise UsageError(
            f"{store.folder}: holds codes and no images; name the VQGAN that made them "
            "(--discretizer)"
        )

    rows = np.unique(np.linspace(0, len(store) - 1, given.num).round().astype(np.int64))
    columns = {}
    if manifest.images != "none":
        columns["stored"] = store.images(rows, view)
    if given.discretizer:
        columns["decoded"] = _decode(store, rows, view, given.discretizer)
    if given.data_dir:
        size = next(iter(columns.values())).shape[1]
        columns = {"clean": _clean(store, rows, view, given, size), **columns}

    names = manifest.class_map.names
    captions = []
    for label, predicted, kept, changed in zip(
        store.labels(rows, view),
        store.outputs(rows, view).argmax(1),
        store.kept(rows, view),
        store.changed(rows, view),
        strict=True,
    ):
        name = "no label" if label == UNLABELLED else names[label]
        lines = [name, f"teacher: {names[predicted]}", "kept" if kept else "not kept"]
        if not np.isnan(changed):
            lines.append(f"{changed:.0%} of codes new")
        captions.append("\n".join(lines))

    from dad_fast.store.sheet import draw_sheet

    draw_sheet(target, columns, captions)
    print(target)
    return 0


def _decode(store: AdversarialStore, rows: np.ndarray, view: int, name: str) -> np.ndarray:
    """Decode the stored codes with the VQGAN `name`, which must be the one that made the store;
    uint8 [n, H, W, 3].
    """
    import torch

    from dad_fast.config.schema import PrecisionConfig
    from dad_fast.discretizers.registry import load_discretizer

    manifest = store.manifest
    if not manifest.code_bits:
        raise UsageError(f"--discretizer {name}: {store.folder} holds no codes to decode")
    discretizer = load_discretizer(name, PrecisionConfig(), torch.device("cpu"))
    if not discretizer.code_bits:
        raise UsageError(f"--discretizer {name}: has no codes; name the VQGAN that made the store")
    if discretizer.fingerprint() != manifest.hashes.get("discretizer"):
        raise DataError(
            f"--discretizer {name}: not the weights that made {store.folder} (their hash differs)"
        )

    packed = torch.from_numpy(np.ascontiguousarray(store.codes(rows, view)))
    with torch.no_grad():
        decoded = [discretizer.decode_packed(part, manifest.code_grid) for part in packed.split(8)]
    levels = (torch.cat(decoded).clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().numpy()


def _clean(
    store: AdversarialStore, rows: np.ndarray, view: int, given: StoreOptions, size: int
) -> np.ndarray:
    """Load the samples from the data with the crop that the store was made with; uint8 [n, size,
    size, 3].
    """
    from dad_fast.config.schema import DataConfig
    from dad_fast.data.augment.execute import eval_transform
    from dad_fast.data.sources.decode import DecodeError
    from dad_fast.data.sources.splits import open_split

    data = DataConfig(data_dir=given.data_dir, val_fraction=given.val_fraction)
    source = open_split(data, given.split, classes=store.manifest.class_map)
    sample_of = {key.tobytes(): sample for sample, key in enumerate(hash_keys(source.keys))}
    wanted = [sample_of.get(key.tobytes(), -1) for key in store.keys(rows, view)]
    if -1 in wanted:
        raise DataError(
            f"--data-dir {given.data_dir} --split {given.split}: lacks samples that {store.folder} holds; was "
            "it made from this data?"
        )
    crop = store.manifest.settings.get("images", {})
    images = np.zeros((len(rows), size, size, 3), np.uint8)
    for i, sample in enumerate(wanted):
        try:
            image = source.read(sample)
        except DecodeError:
            continue  # black, as in the store
        images[i] = eval_transform(
            image,
            size,
            crop.get("crop_pct", 1.0),
            crop.get("interpolation", "bicubic"),
            crop.get("squashed", False),
        )
    return images
