"""`df.Run`: the folder of a finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dad_fast.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import nn


class Run:
    """A run of `df.train` or `dad-fast train`, or a comparison of several, by its folder.

    `df.Run("runs/mine")` opens an earlier one. Everything is read from the folder when asked for.

    Args:
        folder: the run's folder.
        student: the `nn.Module` that was trained, if it is the user's own class (see `df.train`).

    Raises:
        DataError: the folder does not exist.
    """

    def __init__(self, folder: str | Path, *, student: nn.Module | None = None) -> None:
        self.folder = Path(folder)
        self.student = student
        if not self.folder.is_dir():
            raise DataError(f"{folder}: no such folder; name the folder of a run")

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @property
    def runs(self) -> list[Run]:
        """The runs of a comparison, one for each variant, student and seed; of one run, itself.

        Those of a finished comparison are in the order of `results["runs"]`.
        """
        inside = sorted(path.parent for path in self.folder.glob("*/seed-*/results.json"))
        if not inside:
            return [self]
        finished = (self.folder / "results.json").is_file()
        records = self.results.get("runs", []) if finished else []
        order = [(record["variant"], f"seed-{record['seed']}") for record in records]
        names = [(folder.parent.name, folder.name) for folder in inside]
        known = [names.index(name) for name in order if name in names]
        numbers = dict.fromkeys([*known, *range(len(inside))])
        return [Run(inside[number], student=self.student) for number in numbers]

    def find(self, name: str) -> Run:
        """Return a run of a comparison by its folder: `resnet18`, or `resnet18/seed-1`.

        Args:
            name: a student's name or label, a variant or a method; with `/seed-S` if there are
                several seeds.

        Raises:
            UsageError: no such run, or several seeds of that name.
        """
        runs = {f"{one.folder.parent.name}/{one.folder.name}": one for one in self.runs}
        found = [key for key in runs if name in (key, key.partition("/")[0])]
        if len(found) == 1:
            return runs[found[0]]
        if found:
            raise UsageError(f"{self.folder}: {name} has several seeds; take one of {found}")
        raise UsageError(f"{self.folder}: no run {name!r}; there are {list(runs)}")

    @property
    def results(self) -> dict[str, Any]:
        """Content of results.json.

        Of one run: `results["suites"][NAME]` has `top1`, `top5` and `ece` in %, `nll` in nats, and
        more; `teacher` has the same of the teacher, `seconds` the time of training. Of a
        comparison: `results["runs"]` is a list of these.

        Raises:
            DataError: the run is not finished.
        """
        path = self.folder / "results.json"
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}: not the results of a finished run ({error}); train with resume='auto'"
            ) from None
        return record

    @property
    def model(self) -> nn.Module:
        """The trained student on the CPU, in eval mode, loaded anew by each access.

        float32 pixels [B, 3, H, W] in [0, 1] -> logits float32 [B, C]; the weights are those of the
        evaluation (EMA where it is on).

        Raises:
            UsageError: the folder holds a comparison; take one of its runs with `find`.
            DataError: no weights, damaged ones, or those of a user's own class that was not passed.
        """
        runs = self.runs
        if runs[0] is not self:
            first = runs[0].folder
            raise UsageError(
                f"{self.folder}: holds {len(runs)} runs; take the model of one of them, "
                f"find({f'{first.parent.name}/{first.name}'!r})"
            )
        from dad_fast.api.models import load_student

        return load_student(self.folder, module=self.student)

    def report(self) -> Path:
        """Write report.html, one self-contained page, anew and return its path.

        Raises:
            DataError: the run is not finished.
        """
        from dad_fast.report.page import write_report

        return write_report(self.folder)
