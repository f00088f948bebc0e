"""Cells of a sweep: make them from the axes, and merge those that are the same run.

A cell is a variant: a name, which becomes its folder, and the settings that differ from the base.
Axes vary one factor at a time around a common base; only the weights are a grid. Cells that compute
the same are one cell, whatever their names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from dad_fast.config.fields import (
    VARIANT_NAME,
    coerce,
    flatten,
    get,
    lookup,
    nearest,
    settings,
    with_values,
)
from dad_fast.config.schema import Config
from dad_fast.discretizers.registry import CONTROLS
from dad_fast.errors import UsageError
from dad_fast.methods.registry import DISTANCES, METHODS, Target
from dad_fast.models.registry import split_names

# Of the axis "augmentation"
POLICIES = (
    *("none", "rand-m9-mstd0.5-inc1", "v0", "ta", "3a", "augmix-m3-w3"),
    *("pixmix-k4-b4", "prime"),
)

Changes = dict[str, Any]  # setting's path -> value
Cells = dict[str, Changes]


@dataclass(frozen=True)
class Plan:
    """The cells of a sweep. `config` has every cell as a variant, the base first, and the seeds."""

    config: Config
    base: str  # the base's name
    axes: dict[str, list[str]]  # axis -> its cells, the base first


class Axis(NamedTuple):
    """One factor of a sweep.

    cells: makes the cells from the base and the values that the user typed, if any
    flag: takes the values; with it the axis need not be named in --axes
    """

    help: str
    cells: Callable[[Config, Sequence[str]], Cells]
    flag: str = ""
    needs_values: bool = False


def _components(base: Config, values: Sequence[str]) -> Cells:
    return _of_method(base, "ce", "kd", "aug-only", "dad")


def _methods(base: Config, values: Sequence[str]) -> Cells:
    return _of_method(base, "dat", "dat+dad", "ard", "rslad")


def _of_method(base: Config, *methods: str) -> Cells:
    """Return a cell per method. Other forms than the paper's exist for dad alone."""
    plain = {} if base.loss.form == "paper" else {"loss.form": "paper"}
    return {method: {"method": method, **({} if method == "dad" else plain)} for method in methods}


def _distances(base: Config, values: Sequence[str]) -> Cells:
    return {f"distance={_slug(name)}": {"loss.distance": name} for name in values or DISTANCES}


def _weights(base: Config, values: Sequence[str]) -> Cells:
    typed = [_number("--weights", "loss.kd", value) for value in values]
    grid = product(typed or _multiples(base.loss.kd), typed or _multiples(base.loss.dad))
    return {f"kd={kd:g}_dad={dad:g}": {"loss.kd": kd, "loss.dad": dad} for kd, dad in grid}


def _teachers(base: Config, values: Sequence[str]) -> Cells:
    short_names = _short_names(values)
    return {f"teacher={short}": {"teacher.name": name} for name, short in short_names.items()}


def _discretizers(base: Config, values: Sequence[str]) -> Cells:
    short_names = _short_names(values or CONTROLS)
    return {
        f"discretizer={short}": {"discretizer.name": name} for name, short in short_names.items()
    }


def _budgets(base: Config, values: Sequence[str]) -> Cells:
    """Scale the step size with eps, since a larger budget is not used otherwise."""
    attack = base.attack
    ratio = attack.step_size / attack.eps if attack.eps else 1.0
    typed = [_number("--budgets", "attack.eps", value) for value in values]
    budgets = typed or [round(attack.eps * factor, 12) for factor in (0.25, 0.5, 2)]
    return {
        f"eps={eps:g}": {"attack.eps": eps, "attack.step_size": round(eps * ratio, 12)}
        for eps in budgets
    }


def _starts(base: Config, values: Sequence[str]) -> Cells:
    cells: Cells = {f"start={p:g}": {"attack.random_start": p} for p in (0.0, 0.8, 1.0)}
    noise: Changes = {"attack.steps": 0, "attack.random_start": 1.0}
    return cells | {"noise-only": noise, "Q-only": {"attack.steps": 0, "attack.random_start": 0.0}}


def _order(base: Config, values: Sequence[str]) -> Cells:
    return {f"order={order}": {"attack.order": order} for order in ("paper", "authors")}


def _filter(base: Config, values: Sequence[str]) -> Cells:
    return {"filter=on": {"loss.filter": True}, "filter=off": {"loss.filter": False}}


def _lp_clip(base: Config, values: Sequence[str]) -> Cells:
    weak: Changes = {"augment.aa": "", "augment.reprob": 0.0, "augment.color_jitter": 0.0}
    supervised: Changes = {"lp_clip.labels": "true", "lp_clip.threshold": 0.0}
    return {"no-weight": {"lp_clip.weight": "none"}, "no-strong": weak, "supervised": supervised}


def _thresholds(base: Config, values: Sequence[str]) -> Cells:
    typed = [_number("--thresholds", "lp_clip.threshold", value) for value in values]
    return {
        f"threshold={value:g}": {"lp_clip.threshold": value} for value in typed or (0.5, 0.8, 0.95)
    }


