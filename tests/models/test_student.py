"""Tests of students: normalisation, initial weights, auxiliary batch norm, self-contained files."""

import json
import logging

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
from safetensors import safe_open
from timm.optim import param_groups_weight_decay

from dad_fast.config.schema import StudentConfig
from dad_fast.errors import DataError, EnvironmentProblem, UsageError
from dad_fast.models.load_student import load_student
from dad_fast.models.places import checkpoint_file
from dad_fast.models.student import (
    build_student,
    load_student_weights,
    read_student,
    save_student,
)
from dad_fast.models.weights.declared import STUDENT
from dad_fast.models.weights.files import write_safetensors
from tests.numerics import assert_same_function

SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
TINY_VIT = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 8}
RESNET = StudentConfig(name="resnet18", model_kwargs=SMALL)


def config(**changes):
    return StudentConfig(**{"name": "resnet18", "model_kwargs": SMALL, **changes})


def build(classes=5, img_size=32, seed=0, num_groups=2, **changes):
    torch.manual_seed(seed)
    return build_student(config(**changes), classes, img_size, num_groups)


def refuse(error, words, **changes):
    with pytest.raises(error) as caught:
        build(**changes)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("name, kwargs", [("resnet18", SMALL), ("vit_tiny_patch16_224", TINY_VIT)])
def test_normalises_inside(name, kwargs):
    student = build(name=name, model_kwargs=kwargs).eval()
    own = timm.data.resolve_data_config({}, model=student.model)
    pixels = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(own[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    assert torch.equal(student(pixels), student.model((pixels - mean) / std))
    assert (student.num_classes, student.image_size) == (5, 32)
    assert (student.crop_pct, student.interpolation) == (own["crop_pct"], own["interpolation"])
    assert student.has_batch_stats == (name == "resnet18")


def test_views_are_squashed_as_the_weights_expect(tmp_path):
    """timm's crop_mode of these weights is squash; files without the entry have centre crops."""
    small = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}
    student = build(name="convnextv2_nano.fcmae_ft_in22k_in1k_384", model_kwargs=small)
    assert student.squashed and not build().squashed
    save_student(tmp_path / "model.safetensors", student, {})
    assert load_student(tmp_path / "model.safetensors")[0].squashed
    state, metadata = student.contents()
    spec = json.loads(metadata[STUDENT])
    del spec["squashed"]
    assert not read_student(tmp_path / "old", state, {STUDENT: json.dumps(spec)}).squashed


def test_a_size_that_patches_do_not_fill_is_warned_of(caplog):
    name, kwargs = "vit_tiny_patch16_224", TINY_VIT
    student = build(name=name, model_kwargs=kwargs, img_size=33)
    assert student.image_size == 33
    (record,) = caplog.records
    text = "patches of 8 pixels, so the last 1 rows and columns are cut off; 32 and 40 fit"
    assert record.getMessage() == f"--img-size 33: {name} has {text}"
    caplog.clear()
    build(name=name, model_kwargs=kwargs, img_size=32)
    build(img_size=33)
    assert not caplog.records


def test_default_image_size_is_the_models_own():
    assert build(img_size=0).image_size == 224
    assert build(img_size=48).image_size == 48


def test_dropout_and_stochastic_depth_reach_the_model():
    model = build(
        name="vit_tiny_patch16_224", model_kwargs=TINY_VIT | {"depth": 2}, drop=0.3, drop_path=0.2
    ).model
    assert model.head_drop.p == 0.3 and model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)


@pytest.mark.parametrize(
    "kwargs", [{}, {"bn": "aux"}, {"name": "vit_tiny_patch16_224", "model_kwargs": TINY_VIT}]
)
def test_file_round_trip(tmp_path, kwargs):
    student = build(**kwargs)
    student(torch.rand(4, 3, 32, 32))  # batch norm has seen something
    save_student(
        tmp_path / "model.safetensors", student, {"dad_fast.method": "dad", "dad_fast.ema": "true"}
    )
    loaded, metadata = load_student(tmp_path / "model.safetensors")
    assert metadata["dad_fast.method"] == "dad" and metadata["dad_fast.ema"] == "true"
    assert loaded.spec == student.spec and not loaded.training
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(pixels), student.eval()(pixels))
    # Timm's own keys, loadable without us
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        keys = set(file.keys())
    assert keys == set(
        timm.create_model(student.name, num_classes=5, **student.spec["model_kwargs"]).state_dict()
    )


