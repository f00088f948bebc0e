"""Decide the speed settings that are "auto", once per run, and record what a run chose and why.

`choose` is a pure function of facts about the device and the student. The engine gets a copy of the
settings in which every switch is a plain boolean, or the name of a backend (`Choices.settled`);
files and checkpoints keep "auto", so a run may continue on another device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from dad_fast.config.fields import get, with_values
from dad_fast.config.schema import Config, PrecisionConfig
from dad_fast.config.setting import Switch

AMP, LAYOUT, COMPILE = "precision.amp", "precision.channels_last", "engine.torchcompile"
# Steps that are worth minutes of compilation: it saves a tenth of a step (docs/performance.md).
LONG_RUN = 5000


class Choice(NamedTuple):
    """One decision, for the log and run.json."""

    value: str | bool
    reason: str

    def __str__(self) -> str:
        return f"{_word(self.value)} ({self.reason})"

    def record(self) -> dict[str, str]:
        return {"value": _word(self.value), "reason": self.reason}


class DeviceFacts(NamedTuple):
    """Facts about a device that decide settings."""

    type: str
    bfloat16: bool = False

    @classmethod
    def of(cls, device: torch.device) -> DeviceFacts:
        if device.type != "cuda":
            return cls(device.type)
        major, _ = torch.cuda.get_device_capability(device)
        return cls("cuda", bfloat16=major >= 8)


@dataclass(frozen=True)
class Choices:
    """Meaning of auto for one device and student: path of a switch -> decision."""

    autos: dict[str, Choice]

    def settled(self, cfg: Config) -> Config:
        """Return `cfg` with a boolean or a name in place of every switch."""
        return with_values(cfg, {path: self._of(cfg, path).value for path in self.autos})

    def with_choice(self, path: str, choice: Choice) -> Choices:
        """Return these choices with another meaning of auto for one switch."""
        return Choices(self.autos | {path: choice})

    def record(self, cfg: Config) -> dict[str, Choice]:
        """Return the decision of every switch, by its key."""
        return {path.partition(".")[2]: self._of(cfg, path) for path in self.autos}

    def _of(self, cfg: Config, path: str) -> Choice:
        asked = get(cfg, path)
        if asked == Switch.AUTO:
            return self.autos[path]
        if asked in tuple(Switch):
            asked = bool(Switch(asked))
        return Choice(asked, "asked for")


def choose(
    facts: DeviceFacts, student: nn.Module | None = None, num_steps: int | None = None
) -> Choices:
    """Decide the meaning of auto for a run with this student, or for work without one.

    num_steps: of the run, None if unknown.
    """
    return Choices(
        {
            AMP: _amp(facts),
            LAYOUT: _channels_last(facts, student),
            COMPILE: _compile(facts, num_steps),
        }
    )


def settle(cfg: Config, device: torch.device) -> Config:
    """Return `cfg` with a boolean in place of every switch, for work without a student."""
    return choose(DeviceFacts.of(device)).settled(cfg)


def _amp(facts: DeviceFacts) -> Choice:
    if facts.type != "cuda":
        return Choice(False, f"a {facts.type.upper()} computes in float32")
    if not facts.bfloat16:
        return Choice(False, "this GPU has no bfloat16; --amp with --amp-dtype float16 is faster")
    return Choice(True, "this GPU computes in bfloat16")


def _channels_last(facts: DeviceFacts, student: nn.Module | None) -> Choice:
    """Decide the memory format of the student.

    Without a student, only the teacher asks (`is_convolutional`).
    """
    if facts.type != "cuda":
        return Choice(False, f"gains little on a {facts.type.upper()}")
    if student is None:
        return Choice(True, "convolutional models run in NHWC on a GPU")
    if is_convolutional(student):
        return Choice(True, "the student is convolutional and runs in NHWC on a GPU")
    return Choice(False, "the student is not convolutional")


def is_convolutional(model: nn.Module) -> bool:
    """Return whether `model` gains from NHWC.

    A vision transformer has one convolution, its patch embedding, and gains nothing. A model with
    more is convolutional, or has a convolutional stem.
    """
    return sum(isinstance(module, nn.Conv2d) for module in model.modules()) > 1


def _compile(facts: DeviceFacts, num_steps: int | None) -> Choice:
    """Decide whether to try torch.compile; compiling.py decides by a trial."""
    if facts.type != "cuda":
        return Choice(False, f"compilation takes longer than it saves on a {facts.type.upper()}")
    if num_steps is not None and num_steps < LONG_RUN:
        return Choice(False, f"compilation takes longer than {num_steps:,} steps gain from it")
    return Choice(True, f"in runs of {LONG_RUN:,} steps or more, if a trial at start succeeds")


def stage_dtypes(precision: PrecisionConfig, stages: list[str]) -> dict[str, Choice]:
    """Return the dtype of each of `stages` under settled settings."""
    if not precision.amp:
        return {f"dtype.{stage}": Choice("float32", "amp is off") for stage in stages}
    return {
        f"dtype.{stage}": Choice(getattr(precision, stage), f"precision.{stage}")
        for stage in stages
    }


def cuda_graphs(asked: str, device: torch.device, used: bool) -> Choice:
    """Describe whether the step is captured; `used`: TrainStep holds graphs."""
    if used:
        return Choice(True, "captured after the first steps, unless the log warns")
    if asked == "off":
        return Choice(False, "asked for")
    if device.type != "cuda":
        return Choice(False, f"the run is on {device}")
    return Choice(False, "the optimizer cannot be captured")


def attention(device: torch.device) -> Choice:
    """Describe the kernels that torch may pick for scaled_dot_product_attention."""
    if device.type != "cuda":
        return Choice("torch's for CPUs", "scaled_dot_product_attention")
    backends = torch.backends.cuda
    enabled = {
        "flash": backends.flash_sdp_enabled(),
        "cudnn": backends.cudnn_sdp_enabled(),
        "efficient": backends.mem_efficient_sdp_enabled(),
        "math": backends.math_sdp_enabled(),
    }
    names = ", ".join(name for name, is_on in enabled.items() if is_on)
    return Choice(names, "scaled_dot_product_attention takes the first that fits")


def float32_arithmetic(device: torch.device, tf32: bool) -> Choice:
    """Describe the arithmetic of stages that compute in float32."""
    if device.type != "cuda":
        return Choice("IEEE", f"the run is on {device}")
    if not tf32:
        return Choice("IEEE", "--no-tf32")
    return Choice("TF32", "--tf32; the attack, and the VQGAN encoder in float32, are IEEE")


def convolution_benchmark(device: torch.device) -> Choice:
    """Decide whether cuDNN times its algorithms once per shape and keeps the fastest."""
    if device.type != "cuda":
        return Choice(False, f"the run is on {device}")
    if torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic:
        return Choice(False, "deterministic algorithms are asked for")
    return Choice(True, "shapes are the same in every step")


@contextmanager
def fast_convolutions(device: torch.device) -> Iterator[None]:
    """Let cuDNN choose by timing inside this block, where `convolution_benchmark` allows it."""
    if not convolution_benchmark(device).value:
        yield
        return
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _word(value: str | bool) -> str:
    if isinstance(value, str):
        return value
    return "on" if value else "off"
