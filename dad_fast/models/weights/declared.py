"""Checks of the metadata in weights files: untrusted input, from which models are built.

A student's file names a timm model and its arguments. Neither may download, load or run anything.
limits.py bounds the size of the model that is built from them.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import timm

from dad_fast.data.classes import ClassMap
from dad_fast.errors import DataError

# Keys of a file's metadata: a student, a linear probe in place of a student, a teacher, the classes
# of the head, and the temperature of its logits.
STUDENT = "dad_fast.student"
PROBE = "dad_fast.probe"
TEACHER = "dad_fast.teacher"
CLASSES = "dad_fast.classes"
TEMPERATURE = "dad_fast.temperature"

# Limits of nested settings: characters of a string, number of values, depth, size of a number.
MAX_TEXT = 200
MAX_ITEMS = 1000
MAX_DEPTH = 8
MAX_NUMBER = 65_536

MAX_PATH = 4500
MAX_CLASSES = 1_000_000
MAX_SIDE = 16_384
MAX_CONTEXT = 4096

# Arguments that do not belong to an architecture: those of timm.create_model and those of its model
# builder.
NOT_ARCHITECTURE = {
    name
    for name, parameter in inspect.signature(timm.create_model).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD
} | {
    "features_only",
    "feature_cfg",
    "feature_cls",
    "kwargs_filter",
    "model_cfg",
    "pretrained_filter_fn",
    "pretrained_model_args",
    "pretrained_strict",
    "pruned",
    "num_classes",
    "img_size",
}


def checked_spec(text: str) -> dict[str, Any]:
    """Parse and check the metadata of a student.

    Raises ValueError for an entry of the wrong type or size.
    """
    rules: dict[str, Callable[[Any], bool]] = {
        **VIEW,
        "name": lambda value: isinstance(value, str) and _is_registered(value),
        "model_kwargs": lambda value: isinstance(value, dict),
        "mean": lambda value: _three(value, -1e3, 1e3),
        "std": lambda value: _three(value, 1e-6, 1e3),
    }
    spec = _checked(text, rules, VIEW_DEFAULTS)
    check_model_kwargs(spec["model_kwargs"])
    return spec


def checked_clip(text: str) -> dict[str, Any]:
    """Parse and check the metadata of a CLIP.

    It has model_cfg (arguments of open_clip.CLIP), mean, std, and optionally templates and seen.

    Raises ValueError for an entry of the wrong type or size, or one that would download something.
    """
    rules: dict[str, Callable[[Any], bool]] = {
        "model_cfg": lambda value: (
            isinstance(value, dict)
            and all(isinstance(value.get(key), dict) for key in ("vision_cfg", "text_cfg"))
        ),
        "mean": lambda value: _three(value, -1e3, 1e3),
        "std": lambda value: _three(value, 1e-6, 1e3),
        "templates": lambda value: (
            isinstance(value, list) and len(value) <= MAX_ITEMS and all(map(_text, value))
        ),
        "seen": lambda value: isinstance(value, str) and len(value) <= 10 * MAX_TEXT,
    }
    declared = _checked(text, rules, {"templates": [], "seen": ""})
    model_cfg = declared["model_cfg"]
    check_values(model_cfg, "model_cfg")
    vision_cfg, text_cfg = model_cfg["vision_cfg"], model_cfg["text_cfg"]

    downloads = [key for key in (*vision_cfg, *text_cfg) if key.startswith("hf_")]
    if vision_cfg.get("timm_model_pretrained"):
        downloads.append("timm_model_pretrained")
    if downloads:
        raise ValueError(f"{downloads[0]} would download something")
    if not _is_registered(vision_cfg.get("timm_model_name") or "resnet18"):
        raise ValueError(f"timm_model_name is {_short(vision_cfg['timm_model_name'])}")
    # The attention mask has context_length^2 entries.
    context_length = text_cfg.get("context_length")
    if not _whole(1, MAX_CONTEXT)(context_length):
        raise ValueError(f"text_cfg.context_length is {_short(context_length)}")
    return declared


def checked_published(text: str) -> dict[str, Any]:
    """Parse and check an open_clip_config.json, of which quick_gelu, mean and std are used.

    Raises ValueError for an entry of the wrong type or size.
    """

    def has_valid_normalisation(value: Any) -> bool:
        if not isinstance(value, dict):
            return False
        given = [key for key in ("mean", "std") if key in value]
        if not given:
            return True
        return (
            len(given) == 2 and _three(value["mean"], -1e3, 1e3) and _three(value["std"], 1e-6, 1e3)
        )

    rules: dict[str, Callable[[Any], bool]] = {
        "model_cfg": lambda value: isinstance(value, dict),
        "preprocess_cfg": has_valid_normalisation,
    }
    return _checked(text, rules, {"model_cfg": {}, "preprocess_cfg": {}})


def checked_probe(text: str) -> dict[str, Any]:
    """Parse and check the metadata of a linear probe.

    Raises ValueError for an entry of the wrong type or size.
    """
    return _checked(
        text,
        {
            **VIEW,
            "name": lambda value: isinstance(value, str) and len(value) <= MAX_PATH,
            "teacher": lambda value: isinstance(value, str) and len(value) <= MAX_PATH,
            "encoder_sha256": lambda value: (
                isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
            ),
            "encoder_size": _whole(0, MAX_SIDE),
            "num_features": _whole(1, MAX_NUMBER),
            "unit_features": lambda value: isinstance(value, bool),
        },
        # Older files do not record the encoder's input size.
        {**VIEW_DEFAULTS, "encoder_size": 0},
    )


def checked_temperature(text: str) -> dict[str, Any]:
    """Parse and check the temperature of a calibrated model.

    Raises ValueError.
    """
    return _checked(
        text,
        {
            "temperature": _real(1e-3, 1e3),
            "split": lambda value: isinstance(value, str) and len(value) <= MAX_PATH,
            "num_images": _whole(1, 1 << 40),
        },
    )


def checked_view(text: str) -> dict[str, Any]:
    """Parse and check the metadata of an ONNX model: name, classes, evaluation view.

    Raises ValueError.
    """
    return _checked(text, VIEW, VIEW_DEFAULTS)


def _checked(
    text: str, rules: Mapping[str, Callable[[Any], bool]], defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    try:
        spec = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(spec, dict):
        raise ValueError("not a JSON object")
    spec = {**(defaults or {}), **spec}
    for key, holds in rules.items():
        if key not in spec:
            raise ValueError(f"no {key}")
        if not holds(spec[key]):
            raise ValueError(f"{key} is {_short(spec[key])}")
    return {key: spec[key] for key in rules}


def check_model_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError unless `kwargs` are arguments of an architecture, of plausible size."""
    others = sorted(NOT_ARCHITECTURE & set(kwargs))
    if others:
        raise ValueError(f"model_kwargs.{others[0]} is no argument of an architecture")
    check_values(kwargs, "model_kwargs")


