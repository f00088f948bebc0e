"""Loaders: a sequence that depends on (seed, step) only, bad files, and one-line failures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dad_fast.config.schema import AugmentConfig
from dad_fast.data.augment.execute import execute
from dad_fast.data.augment.records import mix_record, sample_record
from dad_fast.data.augment.view import View
from dad_fast.data.classes import ClassMap
from dad_fast.data.loaders import workers
from dad_fast.data.loaders.choose import resolve_loader, train_loader
from dad_fast.data.loaders.loader import EvalLoader, TrainLoader
from dad_fast.data.loaders.steps import epoch_order
from dad_fast.data.sources.decode import DecodeError
from dad_fast.errors import DadFastError, DataError, EnvironmentProblem, UsageError
from tests.processes import HANG, wait_until

AUG = AugmentConfig(mixup=0.8, cutmix=1.0, mixup_prob=0.9, reprob=0.25)
PLAIN = AugmentConfig(crop="center", hflip=0.0, color_jitter=0.0)


class Squares:
    """A source of one-coloured images; `bad` fail after indexing, `known_bad` in the index."""

    name = "squares"
    fingerprint = "squares"

    def __init__(self, num=50, bad=(), known_bad=(), max_bad_share=1.0, action=""):
        self.classes = ClassMap(((0, "a", "a"), (1, "b", "b")))
        self.keys = [f"image{i}" for i in range(num)]
        self.labels = np.arange(num, dtype=np.int64) % 2
        self.sizes = np.full((num, 2), 12, dtype=np.int32)
        self.ok = ~np.isin(np.arange(num), known_bad)
        self.bad, self.max_bad_share, self.action = set(bad), max_bad_share, action

    def __len__(self):
        return len(self.labels)

    def read(self, index):
        if index in self.bad:
            if self.action == "bug":
                raise ZeroDivisionError("a mistake")
            if self.action == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.action in ("hang", "slow"):
                time.sleep(3600 if self.action == "hang" else 2)
            if self.action == "resized":
                return Image.new("RGB", (5, 5))
            if self.action != "slow":
                raise DecodeError(f"image{index}: truncated")
        return Image.new("RGB", (12, 12), (index % 256, index // 256, 7))

    def describe(self):
        return self.name


def collect(loader, start, stop):
    batches = list(loader.batches(start, stop))
    return {
        name: torch.cat([getattr(b, name) for b in batches])
        for name in ("images", "labels", "samples", "seeds", "mix_kind", "mix_lam", "mix_box")
    }


def assert_same(a, b):
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_batch_fields():
    (batch,) = TrainLoader(Squares(), AUG, 8, 10, 0, 0).batches(7, 8)
    assert batch.images.shape == (10, 3, 8, 8) and batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert all(
        getattr(batch, n).dtype == torch.int64
        for n in ("labels", "samples", "seeds", "mix_kind", "mix_box")
    )
    assert batch.mix_lam.dtype == torch.float32 and batch.mix_box.shape == (10, 4)
    assert (batch.epoch, batch.step, batch.replaced) == (1, 7, ())
    assert torch.equal(batch.labels, batch.samples % 2)
    pairs = batch.mix_lam.view(5, 2)
    assert torch.equal(pairs[:, 0], pairs[:, 1])
    assert batch.to("cpu").step == 7


def test_an_epoch_is_a_permutation_and_epochs_differ():
    orders = [epoch_order(3, epoch, 50) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert not np.array_equal(epoch_order(4, 0, 50), orders[0])
    assert epoch_order(0, 0, 5).tolist() == [0, 2, 1, 4, 3]  # kept: a resumed run relies on it


def test_the_global_sequence_does_not_depend_on_the_batch_size():
    """48 positions of an epoch of 50, in steps of 2, 8, 12 and 48."""
    runs = [
        collect(TrainLoader(Squares(), AUG, 8, size, 5, 0), 0, 48 // size)
        for size in (2, 8, 12, 48)
    ]
    for run in runs[1:]:
        assert_same(runs[0], run)


def test_the_global_sequence_does_not_depend_on_the_number_of_ranks():
    whole = collect(TrainLoader(Squares(), AUG, 8, 12, 5, 0), 0, 8)
    ranks = [
        list(TrainLoader(Squares(), AUG, 8, 4, 5, 0, rank=r, world=3).batches(0, 8))
        for r in range(3)
    ]
    assert set(map(len, ranks)) == {8}
    for name in whole:
        assert torch.equal(
            whole[name],
            torch.cat([getattr(ranks[r][step], name) for step in range(8) for r in range(3)]),
        ), name


@pytest.mark.parametrize("start", [0, 1, 5, 6, 13])
def test_resume_at_any_step(start):
    loader = TrainLoader(Squares(), AUG, 8, 8, 5, 0)
    assert loader.steps_per_epoch == 6
    whole = collect(loader, 0, 15)
    rest = collect(TrainLoader(Squares(), AUG, 8, 8, 5, 0), start, 15)
    assert_same({name: value[start * 8 :] for name, value in whole.items()}, rest)


def test_any_sample_can_be_replayed_alone():
    source, loader = Squares(), TrainLoader(Squares(), AUG, 8, 8, 5, 0)
    batch = next(iter(loader.batches(9, 10)))
    for row, sample in enumerate(batch.samples.tolist()):
        pixels = execute(sample_record(AUG, 8, 5, 1, sample, 12, 12), source.read(sample))
        np.testing.assert_array_equal(batch.images[row].permute(1, 2, 0).numpy(), pixels)
    mix = mix_record(AUG, 8, 5, 1, (3 * 8) // 2 + 2)  # step 9 is step 3 of epoch 1; its third pair
    assert batch.mix_box[4].tolist() == list(mix.box) and batch.mix_lam[5].item() == pytest.approx(
        mix.lam
    )


def test_bad_files_are_replaced_by_the_next_valid_sample_and_named(caplog):
    source = Squares(bad=(10, 11), known_bad=(12,))
    loader = TrainLoader(source, PLAIN, 12, 10, 0, 0)
    clean = collect(TrainLoader(Squares(), PLAIN, 12, 10, 0, 0), 0, 10)
    run = collect(loader, 0, 10)
    expected = torch.where(
        (clean["samples"] >= 10) & (clean["samples"] <= 12), torch.tensor(13), clean["samples"]
    )
    assert torch.equal(run["samples"], expected) and torch.equal(
        run["images"][:, 0, 0, 0].long(), expected
    )
    assert torch.equal(run["labels"], expected % 2)
    assert sorted(loader.replaced) == ["image10", "image11", "image12"]
    assert caplog.text.count("cannot be read") == 3 and "image11" in caplog.text
    assert_same(
        {n: v[30:] for n, v in run.items()},
        collect(TrainLoader(source, PLAIN, 12, 10, 0, 0), 3, 10),
    )


def test_many_bad_files_are_counted_without_a_line_each(caplog):
    loader = TrainLoader(Squares(bad=tuple(range(20))), PLAIN, 12, 10, 0, 0)
    loader.source.max_bad_share = 1.0
    collect(loader, 0, 10)
    assert len(loader.replaced) == 20
    assert (
        caplog.text.count("takes its place") == 10
        and caplog.text.count("more images cannot be read") == 1
    )


def test_the_last_sample_is_replaced_by_the_first():
    run = collect(TrainLoader(Squares(bad=(49,)), PLAIN, 12, 50, 0, 0), 0, 1)
    assert 49 not in run["samples"] and run["samples"].tolist().count(0) == 2


def test_too_many_bad_files_stop_the_run():
    loader = TrainLoader(Squares(bad=range(0, 50, 2), max_bad_share=0.1), PLAIN, 12, 10, 0, 0)
    with pytest.raises(DataError, match="6 of 50 images cannot be read, such as image"):
        list(loader.batches(0, 5))
    with pytest.raises(DataError, match="not one image"):
        list(TrainLoader(Squares(bad=range(50)), PLAIN, 12, 10, 0, 0).batches(0, 1))


def test_a_file_that_changed_since_the_index_is_bad():
    loader = TrainLoader(Squares(bad=(3,), action="resized"), PLAIN, 12, 50, 0, 0)
    assert 3 not in collect(loader, 0, 1)["samples"] and loader.replaced == ["image3"]


def test_usage_errors_name_the_flag():
    with pytest.raises(UsageError, match="--batch-size 5: must be even"):
        TrainLoader(Squares(), AUG, 8, 5, 0, 0)
    TrainLoader(Squares(), PLAIN, 8, 5, 0, 0)
    with pytest.raises(UsageError, match="--batch-size 64: squares has only 50 images"):
        TrainLoader(Squares(), PLAIN, 8, 64, 0, 0)
    with pytest.raises(UsageError, match="--batch-size 0"):
        TrainLoader(Squares(), PLAIN, 8, 0, 0, 0)


def test_auto_falls_back_to_pil_without_dali(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    loader = train_loader("auto", Squares(), PLAIN, 12, 10, 0, 0, device="cpu")
    assert loader.name == "pil" and len(list(loader.batches(0, 2))) == 2
    name, why = resolve_loader("auto", Squares(), torch.device("cuda"))
    assert name == "pil" and "not installed: pip install nvidia-dali-cuda1" in why
    with pytest.raises(EnvironmentProblem, match="--loader dali: .*or use --loader pil"):
        train_loader("dali", Squares(), PLAIN, 12, 10, 0, 0)


def test_evaluation_counts_every_readable_image_once():
    loader = EvalLoader(Squares(known_bad=(4,)), View(12, 1.0, "bicubic"), 16, 0)
    batches = list(loader)
    samples = torch.cat([b.samples for b in batches])
    assert samples.tolist() == [i for i in range(50) if i != 4] and len(loader) == len(batches) == 4
    assert (loader.num_images, loader.skipped) == (49, 1)
    assert torch.equal(torch.cat([b.images for b in batches])[:, 0, 5, 5].long(), samples)
    assert torch.equal(torch.cat([b.labels for b in batches]), samples % 2)
    with pytest.raises(DecodeError, match="image7"):
        list(EvalLoader(Squares(bad=(7,)), View(12, 1.0, "bicubic"), 16, 0))


def test_the_global_generator_is_unchanged():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(TrainLoader(Squares(), AUG, 8, 8, 5, 1).batches(0, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_give_the_same_batches():
    here = collect(TrainLoader(Squares(bad=(10,)), AUG, 8, 8, 5, 0), 4, 14)
    loader = TrainLoader(Squares(bad=(10,)), AUG, 8, 8, 5, 2)
    assert_same(here, collect(loader, 4, 14))
    assert loader.replaced == ["image10"]
    inline, worker = (
        list(EvalLoader(Squares(), View(12, 1.0, "bicubic"), 16, number)) for number in (0, 1)
    )
    assert all(
        torch.equal(a.images, b.images) and torch.equal(a.samples, b.samples)
        for a, b in zip(inline, worker, strict=True)
    )


def test_worker_failures_are_one_line():
    def run(**options):
        list(TrainLoader(Squares(bad=range(50), **options), PLAIN, 12, 10, 0, 1).batches(0, 3))

    with pytest.raises(
        DadFastError,
        match=r"^a loader worker failed: ZeroDivisionError: a mistake \(--debug shows where\)$",
    ) as caught:
        run(action="bug")
    assert "in read" in str(caught.value.__cause__)
    with pytest.raises(DataError, match=r"^squares: not one image can be read \(--data-dir\)$"):
        run()
    with pytest.raises(DadFastError, match="a loader worker died .*--workers") as caught:
        run(action="kill")
    assert "\n" not in str(caught.value)


def test_a_worker_that_hangs_ends_the_run_and_a_slow_one_does_not(monkeypatch):
    monkeypatch.setattr(workers, "CHECK_SECONDS", 0.5)
    slow = collect(TrainLoader(Squares(bad=[3], action="slow"), PLAIN, 12, 10, 0, 1), 0, 5)
    assert_same(slow, collect(TrainLoader(Squares(), PLAIN, 12, 10, 0, 0), 0, 5))
    monkeypatch.setattr(workers, "HANG_SECONDS", 5.0)
    started = time.monotonic()
    with pytest.raises(
        DadFastError, match="no batch for 5 s: a loader worker hangs .*--resume auto"
    ) as caught:
        collect(TrainLoader(Squares(bad=range(50), action="hang"), PLAIN, 12, 10, 0, 1), 0, 3)
    assert "\n" not in str(caught.value) and time.monotonic() - started < HANG


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs Linux's /proc")
def test_workers_survive_the_signals_of_a_preemption():
    batches = TrainLoader(Squares(), PLAIN, 8, 2, 5, 1).batches(0, 25)
    next(batches)
    children = [
        int(p) for p in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    ]
    (server,) = [
        pid for pid in children if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    workers = [int(p) for p in Path(f"/proc/{server}/task/{server}/children").read_text().split()]
    for pid in (server, *workers):
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGUSR1)
    assert len(list(batches)) == 24


def is_running(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


ABANDON = """
import os, signal, sys
from tests.data.test_loader import *

if __name__ == "__main__":
    batches = TrainLoader(Squares(), PLAIN, 8, 2, 5, 1).batches(0, 25)
    next(batches)
    (server,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()[-1:]
    print(server, *Path(f"/proc/{server}/task/{server}/children").read_text().split(), flush=True)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs Linux's /proc")
@pytest.mark.parametrize("end", ["exits", "killed"])
def test_no_worker_outlives_the_training_process(tmp_path, end):
    (tmp_path / "script.py").write_text(ABANDON)
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[1].parent)])
    command = [sys.executable, str(tmp_path / "script.py"), end]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == (0 if end == "exits" else -signal.SIGKILL), done.stderr
    processes = done.stdout.split()
    assert len(processes) >= 2
    wait_until(lambda: not any(is_running(pid) for pid in processes))
