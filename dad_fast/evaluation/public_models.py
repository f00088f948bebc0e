"""Published top-1 of timm's models on ImageNet and its shifted test sets (public_models.json)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from dad_fast.errors import DataError
from dad_fast.evaluation.suites.imagenet import published

LIST = Path(__file__).with_suffix(".json")
NAME = "timm"
# Models that `better_lines` shows.
SHOWN = 20


@dataclass(frozen=True)
class PublicModel:
    """A row of the table. top1: in percent, by suite; without the suites that lack the model."""

    name: str
    million_parameters: float
    img_size: int
    top1: Mapping[str, float]

    def mean(self, suites: Sequence[str]) -> float:
        return sum(self.top1[suite] for suite in suites) / len(suites)


class Table(NamedTuple):
    """about: source, version and licence, in words."""

    about: str
    suites: tuple[str, ...]
    models: tuple[PublicModel, ...]


@cache
def table() -> Table:
    """Return the committed table."""
    content: dict[str, Any] = json.loads(LIST.read_text(encoding="utf-8"))
    suites = content["columns"][3:]
    rows = tuple(
        PublicModel(
            name,
            millions,
            side,
            {suite: value for suite, value in zip(suites, top1, strict=True) if value is not None},
        )
        for name, millions, side, *top1 in content["rows"]
    )
    about = (
        f"{content['version']}, {content['source']} at {content['commit'][:10]}, "
        f"{content['licence']}"
    )
    return Table(about, tuple(suites), rows)


def as_baselines() -> list[dict[str, float]]:
    """Return the rows as baselines of effective robustness: top-1 by suite."""
    return [dict(model.top1) for model in table().models]


def better_lines(run: Run) -> list[str]:
    """Format the public models that beat a run, the best first."""
    suites, better = list(run.top1), better_models(run)
    lines = [
        f"public models of at most {run.million_parameters:.1f} M parameters that beat {run.name} on "
        f"{'all of ' if len(suites) > 1 else ''}{', '.join(suites)}: {len(better):,}",
        f"{'top-1 %':<52} {'M par.':>6} {'px':>4} " + " ".join(f"{one:>15}" for one in suites),
    ]
    ours = " ".join(f"{run.top1[suite]:>15.1f}" for suite in suites)
    lines.append(f"{run.name[-52:]:<52} {run.million_parameters:>6.1f} {'':>4} {ours}")
    for model in better[:SHOWN]:
        values = " ".join(f"{model.top1[suite]:>15.1f}" for suite in suites)
        row = f"{model.name:<52} {model.million_parameters:>6.1f} {model.img_size:>4} {values}"
        lines.append(row)
    if len(better) > SHOWN:
        lines.append(f"and {len(better) - SHOWN:,} more, with lower means")
    lines += [f"not compared: {suite} ({why})" for suite, why in run.left_out.items()]
    lines.append(f"Source: {table().about}. Its models were evaluated with timm's preprocessing.")
    return lines


@dataclass(frozen=True)
class Run:
    """Results of a model: parameters, and top-1 by suite of the table, in percent.

    left_out: suites of the table that are not comparable, with the reason.
    """

    name: str
    million_parameters: float
    top1: Mapping[str, float]
    left_out: Mapping[str, str]


def read_run(path: str | Path) -> Run:
    """Read RUN/results.json, or a JSON of `dad-fast eval`.

    Raises DataError for other files, and for results without parameters or a suite of the table.
    """
    file = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    where = f"--like {path}"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        record = found if "suites" in found else found["checkpoint"]
        parameters, suites = record["num_parameters"], dict(record["suites"])
        shared = [suite for suite in table().suites if suite in suites]
        checked = {suite: _problem(suite, suites[suite]) for suite in shared}
        top1 = {suite: float(suites[suite]["top1"]) for suite, why in checked.items() if not why}
        millions = float(parameters) / 1e6
    except OSError as error:
        raise DataError(
            f"{where}: cannot read {file} ({error.strerror}); name a finished run's folder, or a "
            "JSON of dad-fast eval RUN --json"
        ) from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise DataError(
            f"{where}: {file} holds no results with a number of parameters; name a finished run's "
            "folder, or a JSON of dad-fast eval RUN --json"
        ) from None
    left_out = {suite: why for suite, why in checked.items() if why}
    if not top1:
        have = "; ".join(f"{suite}: {why}" for suite, why in left_out.items())
        have = have or f"it has {', '.join(suites) or 'none'}"
        wanted = " ".join(f"{suite}=DIR" for suite in table().suites)
        raise DataError(
            f"{where}: no results to compare with public models ({have}); evaluate it first: "
            f"dad-fast eval RUN --suite {wanted} --json FILE, then --like FILE"
        )
    return Run(str(path), millions, top1, left_out)


def _problem(suite: str, result: Mapping[str, Any]) -> str:
    """Return why a result does not compare with published ones; "" if it does."""
    images, expected = int(result["num_images"]), published()["sizes"][suite]["images"]
    if images + int(result.get("skipped") or 0) != expected:
        return f"{images:,} of {expected:,} images"
    per_class = result.get("per_class")
    if per_class is not None and len(per_class) != 1000:
        return f"a model of {len(per_class):,} classes"
    return ""


def better_models(run: Run) -> list[PublicModel]:
    """Return public models of at most the run's parameters that beat it on all of its suites.

    The best by mean top-1 come first; of a model at several image sizes its best row.
    """
    suites = list(run.top1)
    fitting = [
        model
        for model in table().models
        # The table has two decimals.
        if model.million_parameters <= run.million_parameters + 0.005
        and all(model.top1.get(suite, -1.0) > run.top1[suite] for suite in suites)
    ]
    found: dict[str, PublicModel] = {}
    for model in sorted(fitting, key=lambda model: model.mean(suites), reverse=True):
        found.setdefault(model.name, model)
    return list(found.values())
