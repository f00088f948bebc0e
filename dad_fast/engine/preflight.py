"""Check paths and names before torch is imported and data is indexed (fail fast): importing takes
seconds, and the index of a large data set may take an hour.

Imports no torch.
"""

from __future__ import annotations

from pathlib import Path

from dad_fast.config.fields import nearest
from dad_fast.config.schema import Config, DataConfig
from dad_fast.config.setting import Switch
from dad_fast.data.augment.pixmix import check_pictures
from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.folder import find_folder
from dad_fast.data.sources.names import shown, some
from dad_fast.data.sources.registry import is_named
from dad_fast.data.sources.splits import find_split, list_split
from dad_fast.data.sources.tar import find_shards
from dad_fast.data.sources.unlabelled import has_no_classes
from dad_fast.errors import DataError, UsageError
from dad_fast.evaluation.suites.open import check_suites
from dad_fast.loggers.sinks import check_sinks
from dad_fast.methods.registry import DISTANCES, METHODS, Images
from dad_fast.models.registry import members
from dad_fast.store.manifest import Manifest


def check_files(cfg: Config) -> None:
    """Raise errors for data, weights, stores and packages that are not there, and for models that
    the method needs and the settings do not name. UsageError also for a batch too small for the
    distance.
    """
    check_sinks(cfg.log_to)
    _check_batch_size(cfg)
    check_splits(cfg)
    _check_pictures(cfg)
    if cfg.eval.suites:
        check_suites(cfg.eval.suites, cfg.data)
    # With stores, the models that are needed are known only when the stores are open.
    if cfg.store.dirs:
        for folder in cfg.store.dirs:
            Manifest.load(folder)
    else:
        check_weights(cfg, *needed_models(cfg, adversarial=None, targets=False))


def check_files_to_fill(cfg: Config, discretizer: bool) -> None:
    """Raise errors for data and weights that are not there, before a store is filled.

    discretizer: the store holds adversarial images.
    """
    data = cfg.data
    _check_pictures(cfg)
    if data.class_map:
        ClassMap.from_csv(data.class_map)
    _check_extra_data(data)
    if is_named(data.data_dir):
        list_split(data, data.train_split)
    else:
        train = find_split(data, data.train_split).name
        if not find_shards(data.data_dir, train):
            find_folder(Path(data.data_dir), train)
    check_weights(cfg, teacher=True, discretizer=discretizer)


def needed_models(cfg: Config, adversarial: Manifest | None, targets: bool) -> tuple[bool, bool]:
    """Return (teacher is needed, discretizer is needed), given these stores.

    adversarial: the manifest of the store of adversarial images; targets: there is one of targets.
    Raises UsageError if a model is needed and not named.
    """
    method = METHODS[cfg.method]
    if method.linear_probe:
        return True, False
    online = method.uses(Images.ATTACK_TEACHER) and adversarial is None
    teacher = online or (method.teacher_logits(Images.CLEAN) and not targets)
    only_codes = adversarial is not None and adversarial.images == "none"
    attacks_student = method.uses(Images.ATTACK_STUDENT)
    decodes = method.uses(Images.ATTACK_TEACHER) and only_codes
    discretizer = online or attacks_student or decodes
    if teacher and not cfg.teacher.name:
        missing = "adversarial images" if online else "outputs on clean images (--targets)"
        raise UsageError(
            f"--method {cfg.method} needs a teacher: no store contains its {missing}; add --teacher"
        )
    if discretizer and not cfg.discretizer.name:
        why = "no store contains adversarial images"
        if only_codes:
            why = "the store contains codes and no images"
        raise UsageError(
            f"--method {cfg.method} needs a discretizer: {why}; add --discretizer (a VQGAN's "
            "file, identity or jpeg:75)"
        )
    return teacher, discretizer


