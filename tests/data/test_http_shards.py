"""Shards behind URLs: one download, failures, resumed downloads, and mistakes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dad_fast.cli.main import main
from dad_fast.config.schema import DataConfig
from dad_fast.data.sources import http
from dad_fast.data.sources.registry import open_source
from dad_fast.data.sources.splits import open_split
from dad_fast.data.sources.survey import survey
from dad_fast.errors import DataError, EnvironmentProblem, UsageError
from tests.shards import write_shards
from tests.tiny import STUDENT

PATTERN = "train-{000000..000002}.tar"


class Server(ThreadingHTTPServer):
    """Serves a folder; breaks off the answers whose numbers are in `broken`, fails the `failing`."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.broken: set[int] = set()
        self.failing: set[int] = set()
        self.ranges = True
        self.shift = 0  # of the bytes that a range request gets
        self.requests: list[tuple[str, str, int]] = []  # path, range, bytes sent

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/set"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, number = self.server, len(self.server.requests)
        asked = self.headers.get("Range", "")
        server.requests.append((self.path, asked, 0))
        file = server.folder / self.path.removeprefix("/set/")
        if number in server.failing:
            self.send_error(503)
            return
        if not file.is_file():
            self.send_error(404)
            return
        content = file.read_bytes()
        tag = f'"{hash(content)}"'
        whole = len(content)
        start = 0
        if asked and server.ranges and self.headers.get("If-Range") == tag:
            start = int(asked.removeprefix("bytes=").removesuffix("-")) + server.shift
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(whole - start))
        self.end_headers()
        sent = content[start:]
        if number in server.broken:
            sent = sent[: len(sent) // 2]
        self.wfile.write(sent)
        server.requests[number] = (self.path, asked, len(sent))

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(http, "_PAUSE", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    write_shards(tmp_path / "shards")
    with Server(tmp_path / "shards") as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_shards_are_downloaded_once_and_equal_local_ones(server: Server, cache: Path) -> None:
    source = open_source(server.url, PATTERN)
    local = open_source(str(server.folder), PATTERN)
    assert list(source.keys) == list(local.keys) and source.fingerprint == local.fingerprint
    assert source.read(5).tobytes() == local.read(5).tobytes()
    assert source.describe().startswith(f"{server.url}/train-000000.tar … train-000002.tar: 12")
    assert len(server.requests) == 3

    by_pattern = open_source(f"{server.url}/{PATTERN}")
    assert by_pattern.fingerprint == source.fingerprint and len(server.requests) == 3
    assert survey(DataConfig(data_dir=server.url, train_split=PATTERN))[1::2] == (12, 5)
    held = DataConfig(data_dir=server.url, train_split=PATTERN, val_fraction=0.3)
    assert len(open_split(held, PATTERN)) + len(open_split(held, "val")) == 12
    assert len(server.requests) == 3
    assert not list(cache.rglob("*.part")) and not list(cache.rglob("*.tag"))


def test_a_broken_download_is_resumed(server: Server) -> None:
    server.failing, server.broken = {0}, {1, 2}
    open_source(server.url, "train-000000.tar")
    whole = (server.folder / "train-000000.tar").stat().st_size
    assert [asked for _, asked, _ in server.requests] == [
        *("", "", f"bytes={whole // 2}-", f"bytes={whole // 2 + whole // 4}-")
    ]
    assert sum(sent for _, _, sent in server.requests) == whole


def test_a_server_without_ranges_sends_the_whole_file_again(server: Server) -> None:
    server.ranges, server.broken = False, {0}
    source = open_source(server.url, "train-000000.tar")
    assert server.requests[1][1].startswith("bytes=")
    assert server.requests[1][2] == (server.folder / "train-000000.tar").stat().st_size
    assert source.fingerprint == open_source(str(server.folder), "train-000000.tar").fingerprint


def test_an_answer_with_other_bytes_is_not_joined(server: Server, cache: Path) -> None:
    server.shift, server.broken = 7, {0}
    open_source(server.url, "train-000000.tar")
    assert [bool(asked) for _, asked, _ in server.requests] == [False, True, False]
    (file,) = (cache / "shards").rglob("*.tar")
    assert file.read_bytes() == (server.folder / "train-000000.tar").read_bytes()


def test_a_changed_file_is_not_joined_with_the_old_part(server: Server, cache: Path) -> None:
    server.broken = {0}
    server.failing = set(range(1, 6))
    with pytest.raises(EnvironmentProblem, match="cannot be downloaded in 6 tries: Service"):
        open_source(server.url, "train-000000.tar")
    assert len(list(cache.rglob("*.part"))) == 1
    changed = (server.folder / "train-000001.tar").read_bytes()
    (server.folder / "train-000000.tar").write_bytes(changed)
    open_source(server.url, "train-000000.tar")
    (file,) = (cache / "shards").rglob("*.tar")
    assert file.read_bytes() == changed


def test_missing_shards_and_folders_are_refused(server: Server) -> None:
    with pytest.raises(DataError, match="train-000003.tar: the server answers 404 Not Found"):
        open_source(server.url, "train-{000002..000003}.tar")
    assert len(server.requests) == 2
    with pytest.raises(UsageError, match="name the shards of 'train' by a pattern"):
        open_source(server.url, "train")
    with pytest.raises(UsageError, match="behind the last slash"):
        open_source(server.url, "{0..1}/train-{0..3}.tar")


def test_an_unreachable_server_is_one_line_before_anything_is_written(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Nothing listens on port 9 of the loopback interface.
    arguments = ["--data-dir", "http://127.0.0.1:9/set", "--train-split", PATTERN]
    more = ["--val-fraction", "0.3", "--method", "ce", *STUDENT, "-o", str(tmp_path / "run")]
    assert main(["train", *arguments, *more]) == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert "127.0.0.1:9/set/train-000000.tar: cannot be downloaded" in error
    assert not (tmp_path / "run").exists()