def test_a_run_folder_is_accepted_as_a_checkpoint(tmp_path):
    student = build()
    latest = tmp_path / "checkpoints" / "latest"
    latest.mkdir(parents=True)
    save_student(latest / "model.safetensors", student, {})
    assert checkpoint_file(tmp_path) == checkpoint_file(latest) == latest / "model.safetensors"
    save_student(tmp_path / "model.safetensors", student, {})
    # The finished run's model before a checkpoint
    assert checkpoint_file(tmp_path) == tmp_path / "model.safetensors"
    assert load_student(tmp_path)[0].name == "resnet18"
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no model.safetensors"):
        checkpoint_file(tmp_path / "none")
    with pytest.raises(DataError, match=r"nowhere: no such checkpoint; name a run's folder"):
        checkpoint_file(tmp_path / "nowhere")


def test_pixels_from_0_to_255_are_refused():
    with pytest.raises(TypeError, match=r"pixels are torch.uint8; give floats in \[0, 1\]"):
        build()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_a_folder_of_several_runs_names_the_one_that_was_meant(tmp_path):
    for seed in (0, 1):
        save_student(tmp_path / f"dad/seed-{seed}/model.safetensors", build(), {})
    with pytest.raises(DataError, match=r"several runs, such as \S*/dad/seed-0"):
        checkpoint_file(tmp_path)
    with pytest.raises(DataError, match=r"no such checkpoint; \S+ has \S*/dad/seed-1; name"):
        checkpoint_file(tmp_path / "seed-1")


def test_auxiliary_batch_norm():
    """The first half of a batch trains the statistics of evaluation, the second half its own."""
    torch.manual_seed(0)
    student, clean, other = (
        build(bn="aux"),
        torch.rand(8, 3, 32, 32),
        torch.rand(8, 3, 32, 32) * 0.1,
    )
    plain = build().train()
    plain(clean)
    student.train()(torch.cat((clean, other)))
    norm, expected = student.model.bn1, plain.model.bn1
    torch.testing.assert_close(norm.running_mean, expected.running_mean)
    assert not torch.allclose(norm.aux_bn[0].running_mean, norm.running_mean)
    # In evaluation: one set of statistics, any batch size
    assert_same_function(student.eval()(clean)[:3], student(clean[:3]))


def test_auxiliary_batch_norm_needs_two_groups():
    """A method without attacked images ignores --bn aux."""
    assert build(bn="aux", num_groups=1).state_dict().keys() == build().state_dict().keys()
    assert len(build(bn="aux", num_groups=3).model.bn1.aux_bn) == 2


def test_auxiliary_batch_norm_keeps_fused_activations(monkeypatch):
    """Versions of timm before 1.0.31 lost them silently."""
    fused = {"name": "test_efficientnet", "model_kwargs": {}}
    if (
        timm.layers.convert_splitbn_model(timm.layers.BatchNormAct2d(1)).eval()(
            -torch.ones(1, 1, 1, 1)
        )
        == 0
    ):
        pixels = torch.rand(2, 3, 32, 32)
        assert torch.equal(build(bn="aux", **fused).eval()(pixels), build(**fused).eval()(pixels))

        def without(norm, num_splits=2):
            return timm.layers.SplitBatchNorm2d(1, num_splits=num_splits)

        monkeypatch.setattr("dad_fast.models.student.convert_splitbn_model", without)
    refuse(EnvironmentProblem, ["--bn aux", "test_efficientnet", "timm>=1.0.31"], bn="aux", **fused)


def test_initial_weights_from_bare_wrapped_and_own_files(tmp_path):
    """Accept bare and wrapped state dicts and a run's file, also as --init-from."""
    source = build(seed=1)
    torch.save(source.model.state_dict(), tmp_path / "a.pth")
    torch.save(
        {
            "state_dict": {f"module.{k}": v for k, v in source.model.state_dict().items()},
            "epoch": 1,
        },
        tmp_path / "b.pth",
    )
    save_student(tmp_path / "c.safetensors", source, {})
    wrapped = {f"_orig_mod.module.{k}": v for k, v in source.model.state_dict().items()}
    torch.save({"model": wrapped}, tmp_path / "d.pth")
    pixels = torch.rand(2, 3, 32, 32)
    expected = source.eval()(pixels)
    for changes in (
        {"weights": "a.pth"},
        {"weights": "b.pth"},
        {"weights": "c.safetensors"},
        {"weights": "d.pth"},
        {"init_from": "c.safetensors"},
    ):
        changes = {key: str(tmp_path / name) for key, name in changes.items()}
        assert torch.equal(build(seed=2, **changes).eval()(pixels), expected)


