"""What a weights file says of itself comes from anyone: it is checked before anything is built from it.

A student's file names a timm model and its arguments. Neither may fetch, load or run anything, and the model must fit the file: while
it is built its parameters are counted, and the first one beyond what the file holds ends it.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from dad_fast.data.classes import ClassMap
from dad_fast.errors import DataError

MAX_PATH, MAX_TEXT, MAX_ITEMS, MAX_DEPTH = (
    4500,
    200,
    1000,
    8,
)  # of model_kwargs: characters of a text, values in all, nesting
MAX_NUMBER, MAX_CLASSES, MAX_SIDE, MAX_CONTEXT = 65_536, 1_000_000, 16_384, 4096
MAX_TABLES = 1 << 26  # numbers in buffers
# Arguments that are not the architecture's: timm.create_model's own, and those that its builder takes for itself.
NOT_ARCHITECTURE = {
    name
    for name, p in inspect.signature(timm.create_model).parameters.items()
    if p.kind is not p.VAR_KEYWORD
} | {
    *(
        "features_only",
        "feature_cfg",
        "feature_cls",
        "kwargs_filter",
        "model_cfg",
        "pretrained_filter_fn",
    ),
    *("pretrained_model_args", "pretrained_strict", "pruned", "num_classes", "img_size"),
}


def checked_spec(text: str) -> dict[str, Any]:
    """A student's description from its JSON, every entry of a kind and size that a model can have. Raises ValueError, in few words."""
    rules: dict[str, Callable[[Any], bool]] = {
        **VIEW,
        "name": lambda value: isinstance(value, str) and _is_registered(value),
        "model_kwargs": lambda value: isinstance(value, dict),
        "mean": lambda value: _three(value, -1e3, 1e3),
        "std": lambda value: _three(value, 1e-6, 1e3),
    }
    spec = _checked(text, rules)
    check_model_kwargs(spec["model_kwargs"])
    return spec


def checked_clip(text: str) -> dict[str, Any]:
    """What a CLIP's file says of itself: model_cfg (arguments of open_clip.CLIP), mean, std, and perhaps templates and seen.

    Raises ValueError, in few words, for what is none, what would fetch something, and sizes that no model has.
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
    said = _checked(text, rules, {"templates": [], "seen": ""})
    model_cfg = said["model_cfg"]
    check_values(model_cfg, "model_cfg")
    vision, words = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    if fetched := [key for key in (*vision, *words) if key.startswith("hf_")] + [
        "timm_model_pretrained"
    ] * bool(vision.get("timm_model_pretrained")):
        raise ValueError(f"{fetched[0]} would fetch something")
    if not _is_registered(vision.get("timm_model_name") or "resnet18"):
        raise ValueError(f"timm_model_name is {_short(vision['timm_model_name'])}")
    if not _whole(1, MAX_CONTEXT)(words.get("context_length")):  # its mask is the square of it
        raise ValueError(f"text_cfg.context_length is {_short(words.get('context_length'))}")
    return said


def checked_published(text: str) -> dict[str, Any]:
    """open_clip_config.json: model_cfg and preprocess_cfg, of which quick_gelu, mean and std are used. Raises ValueError, in few words."""

    def normalises(value: Any) -> bool:
        given = isinstance(value, dict) and {
            key: value[key] for key in ("mean", "std") if key in value
        }
        return given == {} or (
            isinstance(given, dict)
            and len(given) == 2
            and _three(given["mean"], -1e3, 1e3)
            and _three(given["std"], 1e-6, 1e3)
        )

    rules: dict[str, Callable[[Any], bool]] = {
        "model_cfg": lambda value: isinstance(value, dict),
        "preprocess_cfg": normalises,
    }
    return _checked(text, rules, {"model_cfg": {}, "preprocess_cfg": {}})


def checked_probe(text: str) -> dict[str, Any]:
    """The same of a linear probe's file. Raises ValueError, in few words."""
    return _checked(
        text,
        {
            **VIEW,
            "name": lambda value: isinstance(value, str) and len(value) <= MAX_PATH,
            "teacher": lambda value: isinstance(value, str) and len(value) <= MAX_PATH,
            "encoder_sha256": lambda value: (
                isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
            ),
            "num_features": _whole(1, MAX_NUMBER),
            "unit_features": lambda value: isinstance(value, bool),
        },
    )


