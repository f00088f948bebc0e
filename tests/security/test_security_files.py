"""Written files: permissions, planted files, and links."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numpy")

from dad_fast.cache import cache_dir, keep_compiled_code_private, write_cache
from dad_fast.errors import DataError
from dad_fast.files import atomic_write_bytes
from dad_fast.loggers.run_log import RunLog
from dad_fast.store.files import Part, write_whole


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_new_cache_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAD_FAST_CACHE", str(tmp_path / "a" / "cache"))
    assert write_cache(cache_dir() / "index" / "x.csv", b"x")
    assert mode(tmp_path / "a" / "cache") == 0o700
    (tmp_path / "shared").mkdir(mode=0o755)
    monkeypatch.setenv("DAD_FAST_CACHE", str(tmp_path / "shared"))
    # The mode of an existing folder is the user's choice.
    assert write_cache(cache_dir() / "x", b"x") and mode(tmp_path / "shared") == 0o755


def test_files_follow_the_umask_and_are_private_while_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    fsync = os.fsync

    def recorded(handle: int) -> None:
        seen.append(stat.S_IMODE(os.fstat(handle).st_mode))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", recorded)
    atomic_write_bytes(tmp_path / "x", b"x")
    assert seen[0] == 0o600 and mode(tmp_path / "x") & 0o022 == 0
    assert os.listdir(tmp_path) == ["x"]


def test_writing_does_not_follow_a_link(tmp_path: Path) -> None:
    """Replaces the link and keeps its target."""
    (tmp_path / "precious").write_text("years")
    (tmp_path / "link").symlink_to("precious")
    atomic_write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "precious").read_text() == "years" and not (tmp_path / "link").is_symlink()


@pytest.fixture
def compile_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Function that returns torch.compile's folder for a cache folder of a given mode."""
    registered: list[Path] = []
    monkeypatch.setattr(
        "atexit.register", lambda function, folder, **named: registered.append(folder)
    )

    def found(mode: int | None) -> Path:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "so that it is put back")
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        monkeypatch.setenv("DAD_FAST_CACHE", str(tmp_path / "cache"))
        if mode is not None:
            (tmp_path / "cache").mkdir()
            (tmp_path / "cache").chmod(mode)
        keep_compiled_code_private()
        return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])

    yield found
    for folder in registered:
        folder.rmdir()


def test_compiled_code_is_in_a_private_folder(compile_cache: Any, tmp_path: Path) -> None:
    """By default torch.compile loads it from /tmp/torchinductor_NAME, which any user can create."""
    folder = compile_cache(None)
    assert folder == tmp_path / "cache" / "torch.compile" and mode(folder) == 0o700
    keep_compiled_code_private()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)


@pytest.mark.parametrize("open_to", [0o777, 0o770, 0o1777])
def test_compiled_code_is_not_kept_in_a_shared_cache(
    compile_cache: Any, tmp_path: Path, open_to: int
) -> None:
    folder = compile_cache(open_to)
    assert tmp_path / "cache" not in folder.parents and mode(folder) == 0o700


def test_folder_set_by_the_user_for_compiled_code_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    keep_compiled_code_private()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"


def test_planted_link_is_not_written_through(tmp_path: Path) -> None:
    """Covers a run and a store that came from others and are resumed."""
    (tmp_path / "precious").write_text("years")
    for name in ("metrics.jsonl", "train.log", "m.json.part", "shard.data.part"):
        (tmp_path / name).symlink_to("precious")
    with pytest.raises(DataError):
        RunLog(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(DataError):
        RunLog(tmp_path)
    write_whole(tmp_path / "m.json", b"new")
    part = Part(tmp_path / "shard.data")
    part.write(b"new")
    assert (tmp_path / "precious").read_text() == "years"
    assert (tmp_path / "m.json").read_bytes() == b"new"
