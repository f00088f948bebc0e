"""WebDataset shards behind http(s) URLs, downloaded once into the cache and read as local tars.

A shard is downloaded into a part file and renamed when its size is that of Content-Length. A
download that breaks off is resumed by a range request (RFC 9110, section 14) if the server supports
them and the file has not changed (If-Range), else begun again.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

from dad_fast.cache import cache_dir, one_at_a_time
from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.base import Listed
from dad_fast.data.sources.folder import list_shards
from dad_fast.data.sources.names import shown
from dad_fast.data.sources.pool import progress_bar
from dad_fast.data.sources.tar import TarSource, expand
from dad_fast.data.sources.tar_index import read_shards
from dad_fast.errors import DataError, EnvironmentProblem, UsageError

log = logging.getLogger("dad_fast.data")

_FLAGS = "--data-dir, --train-split, --val-split"
_TRIES = 6
# Seconds before the second try; doubled before each further one.
_PAUSE = 0.5
_TIMEOUT = 30
_BLOCK = 1 << 20
# Client errors that may pass: timeout, a part file that does not fit, too many requests.
_PASSING = (408, 416, 429)


class HttpShards:
    """The folder or pattern of shards that a URL names. A Listing: opens no image."""

    def __init__(self, scheme: str, argument: str) -> None:
        self.url = f"{scheme}:{argument}".rstrip("/")

    def has_split(self, split: str) -> bool:
        return (split or self.url).endswith(".tar")

    def images(self, split: str, fixed: ClassMap | None) -> Listed:
        """Download the shards and list their images from the headers."""
        folder, names, _ = self.download(split)
        return list_shards(folder, names, fixed)._replace(name=self.url)

    def contents(self, split: str) -> Iterator[tuple[str, Path | BytesIO]]:
        folder, names, _ = self.download(split)
        yield from read_shards(folder, names)

    def download(self, split: str) -> tuple[Path, list[str], str]:
        """Return the folder and the names of a split's shards in the cache, and their URL.

        Raises UsageError for a split that is no pattern, DataError for a shard that is not on the
        server, EnvironmentProblem for a server that cannot be reached.
        """
        if not self.has_split(split):
            raise UsageError(
                f"{self.url}: folders behind a URL cannot be listed: name the shards of {split!r} by "
                f"a pattern, as in --train-split 'train-{{000..009}}.tar' ({_FLAGS})"
            )
        if split and self.url.endswith(".tar"):
            raise UsageError(
                f"{self.url} names shards, so it has no split {split!r}: give its folder as "
                "--data-dir and the pattern as --train-split or --val-split"
            )
        base, _, pattern = (f"{self.url}/{split}" if split else self.url).rpartition("/")
        if "{" in base:
            raise UsageError(f"{base}/{pattern}: ranges belong behind the last slash ({_FLAGS})")
        _, names = expand("", pattern, _FLAGS)
        folder = cache_dir() / "shards" / hashlib.sha256(base.encode()).hexdigest()[:24]
        with one_at_a_time(folder, f"downloading {base}"):
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                log.info("downloading %s shards from %s to %s", f"{len(missing):,}", base, folder)
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise EnvironmentProblem(
                        f"{folder}: cannot be written: {error.strerror} ($DAD_FAST_CACHE)"
                    ) from error
            with progress_bar(len(missing), f"downloading {base}") as advance:
                for name in missing:
                    download_file(f"{base}/{quote(name)}", folder / name)
                    advance(1)
        return folder, names, base


def download_file(url: str, file: Path) -> None:
    """Download a file whole or not at all, in several tries."""
    pause = _PAUSE
    for left in reversed(range(_TRIES)):
        try:
            _try_download(url, file)
            return
        except (OSError, http.client.HTTPException, ValueError) as error:
            status = error.code if isinstance(error, urllib.error.HTTPError) else 0
            why = shown(str(getattr(error, "reason", "") or error))
            if 400 <= status < 500 and status not in _PASSING:
                raise DataError(f"{url}: the server answers {status} {why} ({_FLAGS})") from error
            if not left:
                raise EnvironmentProblem(
                    f"{url}: cannot be downloaded in {_TRIES} tries: {why}; check the network and "
                    "the address (--data-dir)"
                ) from error
            log.info("%s: %s; trying again in %g s", url, why, pause)
            time.sleep(pause)
            pause *= 2


def _try_download(url: str, file: Path) -> None:
    part = file.with_name(f"{file.name}.part")
    # ETag or date of the file that the part belongs to.
    tag_file = file.with_name(f"{file.name}.tag")
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity"})
    have = part.stat().st_size if part.is_file() and tag_file.is_file() else 0
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", tag_file.read_text())
    try:
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            part.unlink(missing_ok=True)
        raise

    with answer:
        part_range = answer.headers.get("Content-Range", "")
        if answer.status != 206:
            have = 0
        elif not part_range.startswith(f"bytes {have}-"):
            part.unlink(missing_ok=True)
            raise ConnectionError(f"asked for bytes from {have:,}, got {part_range!r}")
        length = answer.headers.get("Content-Length")
        tag = answer.headers.get("ETag", "")
        # A weak ETag does not promise equal bytes.
        tag = tag if tag.startswith('"') else answer.headers.get("Last-Modified", "")
        with open(part, "r+b" if have else "wb") as target:
            tag_file.unlink(missing_ok=True)
            if tag:
                tag_file.write_text(tag)
            target.seek(have)
            while content := answer.read(_BLOCK):
                target.write(content)
            size = target.tell()
            if length is not None and size != have + int(length):
                raise ConnectionError(f"{size:,} of {have + int(length):,} bytes arrived")
            target.flush()
            os.fsync(target.fileno())
    os.replace(part, file)
    tag_file.unlink(missing_ok=True)


def _open(
    scheme: str, argument: str, split: str, classes: ClassMap | None, max_bad_share: float
) -> TarSource:
    folder, names, base = HttpShards(scheme, argument).download(split)
    name = f"{base}/{names[0]}" + (f" … {names[-1]}" if len(names) > 1 else "")
    return TarSource(folder, names, classes, max_bad_share, name)


# Entries of the registries SOURCES and LISTINGS.
open_http, open_https = partial(_open, "http"), partial(_open, "https")
list_http, list_https = partial(HttpShards, "http"), partial(HttpShards, "https")
