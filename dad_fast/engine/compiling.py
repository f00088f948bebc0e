"""torch.compile of teacher and student, tried before the first step.

The trial calls each model in the forms in which the step calls it, on the run's batch size, and
compares outputs and gradients with eager. A model that cannot be compiled, is wrong, or takes too
long leaves the run in eager, with one warning (`--torchcompile auto`), or ends it (`on`). The step
finds what the trial compiled. Not yet run on a GPU.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from types import FrameType
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from dad_fast.cache import keep_compiled_code_private
from dad_fast.config.schema import Config
from dad_fast.config.setting import Switch
from dad_fast.distributed import process_group as distributed
from dad_fast.engine.choices import Choice
from dad_fast.engine.memory import enough_memory
from dad_fast.engine.self_test import check_that_gpu_answers
from dad_fast.errors import EnvironmentProblem
from dad_fast.loggers.run_log import print_line
from dad_fast.methods.registry import METHODS, Images
from dad_fast.models.float32 import float32_math
from dad_fast.models.probe import Probe
from dad_fast.models.student import Student
from dad_fast.models.teacher import Teacher

log = logging.getLogger("dad_fast.engine")

# Seconds for all models of a run, with --torchcompile auto.
TIME_LIMIT = 600.0
# Backend of --torchcompile on and auto.
INDUCTOR = "inductor"
# Unit roundoff of TF32's products, relative.
TF32_EPS = 2.0**-10
Model = Callable[[Tensor], Tensor]
AnyModel = TypeVar("AnyModel", bound=Model)


class Form(NamedTuple):
    """One form in which the step calls a model.

    compute: returns outputs and gradients of the model, or of its compiled form. eps: the largest
    relative rounding of its arithmetic.
    """

    name: str
    model: Model
    compute: Callable[[Model], list[Tensor]]
    eps: float


def backend_name(torchcompile: str | bool) -> str:
    """Return the backend that settled settings ask for."""
    is_name = isinstance(torchcompile, str) and torchcompile not in tuple(Switch)
    return str(torchcompile) if is_name else INDUCTOR


def compiled(model: AnyModel, backend: str) -> AnyModel:
    """Return the compiled form of a model; it compiles when it is called."""
    keep_compiled_code_private()
    # dynamic=False: sizes are few, and the kernel of a batch must not depend on earlier sizes, or a
    # resume would differ. fallback_random: dropout draws the numbers of eager.
    options = {"fallback_random": True} if backend == INDUCTOR else None
    made: AnyModel = torch.compile(model, backend=backend, dynamic=False, options=options)
    return made


def try_compiling(forms: Sequence[Form], cfg: Config, device: torch.device, wanted: bool) -> Choice:
    """Compile every form and compare it with eager. A collective.

    wanted: compile without a limit of time, and raise EnvironmentProblem if it fails.
    """
    if not forms:
        return Choice(False, "no model runs in a step")
    start = time.monotonic()
    backend = backend_name(cfg.engine.torchcompile)
    why = no_compiler(device) if backend == INDUCTOR else ""
    if not why:
        if distributed.is_main():
            limit = "" if wanted else f", at most {TIME_LIMIT / 60:.0f} minutes"
            print_line(f"compiling {_names(forms)}{limit} (--torchcompile off)")
        with enough_memory(cfg, device):
            why = _first_problem(forms, backend, device, math.inf if wanted else TIME_LIMIT)
    # A failure in one process counts in all.
    why = next(filter(None, distributed.all_gather_json(why)), "")
    seconds = time.monotonic() - start
    if why and wanted:
        asked = "on" if backend == INDUCTOR else backend
        raise EnvironmentProblem(f"--torchcompile {asked}: {why}; use --torchcompile auto")
    if why:
        log.warning("torch.compile is off: %s", why)
        return Choice(False, why)
    if distributed.is_main():
        print_line(f"compiled in {seconds:.1f} s; outputs and gradients are those of eager")
    return Choice(True, f"compiled in {seconds:.1f} s and compared with eager")


def forms_of(
    cfg: Config,
    student: Student,
    teacher: Teacher | None,
    is_stored: bool,
    keeps_features: bool,
) -> list[Form]:
    """Return the forms in which the steps of a run call its models.

    cfg: settled settings. is_stored: images that attack the teacher come from a store.
    keeps_features: a linear probe has the features of all views.
    """
    method = METHODS[cfg.method]
    is_joint = cfg.loss.form == "joint"
    batch_size, tf32 = cfg.data.batch_size, cfg.precision.tf32
    device = next(student.parameters()).device
    layout = torch.channels_last if cfg.precision.channels_last else torch.contiguous_format

    def images(count: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(0)
        side = student.image_size
        drawn = torch.rand(count, 3, side, side, generator=generator, device=device)
        return drawn.contiguous(memory_format=layout)

    def eps(dtype: str, ieee: bool = False) -> float:
        if cfg.precision.amp and dtype != "float32":
            return torch.finfo(getattr(torch, dtype)).eps
        on_tensor_cores = device.type == "cuda" and tf32 and not ieee
        return TF32_EPS if on_tensor_cores else torch.finfo(torch.float32).eps

    of_teacher, of_student = cfg.precision.teacher, cfg.precision.student
    if isinstance(student, Probe):
        if keeps_features:
            return []
        return [
            Form(
                "the teacher's encoder",
                student.features,
                lambda model: _outputs(model, images(batch_size), tf32),
                eps(of_teacher),
            )
        ]

    forms = []
    if teacher is not None:
        forms.append(
            Form(
                "the teacher",
                teacher,
                lambda model: _outputs(model, images(batch_size * (2 if is_joint else 1)), tf32),
                eps(of_teacher),
            )
        )
    if teacher is not None and method.uses(Images.ATTACK_TEACHER) and not is_stored:
        forms.append(
            Form(
                "the teacher under attack",
                teacher,
                lambda model: _attacked(model, images(batch_size)),
                eps(of_teacher, ieee=True),
            )
        )

    def autocast() -> torch.autocast:
        dtype = getattr(torch, of_student)
        return torch.autocast(device.type, dtype, enabled=bool(cfg.precision.amp))

    def in_training(model: Model) -> list[Tensor]:
        copies = 2 if is_joint else len(method.image_kinds)
        count = batch_size * (1 if cfg.student.bn == "split" and not is_joint else copies)
        with float32_math(tf32=tf32):
            return _trained(model, student, images(count), autocast)

    def in_eval(model: Model) -> list[Tensor]:
        student.eval()
        with autocast():
            return _attacked(model, images(batch_size))

    forms.append(Form("the student", student, in_training, eps(of_student)))
    if method.uses(Images.ATTACK_STUDENT):
        forms.append(Form("the student under attack", student, in_eval, eps(of_student, ieee=True)))
    return forms


def no_compiler(device: torch.device) -> str:
    """Return what torch.compile lacks for the device, "" if nothing is missing."""
    if device.type == "cuda":
        if find_spec("triton") is None:
            return "Triton is not installed"
        variable, names, language = "CC", ("gcc", "clang"), "C"
    else:
        variable, names, language = "CXX", ("g++", "clang++"), "C++"
    if os.environ.get(variable) or any(map(shutil.which, names)):
        return ""
    return f"there is no {language} compiler (install {names[0]})"


def _first_problem(
    forms: Iterable[Form], backend: str, device: torch.device, seconds: float
) -> str:
    """Return the first problem of the forms within `seconds`, "" if there is none."""
    try:
        with _time_limit(seconds):
            for form in forms:
                if why := problem(form, backend):
                    if torch.cuda.is_initialized():
                        check_that_gpu_answers(f"compiled code of {form.name}", why, "torchcompile")
                    return why
    except _TooSlow:
        return f"compiling took longer than {seconds:.0f} s"
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return ""


def problem(form: Form, backend: str) -> str:
    """Compare a form compiled with eager; return "" or what is wrong with it. Synchronizes."""
    expected = form.compute(form.model)
    try:
        found = form.compute(compiled(form.model, backend))
        # Half of the digits of the arithmetic agree: roundings add up over the layers.
        tolerance = math.sqrt(form.eps)
        errors = [_error(ours, eager) for ours, eager in zip(found, expected, strict=True)]
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{form.name} cannot be compiled: {type(error).__name__}: {lines[0][:200]}"
    # NaN is within no bound.
    if not all(error <= tolerance for error in errors):
        worst = max(errors, key=lambda error: math.inf if math.isnan(error) else error)
        return f"{form.name} compiled is {worst:.1e} from eager, {tolerance:.1e} allowed"
    return ""


def _error(ours: Tensor, eager: Tensor) -> float:
    """Return the distance of two tensors over the norm of the second."""
    if ours.shape != eager.shape or ours.dtype != eager.dtype:
        raise ValueError(f"it returns {list(ours.shape)} {ours.dtype}")
    apart = torch.linalg.vector_norm(ours - eager, dtype=torch.float64)
    norm = torch.linalg.vector_norm(eager, dtype=torch.float64)
    return 0.0 if apart == 0 else (apart / norm).item()


@torch.no_grad()
def _outputs(model: Model, pixels: Tensor, tf32: bool) -> list[Tensor]:
    with float32_math(tf32=tf32):
        return [model(pixels)]


def _attacked(model: Model, pixels: Tensor) -> list[Tensor]:
    """Return the logits and a gradient of the pixels, in the arithmetic of the attack."""
    pixels.requires_grad_(True)
    with float32_math(tf32=False):
        logits = model(pixels)
        (gradient,) = torch.autograd.grad(logits, pixels, _direction(logits))
    return [logits.detach(), gradient]


def _trained(
    model: Model, student: nn.Module, pixels: Tensor, autocast: Callable[[], torch.autocast]
) -> list[Tensor]:
    """Return the logits and the gradients of the weights as one vector.

    Changes neither random numbers nor running statistics.
    """
    buffers = [(buffer, buffer.clone()) for buffer in student.buffers()]
    weights = [weight for weight in student.parameters() if weight.requires_grad]
    try:
        with torch.random.fork_rng(devices=[pixels.device] if pixels.is_cuda else []):
            torch.manual_seed(0)
            student.train()
            with autocast():
                logits = model(pixels)
            found = torch.autograd.grad(logits, weights, _direction(logits), allow_unused=True)
    finally:
        student.eval()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    gradients = [gradient.flatten() for gradient in found if gradient is not None]
    return [logits.detach(), torch.cat(gradients)]


def _direction(logits: Tensor) -> Tensor:
    """Return a fixed gradient of the logits. Unlike a loss's, it is not small for a sure model."""
    generator = torch.Generator(logits.device).manual_seed(1)
    drawn = torch.randn(logits.shape, generator=generator, device=logits.device)
    return drawn.to(logits.dtype)


def _names(forms: Sequence[Form]) -> str:
    return " and ".join(dict.fromkeys(form.name.removesuffix(" under attack") for form in forms))


class _TooSlow(BaseException):
    """Not an Exception, so that no handler inside the compiler takes it for a failure."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise _TooSlow in the block after `seconds`. No limit outside of the main thread."""
    in_main = threading.current_thread() is threading.main_thread()
    if math.isinf(seconds) or not in_main:
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise _TooSlow

    start = time.monotonic()
    handler = signal.signal(signal.SIGALRM, ring)
    other, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if other:
            # A timer that was running already.
            left = max(other - (time.monotonic() - start), 0.001)
            signal.setitimer(signal.ITIMER_REAL, left, interval)
