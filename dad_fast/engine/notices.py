"""Messages of a run to its user: the summary before the first step, and advice that is
given once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dad_fast.allocator import describe_allocator
from dad_fast.config.schema import Config, EmaConfig
from dad_fast.config.setting import AUTO
from dad_fast.cores import usable_cores
from dad_fast.data.loaders.loader import TrainLoader
from dad_fast.data.loaders.workers import loader_processes
from dad_fast.data.sources.base import UNLABELLED
from dad_fast.distributed import process_group as distributed
from dad_fast.engine import choices
from dad_fast.engine.build import Components
from dad_fast.engine.choices import Choice
from dad_fast.engine.diagnostics import Effect, warning_of_weakness
from dad_fast.engine.fidelity import Fidelity, warning_of_misfit
from dad_fast.engine.probe.features import FeatureLoader
from dad_fast.engine.step_timer import Window, input_bound
from dad_fast.models.ensemble import Ensemble
from dad_fast.models.teacher import Teacher

# Seconds that a step may wait for the disk before the user is told.
TOLERATED_WAIT = 1.0
# An attack below this many times the encoder's rounding changes codes by chance.
VISIBLE = 3.0
# Share of the initial weights in the EMA at the end of a run that is worth a warning.
TOLERATED_LAG = 0.05


def run_choices(
    cfg: Config, parts: Components, loader: TrainLoader | FeatureLoader, graphs: bool
) -> dict[str, Choice]:
    """Return what the run chose for speed and why, for the log and run.json.

    graphs: the step will be captured in CUDA graphs.
    """
    device = parts.device
    present = {
        "student": parts.probe is None,
        "teacher": parts.teacher is not None,
        "encoder": parts.discretizer is not None,
        "decoder": parts.discretizer is not None,
    }
    stages = [stage for stage, is_present in present.items() if is_present]
    found = choices.stage_dtypes(parts.choices.settled(cfg).precision, stages)
    if isinstance(loader, FeatureLoader):
        loading = Choice(loader.name, "the features of all views are in memory")
    else:
        loading = Choice(loader.name, loader.why)
    return {
        **parts.choices.record(cfg),
        **found,
        "float32": choices.float32_arithmetic(device, cfg.precision.tf32),
        "attention": choices.attention(device),
        "cuda_graphs": choices.cuda_graphs(cfg.engine.cuda_graphs, device, graphs),
        "cudnn.benchmark": choices.convolution_benchmark(device),
        "loader": loading,
        "workers": _workers(cfg),
        "allocator": Choice(*describe_allocator()),
        **{f"kernel {name}": Choice(*chosen) for name, chosen in parts.kernels.record().items()},
    }


def _workers(cfg: Config) -> Choice:
    asked = cfg.data.workers
    reason = "asked for" if asked != AUTO else f"{usable_cores()} cores; --workers"
    return Choice(str(loader_processes(asked)), reason)


def opening(
    label: str, cfg: Config, parts: Components, chosen: Mapping[str, Choice], steps: str
) -> list[str]:
    """Return the run summary, shown before the first step: data, steps, schedule, models and
    their dtypes.

    label: of the run. steps: describes its steps.
    """
    others = distributed.world() - 1
    together = f" and {others} more process{'es' if others > 1 else ''}" if others else ""
    title = f"{label}: method {cfg.method}, seed {cfg.seed}, on {parts.device}{together}"

    def dtype(stage: str) -> str:
        return str(chosen[f"dtype.{stage}"].value)

    student, teacher, discretizer = parts.student, parts.teacher, parts.discretizer
    millions = sum(p.numel() for p in student.parameters()) / 1e6
    data = parts.train.describe()
    if (parts.train.labels == UNLABELLED).all():
        data += "; labels: the teacher's predictions"
    rows = {
        "data": data,
        "val": parts.val.describe(),
        "steps": steps,
        "schedule": _schedule(cfg),
        "student": f"{student.name}, {millions:.2f} M parameters",
    }
    if parts.probe is None:
        rows["student"] += f", {dtype('student')}"
    if teacher is not None:
        rows["teacher"] = f"{teacher.name}, {dtype('teacher')}"
    if discretizer is not None:
        codes = discretizer.describe_codes(student.image_size)
        precision = f", {dtype('encoder')}" if discretizer.code_bits else ""
        rows["codes"] = f"{discretizer.name}{precision}, {codes}"
        rows["attack"] = (
            f"{cfg.attack.norm}, eps {cfg.attack.eps:g}, "
            f"steps {cfg.attack.steps} of {cfg.attack.step_size:g}"
        )
    return [title, *(f"  {name:<8} {text}" for name, text in rows.items())]


def details(cfg: Config, parts: Components, chosen: Mapping[str, Choice]) -> list[str]:
    """Return the lines for train.log alone: provenance, choices, stores."""
    lines = [_batches(cfg), *_scaled(cfg)]
    if distributed.world() > 1 and parts.student.has_batch_stats:
        lines.append(_batch_norm(cfg))
    if parts.teacher is not None:
        lines += _teachers(parts.teacher)
    if parts.probe is not None:
        trained = sum(p.numel() for p in parts.student.parameters() if p.requires_grad)
        lines.append(
            f"training a linear layer of {trained:,} parameters on the teacher's frozen encoder"
        )
    if parts.discretizer is not None:
        name, provenance = parts.discretizer.name, parts.discretizer.provenance
        lines.append(f"discretizer {name} (trained on: {provenance})")
        lines += parts.discretizer.notes()
    for part, found in parts.savings.items():
        texts = [f"not {name} ({why})" if why else name for name, why in found.items()]
        lines.append(f"optimizations of the {part}: {', '.join(texts) or 'none'}")
    lines.append("chosen for speed (docs/gpu.md says how to change it):")
    lines += [f"  {name:<16} {choice}" for name, choice in chosen.items()]
    if parts.kernels.seconds:
        lines.append(f"kernels were compared with torch in {parts.kernels.seconds:.1f} s")
    lines += [
        f"{store.kind} from {store.folder}: {store.num_views} views of {len(store):,} images"
        for store in parts.stored.stores
    ]
    return lines


def _teachers(teacher: Teacher) -> list[str]:
    """Describe a teacher, or an ensemble and its members."""
    lines = []
    if isinstance(teacher, Ensemble):
        shares = [f"{weight:.0%} {one.name}" for weight, one in teacher.weighted_members()]
        lines.append(f"teacher: mean of {teacher.average} of {', '.join(shares)}")
    for one in teacher.members:
        lines.append(f"teacher {one.name} (trained on: {one.provenance}), {one.image_size} px")
        if one.squashed:
            lines.append(
                f"teacher {one.name} was trained on whole images squashed to a square: evaluation "
                "does that, while training shows it the square crops of the batch"
            )
    return lines


def _scaled(cfg: Config) -> list[str]:
    """Describe the learning rate that --lr-base gives."""
    optim, size = cfg.optim, cfg.data.global_batch_size
    if not optim.lr_base:
        return []
    base = f"--lr-base {optim.lr_base:g} at {optim.lr_base_size} images a step"
    return [f"learning rate {optim.lr:g} at {size}: {base}"]


def _schedule(cfg: Config) -> str:
    schedule = cfg.schedule
    text = f"{schedule.epochs} epochs, warm-up {schedule.warmup_epochs:g}, lr {cfg.optim.lr:g}"
    cooldown = schedule.cooldown_epochs
    return f"{text}, cool-down {cooldown:g}" if cooldown else text


def _batches(cfg: Config) -> str:
    world, accumulation = distributed.world(), cfg.engine.grad_accum_steps
    batch, total = cfg.data.batch_size, cfg.data.global_batch_size
    accumulated = f" x {accumulation} accumulated" if accumulation > 1 else ""
    processes = f"{world} process{'es' if world > 1 else ''}"
    return f"batch {batch} x {processes}{accumulated} = {total} images a step"


def _batch_norm(cfg: Config) -> str:
    batch = cfg.data.batch_size
    if cfg.student.sync_bn:
        total = batch * distributed.world()
        return f"batch norm: over the {total} images of all processes (--sync-bn)"
    return (
        f"batch norm: each process over its own {batch} images, "
        "running statistics averaged (--sync-bn: over all images)"
    )


def ema_lag(ema: EmaConfig, steps: int) -> str | None:
    """Return a warning if a run of `steps` is too short for the EMA's constant decay."""
    # With the warm-up the initial weights are gone after some hundred steps.
    if not ema.model_ema or ema.warmup:
        return None
    share = ema.decay**steps
    if share <= TOLERATED_LAG:
        return None
    return (
        f"warning: the EMA, which is evaluated and written, keeps {share:.0%} of the first weights "
        f"at the end of {steps:,} steps with --model-ema-decay {ema.decay:g}; add "
        "--model-ema-warmup, or lower the decay"
    )


