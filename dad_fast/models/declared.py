"""What a weights file says of itself comes from anyone: it is checked before anything is built from it.

A student's file names a timm model and its arguments. Neither may fetch, load or run anything, and the model must fit the file: while
it is built its parameters are counted, and the first one beyond what the file holds ends it.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from dad_fast.data.classes import ClassMap
from dad_fast.errors import DataError

MAX_TEXT, MAX_ITEMS, MAX_DEPTH = 200, 1000, 8  # of model_kwargs: characters of a text, values in all, nesting
MAX_NUMBER, MAX_CLASSES, MAX_SIDE = 65_536, 1_000_000, 16_384
# Arguments that are not the architecture's: timm.create_model's own, and those that its builder takes for itself.
NOT_ARCHITECTURE = {name for name, p in inspect.signature(timm.create_model).parameters.items() if p.kind is not p.VAR_KEYWORD} | {
    *("features_only", "feature_cfg", "feature_cls", "kwargs_filter", "model_cfg", "pretrained_filter_fn"),
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


def checked_view(text: str) -> dict[str, Any]:
    """The same of a model that brings its own computation (ONNX): what it is called, what images it takes, how many outputs it has."""
    return _checked(text, VIEW)


def _checked(text: str, rules: Mapping[str, Callable[[Any], bool]]) -> dict[str, Any]:
    try:
        spec = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(spec, dict):
        raise ValueError("not a JSON object")
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
    values = list(_flat(kwargs, 0))
    if len(values) > MAX_ITEMS:
        raise ValueError(f"model_kwargs holds {len(values):,} values")
    for value in values:
        if isinstance(value, (int, float)) and not abs(value) <= MAX_NUMBER:
            raise ValueError(f"model_kwargs holds the number {_short(value)}")
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise ValueError(f"model_kwargs holds a text of {len(value):,} characters")


@contextmanager
def no_more_parameters_than(tensors: Mapping[str, torch.Tensor], path: object) -> Iterator[None]:
    """While it lasts, a model that registers far more parameters than `tensors`, the file at `path`, holds numbers is a DataError.

    Twice as many are let through, since some models build a classifier and replace it.
    """
    held = sum(tensor.numel() for tensor in tensors.values())
    left = 2 * held + 1_000_000

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        left -= parameter.numel() if parameter is not None and not isinstance(parameter, nn.UninitializedParameter) else 0
        if left < 0:
            raise DataError(f"{path}: the model that its metadata names has more parameters than the {held:,} numbers in the file")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def recorded_classes(path: object, text: str | None, num_classes: int) -> ClassMap:
    """The classes of a file's head, in its order, from its metadata. DataError where there are none, or not as many as outputs."""
    if text is None:
        raise DataError(f"{path}: no class list in its metadata, so its outputs have no meaning; was it written by dad-fast?")
    try:
        classes = ClassMap.from_json(text)
    except DataError as error:
        raise DataError(f"{path}: its class list is damaged ({error})") from None
    if len(classes) != num_classes:
        raise DataError(f"{path}: damaged: its class list has {len(classes):,} classes, its model {num_classes:,} outputs")
    return classes


def _is_registered(name: str) -> bool:
    """A model of timm's own; a name with a colon or a slash would be a hub's or a folder's."""
    return len(name) <= MAX_TEXT and not set(name) & set(":/\\") and timm.is_model(name.partition(".")[0])


def _flat(value: Any, depth: int) -> Iterator[Any]:
    if depth > MAX_DEPTH:
        raise ValueError("model_kwargs is nested too deep")
    if isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _flat(item, depth + 1)
    elif value is None or isinstance(value, (bool, int, float, str)):
        yield value
    else:
        raise ValueError(f"model_kwargs holds a {type(value).__name__}")


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _real(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and low <= value <= high


def _three(values: Any, low: float, high: float) -> bool:
    real = _real(low, high)
    return isinstance(values, list) and len(values) == 3 and all(real(value) and math.isfinite(value) for value in values)


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
