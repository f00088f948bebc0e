"""Open the names after `--suite` and `--ood` and join them with the model's classes."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dad_fast.config.fields import nearest
from dad_fast.config.schema import DataConfig, EvalConfig
from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.base import Source
from dad_fast.data.sources.folder import find_folder
from dad_fast.data.sources.names import shown, some
from dad_fast.data.sources.registry import (
    SOURCES,
    find_listing,
    is_named,
    is_split,
    open_source,
)
from dad_fast.data.sources.splits import find_split, has_split, list_split, open_split
from dad_fast.data.sources.subset import Subset
from dad_fast.errors import DataError, UsageError
from dad_fast.evaluation.corruptions.names import NAMES, num_severities
from dad_fast.evaluation.suites.base import EvalSet, SuiteOptions, as_eval_set
from dad_fast.evaluation.suites.folders import has_other_names, open_joined, split_class_map
from dad_fast.evaluation.suites.imagenet import imagenet_classes
from dad_fast.evaluation.suites.registry import PUBLISHED, SUBSET, SUITES
from dad_fast.registry import PYTHON

# Name and severity; None = every severity.
Corruption = tuple[str, int | None]


@dataclass(frozen=True)
class Suite:
    """An opened suite: images, perhaps under a corruption."""

    name: str
    source: Source | EvalSet
    corruption: Corruption | None = None


@dataclass(frozen=True)
class _Named:
    """A parsed name: KIND=PATH, KIND, or without a kind PATH or a split.

    path: with its @CLASSES.csv, if any. is_source: the path is NAME:ARGUMENT of a data source.
    """

    text: str
    kind: str
    path: str
    is_source: bool = False


def open_suites(
    names: Sequence[str], data: DataConfig, classes: ClassMap, options: EvalConfig | None = None
) -> list[Suite]:
    """Open the `--suite` names and check them against `classes`, the model's class list.

    A name is one of
      a corruption (`contrast`, `contrast:3`), applied to the first other suite of the list or else
      to `data.val_split`;
      a kind of the registry and its folder (`imagenet-a=/data/imagenet-a`); alone where a folder of
      that name is in `data.data_dir`, or the kind needs no folder;
      `subset=PATH`: an image folder of some of the model's classes, which alone compete;
      a split of `data.data_dir` (a sub-folder, a pattern of shards or an embedded split), or the
      path of an image folder or of WebDataset shards, with all of the model's classes;
      a data source by name (`hfds:NAME@test`, `parquet:FOLDER@test`, `csv:FILE`), whose labels are
      among the model's classes.
    `PATH@CLASSES.csv` maps the folders of an image folder to the model's classes (id,folder,name).

    Raises UsageError for a name that is none of these, DataError for a missing folder or for
    classes that disagree.
    """
    options = options or EvalConfig()
    parsed = {
        name: _parse(name, data) for name in dict.fromkeys(names) if _corruption(name) is None
    }
    opened = {name: _open(one, data, classes, options) for name, one in parsed.items()}
    short = {name: _short_name(one, opened[name]) for name, one in parsed.items()}
    base: Source | EvalSet | None = None
    suites = []
    for name in dict.fromkeys(names):
        corruption = _corruption(name)
        if corruption is None:
            unique = list(short.values()).count(short[name]) == 1
            suites.append(Suite(short[name] if unique else name, opened[name]))
            continue
        if base is None:
            clean = [source for source in opened.values() if not _is_corrupted(source)]
            validation = _parse(data.val_split, data)
            base = clean[0] if clean else _open(validation, data, classes, options)
        suites.append(Suite(name, base, corruption))
    return suites


def check_suites(names: Sequence[str], data: DataConfig) -> None:
    """Raise errors for `--suite` names whose kind or folder does not exist. Opens no data set."""
    others = [name for name in names if _corruption(name) is None]
    for name in others or (data.val_split,):
        one = _parse(name, data)
        path, _ = split_class_map(one.path)
        if one.is_source:
            with _named(one):
                listing = find_listing(path)
                if listing is not None:
                    listing.images("", None)
        elif one.kind in (*PUBLISHED, SUBSET):
            if not Path(path).is_dir():
                raise DataError(f"--suite {one.text}: no such folder")
        elif not one.kind and is_named(data.data_dir) and not is_split("", path):
            try:
                list_split(data, path)
            except UsageError as error:
                raise UsageError(f"--suite {one.text}: {error}{_nearest(one.text)}") from None
        elif not one.kind:
            _check_place(one, path, data)


def check_unknown(names: Sequence[str], data: DataConfig) -> None:
    """Raise errors for `--ood` names whose kind or folder does not exist. Opens no data set."""
    for name in names:
        with _named_as_ood(name):
            check_suites([name], data)


@contextmanager
def _named_as_ood(name: str) -> Iterator[None]:
    """Let errors of the block name --ood instead of --suite."""
    try:
        yield
    except (UsageError, DataError) as error:
        raise type(error)(str(error).replace(f"--suite {name}:", f"--ood {name}:")) from None


# Name, images and the corruption that is applied to them.
Unknown = tuple[str, EvalSet, Corruption | None]


def open_unknown(
    name: str, data: DataConfig, classes: ClassMap, options: EvalConfig, columns: np.ndarray | None
) -> Unknown:
    """Open the images after `--ood`, without labels.

    name: an image folder, shards or a name of `open_suites`.
    columns: the outputs that compete on the in-distribution suite.
    """
    path = str(Path(data.data_dir) / name) if has_split(data, name) else name
    corruption: Corruption | None = None
    if is_split("", path) or _is_source(path):
        eval_set = as_eval_set(open_source(path, max_bad_share=data.max_bad_share))
        label = Path(path).name or name
    else:
        with _named_as_ood(name):
            suite = open_suites([name], data, classes, options)[0]
        eval_set = as_eval_set(suite.source)
        label = suite.name
        corruption = suite.corruption
    pieces = tuple(
        Subset(piece.base, piece.rows, np.full(len(piece), -1, dtype=np.int64), piece.border)
        for piece in eval_set.pieces
    )
    unlabelled = replace(
        eval_set, pieces=pieces, columns=columns, accepted=None, parts=(), known=False
    )
    return label, unlabelled, corruption


def classes_of(names: Sequence[str], data: DataConfig) -> ClassMap:
    """Return the classes for a published model, which has recorded none.

    Those of the class map; ImageNet's where a suite is a published test set, or a subset of its
    classes; else those of the first split or folder.
    """
    if data.class_map:
        return ClassMap.from_csv(data.class_map)
    parsed = [_parse(name, data) for name in names if _corruption(name) is None]
    parsed = parsed or [_parse(data.val_split, data)]
    if any(one.kind in PUBLISHED for one in parsed):
        return imagenet_classes()
    first = parsed[0]
    path, class_map = split_class_map(first.path)
    if class_map or first.kind not in ("", SUBSET):
        raise UsageError(
            f"--suite {first.text}: the class list of the model is unknown; "
            "give it with --class-map"
        )
    if first.is_source:
        return open_source(path).classes
    inside = is_named(data.data_dir) or has_split(data, path) or not is_split("", path)
    found = (open_split(data, path) if inside else open_source(path)).classes
    if first.kind and set(found.folders) <= set(imagenet_classes().folders):
        return imagenet_classes()
    return found


def _parse(name: str, data: DataConfig) -> _Named:
    if _is_source(name):
        return _Named(name, "", name, is_source=True)
    kind, equals, path = name.partition("=")
    if equals and not is_split("", name):
        if kind not in SUITES:
            known = SUITES.names()
            raise UsageError(
                f"--suite {name}: {kind!r} is no kind of test set{nearest(kind, known)} "
                f"(kinds: {', '.join(known)})"
            )
        if not path:
            raise UsageError(f"--suite {name}: name its folder, as in {kind}=/data/{kind}")
        folder, _ = split_class_map(path)
        if not is_split("", folder) and has_split(data, folder):
            path = str(Path(data.data_dir) / path)
        return _Named(name, kind, path)
    if name == SUBSET or name not in SUITES:
        return _Named(name, "", name)
    if has_split(data, name):
        return _Named(name, name, str(Path(data.data_dir) / name))
    # Kinds of other packages may know where their images are.
    return _Named(name, "", name) if name in PUBLISHED else _Named(name, name, "")


def _is_source(name: str) -> bool:
    """Return whether a name is NAME:ARGUMENT of a known data source; python:... is a suite's."""
    known = ":" in name and not name.startswith(PYTHON) and SOURCES.split(name)[0] in SOURCES
    return known and is_named(name)


