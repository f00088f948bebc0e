"""Training with either loader: equal sequences of samples, accuracy within the seeds' spread."""

from __future__ import annotations

import json
import statistics

import pytest

pytest.importorskip("torch")
for package in ("timm", "open_clip", "mlxtend", "sklearn", "nvidia.dali"):
    pytest.importorskip(package)
from dad_fast.cli.main import main
from dad_fast.data.sources.registry import open_source

SEEDS = 3
STUDENT = (
    "student.model_kwargs={layers=[1,1,1,1],channels=[16,32,64,128],stem_type='deep',stem_width=8}"
)

SETTINGS = """
    --method ce --student resnet18 --img-size 28 --device cpu -b 100 -j 1 --epochs 8 --warmup-epochs
    1 --lr 3e-3 --val-every 0 --scale 0.7 1.0 --hflip 0 --aa rand-m5-n1-mstd0.5 --reprob 0.1 --mixup
    0.2 --crop-pct 1.0
"""


def write_digits(root) -> None:
    """The embedded digits as folders of JPEGs."""
    for split in ("train", "val"):
        source = open_source("embedded:digits", split)
        for label in source.classes.folders:
            (root / split / label).mkdir(parents=True)
        for i in range(len(source)):
            source.read(i).save(
                root / split / source.classes.folders[source.labels[i]] / f"{i}.jpg", quality=95
            )


@pytest.mark.slow  # six trainings of some twenty seconds
@pytest.mark.timeout(1200)
def test_accuracy_is_within_the_spread_of_the_seeds(tmp_path):
    write_digits(tmp_path / "data")
    found: dict[str, list[float]] = {}
    for loader in ("torchvision", "dali"):
        for seed in range(SEEDS):
            out = tmp_path / f"{loader}-{seed}"
            given = [
                "--data-dir",
                str(tmp_path / "data"),
                "--set",
                STUDENT,
                "--seed",
                str(seed),
                "--loader",
                loader,
                "-o",
                str(out),
            ]
            assert main(["train", *SETTINGS.split(), *given]) == 0
            record = json.loads((out / "results.json").read_text())
            found.setdefault(loader, []).append(record["suites"]["val"]["top1"])
            assert json.loads((out / "run.json").read_text())["loader"] == loader
    means, spreads = (
        {loader: f(values) for loader, values in found.items()}
        for f in (statistics.mean, statistics.stdev)
    )
    print(found)
    standard_error = (sum(spread**2 for spread in spreads.values()) / SEEDS) ** 0.5
    assert abs(means["dali"] - means["torchvision"]) < 3 * standard_error + 0.2, found
