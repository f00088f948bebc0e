"""Needs of a run: FLOP and time by stage, memory of a GPU, bytes of data and stores."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from dad_fast.config import Config
from dad_fast.config.fields import with_values
from dad_fast.config.variants import with_batch_sizes
from dad_fast.data.sources.survey import DataFacts, survey
from dad_fast.engine.choices import choose
from dad_fast.engine.schedule import total_steps
from dad_fast.engine.sizes import with_numbers
from dad_fast.errors import UsageError
from dad_fast.methods.registry import METHODS
from dad_fast.methods.stores import online, usable_kinds
from dad_fast.store import Manifest
from dad_fast.store.layout import INDEX, data_dtype
from dad_fast.store.outputs import OutputsForm
from dad_fast.tools.dry_run.assumptions import NO_DATA
from dad_fast.tools.dry_run.rates import Cost, Rates, cost
from dad_fast.tools.dry_run.step import GPU, Step, trace_step
from dad_fast.tools.dry_run.trace import Op

IMAGENET = DataFacts(
    "ImageNet-1k, assumed since there is no --data-dir", 1_281_167, 147_897_477_120, 1000
)
GIB = 2**30
# GiB of a card that CUDA, cuBLAS and cuDNN take; assumed.
CONTEXT = 1.0
# Reserved bytes for each allocated one with expandable segments; assumed.
FRAGMENTED = 1.05
# Ranges of the step (loggers/profiling.py) -> rows of the table. The innermost known one counts, and
# an attack is named by whom it attacks.
STAGES = {
    "encode": "VQGAN encode",
    "lookup": "codebook lookup",
    "decode": "VQGAN decode",
    "teacher": "teacher, logits",
    "encoder": "teacher's encoder",
    "student": "student, forward and backward",
    "backward": "student, forward and backward",
    "update": "optimizer, EMA",
}
ATTACKS = {
    "generate": "attack: teacher, input gradient",
    "learn": "attack: student, input gradient",
}
OTHER = "mixing, losses"
# Compiled by engine.torchcompile
COMPILED = {*ATTACKS.values(), *(STAGES[name] for name in ("teacher", "encoder", "student"))}


@dataclass(frozen=True)
class Stage:
    """Ops of a stage. peak: bytes allocated at most during it."""

    name: str
    ops: tuple[Op, ...]
    peak: int


@dataclass(frozen=True)
class StorePlan:
    """A store to fill first. online: a step that makes what it holds."""

    kind: str
    views: int
    num_bytes: int
    exact: bool
    online: Step


@dataclass(frozen=True)
class Estimate:
    """Needs of one run. cfg: with the batch sizes of a process."""

    cfg: Config
    data: DataFacts
    num_gpus: int
    step: Step
    stores: tuple[StorePlan, ...]

    @property
    def steps_per_epoch(self) -> int:
        return self.data.num_images // self.cfg.data.global_batch_size

    @property
    def total_steps(self) -> int:
        return total_steps(self.cfg, self.steps_per_epoch)

    @property
    def traced_images(self) -> int:
        return self.step.batch_size * self.step.micro_batches

    @property
    def is_compiled(self) -> bool:
        return bool(choose(GPU, None, self.total_steps).settled(self.cfg).engine.torchcompile)

    def stages(self) -> list[Stage]:
        return stages_of(self.step)

    def stage_cost(self, stage: Stage, rates: Rates) -> Cost:
        """Return the cost of a stage in a step of one GPU."""
        compiled = self.is_compiled and stage.name in COMPILED
        found = cost(stage.ops, rates, compiled, self.step.trace)
        if stage.name == STAGES["update"]:
            return found
        return found.times(self.cfg.engine.grad_accum_steps / self.step.micro_batches)

    def step_milliseconds(self, rates: Rates) -> float:
        """Return the time of a step, the sum of gradients over the GPUs included."""
        busy = sum(self.stage_cost(stage, rates).milliseconds for stage in self.stages())
        return busy + rates.all_reduce(self.step.memory["gradients"], self.num_gpus)

    def images_per_second(self, rates: Rates) -> float:
        """Return the clean images per second of all GPUs."""
        return 1e3 * self.cfg.data.global_batch_size / self.step_milliseconds(rates)

    def training_hours(self, rates: Rates) -> float:
        return self.total_steps * self.step_milliseconds(rates) / 3.6e6

    def preparing_hours(self, rates: Rates) -> float:
        """Return the hours of filling stores, and of the passes before a linear probe's first
        step, on all GPUs.
        """
        milliseconds = sum(store.views * _fill(store, rates) for store in self.stores)
        passes = self._passes_of_a_probe()
        if passes and self.step.teacher_pass is not None:
            ops = self.step.teacher_pass.ops
            milliseconds += passes * _per_image(ops, rates, self.step.batch_size)
        return milliseconds * self.data.num_images / self.num_gpus / 3.6e6

    def _passes_of_a_probe(self) -> int:
        if not METHODS[self.cfg.method].linear_probe:
            return 0
        return (self.cfg.lp_clip.labels == "pseudo") + self.step.kept_views

    def memory_needed(self) -> float:
        """Return GiB of a card: the peak, fragmentation and the context."""
        return self.step.trace.peak / GIB * FRAGMENTED + CONTEXT

    def largest_batch(self, rates: Rates) -> int:
        """Return about the largest batch of a GPU: memory grows in proportion to the batch."""
        before = self.step.trace.before
        for_images = (rates.memory - CONTEXT) / FRAGMENTED * GIB - before
        of_one = (self.step.trace.peak - before) / self.step.batch_size
        return max(0, int(for_images / of_one))


@dataclass(frozen=True)
class Shared:
    """Needs of runs that learn from the same batches: one generation, and each run's learning."""

    runs: tuple[Estimate, ...]

    def training_hours(self, rates: Rates) -> float:
        """Return the hours in which all runs are trained."""
        generating = [_generating(run, rates) for run in self.runs]
        learning = sum(
            run.step_milliseconds(rates) - own
            for run, own in zip(self.runs, generating, strict=True)
        )
        return self.runs[0].total_steps * (max(generating) + learning) / 3.6e6

    def gflop(self) -> float:
        """Return the GFLOP per clean image of a step."""
        generating = [_flop(run, generates=True) for run in self.runs]
        learning = sum(_flop(run, generates=False) for run in self.runs)
        return (max(generating) + learning) / 1e9

    def peak(self) -> float:
        """Return bytes of a card: what every student keeps, and the most that one step needs."""
        kept = [
            sum(size for name, size in run.step.memory.items() if name != "frozen models")
            for run in self.runs
        ]
        others = [run.step.trace.peak - own for run, own in zip(self.runs, kept, strict=True)]
        return sum(kept) + max(others)


