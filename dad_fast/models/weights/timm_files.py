"""Weights files of timm models: entries under the names and in the sizes of the model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import timm.models._builder as timm_builder
import torch
from torch import Tensor, nn

from dad_fast.models.weights.files import load_strictly
from dad_fast.models.weights.limits import without_downloads
from dad_fast.models.weights.unwrap import unwrap

log = logging.getLogger(__name__)

# (entries of a file, model) -> entries of the model
Filter = Callable[..., dict[str, Tensor]]

# Buffers that older files lack or that a model computes itself
COMPUTED = ("num_batches_tracked", "relative_position_index", "attn_mask")


def fit_timm(
    state: Mapping[str, Tensor], model: nn.Module, path: str | Path, create: Callable[[], nn.Module]
) -> dict[str, Tensor]:
    """Return the entries of a file as `model` takes them, but for its classifier.

    Strips wrappers and leftovers. Entries that then do not fit go through the architecture's own
    checkpoint filter, as timm's pretrained weights do: it renames entries of original releases and
    resizes position embeddings, which is logged. `model` may be on the meta device. create: builds
    the same model with `pretrained=True`; nothing is downloaded.
    """
    own = model.state_dict()
    head = classifier_keys(model)
    given = unwrap(state, path, own)
    filtered = None if _fits(given, own, head) else _filtered(given, create)
    if filtered is None:
        return given
    resized = [
        f"{key} {list(given[key].shape)} to {list(filtered[key].shape)}"
        for key in filtered
        if key in given and given[key].numel() != filtered[key].numel()
    ]
    if resized and _fits(filtered, own, head):
        more = f" and {len(resized) - 2} more" if len(resized) > 2 else ""
        log.warning("%s: resized to the model: %s%s", path, ", ".join(resized[:2]), more)
    return filtered


def load_fitted(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load the entries of `fit_timm` strictly; buffers that the file lacks stay the model's."""
    own = model.state_dict()
    computed = {key: own[key] for key in own if _is_computed(key) and key not in state}
    load_strictly(model, {**state, **computed}, path)


def classifier_keys(model: nn.Module) -> list[str]:
    """Return the keys of a timm model's classifier, or of several; empty if it names none."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    return [key for key in model.state_dict() if prefixes and key.startswith(prefixes)]


def create_timm(name: str, img_size: int, **arguments: Any) -> nn.Module:
    """Build a timm model for square images of `img_size` pixels; 0 is the model's own size.

    Pretrained position embeddings are resized by timm.
    """
    if img_size:
        # Vision transformers need the image size, convolutional networks do not take it.
        try:
            return timm.create_model(name, img_size=img_size, **arguments)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
    return timm.create_model(name, **arguments)


def on_meta_device(create: Callable[[], nn.Module]) -> nn.Module:
    """Build a model without its numbers. The state of the random numbers stays as it was."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return create()
        except Exception:
            # Some models need values while they are built. This line reports any other error.
            return create()


def _is_computed(key: str) -> bool:
    return key.rpartition(".")[2] in COMPUTED


def _fits(state: Mapping[str, Tensor], own: Mapping[str, Tensor], head: list[str]) -> bool:
    """Return whether names and shapes are the model's, but for its classifier and buffers."""
    body = {key for key in own if key not in head and (key in state or not _is_computed(key))}
    return set(state) - set(head) == body and all(state[k].shape == own[k].shape for k in body)


def _filtered(state: Mapping[str, Tensor], create: Callable[[], nn.Module]) -> Any:
    """Apply the filter of the model's architecture; None if it has none or cannot read the file."""
    for build in (on_meta_device, _on_cpu):
        try:
            with without_downloads(), _captured_filter() as found:
                model = build(create)
            if not found:
                return None
            with torch.no_grad():
                filtered = found[-1](dict(state), model)
        except Exception:
            # Filters read names and values of the files they know, and raise anything for others.
            continue
        if not any(tensor.is_meta for tensor in filtered.values()):
            return filtered
    return None


def _on_cpu(create: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return create()


@contextmanager
def _captured_filter() -> Iterator[list[Filter]]:
    """Collect the checkpoint filters of models that are built as pretrained; load nothing.

    timm hands the filter of an architecture only to the function that loads pretrained weights.
    """
    found: list[Filter] = []

    def load_pretrained(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("filter_fn") is not None:
            found.append(kwargs["filter_fn"])

    before = timm_builder.load_pretrained
    timm_builder.load_pretrained = load_pretrained
    try:
        yield found
    finally:
        timm_builder.load_pretrained = before
