"""Tests of published and fine-tuned weights: wrappers, leftovers, timm's checkpoint filters."""

import collections
import logging

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
open_clip = pytest.importorskip("open_clip")
from teachers import class_map, load, refuse

from dad_fast.config.schema import StudentConfig
from dad_fast.discretizers.vqgan.config import VQGANConfig
from dad_fast.discretizers.vqgan.model import VQGAN
from dad_fast.errors import DataError
from dad_fast.models.student import build_student
from dad_fast.models.weights.files import read_state_dict, write_safetensors
from tests.tiny import TOWERS

SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
F8_LIKE = VQGANConfig(
    ch=32,
    ch_mult=(1, 2, 2, 4),
    num_res_blocks=2,
    attn_levels=(3,),
    z_channels=4,
    embed_dim=4,
    n_embed=64,
)
CLASSES = class_map("a", "b", "c")
WRAPPERS = [
    (),
    ("_orig_mod.", "module."),
    ("model.", "_orig_mod.", "module."),
]


def wrapped(state, prefixes, path, more=None):
    prefix = "".join(prefixes)
    entries = {prefix + key: tensor for key, tensor in state.items()}
    torch.save({"state_dict": collections.OrderedDict({**entries, **(more or {})})}, path)
    return str(path)


def student(name="resnet18", weights="", img_size=32, classes=3, **kwargs):
    torch.manual_seed(5)
    cfg = StudentConfig(name=name, weights=str(weights), model_kwargs=kwargs)
    return build_student(cfg, classes, img_size)


def same_weights(model, state):
    own = model.state_dict()
    return all(torch.equal(own[key], tensor) for key, tensor in state.items())


@pytest.fixture(scope="module")
def states():
    """State dicts for every loader: student, timm teacher, CLIP, VQGAN."""
    torch.manual_seed(0)
    return {
        "student": student(**SMALL).model.state_dict(),
        "timm": timm.create_model("test_vit", num_classes=3).state_dict(),
        "clip": open_clip.CLIP(**TOWERS).state_dict(),
        "vqgan": VQGAN(F8_LIKE).state_dict(),
    }


def loaded(kind, path, monkeypatch):
    """Load a file by the loader `kind` and return its module."""
    if kind == "student":
        return student(weights=path, **SMALL).model
    if kind == "vqgan":
        return VQGAN.load(path)
    if kind == "timm":
        return load(f"timm:test_vit@{path}", CLASSES).whole
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny", dict(TOWERS))
    return load(f"open_clip:Tiny@{path}", CLASSES, templates=("a {}",)).encoder.visual


@pytest.mark.parametrize("kind", ["student", "timm", "clip", "vqgan"])
def test_every_loader_strips_wrappers_and_leftovers(kind, states, tmp_path, monkeypatch, caplog):
    state = states[kind]
    visual = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    leftovers = {
        "loss.discriminator.main.0.weight": torch.zeros(1),
        "model_ema.decay": torch.zeros(()),
        "model_ema.conv1weight": torch.zeros(1),
        "quantize.embedding.cluster_size": torch.zeros(1),
    }
    for prefixes in WRAPPERS:
        caplog.clear()
        path = wrapped(state, prefixes, tmp_path / "w.pth", leftovers)
        with caplog.at_level(logging.WARNING):
            assert same_weights(loaded(kind, path, monkeypatch), visual or state), prefixes
        (line,) = [line for line in caplog.messages if "left out" in line]
        assert "loss.* (1), model_ema.* (2), quantizer statistics (1)" in line
        assert "".join(prefixes) in line and ("stripped" in line) == bool(prefixes)


def test_leftovers_under_a_wrapper(states, tmp_path):
    state = states["student"]
    inner = {f"model.{key}": tensor for key, tensor in state.items()}
    path = wrapped({**inner, "loss.weight": torch.ones(3)}, ("module.",), tmp_path / "w.pth")
    assert same_weights(student(weights=path, **SMALL).model, state)


def test_averaged_weights_are_preferred_as_in_timm(states, tmp_path, caplog):
    state = states["student"]
    other = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    for key in ("state_dict_ema", "model_ema"):
        torch.save({"state_dict": other, key: state}, tmp_path / "w.pth")
        read, _ = read_state_dict(tmp_path / "w.pth")
        assert torch.equal(read["conv1.weight"], state["conv1.weight"]) and key in caplog.text


