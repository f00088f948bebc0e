"""Published test sets as they are distributed: class folders, their meaning, missing images.

| suite | class folders | outputs that compete |
|---|---|---|
| imagenet, -sketch, -stylized | 1000 wnids, in the folder or in its val/ (sketch/) | all |
| imagenet-v2 | 0 … 999, the class numbers | all |
| imagenet-a, imagenet-r | 200 wnids | those 200 |
| imagenet-c | CORRUPTION/SEVERITY/ and 1000 wnids, also below noise/, blur/ ... | all |
| objectnet | images/ and 113 of 313 names, with mappings/ next to images/ | all |

A model with other classes is evaluated on the images of its own classes; the results note this.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.decode import EXTENSIONS
from dad_fast.data.sources.folder import FolderSource
from dad_fast.data.sources.names import shown, some
from dad_fast.data.sources.subset import Subset
from dad_fast.errors import DataError
from dad_fast.evaluation.suites.base import EvalSet, SuiteOptions
from dad_fast.evaluation.suites.imagenet import (
    alexnet_errors,
    check_disjoint,
    imagenet_classes,
    join,
    objectnet_wnids,
    published,
    subset_wnids,
)

# Folders of ImageNet-C's archives.
GROUPS = ("", "noise", "blur", "weather", "digital", "extra")
# Side of ImageNet-C's images in pixels.
C_SIDE = 224
C_VIEWS = {"none": (1.0, "bicubic"), "resize256": (0.875, "bicubic")}
_CLASS_FOLDER = re.compile(r"n\d{8}|\d{1,4}")
_HINT = "finish the download, or evaluate the images at hand with --allow-partial"


@dataclass(frozen=True)
class Meaning:
    """Meaning of class folders: folder -> wnids that are right for its images.

    masked: only the set's own classes compete. others: folders of other classes may lie next to
        them.
    """

    wnids: Mapping[str, list[str]]
    masked: bool = False
    others: bool = False


@dataclass(frozen=True)
class PublishedSet:
    """A test set with a folder per wnid. Subclasses change `meaning`.

    inside: sub-folders that may hold the class folders. example: of a class folder, for messages.
    border: pixels cut off on each side of an image. note: for the reader of the results.
    """

    name: str
    inside: tuple[str, ...] = ()
    example: str = "such as n01440764"
    border: int = 0
    note: str = ""

    @property
    def expected(self) -> str:
        """Expected content of the folder, for messages."""
        size = published()["sizes"][self.name]
        return f"{size['classes']:,} class folders {self.example} with {size['images']:,} images"

    def meaning(self, folder: Path) -> Meaning | None:
        """Return the meaning of the class folders in `folder`; None where it cannot hold them."""
        return _all_wnids()

    def find(self, root: Path) -> tuple[Path, Meaning]:
        """Return the folder with the class folders, and their meaning.

        Raises DataError where there are none.
        """
        for folder in (root, *(root / name for name in self.inside)):
            meaning = self.meaning(folder) if folder.is_dir() else None
            if meaning is not None and set(meaning.wnids) & set(_folders(folder)):
                return folder, meaning
        there = _folders(root)
        has = f"it has {some(map(shown, there), 3)}" if there else "it has no folders"
        raise DataError(
            f"--suite {self.name}={root}: contains none of its class folders ({has}); "
            f"expected {self.expected}"
        )

    def open(self, path: str, classes: ClassMap, options: SuiteOptions) -> EvalSet:
        """Open the set in the folder `path` for a model with the classes `classes`.

        Raises DataError for a folder that is no such set, that is incomplete (unless
        `options.allow_partial`), or that has no class of the model.
        """
        folder, meaning = self.find(_root(self, path))
        return self.open_classes(folder, meaning, classes, options)

    def open_classes(
        self, folder: Path, meaning: Meaning, classes: ClassMap, options: SuiteOptions
    ) -> EvalSet:
        """Open the class folders in `folder`, checked for completeness."""
        chosen, partial = self.check(folder, meaning, options.allow_partial)
        wnids = {name: meaning.wnids[name] for name in chosen}
        right = self._outputs(wnids, classes)
        names = [name for name in wnids if right[name]]
        listed = ClassMap(tuple((i, name, name) for i, name in enumerate(names)))
        source = FolderSource(
            folder, classes=listed, max_bad_share=options.max_bad_share, other_folders=True
        )
        columns = accepted = None
        labels = source.labels
        if any(len(outputs) > 1 for outputs in right.values()):
            accepted = np.zeros((len(names), len(classes)), dtype=bool)
            for i, name in enumerate(names):
                accepted[i, right[name]] = True
        else:
            output_of = np.array([right[name][0] for name in names], dtype=np.int64)
            if meaning.masked:
                columns = np.sort(output_of)
                output_of = np.searchsorted(columns, output_of)
            labels = output_of[labels]
        notes = [f"logits of the {len(names):,} classes"] if meaning.masked else []
        notes.append(self.note)
        if len(names) < len(wnids):
            notes.append(f"only {len(names):,} of {len(wnids):,} classes are the model's")
        notes.append(partial)
        images = Subset(source, np.arange(len(source)), labels, self.border)
        note = "; ".join(filter(None, notes))
        return EvalSet(self.name, (images,), classes, columns, accepted, note=note)

    def check(self, folder: Path, meaning: Meaning, allow_partial: bool) -> tuple[list[str], str]:
        """Return the class folders with images, and a note where the set is incomplete.

        Counts file names only, before any image is opened.
        """
        there = _folders(folder)
        if not meaning.others:
            class_folders = [name for name in there if _CLASS_FOLDER.fullmatch(name)]
            check_disjoint(f"--suite {self.name}={folder}", class_folders, list(meaning.wnids))
        counts = {name: _num_images(folder / name) for name in meaning.wnids if name in there}
        filled = [name for name, count in counts.items() if count]
        expected = published()["sizes"][self.name]["images"]
        images = sum(counts.values())
        if len(filled) >= len(meaning.wnids) and images >= expected:
            more = images > expected
            return filled, f"{images:,} images, published are {expected:,}" if more else ""
        what = (
            f"{len(filled):,} of {len(meaning.wnids):,} class folders, "
            f"{images:,} of {expected:,} images"
        )
        if not allow_partial:
            lacks = [name for name in meaning.wnids if name not in filled]
            such = f" (without {some(map(shown, lacks), 3)})" if lacks else ""
            raise DataError(f"{self.name}: {what} in {folder}{such}; {_HINT}")
        return filled, f"partial: {what}"

    def _outputs(self, wnids: Mapping[str, list[str]], classes: ClassMap) -> dict[str, list[int]]:
        """Return the model's outputs that are right for each class folder."""
        of_imagenet = imagenet_classes()
        name_of = dict(zip(of_imagenet.folders, of_imagenet.names, strict=True))
        asked = list(dict.fromkeys(wnid for each in wnids.values() for wnid in each))
        joined = join(classes, [(wnid, name_of[wnid]) for wnid in asked])
        output = {
            wnid: found for wnid, found in zip(asked, joined, strict=True) if found is not None
        }
        found = {
            name: [output[wnid] for wnid in each if wnid in output] for name, each in wnids.items()
        }
        if not any(found.values()):
            have = some(map(shown, classes.folders), 3)
            raise DataError(
                f"--suite {self.name}: none of the model's {len(classes):,} classes ({have}) "
                f"is one of its {len(wnids):,}"
            )
        return found


