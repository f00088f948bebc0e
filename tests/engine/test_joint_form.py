"""Joint form and mixed outputs, each against its formula written out image by image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for package in ("timm", "open_clip"):
    pytest.importorskip(package)
from dad_fast.cli.main import main
from dad_fast.config.schema import (
    AugmentConfig,
    EngineConfig,
    LossConfig,
    PrecisionConfig,
    StoreConfig,
)
from dad_fast.data.augment.records import CUTMIX, MIXUP
from dad_fast.methods.losses import joint_objective, mixed_outputs
from dad_fast.methods.registry import Images
from tests.engine.test_step import SIDE, B, C, batch, make
from tests.numerics import assert_same_function, assert_same_levels
from tests.precompute.test_precompute import flags, inputs, raw, step_of, targets  # noqa: F401
from tests.steps import learner_of, loss_of, run
from tests.tiny import write_images

JOINT = LossConfig(form="joint", ce=0.75, kd=0.25)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def stored_batch(kept=True, clean_outputs=False):
    g = torch.Generator().manual_seed(6)
    found = {
        "dad_images": torch.randint(0, 256, (B, 3, SIDE, SIDE), generator=g, dtype=torch.uint8),
        "dad_outputs": torch.randn(B, C, generator=g).half(),
        "dad_kept": torch.tensor([1.0, 0, 0, 1, 1, 0, 1, 0]) if kept else torch.ones(B),
    }
    if clean_outputs:
        found["clean_outputs"] = torch.randn(B, C, generator=g).half()
    return replace(batch(), **found)


def written_out(data):
    """Image by image: what is shown (own and other image), the target, and whether it shows a
    rejected image; clean ones first.
    """
    shown, labels, rejected = [], [], []
    clean, dad = (t.double().numpy() / 255 for t in (data.images, data.dad_images))
    for own, other in ((clean, dad), (dad, clean)):
        for i in range(B):
            partner = i + 1 if i % 2 == 0 else i - 1
            kind, lam = int(data.mix_kind[i]), float(data.mix_lam[i])
            image = own[i].copy()
            if kind == MIXUP:
                image = lam * own[i] + (1 - lam) * other[partner]
            elif kind == CUTMIX:
                y0, y1, x0, x1 = data.mix_box[i].tolist()
                image[:, y0:y1, x0:x1] = other[partner][:, y0:y1, x0:x1]
            target = np.zeros(C)
            target[data.labels[i]] += lam
            target[data.labels[partner]] += 1 - lam
            shown.append(image)
            labels.append(target)
            adversarial = i if own is dad else partner
            rejected.append((own is dad or lam < 1) and not data.dad_kept[adversarial])
    return np.stack(shown), np.stack(labels), np.array(rejected)


@pytest.mark.parametrize("filtered", [True, False])
def test_joint_loss_equals_its_formula(filtered):
    """0.75 CE + 4 KL at T = 4 over clean and stored images as one batch, mixed across, the teacher
    looking at the mixed pixels.
    """
    step, data = make("dad", loss=JOINT), stored_batch(kept=filtered)
    loss, parts = loss_of(step, data)
    images, labels, rejected = written_out(data)
    assert 0 < rejected.sum() < 2 * B if filtered else not rejected.any()
    pixels = torch.from_numpy(images).float()
    student = log_softmax(learner_of(step).student.train()(pixels).detach().double().numpy())
    softer = log_softmax(learner_of(step).student(pixels).detach().double().numpy() / 4)
    teacher = log_softmax(step.generator.teacher(pixels).double().numpy() / 4)
    ce = -((labels * 0.9 + 0.1 / C) * student).sum(-1)
    kl = (np.exp(teacher) * (teacher - softer)).sum(-1)
    expected = (0.75 * ce + 4 * kl)[~rejected].sum() / (2 * B)
    assert loss.item() == pytest.approx(expected, rel=2e-5)
    assert set(parts) == {"loss", "ce", "kd", "kept"} and parts["kept"].item() == pytest.approx(
        1 - rejected.mean()
    )


def test_stored_outputs_are_mixed_without_a_teacher():
    step, data = (
        make("dad", loss=JOINT, store=StoreConfig(dirs=("x",), mix_outputs=True)),
        stored_batch(clean_outputs=True),
    )
    step.generator.teacher = None
    said = step.generate(data).teacher[Images.CLEAN]
    clean, dad = (
        np.exp(log_softmax(t.double().numpy() / 4)) for t in (data.clean_outputs, data.dad_outputs)
    )
    neighbour = np.arange(B) ^ 1
    lam = data.mix_lam.double().numpy()[:, None]
    expected = np.concatenate(
        [lam * clean + (1 - lam) * dad[neighbour], lam * dad + (1 - lam) * clean[neighbour]]
    )
    np.testing.assert_allclose((said.double() / 4).softmax(-1).numpy(), expected, atol=1e-6)


def test_paper_form_mixes_stored_outputs():
    step, data = (
        make("dad", store=StoreConfig(dirs=("x",), mix_outputs=True)),
        stored_batch(clean_outputs=True),
    )
    found = step.generate(data)
    clean, lam = (data.clean_outputs.double() / 4).softmax(-1), data.mix_lam.double()[:, None]
    neighbour = torch.arange(B) ^ 1
    expected = lam * clean + (1 - lam) * clean[neighbour]
    torch.testing.assert_close(
        (found.teacher[Images.CLEAN].double() / 4).softmax(-1), expected, atol=1e-6, rtol=0
    )
    assert (
        found.teacher[Images.ATTACK_TEACHER] is data.dad_outputs
    )  # stored images are not mixed in this form


@pytest.mark.parametrize("lam", [0.0, 1e-8, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_mixed_outputs_are_finite_and_exact_at_the_ends(lam, temperature):
    own, others = torch.tensor([[0.0, -6e4, -3.0]]).half(), torch.tensor([[-6e4, 0.0, -2.0]]).half()
    mixed = mixed_outputs(own, others, torch.tensor([lam]), temperature)
    assert mixed.dtype == torch.float32 and not mixed.isnan().any()
    p, q, m = ((t.double() / temperature).softmax(-1) for t in (own, others, mixed))
    torch.testing.assert_close(m, lam * p + (1 - lam) * q, atol=1e-6, rtol=0)


def test_unmixed_images_are_of_one_kind():
    step, data = make("dad", loss=JOINT), stored_batch()
    plain = replace(data, mix_kind=torch.zeros(B, dtype=torch.long), mix_lam=torch.ones(B))
    found = step.generate(plain)
    assert torch.equal(
        found.images[Images.CLEAN], torch.cat([data.images, data.dad_images]).float() / 255
    )
    assert found.targets[Images.CLEAN].argmax(1).tolist() == data.labels.tolist() * 2
    assert (
        found.keep.tolist() == [1.0] * B + data.dad_kept.tolist()
    )  # the filter judges adversarial images, never clean ones


def test_fused_equals_plain():
    g = torch.Generator().manual_seed(0)
    soft, keep = (
        torch.rand(6, 5, generator=g).softmax(-1).double(),
        torch.tensor([1.0, 0, 1, 1, 0, 1]).double(),
    )
    results = []
    for fused in (False, True):
        student = torch.randn(
            6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        ).requires_grad_(True)
        teacher = torch.randn(6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        loss, _ = joint_objective(JOINT, student, teacher, soft, keep, fused=fused)
        loss.backward()
        results.append((loss.item(), student.grad))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    torch.testing.assert_close(results[0][1], results[1][1])


def test_micro_batches_equal_the_whole_batch():
    whole, parts = (
        make("dad", loss=JOINT),
        make("dad", loss=JOINT, engine=EngineConfig(grad_accum_steps=2)),
    )
    for number in range(2):
        a = run(whole, stored_batch(), number, 1e-3)
        b = run(parts, stored_batch(), number, 1e-3)
        assert_same_function(a["loss"], b["loss"])


# --- from the command line


def test_labels_match_with_more_than_ten_classes(inputs, tmp_path):  # noqa: F811
    """Folders "0", "1", "10", "11", "2" …: in string order only 0 and 1 would keep their place.

    Pixels tell the class here.
    """
    from PIL import Image

    names = [str(number) for number in range(12)]
    write_images(tmp_path / "data", classes=names, per_class=2)
    for path in (tmp_path / "data").glob("*/*/*.jpg"):
        level = 10 + 20 * int(path.parent.name)
        path.unlink()
        Image.new("RGB", (40, 40), (level, level, level)).save(path.with_suffix(".png"))
    (tmp_path / "classes.csv").write_text(
        "id,folder,name\n" + "".join(f"{i},{i},digit {i}\n" for i in range(12))
    )
    data = flags(
        inputs, "--data-dir", str(tmp_path / "data"), "--class-map", str(tmp_path / "classes.csv")
    )
    data += ["--discretizer", "identity", "--attack-eps", "0"]
    assert main(["precompute", *data, "-o", str(tmp_path / "store"), "--images", "raw"]) == 0
    data += ["--class-map", ""]  # the store's own list serves
    store = [
        "--store",
        str(tmp_path / "store"),
        "--loss-form",
        "joint",
        "--no-filter",
        "--smoothing",
        "0",
        "--color-jitter",
        "0",
    ]
    for mixing in ([], ["--mixup", "0.8"]):
        step, batches = step_of(inputs, "dad", *data, *store, *mixing)
        for number, found in enumerate(batches(0, 4)):
            joint = step.generate(found)
            shown = (
                joint.images[Images.CLEAN].mean((1, 2, 3)) * 255 - 10
            ) / 20  # mixing is linear: the mean class of what is shown
            said = (joint.targets[Images.CLEAN] * torch.arange(12)).sum(1)
            torch.testing.assert_close(shown, said, atol=0.06, rtol=0)
            assert joint.targets[Images.CLEAN].shape == (12, 12) and number < 4


def test_joint_training_with_a_teacher_and_without(inputs, raw, targets, tmp_path, capsys):  # noqa: F811
    """Runs, resumes to the same bytes, and logs what was loaded.

    Without mixing stored outputs are exact, with it they are mixed.
    """
    import json

    unmixed = tmp_path / "stores" / "unmixed"
    plain = ["--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.25"]
    assert (
        main(
            ["precompute", *flags(inputs, *plain), "-o", str(unmixed), "--targets", "--views", "2"]
        )
        == 0
    )
    run = [
        "train",
        "--method",
        "dad",
        *inputs["data"],
        *plain,
        "--loss-form",
        "joint",
        "--ce-weight",
        "0.75",
        "--kd-weight",
        "0.25",
    ]
    run += ["--epochs", "2", "--warmup-epochs", "0", "--mixup", "0.8"]
    forms = {
        "teacher": [*inputs["teacher"], "--store", str(raw)],
        "outputs": ["--store", str(raw), str(unmixed), "--mix-outputs"],
        "unmixed": ["--store", str(raw), str(unmixed), "--mixup", "0"],
    }
    for name, more in forms.items():
        assert main([*run, *more, "-o", str(tmp_path / name)]) == 0, capsys.readouterr().err
        assert json.loads((tmp_path / name / "run.json").read_text())["teacher_loaded"] is (
            name == "teacher"
        )
        assert main([*run, *more, "-o", str(tmp_path / "parts" / name), "--max-steps", "3"]) == 0
        assert main([*run, *more, "-o", str(tmp_path / "parts" / name), "--resume", "auto"]) == 0
        a, b = (folder / name / "model.safetensors" for folder in (tmp_path, tmp_path / "parts"))
        assert a.read_bytes() == b.read_bytes()
    capsys.readouterr()
    assert main([*run, "--store", str(raw), str(unmixed), "-o", str(tmp_path / "no")]) == 2
    assert "add --mix-outputs" in capsys.readouterr().err
    assert (
        main([*run, "--store", str(unmixed), *inputs["teacher"], "-o", str(tmp_path / "no")]) == 2
    )
    assert "--loss-form joint learns from stored adversarial images" in capsys.readouterr().err
    assert (
        main([*run, "--store", str(raw), str(targets), "--mix-outputs", "-o", str(tmp_path / "no")])
        == 4
    )
    assert "has outputs on mixed views (mixup 0.8, cutmix 1.0)" in capsys.readouterr().err
    assert (
        main(
            [
                *run,
                "--store",
                str(raw),
                "--mix-outputs",
                *inputs["teacher"],
                "-o",
                str(tmp_path / "no"),
            ]
        )
        == 2
    )
    assert "no store contains any: add one made with --targets" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        (["--method", "dat+dad"], "--loss-form joint is a form of --method dad, not of dat+dad"),
        (["--method", "kd"], "not of kd"),
        (["--bn", "aux"], "and --bn aux needs them apart; use --bn joint"),
        (["--bn", "split"], "--bn split"),
        (["--store"], "add --store"),
        (["--loss-form", "sum"], "--loss-form"),
    ],
)
def test_unusable_joint_form_is_a_one_line_error(change, words, capsys, tmp_path):
    store = [] if change == ["--store"] else ["--store", str(tmp_path / "none"), *change]
    assert (
        main(
            [
                "train",
                "--preset",
                "demo",
                "--method",
                "dad",
                "--loss-form",
                "joint",
                *store,
                "-o",
                str(tmp_path / "out"),
            ]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1, error


def test_paper_form_is_the_default():
    assert LossConfig().form == "paper" and not StoreConfig().mix_outputs
    assert make("dad").generate(stored_batch(clean_outputs=True)).images[Images.CLEAN].shape[0] == B


def test_channels_last_equals_contiguous():
    """The loss is the same in NHWC."""
    step, data = make("dad", loss=JOINT, augment=AugmentConfig()), stored_batch()
    other = make(
        "dad",
        loss=JOINT,
        augment=AugmentConfig(),
        precision=PrecisionConfig(channels_last=True),
    )
    assert_same_function(loss_of(step, data)[0], loss_of(other, data)[0])


def test_stored_codes_equal_stored_pixels(inputs, raw, tmp_path):  # noqa: F811
    codes = tmp_path / "codes"
    assert main(["precompute", *flags(inputs), "-o", str(codes), "--views", "2"]) == 0
    mixed = ["--loss-form", "joint", "--mixup", "0.8", "--cutmix", "1.0"]
    step, batches = step_of(inputs, "dad", *flags(inputs, "--store", str(codes), *mixed))
    other, others = step_of(inputs, "dad", *flags(inputs, "--store", str(raw), *mixed))
    for a, b in zip(batches(0, 5), others(0, 5), strict=True):
        assert_same_levels(
            step.generate(a).images[Images.CLEAN], other.generate(b).images[Images.CLEAN]
        )
