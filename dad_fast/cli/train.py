"""Flags of `dad-fast train`: every setting that has one, and how the run is started."""

from __future__ import annotations

import textwrap
from pathlib import Path

from dad_fast.cli.parser import (
    WIDTH,
    Parser,
    config_parser,
    entry,
    read_config,
    two_columns,
    typed_settings,
    wants_help,
)
from dad_fast.config import Launch, to_toml
from dad_fast.config.fields import sections, settings
from dad_fast.config.resolve import preset_names
from dad_fast.config.variants import RESUME_SAFE
from dad_fast.errors import UsageError
from dad_fast.methods.settings import check

SUMMARY = "train a student by ce, kd, aug-only, dat, dad or dat+dad, or a linear probe by lp-clip"

INTRO = """\
usage: dad-fast train [CONFIG.toml] [--preset NAME] [flags] [--set section.key=value ...] [-o OUT]

examples:
  dad-fast train --preset demo                                             # on embedded data
  dad-fast train --preset demo --method dad --max-steps 20 -o runs/try     # a first look
  dad-fast train --preset dad-vitb16 --data-dir DIR --discretizer vqgan.ckpt \\
      --teacher open_clip:ViT-L-14@vitl14.safetensors -o runs/dad                   # ImageNet
"""

OUTRO = """\
presets: {presets}
Later wins: defaults < preset < CONFIG.toml < --set < flags.   Every flag and key: --help-all
"""

LAUNCH_FLAGS = {
    "CONFIG.toml": "settings; keys that it leaves out come from the preset or the defaults",
    "--preset NAME": "a named set of settings",
    "--set KEY=VALUE": "any setting by its key, such as --set optim.opt_kwargs.eps=1e-6; repeatable",
    "--nproc N|auto": "processes on this machine, auto = one a GPU [1]; several machines: docs/distributed.md",
    "--jobs N|auto": "of several variants or seeds, runs side by side [one a GPU; on a CPU two a core]",
    "-o, --output DIR": "the run's folder; by default runs/ and the name of the preset, CONFIG or method",
    "--resume auto|PATH": "continue the run in --output, or from a checkpoint; auto starts when there is none",
    "--overwrite": "replace an existing run",
    "--allow-config-change": "resume although settings that change the result differ",
    "--print-config": "print the resolved settings as TOML and exit",
    "--debug": "show tracebacks",
}


def main(arguments: list[str], debug: bool) -> int:
    if wants_help(arguments):
        print(help_text(every="--help-all" in arguments))
        return 0
    given = vars(make_parser().parse(arguments))
    file = Path(given["config"]) if given["config"] else None
    output = (
        given["output"]
        or f"runs/{given['preset'] or (file.stem if file else '') or given.get('method', 'dad')}"
    )
    paths = {*typed_settings(given), *(item.partition("=")[0].strip() for item in given["sets"])}
    if (
        given["resume"] == "auto"
        and not (file or given["preset"])
        and paths <= RESUME_SAFE
        and (Path(output) / "config.toml").exists()
    ):
        file = (
            Path(output) / "config.toml"
        )  # nothing said what to train: continue with the run's own settings
    cfg = read_config(given, file)
    if given["print_config"]:
        print(to_toml(cfg), end="", flush=True)
    check(cfg)  # after printing: what is still missing is said below the settings
    if given["print_config"]:
        return 0
    launch = Launch(
        output=output,
        resume=given["resume"],
        overwrite=given["overwrite"],
        allow_config_change=given["allow_config_change"],
        debug=debug,
        preset=given["preset"],
        nproc=given["nproc"],
        jobs=given["jobs"],
        arguments=(*arguments, *(["--debug"] if debug else [])),
        both_batch_sizes={"data.batch_size", "data.global_batch_size"} <= paths,
    )
    if launch.resume and launch.overwrite:
        raise UsageError("--resume continues a run and --overwrite replaces it: leave one out")
    from dad_fast.sweep import train

    return train.run(cfg, launch)


def make_parser() -> Parser:
    parser = config_parser("train", "config")
    parser.add_argument("-o", "--output", default="")
    parser.add_argument("--resume", default="")
    parser.add_nproc()
    parser.add_jobs()
    for flag in ("--overwrite", "--allow-config-change", "--print-config"):
        parser.add_argument(flag, action="store_true", default=False)
    return parser


def help_text(every: bool) -> str:
    """The screen of `dad-fast train -h`, or with `every` all flags and keys by section."""
    lines = (
        [INTRO.rstrip(), "", "settings:"]
        if not every
        else ["dad-fast train: every setting, its flag, meaning and [default]", ""]
    )
    if every:
        for section in ("", *sections()):
            lines.append(f"[{section}]" if section else "general")
            lines += [
                entry(s, key=True)
                for path, s in settings().items()
                if path.rpartition(".")[0] == section
            ]
            lines.append("")
    else:
        lines += [entry(s) for s in settings().values() if s.main]
    presets = textwrap.fill(
        ", ".join(preset_names()), WIDTH - 9, subsequent_indent=" " * 9, break_on_hyphens=False
    )
    lines += ["", "the run:"] if not every else ["the run"]
    lines += [two_columns(names, text) for names, text in LAUNCH_FLAGS.items()]
    lines += ["", OUTRO.format(presets=presets).rstrip()]
    return "\n".join(lines)
