"""Training with its data: decoding and augmentation in the same process, as in the demo, and the
real command.

Loader processes would prefetch in another function's turn, which hides their cost. Only the command
is therefore timed with them, by its own log.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.bench import Bench, timed_row
from benchmarks.test_steps import STEPS
from benchmarks.workload import MODELS, Workload, make_workload
from dad_fast.data.loaders.loader import TrainLoader
from dad_fast.data.sources.registry import open_source

ROOT = Path(__file__).resolve().parent.parent
TRAIN_STEPS, MORE_STEPS = 24, 4  # of the command: at first, and after a resume
NUM_CLASSES = 8


def loaded_step(work: Workload, name: str) -> Callable[[], object]:
    cfg = work.with_method(*STEPS[name])
    source = open_source(cfg.data.data_dir, cfg.data.train_split)
    loader = TrainLoader(
        source, cfg.augment, cfg.augment.img_size, len(work.batch.labels), seed=0, workers=0
    )
    batches, step = loader.batches(0, 1_000_000), work.step(cfg)
    return lambda: step(next(batches), 10, cfg.optim.lr)


def test_end_to_end(bench: Bench) -> None:
    if bench.size != "tiny":
        pytest.skip("at this size by the real command")
    work = make_workload("tiny", bench.device, 100)
    flops = work.flops
    names = ["kd", "dat", "dad, paper's order", "dad, authors' order"]
    bench.compare(
        "batch 100, loaded in the process",
        {name: loaded_step(work, name) for name in names},
        baseline="kd",
        work=100,
        config=work.describe(),
        predicted={name: flops.of_step(*STEPS[name][:2]) / flops.of_step("kd") for name in names},
        seconds=15,
    )


def test_command(bench: Bench, tmp_path: Path) -> None:
    """Train with `dad-fast train`, resume for a few more steps, and time the steps by the log."""
    if bench.size != "tiny" and bench.device.type == "cpu":
        pytest.skip("at this size on a GPU")
    run = tmp_path / "run"
    flags, batch_size = settings(bench, tmp_path)
    command = [sys.executable, "-m", "dad_fast", "train", *flags, "--log-every", "2"]
    command += ["--set", "eval.every_epochs=0", "--set", "eval.suites=[]", "-o", str(run)]
    every = ["--checkpoint-every-steps", str(TRAIN_STEPS)]
    train([*command, *every, "--max-steps", str(TRAIN_STEPS)])
    more = ["--max-steps", str(TRAIN_STEPS + MORE_STEPS), "--resume", "auto"]
    train([*command, *every, *more])

    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    windows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    first = [row for row in windows if row["step"] <= TRAIN_STEPS][1:]  # without the warm-up
    seconds = [batch_size / row["img_per_s"] for row in first]
    described = json.loads((run / "run.json").read_text(encoding="utf-8"))
    bench.add(
        f"batch {batch_size}, dad-fast train",
        [timed_row("dad", seconds, seconds, batch_size)],
        baseline="dad",
        work=batch_size,
        config={
            "losses": {row["step"]: row["loss"] for row in windows},
            "data_wait": [row.get("data_wait") for row in first],
            "gpu_memory": max(row.get("gpu_memory", 0.0) for row in windows),
            "choices": described.get("choices", {}),
        },
    )
    assert windows[-1]["step"] == TRAIN_STEPS + MORE_STEPS
    assert all(math.isfinite(row["loss"]) for row in windows)


def train(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stderr.strip().rpartition("\n")[2]


def settings(bench: Bench, folder: Path) -> tuple[list[str], int]:
    """Make what a run needs in `folder`; return flags of dad-fast train and the batch size."""
    device = ["--device", str(bench.device)]
    if bench.size == "tiny":
        return ["--preset", "demo", "--method", "dad", "--epochs", "9", *device], 100

    import timm
    from safetensors.torch import save_file

    from dad_fast.discretizers.vqgan.model import PRESETS, VQGAN

    preset, _, vqgan_name = MODELS[bench.size]
    # From timm, whose file needs no open_clip.
    teacher_name = {
        "base": "vit_base_patch16_clip_224",
        "paper": "vit_large_patch14_clip_224",
    }[bench.size]
    torch.manual_seed(0)
    teacher = timm.create_model(teacher_name, num_classes=NUM_CLASSES)
    save_file(teacher.state_dict(), folder / "teacher.safetensors")
    vqgan = VQGAN(PRESETS[vqgan_name])
    vqgan.save(folder / "vqgan.safetensors", seen="nothing: random weights")
    make_images(folder / "images")
    batch_size = 128
    values = {
        "--preset": preset,
        "--data-dir": folder / "images",
        "--teacher": f"timm:{teacher_name}@{folder / 'teacher.safetensors'}",
        "--discretizer": folder / "vqgan.safetensors",
        "--set": "student.pretrained=false",
        "--batch-size": batch_size,
        "--workers": 8,
    }
    return [*(str(word) for item in values.items() for word in item), *device], batch_size


def make_images(folder: Path, side: int = 320) -> None:
    """Write JPEGs of smooth noise, 400 per class of which 8 differ: the cost of decoding and
    training does not depend on the content.
    """
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 400), ("val", 8)):
        for label in range(NUM_CLASSES):
            target = folder / split / f"class{label}"
            target.mkdir(parents=True)
            for i in range(count):
                path = target / f"{i}.jpg"
                if i >= 8:
                    shutil.copy(target / f"{i % 8}.jpg", path)
                    continue
                small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
                large = small.resize((side, side), Image.Resampling.BICUBIC)
                large.save(path, quality=90)
