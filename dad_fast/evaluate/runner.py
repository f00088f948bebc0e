"""Judges a model on a suite: every readable image once, scores on the device, one read at the end."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dad_fast.config.schema import DataConfig
from dad_fast.data.classes import ClassMap
from dad_fast.data.loader import EvalLoader
from dad_fast.data.mixing import to_pixels
from dad_fast.data.sources import EMBEDDED, Source, is_split, open_source
from dad_fast.errors import DataError, UsageError
from dad_fast.evaluate.corruptions import CORRUPTIONS, corrupt, num_severities
from dad_fast.evaluate.metrics import image_scores
from dad_fast.evaluate.records import Records, gather
from dad_fast.evaluate.result import Result, make_result

Corruption = tuple[str, int | None]  # name, severity; None = every severity


@dataclass(frozen=True)
class Suite:
    """What a suite's name stands for: a source, perhaps under a corruption."""

    name: str
    source: Source
    corruption: Corruption | None = None


def evaluate(
    model: Callable[[Tensor], Tensor],
    source: Source,
    *,
    img_size: int,
    crop_pct: float,
    interpolation: str,
    batch_size: int,
    workers: int,
    device: torch.device,
    name: str = "",
    corruption: Corruption | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Judge `model`: pixels float32 [B, 3, img_size, img_size] in [0, 1] on `device` -> logits [B, C].

    A module is put in eval mode meanwhile. `progress` gets (images done, images in all). Raises DataError where the model has
    fewer outputs than the source has classes, or where no image of it can be read.
    """
    loader = EvalLoader(source, img_size, crop_pct, interpolation, batch_size, workers, pin_memory=device.type == "cuda")
    if not loader.num_images:
        raise DataError(f"{source.name}: no image to judge a model on (--suite)")
    views = _views(corruption)
    tables: list[Tensor] = []
    done, num_classes = 0, 0
    was_training = isinstance(model, torch.nn.Module) and model.training
    if isinstance(model, torch.nn.Module):
        model.eval()
    try:
        with torch.no_grad():
            for batch in loader:
                pixels = to_pixels(batch.images.to(device, non_blocking=True))
                labels, keys = batch.labels.to(device, non_blocking=True), batch.samples.to(device, non_blocking=True)
                for part, view in enumerate(views):
                    logits = model(view(pixels, keys))
                    num_classes = logits.shape[1]
                    if num_classes < len(source.classes):
                        raise DataError(f"{source.name} has {len(source.classes)} classes, the model {num_classes} outputs (--suite)")
                    known = torch.stack([keys, torch.full_like(keys, part), labels], dim=1).double()  # [B, 3]
                    tables.append(torch.cat([known, image_scores(logits, labels)], dim=1))
                done += len(batch.labels)
                if progress is not None:
                    progress(done, loader.num_images)
    finally:
        if isinstance(model, torch.nn.Module):
            model.train(was_training)
    records = Records.from_table(source.fingerprint, gather(torch.cat(tables), 1))
    return make_result(name or source.name, records, num_classes, len(views), skipped=loader.skipped)


def _views(corruption: Corruption | None) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """What is judged of each image: itself, or its corrupted versions."""
    if corruption is None:
        return [lambda pixels, keys: pixels]
    name, severity = corruption
    severities = [severity] if severity is not None else range(1, num_severities(name) + 1)
    return [lambda pixels, keys, s=s: corrupt(name, pixels, s, keys) for s in severities]  # type: ignore[misc]


def open_suites(names: Sequence[str], data: DataConfig, classes: ClassMap) -> list[Suite]:
    """What the `--suite` names stand for, opened and checked against `classes`, the recorded class list of the model.

    A name is a corruption (`contrast`, `contrast:3`), a split of `data.data_dir` (a sub-folder, a pattern of shards or an embedded
    split), or the path of an image folder or of WebDataset shards. A corruption is applied to the first split or folder in the list,
    or else to `data.val_split`.

    Raises UsageError for a name that is none of these, DataError for a folder that is missing or whose classes disagree.
    """
    names = list(dict.fromkeys(names))
    plain = [name for name in names if _corruption(name) is None]
    opened: dict[str, Source] = {}

    def source(name: str) -> Source:
        if name not in opened:
            opened[name] = _open(name, data, classes)
        return opened[name]

    suites = []
    for name in names:
        corruption = _corruption(name)
        if corruption is not None:
            suites.append(Suite(name, source(plain[0] if plain else data.val_split), corruption))
        else:
            short = Path(name).name or name
            suites.append(Suite(short if sum(Path(other).name == short for other in plain) == 1 else name, source(name)))
    return suites


def _corruption(name: str) -> Corruption | None:
    """("contrast", 3) for "contrast:3"; None for a name that is no corruption's. Raises UsageError for a severity that it has not."""
    base, colon, severity = name.partition(":")
    if base not in CORRUPTIONS:
        return None
    if not colon:
        return base, None
    if severity not in map(str, range(1, num_severities(base) + 1)):
        known = "1 to 5" if num_severities(base) > 1 else "1 only"
        raise UsageError(f"--suite {name}: no severity {severity!r}; {base} has {known}, and without a number all are taken")
    return base, int(severity)


def _open(name: str, data: DataConfig, classes: ClassMap) -> Source:
    embedded = data.data_dir.startswith(EMBEDDED)
    if embedded and not is_split("", name):
        try:
            return open_source(data.data_dir, name, classes=classes)
        except UsageError as error:
            raise UsageError(f"--suite {name}: {error}{_nearest(name)}") from None
    if not embedded and is_split(data.data_dir, name):
        return open_source(data.data_dir, name, classes=classes, max_bad_share=data.max_bad_share)
    if is_split("", name):
        return open_source(name, classes=classes, max_bad_share=data.max_bad_share)
    raise DataError(f"--suite {name}: no corruption, no folder in {data.data_dir} and no other folder{_nearest(name)}")


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name.partition(":")[0], CORRUPTIONS, n=1)
    return f"; did you mean {near[0]}?" if near else f" (corruptions: {', '.join(CORRUPTIONS)})"
