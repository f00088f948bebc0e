"""Tests of ensembles of teachers: means, names, one-line errors, stores and records."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
for package in ("timm", "open_clip"):
    pytest.importorskip(package)
import tiny
from teachers import ANIMALS, class_map, load, refuse

from dad_fast.cli.main import main
from dad_fast.config.schema import PrecisionConfig, StudentConfig, TeacherConfig
from dad_fast.errors import DataError, UsageError
from dad_fast.methods.losses import distillation, soft_cross_entropy
from dad_fast.models.ensemble import Ensemble, MeanOutput
from dad_fast.models.load_teacher import load_teacher
from dad_fast.models.optimizations import Optimizations, optimize_teacher
from dad_fast.models.registry import members, split_names
from dad_fast.models.student import build_student, save_student
from dad_fast.models.weights.files import fingerprint
from tests.numerics import assert_same_function

RESNET = StudentConfig(
    name="resnet18", model_kwargs={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A CLIP of 32 px, and a ResNet of 40 px with another normalisation."""
    folder = tmp_path_factory.mktemp("members")
    tiny.write_teacher(folder / "clip.safetensors")
    torch.manual_seed(1)
    metadata = {"dad_fast.classes": ANIMALS.to_json()}
    save_student(folder / "resnet.safetensors", build_student(RESNET, 3, 40), metadata)
    return folder


# --- the mean -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_losses_and_gradients_equal_those_of_the_mean_of_probabilities(temperature):
    """In float64, for every loss that takes logits: KD at T, and the attack's cross-entropy."""
    torch.manual_seed(0)
    weights = (0.5, 0.2, 0.3)
    layers = torch.randn(3, 7, 12, dtype=torch.float64) * 5
    student = torch.randn(7, 12, dtype=torch.float64)
    image = torch.rand(4, 12, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 6, 2, 2])
    mean = MeanOutput(weights, "probabilities", temperature)

    def logits_of_members():
        return torch.einsum("mcf,bf->mbc", layers, image)

    def mean_probabilities():
        members = (logits_of_members() / temperature).softmax(dim=2)
        return sum(w * one for w, one in zip(weights, members, strict=True))

    def kd_by_formula():
        p = mean_probabilities()
        q = (image @ student.T / temperature).softmax(dim=1)
        return temperature**2 * (p * (p.log() - q.log())).sum(dim=1).mean()

    def attack_by_formula():
        powers = mean_probabilities() ** temperature  # softmax(T log p)
        return -(powers[range(4), labels] / powers.sum(dim=1)).log().mean()

    kd = distillation(image @ student.T, mean(logits_of_members()), temperature)
    attack = soft_cross_entropy(mean(logits_of_members()), labels)
    for found, expected in ((kd, kd_by_formula()), (attack, attack_by_formula())):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(loss, image)[0] for loss in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_confident_members_stay_finite():
    logits = torch.tensor([[[500.0, 0.0]], [[0.0, 500.0]]], requires_grad=True)
    out = MeanOutput((1, 3), "probabilities", 1.0)(logits)
    torch.testing.assert_close(out.softmax(dim=1), torch.tensor([[0.25, 0.75]]))
    out[0, 0].backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_members_keep_their_size_and_normalisation(files, average):
    names = [str(files / "clip.safetensors"), str(files / "resnet.safetensors")]
    cfg = TeacherConfig(name="+".join(names), weights=(3.0, 1.0), average=average)
    cpu = torch.device("cpu")
    ensemble = load_teacher(cfg, ANIMALS, PrecisionConfig(), cpu, temperature=2.0)
    assert isinstance(ensemble, Ensemble)
    assert [member.image_size for member in ensemble.members] == [32, 40]
    assert (ensemble.image_size, ensemble.name) == (40, cfg.name)

    pixels = torch.rand(2, 3, 36, 36)
    clip, resnet = (load(name)(pixels) for name in names)
    found = ensemble(pixels)
    assert found.dtype == torch.float32
    if average == "logits":
        assert_same_function(found, 0.75 * clip + 0.25 * resnet)
    else:
        expected = 0.75 * (clip / 2).softmax(dim=1) + 0.25 * (resnet / 2).softmax(dim=1)
        assert_same_function((found / 2).softmax(dim=1), expected)
    features = ensemble.features(pixels)
    assert features.shape == (2, tiny.TOWERS["embed_dim"] + 8)


def test_hash_covers_weights_of_members_temperature_and_average(files):
    name = f"{files}/clip.safetensors+{files}/resnet.safetensors"
    settings = [{}, {"weights": (2.0, 1.0)}, {"average": "logits"}]
    hashes = {fingerprint(load(name, **one)) for one in settings}
    cfg, cpu = TeacherConfig(name=name), torch.device("cpu")
    other = load_teacher(cfg, ANIMALS, PrecisionConfig(), cpu, temperature=1.0)
    assert len(hashes | {fingerprint(other)}) == 4