def checked_view(text: str) -> dict[str, Any]:
    """The same of a model that brings its own computation (ONNX): what it is called, what images it takes, how many outputs it has."""
    return _checked(text, VIEW)


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
    """Raises ValueError unless these are arguments of an architecture alone, and of sizes that one can have."""
    if others := sorted(NOT_ARCHITECTURE & set(kwargs)):
        raise ValueError(f"model_kwargs.{others[0]} is no argument of an architecture")
    check_values(kwargs, "model_kwargs")


def check_values(table: Mapping[str, Any], what: str) -> None:
    """Raises ValueError unless everything in `table` is plain, few, and of a size that an architecture's argument can have."""
    values = list(_flat(table, what, 0))
    if len(values) > MAX_ITEMS:
        raise ValueError(f"{what} holds {len(values):,} values")
    for value in values:
        if isinstance(value, (int, float)) and not abs(value) <= MAX_NUMBER:
            raise ValueError(f"{what} holds the number {_short(value)}")
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise ValueError(f"{what} holds a text of {len(value):,} characters")


@contextmanager
def no_more_parameters_than(tensors: Mapping[str, torch.Tensor], path: object) -> Iterator[None]:
    """While it lasts, a model that registers far more parameters than `tensors`, the file at `path`, holds numbers is a DataError.

    Twice as many are let through, since some models build a classifier and replace it, and `MAX_TABLES` more numbers in buffers: masks
    and tables that depend on the image's size and are in no file.
    """
    held = sum(tensor.numel() for tensor in tensors.values())
    left = {
        "parameters": 2 * held + 1_000_000,
        "layers": 2 * len(tensors) + 1000,
        "buffers": 2 * held + MAX_TABLES,
    }

    def count(what: str, number: int) -> None:
        left[what] -= number
        if left[what] < 0:
            raise DataError(
                f"{path}: the model that its metadata names has more {what} than fit the {held:,} numbers in the file"
            )

    def count_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not isinstance(parameter, nn.UninitializedParameter):
            count("parameters", parameter.numel())
        count("layers", 1)

    def count_buffer(module: nn.Module, name: str, buffer: torch.Tensor | None) -> None:
        count("buffers", 0 if buffer is None else buffer.numel())

    # Of every module, so that the first one too many ends it.
    handles = (
        register_module_parameter_registration_hook(count_parameter),
        register_module_buffer_registration_hook(count_buffer),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def without_downloads() -> Iterator[None]:
    """While it lasts, what a hub has is found only where it was fetched before: a file may name it, but only the user may fetch it."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def recorded_classes(path: object, text: str | None, num_classes: int) -> ClassMap:
    """The classes of a file's head, in its order, from its metadata. DataError where there are none, or not as many as outputs."""
    if text is None:
        raise DataError(
            f"{path}: no class list in its metadata, so its outputs have no meaning; was it written by dad-fast?"
        )
    try:
        classes = ClassMap.from_json(text)
    except DataError as error:
        raise DataError(f"{path}: its class list is damaged ({error})") from None
    if len(classes) != num_classes:
        raise DataError(
            f"{path}: damaged: its class list has {len(classes):,} classes, its model {num_classes:,} outputs"
        )
    return classes


def _is_registered(name: str) -> bool:
    """A model of timm's own; a name with a colon or a slash would be a hub's or a folder's."""
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
    """A value in an error: short, on one line, and without the cost of printing a number of a million digits."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    text = repr(value)
    return ascii(text if len(text) <= 40 else text[:40] + "…")[1:-1]


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT


# What a description says of any model: each entry's rule.
VIEW: dict[str, Callable[[Any], bool]] = {
    "name": _text,
    "num_classes": _whole(1, MAX_CLASSES),
    "img_size": _whole(1, MAX_SIDE),
    "crop_pct": _real(0.01, 1.0),
    "interpolation": _text,
}
