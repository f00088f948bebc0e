"""Exact optimizations of teachers and students: less work for equal values and gradients.

Equal in exact arithmetic; results differ by rounding. A model that does not support an optimization
stays unchanged, and the reason is returned. No parameter changes its name. Folding changes the
values of frozen weights, so only teachers are folded, which are never saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Mlp, PatchEmbed
from timm.layers.activations import QuickGELU
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dad_fast.models.batch_first_attention import (
    BatchFirstAttention,
    use_batch_first_attention,
)
from dad_fast.models.class_token import keep_class_token_timm
from dad_fast.models.student import Student
from dad_fast.models.teacher import Teacher
from dad_fast.models.timm_teacher import PreLogits, SelectedClasses

# QuickGELU(x) = x sigmoid(1.702 x)
QUICK_GELU_SLOPE = 1.702
# Modules that use their weights only in operations that autocast runs in 16 bit. A subclass may do
# more, such as weight standardisation.
CAST = (
    nn.Linear,
    NonDynamicallyQuantizableLinear,
    nn.Conv2d,
    nn.MultiheadAttention,
    BatchFirstAttention,
)


@dataclass(frozen=True)
class Optimizations:
    """Switches of the optimizations. With all of them off a model is the plain one, bit for bit."""

    # Last transformer block for the class token alone, teacher and student
    class_token_only: bool = True
    # The teacher's nn.MultiheadAttention without transposed tokens and copies, as open_clip's towers
    clip_attention: bool = True
    # The teacher's mean and std in its patch embedding
    fold_normalisation: bool = True
    # The teacher's QuickGELU as one SiLU, with its slope in the adjacent weights
    fold_quick_gelu: bool = True
    # The teacher's matrices cast once to the dtype that autocast would cast them to at every call
    cast_weights: bool = True


PLAIN = Optimizations(
    class_token_only=False,
    clip_attention=False,
    fold_normalisation=False,
    fold_quick_gelu=False,
    cast_weights=False,
)


def optimize_student(student: Student, wanted: Optimizations) -> dict[str, str]:
    """Optimize a student in place. Returns name -> "" if applied, else the reason why not."""
    if not wanted.class_token_only:
        return {}
    return {"class_token_only": keep_class_token_only(student.model)}


def optimize_teacher(teacher: Teacher, wanted: Optimizations) -> dict[str, str]:
    """Optimize a frozen teacher in place. Returns name -> "" if applied, else the reason.

    Of an ensemble every member is optimized, and names are MEMBER: NAME.
    """
    if len(teacher.members) > 1:
        return {
            f"{member.name}: {name}": reason
            for member in teacher.members
            for name, reason in optimize_teacher(member, wanted).items()
        }
    results = {}
    if wanted.class_token_only:
        results["class_token_only"] = keep_class_token_only(image_model(teacher))
    if wanted.clip_attention:
        results["clip_attention"] = use_batch_first_attention(image_model(teacher))
    if wanted.fold_normalisation:
        results["fold_normalisation"] = fold_normalisation(teacher)
    if wanted.fold_quick_gelu:
        results["fold_quick_gelu"] = fold_quick_gelu(teacher)
    # Folding is done in float32, so casting comes last.
    if wanted.cast_weights:
        results["cast_weights"] = cast_weights(teacher)
    return results


def image_model(teacher: Teacher) -> Any:
    """Return the model inside a teacher: open_clip's vision tower or timm's model."""
    outer = teacher.encoder if teacher.whole is None else teacher.whole
    if isinstance(outer, (SelectedClasses, PreLogits)):
        model = outer.model
    else:
        model = getattr(outer, "visual", outer)
    return getattr(model, "trunk", model)


def keep_class_token_only(model: nn.Module) -> str:
    """Make the last block of `model` compute the class token alone, in place.

    `model`: a timm VisionTransformer, an open_clip vision tower, or an open_clip tower around a
    timm model. Returns "" on success (also the second time), else the reason why the model is not
    supported and stays unchanged.
    """
    for candidate in (model, getattr(model, "trunk", None)):
        if isinstance(candidate, VisionTransformer):
            return keep_class_token_timm(candidate)
    if type(model).__module__.startswith("open_clip."):
        # A bare checkout has no open_clip.
        from dad_fast.models.class_token_clip import keep_class_token_clip

        return keep_class_token_clip(model)
    return f"{type(model).__name__} is no known vision transformer"


@torch.no_grad()
def fold_normalisation(teacher: Teacher) -> str:
    """Fold mean and std into an unpadded patch embedding.

    conv((x - mean) / std) = conv'(x), with weight / std as weight and bias - sum of weight mean /
    std as bias.
    """
    if teacher.takes_raw_pixels:
        return ""
    model = image_model(teacher)
    conv: Any = None
    if isinstance(model, VisionTransformer):
        embed = model.patch_embed
        if type(embed) is not PatchEmbed:
            return f"its patch embedding is a {type(embed).__name__}"
        if embed.dynamic_img_pad:
            return "its patch embedding is a PatchEmbed that pads"
        conv = embed.proj
    elif type(model).__module__ == "open_clip.transformer":
        conv = getattr(model, "conv1", None)
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
    """Fold QuickGELU's slope into the weights around it, which leaves a SiLU.

    x sigmoid(a x) = SiLU(a x) / a: `a` into the linear layer before, 1 / a into the one after.
    QuickGELU is three kernels and keeps two tensors for backward; SiLU is one kernel and keeps one.
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
                tensor.copy_(tensor.double() * factor)
        setattr(owner, name, nn.SiLU())
    return ""


def _quick_gelus(model: nn.Module) -> Iterator[tuple[Any, Any, Any, str]]:
    """Yield (layer before, layer after, owner, attribute) of every QuickGELU between two layers."""
    for module in model.modules():
        if type(module) is Mlp:
            if type(module.act) is QuickGELU and type(module.norm) is nn.Identity:
                yield module.fc1, module.fc2, module, "act"
        elif isinstance(module, nn.Sequential) and hasattr(module, "gelu"):
            norm = getattr(module, "ln", None)
            if type(module.gelu).__name__ == "QuickGELU" and (
                norm is None or type(norm) is nn.Identity
            ):
                yield module.c_fc, module.c_proj, module, "gelu"


def cast_weights(teacher: Teacher) -> str:
    """Cast weights once to the 16-bit dtype that autocast casts them to at every call.

    Results are bit-equal. Only matrices, kernels and their biases are cast.

    Autocast caches such a copy only for trained weights; for a frozen model every call makes a new
    one, which lives until backward. Norms, embeddings and everything else stay float32.
    """
    dtype = getattr(torch, teacher.precision.teacher)
    if not teacher.precision.amp or dtype == torch.float32:
        return "it runs in float32"
    for module in image_model(teacher).modules():
        if type(module) in CAST and not any(p.requires_grad for p in module.parameters()):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    return ""