def test_position_embeddings_are_resized_as_timm_does(tmp_path, caplog):
    torch.manual_seed(1)
    source = timm.create_model("test_vit", num_classes=3)
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    built = student("test_vit", tmp_path / "vit.pth", img_size=64)
    expected = timm.create_model(
        "test_vit",
        img_size=64,
        pretrained=True,
        num_classes=3,
        pretrained_cfg_overlay={"file": str(tmp_path / "vit.pth"), "num_classes": 3},
    )
    assert same_weights(built.model, expected.state_dict())
    assert "resized to the model: pos_embed [1, 101, 64] to [1, 17, 64]" in caplog.text


def test_fitting_does_not_change_random_numbers(tmp_path):
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "vit.pth")
    student("test_vit", img_size=64)
    expected = torch.rand(1)
    student("test_vit", tmp_path / "vit.pth", img_size=64)
    assert torch.equal(torch.rand(1), expected)


SWIN = {"embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": 2}


def test_buffers_of_older_versions(tmp_path):
    """Swin's masks and indices, batch norms without a counter, auxiliary classifiers."""
    swin = student("swin_tiny_patch4_window7_224", **SWIN).model.state_dict()
    extra = {
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.long),
        "layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49),
    }
    torch.save({**swin, **extra}, tmp_path / "swin.pth")
    path = tmp_path / "swin.pth"
    assert same_weights(student("swin_tiny_patch4_window7_224", path, **SWIN).model, swin)

    resnet = student(**SMALL).model.state_dict()
    plain = {key: t for key, t in resnet.items() if not key.endswith("num_batches_tracked")}
    torch.save({**plain, "AuxLogits.conv0.conv.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    assert same_weights(student(weights=tmp_path / "resnet.pth", **SMALL).model, plain)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_a_backbone_gets_a_new_classifier(name, tmp_path, caplog):
    backbone = timm.create_model(name, num_classes=0).state_dict()
    write_safetensors(tmp_path / "backbone.safetensors", backbone, {})
    built = student(name, tmp_path / "backbone.safetensors", img_size=160)
    assert same_weights(built.model, backbone)
    assert "no classifier for the 3 classes: the student starts with a new one" in caplog.text
    refuse(
        DataError,
        ["an encoder without a class head", "--teacher-head"],
        f"timm:{name}@{tmp_path}/backbone.safetensors",
        CLASSES,
    )


def test_original_names_go_through_the_filter(tmp_path):
    """A ConvNeXt under the names of its authors' release."""
    torch.manual_seed(2)
    kwargs = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}
    state = student("convnext_tiny", **kwargs).model.state_dict()
    theirs = {}
    for key, tensor in state.items():
        key = key.replace("stem.", "downsample_layers.0.").replace("head.norm.", "norm.")
        key = key.replace("mlp.fc1", "pwconv1").replace("mlp.fc2", "pwconv2")
        key = key.replace("conv_dw", "dwconv").replace("head.fc.", "head.")
        for stage in range(4):
            key = key.replace(f"stages.{stage}.blocks.", f"stages.{stage}.")
            key = key.replace(f"stages.{stage}.downsample.", f"downsample_layers.{stage}.")
        theirs[key] = tensor
    torch.save({"model": theirs}, tmp_path / "theirs.pth")
    assert not set(theirs) <= set(state)
    built = student("convnext_tiny", tmp_path / "theirs.pth", **kwargs)
    assert same_weights(built.model, state)


def test_the_message_names_another_architecture_only_where_true(tmp_path):
    state = student(**SMALL).model.state_dict()
    wide = student(**{**SMALL, "channels": [8, 8, 8, 16]}).model.state_dict()
    torch.save(wide, tmp_path / "wide.pth")
    with pytest.raises(DataError, match="of this architecture in another size: layer4"):
        student(weights=tmp_path / "wide.pth", **SMALL)
    torch.save({k: t for k, t in state.items() if k != "conv1.weight"}, tmp_path / "part.pth")
    with pytest.raises(DataError, match=r"incomplete, or .*: missing conv1.weight"):
        student(weights=tmp_path / "part.pth", **SMALL)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    with pytest.raises(DataError, match="pth: weights of another architecture: missing conv1"):
        student(weights=tmp_path / "vit.pth", **SMALL)
