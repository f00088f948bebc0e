"""Perceptual term: distance of the feature maps of a frozen timm model.

Features of each level are scaled to length 1 over the channels, as in LPIPS (arXiv 1801.03924), but
without its learned weights. timm is used because it is a dependency with any network and local
weights; the packages of LPIPS are further ones, and download the weights of their networks.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from torch import Tensor, nn

from dad_fast.config.fields import nearest
from dad_fast.errors import EnvironmentProblem, UsageError
from dad_fast.models.weights.files import read_state_dict
from dad_fast.models.weights.hub import hub_client, reason_of
from dad_fast.models.weights.timm_files import (
    classifier_keys,
    create_timm,
    fit_timm,
    load_fitted,
    on_meta_device,
)


class Perceptual(nn.Module):
    """Distance of images in the features of `model`, frozen and in evaluation mode."""

    def __init__(self, model: Any, name: str) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        data = resolve_data_config({}, model=model)
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(data[key]).view(1, 3, 1, 1), persistent=False)
        self.channels_last = getattr(model, "output_fmt", "") == "NHWC"
        self.found: list[Tensor] = []
        info = getattr(model, "feature_info", None)
        modules = [level["module"] for level in info] if isinstance(info, list) else []
        if not modules:
            raise UsageError(
                f"--perceptual {name}: timm names no feature maps of it; take resnet18"
            )
        for module in modules:
            model.get_submodule(module).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.found.append(output)

    def forward(self, decoded: Tensor, pixels: Tensor) -> Tensor:
        """Return the mean over levels of the squared distance at a position, in [0, 4].

        decoded: [B, 3, H, W], near [0, 1]. pixels: in [0, 1], without a gradient.
        """
        with torch.no_grad():
            theirs = self._features(pixels)
        ours = self._features(decoded)
        levels = [
            (own - other).square().sum(dim=-1).mean()
            for own, other in zip(ours, theirs, strict=True)
        ]
        return torch.stack(levels).mean()

    def _features(self, pixels: Tensor) -> list[Tensor]:
        """Return the features of each level with unit length, channels last."""
        self.found = []
        self.model.forward_features((pixels - self.mean) / self.std)
        found, self.found = self.found, []
        maps = found if self.channels_last else [_channels_last(level) for level in found]
        return [F.normalize(level.float(), dim=-1, eps=1e-6) for level in maps]


def _channels_last(level: Tensor) -> Tensor:
    """Move channels last; the tokens of transformers [B, N, C] have them there."""
    return level.movedim(1, -1) if level.ndim == 4 else level


def load_perceptual(text: str, side: int, device: torch.device) -> Perceptual:
    """Load `NAME` (published weights) or `NAME@FILE`, a model of timm, for images of `side` px.

    Raises UsageError for a model that timm does not have or that cannot take such images,
    DataError for a file that does not fit, EnvironmentProblem where weights cannot be downloaded.
    """
    name, _, file = text.removeprefix("timm:").partition("@")
    if not timm.is_model(name.partition(".")[0]):
        near = nearest(name, timm.list_models())
        raise UsageError(f"--perceptual {text}: timm has no such model{near}")
    model = _from_file(name, file, side) if file else _published(name, side)
    found = Perceptual(model, text).to(device)
    probe = torch.zeros(1, 3, side, side, device=device)
    try:
        found(probe, probe)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"--perceptual {text}: cannot take images of {side} px ({reason_of(error)}); take a "
            "convolutional network such as resnet18"
        ) from None
    return found


def _published(name: str, side: int) -> nn.Module:
    try:
        with hub_client():
            return create_timm(name, side, pretrained=True)
    except Exception as error:  # the hub's client has errors of its own
        raise EnvironmentProblem(
            f"--perceptual {name}: not available ({reason_of(error)}); give {name}@FILE"
        ) from None


def _from_file(name: str, file: str, side: int) -> nn.Module:
    state, _ = read_state_dict(file)
    reference = on_meta_device(lambda: create_timm(name, side, pretrained=False))
    state = fit_timm(state, reference, file, lambda: create_timm(name, side, pretrained=True))
    classifier = state.get((classifier_keys(reference) or ["head.weight"])[0])
    num_classes = 0 if classifier is None else classifier.shape[0]
    model = create_timm(name, side, pretrained=False, num_classes=num_classes)
    load_fitted(model, state, file)
    return model
