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
    get,
    lookup,
    nearest,
    read_toml,
    settings,
    toml_value,
    with_values,
)
from dad_fast.config.schema import (
    MODEL_SAVINGS,
    USES_DISCRETIZER,
    USES_TEACHER,
    VQGAN_SAVINGS,
    AugmentConfig,
    Config,
)
from dad_fast.config.stores import check_stores, usable_kinds
from dad_fast.config.variants import expand
from dad_fast.errors import UsageError

PRESETS = Path(__file__).parent / "presets"
VARIANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
NOT_IN_VARIANTS = {"seed": "--seed", "seeds": "--seeds", "device": "--device"}


def resolve(
    preset: str | None = None,
    file: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """The checked Config of a command line.

    `flags` maps paths such as "optim.lr" to what was typed (text, a list of texts, or a bool). Raises UsageError for an
    unknown preset, key or choice, a value of the wrong type or out of range, and settings that do not fit together.
    """
    cfg = gather(preset, file, sets, flags)
    check(cfg)
    return cfg


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


def check(cfg: Config) -> None:
    """Raises UsageError where settings do not fit together, naming the flag that mends it. Every variant is checked."""
    for path, setting in settings().items():
        coerce(setting, get(cfg, path), "settings")
    runs = expand(cfg)
    for name, _, run in runs:
        try:
            _check_run(run)
        except UsageError as error:
            raise UsageError(f"variant {name}: {error}" if cfg.variants else str(error)) from None
    asking = [run for _, _, run in runs if run.store.make]
    if asking and not any(map(usable_kinds, asking)):
        kinds, method = " ".join(asking[0].store.make), asking[0].method
        raise UsageError(
            f"--stores {kinds}: --method {method} learns from no such store; leave it out"
        )


def _check_run(cfg: Config) -> None:
    if not cfg.data.data_dir:
        raise UsageError(
            "no data: add --data-dir (a folder with train/ and val/, or embedded:digits), or try --preset demo"
        )
    if cfg.method == "lp-clip":
        _check_lp_clip(cfg)
    elif not cfg.student.name:
        raise UsageError(
            "no student: add --student, for instance --student resnet50 (any timm model)"
        )
    if cfg.store.dirs and cfg.method in ("ce", "dat"):
        raise UsageError(
            f"--store: --method {cfg.method} learns from no stored images or outputs; leave it out"
        )
    check_stores(cfg)
    _check_stored_forms(cfg)
    if USES_TEACHER[cfg.method] and not cfg.teacher.name and not cfg.store.dirs:
        raise UsageError(
            f"--method {cfg.method} needs a teacher: add --teacher, for instance --teacher open_clip:ViT-L-14/openai"
        )
    if USES_DISCRETIZER[cfg.method] and not cfg.discretizer.name and not cfg.store.dirs:
        raise UsageError(
            f"--method {cfg.method} needs a discretizer: add --discretizer (a VQGAN's file, identity or jpeg:75)"
        )
    _check_scheme(cfg.data.data_dir, "--data-dir", ("embedded",))
    _check_scheme(cfg.teacher.name, "--teacher", ("open_clip", "timm", "hf-hub", "embedded"))
    _check_scheme(cfg.discretizer.name, "--discretizer", ("jpeg", "embedded"))
    quality = cfg.discretizer.name.removeprefix("jpeg:")
    if cfg.discretizer.name.startswith("jpeg:") and not (
        quality.isdecimal() and 1 <= int(quality) <= 100
    ):
        raise UsageError(
            f"--discretizer {cfg.discretizer.name}: the quality is a whole number from 1 to 100, as in jpeg:75"
        )
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", cfg.device):
        raise UsageError(f"--device {cfg.device}: must be auto, cpu, cuda or cuda:N")
    if (cfg.augment.mixup or cfg.augment.cutmix) and cfg.data.batch_size % 2:
        raise UsageError(
            f"--batch-size {cfg.data.batch_size}: must be even with --mixup or --cutmix, which mix pairs of images"
        )
    known = ("all", "none", *MODEL_SAVINGS, *(f"vqgan_{name}" for name in VQGAN_SAVINGS))
    if unknown := [name for name in cfg.engine.savings if name not in known]:
        raise UsageError(
            f"--savings {unknown[0]}: no such saving{nearest(unknown[0], known)} (known: {', '.join(known)})"
        )
    if cfg.student.weights and cfg.student.init_from:
        raise UsageError(
            "--student-weights and --init-from both give the student's weights: leave one out"
        )
    if cfg.schedule.warmup_epochs > cfg.schedule.epochs:
        raise UsageError(
            f"--warmup-epochs {cfg.schedule.warmup_epochs:g} is more than --epochs {cfg.schedule.epochs}, of which it is the first part: "
            "raise --epochs, or set --warmup-epochs (0 = none)"
        )


def _check_stored_forms(cfg: Config) -> None:
    kinds = usable_kinds(cfg)
    if cfg.store.mix_outputs and not cfg.store.dirs and "targets" not in kinds:
        raise UsageError(
            "--mix-outputs mixes stored outputs: add --store (made by dad-fast precompute --targets) or --stores targets"
        )
    if cfg.loss.form == "paper":
        return
    if cfg.method != "dad":
        raise UsageError(
            f"--loss-form joint is a form of --method dad, not of {cfg.method}; leave it out"
        )
    if not cfg.store.dirs and "adversarial" not in kinds:
        raise UsageError(
            "--loss-form joint learns from stored adversarial images: add --store (made by dad-fast precompute) or --stores"
        )
    if cfg.student.bn != "joint":
        raise UsageError(
            f"--loss-form joint: every image is of both kinds, which --bn {cfg.student.bn} would tell apart; use --bn joint"
        )


def _check_lp_clip(cfg: Config) -> None:
    """What the other methods allow and a linear probe has no use for."""
    if cfg.store.dirs:
        raise UsageError(
            "--store: --method lp-clip keeps the teacher's answers by itself; leave it out"
        )
    if cfg.augment.mixup or cfg.augment.cutmix:
        raise UsageError(
            "--method lp-clip: a pseudo-label is of one image, which --mixup and --cutmix blend with another; leave them out"
        )
    if cfg.lp_clip.labels == "true" and cfg.lp_clip.threshold:
        raise UsageError(
            "--lp-threshold: with --lp-labels true there are no pseudo-labels; leave one out"
        )
    if cfg.lp_clip.init == "zero-shot" and cfg.student.init_from:
        raise UsageError(
            "--lp-init zero-shot and --init-from both give the first weights: leave one out"
        )
    if cfg.data.loader == "dali" and (cfg.lp_clip.views or is_fixed(cfg.augment)):
        raise UsageError(
            "--loader dali: features that are kept are made from images that PIL decodes; leave it out, or train on new views"
        )


def _check_scheme(name: str, flag: str, schemes: tuple[str, ...]) -> None:
    """`name` may be a path; a word before a colon must be a known scheme, and what is embedded is named."""
    scheme, colon, rest = name.partition(":")
    if not colon or "/" in scheme or len(scheme) == 1 or Path(name).exists():
        return
    if scheme not in schemes:
        raise UsageError(
            f"{flag} {name}: unknown kind {scheme}:{nearest(scheme, schemes)} (known: {', '.join(s + ':' for s in schemes)})"
        )
    if scheme == "embedded" and rest != "digits":
        raise UsageError(f"{flag} {name}: nothing of that name is embedded; use embedded:digits")
    if not rest:
        raise UsageError(f"{flag} {name}: a name is missing after the colon")


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
