"""What a run names and is not there is said at once: an index of a large data set, which the rest waits for, may take an hour."""

from __future__ import annotations

from pathlib import Path

import timm

from dad_fast.config.fields import nearest
from dad_fast.config.schema import Config
from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.base import EMBEDDED
from dad_fast.data.sources.folder import find_folder
from dad_fast.data.sources.names import shown
from dad_fast.data.sources.tar import find_shards
from dad_fast.errors import DataError, UsageError
from dad_fast.methods.registry import METHODS


def check_splits(cfg: Config) -> None:
    """DataError for a split that an image folder lacks, and for splits of different classes."""
    data = cfg.data
    splits = data.train_split, data.val_split
    if data.data_dir.startswith(EMBEDDED) or any(
        find_shards(data.data_dir, split) for split in splits
    ):
        return
    folders = [find_folder(Path(data.data_dir), split) for split in splits]
    if not data.class_map:
        check_same_classes(cfg, *(ClassMap.from_folders(folder) for folder in folders))


def check_same_classes(cfg: Config, train: ClassMap, val: ClassMap) -> None:
    """DataError where the two splits' class lists differ."""
    if train == val:
        return
    where, names = f"--data-dir {cfg.data.data_dir}", (cfg.data.train_split, cfg.data.val_split)
    folders = set(train.folders), set(val.folders)
    alone = zip(names, (folders[0] - folders[1], folders[1] - folders[0]), strict=True)
    only = [
        f"only {name} has the class {shown(min(classes))}" for name, classes in alone if classes
    ]
    what = ", ".join(only) or f"{names[0]} and {names[1]} order their classes differently"
    raise DataError(f"{where}: {what}; mend the folders or give --class-map")


def check_weights(cfg: Config, teacher: bool, discretizer: bool) -> None:
    """DataError for a file of weights that is not there, UsageError for a student that timm does not know.

    teacher, discretizer: whether the run needs them.
    """
    student = cfg.student.name.removeprefix("timm:")
    if (
        not METHODS[cfg.method].linear_probe
        and not student.startswith("hf-hub:")
        and not timm.is_model(student.partition(".")[0])
    ):
        raise UsageError(
            f"--student {cfg.student.name}: timm has no such model{nearest(student, timm.list_models())}"
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
    """The file in SCHEME:ARCH@FILE or FILE; empty where the name stands for no file of the user's."""
    scheme, colon, _ = name.partition(":")
    if not colon or Path(name).exists():
        return name if Path(name).suffix else ""  # one without is told what may be written
    return name.partition("@")[2] if scheme in ("open_clip", "timm") else ""
