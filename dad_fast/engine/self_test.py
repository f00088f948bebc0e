"""Choose the kernels of a run: each is compared with torch on this GPU before the first step.

A kernel that is wrong, or raises, is replaced by torch with one warning (`--kernels auto`), or ends
the run (`on`). The comparison is on the run's shapes with a small batch (kernels/cases.py): under a
second, besides compiling what the first step would compile anyway.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import torch

from dad_fast.config.schema import AttackConfig, EngineConfig
from dad_fast.discretizers.base import Discretizer
from dad_fast.distributed import process_group as distributed
from dad_fast.errors import EnvironmentProblem
from dad_fast.kernels import cases
from dad_fast.kernels.cases import Case, problem

log = logging.getLogger("dad_fast.engine")


@dataclass(frozen=True)
class Kernels:
    """Kernels of a run.

    reasons: why torch computes in a kernel's place, "" if the kernel does, by name.
    forms: choices by timing: value and reason, by name.
    seconds: of the self-test, compiling included.
    """

    reasons: dict[str, str] = field(default_factory=dict)
    forms: dict[str, tuple[str, str]] = field(default_factory=dict)
    seconds: float = 0.0

    def uses(self, name: str) -> bool:
        """True if the run launches the kernel."""
        return self.reasons.get(name) == ""

    def record(self) -> dict[str, tuple[str, str]]:
        """Return every choice as name -> (value, reason)."""
        found = {
            name: ("torch", why) if why else ("kernel", "passed its self-test")
            for name, why in self.reasons.items()
        }
        return found | self.forms


# For steps that are built without a self-test (benchmarks, tests).
EVERY_KERNEL = Kernels(dict.fromkeys(cases.NAMES, ""))


def choose_kernels(
    engine: EngineConfig,
    device: torch.device,
    own: Iterable[Case],
    discretizer: Discretizer | None,
    side: int,
    batch_size: int,
) -> Kernels:
    """Test the kernels of a run, set the discretizer's, and time its forms. A collective.

    own: cases of the kernels besides the discretizer's. side, batch_size: of the images.
    Raises EnvironmentProblem if `--kernels on` cannot be met.
    """
    start = time.monotonic()
    own = list(own)
    names = [*dict.fromkeys(case.kernel for case in own)]
    parts = discretizer.kernels if discretizer is not None else ()
    if why := unavailable(device):
        if engine.kernels == "on":
            raise EnvironmentProblem(f"--kernels on: {why}; use --kernels auto")
        return Kernels(dict.fromkeys(names, why))
    names += parts
    if engine.kernels == "off":
        reasons = dict.fromkeys(names, "--kernels off")
    else:
        theirs = discretizer.kernel_cases(side) if discretizer is not None else ()
        found = distributed.all_gather_json(faults(chain(own, theirs)))
        # A kernel that fails in one process is off in all.
        reasons = {name: next(filter(None, (one.get(name) for one in found)), "") for name in names}
        for name, why in reasons.items():
            if why and engine.kernels == "on":
                raise EnvironmentProblem(
                    f"--kernels on: {name} failed its self-test: {why}; use --kernels auto"
                )
            if why:
                log.warning("kernel %s failed its self-test, torch takes its place: %s", name, why)
    seconds = time.monotonic() - start
    forms: dict[str, tuple[str, str]] = {}
    if discretizer is not None:
        for name in parts:
            discretizer.use_kernel(name, not reasons[name])
        forms = discretizer.time_forms(side, batch_size)
    return Kernels(reasons, forms, seconds)


def unavailable(device: torch.device) -> str:
    """Return why no kernel can run on the device, "" if they can."""
    return "" if device.type == "cuda" else f"kernels need a CUDA GPU, and the run is on {device}"


def faults(tests: Iterable[Case]) -> dict[str, str]:
    """Return the first problem of each kernel, "" for none, by name.

    Raises EnvironmentProblem if the GPU does not answer after a kernel failed.
    """
    found: dict[str, str] = {}
    for case in tests:
        if found.get(case.kernel):
            continue
        found[case.kernel] = problem(case)
        if found[case.kernel] and torch.cuda.is_initialized():
            check_that_gpu_answers(f"the kernel {case.kernel}", found[case.kernel], "kernels")
    return found


def step_cases(
    device: torch.device,
    side: int,
    num_classes: int,
    attack: AttackConfig,
    dtype: torch.dtype,
    temperature: float,
) -> Iterator[Case]:
    """Yield the cases of the step's own kernels. dtype: of the student's logits."""
    yield cases.pgd_update_case(device, side, attack.norm, attack.eps, attack.step_size)
    yield from cases.distillation_loss_cases(device, num_classes, dtype, temperature)


def check_that_gpu_answers(culprit: str, why: str, flag: str) -> None:
    """Raise EnvironmentProblem if the GPU does not answer after `culprit` failed.

    flag: turns the culprit off.
    """
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        raise EnvironmentProblem(
            f"{culprit} made the GPU fail ({why}); start again with --{flag} off"
        ) from None
