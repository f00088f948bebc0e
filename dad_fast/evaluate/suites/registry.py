"""What the names after `--suite` stand for, opened and joined with the classes of the model that is judged."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dad_fast.config.fields import nearest
from dad_fast.config.schema import DataConfig, EvalConfig
from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.base import Source
from dad_fast.data.sources.folder import FolderSource
from dad_fast.data.sources.names import shown, some
from dad_fast.data.sources.registry import is_named, is_split, open_source
from dad_fast.errors import DataError, UsageError
from dad_fast.evaluate.corruptions.common import CORRUPTIONS, num_severities
from dad_fast.evaluate.suites.base import EvalSet, Subset, as_eval_set
from dad_fast.evaluate.suites.imagenet import by_name, imagenet_classes, join
from dad_fast.evaluate.suites.published import LAYOUTS, open_layout

Corruption = tuple[str, int | None]  # name, severity; None = every severity

SUBSET = "subset"
KINDS = (*LAYOUTS, SUBSET)


@dataclass(frozen=True)
class Suite:
    """What a suite's name stands for: images, perhaps under a corruption."""

    name: str
    source: Source | EvalSet
    corruption: Corruption | None = None


@dataclass(frozen=True)
class _Named:
    """A name after --suite, taken apart: KIND=PATH[@CLASSES.csv], PATH[@CLASSES.csv], a split or a kind alone."""

    text: str
    kind: str
    path: str
    class_map: str


def open_suites(
    names: Sequence[str], data: DataConfig, classes: ClassMap, options: EvalConfig | None = None
) -> list[Suite]:
    """What the `--suite` names stand for, opened and checked against `classes`, the recorded class list of the model.

    A name is one of
      a corruption (`contrast`, `contrast:3`), applied to the first other suite of the list or else to `data.val_split`;
      a published test set and its folder (`imagenet-a=/data/imagenet-a`), or alone where a folder of that name is in `data.data_dir`;
      `subset=PATH`: an image folder of some of the model's classes, among which alone the model may choose;
      a split of `data.data_dir` (a sub-folder, a pattern of shards or an embedded split), or the path of an image folder or of
      WebDataset shards, with all of the model's classes.
    `PATH@CLASSES.csv` says with a class map (id,folder,name) what the folders of an image folder are: names or folders of the model's.

    Raises UsageError for a name that is none of these, DataError for a folder that is missing or whose classes disagree.
    """
    options = options or EvalConfig()
    parsed = {
        name: _parse(name, data) for name in dict.fromkeys(names) if _corruption(name) is None
    }
    opened: dict[str, Source | EvalSet] = {}

    def source(name: str) -> Source | EvalSet:
        if name not in opened:
            opened[name] = _open(parsed.get(name) or _parse(name, data), data, classes, options)
        return opened[name]

    base = next((name for name, one in parsed.items() if one.kind != "imagenet-c"), data.val_split)
    short = [_short(one) for one in parsed.values()]
    suites = []
    for name in dict.fromkeys(names):
        corruption = _corruption(name)
        if corruption is not None:
            suites.append(Suite(name, source(base), corruption))
        else:
            own = _short(parsed[name])
            suites.append(Suite(own if short.count(own) == 1 else name, source(name)))
    return suites


Unknown = tuple[str, EvalSet, Corruption | None]  # name, images, what is done to them


def open_unknown(
    name: str, data: DataConfig, classes: ClassMap, options: EvalConfig, columns: np.ndarray | None
) -> Unknown:
    """Images after `--ood`, none of which has a label: any image folder or shards, or whatever else `open_suites` knows. `columns` are
    the outputs that compete on the in-distribution suite.
    """
    corruption = None
    path = str(Path(data.data_dir) / name) if _is_inside(name, data) else name
    if is_split("", path):
        judged, label = (
            as_eval_set(open_source(path, max_bad_share=data.max_bad_share)),
            Path(path).name or name,
        )
    else:
        try:
            suite = open_suites([name], data, classes, options)[0]
        except (UsageError, DataError) as error:
            raise type(error)(str(error).replace(f"--suite {name}:", f"--ood {name}:")) from None
        judged, label, corruption = as_eval_set(suite.source), suite.name, suite.corruption
    pieces = tuple(
        Subset(piece.base, piece.rows, np.full(len(piece), -1, dtype=np.int64), piece.border)
        for piece in judged.pieces
    )
    return (
        label,
        replace(judged, pieces=pieces, columns=columns, accepted=None, parts=(), known=False),
        corruption,
    )


def classes_of(names: Sequence[str], data: DataConfig) -> ClassMap:
    """The classes that a published model is asked about: the class map's; ImageNet's where one of the suites is a test set of it, or a
    subset of it; else those of the first split or folder.
    """
    if data.class_map:
        return ClassMap.from_csv(data.class_map)
    parsed = [_parse(name, data) for name in names if _corruption(name) is None] or [
        _parse(data.val_split, data)
    ]
    if any(one.kind in LAYOUTS for one in parsed):
        return imagenet_classes()
    first = parsed[0]
    if first.class_map:
        raise UsageError(
            f"--suite {first.text}: what the model's own classes are is not known; give its --class-map"
        )
    inside = is_named(data.data_dir) or _is_inside(first.path, data) or not is_split("", first.path)
    found = (open_source(data.data_dir, first.path) if inside else open_source(first.path)).classes
    return (
        imagenet_classes()
        if first.kind == SUBSET and set(found.folders) <= set(imagenet_classes().folders)
        else found
    )