class NumberedSet(PublishedSet):
    """ImageNet-V2: folders 0 … 999 are class numbers; some copies have wnids."""

    def meaning(self, folder: Path) -> Meaning | None:
        wnids = imagenet_classes().folders
        if set(wnids) & set(_folders(folder)):
            return _all_wnids()
        return Meaning({str(i): [wnid] for i, wnid in enumerate(wnids)})


class MaskedSet(PublishedSet):
    """ImageNet-A and ImageNet-R: 200 wnids, which alone compete."""

    def meaning(self, folder: Path) -> Meaning | None:
        wnids = subset_wnids(self.name.removeprefix("imagenet-"))
        return Meaning({wnid: [wnid] for wnid in wnids}, masked=True)


class ObjectNet(PublishedSet):
    """Folders of its own names, which mappings/ translates; several ids may be right."""

    @property
    def expected(self) -> str:
        return "images/ with a folder per class, and mappings/ next to it"

    def meaning(self, folder: Path) -> Meaning | None:
        for mappings in (folder / "mappings", folder.parent / "mappings"):
            if mappings.is_dir():
                return Meaning(objectnet_wnids(mappings), others=True)
        if folder.name != "images":
            return None
        # Raises DataError that names the missing files.
        return Meaning(objectnet_wnids(folder.parent / "mappings"), others=True)


