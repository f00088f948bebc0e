"""`pgd_update`: one step of projected gradient descent on images, from a gradient to the next
image.

    L2          d' = P(d + s g / |g|),  P(d) = d min(1, eps / |d|)          |.| over the whole image
    L-infinity  d' = P(d + s sign(g)),  P(d) = clamp(d, -eps, eps)
    both        d' = clamp(x + d', 0, 1) - x,  and the image x + d'

pixels x, delta d: [B, ...], float32; gradient g: float32, float16 or bfloat16. Returns d' and x +
d', laid out as x is. Nothing is kept for backward: no gradient passes.

Fused, L2 is two kernels. |d + s g/|g||^2 = |d|^2 + 2 s d.g/|g| + s^2, so that one reduction gives
all that the update needs, summed in float64: a gradient whose squares underflow float32 needs no
scaling, and cancellation of the three terms loses nothing. Bytes an element: 8 to reduce, 20 to
apply (12 read, 8 written), that is 1.08 GB for 256 images of 224 px. L-infinity is one kernel of 20
bytes an element. The plain form in eager mode moves 124 and 80: 15 and 8 operations, each of which
reads and writes whole tensors.

The kernel does not convert the image to the VQGAN encoder's dtype and range. That would save 16
bytes an element (0.6 GB, 0.14 ms at 4.3 TB/s for 256 images, of a step of more than half a second),
but couple the encoder to the attack.
"""

from __future__ import annotations

import torch
from torch import Tensor


def project(delta: Tensor, pixels: Tensor, norm: str, eps: float) -> Tensor:
    """Into the ball, then into [0, 1]; the second only shortens delta, so the result is in both."""
    if norm == "l2":
        delta = delta * (eps / l2_norm(delta)).clamp(max=1.0)
    else:
        delta = delta.clamp(-eps, eps)
    return (pixels + delta).clamp(0.0, 1.0) - pixels


def direction(gradient: Tensor, norm: str) -> Tensor:
    """Of norm 1, or 0 where the gradient is 0."""
    if norm == "linf":
        return gradient.sign()
    # Scaled by its largest entry first: a gradient may be so small that its square is 0 in float32.
    largest = gradient.abs().amax(dim=tuple(range(1, gradient.ndim)), keepdim=True)
    scaled = gradient / torch.where(largest > 0, largest, 1.0)
    return scaled / l2_norm(scaled)


def l2_norm(x: Tensor) -> Tensor:
    """Norm per sample [B, 1, ...]; the floor keeps 0 / 0 at 0."""
    return x.square().sum(dim=tuple(range(1, x.ndim)), keepdim=True).sqrt().clamp(min=1e-20)


def reference(
    pixels: Tensor, delta: Tensor, gradient: Tensor, norm: str, eps: float, step_size: float
) -> tuple[Tensor, Tensor]:
    """Plain form, on any device and in any dtype."""
    delta = project(delta + step_size * direction(gradient, norm), pixels, norm, eps)
    return delta, pixels + delta


@torch.library.custom_op("dad_fast::pgd_update", mutates_args=())
def _pgd_update(
    pixels: Tensor, delta: Tensor, gradient: Tensor, norm: str, eps: float, step_size: float
) -> tuple[Tensor, Tensor]:
    return reference(pixels, delta, gradient, norm, eps, step_size)


@_pgd_update.register_kernel("cuda")
def _(
    pixels: Tensor, delta: Tensor, gradient: Tensor, norm: str, eps: float, step_size: float
) -> tuple[Tensor, Tensor]:
    from dad_fast.kernels.pgd_update_triton import launch

    return launch(pixels, delta, gradient, norm, eps, step_size)


@_pgd_update.register_fake
def _(
    pixels: Tensor, delta: Tensor, gradient: Tensor, norm: str, eps: float, step_size: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(pixels), torch.empty_like(pixels)


def pgd_update(
    pixels: Tensor, delta: Tensor, gradient: Tensor, norm: str, eps: float, step_size: float
) -> tuple[Tensor, Tensor]:
    """Run one PGD step and return (new delta, pixels + new delta); Triton on CUDA, the plain form
    elsewhere.

    pixels, delta: float32 [B, ...], B >= 1 images in [0, 1] and their perturbations. gradient: of
    the same shape, float32, float16 or bfloat16, in any layout. norm: "l2" or "linf"; eps,
    step_size >= 0 in its unit. A sample whose gradient is 0 keeps its delta, projected. A gradient
    that is not finite makes its L2 sample NaN; in L-infinity NaN counts as 0. Raises ValueError for
    shapes, dtypes and norms that do not fit.
    """
    if norm not in ("l2", "linf"):
        raise ValueError(f"norm must be l2 or linf, not {norm!r}")
    if pixels.ndim < 2 or not pixels.shape == delta.shape == gradient.shape:
        raise ValueError(
            f"one shape [B, ...] is needed, not {list(pixels.shape)}, {list(delta.shape)} and {list(gradient.shape)}"
        )
    if pixels.dtype != torch.float32 or delta.dtype != torch.float32:
        raise ValueError(f"pixels and delta must be float32, not {pixels.dtype} and {delta.dtype}")
    if gradient.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"the gradient must be float32, float16 or bfloat16, not {gradient.dtype}")
    return _pgd_update(pixels.detach(), delta.detach(), gradient.detach(), norm, eps, step_size)
