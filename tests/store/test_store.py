"""The format of a store: teacher outputs, and what readers return."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import resource
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
hypothesis = pytest.importorskip("hypothesis")


from hypothesis import given
from hypothesis import strategies as st
from store_data import (
    BAD,
    CLASSES,
    NUM,
    content,
    exit_code,
    in_child,
    key,
    make_manifest,
    make_targets,
    write,
)

from dad_fast.errors import DataError, UsageError
from dad_fast.store import AdversarialStore, OutputsForm, TargetStore, open_store
from dad_fast.store.files import map_file
from dad_fast.store.images import decode_image
from dad_fast.store.layout import INDEX

GOOD = np.array([row not in (7, 44) for row in range(NUM)])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> AdversarialStore:
    folder = tmp_path_factory.mktemp("stores") / "store"
    write(folder, make_manifest())
    return AdversarialStore(folder)


# --- readers


@given(st.lists(st.integers(0, NUM - 1), max_size=70), st.integers(0, 1))
def test_any_rows_in_any_order(store, chosen: list[int], view: int) -> None:
    rows, wanted = np.array(chosen, np.int64), content(store.manifest, view)
    ok = np.array([(view, row) not in BAD for row in chosen], bool)
    assert (store.labels(rows, view) == wanted["labels"][rows]).all()
    assert (store.readable(rows, view) == ok).all()
    assert (store.kept(rows, view) == (wanted["kept"][rows] & ok)).all()
    assert (store.codes(rows, view) == wanted["codes"][rows] * ok[:, None]).all()
    assert (store.images(rows, view) == wanted["images"][rows] * ok[:, None, None, None]).all()
    assert np.array_equal(
        store.changed(rows, view), np.where(ok, wanted["changed"][rows], np.nan), equal_nan=True
    )
    logits = store.outputs(rows, view).astype(np.float32) + store.max_logits(rows, view)[:, None]
    assert np.allclose(logits, wanted["outputs"][rows] * ok[:, None], atol=0.03, rtol=0)


@given(st.permutations(range(NUM)), st.integers(0, NUM))
def test_rows_are_joined_by_key(store, order: list[int], num: int) -> None:
    assert store.rows([key(row) for row in order[:num]]).tolist() == order[:num]
    assert store.rows([key(row) for row in order], view=1).tolist() == order


def test_keys_that_are_missing_are_named(store) -> None:
    with pytest.raises(
        DataError,
        match=r"2 of 3 samples are not in the store: a\.png, b\.png; was it made from this data",
    ):
        store.rows(["a.png", key(3), "b.png"])


def test_the_same_key_twice_cannot_be_joined(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("store_data.key", lambda row: "twin" if row in (3, 30) else key(row))
    write(tmp_path / "store", make_manifest())
    store = AdversarialStore(tmp_path / "store")
    assert store.rows([key(4)]).tolist() == [4]
    with pytest.raises(DataError, match="twin is twice in view 0"):
        store.rows(["twin"])


def test_a_reader_can_be_pickled(store) -> None:
    rows = np.arange(NUM)
    store.images(rows)
    copy = pickle.loads(pickle.dumps(store))
    assert not copy._maps and (copy.codes(rows, 1) == store.codes(rows, 1)).all()
    assert (
        len(pickle.dumps(store)) < 20_000 and len(copy) == NUM and copy.checksum == store.checksum
    )


def test_images_fill_a_given_buffer(store) -> None:
    out = np.empty((3, 6, 4, 3), np.uint8)
    assert (
        store.images(np.array([5, 1, 40]), out=out) is out
        and (out == store.images(np.array([5, 1, 40]))).all()
    )
    for wrong in (out[:2], out.astype(np.int16), np.empty((3, 4, 6, 3), np.uint8).swapaxes(1, 2)):
        with pytest.raises(ValueError, match="out is"):
            store.images(np.array([5, 1, 40]), out=wrong)


@pytest.mark.parametrize(("rows", "view"), [([0, NUM], 0), ([-1], 0), ([0], 2), ([0], -1)])
def test_missing_rows_and_views_raise_index_error(store, rows: list[int], view: int) -> None:
    with pytest.raises(IndexError, match="has the"):
        store.codes(np.array(rows), view)


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    manifest = make_manifest(block_size=1, blocks_per_shard=1)
    write(tmp_path / "store", manifest)

    def work() -> None:
        most = max(map(int, os.listdir("/proc/self/fd"))) + 20
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        store, rows = AdversarialStore(tmp_path / "store"), np.arange(NUM)
        for view in (0, 1):
            store.codes(rows, view), store.images(rows, view)

    assert manifest.geometry.num_shards == 90 and exit_code(in_child(work)) == 0


def test_maps_go_with_their_arrays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    (tmp_path / "empty").touch()
    part = map_file(path)[2:5]
    assert bytes(part) == b"234" and len(map_file(tmp_path / "empty")) == 0
    assert str(path) in Path("/proc/self/maps").read_text()
    with pytest.raises(ValueError, match="read-only"):
        part[0] = 1
    del part
    assert str(path) not in Path("/proc/self/maps").read_text()
    with pytest.raises(FileNotFoundError):
        map_file(tmp_path / "nothing")


def test_a_shard_that_vanishes_is_named(tmp_path: Path) -> None:
    write(tmp_path / "store", make_manifest())
    store = AdversarialStore(tmp_path / "store")
    (tmp_path / "store" / "shard-000001.data").unlink()
    assert len(store.codes(np.arange(16))) == 16
    with pytest.raises(DataError, match=r"shard-000001\.data: cannot be read"):
        store.codes(np.arange(20))


@pytest.mark.parametrize("form", ["webp", "jpeg:95"])
def test_encoded_images_are_decoded(tmp_path: Path, form: str) -> None:
    manifest = make_manifest(images=form, image_size=(32, 24))
    smooth = np.add.outer(np.arange(32) * 3, np.arange(24) * 4)[None, :, :, None] + np.array(
        [0, 30, 60]
    )
    images = np.clip(smooth + np.arange(NUM)[:, None, None, None], 0, 255).astype(np.uint8)
    import store_data

    plain = store_data.content
    try:
        store_data.content = lambda manifest, view: {**plain(manifest, view), "images": images}
        write(tmp_path / "store", manifest)
    finally:
        store_data.content = plain
    found = AdversarialStore(tmp_path / "store").images(np.arange(NUM)[::-1])[::-1].astype(int)
    assert (found[[7, 44]] == 0).all()
    worst = np.abs(found - images)[GOOD].max()
    assert worst == 0 if form == "webp" else worst <= 8


def test_an_encoded_image_that_is_damaged_is_named(tmp_path: Path) -> None:
    write(tmp_path / "store", make_manifest(images="webp"))
    path = tmp_path / "store" / "shard-000000.images"
    whole = path.read_bytes()
    index = np.fromfile(path.with_suffix(".index"), INDEX)
    path.write_bytes(bytes(index["image_bytes"][0]) + whole[index["image_bytes"][0] :])
    with pytest.raises(DataError, match=r"shard-000000\.images: image of row 0: not an image"):
        AdversarialStore(tmp_path / "store").images(np.arange(4))
    other = io.BytesIO()
    Image.new("RGB", (5, 6)).save(other, "WEBP", lossless=True)
    with pytest.raises(DataError, match="5x6 pixels, 4x6 in the manifest"):
        decode_image(other.getvalue(), (6, 4), "x")
    gif = io.BytesIO()
    Image.new("RGB", (4, 6)).save(gif, "GIF")
    with pytest.raises(DataError, match="not an image"):
        decode_image(gif.getvalue(), (6, 4), "x")


def test_targets_hold_outputs_only(tmp_path: Path) -> None:
    write(tmp_path / "store", make_targets())
    store = open_store(tmp_path / "store")
    assert isinstance(store, TargetStore) and not hasattr(store, "codes")
    assert store.outputs(np.arange(NUM), 1).shape == (NUM, CLASSES)
    assert {path.suffix for path in (tmp_path / "store").iterdir()} == {".json", ".index", ".data"}
    with pytest.raises(DataError, match="a store of kind targets; name one of kind adversarial"):
        AdversarialStore(tmp_path / "store")


def test_errors_name_what_a_store_lacks(tmp_path: Path) -> None:
    write(tmp_path / "a", make_manifest(images="none", image_size=()))
    write(tmp_path / "b", make_manifest(code_bits=0, code_grid=()))
    with pytest.raises(UsageError, match="holds no images"):
        AdversarialStore(tmp_path / "a").images(np.arange(2))
    with pytest.raises(UsageError, match="holds no codes"):
        AdversarialStore(tmp_path / "b").codes(np.arange(2))
    assert np.isnan(AdversarialStore(tmp_path / "b").changed(np.arange(2))).all()
    with pytest.raises(DataError, match="not a store"):
        open_store(tmp_path)


# --- teacher outputs

LOGITS = st.integers(2, 40).flatmap(
    lambda c: st.lists(
        st.lists(st.floats(-300, 300, width=32), min_size=c, max_size=c), min_size=1, max_size=4
    )
)


def stored(form: OutputsForm, logits: Any) -> tuple[Any, Any]:
    records = np.zeros(len(logits), np.dtype(form.fields(logits.shape[1])))
    form.encode(logits, records)
    return form.decode(records, logits.shape[1]), records


def softmax(z: Any) -> Any:
    p = np.exp(z.astype(np.float64) - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


@given(LOGITS)
def test_full_outputs_are_accurate_for_likely_classes(values: list[list[float]]) -> None:
    logits = np.array(values, np.float32)
    found, records = stored(OutputsForm(), logits)
    exact = logits.astype(np.float64) - logits.max(1, keepdims=True)
    assert (np.abs(found - exact) <= np.abs(exact) * (2**-11 + 2**-22) + 2**-25).all()
    assert (found.max(1) == 0).all() and (records["max_logit"] == logits.max(1)).all()


@given(LOGITS, st.sampled_from([1.0, 2.0, 4.0]), st.data())
def test_topk_outputs_keep_the_distribution_at_their_temperature(
    values: list[list[float]], temperature: float, data
) -> None:
    logits = np.array(values, np.float32)
    k = data.draw(st.integers(1, logits.shape[1] - 1))
    found, _ = stored(OutputsForm(k, temperature), logits)
    exact, ours = softmax(logits / temperature), softmax(found / temperature)
    for p, q, z in zip(exact, ours, logits, strict=True):
        top = np.argsort(-z, kind="stable")[:k]
        rest = np.setdiff1d(np.arange(len(z)), top)
        # Relative, at a distance of 600 from the largest; 2^-11 of the distance in general.
        tolerance = 2**-10 * 600 / temperature
        assert np.allclose(q[top], p[top], rtol=tolerance, atol=1e-6)
        assert np.isclose(q[rest].sum(), p[rest].sum(), rtol=tolerance, atol=1e-3)
        assert np.ptp(q[rest]) < 1e-12


def test_stored_clip_outputs_keep_the_divergence_small() -> None:
    """Divergence at temperature 1, in nats, of logits like CLIP's: cosines near 0.2, scale 100."""
    rng = np.random.default_rng(0)
    logits = (100 * (0.15 + 0.03 * rng.standard_normal((200, 1000)))).astype(np.float32)
    exact = softmax(logits)

    def divergence(q: Any) -> float:
        return float((exact * (np.log(exact) - np.log(q))).sum(1).max())

    ours = divergence(softmax(stored(OutputsForm(), logits)[0]))
    plain = divergence(softmax(logits.astype(np.float16)))
    assert ours < 5e-7 and plain > 10 * ours, (ours, plain)
    topk = [divergence(softmax(stored(OutputsForm(k, 1.0), logits)[0])) for k in (1, 10, 100, 999)]
    assert topk == sorted(topk, reverse=True) and topk[-1] < 5e-7, topk


