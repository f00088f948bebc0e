"""`dad-fast profile`: options and help.

The settings of `dad-fast train`, and which of its steps are profiled.
"""

from __future__ import annotations

from collections.abc import Sequence

from dad_fast.cli.parser import CONFIGS, config_parser, read_config, typed_options
from dad_fast.cli.screen import fill, option_lines, wants_help
from dad_fast.config import Config
from dad_fast.config.fields import nearest
from dad_fast.config.options import ProfileLaunch
from dad_fast.config.variants import expand
from dad_fast.errors import UsageError
from dad_fast.methods.settings import check

SUMMARY = "profile a few training steps: Nsight, torch's profiler, memory"
KINDS = {
    "nsys": "Nsight Systems: a timeline of host and GPU with named stages, their times and gaps",
    "ncu": "Nsight Compute: counters of single kernels (this project's own, or --kernel REGEX)",
    "torch": "torch's profiler: a trace for chrome://tracing or ui.perfetto.dev, times of stages",
    "memory": "memory by owner: on a GPU a snapshot with stacks, on a CPU allocations by operation",
    "range": "only run the steps, with the range marked: started by nsys and ncu",
}
HELP = """\
usage: dad-fast profile KIND [CONFIG.toml ...] [--preset NAME] [settings of dad-fast train ...]
                        [--steps N] [--warm-up N] [--kernel REGEX] [--launches N] [-o DIR]

Run a few training steps, the first ones without the profiler, and report where time or memory goes.

examples:
  dad-fast profile torch --preset demo --method dad               # anywhere
  dad-fast profile nsys --preset dad-vitb16 --data-dir DIR --discretizer FILE
  dad-fast profile ncu --preset demo --method dad --kernel 'groupnorm.*' --launches 5

kinds:
{kinds}

flags:
{flags}

With --cuda-graphs auto, the step runs without graphs here, so that every stage is visible;
--cuda-graphs on shows the replays. nsys and ncu were not yet run on a GPU with this command.
"""


def main(arguments: list[str], debug: bool) -> int:
    if wants_help(arguments):
        kinds = "\n".join(f"  {name:8}{text}" for name, text in KINDS.items())
        print(fill(HELP, kinds=kinds, flags=option_lines(ProfileLaunch)))
        return 0
    cfg, launch = parse(arguments)
    check(cfg)
    from dad_fast.engine.sizes import with_numbers
    from dad_fast.tools.profile import run as profile

    return profile.run(with_numbers(cfg), launch)


def parse(arguments: Sequence[str]) -> tuple[Config, ProfileLaunch]:
    """Return the settings of one run, not checked for completeness, and the options.

    Raises UsageError.
    """
    given = vars(config_parser("profile", ProfileLaunch, CONFIGS).parse(arguments))
    kind = given["kind"]
    if kind not in KINDS:
        unknown = f"unknown kind of profile {kind}{nearest(kind, KINDS)}"
        problem = unknown if kind else "name a kind of profile"
        raise UsageError(f"{problem} (kinds: {', '.join(KINDS)})")
    cfg = read_config(given, given[CONFIGS], one_student="profile")
    launch = typed_options(
        ProfileLaunch,
        given,
        output=given["output"] or f"runs/profile/{kind}",
        steps=given["steps"] or (1 if kind in ("memory", "ncu") else 5),
    )
    return only_run(cfg), launch


def only_run(cfg: Config) -> Config:
    """Return the run that `cfg` describes; of several seeds the first.

    Raises UsageError for several variants.
    """
    runs = {name: one for name, _, one in reversed(expand(cfg))}
    if len(runs) > 1:
        names = ", ".join(sorted(runs))
        raise UsageError(
            f"profile takes one run, and these settings describe {names}: pick one with --method"
        )
    return next(iter(runs.values()))
