"""Classes of ImageNet and its test sets, joined with a model's; corruption errors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from dad_fast.data.classes import ClassMap, readable_names
from dad_fast.data.sources.names import some
from dad_fast.errors import DataError, EnvironmentProblem


@lru_cache(maxsize=1)
def published() -> dict[str, Any]:
    """Load published.json: sizes of the test sets and AlexNet's errors."""
    file = resources.files("dad_fast.evaluation.suites").joinpath("published.json")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


@lru_cache(maxsize=1)
def imagenet_classes() -> ClassMap:
    """Return ImageNet's 1000 classes in the usual order: wnids, and timm's first name of each."""
    from timm.data import ImageNetInfo

    wnids = list(ImageNetInfo().label_names())
    pairs = zip(wnids, readable_names(wnids), strict=True)
    return ClassMap(tuple((i, wnid, name) for i, (wnid, name) in enumerate(pairs)))


@lru_cache(maxsize=2)
def subset_wnids(letter: str) -> tuple[str, ...]:
    """Return the 200 wnids of ImageNet-A ("a") or ImageNet-R ("r") from timm's list."""
    name = f"imagenet_{letter}_synsets.txt"
    try:
        file = resources.files("timm.data._info").joinpath(name)
        wnids = tuple(file.read_text(encoding="utf-8").split())
    except (ModuleNotFoundError, OSError) as error:
        raise EnvironmentProblem(
            f"timm has no list {name} ({error}): pip install 'timm>=1.0.31'"
        ) from None
    assert len(wnids) == 200
    return wnids


def objectnet_wnids(mappings: Path) -> dict[str, list[str]]:
    """Return ObjectNet's folders that stand for classes of ImageNet, each with its wnids.

    Reads two JSON files that come with the images: folder -> label, and label -> descriptions of
    ImageNet's classes, which are timm's word for word. Raises DataError for a missing or invalid
    file.
    """
    labels = _read_json(mappings / "folder_to_objectnet_label.json")
    meanings = _read_json(mappings / "objectnet_to_imagenet_1k.json")
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    wnid_of = {info.label_name_to_description(wnid): wnid for wnid in info.label_names()}
    found = {}
    for folder, label in labels.items():
        if label not in meanings:
            # One of the 200 classes that ImageNet lacks.
            continue
        descriptions = meanings[label].split("; ")
        unknown = [text for text in descriptions if text not in wnid_of]
        if unknown:
            raise DataError(
                f"{mappings}/objectnet_to_imagenet_1k.json: {unknown[0]!r} of {label!r} is no "
                "class of ImageNet; download it again"
            )
        found[folder] = [wnid_of[text] for text in descriptions]
    if not found:
        raise DataError(
            f"{mappings}: its two files have no label in common; "
            "download them again with the images"
        )
    return found


def _read_json(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; "
            "copy the folder mappings from ObjectNet's archive, next to images"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not readable as JSON ({error}); copy it again from ObjectNet's archive"
        ) from None
    is_table = isinstance(content, dict) and all(isinstance(v, str) for v in content.values())
    if not is_table:
        raise DataError(f"{path}: not a table of texts; copy it again from ObjectNet's archive")
    return content


def join(model: ClassMap, wanted: Sequence[tuple[str, str]]) -> list[int | None]:
    """Return the model's output for each wanted class (folder, name); None without such a class.

    Compares folders (wnids) where the lists share any, otherwise names.
    """
    place = {folder: i for i, folder in enumerate(model.folders)}
    by_folder = [place.get(folder) for folder, _ in wanted]
    if any(found is not None for found in by_folder):
        return by_folder
    return by_name(model, [name for _, name in wanted])


def by_name(model: ClassMap, wanted: Sequence[str]) -> list[int | None]:
    """Join by the model's names or folders, ignoring case, with blanks for underscores.

    None for a name that several classes have.
    """
    named: dict[str, set[int]] = {}
    for i, folder, name in model:
        for text in {_plain(folder), _plain(name)}:
            named.setdefault(text, set()).add(i)
    asked = [_plain(name) for name in wanted]
    outputs: list[int | None] = []
    for text in asked:
        found = named.get(text, set())
        unique = len(found) == 1 and asked.count(text) == 1
        outputs.append(next(iter(found)) if unique else None)
    return outputs


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())


def corruption_errors(accuracy: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return each corruption's error relative to AlexNet's, in percent.

    accuracy: top-1 by severity in percent, of each corruption.
    """
    alexnet = alexnet_errors()
    return {
        name: (100 - float(np.mean(tops))) / alexnet[name]
        for name, tops in accuracy.items()
        if name in alexnet
    }


def alexnet_errors() -> dict[str, float]:
    """Return the 15 corruptions of the mCE, each with AlexNet's error as a fraction."""
    found: dict[str, float] = published()["alexnet_errors"]["values"]
    return found


def check_disjoint(name: str, there: Sequence[str], known: Sequence[str]) -> None:
    """Raise DataError for class folders that the set lacks: the folder holds another set."""
    extra = sorted(set(there) - set(known))
    if extra:
        raise DataError(
            f"{name}: {len(extra):,} class folders are not of it, such as {some(extra, 3)}; "
            "is that another data set?"
        )