class CorruptedSet(PublishedSet):
    """ImageNet-C: a copy of the validation set per corruption and severity."""

    @property
    def expected(self) -> str:
        return (
            "CORRUPTION/SEVERITY/WNID folders of 15 corruptions and 5 severities, "
            "50,000 images each"
        )

    def open(self, path: str, classes: ClassMap, options: SuiteOptions) -> EvalSet:
        root = _root(self, path)
        wanted = [(name, severity) for name in alexnet_errors() for severity in range(1, 6)]
        found = {part: _corruption_folder(root, *part) for part in wanted}
        places = {part: folder for part, folder in found.items() if folder is not None}
        lacks = [
            f"{name}/{severity}" for name, severity in wanted if (name, severity) not in places
        ]
        if not places:
            raise DataError(
                f"--suite {self.name}={root}: no CORRUPTION/SEVERITY folders; "
                f"expected {self.expected}"
            )
        if lacks and not options.allow_partial:
            raise DataError(
                f"{self.name}: {len(places)} of {len(wanted)} CORRUPTION/SEVERITY folders in "
                f"{root} (without {some(lacks, 3)}); {_HINT}"
            )
        pieces: list[Subset] = []
        notes = [f"without {some(lacks, 3)}"] if lacks else []
        for folder in places.values():
            one = self.open_classes(folder, _all_wnids(), classes, options)
            pieces += one.pieces
            if one.note and one.note not in notes:
                notes.append(one.note)
        return EvalSet(
            self.name,
            tuple(pieces),
            classes,
            parts=tuple(places),
            view=C_VIEWS[options.c_preprocessing],
            note="; ".join(notes[:2]),
        )


IMAGENET = PublishedSet("imagenet", inside=("val", "validation"))
IMAGENET_V2 = NumberedSet(
    "imagenet-v2",
    inside=("imagenetv2-matched-frequency-format-val", "ImageNetV2-matched-frequency"),
    example="0 … 999",
)
IMAGENET_A = MaskedSet("imagenet-a", inside=("imagenet-a",), example="such as n01498041")
IMAGENET_R = MaskedSet("imagenet-r", inside=("imagenet-r",), example="such as n01498041")
IMAGENET_SKETCH = PublishedSet("imagenet-sketch", inside=("sketch",))
IMAGENET_C = CorruptedSet("imagenet-c")
IMAGENET_STYLIZED = PublishedSet("imagenet-stylized", inside=("val",))
OBJECTNET = ObjectNet(
    "objectnet",
    inside=("images", "objectnet-1.0/images"),
    # A red line of one pixel, smeared by compression.
    border=2,
    note="any of a folder's ids is right",
)


def _all_wnids() -> Meaning:
    return Meaning({wnid: [wnid] for wnid in imagenet_classes().folders})


def _root(test_set: PublishedSet, path: str) -> Path:
    root = Path(path)
    if not root.is_dir():
        problem = "not a folder" if root.exists() else "no such folder"
        raise DataError(f"--suite {test_set.name}={path}: {problem}; expected {test_set.expected}")
    return root


def _corruption_folder(root: Path, name: str, severity: int) -> Path | None:
    for group in GROUPS:
        folder = root / group / name / str(severity)
        if folder.is_dir():
            return folder
    return None


def _folders(folder: Path) -> list[str]:
    return sorted(item.name for item in _listed(folder) if item.is_dir())


def _num_images(folder: Path) -> int:
    return sum(item.name.lower().endswith(EXTENSIONS) for item in _listed(folder))


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    """List a folder without hidden entries."""
    try:
        with os.scandir(folder) as listing:
            return [item for item in listing if not item.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error.strerror} (--suite)") from error
