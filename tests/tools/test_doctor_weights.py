"""`dad-fast doctor --weights`: published files by hash, other files by their content."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

pytest.importorskip("timm")
import timm
import tiny
import torch
from safetensors.torch import save_file

from dad_fast.cli import main as cli
from dad_fast.models.weights import published
from dad_fast.models.weights.published import PublishedFile, markdown_table, published_files

ROOT = Path(__file__).parents[2]


def doctor(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["doctor", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, " ".join(out.split()), err


def test_docs_have_the_table_of_the_list() -> None:
    assert markdown_table() in (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")


def test_list_agrees_with_open_clips_addresses() -> None:
    open_clip = pytest.importorskip("open_clip")
    ours = {entry.sha256: entry for entry in published_files() if entry.name.startswith("CLIP")}
    ours.pop("")
    assert len(ours) == 6
    for arch in ("RN50", "RN101", "ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336"):
        settings = open_clip.get_pretrained_cfg(arch, "openai")
        *_, digest, file = settings["url"].split("/")
        assert ours[digest].file == file
        assert settings["hf_hub"].strip("/") in ours[digest].note
        assert f"open_clip:{arch}-quickgelu@FILE" in ours[digest].note
        assert f"{arch}-quickgelu" in open_clip.list_models()


def test_known_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "renamed.ckpt"
    file.write_bytes(b"content")
    entry = PublishedFile(
        name="VQGAN of the test",
        page="https://example.org/vqgan",
        file="last.ckpt",
        sha256=hashlib.sha256(b"content").hexdigest(),
        licence="MIT",
        argument="--discretizer FILE",
    )
    monkeypatch.setattr(published, "published_files", lambda: (entry,))
    code, out, _ = doctor(capsys, "--weights", file)
    assert code == 0 and f"7 bytes, SHA-256 {entry.sha256}" in out
    assert "VQGAN of the test, last.ckpt of https://example.org/vqgan; licence: MIT" in out
    assert f"--discretizer {file}" in out


def test_unknown_files_are_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vqgan = tiny.write_vqgan(tmp_path / "vqgan.ckpt")
    code, out, _ = doctor(capsys, "--weights", vqgan)
    assert code == 0 and "unknown: not one of the files" in out
    assert f"one of 64 codes for 4 x 4 px; use: --discretizer {vqgan}" in out

    vit = timm.create_model("test_vit", num_classes=7)
    torch.save({"state_dict": vit.state_dict()}, tmp_path / "vit.pth")
    code, out, _ = doctor(capsys, "--weights", tmp_path / "vit.pth")
    assert code == 0 and "vision transformer, width 64, patch 16, 6 blocks" in out
    assert "7 outputs; use: --student-weights" in out

    save_file({"odd.name": torch.zeros(2, 3)}, tmp_path / "odd.safetensors")
    code, out, _ = doctor(capsys, "--weights", tmp_path / "odd.safetensors")
    assert code == 0 and "no architecture recognized; its first entries: odd.name [2, 3]" in out


def test_teacher_of_this_project_is_recognized(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = tiny.write_teacher(tmp_path / "teacher.safetensors")
    code, out, _ = doctor(capsys, "--weights", teacher)
    assert code == 0 and f"use: --teacher {teacher}" in out


def test_bad_files_and_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(capsys, "--weights", tmp_path / "none")[0] == 4
    (tmp_path / "page.html").write_text("<html>")
    code, _, err = doctor(capsys, "--weights", tmp_path / "page.html")
    assert code == 4 and "neither safetensors nor a PyTorch checkpoint" in err
    assert doctor(capsys, "--weights", tmp_path / "none", "--numerics")[0] == 2
    assert doctor(capsys, "--json", "--data", tmp_path)[0] == 2
