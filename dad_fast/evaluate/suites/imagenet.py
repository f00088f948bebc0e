"""ImageNet's classes and those of the test sets made for it, how they join with a model's, and the mean corruption error."""

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
    """published.json: sizes of the test sets, AlexNet's errors."""
    found: dict[str, Any] = json.loads(
        resources.files("dad_fast.evaluate.suites")
        .joinpath("published.json")
        .read_text(encoding="utf-8")
    )
    return found


@lru_cache(maxsize=1)
def imagenet_classes() -> ClassMap:
    """ImageNet-1k's 1000 classes in the order of every published head: wnids as folders, timm's first name of each."""
    from timm.data import ImageNetInfo

    wnids = list(ImageNetInfo().label_names())
    return ClassMap(
        tuple(
            (i, wnid, name)
            for i, (wnid, name) in enumerate(zip(wnids, readable_names(wnids), strict=True))
        )
    )


@lru_cache(maxsize=2)
def subset_wnids(letter: str) -> tuple[str, ...]:
    """The 200 wnids of ImageNet-A ("a") or ImageNet-R ("r"), from the list that timm ships."""
    name = f"imagenet_{letter}_synsets.txt"
    try:
        wnids = tuple(
            resources.files("timm.data._info").joinpath(name).read_text(encoding="utf-8").split()
        )
    except (ModuleNotFoundError, OSError) as error:
        raise EnvironmentProblem(
            f"timm's list {name} is not where it was ({error}): pip install 'timm>=1.0.31'"
        ) from None
    assert len(wnids) == 200
    return wnids


def objectnet_wnids(mappings: Path) -> dict[str, list[str]]:
    """ObjectNet's folders that stand for classes of ImageNet, each with its wnids, from the two JSON files that come with the images:
    folder -> its label, and label -> ImageNet's descriptions of what counts as right, which are timm's word for word.

    Raises DataError where the files are not there, or say what they should not.
    """
    labels, meanings = (
        _read_json(mappings / name)
        for name in ("folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json")
    )
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    wnid_of = {info.label_name_to_description(wnid): wnid for wnid in info.label_names()}
    found = {}
    for folder, label in labels.items():
        if label not in meanings:
            continue  # one of the 200 classes that ImageNet has not
        descriptions = meanings[label].split("; ")
        if unknown := [text for text in descriptions if text not in wnid_of]:
            raise DataError(
                f"{mappings}/objectnet_to_imagenet_1k.json: {unknown[0]!r} of {label!r} is no class of ImageNet; get it again"
            )
        found[folder] = [wnid_of[text] for text in descriptions]
    if not found:
        raise DataError(
            f"{mappings}: its two files have no label in common; get them again with the images"
        )
    return found


def _read_json(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path}: not there; ObjectNet's archive has a folder mappings beside images, which says what its classes are"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not readable as JSON ({error}); get it again from ObjectNet's archive"
        ) from None
    if not isinstance(content, dict) or not all(
        isinstance(value, str) for value in content.values()
    ):
        raise DataError(f"{path}: not a table of texts; get it again from ObjectNet's archive")
    return content


def join(model: ClassMap, wanted: Sequence[tuple[str, str]]) -> list[int | None]:
    """For each wanted class (folder, name) the output of a model with the classes `model`, or None where it has no such class.

    By folder (a wnid) where the lists share any; otherwise by name.
    """
    place = {folder: i for i, folder in enumerate(model.folders)}
    by_folder = [place.get(folder) for folder, _ in wanted]
    return (
        by_folder
        if any(found is not None for found in by_folder)
        else by_name(model, [name for _, name in wanted])
    )


def by_name(model: ClassMap, wanted: Sequence[str]) -> list[int | None]:
    """`join` by the model's names or folders, in any case and with blanks for underscores, where a name is of one class only."""
    named: dict[str, set[int]] = {}
    for i, folder, name in model:
        for text in {_plain(folder), _plain(name)}:
            named.setdefault(text, set()).add(i)
    asked = [_plain(name) for name in wanted]
    return [
        next(iter(named[text]))
        if len(named.get(text, ())) == 1 and asked.count(text) == 1
        else None
        for text in asked
    ]


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())


def corruption_errors(accuracy: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Each corruption's error relative to AlexNet's, in percent, from its top-1 by severity in percent."""
    alexnet = alexnet_errors()
    return {
        name: (100 - float(np.mean(tops))) / alexnet[name]
        for name, tops in accuracy.items()
        if name in alexnet
    }


def alexnet_errors() -> dict[str, float]:
    """The 15 corruptions that the mCE is over, each with AlexNet's error as a fraction."""
    found: dict[str, float] = published()["alexnet_errors"]["values"]
    return found


def check_disjoint(name: str, there: Sequence[str], known: Sequence[str]) -> None:
    """DataError where class folders are there that the set does not have: then it is another set."""
    if extra := sorted(set(there) - set(known)):
        raise DataError(
            f"{name}: {len(extra):,} class folders are not of it, such as {some(extra, 3)}; is that another data set?"
        )
