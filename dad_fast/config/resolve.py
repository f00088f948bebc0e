"""Gather a Config from presets, files, `--set` and flags.

Later layers override: defaults < presets < files < --set < flags. This holds for variants too: a key
of a later layer overrides the same key in the variants of earlier layers (`--preset demo --epochs
2` shortens every run), and a `method` of a later layer keeps only the earlier variant of that name,
or else the variants with this method (`--preset demo --method dad`). Within one layer a variant
overrides the layer's own keys. Students (`[[students]]`, or several names of --student) follow the
same rule, but a layer that names students replaces those of earlier layers.

`extends = "NAME"` at the top of a preset or a file puts another preset, or a .toml file, below it
as an earlier layer. The variants of a file replace those of what it extends.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dad_fast.config.fields import (
    DECIDED_BY,
    RENAMED,
    TABLES_OF_RUNS,
    VARIANT_NAME,
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
from dad_fast.config.students import (
    NAME,
    Students,
    read_students,
    student_path,
    students_of_names,
)
from dad_fast.errors import UsageError

PRESETS = Path(__file__).parent / "presets"
NOT_IN_VARIANTS = {"seed": "--seed", "seeds": "--seeds", "device": "--device"}


def gather(
    preset: str | Sequence[str] | None,
    file: Path | Sequence[Path] | None,
    sets: Sequence[str],
    flags: Mapping[str, Any] | None,
) -> Config:
    """Return the Config of a command line, unchecked. `methods.settings.resolve` checks it too.

    Of several presets and of several files later ones override; all files override all presets.
    Raises UsageError for an unknown preset or key and for a value of the wrong type or out of
    range.
    """
    layers = Layers()
    for name in [preset] if isinstance(preset, str) else preset or ():
        layers.add_chain(_extended(preset_text(name), f"preset {name}", PRESETS))
    for path in [file] if isinstance(file, Path) else file or ():
        layers.add_chain(_extended(_read(path), str(path), path.parent))
    # --set and flags are one layer: `--set variants.big.optim.lr=1 --lr 2` keeps the variant's own
    # value.
    layers.add({}, "command line")
    for item in sets:
        layers.put_set(item)
    for key, value in (flags or {}).items():
        layers.put(key, value, settings()[key].flag or "settings")
    return layers.config()


def preset_names() -> list[str]:
    """List the names of the presets."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def preset_text(name: str, where: str = "--preset") -> str:
    """Return the TOML text of a preset, with its comments.

    Raises UsageError, which begins with `where`, for an unknown name.
    """
    known = preset_names()
    if name not in known:
        raise UsageError(
            f"{where} {name}: no such preset{nearest(name, known)} (known: {', '.join(known)})"
        )
    return (PRESETS / f"{name}.toml").read_text(encoding="utf-8")


# Tables of TOML, and their source for messages.
Layer = tuple[dict[str, Any], str]


def _extended(text: str, where: str, folder: Path, above: tuple[str, ...] = ()) -> list[Layer]:
    """Return the layer of a source after those that it extends.

    folder: relative files lie in it. above: the sources that led here.
    """
    above = (*above, where)
    tables = _parse(text, where)
    name = tables.pop("extends", None)
    if name is None:
        return [(tables, where)]
    if not isinstance(name, str):
        raise UsageError(f'{where}: extends names one preset or file: extends = "dad-vitb16"')
    if name.endswith(".toml"):
        base = folder / name
        found, text, folder = str(base), _read(base, f"{where}: extends {name}: "), base.parent
        known = any(_same_file(found, one) for one in above)
    else:
        found, text, folder = f"preset {name}", preset_text(name, f"{where}: extends"), PRESETS
        known = found in above
    if known:
        raise UsageError(f"{where}: extends in a loop: {' → '.join((*above, found))}")
    return [*_extended(text, found, folder, above), (tables, where)]


