"""`df.load_student`, `df.load_teacher` and `df.load_discretizer`: models by name or path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from dad_fast.config.schema import LossConfig, PrecisionConfig, TeacherConfig
from dad_fast.data.classes import ClassMap
from dad_fast.discretizers import registry as discretizers
from dad_fast.discretizers.base import Discretizer
from dad_fast.models import load_student as students
from dad_fast.models import load_teacher as teachers
from dad_fast.models.own_modules import module_name, passed
from dad_fast.models.student import Student
from dad_fast.models.teacher import Teacher


def load_student(
    path: str | Path, *, module: nn.Module | None = None, device: str | torch.device = "cpu"
) -> Student:
    """Load a trained student in eval mode.

    Pixels float32 [B, 3, H, W] in [0, 1] -> logits float32 [B, C]; it normalises them itself and
    divides the logits by the temperature of a calibrated model. A linear probe comes with its
    encoder. Nothing that a file names is downloaded or executed.

    Args:
        path: a run's folder, a checkpoint's folder, an export, or a model.safetensors.
        module: for a student of a user's own class: a module of that class, which is copied.
        device: where to load it.

    Returns:
        The student. `num_classes`, `image_size` (side in pixels) and `name` describe it.

    Raises:
        DataError: no such file, a damaged one, or a user's own class without `module`.
    """
    with passed(student=module):
        student, _ = students.load_student(path)
    return student.to(device).eval()


def load_teacher(
    name: str | nn.Module,
    classes: ClassMap | Sequence[str],
    *,
    head: str | Path = "",
    templates: str | Sequence[str] = "auto",
    img_size: int = 0,
    weights: Sequence[float] = (),
    average: str = "probabilities",
    temperature: float = LossConfig.temperature,
    amp: bool = False,
    device: str | torch.device = "cpu",
) -> Teacher:
    """Load a frozen teacher with one output for each class.

    Pixels float32 [B, 3, H, W] in [0, 1] of any size -> logits float32 [B, C]. Differentiable in
    the pixels. A CLIP is zero-shot (arXiv 2103.00020): logits are 100 x cosine similarities, or
    times its own logit_scale.

    Args:
        name: `embedded:digits`, `open_clip:ARCH/TAG`, `open_clip:ARCH@FILE`, `timm:NAME[@FILE]`,
            `timm:hf-hub:REPO`, `hf-hub:REPO`, a run's folder, a file, several joined by `+` (an
            ensemble), or an `nn.Module` of your own (pixels -> logits [B, C]; see `df.train`).
        classes: `open_source(...).classes`, or the classes' names in the order of the labels.
        head: safetensors with a linear head for the encoder.
        templates: prompts of a zero-shot head: `auto`, `imagenet`, `simple`, a text file, or a list
            such as `["a photo of a {}"]`.
        img_size: input side in pixels, of `timm:` teachers and of your own.
        weights: of an ensemble's members; empty = equal.
        average: of an ensemble: `probabilities` (softmax at `temperature`) or `logits`.
        temperature: see `average`.
        amp: bfloat16 autocast.
        device: where to load it.

    Returns:
        The teacher. `features(pixels)` returns the input of its head, float32 [B, F].

    Raises:
        UsageError: no such teacher, or arguments that do not belong together.
        DataError: a file that cannot be used, or a model of other classes.
        EnvironmentProblem: weights that cannot be downloaded here.
    """
    if not isinstance(classes, ClassMap):
        classes = ClassMap(tuple((number, text, text) for number, text in enumerate(classes)))
    cfg = TeacherConfig(
        name=module_name(name) if isinstance(name, nn.Module) else str(name),
        head=str(head),
        templates=templates if isinstance(templates, str) else tuple(templates),
        img_size=img_size,
        weights=tuple(weights),
        average=average,  # type: ignore[arg-type]
    )
    with passed(teacher=name):
        return teachers.load_teacher(
            cfg, classes, PrecisionConfig(amp=amp), torch.device(device), temperature=temperature
        )


def load_discretizer(
    name: str | Path, *, amp: bool = False, device: str | torch.device = "cpu"
) -> Discretizer:
    """Load a frozen discretizer Q: pixels -> pixels that its codebook or codec can represent.

    Called with float32 pixels [B, 3, H, W] in [0, 1] it returns `images`, of the same form, and
    `codes`, int64 [B, h, w], or None without a codebook.

    Args:
        name: a VQGAN's file (.ckpt, .pt, .safetensors; taming-transformers, arXiv 2012.09841), a
            folder of a diffusers VQModel, `embedded:digits`, `jpeg:75`, or another of
            docs/discretizers.md.
        amp: autocast for a VQGAN's encoder and decoder; the codebook search stays exact.
        device: where to load it.

    Raises:
        UsageError: no such discretizer. DataError: a file that cannot be used.
    """
    precision = PrecisionConfig(amp=amp)
    return discretizers.load_discretizer(str(name), precision, torch.device(device))