@contextmanager
def _named(one: _Named) -> Iterator[None]:
    """Let errors of the block name --suite."""
    try:
        yield
    except (UsageError, DataError) as error:
        raise type(error)(f"--suite {one.text}: {error}") from None


def _is_corrupted(source: Source | EvalSet) -> bool:
    """Return whether the images are corrupted already, as those of ImageNet-C."""
    return isinstance(source, EvalSet) and bool(source.parts)


def _short_name(one: _Named, source: Source | EvalSet) -> str:
    if one.kind:
        return source.name if isinstance(source, EvalSet) else one.kind
    path, _ = split_class_map(one.path)
    return Path(path).name or one.text


def _corruption(name: str) -> Corruption | None:
    """Parse a corruption: ("contrast", 3) for "contrast:3"; None for any other name.

    Raises UsageError for a severity that the corruption lacks.
    """
    base, colon, severity = name.partition(":")
    if base not in NAMES:
        return None
    if not colon:
        return base, None
    if severity not in map(str, range(1, num_severities(base) + 1)):
        known = "1 to 5" if num_severities(base) > 1 else "1 only"
        raise UsageError(
            f"--suite {name}: no severity {severity!r}; {base} has {known}, "
            "and without a number all are taken"
        )
    return base, int(severity)


def _open(
    one: _Named, data: DataConfig, classes: ClassMap, options: EvalConfig
) -> Source | EvalSet:
    if one.kind:
        given = SuiteOptions(options.allow_partial, options.c_preprocessing, data.max_bad_share)
        return SUITES[one.kind](one.path, classes, given)
    if one.is_source:
        with _named(one):
            return open_source(one.path, classes=classes, max_bad_share=data.max_bad_share)
    path, class_map = split_class_map(one.path)
    if is_named(data.data_dir) and not is_split("", path):
        try:
            return open_split(data, path, classes)
        except UsageError as error:
            raise UsageError(f"--suite {one.text}: {error}{_nearest(one.text)}") from None
    inside = has_split(data, path)
    _check_place(one, path, data)
    folder, part = Path(path), ""
    if inside:
        name, part = find_split(data, path)
        folder = Path(data.data_dir) / name
    if class_map or (not part and has_other_names(folder, classes)):
        where = f"--suite {one.text}"
        return open_joined(where, str(folder), class_map, classes, data.max_bad_share)
    if inside:
        return open_split(data, path, classes)
    return open_source(path, classes=classes, max_bad_share=data.max_bad_share)


def _check_place(one: _Named, path: str, data: DataConfig) -> None:
    """Raise DataError for a split or a folder that is not there."""
    if has_split(data, path) or is_split("", path):
        return
    root = Path(data.data_dir)
    if (
        data.data_dir
        and not is_named(data.data_dir)
        and not root.exists()
        and not is_split("", data.data_dir)
    ):
        find_folder(root, "")
    if one.text == data.val_split and root.is_dir():
        find_folder(root, one.text)
    where = data.data_dir or "--data-dir"
    if data.data_dir and root.is_dir():
        folders = sorted(shown(item.name) for item in root.iterdir() if item.is_dir())
        where = f"{where} (it has {some(folders) or 'none'})"
    raise DataError(
        f"--suite {one.text}: no corruption, no folder in {where} and no other folder"
        f"{_nearest(one.text)}"
    )


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name.partition(":")[0], NAMES, n=1)
    return f"; did you mean {near[0]}?" if near else f" (corruptions: {', '.join(NAMES)})"