def test_optimizations_apply_to_every_member(files, tmp_path):
    other = tiny.write_teacher(tmp_path / "other.safetensors", seed=3)
    ensemble = load(f"{files}/clip.safetensors+{other}")
    pixels = torch.rand(2, 3, 32, 32)
    before = ensemble(pixels)
    applied = optimize_teacher(ensemble, Optimizations())
    assert applied[f"{files}/clip.safetensors: clip_attention"] == ""
    assert applied[f"{other}: fold_normalisation"] == ""
    assert all(member.takes_raw_pixels for member in ensemble.members)
    assert_same_function(ensemble(pixels), before)


# --- names ----------------------------------------------------------------------------------------


def test_a_plus_inside_the_name_of_a_file_stays(tmp_path):
    file = tmp_path / "a+b+c.safetensors"
    assert split_names(f"timm:resnet18@{file}")[1:] == ["b", "c.safetensors"]
    file.write_bytes(b"")
    for name in (str(file), f"timm:resnet18@{file}"):
        assert split_names(name) == [name]
        assert split_names(f"{name}+embedded:digits+{name}") == [name, "embedded:digits", name]
    assert split_names("timm:a+open_clip:B/c") == ["timm:a", "open_clip:B/c"]


def test_heads_are_matched_in_order(files):
    cfg = TeacherConfig(name="timm:a+timm:b", head="+head.safetensors", img_size=64)
    assert [(one.name, one.head, one.img_size) for one in members(cfg)] == [
        ("timm:a", "", 64),
        ("timm:b", "head.safetensors", 64),
    ]


@pytest.mark.parametrize(
    ("words", "name", "settings"),
    [
        (["a name is missing next to a +"], "timm:a+", {}),
        (["timm:a twice"], "timm:a+timm:b+timm:a", {}),
        (["--teacher-weights: 3 weights for 2"], "timm:a+timm:b", {"weights": (1.0, 1.0, 1.0)}),
        (["--teacher-weights: 1 weights for 2"], "timm:a+timm:b", {"weights": (1.0,)}),
        (["--teacher-head", "1 for 2"], "timm:a+timm:b", {"head": "head.safetensors"}),
        (["--teacher-img-size", "fixed input size"], "embedded:digits", {"img_size": 64}),
        (["timm:a: timm has no such model"], "timm:a+timm:b", {}),
    ],
)
def test_ensembles_that_do_not_fit_together(words, name, settings):
    refuse(UsageError, words, name, **settings)


def test_members_of_other_classes_are_refused(files):
    name = f"{files}/clip.safetensors+{files}/resnet.safetensors"
    refuse(DataError, ["resnet.safetensors", "class 0 is 'ant'"], name, class_map("x", "y", "z"))


# --- runs and stores ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def second(parts):
    return tiny.write_teacher(parts / "second.safetensors", seed=5)


def ensemble_arguments(parts, second, out, *more, **options):
    name = f"{parts / 'teacher.safetensors'}+{second}"
    return tiny.train_arguments(parts, out, "--teacher", name, *more, **options)


def test_a_store_and_a_run_record_all_members(parts, second, tmp_path, capsys):
    """The store serves runs with the same members, weights and temperature alone."""
    store, out = tmp_path / "store", tmp_path / "run"
    weights = ["--teacher-weights", "2", "1"]
    made = ensemble_arguments(parts, second, store, *weights, "--images", "raw", verb="precompute")
    assert main(made) == 0
    hashes = json.loads((store / "manifest.json").read_text())["hashes"]
    assert {"teacher", "teacher 1", "teacher 2"} < set(hashes)

    moved = tmp_path / second.name
    tiny.write_teacher(moved, seed=6)
    same_members = "its members are the same"
    for other, more, words in (
        (moved, weights, "made with another teacher 2"),
        (second, [], same_members),
        (second, [*weights, "--temperature", "2"], same_members),
    ):
        assert main(ensemble_arguments(parts, other, out, "--store", store, *more)) == 4
        assert words in capsys.readouterr().err
        assert not out.exists()

    assert main(ensemble_arguments(parts, second, out, "--store", store, *weights)) == 0
    teacher = json.loads((out / "run.json").read_text())["teacher"]
    assert teacher["average"] == "probabilities"
    assert [one["name"] for one in teacher["members"]] == [
        str(parts / "teacher.safetensors"),
        str(second),
    ]
    assert [one["weight"] for one in teacher["members"]] == pytest.approx([2 / 3, 1 / 3])
    assert [one["loaded_sha256"] for one in teacher["members"]] == [
        hashes["teacher 1"],
        hashes["teacher 2"],
    ]
    results = json.loads((out / "results.json").read_text())
    assert results["teacher"]["suites"]["val"]["num_images"] == 24
    log = (out / "train.log").read_text()
    assert f"mean of probabilities of 67% {parts / 'teacher.safetensors'}, 33% {second}" in log


def test_a_linear_probe_refuses_an_ensemble(parts, second, tmp_path, capsys):
    given = ensemble_arguments(parts, second, tmp_path / "run", "--method", "lp-clip")
    assert main(given) == 2
    assert "trains on one encoder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
