"""Limits while a model is built from an untrusted file: its size, and no downloads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from dad_fast.errors import DataError

# Numbers in buffers
MAX_TABLES = 1 << 26


@contextmanager
def no_more_parameters_than(tensors: Mapping[str, torch.Tensor], path: object) -> Iterator[None]:
    """Limit the parameters of models built in this context by `tensors`, the content of `path`.

    The limit is twice the file's size, since some models build a classifier and replace it, and
    `MAX_TABLES` more numbers in buffers: masks and tables that depend on the image size and are not
    saved. Raises DataError beyond it.
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
                f"{path}: the model that its metadata names has more {what} than fit the {held:,} "
                "numbers in the file"
            )

    def count_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not isinstance(parameter, nn.UninitializedParameter):
            count("parameters", parameter.numel())
        count("layers", 1)

    def count_buffer(module: nn.Module, name: str, buffer: torch.Tensor | None) -> None:
        count("buffers", 0 if buffer is None else buffer.numel())

    # Global hooks count while the model is built, before it has filled the memory.
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
    """Restrict the hub's client to its cache in this context.

    A file may name a model of the hub, but only the user may download one.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
