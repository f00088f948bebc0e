"""manifest.json: the settings that made a store, the layout of its bytes, and its checksums.

It is canonical JSON (sorted keys, one form of every value) without times, hosts or paths, so that
the same settings give the same bytes on any machine. It names no files: their names follow from the
shard's number.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dad_fast.data.classes import ClassMap
from dad_fast.errors import DataError, UsageError
from dad_fast.files import plain
from dad_fast.store.images import check_images_form
from dad_fast.store.layout import INDEX, Geometry, data_dtype, describe_dtype
from dad_fast.store.outputs import OutputsForm

MANIFEST = "manifest.json"
FORMAT, VERSION = "dad-fast store", 1
KINDS = ("adversarial", "targets")
FLAGS = {
    "block_size": "--block-size",
    "blocks_per_shard": "--shard-blocks",
    "num_views": "--views",
    "images": "--images",
    "outputs": "--outputs",
}
# Limit of a manifest's bytes, of samples and of records of a shard, against exhaustion of memory.
_LARGEST = 1 << 28
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content and settings of a store.

    Args:
        kind: `adversarial` (Q(x') and the teacher's outputs on it) or `targets` (the teacher's
            outputs on augmented, mixed clean views).
        classes: (id, folder, name) of every class, in the order of the outputs.
        source: the fingerprint of the data set.
        settings: every setting that decides a record's content, such as attack, discretizer,
            teacher, augmentation, precision, seed; nested dicts of plain values.
        hashes: SHA-256 by name, such as teacher and discretizer.
        num_samples: of each view, unreadable ones included. num_views: draws per sample.
        block_size, blocks_per_shard: see layout.py.
        outputs: `full` or `topk:K@T`.
        code_bits, code_grid: bits of a code and (h, w) of an image's codes; 0 and () when the
            discretizer has no codes.
        images, image_size: `none`, `raw`, `webp` or `jpeg:Q`, and (H, W); () without images.
        shards: SHA-256 of each shard's files by kind; () until the store is complete.

    Raises UsageError for settings that contradict each other.
    """

    kind: str
    classes: tuple[tuple[int, str, str], ...]
    source: str
    settings: Mapping[str, Any]
    hashes: Mapping[str, str | None]
    num_samples: int
    num_views: int = 1
    block_size: int = 64
    blocks_per_shard: int = 32
    outputs: str = "full"
    code_bits: int = 0
    code_grid: tuple[int, ...] = ()
    images: str = "none"
    image_size: tuple[int, ...] = ()
    shards: tuple[Mapping[str, str], ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"a store's kind is {' or '.join(KINDS)}, not {self.kind!r}")
        for name, most in (
            ("num_samples", _LARGEST),
            ("num_views", 65535),
            ("block_size", 65536),
            ("blocks_per_shard", 65536),
        ):
            number = getattr(self, name)
            if not 1 <= number <= most:
                raise UsageError(f"a store's {name} is from 1 to {most:,}, not {number:,}")
        # Raises for an invalid list.
        ClassMap(tuple(self.classes))
        form = OutputsForm.parse(self.outputs, len(self.classes))
        object.__setattr__(self, "outputs", str(form))
        object.__setattr__(self, "settings", plain(self.settings))
        object.__setattr__(self, "hashes", plain(self.hashes))
        check_images_form(self.images)
        for name, wanted in (
            ("code_grid", self.code_bits > 0),
            ("image_size", self.images != "none"),
        ):
            pair = getattr(self, name)
            if len(pair) != 2 * wanted or not all(1 <= side <= 8192 for side in pair):
                raise UsageError(
                    f"a store's {name} {list(pair)} does not fit its code_bits {self.code_bits} "
                    f"and images {self.images}"
                )
        if not 0 <= self.code_bits <= 32:
            raise UsageError(f"a store's codes have 0 to 32 bits, not {self.code_bits}")
        if self.kind == "targets" and (self.code_bits or self.images != "none"):
            raise UsageError("a store of targets holds neither codes nor images")
        if self.kind == "adversarial" and not self.code_bits and self.images == "none":
            raise UsageError(
                "this discretizer has no codes, so there is nothing to train on: "
                "store images (--images)"
            )
        shard_bytes = self.geometry.rows_per_shard * max(self.bytes_per_sample.values())
        if self.geometry.num_shards > 999_999 or shard_bytes > _LARGEST << 12:
            raise UsageError(
                "shards that are too many or too large: "
                "choose another block_size or blocks_per_shard"
            )

    @cached_property
    def geometry(self) -> Geometry:
        return Geometry(self.num_samples, self.num_views, self.block_size, self.blocks_per_shard)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def class_map(self) -> ClassMap:
        return ClassMap(tuple(self.classes))

    @cached_property
    def outputs_form(self) -> OutputsForm:
        return OutputsForm.parse(self.outputs, self.num_classes)

    @property
    def num_codes(self) -> int:
        """Number of codes of an image."""
        return math.prod(self.code_grid) if self.code_bits else 0

    @property
    def code_bytes(self) -> int:
        """Bytes of an image's packed codes."""
        return -(-self.num_codes * self.code_bits // 8)

    @cached_property
    def data_dtype(self) -> np.dtype[Any]:
        return data_dtype(self.code_bytes, self.outputs_form, self.num_classes)

    @property
    def files(self) -> tuple[str, ...]:
        """Kinds of files of a shard."""
        return ("index", "data") if self.images == "none" else ("index", "data", "images")

    @cached_property
    def bytes_per_sample(self) -> dict[str, int]:
        """Bytes of a sample and view, by kind of file; the raw size bounds webp and jpeg."""
        images = math.prod((*self.image_size, 3)) if self.image_size else 0
        return {"index": INDEX.itemsize, "data": self.data_dtype.itemsize, "images": images}

    @property
    def complete(self) -> bool:
        return bool(self.shards)

    @property
    def checksum(self) -> str:
        """SHA-256 of the manifest, and through the shards' checksums of the whole store."""
        return hashlib.sha256(_canonical(self._document())).hexdigest()

    def with_shards(self, shards: tuple[Mapping[str, str], ...]) -> Manifest:
        return replace(self, shards=shards)

    def to_json(self) -> bytes:
        return _canonical({**self._document(), "checksum": self.checksum})

    def _document(self) -> dict[str, Any]:
        layout = {"index": describe_dtype(INDEX), "data": describe_dtype(self.data_dtype)}
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {"format": FORMAT, "version": VERSION, **plain(values), "records": layout}

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read a folder's manifest.

        Raises DataError when it is missing, damaged, of another version, or in another form than
        this program writes.
        """
        path = Path(folder) / MANIFEST
        try:
            if path.stat().st_size > _LARGEST:
                raise DataError(f"{path}: too large for a manifest")
            content = path.read_bytes()
        except FileNotFoundError as error:
            raise DataError(f"{folder}: not a store, it has no {MANIFEST}") from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        return cls.from_json(content, str(path))

    @classmethod
    def from_json(cls, content: bytes, name: str = MANIFEST) -> Manifest:
        try:
            document = json.loads(content)
            if document.get("format") != FORMAT:
                raise DataError(f"{name}: not the manifest of a store")
            if document.get("version") != VERSION:
                raise DataError(
                    f"{name}: format version {document.get('version')}; "
                    f"this program reads version {VERSION}"
                )
            checksum = document.pop("checksum", None)
            if checksum != hashlib.sha256(_canonical(document)).hexdigest():
                raise DataError(
                    f"{name}: its checksum is not that of its content: it is damaged or was edited"
                )
            manifest = cls._read(document)
            if manifest._document() != document:
                raise DataError(
                    f"{name}: the layout it describes is not the one that its settings give"
                )
            if manifest.to_json() != content:
                raise DataError(
                    f"{name}: not written as this program writes it: it is damaged or was edited"
                )
        except (DataError, UsageError) as error:
            text = str(error)
            raise DataError(text if text.startswith(name) else f"{name}: {text}") from error
        except (
            ValueError,
            TypeError,
            AttributeError,
            KeyError,
            RecursionError,
            OverflowError,
        ) as error:
            raise DataError(
                f"{name}: not a manifest that this program writes ({type(error).__name__}: {error})"
            ) from error
        return manifest

    @classmethod
    def _read(cls, document: Mapping[str, Any]) -> Manifest:
        names = {item.name: item for item in fields(cls)}
        if extra := sorted(set(document) - set(names) - {"format", "version", "records"}):
            raise DataError(f"unknown keys: {', '.join(map(repr, extra[:5]))}")
        values = {name: document[name] for name in names}
        for name in ("num_samples", "num_views", "block_size", "blocks_per_shard", "code_bits"):
            if type(values[name]) is not int:
                raise DataError(f"{name} is {values[name]!r}, not a whole number")
        for name in ("kind", "source", "outputs", "images"):
            if not isinstance(values[name], str):
                raise DataError(f"{name} is {values[name]!r}, not a text")
        for name in ("settings", "hashes"):
            if not isinstance(values[name], dict):
                raise DataError(f"{name} is not a table")
        for name in ("code_grid", "image_size"):
            values[name] = tuple(values[name])
            if not all(type(side) is int for side in values[name]):
                raise DataError(f"{name} holds something else than whole numbers")
        values["classes"] = tuple(
            (int(i), str(folder), str(text)) for i, folder, text in values["classes"]
        )
        values["shards"] = tuple(dict(shard) for shard in values["shards"])
        manifest = cls(**values)
        if manifest.shards:
            if len(manifest.shards) != manifest.geometry.num_shards:
                raise DataError(
                    f"{len(manifest.shards)} checksums for {manifest.geometry.num_shards} shards"
                )
            for shard in manifest.shards:
                are_hashes = all(_HEX.fullmatch(str(value)) for value in shard.values())
                if sorted(shard) != sorted(manifest.files) or not are_hashes:
                    raise DataError("a shard's checksums are not SHA-256 of its files")
        return manifest

    def differences(
        self, other: Manifest, mine: str = "the store", theirs: str = "this run"
    ) -> list[str]:
        """Describe each setting in which two manifests differ, except the checksums of shards."""
        if self.kind != other.kind:
            return [f"kind: {self.kind} in {mine}, {other.kind} in {theirs}"]
        ours, others = (_flat(asdict(manifest.with_shards(()))) for manifest in (self, other))
        texts = []
        for name in sorted(set(ours) | set(others)):
            our, their = (values.get(name, "nothing") for values in (ours, others))
            if our != their:
                flag = FLAGS.get(name, name)
                texts.append(f"{flag}: {_short(our)} in {mine}, {_short(their)} in {theirs}")
        return texts


def _canonical(value: Any) -> bytes:
    return (
        json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n"
    ).encode()


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {name: value}
    found = {}
    for part in value:
        found.update(_flat(value[part], f"{name}.{part}" if name else part))
    return found


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)) and len(value) > 4:
        return f"{len(value)} entries ({hashlib.sha256(_canonical(plain(value))).hexdigest()[:8]})"
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"
