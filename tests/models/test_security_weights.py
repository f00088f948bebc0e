"""Tests of hostile weights: a quick one-line error, no code, no downloads, bounded memory."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("safetensors")

from dad_fast.config.schema import PrecisionConfig, TeacherConfig
from dad_fast.data.classes import ClassMap
from dad_fast.discretizers.vqgan.model import VQGAN
from dad_fast.errors import DadFastError, DataError
from dad_fast.models.clip_weights import _tokenizer_at_hand
from dad_fast.models.load_student import load_student
from dad_fast.models.load_teacher import load_teacher
from dad_fast.models.weights.files import read_state_dict, write_safetensors
from tests.limits import cpu_limit
from tests.models.test_declared import SPEC
from tests.tiny import write_teacher, write_vqgan

DEEP = "[" * 100_000 + "]" * 100_000
CLASSES = ClassMap(((0, "ant", "ant"), (1, "bee", "bee"), (2, "cat", "cat")))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record requests to the network, and fail them."""
    asked: list[Any] = []

    def refuse(*arguments: Any, **named: Any) -> Any:
        asked.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return asked


def refused(load: Callable[[], Any], *words: str) -> None:
    """Expect a one-line error within seconds."""
    with cpu_limit(), pytest.raises(DadFastError) as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600 and all(word in message for word in words), (
        message
    )


def put(path: Path, state: dict[str, Any], key: str, text: str, **metadata: str) -> Path:
    write_safetensors(path, state, {key: text, **metadata})
    return path


# --- safetensors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"{}",
        b'{"a":1}',
        b'{"w":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}',
        b"[" * 10**5,
    ],
)
def test_invalid_safetensors_headers_are_refused(tmp_path: Path, header: bytes) -> None:
    for length in (len(header), 2**63, 2**62 - 1, 0):
        (tmp_path / "x.safetensors").write_bytes(length.to_bytes(8, "little") + header + b"\0" * 4)
        try:
            state, metadata = read_state_dict(tmp_path / "x.safetensors")
        except DataError as error:
            assert "\n" not in str(error)
        else:
            assert not state and not metadata  # an empty file is one


# --- a student ------------------------------------------------------------------------------------

THIN = {"embed_dim": 4, "num_heads": 1, "depth": 1}
SMALL_FILES_OF_LARGE_MODELS = {
    "masks": {"name": "swin_tiny_patch4_window7_224", "img_size": 16_384}
    | {"model_kwargs": {"embed_dim": 4, "depths": [2] * 4, "num_heads": [1] * 4}},
    "tables": {"name": "beit_base_patch16_224", "img_size": 4096, "model_kwargs": THIN},
    "windows": {"name": "swinv2_tiny_window8_256", "img_size": 2048}
    | {"model_kwargs": {"window_size": 512, "embed_dim": 4, "num_heads": [1] * 4}},
    "layers": {"name": "vit_tiny_patch16_224", "img_size": 16}
    | {"model_kwargs": {"depth": 65_536, "embed_dim": 1, "num_heads": 1, "mlp_ratio": 0.0}},
}


@pytest.mark.parametrize(
    "changes", SMALL_FILES_OF_LARGE_MODELS.values(), ids=SMALL_FILES_OF_LARGE_MODELS
)
def test_students_with_huge_buffers_or_many_layers_are_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """A file of three numbers would need ten gigabytes of masks, or minutes to build layers."""
    path = put(
        tmp_path / "m.safetensors",
        {"w": torch.zeros(3)},
        "dad_fast.student",
        json.dumps(SPEC | changes),
    )
    refused(lambda: load_student(path), "m.safetensors", "than fit the 3 numbers in the file")


# --- a VQGAN --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    root = tmp_path_factory.mktemp("vqgan")
    VQGAN.load(write_vqgan(root / "q.ckpt")).save(root / "q.safetensors", seen="noise")
    state, metadata = read_state_dict(root / "q.safetensors")
    return state, json.loads(metadata["dad_fast.vqgan"])