def _strengths(base: Config, values: Sequence[str]) -> Cells:
    policy = base.augment.aa or "rand-m9-n2-mstd0.5-inc1"
    for value in values:
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", value):
            raise UsageError(f"--strengths {value}: a number, 0 or more, as in rand-m9")
    return {
        f"m={value}": {"augment.aa": re.sub(r"-m[0-9.]+", f"-m{value}", policy)}
        for value in values or ("2", "9", "15")
    }


def _augmentations(base: Config, values: Sequence[str]) -> Cells:
    policies = values or POLICIES
    return {
        f"aa={_slug(name)}": {"augment.aa": "" if name == "none" else name} for name in policies
    }


def _variants(base: Config, values: Sequence[str]) -> Cells:
    return {
        name: dict(flatten(tables, f"variants.{name}")) for name, tables in base.variants.items()
    }


AXES = {
    "components": Axis(
        "ce, kd, aug-only, dad: neither, distillation, augmentation, both", _components
    ),
    "methods": Axis("dat, dat+dad, ard and rslad: other terms on attacked images", _methods),
    "distance": Axis(
        "distance of student and teacher: --distances D ... [kl, l2, dist]",
        _distances,
        "--distances",
    ),
    "weights": Axis(
        "loss.kd and loss.dad as a grid: --weights X ... [half, once, twice the base's]",
        _weights,
        "--weights",
    ),
    "teacher": Axis("--teachers A B ...", _teachers, "--teachers", needs_values=True),
    "discretizer": Axis(
        f"--discretizers A B ... [{', '.join(CONTROLS)}]", _discretizers, "--discretizers"
    ),
    "budget": Axis(
        "attack.eps: --budgets X ... [a quarter, half, twice the base's]", _budgets, "--budgets"
    ),
    "start": Axis("random start of 0, 0.8 and 1; only the noise; only Q(x)", _starts),
    "order": Axis("Q(x+d) as in the paper, Q(Q(x)+d) as in the authors' code", _order),
    "filter": Axis("with and without the teacher's filter", _filter),
    "lp-clip": Axis("without its weights, without strong augmentation, with true labels", _lp_clip),
    "threshold": Axis(
        "lp_clip.threshold: --thresholds X ... [0.5, 0.8, 0.95]", _thresholds, "--thresholds"
    ),
    "augmentation": Axis(
        f"--aa: --augmentations A B ... [{', '.join(POLICIES)}]",
        _augmentations,
        "--augmentations",
    ),
    "strength": Axis(
        "RandAugment's magnitude: --strengths M ... [2, 9, 15]", _strengths, "--strengths"
    ),
    "variants": Axis("the [variants] of the preset or of CONFIG.toml", _variants),
}


@dataclass
class _Growing:
    """The cells so far. `names`: identity of a cell -> its name."""

    base: Config
    names: dict[tuple[tuple[str, str], ...], str] = field(default_factory=dict)
    cells: Cells = field(default_factory=dict)

    def add(self, name: str, changes: Changes, axis: str) -> str:
        """Add a cell unless an equal one exists; return the name of the cell that is run."""
        where = f"axis {axis}"
        coerced: Changes = {}
        for path, value in changes.items():
            new = coerce(lookup(path, where), value, where)
            if new != get(self.base, path):
                coerced[path] = new
        found = self.names.setdefault(identity(with_values(self.base, coerced)), name)
        if found != name:
            return found
        if name in self.cells and self.cells[name] != coerced:
            raise UsageError(
                f"{where}: its cell {name} is not the run of that name in another axis; "
                "give it another name"
            )
        if not VARIANT_NAME.fullmatch(name):
            raise UsageError(
                f"{where}: {name!r} cannot be a cell's name, since it becomes a folder"
            )
        self.cells.setdefault(name, coerced)
        return name


def papers_axis(cfg: Config) -> str:
    """Return the axis that the method's paper varies, the default."""
    return "lp-clip" if METHODS[cfg.method].linear_probe else "components"


def make_plan(
    cfg: Config, axes: Sequence[str], values: Mapping[str, Sequence[str]], vary: Sequence[str] = ()
) -> Plan:
    """Make the sweep around `cfg`, whose own variants are one of the axes.

    axes: names in AXES, in the order of the table
    values: axis -> values that the user typed
    vary: texts "section.key=V1,V2" (V1;V2 if a value has commas), each an axis of its own

    Raises UsageError, also if an axis changes nothing that the base's method uses. Whether the
    settings of a cell fit together is checked later, by `resolve.check`.
    """
    if cfg.store.dirs:
        raise UsageError(
            "--store: a store belongs to one attack and one teacher, and cells differ in them; "
            "use --stores, which fills them"
        )
    base = with_values(cfg, {"variants": {}})
    growing = _Growing(base)
    growing.add(base.method, {}, "base")
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys([*axes, *(axis for axis in AXES if values.get(axis))]):
        if name not in AXES:
            known = f"(axes: {', '.join(AXES)}; any setting: --vary KEY=V1,V2)"
            raise UsageError(f"--axes {name}: no such axis{nearest(name, AXES)} {known}")
        axis = AXES[name]
        if axis.needs_values and not values.get(name):
            raise UsageError(f"--axes {name}: name the values: {axis.flag} A B")
        cells = axis.cells(cfg if name == "variants" else base, values.get(name, ()))
        found[name] = _grow(growing, name, cells)
    for text in vary:
        path, cells = _varied(text)
        found[path] = _grow(growing, path, cells)
    for name, members in found.items():
        if len(members) == 1:
            problem = f"no cell of it differs from the base, whose method is {base.method}"
            if name == "variants":
                problem = "there are no [variants]"
            raise UsageError(f"axis {name}: {problem}; leave it out")
    return Plan(with_values(base, {"variants": growing.cells}), base.method, found)


