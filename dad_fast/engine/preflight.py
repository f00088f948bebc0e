"""Check paths and model names before indexing data (fail fast): the index of a large data set may
take an hour.
"""

from __future__ import annotations

from pathlib import Path

import timm

from dad_fast.config.fields import nearest
from dad_fast.config.schema import Config
from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.folder import find_folder
from dad_fast.data.sources.names import shown, some
from dad_fast.data.sources.registry import is_named
from dad_fast.data.sources.tar import find_shards
from dad_fast.errors import DataError, UsageError
from dad_fast.methods.registry import METHODS


def check_splits(cfg: Config) -> None:
    """Raise DataError for a split that is missing in an image folder, for a single class, and for
    splits of different classes.
    """
    data = cfg.data
    splits = data.train_split, data.val_split
    if is_named(data.data_dir) or any(find_shards(data.data_dir, split) for split in splits):
        return
    folders = [find_folder(Path(data.data_dir), split) for split in splits]
    if not data.class_map:
        check_same_classes(cfg, *(ClassMap.from_folders(folder) for folder in folders))


def check_same_classes(cfg: Config, train: ClassMap, val: ClassMap) -> None:
    """Raise DataError for fewer than two classes, or if the class lists of the two splits differ."""
    if len(train) < 2:
        only = Path(cfg.data.data_dir) / cfg.data.train_split / train.folders[0]
        raise DataError(
            f"--data-dir {cfg.data.data_dir}: one class, {shown(train.names[0])}; a classifier needs "
            f"two{_level_below(only)}"
        )
    if train == val:
        return
    train_split, val_split = cfg.data.train_split, cfg.data.val_split
    only_train = set(train.folders) - set(val.folders)
    only_val = set(val.folders) - set(train.folders)
    differences = [
        f"only {split} has the class {shown(min(classes))}"
        for split, classes in ((train_split, only_train), (val_split, only_val))
        if classes
    ]
    what = ", ".join(differences)
    if not differences:
        what = f"{train_split} and {val_split} order their classes differently"
    raise DataError(f"--data-dir {cfg.data.data_dir}: {what}; fix the folders or give --class-map")


def _level_below(folder: Path) -> str:
    """Return a hint where `folder`, the only class, holds folders that may be the classes."""
    if not folder.is_dir():
        return ""
    below = sorted(item.name for item in folder.iterdir() if item.is_dir())
    if not below:
        return ""
    level = f"{folder.parent.name}/{folder.name}"
    return f"; its folders ({some(below)}) may be the classes: --train-split {shown(level)}"


def check_weights(cfg: Config, teacher: bool, discretizer: bool) -> None:
    """Raise DataError for a missing file of weights, UsageError for a student that timm does not
    know.

    teacher, discretizer: True if the run needs them.
    """
    student = cfg.student.name.removeprefix("timm:")
    is_timm = not METHODS[cfg.method].linear_probe and not student.startswith("hf-hub:")
    if is_timm and not timm.is_model(student.partition(".")[0]):
        raise UsageError(
            f"--student {cfg.student.name}: timm has no such "
            f"model{nearest(student, timm.list_models())}"
        )
    named = {
        "--teacher": _file_of(cfg.teacher.name) if teacher else "",
        "--discretizer": _file_of(cfg.discretizer.name) if discretizer else "",
        "--student-weights": _file_of(cfg.student.weights),
        "--init-from": cfg.student.init_from,
    }
    for flag, name in named.items():
        if name and not Path(name).exists():
            raise DataError(f"{flag} {name}: no such file; check the path")


def _file_of(name: str) -> str:
    """Return the file in SCHEME:ARCH@FILE or FILE; empty for a name without a file."""
    scheme, colon, _ = name.partition(":")
    if not colon or Path(name).exists():
        # The loader of the model has a better message for a name without a suffix.
        return name if Path(name).suffix else ""
    return name.partition("@")[2] if scheme in ("open_clip", "timm") else ""
