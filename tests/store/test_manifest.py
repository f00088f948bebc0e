"""A store's manifest: any settings, no paths or times, and hostile content refused."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
hypothesis = pytest.importorskip("hypothesis")


from hypothesis import given
from hypothesis import strategies as st
from store_data import make_manifest, write

from dad_fast.errors import DataError, UsageError
from dad_fast.store import Manifest, open_store
from dad_fast.store.manifest import MANIFEST, _canonical
from tests.limits import cpu_limit


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**63)
        | st.floats(allow_nan=True)
        | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_settings_round_trip(value: Any) -> None:
    manifest = make_manifest(settings={"value": value})
    again = Manifest.from_json(manifest.to_json())
    assert (
        again == manifest
        and again.to_json() == manifest.to_json()
        and not manifest.differences(again)
    )


def test_a_manifest_holds_no_paths_or_times(tmp_path: Path) -> None:
    write(tmp_path / "store", make_manifest())
    text = (tmp_path / "store" / MANIFEST).read_text()
    assert str(tmp_path) not in text and not re.search(r"\b20\d\d-|hostname|time", text)


def hostile(**changes: Any) -> bytes:
    """Make a manifest with these changes and a correct checksum."""
    document = {**json.loads(make_manifest().to_json()), **changes}
    del document["checksum"]
    document = {name: value for name, value in document.items() if value != "DROP"}
    return _canonical({**document, "checksum": hashlib.sha256(_canonical(document)).hexdigest()})


SHA = "0" * 64


@pytest.mark.parametrize(
    "changes",
    [
        {"num_samples": 10**12},
        {"num_samples": -1},
        {"num_samples": 45.0},
        {"num_samples": True},
        {"num_samples": "DROP"},
        {"num_views": 10**9},
        {"block_size": 0},
        {"block_size": 65536, "blocks_per_shard": 65536, "image_size": [8192, 8192]},
        {"block_size": 1, "blocks_per_shard": 1, "num_samples": 2**28},
        {"code_bits": 4000},
        {"code_bits": 9, "code_grid": [10**9, 10**9]},
        {"code_grid": [3]},
        {"code_grid": 3},
        {"code_grid": ["3", "3"]},
        {"image_size": [100000, 100000]},
        {"image_size": []},
        {"images": "jpeg:101"},
        {"images": "../../etc/passwd"},
        {"images": 3},
        {"kind": "other"},
        {"kind": ["targets"]},
        {"kind": "targets"},
        {"outputs": "topk:3@1e400"},
        {"outputs": "topk:99999@1"},
        {"classes": []},
        {"classes": [[0, "a", "a"], [2, "b", "b"]]},
        {"classes": [[0, "a"]]},
        {"classes": "abc"},
        {"settings": []},
        {"hashes": None},
        {"records": {}},
        {"records": {"index": [["key", "u1", [10**12]]], "data": []}},
        {"shards": [{"index": SHA, "data": SHA, "images": SHA}]},
        {"shards": [{"../../x": SHA, "data": SHA, "images": SHA}] * 6},
        {"shards": [{"index": "x", "data": SHA, "images": SHA}] * 6},
        {"shards": [[1]] * 6},
        {"files": ["/etc/passwd"]},
        {"version": 2},
        {"format": "zip"},
    ],
    ids=str,
)
def test_hostile_manifests_are_refused_at_once(tmp_path: Path, changes: dict[str, Any]) -> None:
    (tmp_path / MANIFEST).write_bytes(hostile(**changes))
    with cpu_limit(), pytest.raises(DataError, match=MANIFEST) as caught:
        open_store(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b'"' + b"x" * 9,
        b"[" * 100_000,
        b'{"format": "dad-fast store", "version": 1, "a": NaN}',
    ],
)
def test_invalid_manifests_are_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(text)
    with pytest.raises(DataError, match=MANIFEST):
        open_store(tmp_path)


@given(st.data())
def test_a_changed_byte_of_a_manifest_is_detected(data) -> None:
    text = bytearray(make_manifest().to_json())
    place = data.draw(st.integers(0, len(text) - 1))
    text[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(DataError):
        Manifest.from_json(bytes(text))


def test_sizes_that_contradict_each_other_are_refused() -> None:
    for changes in (
        {"image_size": ()},
        {"code_grid": ()},
        {"code_bits": 0},
        {"code_bits": 0, "code_grid": (), "images": "none", "image_size": ()},
        {"kind": "targets"},
    ):
        with pytest.raises(UsageError):
            make_manifest(**changes)
