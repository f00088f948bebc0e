"""Tables of small pictures for tests: Parquet files and Hugging Face data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.shards import picture

NAMES = ("ant", "bee", "cat")
FEATURES = {
    "image": {"_type": "Image"},
    "label": {"_type": "ClassLabel", "names": list(NAMES)},
}


def pictures(count: int, first: int = 0) -> list[bytes]:
    return [picture(15 * (first + i) % 256, size=(20 + i, 24)) for i in range(count)]


def write_parquet(
    file: Path,
    count: int = 15,
    first: int = 0,
    struct: bool = True,
    columns: tuple[str, str] = ("image", "label"),
    features: dict[str, Any] | None = FEATURES,
    **changed: Any,
) -> Path:
    """Write `count` rows; image and label of a row can be changed by `images` and `labels`."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    contents = changed.get("images") or pictures(count, first)
    images = [{"bytes": content, "path": None} for content in contents] if struct else contents
    labels = changed.get("labels") or [(first + i) % 3 for i in range(count)]
    table = pa.table(dict(zip(columns, (images, labels), strict=True)))
    if features:
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, file, row_group_size=4)
    return file


def write_splits(folder: Path) -> Path:
    """Write a folder as on the hub: two files to train on, and one to validate on."""
    write_parquet(folder / "data" / "train-00000-of-00002.parquet", 6)
    write_parquet(folder / "data" / "train-00001-of-00002.parquet", 6, first=6)
    write_parquet(folder / "data" / "validation-00000-of-00001.parquet", 3, first=12)
    return folder


def data_set(count: int = 15, first: int = 0, **changed: Any) -> Any:
    """Return a `datasets.Dataset` of pictures with the features Image and ClassLabel."""
    datasets = pytest.importorskip("datasets")
    contents = changed.get("images") or pictures(count, first)
    labels = changed.get("labels") or [(first + i) % 3 for i in range(count)]
    images = [content and {"bytes": content, "path": None} for content in contents]
    rows = {"image": images, "label": labels}
    names = datasets.ClassLabel(names=list(NAMES))
    features = datasets.Features({"image": datasets.Image(), "label": names})
    return datasets.Dataset.from_dict(rows, features=features)


def save_splits(folder: Path) -> Path:
    """Save 12 pictures to train on and 3 to validate on with `save_to_disk`."""
    datasets = pytest.importorskip("datasets")
    parts = {"train": data_set(12), "validation": data_set(3, first=12)}
    datasets.disable_progress_bars()
    datasets.DatasetDict(parts).save_to_disk(str(folder))
    return folder
