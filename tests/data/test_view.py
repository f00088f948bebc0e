"""The evaluation view: every pass over images uses all of it, squashing included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dad_fast.config.schema import AugmentConfig
from dad_fast.data.augment.execute import eval_transform
from dad_fast.data.augment.view import View
from dad_fast.data.classes import ClassMap
from dad_fast.data.loaders.blocks import blocks
from dad_fast.evaluation.models import EvalModel
from dad_fast.evaluation.suites.base import EvalSet, as_eval_set
from dad_fast.models.student import Student
from dad_fast.tools.average.soup import estimate_batch_norm
from dad_fast.tools.calibrate import fit

CPU = torch.device("cpu")
SQUASHED = View(8, 1.0, "bilinear", squashed=True)


class WhiteEnds:
    """Four images 32 x 8 that are black in the middle and white at both ends, which a centre crop
    cuts off.
    """

    name, max_bad_share, fingerprint = "white-ends", 0.0, "white-ends"
    classes = ClassMap(((0, "a", "a"), (1, "b", "b")))
    labels = np.array([0, 1, 0, 1], dtype=np.int64)
    keys = ("0", "1", "2", "3")
    sizes = np.full((4, 2), (32, 8), dtype=np.int32)
    ok = np.ones(4, dtype=bool)

    def __len__(self) -> int:
        return 4

    def read(self, index: int) -> Image.Image:
        pixels = np.zeros((8, 32, 3), dtype=np.uint8)
        pixels[:, :8] = pixels[:, 24:] = 250 - index
        return Image.fromarray(pixels)

    def encoded(self, index: int) -> None:
        return None


def student(model: nn.Module, view: View) -> Student:
    spec = {
        "name": "tiny",
        "num_classes": 2,
        "img_size": view.image_size,
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
        "crop_pct": view.crop_pct,
        "interpolation": view.interpolation,
        "squashed": view.squashed,
    }
    return Student(model, spec)


def test_settings_replace_parts_of_a_view() -> None:
    assert SQUASHED.with_settings(AugmentConfig()) == SQUASHED
    changed = SQUASHED.with_settings(AugmentConfig(img_size=16, crop_pct=0.9))
    assert changed == View(16, 0.9, "bilinear", squashed=True)
    suite = EvalSet("fixed", (), WhiteEnds.classes, view=(0.5, "bicubic"))
    assert suite.view_for(SQUASHED) == View(8, 0.5, "bicubic")
    assert as_eval_set(WhiteEnds()).view_for(SQUASHED) == SQUASHED


@pytest.mark.parametrize("squashed", [False, True])
def test_batch_norm_is_estimated_on_the_views_of_evaluation(squashed: bool) -> None:
    model = student(nn.BatchNorm2d(3), SQUASHED._replace(squashed=squashed))
    estimate_batch_norm(model, WhiteEnds(), 2, 0, CPU)
    assert (model.model.running_mean > 0.3).all() == squashed


@pytest.mark.parametrize("squashed", [False, True])
def test_a_store_holds_the_views_of_evaluation(squashed: bool) -> None:
    view = SQUASHED._replace(squashed=squashed)
    (block,) = blocks(WhiteEnds(), [0], 4, view, 0)
    for image, row in zip(block.images, range(4), strict=True):
        expected = eval_transform(WhiteEnds().read(row), *view)
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)
    assert bool(block.images.any()) == squashed
    assert view.record().get("squashed", False) == squashed


def test_a_temperature_is_fitted_on_squashed_images() -> None:
    seen = []

    class Model(nn.Module):
        def forward(self, pixels):
            seen.append(pixels.mean().item())
            return torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]])

    model = student(Model(), SQUASHED)
    subject = EvalModel("tiny", "tiny", model, WhiteEnds.classes, model.view)
    fit(subject, as_eval_set(WhiteEnds()), "val", subject.view, 4, 0, CPU, lambda done, total: None)
    assert seen == [pytest.approx(0.5, abs=0.1)]
