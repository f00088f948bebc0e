"""`dad-fast train`: options and help. Every setting that has a flag, and how the run is started."""

from __future__ import annotations

import shlex
import sys
import textwrap
from pathlib import Path
from typing import Any

from dad_fast.cli.parser import (
    CONFIGS,
    Parser,
    config_parser,
    read_config,
    typed_options,
    typed_paths,
)
from dad_fast.cli.screen import (
    WIDTH,
    fill,
    option_lines,
    setting_entry,
    two_columns,
    wants_help,
)
from dad_fast.config import Config, Launch, to_toml
from dad_fast.config.fields import sections, settings
from dad_fast.config.options import ConfigOptions
from dad_fast.config.resolve import preset_names
from dad_fast.config.variants import RESUME_SAFE
from dad_fast.errors import DataError, UsageError
from dad_fast.methods.registry import METHODS
from dad_fast.methods.settings import check

SUMMARY = f"train a student ({', '.join(METHODS.own_names())})"

HELP = """\
usage: dad-fast train [CONFIG.toml ...] [--preset NAME] [flags] [--set KEY=VALUE ...] [-o OUT]

examples:
  dad-fast train --preset demo                                             # on embedded data
  dad-fast train --preset demo --method dad --max-steps 20 -o runs/try     # a short trial
  dad-fast train --preset dad-vitb16 --data-dir DIR --discretizer vqgan.ckpt \\
      --teacher open_clip:ViT-L-14-quickgelu@clip.safetensors -o runs/dad     # ImageNet

settings:
{settings}

{launch}
"""

HELP_ALL = """\
dad-fast train: every setting, its flag, meaning and [default]

methods
{methods}

{settings}

{launch}
"""

LAUNCH = """\
the run:
{config}
{flags}

presets: {presets}
Later wins: defaults < presets < CONFIG.tomls < --set < flags.   Every flag and key: --help-all
"""


def main(arguments: list[str], debug: bool) -> int:
    if wants_help(arguments):
        print(help_text(every="--help-all" in arguments))
        return 0
    given = vars(make_parser().parse(arguments))
    files = list(map(Path, given[CONFIGS]))
    preset = "+".join(given["preset"])
    name = preset or (files[-1].stem if files else given.get("method", "dad"))
    resumed = _resumed_run(given["resume"])
    output = given["output"] or (str(resumed) if resumed else f"runs/{name}")
    paths = typed_paths(given)
    if resumed:
        files = files or ([] if preset else [resumed / "config.toml"])
        if resumed.resolve() == Path(output).resolve():
            given["resume"] = "auto"
    elif _only_resumes(given, paths):
        own_settings = Path(output) / "config.toml"
        files = [own_settings] if own_settings.exists() else []
    cfg = read_config(given, files)
    if given["print_config"]:
        _print_config(cfg)
        return 0
    if given["dry_run"]:
        from dad_fast.tools.dry_run.assumptions import with_assumptions

        cfg = with_assumptions(cfg)
    check(cfg)
    launch = typed_options(
        Launch,
        given,
        output=output,
        debug=debug,
        preset=preset,
        arguments=(*arguments, "--debug") if debug else tuple(arguments),
        command=shlex.join(("dad-fast", "train", *arguments)),
        both_batch_sizes={"data.batch_size", "data.global_batch_size"} <= paths,
    )
    if launch.resume and launch.overwrite:
        raise UsageError("--resume continues a run and --overwrite replaces it: leave one out")
    if launch.dry_run:
        from dad_fast.tools.dry_run import run as dry_run

        return dry_run.run(cfg, launch)
    from dad_fast.sweep import train

    return train.run(cfg, launch)


def _print_config(cfg: Config) -> None:
    """Print the settings as TOML with the meaning of auto on this machine, and on stderr what a run
    would still need.
    """
    from dad_fast.tools.auto import comments

    print(to_toml(cfg) + "".join(f"{line}\n" for line in comments(cfg)), end="", flush=True)
    try:
        check(cfg)
    except UsageError as error:
        print(f"dad-fast: a run would stop: {error}", file=sys.stderr)


def _only_resumes(given: dict[str, Any], paths: set[str]) -> bool:
    """Tell whether the command line resumes a run without settings that change its result."""
    names_settings = given[CONFIGS] or given["preset"]
    return given["resume"] == "auto" and not names_settings and paths <= RESUME_SAFE


def _resumed_run(resume: str) -> Path | None:
    """Return the run's folder that --resume names; None for auto and for a checkpoint."""
    if resume in ("", "auto"):
        return None
    folder = Path(resume)
    if not folder.exists():
        raise DataError(
            f"--resume {resume}: no such file or folder; name a run's folder RUN or "
            "RUN/checkpoints/step-N, or write --resume auto"
        )
    if (folder / "plot.svg").exists():
        raise UsageError(
            f"--resume {resume}: holds a sweep; continue with its dad-fast ablate command and "
            "--resume auto"
        )
    return folder if (folder / "config.toml").exists() else None


def make_parser() -> Parser:
    return config_parser("train", Launch, CONFIGS, several=["student.name"])


def help_text(every: bool) -> str:
    """Return the screen of `dad-fast train -h`, or with `every` all flags and keys by section."""
    presets = textwrap.fill(
        ", ".join(preset_names()), WIDTH - 9, subsequent_indent=" " * 9, break_on_hyphens=False
    )
    file = "settings; repeatable; others come from what it `extends`, presets and defaults"
    launch = fill(
        LAUNCH,
        config=two_columns("CONFIG.toml", file),
        flags="\n".join((option_lines(ConfigOptions, debug=False), option_lines(Launch))),
        presets=presets,
    )
    if not every:
        main_settings = "\n".join(setting_entry(s) for s in settings().values() if s.main)
        return fill(HELP, settings=main_settings, launch=launch)
    blocks = []
    for section in ("", *sections()):
        title = f"[{section}]" if section else "general"
        entries = [
            setting_entry(setting, key=True)
            for path, setting in settings().items()
            if path.rpartition(".")[0] == section
        ]
        blocks.append("\n".join([title, *entries]))
    methods = "\n".join(two_columns(name, METHODS[name].summary) for name in METHODS)
    return fill(HELP_ALL, methods=methods, settings="\n\n".join(blocks), launch=launch)