def _parse(name: str, data: DataConfig) -> _Named:
    kind, equals, path = name.partition("=")
    if equals and not is_split("", name):
        if kind not in KINDS:
            raise UsageError(
                f"--suite {name}: {kind!r} is no kind of test set{nearest(kind, KINDS)} (kinds: {', '.join(KINDS)})"
            )
        if not path:
            raise UsageError(f"--suite {name}: name its folder, as in {kind}=/data/{kind}")
    elif name in LAYOUTS and _is_inside(name, data):
        kind, path = name, str(Path(data.data_dir) / name)
    else:
        kind, path = "", name
    if path.endswith(".csv") and "@" in path and kind not in LAYOUTS:
        path, _, class_map = path.rpartition("@")
        return _Named(name, kind, path, class_map)
    return _Named(name, kind, path, "")


def _short(one: _Named) -> str:
    if one.kind in LAYOUTS:
        return one.kind
    return Path(one.path).name or one.text


def _corruption(name: str) -> Corruption | None:
    """("contrast", 3) for "contrast:3"; None for a name that is no corruption's. Raises UsageError for a severity that it has not."""
    base, colon, severity = name.partition(":")
    if base not in CORRUPTIONS:
        return None
    if not colon:
        return base, None
    if severity not in map(str, range(1, num_severities(base) + 1)):
        known = "1 to 5" if num_severities(base) > 1 else "1 only"
        raise UsageError(
            f"--suite {name}: no severity {severity!r}; {base} has {known}, and without a number all are taken"
        )
    return base, int(severity)


def _open(
    one: _Named, data: DataConfig, classes: ClassMap, options: EvalConfig
) -> Source | EvalSet:
    if one.kind in LAYOUTS:
        return open_layout(one.kind, one.path, classes, options, data.max_bad_share)
    if is_named(data.data_dir) and not is_split("", one.path):
        try:
            return open_source(data.data_dir, one.path, classes=classes)
        except UsageError as error:
            raise UsageError(f"--suite {one.text}: {error}{_nearest(one.text)}") from None
    inside = _is_inside(one.path, data)
    if not inside and not is_split("", one.path):
        raise DataError(
            f"--suite {one.text}: no corruption, no folder in {data.data_dir or '--data-dir'} and no other folder{_nearest(one.text)}"
        )
    root, split = (data.data_dir, one.path) if inside else (one.path, "")
    if one.kind == SUBSET or one.class_map or _other_names(Path(root) / split, classes):
        return _joined(one, Path(root) / split, classes, data.max_bad_share)
    return open_source(root, split, classes=classes, max_bad_share=data.max_bad_share)


def _is_inside(name: str, data: DataConfig) -> bool:
    """Whether a folder or shards of this name are in the data's folder."""
    return bool(data.data_dir) and not is_named(data.data_dir) and is_split(data.data_dir, name)


def _other_names(folder: Path, classes: ClassMap) -> bool:
    """Whether an image folder has none of the model's class folders, but its folders' names mean the model's classes."""
    if not folder.is_dir():
        return False
    try:
        there = ClassMap.from_folders(folder)
    except DataError:  # shards, or nothing: open_source says it
        return False
    return not set(there.folders) & set(classes.folders) and any(
        found is not None for found in join(classes, _wanted(there))
    )


def _wanted(listed: ClassMap) -> list[tuple[str, str]]:
    return [(folder, name) for _, folder, name in listed]


def _joined(one: _Named, folder: Path, classes: ClassMap, max_bad_share: float) -> EvalSet:
    """An image folder whose classes are joined with the model's: by folder, by its class map or by name."""
    where = f"--suite {one.text}"
    listed = ClassMap.from_csv(one.class_map) if one.class_map else ClassMap.from_folders(folder)
    found = by_name(classes, listed.names) if one.class_map else join(classes, _wanted(listed))
    if unknown := [
        name for name, output in zip(listed.folders, found, strict=True) if output is None
    ]:
        of = f"{len(unknown):,} of its {len(listed):,} classes are not the model's"
        mend = (
            "mend the class map"
            if one.class_map
            else "remove them, or say what they are with PATH@CLASSES.csv"
        )
        raise DataError(f"{where}: {of} ({some(map(shown, unknown), 3)}); {mend}")
    outputs = np.array(found, dtype=np.int64)
    if len(set(found)) < len(found):
        raise DataError(
            f"{where}: two of its folders are the same class of the model; put their images into one"
        )
    if one.kind != SUBSET and len(found) < len(classes):
        lacks = [name for i, name in enumerate(classes.folders) if i not in set(found)]
        mend = "write subset=PATH to let the model choose among its classes alone"
        raise DataError(
            f"{where}: it lacks {len(lacks):,} of the model's {len(classes):,} classes ({some(map(shown, lacks), 3)}); {mend}"
        )
    source = FolderSource(folder, classes=listed, max_bad_share=max_bad_share)
    columns = np.sort(outputs) if one.kind == SUBSET else None
    places = np.searchsorted(columns, outputs) if columns is not None else outputs
    note = f"logits of the {len(found):,} classes" if columns is not None else ""
    return EvalSet(
        one.path,
        (Subset(source, np.arange(len(source)), places[source.labels]),),
        classes,
        columns,
        note=note,
    )


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name.partition(":")[0], CORRUPTIONS, n=1)
    return f"; did you mean {near[0]}?" if near else f" (corruptions: {', '.join(CORRUPTIONS)})"