def _generates(op: Op) -> bool:
    return op.stages[:1] == ("generate",)


def _flop(run: Estimate, generates: bool) -> float:
    flop = sum(op.flop for op in run.step.trace.ops if _generates(op) == generates)
    return flop / run.traced_images


def _generating(run: Estimate, rates: Rates) -> float:
    """Return the milliseconds of a step in which its batch is made."""
    parts = [
        replace(stage, ops=tuple(filter(_generates, stage.ops)))
        for stage in run.stages()
        if any(map(_generates, stage.ops))
    ]
    return sum(run.stage_cost(part, rates).milliseconds for part in parts)


def estimate(cfg: Config, num_gpus: int) -> Estimate:
    """Estimate the needs of one run. Raises the errors of a run that cannot begin."""
    data = IMAGENET if cfg.data.data_dir == NO_DATA else survey(cfg.data)
    cfg = with_numbers(cfg, data.num_images, lambda: num_gpus)
    cfg = with_batch_sizes(cfg, num_gpus)
    if cfg.data.global_batch_size > data.num_images:
        raise UsageError(
            f"--batch-size {cfg.data.batch_size}: {data.name} has only {data.num_images:,} images "
            f"for a step of {cfg.data.global_batch_size:,}"
        )
    kinds = [*_existing(cfg), *_to_make(cfg)]
    is_probe = METHODS[cfg.method].linear_probe
    step = trace_step(cfg, data.num_classes, kinds, several=num_gpus > 1, teacher_alone=is_probe)
    return Estimate(cfg, data, num_gpus, step, tuple(_stores(cfg, data)))


def stages_of(step: Step) -> list[Stage]:
    """Group the operations of a step."""
    groups: dict[str, list[Op]] = {}
    peaks: dict[str, int] = {}
    for op in step.trace.ops:
        groups.setdefault(stage_name(op.stages), []).append(op)
    for stages, peak in step.trace.peaks.items():
        name = stage_name(stages)
        peaks[name] = max(peak, peaks.get(name, 0))
    return [Stage(name, tuple(ops), peaks[name]) for name, ops in groups.items()]


def stage_name(stages: tuple[str, ...]) -> str:
    """Return the row of an operation inside the ranges `stages`."""
    for name in reversed(stages):
        if name in STAGES:
            return STAGES[name]
        if name == "attack":
            return ATTACKS[stages[0]]
    return OTHER


def _existing(cfg: Config) -> list[str]:
    """Return the kinds of the stores that --store names."""
    kinds = []
    for folder in cfg.store.dirs:
        manifest = Manifest.load(Path(folder))
        only_codes = manifest.kind == "adversarial" and manifest.images == "none"
        kinds.append("codes" if only_codes else manifest.kind)
    return kinds


def _to_make(cfg: Config) -> list[str]:
    """Return the kinds of the stores that --stores asks for."""
    only_codes = cfg.store.images == "none"
    names = {"adversarial": "codes" if only_codes else "adversarial", "targets": "targets"}
    return [names[kind] for kind in usable_kinds(cfg)]


def _stores(cfg: Config, data: DataFacts) -> list[StorePlan]:
    """Plan the stores that --stores asks for."""
    kinds = usable_kinds(cfg)
    if not kinds:
        return []
    filler = with_values(online(cfg), {"store.make": (), "engine.grad_accum_steps": 1})
    step = trace_step(filler, data.num_classes, teacher_alone=True)
    outputs = OutputsForm.parse("full", data.num_classes)
    plans = []
    for kind, views in kinds.items():
        adversarial = kind == "adversarial"
        dtype = data_dtype(step.code_bytes * adversarial, outputs, data.num_classes)
        sample = INDEX.itemsize + dtype.itemsize
        if adversarial and cfg.store.images != "none":
            sample += 3 * step.image_size**2
        exact = not adversarial or cfg.store.images in ("none", "raw")
        plans.append(StorePlan(kind, views, sample * views * data.num_images, exact, step))
    return plans


def _fill(store: StorePlan, rates: Rates) -> float:
    """Return the milliseconds of one image and view of a store."""
    step = store.online
    assert step.teacher_pass is not None
    milliseconds = _per_image(step.teacher_pass.ops, rates, step.batch_size)
    if store.kind == "adversarial":
        attack = [op for op in step.trace.ops if op.stages[:2] == ("generate", "attack")]
        milliseconds += _per_image(attack, rates, step.batch_size)
    return milliseconds


def _per_image(ops: Collection[Op], rates: Rates, batch_size: int) -> float:
    return sum(map(rates.milliseconds, ops)) / batch_size
