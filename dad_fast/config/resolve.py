"""One step from presets, a file, `--set` and flags to a checked Config.

Later layers win: defaults < preset < file < --set < flags. That holds for variants too: a key given by a later layer beats
the same key in the variants of earlier layers (`--preset demo --epochs 2` shortens every run), and a `method` given by a
later layer keeps only the earlier variant of that name, or else those that have this method (`--preset demo --method dad`).
Within one layer a variant wins over the layer's own keys.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dad_fast.config.fields import (
    coerce,
    flatten,
    lookup,
    nearest,
    read_toml,
    settings,
    toml_value,
    with_values,
)
from dad_fast.config.schema import (
    AugmentConfig,
    Config,
)
from dad_fast.errors import UsageError

PRESETS = Path(__file__).parent / "presets"
VARIANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
NOT_IN_VARIANTS = {"seed": "--seed", "seeds": "--seeds", "device": "--device"}


def gather(
    preset: str | None, file: Path | None, sets: Sequence[str], flags: Mapping[str, Any] | None
) -> Config:
    """`resolve` without the check that nothing is missing and all fits together."""
    layers = Layers()
    if preset:
        layers.add_toml(preset_text(preset), f"preset {preset}")
    if file is not None:
        layers.add_toml(_read(file), str(file))
    layers.add(
        {}, "command line"
    )  # one layer: `--set variants.big.optim.lr=1 --lr 2` gives big its own
    for item in sets:
        layers.put_set(item)
    for path, value in (flags or {}).items():
        layers.put(path, value, settings()[path].flag)
    return layers.config()


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def preset_text(name: str) -> str:
    """The preset's TOML file, with its comments."""
    if name not in preset_names():
        raise UsageError(
            f"--preset {name}: no such preset{nearest(name, preset_names())} (known: {', '.join(preset_names())})"
        )
    return (PRESETS / f"{name}.toml").read_text(encoding="utf-8")


class Layers:
    """Values gathered from the weakest layer to the strongest."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.variants: dict[str, dict[str, Any]] = {}
        self._earlier: dict[
            str, dict[str, Any]
        ] = {}  # the variants of earlier layers, which a key of this layer overrides
        self._layer: set[str] = set()  # keys of this layer

    def add_toml(self, text: str, where: str) -> None:
        try:
            tables = read_toml(text)
        except tomllib.TOMLDecodeError as error:
            raise UsageError(
                f"{where}: not valid TOML: {str(error)[:1].lower()}{str(error)[1:]}"
            ) from None
        except ValueError as error:
            raise UsageError(f"{where}: not settings ({error})") from None
        self.add(tables, where)

    def add(self, tables: dict[str, Any], where: str) -> None:
        """A new layer with the given TOML tables."""
        self._layer = set()
        self._earlier = {name: dict(changes) for name, changes in self.variants.items()}
        variants = tables.get("variants", {})
        if not isinstance(variants, dict) or not all(
            isinstance(changes, dict) for changes in variants.values()
        ):
            raise UsageError(f"{where}: variants holds tables: [variants.NAME]")
        for path, value in flatten(
            {key: value for key, value in tables.items() if key != "variants"}, where
        ):
            self.put(path, value, where)
        for name, changes in variants.items():
            self.variants.setdefault(name, {})
            for path, value in flatten(changes, f"{where}: variants.{name}"):
                self._put_variant(name, path, value, f"{where}: variants.{name}")

    def put(self, path: str, value: Any, where: str) -> None:
        before = self.values.get("method", settings()["method"].default)
        self.values[path] = coerce(lookup(path, where), value, where)
        self._layer.add(path)
        if path == "data.batch_size" and "data.global_batch_size" not in self._layer:
            self.values.pop(
                "data.global_batch_size", None
            )  # an earlier layer's: the later word on the same thing wins
        method = self.values.get("method")
        for name in list(self._earlier):
            other = self.variants[name].get("method", before) != method or (
                method in self._earlier and name != method
            )
            if path == "method" and other:
                del self._earlier[name], self.variants[name]
            elif path in self._earlier[name]:
                del self._earlier[name][path], self.variants[name][path]

    def put_set(self, item: str) -> None:
        """`section.key=value` as given to --set; `section.key.sub=value` reaches into a table such as student.model_kwargs."""
        path, equals, text = item.partition("=")
        path, text = path.strip(), text.strip()
        where = f"--set {item}"
        if not equals or not path:
            raise UsageError(f"{where}: write --set section.key=value")
        if path == "variants" or path.startswith("variants."):
            if text == "{}" and path == "variants":
                self.variants, self._earlier = {}, {}
                return
            name, _, inner = path.removeprefix("variants").removeprefix(".").partition(".")
            if not inner:
                raise UsageError(
                    f"{where}: write --set variants.NAME.section.key=value (or variants={{}} for none)"
                )
            self._put_variant(name, inner, _unquote(text), where)
            return
        table = path.rpartition(".")[0]
        if table in settings() and isinstance(settings()[table].default, dict):
            self.put(
                table,
                {**self.values.get(table, {}), path.rpartition(".")[2]: toml_value(text)},
                where,
            )
        else:
            self.put(path, _unquote(text), where)

    def _put_variant(self, name: str, path: str, value: Any, where: str) -> None:
        if not VARIANT_NAME.fullmatch(name):
            raise UsageError(
                f"{where}: {name!r} cannot be a variant's name: letters, digits and . _ + = - only, since it becomes a folder"
            )
        if path in NOT_IN_VARIANTS:
            raise UsageError(
                f"{where}: {path} cannot differ between variants; set it for all of them with {NOT_IN_VARIANTS[path]}"
            )
        self.variants.setdefault(name, {})[path] = coerce(lookup(path, where), value, where)
        self._earlier.get(name, {}).pop(path, None)

    def config(self) -> Config:
        return with_values(Config(), {**self.values, "variants": self.variants})


def is_fixed(aug: AugmentConfig) -> bool:
    """Whether an image looks the same in every epoch."""
    chance = any(0 < probability < 1 for probability in (aug.hflip, aug.vflip))
    return aug.crop == "center" and not (
        chance or aug.aa or aug.color_jitter or aug.reprob or aug.mixup or aug.cutmix
    )


def _unquote(text: str) -> str:
    """Text that is quoted as in TOML without its quotes; anything else as it is."""
    if text[:1] in ("'", '"'):
        value = toml_value(text)
        return value if isinstance(value, str) else text
    return text


def _read(file: Path) -> str:
    if file.is_dir():
        raise UsageError(
            f"{file} is a folder; CONFIG is a TOML file (an image folder is given with --data-dir)"
        )
    if not file.exists():
        hint = f"; did you mean --preset {file.stem}?" if file.stem in preset_names() else ""
        raise UsageError(f"{file}: no such file{hint}")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: cannot be read as text: {error}") from None
