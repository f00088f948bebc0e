"""Small run folders for tests of the report, written with the trainer's own writers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dad_fast.config import Config, to_toml
from dad_fast.config.fields import with_values
from dad_fast.files import atomic_write_text
from dad_fast.loggers.run_log import RunLog
from dad_fast.report.pieces import write_pieces
from dad_fast.report.sheet import write_sheet

# A hostile name of a class, run or file: markup, quotes, control and direction characters.
HOSTILE = "<script>alert(1)</script>\"'&amp;\x1b[31m\x00\u202egnp.exe\ud800 אבג " + "w" * 60
CPU = {
    "cpu": "A CPU",
    "threads": 2,
    "cpus": 2,
    "gpus": [],
    "python": "3.11",
    "git": "abc",
    "packages": {"torch": "2.15", "timm": "1.0"},
}
GPU = CPU | {
    "gpus": [{"name": "NVIDIA H200", "memory_gib": 139.8, "capability": "9.0"}],
    "driver": "570",
    "cuda": "13.0",
}
SUITES = ("test", "optdigits", "fog")


def write_json(path: Path, value: Any) -> None:
    """Write JSON in ASCII, which can represent half of a surrogate pair, unlike UTF-8."""
    atomic_write_text(path, json.dumps(value))


def result(top1: float, full: bool = True) -> dict[str, Any]:
    """Return a suite's result; `full` adds the metrics that older records lack."""
    found = {
        "name": "s",
        "num_images": 1000,
        "top1": top1,
        "top5": None,
        "ece": 2.5,
        "nll": 0.5,
        "skipped": 0,
        "by_severity": [],
    }
    if full:
        count = [0] * 5 + [20 * i for i in range(1, 11)]
        confidence = [(i + 0.5) / 15 for i in range(15)]
        reliability = {
            "count": count,
            "confidence": confidence,
            "accuracy": [0.9 * value for value in confidence],
        }
        found |= {
            "top1_interval": [top1 - 1.5, top1 + 1.0],
            "brier": 0.12,
            "ece_adaptive": 2.6,
            "agreement": 91.0,
        }
        found |= {"reliability": reliability, "protocol": "resize 28, no mask"}
    return found


def with_classes(record: dict[str, Any]) -> dict[str, Any]:
    """Add what newer runs record of classes and severities, to each of the record's suites."""
    for result in record["suites"].values():
        result |= {
            "per_class": [100.0, 80.0, None],
            "confusion": {
                "all": True,
                "images": {"0": 50, "1": 50},
                "wrong": {"1": {"0": 8, "2": 2}},
            },
            "by_severity": [95.0, 90.0, 80.0, 70.0, 50.0],
        }
    record["classes"] = ["ant", "bee", "a class with a long name"]
    return record


def record(
    variant: str,
    method: str,
    seed: int,
    top1: float,
    *,
    epochs: float = 2.0,
    seconds: float = 12.4,
    full: bool = True,
) -> dict:
    teacher = {
        "name": "T<1>",
        "seen": "a & b",
        "suites": {name: result(98.0 - i, full) for i, name in enumerate(SUITES)},
    }
    discretizer = {"name": "Q", "seen": "c"} if method == "dad" else None
    return {
        "variant": variant,
        "method": method,
        "seed": seed,
        "epochs": epochs,
        "steps": 20,
        "seconds": seconds,
        "bad_images": 0,
        "student": "resnet18",
        "num_parameters": 310_370,
        "bn": "joint",
        "teacher": None if method == "ce" else teacher,
        "discretizer": discretizer,
        "suites": {name: result(top1 - 10 * i, full) for i, name in enumerate(SUITES)},
    }


def write_log(
    folder: Path, *, rate: float = 1000.0, power: float | None = None, steps: int = 4
) -> None:
    with RunLog(folder) as log:
        for step in range(1, steps + 1):
            gpu = {"gpu": {"power_w": power}, "gpu_memory": 3.0} if power is not None else {}
            values = {
                "loss": 1.0 / step,
                "kept": 0.75,
                "codes_changed": 0.1,
                "img_per_s": rate,
                "data_wait": 0.25,
                **gpu,
            }
            log.metrics("train", step=5 * step, epoch=step / 2, lr=1e-3, **values)
        log.metrics("val", step=5 * steps, epoch=steps // 2, top1=91.5, nll=0.3, ece=1.0)


def write_images(
    folder: Path, *, labels: tuple[str, ...] = ("one", "two"), side: int = 28, codes: int = 7
) -> None:
    generator = torch.Generator().manual_seed(0)
    size = (len(labels), 3, side, side)
    image = torch.nn.functional.interpolate(
        torch.rand(len(labels), 3, 8, 8, generator=generator), side
    )
    attacked = (image + 0.1 * torch.rand(size, generator=generator)).clamp(0, 1)
    write_sheet(folder / "sheet.png", image, image, attacked, labels)
    shift = torch.rand(len(labels), codes, codes, generator=generator) if codes else None
    shift = shift.where(shift > 0.5, 0.0) if shift is not None else None
    examples = [
        {"label": name, "answer": name[::-1], "kept": i % 2 == 0, "filtered": True}
        for i, name in enumerate(labels)
    ]
    write_pieces(
        folder / "sheet.safetensors",
        image,
        image,
        attacked,
        scale=5,
        examples=examples,
        attacked="T<1>",
        shift=shift,
        num_codes=256,
    )


def write_run(
    folder: Path,
    variant: str = "kd",
    method: str = "kd",
    seed: int = 0,
    top1: float = 90.0,
    *,
    finished: bool = True,
    facts: dict[str, Any] = CPU,
    settings: dict[str, Any] | None = None,
    rate: float = 1000.0,
    power: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Write a run's folder and return its record."""
    write_log(folder, rate=rate, power=power)
    cfg = with_values(
        Config(),
        {
            "method": method,
            "seed": seed,
            "data.data_dir": "digits",
            "student.name": "resnet18",
            **(settings or {}),
        },
    )
    atomic_write_text(folder / "config.toml", to_toml(cfg))
    write_json(folder / "run.json", facts | {"variant": variant})
    if method == "dad":
        write_images(folder)
    made = record(variant, method, seed, top1, **more)
    if finished:
        write_json(folder / "results.json", made)
    return made


def write_comparison(
    folder: Path, *, seeds: int = 1, facts: dict[str, Any] = CPU, power: float | None = None
) -> Path:
    """Write CE, KD, KD for as long as DAD, and DAD, as the demo trains them."""
    runs = []
    shapes = (
        ("ce", "ce", 80.0, 1000.0, 2.0, 10.0),
        ("kd", "kd", 90.0, 800.0, 2.0, 12.5),
        ("kd-long", "kd", 91.0, 800.0, 8.0, 50.0),
        ("dad", "dad", 95.0, 200.0, 2.0, 50.0),
    )
    for variant, method, top1, rate, epochs, seconds in shapes:
        for seed in range(seeds):
            more = {
                "rate": rate,
                "epochs": epochs,
                "seconds": seconds,
                "facts": facts,
                "power": power,
            }
            place = folder / variant / f"seed-{seed}"
            runs.append(
                write_run(
                    place,
                    variant,
                    method,
                    seed,
                    top1 + seed,
                    settings={"schedule.epochs": int(epochs)},
                    **more,
                )
            )
    write_json(
        folder / "results.json", {"config": "seeds = 1\n", "environment": facts, "runs": runs}
    )
    return folder
