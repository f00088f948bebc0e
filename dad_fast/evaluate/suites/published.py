"""The published test sets as people have them on disk: where their class folders are, what each folder means, and what is missing.

| suite | class folders | outputs that compete |
|---|---|---|
| imagenet, imagenet-sketch, imagenet-stylized | 1000 wnids, in the folder or in its val/ (sketch/) | all |
| imagenet-v2 | 0 … 999, the class numbers | all |
| imagenet-a, imagenet-r | 200 wnids | those 200 |
| imagenet-c | CORRUPTION/SEVERITY/ and 1000 wnids, also below noise/, blur/, weather/ and digital/ | all |
| objectnet | images/ and 113 of 313 names, with mappings/ beside images/ | all; of several ids that mean a folder each is right |

A model of other classes is judged on the images of the classes that it has, which the results say.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dad_fast.config.schema import EvalConfig
from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.decode import EXTENSIONS
from dad_fast.data.sources.folder import FolderSource
from dad_fast.data.sources.names import shown, some
from dad_fast.errors import DataError
from dad_fast.evaluate.suites.base import EvalSet, Subset
from dad_fast.evaluate.suites.imagenet import (
    alexnet_errors,
    check_disjoint,
    imagenet_classes,
    join,
    objectnet_wnids,
    published,
    subset_wnids,
)

INSIDE = {  # where the class folders may be instead of in the folder that is named
    "imagenet": ("val", "validation"),
    "imagenet-v2": ("imagenetv2-matched-frequency-format-val", "ImageNetV2-matched-frequency"),
    "imagenet-a": ("imagenet-a",),
    "imagenet-r": ("imagenet-r",),
    "imagenet-sketch": ("sketch",),
    "imagenet-stylized": ("val",),
    "objectnet": ("images", "objectnet-1.0/images"),
}
LAYOUTS = (*published()["sizes"],)
GROUPS = ("", "noise", "blur", "weather", "digital", "extra")  # ImageNet-C's archives
BORDER = 2  # pixels around ObjectNet's images: a red line of one, smeared by compression
C_SIDE = 224  # of ImageNet-C's images
C_VIEWS = {"none": (1.0, "bicubic"), "resize256": (0.875, "bicubic")}
_CLASS_FOLDER = re.compile(r"n\d{8}|\d{1,4}")


@dataclass(frozen=True)
class Meaning:
    """What a test set's class folders stand for: folder -> wnids that are right for its images."""

    wnids: Mapping[str, list[str]]
    masked: bool = False  # only the set's own classes compete
    others: bool = False  # folders of other classes may lie beside


