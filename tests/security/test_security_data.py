"""Hostile data: names with escape sequences or paths, links, bombs, extreme shapes."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tarfile
import threading
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("torch")
from PIL import Image

from dad_fast.cli import main as cli
from dad_fast.data.augment.execute import MOST_PIXELS, eval_transform
from dad_fast.data.sources.decode import DecodeError, read_rgb, read_unchanged
from dad_fast.data.sources.registry import open_source
from dad_fast.errors import printable
from tests.limits import cpu_limit

ESCAPES = "\x1b]0;owned\x07\x1b[2J\r\n\x9b31m\u202e"


def png(width: int, height: int, data: bytes = b"") -> bytes:
    parts = [
        (b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"),
        (b"IDAT", zlib.compress(data)),
        (b"IEND", b""),
    ]
    chunks = [
        len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
        for kind, body in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def grey_png(side: int) -> bytes:
    """Return a PNG with 16 bits per pixel."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((side, side), np.uint16)).save(file, "PNG")
    return file.getvalue()


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(file, "JPEG")
    return file.getvalue()


# --- names ----------------------------------------------------------------------------------------


def test_printable_escapes_control_characters() -> None:
    text = printable(f"a{ESCAPES}b\udcff")
    assert text.replace("\n", "").isprintable()
    assert text.startswith("a\\x1b]0;owned\\x07") and text.endswith("b\\udcff")
    assert printable("plain \\ text\nand more") == "plain \\ text\nand more"