def _grow(growing: _Growing, axis: str, cells: Cells) -> list[str]:
    """Add the cells of an axis; return the names of its cells, the base first."""
    names = [growing.add(name, changes, axis) for name, changes in cells.items()]
    return list(dict.fromkeys([growing.base.method, *names]))


def _varied(text: str) -> tuple[str, Cells]:
    """Parse a text of --vary: return the setting's path and its cells."""
    path, equals, typed = text.partition("=")
    where = f"--vary {text}"
    path = path.strip()
    values = [value.strip() for value in typed.split(";" if ";" in typed else ",")]
    if not equals or not path or "" in values:
        raise UsageError(
            f"{where}: write --vary section.key=VALUE,VALUE (VALUE;VALUE where a value has commas)"
        )
    setting = lookup(path, where)
    if path in _NOT_A_FACTOR or path == "store.dirs":
        advice = "; use --seeds" if path.startswith("seed") else ""
        raise UsageError(f"{where}: {path} is no factor of a sweep{advice}")
    key = path.rpartition(".")[2]
    cells: Cells = {}
    for value in values:
        cells[f"{key}={_slug(value)}"] = {path: coerce(setting, value, where)}
    return path, cells


# Settings that do not change a run's result, apart from the seed: loading, logging, checkpoints,
# evaluation.
_NOT_A_FACTOR = {
    "data.workers",
    "data.max_bad_share",
    "log_every",
    "log_to",
    "device",
    "seeds",
    "seed",
    "engine.cuda_graphs",
    "engine.dist_timeout",
    *(path for path in settings() if path.startswith(("eval.", "checkpoint."))),
}


def identity(cfg: Config) -> tuple[tuple[str, str], ...]:
    """Return the settings that a run's method uses, without the seed; equal for equal runs."""
    return tuple(
        (path, repr(get(cfg, path)))
        for path in settings()
        if path not in _NOT_A_FACTOR and _used(cfg, path)
    )


def _used(cfg: Config, path: str) -> bool:
    """Return True if the setting at `path` changes the result of a run of this method."""
    method = METHODS[cfg.method]
    weights = {term.weight for name in METHODS for term in METHODS[name].terms}
    section = path.partition(".")[0]
    if section == "lp_clip":
        return method.linear_probe
    if section == "teacher":
        return method.needs_teacher
    if section in ("attack", "discretizer"):
        return method.needs_discretizer
    if section == "store":
        return bool(method.store_kinds)
    if path in weights:
        return any(term.weight == path for term in method.terms)
    if path == "loss.distance":
        return method.takes_distance
    if path == "loss.temperature":
        own = any(term.loss for term in method.terms)
        return own or (method.takes_distance and DISTANCES[cfg.loss.distance].uses_temperature)
    if path == "augment.smoothing":
        return method.linear_probe or any(term.target == Target.LABELS for term in method.terms)
    if path == "loss.filter":
        return method.filters
    if path == "student.bn":
        return method.attacks
    return True


def _multiples(value: float) -> list[float]:
    return [round(value * factor, 12) for factor in (0.5, 1, 2)]


def _number(flag: str, path: str, text: str) -> float:
    value: float = coerce(settings()[path], text, flag)
    return value


def _short_names(names: Sequence[str]) -> dict[str, str]:
    """Return a folder's name for each model: without kind and path if that is unambiguous."""
    short = {name: _short(name) for name in names}
    clashing = {name for name, text in short.items() if list(short.values()).count(text) > 1}
    return {name: _slug(name) if name in clashing else text for name, text in short.items()}


def _short(name: str) -> str:
    names = split_names(name)
    if len(names) > 1:
        return "+".join(map(_short, names))
    kind, colon, rest = name.partition(":")
    # A number says nothing without its kind, as in jpeg:75.
    is_number = rest.replace(".", "", 1).isdecimal()
    text = rest if colon and "/" not in kind and not is_number else name
    text = text.partition("@")[0]
    if Path(text).suffix in (".safetensors", ".ckpt", ".pt", ".pth"):
        text = Path(text).stem
    return _slug(text)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+]+", "-", text).strip("-.") or "none"
