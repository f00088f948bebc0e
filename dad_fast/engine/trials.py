"""Trial passes before a run: they turn an unsupported size or student into a one-line error before
anything is written.
"""

from __future__ import annotations

import torch

from dad_fast.config.schema import Config
from dad_fast.discretizers.base import Discretizer
from dad_fast.errors import UsageError
from dad_fast.models.student import Student
from dad_fast.models.teacher import Teacher


@torch.no_grad()
def try_one_image(
    device: torch.device,
    student: Student,
    teacher: Teacher | None,
    discretizer: Discretizer | None,
) -> None:
    """Run every model on one image. Raises UsageError for a size that the student cannot take."""
    side = student.image_size
    pixels = torch.zeros(1, 3, side, side, device=device)
    try:
        student.eval()(pixels)
    except RuntimeError as error:
        what = f"cannot take images of {side} px ({str(error).splitlines()[0]})"
        raise UsageError(
            f"--student {student.name} {what}; set --img-size or student.model_kwargs"
        ) from None
    if teacher is not None and teacher.has_head:
        teacher(pixels)
    if discretizer is not None:
        discretizer(pixels)


@torch.no_grad()
def try_training(device: torch.device, student: Student, cfg: Config, num_groups: int) -> None:
    """Run the student in training mode on the images of one call, at most two of each kind.

    Changes neither random numbers nor running statistics. Raises UsageError for a batch norm that
    would see one value, and for outputs that are not logits.
    """
    images = min(cfg.data.batch_size, 2) * (1 if cfg.student.bn == "split" else num_groups)
    side = student.image_size
    pixels = torch.zeros(images, 3, side, side, device=device)
    buffers = [(buffer, buffer.clone()) for buffer in student.buffers()]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            logits = student.train()(pixels)
    except (RuntimeError, ValueError) as error:
        fix = "set --batch-size to 2 or more, or use a student without batch norm"
        if cfg.data.batch_size > 1:
            fix = "see student.model_kwargs"
        raise UsageError(
            f"--student {student.name}: cannot train on {cfg.data.batch_size} images a step "
            f"({str(error).splitlines()[0]}); {fix}"
        ) from None
    finally:
        student.eval()
        for buffer, before in buffers:
            buffer.copy_(before)
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != (images, student.num_classes):
        raise UsageError(
            f"--student {student.name}: its output is {shape}, not logits "
            f"({images}, {student.num_classes}); use a model with a classifier"
        )