def _same_file(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        return read_toml(text)
    except tomllib.TOMLDecodeError as error:
        reason = str(error)
        reason = reason[:1].lower() + reason[1:]
        raise UsageError(f"{where}: not valid TOML: {reason}") from None
    except ValueError as error:
        raise UsageError(f"{where}: not settings ({error})") from None


class Layers:
    """Values gathered layer by layer; later layers override."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.variants: dict[str, dict[str, Any]] = {}
        self.students: Students = {}
        # The present layer names several students.
        self._names_students = False
        # The variants of earlier layers: keys of the present layer override them.
        self._earlier: dict[str, dict[str, Any]] = {}
        # Keys of the present layer.
        self._layer: set[str] = set()

    def add_toml(self, text: str, where: str) -> None:
        """Add a layer from TOML text. `where` names it in messages.

        Raises UsageError for text that is not valid.
        """
        self.add(_parse(text, where), where)

    def add_chain(self, chain: Sequence[Layer]) -> None:
        """Add layers that extend one another, of whose variants only the last ones count."""
        last = max((i for i, (tables, _) in enumerate(chain) if "variants" in tables), default=0)
        for number, (tables, where) in enumerate(chain):
            if number < last:
                tables.pop("variants", None)
            self.add(tables, where)

    def add(self, tables: dict[str, Any], where: str) -> None:
        """Add a layer of TOML tables."""
        self._layer, self._names_students = set(), False
        self._earlier = {name: dict(changes) for name, changes in self.variants.items()}
        variants = tables.get("variants", {})
        are_tables = isinstance(variants, dict) and all(
            isinstance(changes, dict) for changes in variants.values()
        )
        if not are_tables:
            raise UsageError(f"{where}: variants holds tables: [variants.NAME]")
        others = {key: value for key, value in tables.items() if key not in TABLES_OF_RUNS}
        for path, value in flatten(others, where):
            self.put(path, value, where)
        if tables.get("students"):
            self._put_students(read_students(tables["students"], where), where)
        for name, changes in variants.items():
            self.variants.setdefault(name, {})
            for path, value in flatten(changes, f"{where}: variants.{name}"):
                self._put_variant(name, path, value, f"{where}: variants.{name}")

    def put(self, path: str, value: Any, where: str) -> None:
        """Set a key of the present layer, overriding the students and variants of earlier layers.

        Several names of a student are several students.
        """
        path = RENAMED.get(path, path)
        if path == NAME and isinstance(value, list | tuple):
            if len(value) != 1:
                self._put_students(students_of_names(value, where), where)
                return
            (value,) = value
        if path == NAME and value:
            self._check_one_source(self._names_students, where)
            self.students = {}
        before = self.values.get("method", settings()["method"].default)
        self.values[path] = coerce(lookup(path, where), value, where)
        self._layer.add(path)
        decider = DECIDED_BY.get(path)
        if decider is not None and decider not in self._layer:
            # Both set the same thing: the later layer overrides.
            self.values.pop(decider, None)
        decided = {path, *(key for key, by in DECIDED_BY.items() if by == path)}
        if not self._names_students:
            for changes in self.students.values():
                for key in decided & changes.keys():
                    del changes[key]
        method = self.values.get("method")
        for name in list(self._earlier):
            has_other_method = self.variants[name].get("method", before) != method
            has_other_name = method in self._earlier and name != method
            if path == "method" and (has_other_method or has_other_name):
                del self._earlier[name], self.variants[name]
                continue
            for key in decided & self._earlier[name].keys():
                del self._earlier[name][key], self.variants[name][key]

    def put_set(self, item: str) -> None:
        """Set `section.key=value` as given to --set. `section.key.sub=value` sets a key of a table
        such as student.model_kwargs."""
        path, equals, text = item.partition("=")
        path, text = path.strip(), text.strip()
        where = f"--set {item}"
        if path == "students" or path.startswith("students."):
            self._set_of_student(path, text, where)
            return
        if not equals or not path:
            raise UsageError(f"{where}: write --set section.key=value")
        if path == "variants" or path.startswith("variants."):
            if text == "{}" and path == "variants":
                self.variants, self._earlier = {}, {}
                return
            name, _, inner = path.removeprefix("variants").removeprefix(".").partition(".")
            if not inner:
                raise UsageError(
                    f"{where}: write --set variants.NAME.section.key=value (or variants={{}} for "
                    "none)"
                )
            self._put_variant(name, inner, _unquote(text), where)
            return
        table, _, key = path.rpartition(".")
        if table in settings() and isinstance(settings()[table].default, dict):
            self.put(table, {**self.values.get(table, {}), key: toml_value(text)}, where)
        else:
            self.put(path, _unquote(text), where)

    def _put_students(self, students: Students, where: str) -> None:
        self._check_one_source(NAME in self._layer and bool(self.values.get(NAME)), where)
        self.students, self._names_students = students, True
        self.values.pop(NAME, None)
        for changes in self._earlier.values():
            changes.pop(NAME, None)
        for name in self._earlier:
            self.variants[name].pop(NAME, None)

    @staticmethod
    def _check_one_source(named_before: bool, where: str) -> None:
        if named_before:
            raise UsageError(
                f"{where}: student.name and students both name students; leave one out"
            )

    def _set_of_student(self, path: str, text: str, where: str) -> None:
        """Set `students.LABEL.key=value`. A label may have dots."""
        rest = path.removeprefix("students").removeprefix(".")
        label = next((label for label in self.students if rest.startswith(f"{label}.")), "")
        if not label:
            known = ", ".join(self.students) or "none"
            raise UsageError(
                f"{where}: write --set students.LABEL.key=value (students of presets and files: "
                f"{known})"
            )
        found = student_path(rest.removeprefix(f"{label}."), where)
        self.students[label][found] = coerce(lookup(found, where), _unquote(text), where)

    def _put_variant(self, name: str, path: str, value: Any, where: str) -> None:
        path = RENAMED.get(path, path)
        if not VARIANT_NAME.fullmatch(name):
            raise UsageError(
                f"{where}: {name!r} cannot be a variant's name: letters, digits and . _ + = - "
                "only, since it becomes a folder"
            )
        if path in NOT_IN_VARIANTS:
            raise UsageError(
                f"{where}: {path} cannot differ between variants; set it for all of them with "
                f"{NOT_IN_VARIANTS[path]}"
            )
        self.variants.setdefault(name, {})[path] = coerce(lookup(path, where), value, where)
        self._earlier.get(name, {}).pop(path, None)

    def config(self) -> Config:
        """Return the Config of all layers."""
        tables = {"students": self.students, "variants": self.variants}
        return with_values(Config(), {**self.values, **tables})


def is_fixed(aug: AugmentConfig) -> bool:
    """True if the augmentation has nothing random: an image looks the same in every epoch."""
    chance = any(0 < probability < 1 for probability in (aug.hflip, aug.vflip))
    return aug.crop != "random-resized" and not (
        chance or aug.aa or aug.color_jitter or aug.reprob or aug.mixup or aug.cutmix
    )


def _unquote(text: str) -> str:
    """Remove the quotes of text that is quoted as in TOML."""
    if text[:1] in ("'", '"'):
        value = toml_value(text)
        return value if isinstance(value, str) else text
    return text


def _read(file: Path, where: str = "") -> str:
    if file.is_dir():
        raise UsageError(
            f"{where}{file} is a folder; CONFIG is a TOML file (an image folder is given with --data-dir)"
        )
    if not file.exists():
        hint = f"; did you mean --preset {file.stem}?" if file.stem in preset_names() else ""
        raise UsageError(f"{where}{file}: no such file{hint}")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{where}{file}: cannot be read as text: {error}") from None