def test_the_largest_class_stays_the_largest() -> None:
    logits = np.random.default_rng(0).normal(size=(100, 20)).astype(np.float32)
    for form in (OutputsForm(), OutputsForm(1, 4.0), OutputsForm(5, 1.0)):
        assert (stored(form, logits)[0].argmax(1) == logits.argmax(1)).all()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ful",
        "topk",
        "topk:3",
        "topk:0@1",
        "topk:5@1",
        "topk:3@0",
        "topk:3@-1",
        "topk:3@nan",
        "topk:3@1e9",
        "full@1",
    ],
)
def test_invalid_forms_of_outputs_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="outputs"):
        make_manifest(outputs=text)


# --- the documentation


def test_the_numpy_reader_in_the_docs_reads_a_store(store) -> None:
    text = (Path(__file__).parents[2] / "docs" / "store.md").read_text(encoding="utf-8")
    lines = re.search(r"```python\n(# A store without dad-fast.*?)```", text, re.S)
    assert lines
    code = [line for line in lines[1].splitlines() if line.strip() and not line.startswith("#")]
    assert len(code) <= 16
    for view, row in ((0, 0), (1, 20), (1, 44)):
        names: dict[str, Any] = {"folder": str(store.folder), "view": view, "row": row}
        exec("\n".join(code), names)
        wanted = content(store.manifest, view)
        assert (
            names["record"]["label"] == wanted["labels"][row]
            and (names["data"]["codes"] == wanted["codes"][row]).all()
        )
        assert np.allclose(names["logits"], wanted["outputs"][row], atol=0.03)
        assert bytes(names["record"]["key"]) == hashlib.sha256(key(row).encode()).digest()[:16]
        torch, kernels = pytest.importorskip("torch"), pytest.importorskip("dad_fast.kernels")
        assert (
            names["codes"].tolist()
            == kernels.unpack_codes(torch.from_numpy(wanted["codes"][row]), 9, 9).tolist()
        )
