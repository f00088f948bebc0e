"""The runs of a sweep, their folders, and checks of the output folder. Imports no torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dad_fast.config import Config, expand, from_toml
from dad_fast.config.fields import lookup, with_values
from dad_fast.config.options import Launch
from dad_fast.config.variants import with_batch_sizes
from dad_fast.engine.preflight import check_files
from dad_fast.engine.sizes import with_numbers
from dad_fast.errors import DadFastError, UsageError
from dad_fast.locks import LOCK
from dad_fast.methods.batches import batch_settings
from dad_fast.methods.settings import check_run
from dad_fast.methods.stores import VIEW, SharedStore, is_filled, online, with_stores
from dad_fast.sweep.ablation import Plan, identity

# Files of a run or a sweep; `--overwrite` removes these and nothing else.
WRITTEN = (
    "config.toml",
    "run.json",
    "run-id",
    "metrics.jsonl",
    "tensorboard",
    "wandb",
    "train.log",
    "train.log.1",
    "train-rank*.log*",
    "checkpoints",
    "model.safetensors",
    "results.json",
    "sheet.png",
    "sheet.safetensors",
    "table.md",
    "plot.svg",
    "report.html",
    "stores/adversarial-*",
    "stores/targets-*",
    "logs/worker-*.log",
)
# Present in the output folder before a sweep begins.
UNCOUNTED = {LOCK, "logs"}


@dataclass(frozen=True)
class Run:
    """One variant with one seed, and its folder."""

    variant: str
    seed: int
    cfg: Config
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.variant} seed {self.seed}"

    def record(self, num_processes: int = 1) -> dict[str, Any] | None:
        """Return results.json if the run is finished and evaluated with these settings, else None.

        num_processes: of one run; the batch of a step depends on it.
        """
        results, config = self.folder / "results.json", self.folder / "config.toml"
        try:
            record: dict[str, Any] = json.loads(results.read_text())
            made = from_toml(config.read_text(encoding="utf-8"), str(config))
            # A run writes config.toml before it begins.
            later = results.stat().st_mtime_ns >= config.stat().st_mtime_ns
        except (OSError, ValueError, RecursionError, UsageError):
            return None
        settings = [identity(with_batch_sizes(cfg, num_processes)) for cfg in (made, self.cfg)]
        same = (
            settings[0] == settings[1]
            and made.seed == self.seed
            and made.eval.suites == self.cfg.eval.suites
        )
        whole = isinstance(record, dict) and {"seed", "seconds", "epochs", "suites"} <= set(record)
        return record if whole and later and same else None


@dataclass(frozen=True)
class Sweep:
    """Runs, and the stores that some of them learn from.

    config: the settings with every variant, as config.toml of the output folder holds them.
    ablation: base and axes, where `dad-fast ablate` made the variants.
    """

    config: Config
    output: Path
    runs: tuple[Run, ...]
    stores: tuple[SharedStore, ...]
    ablation: Plan | None = None

    def unfilled(self, overwrite: bool) -> set[str]:
        """Return the folders of stores that are not filled yet; all of them with `--overwrite`."""
        return {store.folder for store in self.stores if overwrite or not is_filled(store.folder)}

    def inputs_inside(self) -> list[str]:
        """Return paths in the output folder that runs read but do not write."""
        made = {store.folder for store in self.stores}
        given = {
            path
            for run in self.runs
            for path in (*run.cfg.store.dirs, run.cfg.student.init_from, run.cfg.student.weights)
            if path and path not in made
        }
        output = self.output.resolve()
        return sorted(path for path in given if Path(path).resolve().is_relative_to(output))


def make_sweep(
    cfg: Config,
    output: Path,
    ablation: Plan | None = None,
    num_processes: Callable[[], int] = lambda: 1,
) -> Sweep:
    """Expand `cfg` into runs: in `output` itself for one, in output/VARIANT/seed-S for several.

    num_processes: of each run. Raises the errors of a run for data that is not there if numbers of
    its settings are "auto", and UsageError for numbers that do not fit together.
    """
    expanded = expand(cfg)
    runs: list[Run] = []
    stores: dict[str, SharedStore] = {}
    for variant, seed, one in expanded:
        folder = output / variant / f"seed-{seed}" if len(expanded) > 1 else output
        one = with_numbers(one, num_processes=num_processes)
        check_run(one)
        resolved, needed = with_stores(one, output / "stores", first_seed=cfg.seed)
        stores |= {store.folder: store for store in needed}
        runs.append(Run(variant, seed, resolved, folder))
    if cfg.students:
        _check_common_stores(runs)
    return Sweep(cfg, output, tuple(runs), tuple(stores.values()), ablation)


def _check_common_stores(runs: Sequence[Run]) -> None:
    """Raise UsageError if students of the same batches need stores of their own."""
    dirs: dict[str, tuple[str, ...]] = {}
    for run in runs:
        batches = batch_settings(with_values(run.cfg, {"store.dirs": ()}), any_size=True)
        if dirs.setdefault(repr(batches), run.cfg.store.dirs) != run.cfg.store.dirs:
            flags = ", ".join(lookup(path, "").flag for path in VIEW)
            raise UsageError(
                f"--stores: stored images have one view, and that of {run.variant} is its own; "
                f"give all students one by {flags}"
            )


def check_paths(sweep: Sweep, launch: Launch) -> None:
    """Raise errors in the output folder, data, weights and stores of the runs, without torch."""
    check_output(sweep, launch)
    several = len(sweep.runs) > 1
    unfilled = sweep.unfilled(launch.overwrite)
    checked: set[str] = set()
    for run in sweep.runs:
        is_done = several and not launch.overwrite and run.record() is not None
        if is_done or run.variant in checked:
            continue
        checked.add(run.variant)
        cfg = run.cfg if unfilled.isdisjoint(run.cfg.store.dirs) else online(run.cfg)
        try:
            check_files(cfg)
        except DadFastError as error:
            if not several:
                raise
            raise type(error)(f"{run.variant}: {error}") from None


def check_output(sweep: Sweep, launch: Launch) -> None:
    """Raise UsageError if the output folder has content that the flags do not allow for."""
    output, several = sweep.output, len(sweep.runs) > 1
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file; name a folder")
    if launch.resume not in ("", "auto") and several:
        raise UsageError("--resume PATH continues one run; use --resume auto for several")
    names = sorted({path.name for path in output.iterdir()} - UNCOUNTED) if output.is_dir() else []
    if not names:
        return
    if launch.overwrite:
        if not _is_run(output) and not _runs_inside(output):
            raise UsageError(
                f"--overwrite: {output} is not empty and holds no run; name another folder"
            )
        inside = sweep.inputs_inside()
        if inside:
            raise UsageError(
                f"--overwrite would remove {inside[0]}, which this run reads; name another --output"
            )
        return
    if sweep.ablation and not (output / "config.toml").exists():
        raise UsageError(
            f"--output {output} is not empty and holds no sweep ({names[0]}); name another folder"
        )
    if not launch.resume:
        replace = "" if sweep.ablation else "replace it with --overwrite, "
        raise UsageError(
            f"--output {output} exists; "
            f"continue with --resume auto, {replace}or name another folder"
        )
    if several and _is_run(output):
        what = f"{output} holds one run, and these are {len(sweep.runs)} in folders of their own"
        raise UsageError(f"--resume: {what}; name another --output")
    if not several and _runs_inside(output):
        what = f"{output} holds several runs, and this is one"
        raise UsageError(f"--resume: {what}; name another --output, or give --seeds as before")


def clear(output: Path) -> None:
    """Remove the files of runs, and nothing else that may be in the folder."""
    for folder in [*_runs_inside(output), output]:
        for path in [path for pattern in WRITTEN for path in folder.glob(pattern)]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        if folder == output:
            continue
        for parent in (folder, folder.parent):
            if not any(parent.iterdir()):
                parent.rmdir()


def _is_run(folder: Path) -> bool:
    return (folder / "run.json").exists()


def _runs_inside(folder: Path) -> list[Path]:
    return [path.parent for path in folder.glob("*/seed-*/run.json")]
