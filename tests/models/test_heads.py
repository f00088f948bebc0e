"""Tests of encoders without a class head: fit a head, use it, input sizes, one-line errors."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
pytest.importorskip("open_clip")
import sys

from probes import PLAIN, arguments, config, trained
from safetensors.torch import save_file
from teachers import ANIMALS, class_map, load, refuse

from dad_fast.cli.main import main
from dad_fast.config.schema import AugmentConfig
from dad_fast.errors import DataError, UsageError
from dad_fast.models.load_student import load_student
from dad_fast.models.probe import probe_views
from dad_fast.models.weights.files import write_safetensors
from tests import tiny
from tests.numerics import assert_same_function

pytestmark = pytest.mark.usefixtures("cache")
SIZE = ["--teacher-img-size", "32"]


def write_encoder(path, num_classes=0, seed=0):
    torch.manual_seed(seed)
    save_file(timm.create_model("test_vit", num_classes=num_classes).state_dict(), path)
    return f"timm:test_vit@{path}"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder") / "vit.safetensors")


def errors(capsys):
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if line.startswith("dad-fast")]


# --- heads ----------------------------------------------------------------------------------------


def test_a_linear_head_on_a_timm_encoder(encoder, tmp_path):
    """Also on one with a classifier of other classes, which is not used."""
    other = write_encoder(tmp_path / "five.safetensors", num_classes=5)
    head = tmp_path / "head.safetensors"
    weight, bias = torch.randn(3, 64), torch.randn(3)
    metadata = {"dad_fast.classes": ANIMALS.to_json()}
    write_safetensors(head, {"weight": weight, "bias": bias}, metadata)
    pixels = torch.rand(2, 3, 160, 160)
    for name in (encoder, other):
        teacher = load(name, head=str(head))
        features = teacher.features(pixels)
        assert_same_function(teacher(pixels), features @ weight.T + bias)
        refuse(DataError, ["class 0 is 'ant'"], name, class_map("x", "y", "z"), head=str(head))
    model = timm.create_model("test_vit", num_classes=0).eval()
    model.load_state_dict(load(encoder, head=str(head)).encoder.model.state_dict())
    mean, std = (
        torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std")
    )
    expected = load(encoder, head=str(head)).features(pixels)
    assert_same_function(expected, model((pixels - mean) / std))
    write_safetensors(head, {"weight": torch.zeros(3, 63)}, {})
    refuse(DataError, ["63 features", "has 64"], encoder, head=str(head))


@pytest.mark.parametrize("num_classes", [0, 5])
def test_encoders_without_a_fitting_head_name_the_command_that_makes_one(tmp_path, num_classes):
    name = write_encoder(tmp_path / "vit.safetensors", num_classes)
    words = ["without a class head"] if not num_classes else ["5 outputs", "3 classes"]
    refuse(DataError, [*words, "--lp-labels true", "--teacher-head"], name)


def test_fit_a_head_and_teach_with_it(parts, encoder, tmp_path, capsys):
    """One command makes the head, another uses it; both refuse what does not fit."""
    run, out = tmp_path / "head", tmp_path / "kd"
    fit = arguments(parts, run, "--teacher", encoder, *SIZE, "--preset", "lp-clip-head")
    assert main(fit) == 0
    assert json.loads((run / "results.json").read_text())["teacher"] is None
    assert "features are kept" in (run / "train.log").read_text()
    probe, _ = load_student(run)
    assert probe.spec["encoder_size"] == 32
    assert main(["eval", str(run), "--suite", "val"]) == 0

    head = run / "model.safetensors"
    kd = tiny.train_arguments(parts, out, "--method", "kd", "--teacher", encoder)
    capsys.readouterr()
    assert main(kd) == 4
    assert ["without a class head" in line for line in errors(capsys)] == [True]
    kd += ["--teacher-head", str(head)]
    assert main(kd) == 4
    assert ["add --teacher-img-size 32" in line for line in errors(capsys)] == [True]
    other = write_encoder(tmp_path / "other.safetensors", seed=1)
    assert main([*kd, *SIZE, "--teacher", other]) == 4
    assert ["another encoder" in line for line in errors(capsys)] == [True]
    assert main([*kd, *SIZE, "--teacher-head", str(tmp_path / "none")]) == 4
    assert ["--teacher-head" in line for line in errors(capsys)] == [True]
    assert not out.exists()

    classes = class_map("ant", "bee", "cat")
    teacher = load(encoder, classes, head=str(head), img_size=32)
    pixels = torch.rand(2, 3, 32, 32)
    assert_same_function(teacher(pixels), probe(pixels))
    assert main([*kd, *SIZE]) == 0


def test_pseudo_labels_need_a_head(parts, encoder, tmp_path, capsys):
    assert main(arguments(parts, tmp_path / "run", "--teacher", encoder, *SIZE)) == 4
    assert ["without a class head" in line for line in errors(capsys)] == [True]
    assert not (tmp_path / "run").exists()


def test_a_clip_whose_tokenizer_is_missing_still_gets_a_head(parts, tmp_path, monkeypatch, capsys):
    """SigLIP's needs transformers, which a head with true labels does not."""
    import open_clip

    text_cfg = {**tiny.TOWERS["text_cfg"], "hf_tokenizer_name": "timm/ViT-B-16-SigLIP"}
    architecture = {**tiny.TOWERS, "text_cfg": text_cfg}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "TinySigLIP", architecture)
    monkeypatch.setitem(sys.modules, "transformers", None)
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**tiny.TOWERS).state_dict(), tmp_path / "clip.safetensors")
    name = f"open_clip:TinySigLIP@{tmp_path / 'clip.safetensors'}"
    given = arguments(parts, tmp_path / "run", "--teacher", name)
    assert main(given) == 3
    assert ["pip install transformers" in line for line in errors(capsys)] == [True]
    assert main([*given, "--lp-labels", "true"]) == 0
    assert load_student(tmp_path / "run")[0].spec["unit_features"]