@pytest.mark.parametrize(
    "changes",
    [
        {"ch": "32"},
        {"ch": 10**6},
        {"ch": 10**18},
        {"ch": -1},
        {"ch": 1.5},
        {"ch": True},
        {"ch_mult": [1] * 10**5},
        {"ch_mult": []},
        {"ch_mult": 3},
        {"ch_mult": [[1]]},
        {"num_res_blocks": 10**7},
        {"n_embed": 10**12},
        {"norm_groups": 0},
        {"attn_levels": None},
        {"attn_levels": [-1]},
        {"embed_dim": 10**6},
        {"z_channels": 0},
        {"in_channels": 10**5},
        {"colour": 1},
        {"num_res_blocks": 31},
    ],
    ids=str,
)
def test_impossible_vqgan_shapes_are_refused(
    tmp_path: Path, vqgan: Any, changes: dict[str, Any]
) -> None:
    state, config = vqgan
    path = put(tmp_path / "x.safetensors", state, "dad_fast.vqgan", json.dumps(config | changes))
    refused(lambda: VQGAN.load(path), "x.safetensors")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", DEEP, '{"ch": ' + "9" * 5000 + "}"])
def test_damaged_vqgan_metadata_is_refused(tmp_path: Path, vqgan: Any, text: str) -> None:
    path = put(tmp_path / "x.safetensors", vqgan[0], "dad_fast.vqgan", text)
    refused(lambda: VQGAN.load(path), "x.safetensors")


@pytest.mark.parametrize(
    "key",
    [
        "encoder.down.1000000000.x",
        "encoder.down.0.block.1000000000.x",
        "encoder.down.x",
        "encoder.down.0.block.9e9.y",
    ],
)
def test_state_dict_keys_of_an_impossible_vqgan_are_refused(
    tmp_path: Path, vqgan: Any, key: str
) -> None:
    torch.save({"state_dict": {**vqgan[0], key: torch.zeros(1)}}, tmp_path / "x.ckpt")
    refused(lambda: VQGAN.load(tmp_path / "x.ckpt"), "x.ckpt")


# --- a teacher that describes itself --------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    pytest.importorskip("open_clip")
    state, metadata = read_state_dict(
        write_teacher(tmp_path_factory.mktemp("clip") / "t.safetensors")
    )
    return state, json.loads(metadata["dad_fast.teacher"])


def read_teacher(path: Path | str) -> Any:
    return load_teacher(
        TeacherConfig(name=str(path)), CLASSES, PrecisionConfig(), torch.device("cpu")
    )


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("vision_cfg", {"timm_model_name": "hf-hub:someone/else"}),
        ("vision_cfg", {"timm_model_name": "resnet18", "timm_model_pretrained": True}),
        ("vision_cfg", {"timm_model_name": "../../etc/passwd"}),
        ("text_cfg", {"hf_model_name": "someone/else"}),
        ("text_cfg", {"hf_tokenizer_name": "someone/else"}),
        ("text_cfg", {"hf_model_pretrained": True}),
        ("vision_cfg", {"layers": 10**6}),
        ("vision_cfg", {"layers": 60_000}),
        ("vision_cfg", {"width": 65_000, "head_width": 65_000}),
        ("vision_cfg", {"image_size": 65_536}),
        ("vision_cfg", {"patch_size": 0}),
        ("vision_cfg", {"image_size": "x"}),
        ("vision_cfg", {"unknown": 1}),
        ("text_cfg", {"vocab_size": 10**10}),
        ("text_cfg", {"context_length": 60_000}),
        ("text_cfg", {"context_length": None}),
        ("text_cfg", {"layers": 60_000}),
        ("", {"embed_dim": 60_000}),
        ("", {"embed_dim": -1}),
    ],
    ids=str,
)
def test_teachers_that_would_download_or_grow_are_refused(
    tmp_path: Path, clip: Any, no_network: list[Any], part: str, changes: dict[str, Any]
) -> None:
    state, described = clip
    config = described["model_cfg"]
    config = {**config, part: {**config[part], **changes}} if part else {**config, **changes}
    path = put(
        tmp_path / "x.safetensors",
        state,
        "dad_fast.teacher",
        json.dumps({**described, "model_cfg": config}),
    )
    refused(lambda: read_teacher(path), "x.safetensors")
    assert not no_network


