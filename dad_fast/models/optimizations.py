"""Work that a model does and nobody needs, left out: each saving gives the same values and gradients in exact arithmetic.

A model that a saving does not fit is left as it is, and the reason is returned. Nothing here renames a parameter. Folding changes
the values of frozen weights, so it is for teachers only, which are never saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Mlp, PatchEmbed
from timm.layers.activations import QuickGELU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dad_fast.models.class_token import keep_class_token_only
from dad_fast.models.student import Student
from dad_fast.models.teacher import Teacher, _Columns, _PreLogits

QUICK_GELU_SLOPE = 1.702  # QuickGELU(x) = x sigmoid(1.702 x)
# Modules that do nothing with their weights but what autocast runs in 16 bit (a subclass may: weight standardisation).
CAST = (nn.Linear, NonDynamicallyQuantizableLinear, nn.Conv2d, nn.MultiheadAttention)


@dataclass(frozen=True)
class Optimizations:
    """Which savings are on. All off is the plain form, bit for bit."""

    class_token_only: bool = (
        True  # last transformer block for the class token alone, teacher and student
    )
    fold_normalisation: bool = True  # the teacher's mean and std into its patch embedding
    fold_quick_gelu: bool = (
        True  # the teacher's QuickGELU as one SiLU, its slope in the weights around it
    )
    cast_weights: bool = (
        True  # the teacher's matrices once to the dtype that autocast gives them at every call
    )


PLAIN = Optimizations(
    class_token_only=False, fold_normalisation=False, fold_quick_gelu=False, cast_weights=False
)


def optimize_student(student: Student, savings: Optimizations) -> dict[str, str]:
    """Apply to a student what `savings` asks for: saving -> "" where it is on, else why it is not."""
    return (
        {"class_token_only": keep_class_token_only(student.model)}
        if savings.class_token_only
        else {}
    )


def optimize_teacher(teacher: Teacher, savings: Optimizations) -> dict[str, str]:
    """Apply to a frozen teacher what `savings` asks for: saving -> "" where it is on, else why it is not."""
    results = {}
    if savings.class_token_only:
        results["class_token_only"] = keep_class_token_only(image_model(teacher))
    if savings.fold_normalisation:
        results["fold_normalisation"] = fold_normalisation(teacher)
    if savings.fold_quick_gelu:
        results["fold_quick_gelu"] = fold_quick_gelu(teacher)
    if savings.cast_weights:  # after the folding, which is done in float32
        results["cast_weights"] = cast_weights(teacher)
    return results


def image_model(teacher: Teacher) -> Any:
    """The model inside a teacher: open_clip's vision tower or timm's model."""
    outer = teacher.encoder if teacher.whole is None else teacher.whole
    model = (
        outer.model
        if isinstance(outer, (_Columns, _PreLogits))
        else getattr(outer, "visual", outer)
    )
    return getattr(model, "trunk", model)


@torch.no_grad()
def fold_normalisation(teacher: Teacher) -> str:
    """conv((x - mean) / std) = conv'(x) with weight / std, and bias - sum of weight mean / std: only where nothing is padded."""
    if teacher.takes_raw_pixels:
        return ""
    model = image_model(teacher)
    if isinstance(model, VisionTransformer):
        embed = model.patch_embed
        if type(embed) is not PatchEmbed or embed.dynamic_img_pad:
            return f"its patch embedding is a {type(embed).__name__}{' that pads' if type(embed) is PatchEmbed else ''}"
        conv = embed.proj
    else:
        conv = (
            getattr(model, "conv1", None)
            if type(model).__module__ == "open_clip.transformer"
            else None
        )
    if type(conv) is not nn.Conv2d or any(conv.padding) or conv.groups != 1:
        return f"{type(model).__name__} does not begin with a patch embedding"
    if any(p.requires_grad for p in (conv.weight, conv.bias) if p is not None):
        return "its weights are trained"
    weight = conv.weight.double() / teacher.std.double()  # [D, 3, p, p] / [1, 3, 1, 1]
    bias = -(weight * teacher.mean.double()).sum(dim=(1, 2, 3))  # [D]
    bias = bias if conv.bias is None else bias + conv.bias.double()
    conv.weight.copy_(weight)
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
    teacher.takes_raw_pixels = True
    return ""


@torch.no_grad()
def fold_quick_gelu(teacher: Teacher) -> str:
    """x sigmoid(a x) = SiLU(a x) / a: `a` into the linear layer before, 1 / a into the one after.

    QuickGELU is three kernels and keeps two tensors for backward; SiLU is one and keeps one.
    """
    found = list(_quick_gelus(image_model(teacher)))
    if not found:
        return "no MLP of it has a QuickGELU"
    if any(
        type(linear) is not nn.Linear or linear.weight.requires_grad
        for pair in found
        for linear in pair[:2]
    ):
        return "its MLPs are not two frozen linear layers"
    for before, after, owner, name in found:
        for tensor, factor in (
            (before.weight, QUICK_GELU_SLOPE),
            (before.bias, QUICK_GELU_SLOPE),
            (after.weight, 1 / QUICK_GELU_SLOPE),
        ):
            if tensor is not None:
                tensor.copy_(_times(tensor, factor))
        setattr(owner, name, nn.SiLU())
    return ""


def _quick_gelus(model: nn.Module) -> Iterator[tuple[Any, Any, Any, str]]:
    """(linear before, linear after, owner, attribute) of every QuickGELU between two layers that it can be folded into."""
    for module in model.modules():
        if (
            type(module) is Mlp
            and type(module.act) is QuickGELU
            and type(module.norm) is nn.Identity
        ):
            yield module.fc1, module.fc2, module, "act"
        elif (
            isinstance(module, nn.Sequential)
            and hasattr(module, "gelu")
            and type(module.gelu).__name__ == "QuickGELU"
        ) and type(getattr(module, "ln", None)) in (type(None), nn.Identity):
            yield module.c_fc, module.c_proj, module, "gelu"


def cast_weights(teacher: Teacher) -> str:
    """Matrices, kernels and their biases in the 16-bit dtype that autocast casts them to at every call: the same bits.

    Autocast remembers such a copy only for weights that are trained; for a frozen model it is made again by every call and lives
    until backward. Norms, embeddings and everything else stay float32.
    """
    dtype = getattr(torch, teacher.precision.teacher)
    if not teacher.precision.amp or dtype == torch.float32:
        return "it runs in float32"
    for module in image_model(teacher).modules():
        if type(module) in CAST and not any(p.requires_grad for p in module.parameters()):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    return ""


def _times(tensor: Tensor, factor: float) -> Tensor:
    return (tensor.double() * factor).to(tensor.dtype)
