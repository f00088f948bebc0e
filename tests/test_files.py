"""Atomic writes: files are whole or absent, also after kills."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dad_fast import files
from dad_fast.errors import DataError
from dad_fast.files import read_text

ROOT = Path(__file__).resolve().parents[1]
KILLED = """
import os, signal, sys
from dad_fast import files
files.os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
files.atomic_write_text(sys.argv[1], "half")
"""


def test_leftovers_of_killed_writers_are_removed_and_live_files_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".a.json.") and left.name.endswith(".tmp")
    # A live writer keeps its temporary file; that of the killed one is removed.
    handle, another = files._begin(path)
    files.atomic_write_text(tmp_path / "other.json", "other")
    assert {one.name for one in tmp_path.iterdir()} == {Path(another).name, "other.json"}
    files.atomic_write_text(path, "whole")
    assert path.read_text() == "whole" and Path(another).exists()
    os.close(handle)
    files.atomic_write_text(path, "again")
    assert {one.name for one in tmp_path.iterdir()} == {"a.json", "other.json"}


@pytest.mark.parametrize("call", ["mkstemp", "fsync", "replace"])
def test_errors_name_the_file_not_its_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/some/temporary")

    monkeypatch.setattr(files.tempfile if call == "mkstemp" else files.os, call, fail)
    with pytest.raises(OSError) as found:
        files.atomic_write_text(tmp_path / "a.json", "x")
    assert found.value.filename == str(tmp_path / "a.json") and not list(tmp_path.iterdir())


def test_a_killed_export_is_restored_or_removed(tmp_path: Path) -> None:
    """A kill between the renames leaves the old export moved aside; one before, half a new one."""
    pytest.importorskip("torch")
    from dad_fast.tools.export.run import _new_folder

    target = tmp_path / "e"
    for name in (".e.old", ".e.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").write_text(name)
    with pytest.raises(RuntimeError), _new_folder(target) as folder:
        assert (target / "model").read_text() == ".e.old" and not list(folder.iterdir())
        raise RuntimeError
    assert list(tmp_path.iterdir()) == [target]


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("a {}.\nune photo d’été de {}.\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"prompts\.txt, line 2: not UTF-8; save the file as UTF-8"):
        read_text(file)
    file.write_bytes("\ufeffa {}.\n".encode())
    assert read_text(file) == "a {}.\n"
    with pytest.raises(DataError, match="cannot be read"):
        read_text(tmp_path)