def open_layout(
    layout: str, path: str, classes: ClassMap, options: EvalConfig, max_bad_share: float
) -> EvalSet:
    """The test set `layout` in the folder `path`, for a model with the classes `classes`.

    Raises DataError where the folder is no such set or is not whole (unless `options.allow_partial`), or has no class of the model.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(
            f"--suite {layout}={path}: {'not a folder' if root.exists() else 'no such folder'}; expected {_expected(layout)}"
        )
    if layout == "imagenet-c":
        return _open_c(root, classes, options, max_bad_share)
    folder, meaning = _find(layout, root)
    chosen, note = _check(layout, folder, meaning, options.allow_partial)
    return _judged(
        layout,
        folder,
        {name: meaning.wnids[name] for name in chosen},
        meaning.masked,
        classes,
        note,
        max_bad_share,
    )


def _find(layout: str, root: Path) -> tuple[Path, Meaning]:
    """The folder that holds the class folders, and what those mean."""
    for folder in (root, *(root / name for name in INSIDE[layout])):
        meaning = _meaning(layout, folder) if folder.is_dir() else None
        if meaning is not None and set(meaning.wnids) & set(_folders(folder)):
            return folder, meaning
    there = _folders(root)
    has = f"it has {some(map(shown, there), 3)}" if there else "it has no folders"
    raise DataError(
        f"--suite {layout}={root}: none of its class folders is there ({has}); expected {_expected(layout)}"
    )


def _meaning(layout: str, folder: Path) -> Meaning | None:
    """What the class folders of `layout` would mean in `folder`; None where it cannot be that one."""
    wnids = imagenet_classes().folders
    if layout == "objectnet":
        mappings = next(
            (path for path in (folder / "mappings", folder.parent / "mappings") if path.is_dir()),
            None,
        )
        if mappings is None and folder.name != "images":
            return None
        return Meaning(objectnet_wnids(mappings or folder.parent / "mappings"), others=True)
    if layout in ("imagenet-a", "imagenet-r"):
        return Meaning({wnid: [wnid] for wnid in subset_wnids(layout[-1])}, masked=True)
    if layout == "imagenet-v2" and not set(wnids) & set(_folders(folder)):
        return Meaning({str(i): [wnid] for i, wnid in enumerate(wnids)})
    return Meaning({wnid: [wnid] for wnid in wnids})


def _expected(layout: str) -> str:
    size = published()["sizes"][layout]
    if layout == "imagenet-c":
        return "CORRUPTION/SEVERITY/WNID folders of 15 corruptions and 5 severities, 50,000 images each"
    if layout == "objectnet":
        return "images/ with a folder a class, and mappings/ beside it"
    example = {"imagenet-v2": "0 … 999"}.get(
        layout, "such as n01498041" if size["classes"] == 200 else "such as n01440764"
    )
    return f"{size['classes']:,} class folders {example} with {size['images']:,} images"


def _check(
    layout: str, folder: Path, meaning: Meaning, allow_partial: bool
) -> tuple[list[str], str]:
    """The class folders that hold images, and a note where they are not all. Counts names only, before any image is opened."""
    there = _folders(folder)
    if not meaning.others:
        check_disjoint(
            f"--suite {layout}={folder}",
            [name for name in there if _CLASS_FOLDER.fullmatch(name)],
            list(meaning.wnids),
        )
    counts = {name: _num_images(folder / name) for name in meaning.wnids if name in there}
    filled = [name for name, count in counts.items() if count]
    size, images = published()["sizes"][layout], sum(counts.values())
    if len(filled) >= len(meaning.wnids) and images >= size["images"]:
        return filled, "" if images == size[
            "images"
        ] else f"{images:,} images, published are {size['images']:,}"
    what = f"{len(filled):,} of {len(meaning.wnids):,} class folders, {images:,} of {size['images']:,} images"
    if not allow_partial:
        lacks = [name for name in meaning.wnids if name not in filled]
        such = f" (without {some(map(shown, lacks), 3)})" if lacks else ""
        raise DataError(
            f"{layout}: {what} in {folder}{such}; finish the download, or judge what is there with --allow-partial"
        )
    return filled, f"partial: {what}"


def _judged(
    layout: str,
    folder: Path,
    wnids: Mapping[str, list[str]],
    masked: bool,
    classes: ClassMap,
    note: str,
    max_bad_share: float,
) -> EvalSet:
    """The images of the class folders `wnids` for a model with the classes `classes`."""
    right, total = _outputs(layout, wnids, classes), len(wnids)
    names = [name for name in wnids if right[name]]
    listed = ClassMap(tuple((i, name, name) for i, name in enumerate(names)))
    source = FolderSource(folder, classes=listed, max_bad_share=max_bad_share, other_folders=True)
    columns = accepted = None
    labels = source.labels
    if any(len(outputs) > 1 for outputs in right.values()):
        accepted = np.zeros((len(names), len(classes)), dtype=bool)
        for i, name in enumerate(names):
            accepted[i, right[name]] = True
    else:
        output_of = np.array([right[name][0] for name in names], dtype=np.int64)
        if masked:
            columns = np.sort(output_of)
            output_of = np.searchsorted(columns, output_of)
        labels = output_of[labels]
    notes = [f"logits of the {len(names):,} classes"] * masked + [
        "any of a folder's ids is right"
    ] * (layout == "objectnet")
    if len(names) < total:
        notes.append(f"only {len(names):,} of {total:,} classes are the model's")
    notes += [note] * bool(note)
    return EvalSet(
        layout,
        (Subset(source, np.arange(len(source)), labels, BORDER if layout == "objectnet" else 0),),
        classes,
        columns,
        accepted,
        note="; ".join(notes),
    )


def _outputs(
    layout: str, wnids: Mapping[str, list[str]], classes: ClassMap
) -> dict[str, list[int]]:
    """The outputs of the model that are right for each class folder: none where the model has no such class."""
    of_imagenet = imagenet_classes()
    name_of = dict(zip(of_imagenet.folders, of_imagenet.names, strict=True))
    asked = list(dict.fromkeys(wnid for each in wnids.values() for wnid in each))
    output = dict(zip(asked, join(classes, [(wnid, name_of[wnid]) for wnid in asked]), strict=True))
    found = {
        name: [i for wnid in each if (i := output[wnid]) is not None]
        for name, each in wnids.items()
    }
    if not any(found.values()):
        have = some(map(shown, classes.folders), 3)
        raise DataError(
            f"--suite {layout}: none of the model's {len(classes):,} classes ({have}) is one of its {len(wnids):,}"
        )
    return found


def _open_c(root: Path, classes: ClassMap, options: EvalConfig, max_bad_share: float) -> EvalSet:
    places = {
        (name, s): place
        for name in _corruptions()
        for s in range(1, 6)
        if (place := _c_folder(root, name, s)) is not None
    }
    lacks = [
        f"{name}/{s}" for name in _corruptions() for s in range(1, 6) if (name, s) not in places
    ]
    if not places:
        raise DataError(
            f"--suite imagenet-c={root}: no CORRUPTION/SEVERITY folders; expected {_expected('imagenet-c')}"
        )
    if lacks and not options.allow_partial:
        what = f"{len(places)} of {len(places) + len(lacks)} CORRUPTION/SEVERITY folders in {root} (without {some(lacks, 3)})"
        raise DataError(
            f"imagenet-c: {what}; finish the download, or judge what is there with --allow-partial"
        )
    meaning = Meaning({wnid: [wnid] for wnid in imagenet_classes().folders})
    pieces: list[Subset] = []
    notes = [f"without {some(lacks, 3)}"] * bool(lacks)
    for folder in places.values():
        chosen, note = _check("imagenet-c", folder, meaning, options.allow_partial)
        one = _judged(
            "imagenet-c",
            folder,
            {name: meaning.wnids[name] for name in chosen},
            False,
            classes,
            note,
            max_bad_share,
        )
        pieces += one.pieces
        notes += [one.note] * (one.note not in ("", *notes))
    view = C_VIEWS[options.c_preprocessing]
    return EvalSet(
        "imagenet-c",
        tuple(pieces),
        classes,
        parts=tuple(places),
        view=view,
        note="; ".join(notes[:2]),
    )


def _corruptions() -> list[str]:
    return list(alexnet_errors())


def _c_folder(root: Path, name: str, severity: int) -> Path | None:
    return next(
        (path for group in GROUPS if (path := root / group / name / str(severity)).is_dir()), None
    )


def _folders(folder: Path) -> list[str]:
    return sorted(item.name for item in _listed(folder) if item.is_dir())


def _num_images(folder: Path) -> int:
    return sum(item.name.lower().endswith(EXTENSIONS) for item in _listed(folder))


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, without what is hidden."""
    try:
        with os.scandir(folder) as listing:
            return [item for item in listing if not item.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error.strerror} (--suite)") from error