class Advice:
    """Advice to the user, each kind once a run."""

    def __init__(self, cfg: Config, parts: Components, loader: str) -> None:
        self._cfg = cfg
        self._parts = parts
        self._loader = loader
        self._windows = 0
        self._advised = False
        self._waited = False
        self._warned = False

    def on_window(self, window: Window, log: Callable[[str], None]) -> None:
        """Log at a log step that the run is input-bound, and the discretizer's warnings."""
        self._windows += 1
        # The first window holds the start of the loader's processes; kept features need no loader's
        # processes.
        if not self._advised and self._windows > 1 and self._loader != "features":
            data = self._cfg.data
            cuda = self._parts.device.type == "cuda"
            workers = loader_processes(data.workers)
            advice = input_bound(window, data.global_batch_size, workers, self._loader, cuda)
            if advice:
                self._advised = True
                log(advice)
        discretizer = self._parts.discretizer
        if discretizer is not None and not self._warned:
            for warning in discretizer.warnings():
                self._warned = True
                log(f"warning: {warning}")

    def on_write(self, waited: float, log: Callable[[str], None]) -> None:
        """Log that training waited because the previous checkpoint was still being written."""
        if waited > TOLERATED_WAIT and not self._waited:
            self._waited = True
            log(
                f"training waited {waited:.1f} s for the previous checkpoint to be written; "
                "raise --checkpoint-every-steps"
            )

    def on_attack(self, signal_to_rounding: float, log: Callable[[str], None]) -> None:
        """Warn if the attack is lost in the encoder's rounding."""
        if signal_to_rounding >= VISIBLE:
            return
        fix = "raise --attack-eps"
        precision = self._cfg.precision
        if precision.amp and precision.encoder != "float32":
            fix += ", or set precision.encoder=float32"
        log(
            f"warning: the attack moves the encoder's output only {signal_to_rounding:.2g} "
            f"times as much as rounding, so many codes change by chance; {fix}"
        )

    def on_effect(self, effect: Effect, log: Callable[[str], None]) -> None:
        """Warn if the attack leaves the discretized images practically as they are."""
        cfg = self._cfg
        if warning := warning_of_weakness(effect, cfg.attack, cfg.discretizer.name):
            log(f"warning: {warning}")

    def on_fidelity(self, found: Fidelity, log: Callable[[str], None]) -> None:
        """Warn if the discretizer does not fit the images."""
        discretizer = self._parts.discretizer
        if discretizer is not None and (warning := warning_of_misfit(found, discretizer)):
            log(f"warning: {warning}")
