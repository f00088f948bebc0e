"""Tests of the checks of metadata: no downloads, no code, no huge models."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
pytest.importorskip("safetensors")
from timm.data import resolve_data_config

from dad_fast.config.schema import StudentConfig
from dad_fast.errors import DataError, UsageError
from dad_fast.models.load_student import load_student
from dad_fast.models.student import build_student
from dad_fast.models.weights.declared import checked_spec, recorded_classes
from dad_fast.models.weights.files import write_safetensors
from tests.limits import cpu_limit

SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
SPEC = {
    "name": "resnet18",
    "model_kwargs": SMALL,
    "num_classes": 3,
    "img_size": 32,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "squashed": False,
}
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    state: dict[str, Any] = build_student(
        StudentConfig(name="resnet18", model_kwargs=SMALL), 3, 32
    ).model.state_dict()
    return state


def changed(**entries: Any) -> str:
    return json.dumps({**SPEC, **entries})


def kwargs(**entries: Any) -> str:
    return changed(model_kwargs={**SMALL, **entries})


HOSTILE = {
    "no json": "{",
    "a list": "[]",
    "a number": "1",
    "deep": DEEP,
    "an entry is missing": json.dumps({"name": "resnet18"}),
    "a hub": changed(name="hf-hub:someone/else"),
    "a folder": changed(name="local-dir:/etc"),
    "a path": changed(name="/etc/passwd"),
    "no model": changed(name="os.system"),
    "a name of a megabyte": changed(name="r" * 2**20),
    "a list for a name": changed(name=["resnet18"]),
    "classes": changed(num_classes=10**12),
    "no classes": changed(num_classes=0),
    "true classes": changed(num_classes=True),
    "a side": changed(img_size=10**9),
    "a fraction of a pixel": changed(img_size=1.5),
    "nan": changed(mean=[float("nan")] * 3),
    "infinite": changed(crop_pct=float("inf")),
    "a squash that is no switch": changed(squashed=1),
    "zero": changed(std=[0.0] * 3),
    "two colours": changed(mean=[0.5] * 2),
    "kwargs as a list": changed(model_kwargs=[]),
    "a crop of nothing": changed(crop_pct=0),
    "its own weights": kwargs(checkpoint_path="/etc/passwd"),
    "a download": kwargs(pretrained=True),
    "its own source": kwargs(pretrained_cfg={"url": "http://localhost/x.pth"}),
    "an overlay": kwargs(pretrained_cfg_overlay={"file": "x"}),
    "features": kwargs(features_only=True),
    "a cache": kwargs(cache_dir="/tmp"),
    "scripts": kwargs(scriptable=True),
    "huge": kwargs(channels=[10**12] * 4),
    "many digits": changed(model_kwargs={**SMALL, "channels": [10**4000] * 4}),
    "wide": kwargs(channels=[60_000] * 4),
    "long": kwargs(layers=[60_000, 1, 1, 1]),
    "many": kwargs(layers=[1] * 10**5),
    "deep kwargs": kwargs(x=[[[[[[[[[[1]]]]]]]]]]),
    "a long text": kwargs(act_layer="r" * 1000),
    "unknown": kwargs(colour=3),
    "a wide vit": changed(
        name="vit_tiny_patch16_224", model_kwargs={"embed_dim": 60_000, "num_heads": 1}
    ),
    "many patches": changed(
        name="vit_tiny_patch16_224", model_kwargs={"patch_size": 1}, img_size=16_384
    ),
    "long vit": changed(
        name="vit_tiny_patch16_224", model_kwargs={"depth": 60_000, "embed_dim": 24, "num_heads": 2}
    ),
    "other model": changed(name="resnet50"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_descriptions(
    tmp_path: Path, state: dict[str, Any], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def no_network(*arguments: Any, **named: Any) -> None:
        raise AssertionError("asked for the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    path = tmp_path / "model.safetensors"
    write_safetensors(path, state, {"dad_fast.student": HOSTILE[what]})
    with cpu_limit(), pytest.raises(DataError) as caught:
        load_student(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.isprintable() and len(message) < 600, message


def test_every_configuration_of_timm_can_be_read_back() -> None:
    """A student's file describes its view; a run may write what its reader accepts."""
    refused = {}
    for name in timm.list_models(pretrained=True):
        cfg = timm.get_pretrained_cfg(name).to_dict()
        view = resolve_data_config(pretrained_cfg=cfg)
        spec = {
            "name": name,
            "img_size": view["input_size"][-1],
            **{key: view[key] for key in ("mean", "std", "crop_pct", "interpolation")},
        }
        if view["input_size"][0] != 3:
            continue
        try:
            checked_spec(changed(**spec))
        except ValueError as error:
            refused[name] = str(error)
    assert not refused


def test_a_valid_description_is_accepted_unchanged() -> None:
    assert checked_spec(json.dumps({**SPEC, "more": 1})) == SPEC


def test_build_student_refuses_arguments_of_no_architecture() -> None:
    with pytest.raises(UsageError, match="student.model_kwargs: model_kwargs.checkpoint_path"):
        build_student(
            StudentConfig(name="resnet18", model_kwargs={"checkpoint_path": "x.pth"}), 3, 32
        )


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "[]",
        "{}",
        "[[0]]",
        "[[0,1,2],[0,1,2],[2,3,4]]",
        "[[Infinity,1,2]]",
        DEEP,
        '[["0x1",1,2]]',
    ],
)
def test_damaged_class_lists_are_refused(text: str | None) -> None:
    with pytest.raises(DataError) as caught:
        recorded_classes("m.safetensors", text, 3)
    assert str(caught.value).startswith("m.safetensors: ") and "\n" not in str(caught.value)


def test_class_list_must_have_the_length_of_the_head() -> None:
    text = json.dumps([[0, "ant", "ant"], [1, "bee", "bee"]])
    assert recorded_classes("m", text, 2).names == ["ant", "bee"]
    with pytest.raises(DataError, match="2 classes, its model 3 outputs"):
        recorded_classes("m", text, 3)


@pytest.mark.parametrize(
    "name",
    [
        "swin_tiny_patch4_window7_224",
        "convnext_atto",
        "tf_efficientnet_lite0",
        "test_vit",
        "deit_tiny_patch16_224",
    ],
)
def test_students_of_many_architectures_load(tmp_path: Path, name: str) -> None:
    """Models with extra buffers and models that replace their classifier fit their own files."""
    model = timm.create_model(name, num_classes=3)
    spec = {
        **SPEC,
        "name": name,
        "model_kwargs": {},
        "img_size": timm.data.resolve_data_config({}, model=model)["input_size"][-1],
    }
    write_safetensors(
        tmp_path / "m.safetensors", model.state_dict(), {"dad_fast.student": json.dumps(spec)}
    )
    student, _ = load_student(tmp_path / "m.safetensors")
    pixels = torch.rand(1, 3, spec["img_size"], spec["img_size"])
    with torch.no_grad():
        assert torch.equal(student(pixels), model.eval()((pixels - 0.5) / 0.25))
