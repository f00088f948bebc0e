"""Columns of a table of images: which hold image and label, class names, and rows as entries."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from dad_fast.data.sources.index import PENDING, Entry
from dad_fast.data.sources.names import shown, some
from dad_fast.data.sources.tar_index import Shard
from dad_fast.errors import DataError, EnvironmentProblem

_OPTIONS = re.compile(r",(image|label)=([^,]+)$")
# What a table without splits answers to.
WHOLE = ("", ".", "train")


class Table(NamedTuple):
    """A table by name: PATH[@SPLIT][,image=COLUMN][,label=COLUMN]. Empty: not given."""

    path: str
    split: str
    image: str
    label: str


class Columns(NamedTuple):
    """image, label: names of columns; label may be empty.

    numbers: labels are whole numbers. names: of the feature ClassLabel, in order.
    """

    image: str
    label: str
    numbers: bool = False
    names: tuple[str, ...] = ()


def parse(argument: str) -> Table:
    chosen = {"image": "", "label": ""}
    while match := _OPTIONS.search(argument):
        chosen[match[1]] = match[2]
        argument = argument[: match.start()]
    path, at, split = argument.rpartition("@")
    if not at or "/" in split or not path:
        path, split = argument, ""
    return Table(path, split, **chosen)


def import_extra(package: str, what: str) -> Any:
    """Import a package of the extra `data`. Raises EnvironmentProblem without it."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise EnvironmentProblem(
            f"{what} needs the package {package.partition('.')[0]}: pip install 'dad-fast[data]' "
            f"({error})"
        ) from None


def find_columns(schema: Any, table: Table, where: str, labelled: bool = True) -> Columns:
    """Return the columns of image and label: those named, else `image` and `label`, else the only
    ones of their kind. Raises DataError that lists the columns.
    """
    features = _features(schema)
    image = table.image or _find(schema, "image", [c.name for c in schema if _is_image(c.type)])
    if image not in schema.names:
        raise DataError(
            f"{where}: no column {image or 'image'} with images; it has {_listed(schema)} "
            "(add ,image=COLUMN to the name)"
        )
    if not _is_image(schema.field(image).type):
        raise DataError(
            f"{where}: the column {image} is {_short(schema, image)}; images are bytes, or a struct of "
            "bytes and path, as the feature Image writes them (,image=COLUMN names another one)"
        )
    if not labelled:
        return Columns(image, "")
    kinds = {name: found.get("_type") for name, found in features.items()}
    declared = [name for name in schema.names if kinds.get(name) == "ClassLabel"]
    label = table.label or _find(schema, "label", declared)
    if label not in schema.names:
        raise DataError(
            f"{where}: no column {label or 'label'} with class numbers or names; it has "
            f"{_listed(schema)} (add ,label=COLUMN to the name)"
        )
    if not _is_label(schema.field(label).type):
        raise DataError(
            f"{where}: the column {label} is {_short(schema, label)}; labels are whole numbers or names "
            "(,label=COLUMN names another one)"
        )
    numbers = _is_number(schema.field(label).type)
    names = features[label].get("names") or () if numbers and label in declared else ()
    return Columns(image, label, numbers, tuple(map(str, names)))


def rows_of(
    batches: Iterable[Any], columns: Columns, shard: Shard | None, base: int = 0
) -> Iterator[Entry]:
    """Yield the rows of record batches as entries, not verified; `path` is the row's number.

    shard, base: the Arrow file that is mapped at the address `base`; None: sizes are 0.
    """
    number = 0
    for batch in batches:
        texts = _labels(batch, columns)
        places = _places(batch.column(columns.image), shard, base) if shard else None
        for row, (text, error) in enumerate(texts):
            offset, size = places[row] if places else (0, 0)
            why = error or ("" if size or not places else "no image in this row")
            yield Entry(str(number), text, offset, size, 0, 0, 0, "", False, why or PENDING)
            number += 1


def images_of(batch: Any, columns: Columns) -> list[bytes | None]:
    """Return the encoded images of a record batch."""
    return [
        value.get("bytes") if isinstance(value, dict) else value
        for value in batch.column(columns.image).to_pylist()
    ]


def _labels(batch: Any, columns: Columns) -> list[tuple[str, str]]:
    """Return the label of each row as text, and why it is none."""
    if not columns.label:
        return [("", "")] * len(batch)
    found = []
    for value in batch.column(columns.label).to_pylist():
        if value is None or (isinstance(value, int) and value < 0):
            found.append(("", f"the label {'null' if value is None else value} is no class"))
        else:
            found.append((str(value), ""))
    return found


def _places(array: Any, shard: Shard, base: int) -> list[tuple[int, int]]:
    """Return (offset in the file, size) of the bytes of each row; (0, 0) where there are none."""
    import pyarrow as pa

    valid = np.asarray(array.is_valid())
    if pa.types.is_struct(array.type):
        array = array.field("bytes")
        valid = valid & np.asarray(array.is_valid())
    wide = pa.types.is_large_binary(array.type)
    _, ends, content = array.buffers()
    if not len(array) or content is None:
        return [(0, 0)] * len(array)
    bounds = np.frombuffer(ends, dtype=np.int64 if wide else np.int32)
    bounds = bounds[array.offset : array.offset + len(array) + 1].astype(np.int64)
    start = content.address - base
    if not 0 <= start < shard.size:
        raise DataError(
            f"{shard.path}: its record batches are compressed, so images cannot be read one by one: "
            "write the table again without compression (save_to_disk)"
        )
    sizes = np.where(valid, np.diff(bounds), 0)
    offsets = np.where(valid, start + bounds[:-1], 0)
    return list(zip(offsets.tolist(), sizes.tolist(), strict=True))


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Return the features that `datasets` records in the schema, by column."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, dict)}


def _find(schema: Any, usual: str, others: list[str]) -> str:
    if usual in schema.names:
        return usual
    return others[0] if len(others) == 1 else ""


def _is_image(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_image(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_label(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return _is_number(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_number(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind))


def _listed(schema: Any) -> str:
    return some(f"{shown(name)} ({_short(schema, name)})" for name in schema.names)


def _short(schema: Any, name: str) -> str:
    return shown(str(schema.field(name).type)[:60])