# --- input size -----------------------------------------------------------------------------------


def test_position_embeddings_are_resized_to_the_input_size(encoder, tmp_path):
    head = tmp_path / "head.safetensors"
    write_safetensors(head, {"weight": torch.randn(3, 64)}, {})
    teacher = load(encoder, head=str(head), img_size=64)
    assert teacher.image_size == 64
    assert teacher.encoder.model.pos_embed.shape == (1, 1 + 4 * 4, 64)
    assert teacher(torch.rand(2, 3, 64, 64)).shape == (2, 3)
    assert load(encoder, head=str(head)).encoder.model.pos_embed.shape == (1, 1 + 10 * 10, 64)
    refuse(UsageError, ["images of 60 px", "--teacher-img-size"], encoder, img_size=60)


def test_convolutional_teachers_take_any_size(tmp_path):
    save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "r.pt")
    name = f"timm:test_resnet@{tmp_path / 'r.pt'}"
    small, own = load(name, img_size=64), load(name)
    assert (small.image_size, own.image_size) == (64, 160)
    pixels = torch.rand(2, 3, 64, 64)
    own.image_size = 64
    assert torch.equal(small(pixels), own(pixels))


# --- squashed images ------------------------------------------------------------------------------


def test_a_probe_on_an_encoder_of_squashed_images_sees_them_squashed(parts, tmp_path, monkeypatch):
    """In kept features, pseudo-labels, evaluation and its file, but not in other crops."""
    from dad_fast.data.augment.execute import eval_transform
    from dad_fast.engine.build import Builder
    from dad_fast.models import clip_teacher

    plain = clip_teacher.Teacher

    def squashed(*args, **kwargs):
        return plain(*args, **{**kwargs, "squashed": True})

    monkeypatch.setattr(clip_teacher, "Teacher", squashed)
    cfg = config(parts, "augment.train_interpolation=bicubic", views=PLAIN)
    trainer = trained(cfg, tmp_path / "run", builder=Builder())
    source, encoder = trainer.parts.train, trainer.parts.teacher
    assert source.sizes[0][0] != source.sizes[0][1]
    levels = eval_transform(source.read(0), 32, 1.0, "bicubic", squashed=True)
    pixels = torch.from_numpy(levels.copy()).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        kept = trainer.parts.probe.features.features[0, 0]
        assert_same_function(kept, encoder.features(pixels)[0])
        confidence = trainer.parts.probe.labels.of(torch.tensor([0]))[1]
        assert_same_function(confidence, encoder(pixels).softmax(dim=1).amax(dim=1))
    assert load_student(tmp_path / "run")[0].squashed
    assert probe_views(AugmentConfig(), trainer.parts.student).crop == "random-resized"