def test_the_tokenizer_of_a_local_file_is_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some architectures have their tokenizer on the hub."""
    constants = pytest.importorskip("huggingface_hub").constants
    offline = []
    monkeypatch.setattr(
        "open_clip.get_tokenizer", lambda arch: offline.append(constants.HF_HUB_OFFLINE)
    )
    _tokenizer_at_hand("ViT-B-16-SigLIP")
    assert offline == [True] and not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    "arch", ["hf-hub:someone/else", "local-dir:/tmp", "../../x", "https://x/y"]
)
def test_an_architecture_cannot_name_a_hub_or_a_folder(
    tmp_path: Path, clip: Any, no_network: list[Any], arch: str
) -> None:
    write_safetensors(tmp_path / "w.safetensors", clip[0], {})
    refused(
        lambda: read_teacher(f"open_clip:{arch}@{tmp_path / 'w.safetensors'}"),
        "no such architecture",
    )
    assert not no_network


@pytest.mark.parametrize(
    "changes",
    [
        {"mean": "abc"},
        {"mean": [1]},
        {"std": [0, 0, 0]},
        {"std": [float("nan")] * 3},
        {"templates": 5},
        {"templates": ["a {}"] * 10**4},
        {"templates": ["{.__class__.__init__.__globals__}"]},
        {"templates": ["{0:>1000000000}"]},
        {"seen": ["x"]},
        {"model_cfg": []},
        {"model_cfg": {"vision_cfg": 1, "text_cfg": 2}},
    ],
    ids=str,
)
def test_damaged_teacher_descriptions_are_refused(
    tmp_path: Path, clip: Any, changes: dict[str, Any]
) -> None:
    path = put(
        tmp_path / "x.safetensors", clip[0], "dad_fast.teacher", json.dumps({**clip[1], **changes})
    )
    refused(lambda: read_teacher(path))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", DEEP])
def test_damaged_teacher_metadata_is_refused(tmp_path: Path, clip: Any, text: str) -> None:
    refused(
        lambda: read_teacher(put(tmp_path / "x.safetensors", clip[0], "dad_fast.teacher", text)),
        "x.safetensors",
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "[]",
        "3",
        DEEP,
        '{"model_cfg": 3}',
        '{"preprocess_cfg": []}',
        '{"preprocess_cfg": {"mean": "x", "std": [1, 1, 1]}}',
        '{"preprocess_cfg": {"mean": [0, 0, 0], "std": [0, 0, 0]}}',
    ],
    ids=lambda text: text[:30],
)
def test_a_damaged_open_clip_config_is_refused(tmp_path: Path, clip: Any, text: str) -> None:
    write_safetensors(tmp_path / "w.safetensors", clip[0], {})
    (tmp_path / "open_clip_config.json").write_text(text)
    refused(
        lambda: read_teacher(f"open_clip:ViT-B-32@{tmp_path / 'w.safetensors'}"),
        "open_clip_config.json",
    )


# --- a linear probe -------------------------------------------------------------------------------


@pytest.fixture
def probe(tmp_path: Path, clip: Any) -> Iterator[Callable[..., Path]]:
    """Write a probe's file with some entries of its metadata changed."""
    teacher = put(tmp_path / "t.safetensors", clip[0], "dad_fast.teacher", json.dumps(clip[1]))
    spec = {
        "name": "probe",
        "teacher": str(teacher),
        "encoder_sha256": "0" * 64,
        "num_features": 16,
        "unit_features": True,
        "num_classes": 3,
        "img_size": 32,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
    }
    state = {"weight": torch.zeros(3, 16), "bias": torch.zeros(3)}

    def write(**changes: Any) -> Path:
        text = changes.pop("text", json.dumps({**spec, **changes}))
        return put(
            tmp_path / "p.safetensors",
            state,
            "dad_fast.probe",
            text,
            **{"dad_fast.classes": CLASSES.to_json()},
        )

    yield write


@pytest.mark.parametrize(
    "name",
    [
        "hf-hub:someone/else",
        "open_clip:ViT-B-32/openai",
        "timm:resnet18.a1_in1k",
        "timm:vit_base_patch16_224",
    ],
)
def test_loading_a_probe_downloads_no_encoder(
    probe: Callable[..., Path], no_network: list[Any], monkeypatch: Any, tmp_path: Path, name: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused(lambda: load_student(probe(teacher=name)))
    assert not no_network


def test_a_probe_imports_no_module_that_its_file_names(
    probe: Callable[..., Path], monkeypatch: Any
) -> None:
    def fail(name: str) -> None:
        raise AssertionError(f"{name} was imported")

    monkeypatch.setattr("dad_fast.registry.importlib.import_module", fail)
    name = "python:os:system:touch proof"
    refused(lambda: load_student(probe(teacher=name)), "never imported")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_features": 10**6, "num_classes": 10**6},
        {"num_features": 10**12},
        {"num_features": -1},
        {"num_classes": 0},
        {"img_size": 10**9},
        {"img_size": -5},
        {"crop_pct": float("nan")},
        {"crop_pct": 0.0},
        {"text": DEEP},
        {"text": "[]"},
        {"text": "{"},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_probes_with_huge_encoders_are_refused(
    probe: Callable[..., Path], changes: dict[str, Any]
) -> None:
    refused(lambda: load_student(probe(**changes)), "p.safetensors")
