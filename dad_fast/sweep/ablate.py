"""`dad-fast ablate`: a base run and its variations, as one sweep."""

from __future__ import annotations

from pathlib import Path

from dad_fast.config import Config, Launch, differences, from_toml
from dad_fast.config.fields import with_values
from dad_fast.errors import UsageError
from dad_fast.files import read_text
from dad_fast.sweep.ablation import Plan
from dad_fast.sweep.runs import check_paths, make_sweep


def run(plan: Plan, launch: Launch, dry_run: bool) -> int:
    """Run the sweep, or print its plan; return the exit code: 0 when every cell is done, else 1."""
    sweep = make_sweep(plan.config, Path(launch.output), plan)
    if not dry_run or launch.resume:
        check_paths(sweep, launch)
        _check_base(plan, sweep.output)
    if dry_run:
        from dad_fast.sweep.cost import print_plan

        return print_plan(sweep, launch)
    from dad_fast.sweep.sweep import run_sweep

    return run_sweep(sweep, launch)


def _check_base(plan: Plan, output: Path) -> None:
    """Raise UsageError if the base changed: cells may be added to a sweep, its base stays."""
    file = output / "config.toml"
    if not file.exists():
        return
    old = from_toml(read_text(file), str(file))
    changed = differences(_base(old, plan.base), _base(plan.config, plan.base))
    if changed:
        raise UsageError(
            f"--resume: not the base of {output}: {'; '.join(changed)}; "
            "restore it, or name another folder"
        )


def _base(cfg: Config, name: str) -> Config:
    return with_values(cfg, {**cfg.variants.get(name, {}), "variants": {}})
