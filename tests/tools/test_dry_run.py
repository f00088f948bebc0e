"""`dad-fast train --dry-run`: FLOP, memory and hours of a run from shapes alone."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("open_clip")

import tiny

from dad_fast.cli.main import main
from dad_fast.config.fields import with_values
from dad_fast.config.resolve import gather
from dad_fast.config.variants import expand, with_batch_sizes
from dad_fast.tools.dry_run.assumptions import with_assumptions
from dad_fast.tools.dry_run.estimate import estimate, stages_of
from dad_fast.tools.dry_run.rates import Rates, read_rates
from dad_fast.tools.dry_run.step import trace_step
from dad_fast.tools.dry_run.trace import Recorder, fake_tensors

DIGITS = ["--data-dir", "embedded:digits", "--teacher", "embedded:digits"]
DIGITS += ["--discretizer", "embedded:digits", "--img-size", "28", "--batch-size", "8"]
DIGITS += ["--student", "resnet18", "--epochs", "2", "--warmup-epochs", "0", "--dry-run"]
DIGITS += ["--set", "student.model_kwargs={layers=[1,1,1,1],channels=[8,8,8,8]}"]
RATES = Rates(
    name="test",
    source="modelled",
    memory=80.0,
    matmul=100.0,
    conv=50.0,
    attention=50.0,
    float32=10.0,
    passes=1.0,
    layout=0.5,
    link=0.1,
)


def gflop(step) -> dict[str, float]:
    images = step.batch_size * step.micro_batches
    return {
        stage.name: sum(op.flop for op in stage.ops) / images / 1e9 for stage in stages_of(step)
    }


@pytest.fixture(scope="module")
def flagship():
    """A step of the flagship without optimizations, with a batch of two."""
    sets = ["engine.savings=none", "data.batch_size=2"]
    return trace_step(with_assumptions(gather("dad-vitb16", None, sets, {})), 1000)


@pytest.mark.slow
def test_flop_of_the_flagship_are_those_of_its_architectures(flagship):
    counted = gflop(flagship)
    # GFLOP an image of the plain models, by hand: two clean and adversarial passes of each.
    assert counted["attack: teacher, input gradient"] == pytest.approx(330.6, rel=0.02)
    assert counted["teacher, logits"] == pytest.approx(2 * 162.0, rel=0.02)
    assert counted["VQGAN encode"] == pytest.approx(172.0, rel=0.02)
    assert counted["VQGAN decode"] == pytest.approx(360.1, rel=0.02)
    assert counted["student, forward and backward"] == pytest.approx(2 * 105.2, rel=0.02)


@pytest.mark.slow
def test_parameters_and_memory_that_stays(flagship):
    millions = {name: count / 1e6 for name, count in flagship.parameters.items()}
    expected = {"student": 86.6, "teacher": 304.0, "discretizer": 67.7}
    assert millions == pytest.approx(expected, rel=0.01)
    student = flagship.memory["student"]
    assert flagship.memory["gradients"] == pytest.approx(student, rel=0.01)
    assert flagship.memory["optimizer"] == pytest.approx(2 * student, rel=0.01)
    assert flagship.memory["EMA"] == student
    assert flagship.trace.before >= sum(flagship.memory.values())


@pytest.mark.parametrize("method", ["ce", pytest.param("dad", marks=pytest.mark.slow)])
def test_memory_is_that_of_a_real_step(method):
    """Compare with the allocations of a real step on the CPU.

    A student without convolutions: those of oneDNN take scratch memory that a GPU does not.
    """
    from dad_fast.engine.build import Builder
    from dad_fast.engine.trainer import Trainer

    vit = "student.model_kwargs={patch_size=7,depth=2,embed_dim=96,num_heads=3}"
    sets = ["student.name=vit_tiny_patch16_224", vit, "precision.channels_last=false"]
    sets += [
        "engine.cuda_graphs=off",
        "engine.kernels=off",
        "precision.amp=off",
        "data.batch_size=32",
    ]
    ((_, _, cfg),) = expand(gather("demo", None, sets, {"method": method}))
    trainer = Trainer(cfg, Builder().build(cfg), Path("nothing is written"), "")
    batch = next(trainer.loader.batches(0, 1))
    trainer.step(batch, 0, 1e-3)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        trainer.step(batch, 1, 1e-3)
    allocated = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)

    trace = trace_step(with_batch_sizes(cfg, 1), 10).trace
    assert trace.peak - trace.before == pytest.approx(peak, rel=0.15)


def test_flop_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    from dad_fast.models.student import build_student

    ((_, _, cfg),) = expand(gather("demo", None, ["data.batch_size=4"], {"method": "ce"}))
    student = build_student(cfg.student, 10, cfg.augment.img_size)
    with FlopCounterMode(display=False) as counter:
        student(torch.rand(4, 3, 28, 28)).sum().backward()
    step = trace_step(cfg, 10)
    counted = gflop(step)["student, forward and backward"] * 4e9
    assert counted == pytest.approx(counter.get_total_flops(), rel=1e-6)


@pytest.mark.parametrize("layer", [torch.nn.Conv2d, torch.nn.ConvTranspose2d])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_flop_of_grouped_convolutions_are_those_of_a_hand_count(layer, groups):
    """8 groups of 8 channels are a depthwise convolution."""
    recorder = Recorder()
    with fake_tensors(), recorder:
        convolution = layer(8, 8, 3, padding=1, groups=groups, bias=False)
        pixels = torch.rand(2, 8, 16, 16, requires_grad=True)
        recorder.start()
        convolution(pixels).sum().backward()
        trace = recorder.stop()
    # 2 images of 16 x 16, 3 x 3 weights of 8 / groups channels for each of 8 outputs.
    products = 2 * 16 * 16 * 3 * 3 * (8 // groups) * 8
    # The output, and the gradients of images and weights.
    assert sum(op.flop for op in trace.ops) == 3 * 2 * products


@pytest.fixture(scope="module")
def kd():
    """KD on two GPUs for 70 steps."""
    ((_, _, cfg),) = expand(gather("demo", None, ["max_steps=70"], {"method": "kd"}))
    return estimate(cfg, num_gpus=2)


def test_hours_are_steps_times_the_step(kd):
    found = kd
    assert found.data.num_classes == 10
    assert found.cfg.data.global_batch_size == 200
    assert found.steps_per_epoch == found.data.num_images // 200
    assert found.total_steps == 70
    milliseconds = found.step_milliseconds(RATES)
    stages = sum(found.stage_cost(stage, RATES).milliseconds for stage in found.stages())
    gradients = found.step.memory["gradients"]
    assert milliseconds - stages == pytest.approx(gradients / 0.1e9)
    assert found.training_hours(RATES) == pytest.approx(70 * milliseconds / 3.6e6)
    assert found.images_per_second(RATES) == pytest.approx(200 / milliseconds * 1e3)


def test_accumulation_adds_forward_passes_and_no_updates():
    def of(accumulated: int):
        sets = [f"engine.grad_accum_steps={accumulated}", "data.batch_size=8"]
        ((_, _, one),) = expand(gather("demo", None, sets, {"method": "ce"}))
        found = estimate(one, num_gpus=1)
        return {stage.name: found.stage_cost(stage, RATES).flop for stage in found.stages()}, found

    (one, once), (four, found) = of(1), of(4)
    student = "student, forward and backward"
    assert four[student] == pytest.approx(4 * one[student])
    assert found.cfg.data.global_batch_size == 4 * once.cfg.data.global_batch_size
    passes = [
        sum(op.moved for op in stage.ops)
        for each in (once, found)
        for stage in each.stages()
        if stage.name == "optimizer, EMA"
    ]
    assert passes[0] == pytest.approx(passes[1], rel=0.01)


def test_compiled_passes_move_less(kd):
    compiled = dataclasses.replace(kd, cfg=with_values(kd.cfg, {"engine.torchcompile": True}))
    assert compiled.step_milliseconds(RATES) < kd.step_milliseconds(RATES)


@pytest.mark.slow
def test_largest_batch_fills_the_card():
    ((_, _, one),) = expand(gather("demo", None, ["data.batch_size=32"], {"method": "ce"}))
    found = estimate(one, num_gpus=1)
    batch = found.largest_batch(RATES)
    assert batch > one.data.batch_size and found.memory_needed() < RATES.memory
    ((_, _, more),) = expand(gather("demo", None, ["data.batch_size=64"], {"method": "ce"}))
    grown = estimate(more, num_gpus=1).largest_batch(RATES)
    assert grown == pytest.approx(batch, rel=0.15)


def test_rates_of_three_gpus_are_marked():
    table = read_rates()
    assert [rates.name for rates in table] == ["H200", "H100", "A100-80GB"]
    assert all(rates.source for rates in table)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Work in an empty folder, which a dry run must leave empty."""
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "shown", "hidden"),
    [
        (
            ["--method", "dad", "--nproc", "4"],
            ["attack: teacher", "VQGAN encode", "teacher, logits", "sum of gradients", "on 4 GPUs"],
            ["note"],
        ),
        pytest.param(
            ["--method", "kd", "--amp"],
            ["teacher, logits"],
            ["attack", "VQGAN", "sum of"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--method", "dat"],
            ["attack: student", "VQGAN decode"],
            ["teacher"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--method", "dad", "--discretizer", "jpeg:75"],
            ["jpeg:75: works on values"],
            ["VQGAN"],
            marks=pytest.mark.slow,
        ),
        (
            ["--method", "dad", "--stores", "adversarial:2", "targets:3"],
            ["store of adversarial, 2 views", "store of targets, 3 views", "before"],
            ["attack", "teacher, logits"],
        ),
        (["--method", "lp-clip"], ["teacher's encoder", "before"], ["VQGAN", "attack"]),
        pytest.param(
            ["--method", "lp-clip", "--lp-views", "2"],
            ["before"],
            ["teacher's encoder"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_dry_run_writes_nothing(elsewhere, capsys, more, shown, hidden):
    assert main(["train", *DIGITS, *more]) == 0
    text = capsys.readouterr().out
    for words in (*shown, "nothing is written", "images/s", "modelled"):
        assert words in text, text
    for words in hidden:
        assert words not in text.partition("stage ")[2], text
    assert max(map(len, text.splitlines())) <= 130


def test_several_runs_are_a_table_with_a_sum(elsewhere, capsys):
    assert main(["train", *DIGITS, "--method", "ce", "--seeds", "3"]) == 0
    text = capsys.readouterr().out
    assert "\nce " in text and "\nall 3 runs " in text and "stores" not in text
    assert text.startswith("dry run of 3 runs on 1 GPU; nothing is written\n")


def test_students_of_one_batch_have_a_row_together(elsewhere, capsys):
    assert main(["train", *DIGITS, "--method", "dad", "--student", "resnet18", "resnet26"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    table = text.partition("\nrun ")[2].splitlines()[1:5]
    rows = {
        name: cells.split() for name, cells in (re.split(r" {2,}", x, maxsplit=1) for x in table)
    }
    both, one, other = "2 on the same batches", "resnet18", "resnet26"
    flop, memory = (
        {name: float(rows[name][column]) for name in (both, one, other)} for column in (1, 2)
    )
    # Teacher and VQGAN work once for both.
    assert max(flop[one], flop[other]) < flop[both] < 0.8 * (flop[one] + flop[other])
    assert memory[both] >= memory[other] > 0
    # A short run has times other than 0, and the sum counts what is trained.
    assert all(float(hours) > 0 for hours in rows["all 2 runs"])
    assert rows["all 2 runs"] == rows[both][3:]


@pytest.mark.slow
def test_variants_share_the_time_of_their_stores(elsewhere, capsys):
    assert main(["train", "--preset", "demo", "--seeds", "2", "--dry-run"]) == 0
    text = capsys.readouterr().out
    for name in (
        "ce",
        "kd",
        "dad",
        "kd-stored",
        "dad-stored",
        "stores, filled once",
        "all 10 runs",
    ):
        assert f"\n{name} " in text, text


def test_data_are_counted_and_not_read(tmp_path, monkeypatch, capsys, cache):
    parts = tiny.write_images(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    (parts / "train" / "ant" / "0.jpg").write_bytes(b"damaged")
    arguments = ["train", *DIGITS, "--data-dir", str(parts), "--batch-size", "4"]
    assert main([*arguments, "--method", "ce"]) == 0
    assert "24 images of 3 classes" in capsys.readouterr().out
    assert not cache.exists()


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--student", "resnet5o"], 2, "--student resnet5o: timm has no such model"),
        (["--teacher", "open_clip:ViT-L-15/openai"], 2, "open_clip has no such architecture"),
        (["--teacher", "timm:resnet5o"], 2, "--teacher timm:resnet5o: timm has no such model"),
        (["--data-dir", "/nowhere"], 4, "no such folder"),
        (["--batch-size", "100000"], 2, "--batch-size 100000"),
        (["--store", "/nowhere"], 4, "/nowhere"),
    ],
)
def test_mistakes_are_one_line(elsewhere, capsys, more, code, message):
    assert main(["train", *DIGITS, "--method", "dad", *more]) == code
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == 1 and not output.out


@pytest.mark.slow
def test_weights_need_not_be_there(elsewhere, capsys):
    names = ["--teacher", "open_clip:ViT-B-32@missing.safetensors", "--img-size", "32"]
    vqgan = ["--discretizer", "missing.ckpt"]
    assert main(["train", *DIGITS, "--method", "dad", *names, *vqgan]) == 0
    assert "missing.ckpt, not found: VQGAN f8 (16384) assumed" in capsys.readouterr().out
