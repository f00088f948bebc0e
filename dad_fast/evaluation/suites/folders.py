"""Image folders, joined with a model's classes by folder, class map or name."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.folder import FolderSource
from dad_fast.data.sources.names import shown, some
from dad_fast.data.sources.subset import Subset
from dad_fast.errors import DataError
from dad_fast.evaluation.suites.base import EvalSet, SuiteOptions
from dad_fast.evaluation.suites.imagenet import by_name, join


def split_class_map(path: str) -> tuple[str, str]:
    """Split PATH@CLASSES.csv into the path and the class map; "" where there is none."""
    if path.endswith(".csv") and "@" in path:
        folder, _, class_map = path.rpartition("@")
        return folder, class_map
    return path, ""


def open_subset(path: str, classes: ClassMap, options: SuiteOptions) -> EvalSet:
    """Open PATH[@CLASSES.csv], some of the model's classes, which alone compete."""
    folder, class_map = split_class_map(path)
    where = f"--suite subset={path}"
    if not Path(folder).is_dir():
        raise DataError(f"{where}: no such folder")
    return open_joined(where, folder, class_map, classes, options.max_bad_share, subset=True)


def open_joined(
    where: str,
    folder: str,
    class_map: str,
    classes: ClassMap,
    max_bad_share: float,
    subset: bool = False,
) -> EvalSet:
    """Open an image folder and join its classes with the model's.

    where: the flag and its value, for messages. class_map: a CSV; empty = the folders' names.
    subset: the folder may lack classes of the model, and only its classes compete.

    Raises DataError where a class is not the model's, or is missing.
    """
    if class_map:
        listed = ClassMap.from_csv(class_map)
        outputs_found = by_name(classes, listed.names)
    else:
        listed = ClassMap.from_folders(folder)
        outputs_found = join(classes, wanted(listed))
    pairs = zip(listed.folders, outputs_found, strict=True)
    unknown = [name for name, output in pairs if output is None]
    if unknown:
        which = some(map(shown, unknown), 3)
        hint = "remove them, or name their classes with PATH@CLASSES.csv"
        if class_map:
            hint = "fix the class map"
        raise DataError(
            f"{where}: {len(unknown):,} of its {len(listed):,} classes are not the model's "
            f"({which}); {hint}"
        )
    outputs = np.array(outputs_found, dtype=np.int64)
    own = set(outputs_found)
    if len(own) < len(outputs):
        raise DataError(
            f"{where}: two of its folders are the same class of the model; "
            "put their images into one"
        )
    if not subset and len(outputs) < len(classes):
        lacks = [name for i, name in enumerate(classes.folders) if i not in own]
        which = some(map(shown, lacks), 3)
        raise DataError(
            f"{where}: it lacks {len(lacks):,} of the model's {len(classes):,} classes ({which}); "
            "write subset=PATH to let only its own classes compete"
        )
    source = FolderSource(Path(folder), classes=listed, max_bad_share=max_bad_share)
    columns = None
    note = ""
    if subset:
        columns = np.sort(outputs)
        outputs = np.searchsorted(columns, outputs)
        note = f"logits of the {len(outputs):,} classes"
    images = Subset(source, np.arange(len(source)), outputs[source.labels])
    return EvalSet(Path(folder).name or folder, (images,), classes, columns, note=note)


def has_other_names(folder: Path, classes: ClassMap) -> bool:
    """Return whether a folder has names of the model's classes, but none of its class folders."""
    if not folder.is_dir():
        return False
    try:
        listed = ClassMap.from_folders(folder)
    except DataError:
        # Shards or nothing: `open_source` reports it.
        return False
    if set(listed.folders) & set(classes.folders):
        return False
    return any(found is not None for found in join(classes, wanted(listed)))


def wanted(listed: ClassMap) -> list[tuple[str, str]]:
    """Return (folder, name) of each class, for `join`."""
    return [(folder, name) for _, folder, name in listed]
