"""LP-CLIP: loss, trained weights, pseudo-labels, kept features, resume, several processes."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")
for package in ("timm", "open_clip"):
    pytest.importorskip(package)
import tiny
from probes import BUILDER, PLAIN, STRONG, arguments, config, teacher_of, trained

from dad_fast.cli.main import main
from dad_fast.engine.build import Builder
from dad_fast.errors import UsageError
from dad_fast.methods.lp_clip import consistency_loss, pseudo_labels, sample_weights
from dad_fast.models.load_student import load_student
from dad_fast.models.probe import build_probe
from dad_fast.models.weights.files import fingerprint
from tests.numerics import assert_same_function

pytestmark = pytest.mark.usefixtures("cache")


def head(trainer):
    return {name: tensor.clone() for name, tensor in trainer.evaluated.model.state_dict().items()}


def digest(folder, step):
    path = folder / "checkpoints" / f"step-{step}"
    return {
        name: hashlib.sha256((path / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "train.safetensors")
    }


# --- the loss ---


@pytest.mark.parametrize("weight", ["confidence", "none"])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_equals_its_formula(weight, threshold, smoothing):
    random = np.random.default_rng(0)
    teacher, logits = random.normal(0, 2, (16, 5)), random.normal(0, 3, (16, 5))
    total = 0.0
    for t, s in zip(teacher, logits, strict=True):  # in plain Python, one sample after the other
        exponentials = [math.exp(value) for value in t]
        confidence = max(exponentials) / sum(exponentials)
        label = exponentials.index(max(exponentials))
        log_sum = math.log(sum(math.exp(value) for value in s))
        targets = [(1 - smoothing) * (i == label) + smoothing / 5 for i in range(5)]
        loss = -sum(target * (value - log_sum) for target, value in zip(targets, s, strict=True))
        total += (confidence >= threshold) * (confidence if weight == "confidence" else 1.0) * loss
    labels, confidence = pseudo_labels(torch.from_numpy(teacher))
    found = consistency_loss(
        torch.from_numpy(logits),
        labels,
        sample_weights(confidence, weight, threshold).double(),
        smoothing,
    )
    assert found.item() == pytest.approx(total / 16, rel=1e-6)


def test_ties_go_to_the_lowest_class_and_the_threshold_is_inclusive():
    labels, confidence = pseudo_labels(torch.tensor([[1.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]]))
    assert labels.tolist() == [1, 0] and confidence[1].item() == 0.25
    assert sample_weights(torch.tensor([0.25, 0.2499]), "none", 0.25).tolist() == [1.0, 0.0]
    assert (
        sample_weights(torch.tensor([float("nan")]), "confidence", 0.5).isnan().all()
    )  # so that the step is refused


def test_samples_below_the_threshold_have_weight_zero_even_if_infinite():
    logits = torch.tensor([[0.0, -math.inf], [0.0, 0.0]], requires_grad=True)
    loss = consistency_loss(logits, torch.tensor([1, 0]), torch.tensor([0.0, 1.0]))
    assert loss.item() == pytest.approx(math.log(2) / 2)


# --- the probe ---


def test_probe_owns_only_the_linear_layer(parts):
    import copy

    teacher = teacher_of(parts)
    probe = build_probe(teacher, "0" * 64)
    assert set(probe.state_dict()) == {"model.weight", "model.bias"}
    assert [name for name, p in probe.named_parameters() if p.requires_grad] == [
        "model.weight",
        "model.bias",
    ]
    assert not any(module.training for module in probe.train().encoder.modules())
    twin = copy.deepcopy(probe)
    assert twin.encoder is probe.encoder and twin.model.weight is not probe.model.weight
    probe.load_state_dict(twin.state_dict())
    with pytest.raises(RuntimeError, match="model.bias"):
        probe.load_state_dict({"model.weight": twin.model.weight})
    pixels = torch.rand(2, 3, 32, 32, requires_grad=True)
    probe(pixels).sum().backward()
    assert pixels.grad is None and all(p.grad is None for p in teacher.parameters())


def test_probe_starts_from_the_zero_shot_head(parts):
    teacher, pixels = teacher_of(parts), torch.rand(4, 3, 32, 32)
    assert_same_function(build_probe(teacher, "", init="zero-shot")(pixels), teacher(pixels))
    assert build_probe(teacher, "")(pixels).abs().max() == 0


# --- training ---


@pytest.mark.parametrize("views", [0, 2])
def test_training_changes_only_the_linear_layer(parts, tmp_path, views):
    cfg = config(parts, f"lp_clip.views={views}", "ema.model_ema=true")
    before = fingerprint(BUILDER.build(cfg).teacher)
    trainer = trained(cfg, tmp_path / "run")
    assert fingerprint(trainer.parts.teacher) == before
    assert trainer.evaluated.model.weight.abs().max() > 0
    saved = set(trainer.checkpoints.load("auto", print).tensors)
    assert {name for name in saved if name.startswith(("student.", "ema."))} == {
        "student.model.weight",
        "student.model.bias",
        "ema.model.weight",
        "ema.model.bias",
    }


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["lp_clip.views=3"],
        ["lp_clip.labels=true"],
        ["lp_clip.threshold=0.34", "lp_clip.weight=none"],
    ],
)
def test_resume_is_bit_exact(parts, tmp_path, more):
    cfg = config(parts, "ema.model_ema=true", *more)
    trained(replace(cfg, max_steps=11), tmp_path / "straight")
    trained(replace(cfg, max_steps=5), tmp_path / "parts")
    torch.manual_seed(12345)
    trained(
        replace(cfg, max_steps=11), tmp_path / "parts", "auto", builder=Builder()
    )  # features and answers are made again
    assert digest(tmp_path / "straight", 11) == digest(tmp_path / "parts", 11)


def shuffle_labels(made):
    made.train.labels = np.random.default_rng(3).permutation(made.train.labels)


def test_labels_are_not_used(parts, tmp_path):
    cfg = config(parts)
    plain, shuffled = (
        trained(cfg, tmp_path / "a"),
        trained(cfg, tmp_path / "b", change=shuffle_labels),
    )
    assert all(
        torch.equal(plain, other)
        for plain, other in zip(head(plain).values(), head(shuffled).values(), strict=True)
    )
    true = config(parts, "lp_clip.labels=true")
    plain, shuffled = (
        trained(true, tmp_path / "c"),
        trained(true, tmp_path / "d", change=shuffle_labels),
    )
    assert not torch.equal(head(plain)["weight"], head(shuffled)["weight"])  # the test can tell


@pytest.mark.parametrize(("views", "num"), [(STRONG, 4), (PLAIN, 1)])
def test_kept_features_equal_the_encoders_output(parts, tmp_path, views, num):
    kept = trained(config(parts, f"lp_clip.views={num}", views=views), tmp_path / "kept")
    assert kept.loader.name == "features" and kept.parts.probe.features.features.shape == (
        num,
        24,
        16,
    )

    def run_the_encoder(made):
        made.probe.features = None

    online = trained(config(parts, views=views), tmp_path / "online", change=run_the_encoder)
    assert online.loader.name == "pil"
    torch.testing.assert_close(head(kept), head(online), rtol=1e-4, atol=1e-5)
    assert kept.evaluated.model.weight.abs().max() > 0.05
    said = [(tmp_path / name / "train.log").read_text() for name in ("kept", "online")]
    assert "features are kept" in said[0] and "features are not kept" in said[1]


def test_unreadable_image_is_replaced_by_the_next(parts, tmp_path):
    def one_is_bad(made):
        made.train.ok = made.train.ok.copy()
        made.train.ok[[5, 23]] = False
        made.train.max_bad_share = 1.0

    kept = trained(config(parts, "lp_clip.views=1"), tmp_path / "kept", change=one_is_bad)
    batches = list(kept.loader.batches(0, 3))
    seen = torch.cat([batch.samples for batch in batches]).tolist()
    drawn = torch.cat([batch.drawn for batch in batches]).tolist()
    assert sorted(drawn) == list(range(24)) and [{5: 6, 23: 0}.get(n, n) for n in drawn] == seen
    online = trained(replace(config(parts), max_steps=3), tmp_path / "online", change=one_is_bad)
    assert (
        sorted(kept.loader.replaced) == sorted(online.loader.replaced) == ["ant/5.jpg", "cat/7.jpg"]
    )
    assert [b.samples.tolist() for b in online.loader.batches(0, 3)] == [
        b.samples.tolist() for b in batches
    ]


def test_one_pass_of_the_teacher_serves_every_seed_and_setting(parts, tmp_path, cache):
    trained(config(parts), tmp_path / "first", builder=Builder())
    (file,) = (cache / "pseudo-labels").iterdir()
    assert f"from {file}" not in (tmp_path / "first/train.log").read_text()
    trained(
        config(parts, "seed=1", "lp_clip.threshold=0.4"), tmp_path / "second", builder=Builder()
    )
    assert f"from {file}" in (tmp_path / "second/train.log").read_text()
    file.write_bytes(file.read_bytes()[:40])  # damaged: made again
    trained(config(parts), tmp_path / "third", builder=Builder())
    assert f"from {file}" not in (tmp_path / "third/train.log").read_text()
    other = tiny.write_teacher(tmp_path / "other.safetensors", seed=1)
    trained(config(parts, f"teacher.name={other}"), tmp_path / "fourth", builder=Builder())
    assert len(list((cache / "pseudo-labels").iterdir())) == 2


def test_resume_with_another_teacher_is_an_error(parts, tmp_path):
    moved = tmp_path / "teacher.safetensors"
    moved.write_bytes((parts / "teacher.safetensors").read_bytes())
    cfg = config(parts, f"teacher.name={moved}")
    trained(replace(cfg, max_steps=2), tmp_path / "run", builder=Builder())
    tiny.write_teacher(moved, seed=1)
    with pytest.raises(UsageError, match="the weights of the teacher .* are not those"):
        trained(cfg, tmp_path / "run", "auto", builder=Builder())


# --- several processes ---


def test_two_processes_equal_one(parts, tmp_path, cache):
    from tests.processes import HANG, environment, one_thread

    more = [
        part
        for item in (*STRONG, "lp_clip.views=2", "eval.batch_size=8")
        for part in ("--set", item)
    ]
    with one_thread():
        assert main(arguments(parts, tmp_path / "one", *more)) == 0
    labels = {path: path.read_bytes() for path in (cache / "pseudo-labels").iterdir()}
    (only,) = labels
    only.unlink()  # so that the two make it
    command = [
        sys.executable,
        "-m",
        "dad_fast",
        *arguments(parts, tmp_path / "two", *more, "--batch-size", "4", "--nproc", "2"),
    ]
    done = subprocess.run(
        command,
        env=environment() | {"DAD_FAST_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    assert "once by each of 2 processes" in (tmp_path / "two/train.log").read_text()
    assert {path: path.read_bytes() for path in (cache / "pseudo-labels").iterdir()} == labels
    one, two = (load_student(tmp_path / name)[0].model.state_dict() for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_encoder_statistics_are_not_synchronized(parts):
    from dad_fast.distributed.gradients import running_statistics

    teacher = teacher_of(parts)
    teacher.encoder.norm = torch.nn.BatchNorm2d(3)
    teacher.eval()
    probe = build_probe(teacher, "").train()
    assert running_statistics(probe) == [] and len(running_statistics(torch.nn.BatchNorm2d(3))) == 2


def test_probe_steps_can_be_profiled(parts, tmp_path):
    settings = [part for item in (*STRONG, "lp_clip.views=2") for part in ("--set", item)]
    given = arguments(parts, tmp_path / "profile", *settings)[1:]
    assert main(["profile", "torch", *given, "--steps", "2", "--warm-up", "1"]) == 0