def test_another_number_of_classes_starts_a_new_head(tmp_path, caplog):
    source = build(classes=7, seed=1)
    save_student(tmp_path / "seven.safetensors", source, {})
    with caplog.at_level(logging.WARNING):
        student = build(classes=5, seed=2, weights=str(tmp_path / "seven.safetensors"))
    assert "7 classes, not 5" in caplog.text and "seven.safetensors" in caplog.text
    assert torch.equal(student.model.conv1.weight, source.model.conv1.weight)
    assert torch.equal(student.model.fc.weight, build(classes=5, seed=2).model.fc.weight)


def test_weights_of_another_architecture_are_refused(tmp_path):
    save_student(
        tmp_path / "other.safetensors",
        build(name="vit_tiny_patch16_224", model_kwargs=TINY_VIT),
        {},
    )
    refuse(
        DataError,
        ["other.safetensors", "another architecture", "missing conv1.weight"],
        weights=str(tmp_path / "other.safetensors"),
    )
    refuse(DataError, ["nowhere.pth", "no such"], weights=str(tmp_path / "nowhere.pth"))
    wider = build(model_kwargs={**SMALL, "channels": [8, 8, 8, 16]})
    save_student(tmp_path / "wider.safetensors", wider, {})
    with pytest.raises(
        DataError, match=r"layer4.0.conv1.weight is \[16, 8, 3, 3\], not \[8, 8, 3, 3\]"
    ):
        load_student_weights(build(), tmp_path / "wider.safetensors")


def test_unknown_models_and_arguments_are_refused():
    refuse(
        UsageError, ["--student resnt18", "did you mean resnet18"], name="resnt18", model_kwargs={}
    )
    refuse(UsageError, ["--student resnet18", "colour", "model_kwargs"], model_kwargs={"colour": 3})
    refuse(
        UsageError,
        ["--student vit_tiny", "divisible", "model_kwargs"],
        name="vit_tiny_patch16_224",
        model_kwargs={"embed_dim": 25},
    )


def test_names_of_teachers_and_of_the_hub():
    student = build(name="timm:resnet18")
    assert student.name == "resnet18"
    expected = build().model.state_dict()
    assert all(torch.equal(t, expected[k]) for k, t in student.model.state_dict().items())
    refuse(
        UsageError,
        ["write resnet18.a1_in1k, or hf-hub:timm/resnet18.a1_in1k"],
        name="timm/resnet18.a1_in1k",
    )
    refuse(
        UsageError,
        ["write --student resnet18 --student-weights r.pth"],
        name="timm:resnet18@r.pth",
    )


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18.a1_in1k", "resnet18.a1_in1k"])
def test_an_unreachable_hub_is_not_asked_again(name, monkeypatch, capfd, caplog):
    """Nothing listens on the port; the hub's client would ask it for 24 s."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{filename}"
    )
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits for another try"))
    with caplog.at_level(logging.DEBUG):
        refuse(
            EnvironmentProblem,
            [f"--student {name}", "the hub cannot be reached", "--student-weights FILE"],
            name=name,
            model_kwargs={},
            pretrained=True,
        )
    assert "Retry" not in caplog.text and capfd.readouterr() == ("", "")


def test_pretrained_without_a_network(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr(timm, "create_model", offline)
    refuse(
        EnvironmentProblem,
        ["--pretrained", "no route to host", "--student-weights"],
        pretrained=True,
    )


@pytest.mark.parametrize(
    "metadata, words",
    [
        ({}, "not a student of dad-fast"),
        *(({"dad_fast.student": text}, "damaged") for text in ("{", "{}", "[]")),
    ],
)
def test_files_without_a_student_are_refused(tmp_path, metadata, words):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, build().model.state_dict(), metadata)
    with pytest.raises(DataError, match=words) as error:
        load_student(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_spec_is_plain_json(tmp_path):
    save_student(tmp_path / "model.safetensors", build(), {})
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        spec = json.loads(file.metadata()["dad_fast.student"])
    assert spec == {
        "name": "resnet18",
        "model_kwargs": SMALL,
        "num_classes": 5,
        "img_size": 32,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "crop_pct": 0.95,
        "interpolation": "bicubic",
        "squashed": False,
    }


def test_weight_decay_groups_equal_those_of_the_bare_model():
    student = build_student(
        StudentConfig(name="vit_tiny_patch16_224", model_kwargs={"depth": 1}), 3
    )
    bare = student.model
    ours = param_groups_weight_decay(student, 0.1, student.no_weight_decay())
    theirs = param_groups_weight_decay(bare, 0.1, bare.no_weight_decay())
    assert [list(map(id, group["params"])) for group in ours] == [
        list(map(id, group["params"])) for group in theirs
    ]
    assert {"model.pos_embed", "model.cls_token"} <= student.no_weight_decay()
    assert build_student(StudentConfig(name="resnet18"), 3).no_weight_decay() == set()