def check_values(table: Mapping[str, Any], what: str) -> None:
    """Raise ValueError unless `table` holds few plain values of plausible size."""
    values = list(_flat(table, what, 0))
    if len(values) > MAX_ITEMS:
        raise ValueError(f"{what} holds {len(values):,} values")
    for value in values:
        if isinstance(value, (int, float)) and not abs(value) <= MAX_NUMBER:
            raise ValueError(f"{what} holds the number {_short(value)}")
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise ValueError(f"{what} holds a text of {len(value):,} characters")


def recorded_classes(path: object, text: str | None, num_classes: int) -> ClassMap:
    """Return the classes of a file's outputs, in order, from its metadata.

    Raises DataError if they are missing or do not fit.
    """
    if text is None:
        raise DataError(
            f"{path}: no class list in its metadata, so its outputs have no meaning; was it "
            "written by dad-fast?"
        )
    try:
        classes = ClassMap.from_json(text)
    except DataError as error:
        raise DataError(f"{path}: its class list is damaged ({error})") from None
    if len(classes) != num_classes:
        raise DataError(
            f"{path}: damaged: its class list has {len(classes):,} classes, its model "
            f"{num_classes:,} outputs"
        )
    return classes


def check_classes(where: str, metadata: Mapping[str, str], classes: ClassMap) -> None:
    """Raise DataError if the metadata has another class list than `classes`, by folder."""
    if CLASSES not in metadata:
        return
    own = ClassMap.from_json(metadata[CLASSES])
    if len(own) != len(classes):
        raise DataError(
            f"{where}: its class list has {len(own)} classes, the data {len(classes)}; "
            "give the --class-map it was made with"
        )
    for (number, folder, _), (_, expected, _) in zip(own, classes, strict=True):
        if folder != expected:
            raise DataError(
                f"{where}: its class {number} is {folder!r}, the data's is {expected!r}; "
                "give the --class-map it was made with"
            )


def probe_spec(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the description of a linear probe from its file's metadata.

    Raises DataError if it is missing or damaged.
    """
    if PROBE not in metadata:
        raise DataError(
            f"{path}: not a linear probe of dad-fast (no {PROBE} in its metadata); "
            "name the run of an --method lp-clip"
        )
    try:
        return checked_probe(metadata[PROBE])
    except ValueError as error:
        raise DataError(f"{path}: its metadata {PROBE} is damaged ({error})") from None


def check_encoder(where: str, spec: Mapping[str, Any], sha256: str) -> None:
    """Raise DataError unless `sha256` is the fingerprint of the probe's encoder."""
    expected = spec["encoder_sha256"]
    if expected != sha256:
        raise DataError(
            f"{where}: this probe belongs to another encoder ({expected[:12]}…) than "
            f"{spec['teacher']} now is ({sha256[:12]}…); give the weights that it was trained on"
        )


def _is_registered(name: str) -> bool:
    """Return whether timm itself has the model.

    A name with a colon or a slash would be that of a hub or a folder.
    """
    return (
        len(name) <= MAX_TEXT
        and not set(name) & set(":/\\")
        and timm.is_model(name.partition(".")[0])
    )


def _flat(value: Any, what: str, depth: int) -> Iterator[Any]:
    if depth > MAX_DEPTH:
        raise ValueError(f"{what} is nested too deep")
    if isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _flat(item, what, depth + 1)
    elif value is None or isinstance(value, (bool, int, float, str)):
        yield value
    else:
        raise ValueError(f"{what} holds a {type(value).__name__}")


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _real(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and low <= value <= high


def _three(values: Any, low: float, high: float) -> bool:
    real = _real(low, high)
    return (
        isinstance(values, list)
        and len(values) == 3
        and all(real(value) and math.isfinite(value) for value in values)
    )


def _short(value: Any) -> str:
    """Format a value for a one-line error, without printing a number of a million digits."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    text = repr(value)
    return ascii(text if len(text) <= 40 else text[:40] + "…")[1:-1]


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT


# Rules of the entries that every model has.
VIEW: dict[str, Callable[[Any], bool]] = {
    "name": _text,
    "num_classes": _whole(1, MAX_CLASSES),
    "img_size": _whole(1, MAX_SIDE),
    "crop_pct": _real(0.01, 4.0),
    "interpolation": _text,
    # The evaluation's view is the whole image, squashed to a square.
    "squashed": lambda value: isinstance(value, bool),
}
# Files of older versions have centre crops.
VIEW_DEFAULTS = {"squashed": False}