@pytest.mark.parametrize(
    "command",
    [["eval"], ["export", "-o", "x"], ["train", "--set"], ["store", "info"], [], ["predict", "m"]],
)
def test_control_characters_in_arguments_are_escaped(
    capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    """Scripts pass on names of files that others made."""
    assert cli.main([*command, f"x{ESCAPES}"]) in (2, 4)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error[:-1].isprintable()


def test_control_characters_in_names_of_folders_and_files_are_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Covers classes and images, from the index to the message."""
    for split in ("train", "val"):
        for name in (f"ant{ESCAPES}", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / f"a{ESCAPES}.jpg").write_bytes(
                jpeg() if name == "bee" else b"no image"
            )
    command = [
        *shlex.split("train --method ce --student test_resnet --data-dir"),
        str(tmp_path),
        "-o",
        str(tmp_path / "o"),
        "-j0",
    ]
    assert cli.main(command) == 4
    error = capsys.readouterr().err
    assert "1 of 2 images cannot be read" in error and "\\x1b" in error
    assert error.replace("\n", "").isprintable()


# --- tars -----------------------------------------------------------------------------------------


@pytest.fixture
def shard(tmp_path: Path) -> Any:
    """Function that writes a tar of (name, kind, content or target) with a sound sample in it."""

    def write(*members: tuple[str, bytes, Any]) -> Path:
        (tmp_path / "data").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "data" / "s.tar", "w") as tar:
            for name, kind, content in (
                ("good.jpg", tarfile.REGTYPE, jpeg()),
                ("good.cls", tarfile.REGTYPE, b"0"),
                *members,
            ):
                info = tarfile.TarInfo(name)
                info.type = kind
                if kind == tarfile.REGTYPE:
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                else:
                    info.linkname = content or ""
                    tar.addfile(info)
        return tmp_path / "data"

    return write


@pytest.mark.parametrize(
    "name", ["/etc/x", "../../x", "a/../../../x", "x/../../etc/passwd", "C:\\x", f"{ESCAPES}x"]
)
def test_names_in_tars_are_never_paths(shard: Any, tmp_path: Path, name: str) -> None:
    source = open_source(
        str(shard((f"{name}.jpg", tarfile.REGTYPE, jpeg()), (f"{name}.cls", tarfile.REGTYPE, b"0")))
    )
    assert len(source) == 2 and all(key.isprintable() for key in source.keys)
    assert source.read(1).size == (8, 8)
    # Nothing was extracted.
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["data", "s.tar"]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_in_tars_are_no_images(shard: Any, tmp_path: Path, kind: bytes) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(jpeg())
    folder = shard(("bad.jpg", kind, str(secret)), ("bad.cls", tarfile.REGTYPE, b"0"))
    source = open_source(str(folder), max_bad_share=0.9)
    assert source.ok.tolist() == [True, False]
    with pytest.raises(DecodeError):
        source.read(1)


def test_link_as_a_label_is_not_followed(shard: Any, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("7")
    folder = shard(
        ("bad.jpg", tarfile.REGTYPE, jpeg()), ("bad.cls", tarfile.SYMTYPE, str(tmp_path / "secret"))
    )
    assert open_source(str(folder), max_bad_share=0.9).ok.tolist() == [True, False]


# --- images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        png(60_000, 60_000, b"\0" * 10**6),
        png(2**31 - 1, 2**31 - 1),
        png(0, 5),
        png(5, 5),
        b"GIF89a" + b"\xff" * 20,
    ],
)
def test_images_with_false_sizes_are_refused_quickly(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with cpu_limit(), pytest.raises(DecodeError, match="x.png: ") as error:
        read_rgb(tmp_path / "x.png")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (2, 50_000)])
def test_extreme_aspect_ratio_does_not_exhaust_memory(size: tuple[int, int]) -> None:
    """Resizing the shorter side to 256 gives four billion pixels. Runs under a memory limit."""
    code = f"""
import resource, numpy as np
from PIL import Image
from dad_fast.data.augment.execute import eval_transform
pixels = np.zeros(({size[1]}, {size[0]}, 3), np.uint8)
middle = {max(size) // 2}
pixels[middle - 1 : middle + 1] = 255
pixels[:, middle - 1 : middle + 1] = 255
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
out = eval_transform(Image.fromarray(pixels), 224, 0.875, "bicubic")
assert out.shape == (224, 224, 3) and out[112, 112].min() > 200, out[112, 112]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("size", [(30, 4000), (4001, 31), (300, 200), (1, 400)])
def test_moderate_aspect_ratios_are_resized_as_a_whole(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    found = eval_transform(image, 32, 0.875, "bilinear")
    side, short = 36, min(size)
    whole = image.resize(
        (side, int(side * size[1] / short))
        if size[0] <= size[1]
        else (int(side * size[0] / short), side),
        Image.Resampling.BILINEAR,
    )
    left, top = round((whole.width - 32) / 2), round((whole.height - 32) / 2)
    assert np.array_equal(found, np.asarray(whole.crop((left, top, left + 32, top + 32))))
    assert whole.width * whole.height <= MOST_PIXELS


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"


def test_eps_images_start_no_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow starts Ghostscript, which executes the file, for EPS content under any file name."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    # As if Pillow had not searched for it yet.
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    (tmp_path / "x.jpg").write_bytes(EPS)
    for file in (tmp_path / "x.jpg", io.BytesIO(EPS)):
        with pytest.raises(DecodeError, match="not an image"):
            read_rgb(file, "x.jpg")
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("form", ["PCX", "ICO", "SGI", "TGA", "JPEG2000"])
def test_other_image_formats_are_refused(form: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, form)
    with pytest.raises(DecodeError, match="not an image"):
        read_rgb(file, "x.jpg")


def test_pipes_and_devices_are_refused_without_waiting(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "good.jpg").write_bytes(jpeg())
    pipe = tmp_path / "ant" / "pipe.jpg"
    os.mkfifo(pipe)
    (tmp_path / "ant" / "link.jpg").symlink_to(pipe)
    (tmp_path / "bee" / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "bee" / "tty.jpg").symlink_to("/dev/tty")

    waited = []

    def let_go() -> None:
        """Release a waiting reader. Without one, opening the pipe fails."""
        with contextlib.suppress(OSError):
            os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
            waited.append(pipe)

    timer = threading.Timer(5, let_go)
    timer.start()
    source = open_source(str(tmp_path), max_bad_share=0.9)
    assert source.ok.tolist() == [True, False, False, True, False, False]
    for index in (1, 2, 4, 5):
        with pytest.raises(DecodeError, match="not a regular file"):
            source.read(index)
        assert source.encoded(index) is None
        assert read_unchanged(tmp_path / source.keys[index], 0) is None
    timer.cancel()
    assert not waited


def test_memory_for_16_bit_images_is_bounded() -> None:
    """Half a megabyte of PNG can contain a hundred million grey values."""
    tracemalloc.start()
    read_rgb(io.BytesIO(grey_png(4096)), "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 4096 * 4096


# --- settings -------------------------------------------------------------------------------------

TOML = [
    "a = " + "[" * 10**5,
    "seed = " + "9" * 5000,
    "\0",
    "\ufeff[",
    "[data]\ndata_dir = 3",
    "[[data]]",
    "a.b.c.d = 1",
    "seed = inf",
    "x = 1979-05-27",
]


@pytest.mark.parametrize("text", TOML, ids=lambda text: text[:12])
def test_malformed_settings_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "c.toml").write_text(text)
    assert cli.main(["train", str(tmp_path / "c.toml"), "--print-config"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and len(error) < 600 and error[:-1].isprintable()


@pytest.mark.parametrize("name", ["c.yaml", "c.json", "c.py", "c.pkl"])
def test_settings_in_other_formats_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / name).write_text("!!python/object/apply:os.system ['true']")
    assert cli.main(["train", str(tmp_path / name), "--print-config"]) == 2
    assert re.search("TOML|toml", capsys.readouterr().err)