def check_splits(cfg: Config) -> None:
    """Raise DataError for a split that is missing in an image folder or a list, for a single class,
    for splits of different classes, and for a class map that cannot be read.
    """
    data = cfg.data
    if data.class_map:
        ClassMap.from_csv(data.class_map)
    _check_extra_data(data)
    if is_named(data.data_dir):
        listed = [list_split(data, split) for split in (data.train_split, data.val_split)]
        classes = [found.classes for found in listed if found is not None]
        if len(classes) == 2:
            check_same_classes(cfg, *classes)
        return
    train, val = (find_split(data, split) for split in (data.train_split, data.val_split))
    if train.part and has_no_classes(data):
        raise UsageError(
            "--val-fraction: images without labels cannot validate; name a folder with class "
            "folders by --val-split"
        )
    splits = [train.name, val.name]
    if any(find_shards(data.data_dir, split) for split in splits):
        return
    folders = [find_folder(Path(data.data_dir), split) for split in splits]
    if (
        data.labels == "teacher"
        and not data.class_map
        and not any(item.is_dir() for item in folders[0].iterdir())
    ):
        raise DataError(
            f"{folders[0]}: no class folders in it; with --labels teacher, name the classes of the "
            "teacher in a CSV (id,folder,name) by --class-map"
        )
    if not data.class_map:
        check_same_classes(cfg, *(ClassMap.from_folders(folder) for folder in folders))


def _check_extra_data(data: DataConfig) -> None:
    if data.extra_data and not Path(data.extra_data).is_dir():
        raise DataError(f"--extra-data {data.extra_data}: no such folder; check the path")


def _check_pictures(cfg: Config) -> None:
    if cfg.augment.pixmix_pictures:
        check_pictures(cfg.augment.pixmix_pictures)


def _check_batch_size(cfg: Config) -> None:
    least = DISTANCES[cfg.loss.distance].least_batch
    # "auto" is below 0.
    if METHODS[cfg.method].takes_distance and 0 <= cfg.data.batch_size < least:
        raise UsageError(
            f"--distance {cfg.loss.distance} compares the images of a batch and needs {least} in "
            f"each; a process has {cfg.data.batch_size}: raise --batch-size"
        )


def check_same_classes(cfg: Config, train: ClassMap, val: ClassMap) -> None:
    """Raise DataError for fewer than two classes, or if the splits' class lists differ."""
    if len(train) < 2:
        only = Path(cfg.data.data_dir) / cfg.data.train_split / train.folders[0]
        raise DataError(
            f"--data-dir {cfg.data.data_dir}: one class, {shown(train.names[0])}; a classifier "
            f"needs two{_level_below(only)}"
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


def check_student(cfg: Config) -> None:
    """Raise UsageError for a student that timm does not know."""
    # Imports torch.
    from dad_fast.models.student import student_model

    if not METHODS[cfg.method].linear_probe:
        student_model(cfg.student.name)


def check_backend(cfg: Config) -> None:
    """Raise UsageError for a backend of torch.compile that torch does not know."""
    name = cfg.engine.torchcompile
    if isinstance(name, bool) or name in tuple(Switch):
        return
    # Slow to import.
    from torch._dynamo import list_backends

    known = [known for known in list_backends(exclude_tags=()) if "TESTING" not in known]
    if name not in known:
        usual = ", ".join(list_backends())
        hint = nearest(name, known) or f"; such as {usual}"
        raise UsageError(f"--torchcompile {name}: torch has no such backend{hint}")


def check_weights(cfg: Config, teacher: bool, discretizer: bool) -> None:
    """Raise DataError for a missing file of weights, UsageError for teachers that do not fit
    together.

    teacher, discretizer: True if the run needs them.
    """
    teachers = members(cfg.teacher) if teacher else []
    named = [
        *(("--teacher", _file_of(member.name)) for member in teachers),
        *(("--teacher-head", member.head) for member in teachers),
        ("--discretizer", _file_of(cfg.discretizer.name) if discretizer else ""),
        ("--student-weights", _file_of(cfg.student.weights)),
        ("--init-from", cfg.student.init_from),
    ]
    for flag, name in named:
        if name and not Path(name).exists():
            raise DataError(f"{flag} {name}: no such file; check the path")


def _file_of(name: str) -> str:
    """Return the file in SCHEME:ARCH@FILE or FILE; empty for a name without a file."""
    scheme, colon, _ = name.partition(":")
    if not colon or Path(name).exists():
        # The loader of the model has a better message for a name without a suffix.
        return name if Path(name).suffix else ""
    from_hub = name.startswith("timm:hf-hub:")
    return name.partition("@")[2] if scheme in ("open_clip", "timm") and not from_hub else ""
