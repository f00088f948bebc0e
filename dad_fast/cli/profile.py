"""Flags of `dad-fast profile`: the settings of `dad-fast train`, and what of its steps is looked at."""

from __future__ import annotations

from collections.abc import Sequence

from dad_fast.cli.parser import config_parser, read_config, wants_help
from dad_fast.config import Config
from dad_fast.config.fields import nearest
from dad_fast.config.options import ProfileLaunch
from dad_fast.config.variants import expand
from dad_fast.errors import UsageError
from dad_fast.methods.settings import check

SUMMARY = "look into a few training steps: Nsight, torch's profiler, memory"
KINDS = {
    "nsys": "Nsight Systems: a timeline of host and GPU with the stages named, and their times and gaps",
    "ncu": "Nsight Compute: counters of single kernels (this project's own, or --kernel REGEX)",
    "torch": "torch's profiler: a trace for chrome://tracing or ui.perfetto.dev, times of stages",
    "memory": "what holds memory: on a GPU a snapshot with stacks, on a CPU what each operation allocates",
    "range": "only run the steps, with the range marked: what nsys and ncu start",
}
HELP = """\
usage: dad-fast profile KIND [CONFIG.toml] [--preset NAME] [settings of dad-fast train ...]
                        [--steps N] [--warm-up N] [--kernel REGEX] [--launches N] [-o DIR]

Runs a few training steps, the first ones unwatched, and says where their time or memory went.

examples:
  dad-fast profile torch --preset demo --method dad               # anywhere
  dad-fast profile nsys --preset dad-vitb16 --data-dir DIR --discretizer FILE
  dad-fast profile ncu --preset demo --method dad --kernel 'groupnorm.*' --launches 5

kinds:
{kinds}
flags:
  --steps N         steps that are watched [5; memory and ncu: 1]
  --warm-up N       steps before, unwatched [10]
  --kernel REGEX    ncu: kernels to look at; by default those of this project
  --launches N      ncu: launches to look at [20]; each is replayed dozens of times
  -o, --output DIR  folder of the results [runs/profile/KIND]; older results there are replaced
  --debug           show tracebacks

Where --cuda-graphs is auto, the step runs without graphs here, so that every stage shows;
--cuda-graphs on shows the replays. nsys and ncu were not yet run on a GPU with this command.
"""


def main(arguments: list[str], debug: bool) -> int:
    if wants_help(arguments):
        print(help_text(), end="")
        return 0
    cfg, launch = parse(arguments)
    check(cfg)
    from dad_fast.tools.profile import run as profile

    return profile.run(cfg, launch)


def help_text() -> str:
    return HELP.format(kinds="\n".join(f"  {name:8}{text}" for name, text in KINDS.items()) + "\n")


def parse(arguments: Sequence[str]) -> tuple[Config, ProfileLaunch]:
    """The settings of one run, not checked for completeness, and what to look at. Raises UsageError."""
    parser = config_parser("profile", "kind", "config")
    parser.add_argument("-o", "--output", default="")
    parser.add_number("--steps", default=0)
    parser.add_number("--warm-up", default=10, least=0)
    parser.add_argument("--kernel", default="")
    parser.add_number("--launches", default=20)
    given = vars(parser.parse(arguments))
    kind = given["kind"]
    if kind not in KINDS:
        what = (
            f"unknown kind of profile {kind}{nearest(kind, KINDS)}"
            if kind
            else "name a kind of profile"
        )
        raise UsageError(f"{what} (kinds: {', '.join(KINDS)})")
    cfg = read_config(given, given["config"])
    launch = ProfileLaunch(
        kind=kind,
        output=given["output"] or f"runs/profile/{kind}",
        steps=given["steps"] or (1 if kind in ("memory", "ncu") else 5),
        warm_up=given["warm_up"],
        kernel=given["kernel"],
        launches=given["launches"],
    )
    return only_run(cfg), launch


def only_run(cfg: Config) -> Config:
    """The one run that `cfg` describes; of several seeds the first. UsageError for several variants."""
    runs = {name: one for name, _, one in reversed(expand(cfg))}
    if len(runs) > 1:
        raise UsageError(
            f"profile looks at one run, and these settings describe {', '.join(sorted(runs))}: pick one with --method"
        )
    return next(iter(runs.values()))
