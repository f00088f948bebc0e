"""Evaluation of a model that reads the label from the pixels, for tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("timm")

from imagenet_folders import Reader, wnids

from dad_fast.config.schema import DataConfig, EvalConfig
from dad_fast.data.augment.view import View
from dad_fast.data.classes import ClassMap
from dad_fast.evaluation.metrics.result import Result
from dad_fast.evaluation.runner import evaluate, open_suites
from dad_fast.evaluation.suites.imagenet import imagenet_classes

WNIDS = wnids()
CPU = torch.device("cpu")
PARTIAL = EvalConfig(allow_partial=True)


def evaluated(
    name: str,
    model: torch.nn.Module | None = None,
    classes: ClassMap | None = None,
    options: EvalConfig = PARTIAL,
    **more,
) -> Result:
    suite = open_suites([name], DataConfig(data_dir="."), classes or imagenet_classes(), options)[0]
    settings = {
        "view": View(8, 1.0, "bilinear"),
        "batch_size": 64,
        "workers": 0,
    } | more
    return evaluate(model or Reader(), suite.source, name=suite.name, device=CPU, **settings)


def numbers_of(folders) -> dict[str, int]:
    return {wnid: WNIDS.index(wnid) for wnid in folders}


def shuffled_map(chosen: list[str], seed: int = 0, names: bool = False) -> ClassMap:
    """Return a class list in another order than ImageNet's; `names`: names as folders."""
    of = imagenet_classes()
    order = np.random.default_rng(seed).permutation(len(chosen))
    text = [of.names[of.folders.index(chosen[i])] for i in order]
    return ClassMap(
        tuple(
            (k, text[k].replace(" ", "_") if names else chosen[i], text[k])
            for k, i in enumerate(order)
        )
    )


class OfMap(torch.nn.Module):
    """A model of some classes, for images whose colours encode ImageNet's numbers."""

    def __init__(self, numbers: list[int]) -> None:
        super().__init__()
        self.output = torch.full((1024,), len(numbers), dtype=torch.int64)
        self.output[torch.tensor(numbers)] = torch.arange(len(numbers))
        self.size = len(numbers)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        number = Reader()(pixels).argmax(1)
        hot = torch.nn.functional.one_hot(self.output[number], self.size + 1)
        return 5 * hot[:, : self.size].float()
