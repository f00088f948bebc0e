"""Attack and discretization: projected gradient descent on the input of a frozen model, then the
discretizer Q.

    x' = argmax CE(model(x'), y)   subject to   ||x' - x||_p <= eps,   x' in [0, 1]

    paper:   Q(x + delta)            (DAD: arXiv 2311.01441, eq. 8; DAT: arXiv 2209.07735)
    authors: Q(Q(x) + delta)         (their code: a second VQGAN pass; delta starts from Q(x), and
                                     with several steps Q follows each: x' <- Q(P(x' + s g)), where
                                     P projects into the ball around Q(x))

No gradient passes through Q (straight-through: the gradient at the image is used as it is). Pixels
are float32 [B, 3, H, W] in [0, 1]; `eps` and `step_size` are in the same unit, over the whole image
for L2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dad_fast.config.schema import AttackConfig
from dad_fast.discretizers.base import Discretized, Discretizer
from dad_fast.errors import UsageError
from dad_fast.kernels.pgd_update import l2_norm, pgd_update, project, reference
from dad_fast.methods.noise import keyed_normal, keyed_uniform
from dad_fast.models.float32 import float32_math

# Streams of a sample's key that the attack draws from.
STREAM_DIRECTION, STREAM_COIN = 1, 2


@dataclass(frozen=True)
class PGD:
    """PGD in L2 or L-infinity, with a random start per sample (arXiv 1706.06083).

    norm, eps, step_size: the ball and the step, in the unit of pixels in [0, 1]; in L2 over the whole
    image. random_start: probability, per sample, of starting at a random point: of norm eps (L2), or
    uniform in the cube (L-infinity). steps: 0 leaves the random start alone. fused: use the Triton
    kernel of the update (CUDA).
    """

    norm: Literal["l2", "linf"] = "l2"
    eps: float = 0.1
    step_size: float = 0.1
    steps: int = 1
    random_start: float = 0.8
    fused: bool = False

    def __post_init__(self) -> None:
        if self.norm not in ("l2", "linf"):
            raise UsageError(f"PGD: norm {self.norm!r}: must be l2 or linf")

    @classmethod
    def from_config(cls, cfg: AttackConfig, fused: bool = False) -> PGD:
        """Create the attack of a run's [attack] section."""
        return cls(cfg.norm, cfg.eps, cfg.step_size, cfg.steps, cfg.random_start, fused)

    def __call__(
        self,
        model: Callable[[Tensor], Tensor],
        pixels: Tensor,
        targets: Tensor,
        keys: Tensor,
        between: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Attack `model` (pixels -> logits [B, C]).

        pixels: [B, 3, H, W] in [0, 1]. targets: labels int64 [B] or probabilities [B, C].
        keys: int64 [B], one per sample; they determine the random start.
        between: maps the images between two steps; the next step starts from its result, and
        projects into the ball around `pixels` again.
        Returns x + delta in [0, 1], detached. Computes the gradient of the input only, never of a
        weight.
        """
        pixels = pixels.detach()
        update = pgd_update if self.fused else reference
        delta = self._start(pixels, keys)
        image = pixels + delta
        for step in range(self.steps):
            if step > 0 and between is not None:
                image = between(image.detach())
                delta = image - pixels
            image.requires_grad_(True)
            # A model in float32 runs in IEEE float32, forward and backward.
            with float32_math(tf32=False):
                with torch.enable_grad():
                    logits = model(image)
                direction = cross_entropy_direction(logits, targets)
                (gradient,) = torch.autograd.grad(logits, image, direction)
            delta, image = update(pixels, delta, gradient, self.norm, self.eps, self.step_size)
        return image

    def _start(self, pixels: Tensor, keys: Tensor) -> Tensor:
        if self.random_start == 0:
            return torch.zeros_like(pixels)
        shape = tuple(pixels.shape[1:])
        if self.norm == "l2":
            noise = keyed_normal(keys, shape, STREAM_DIRECTION)
            noise = self.eps * noise / l2_norm(noise)
        else:
            noise = self.eps * (2 * keyed_uniform(keys, shape, STREAM_DIRECTION) - 1)
        coin = keyed_uniform(keys, (1, 1, 1), STREAM_COIN) < self.random_start  # [B, 1, 1, 1]
        return project(torch.where(coin, noise, 0.0), pixels, self.norm, self.eps)


@torch.no_grad()
def cross_entropy_direction(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the gradient of CE(logits, targets) in the logits [B, C], each row divided by its
    largest entry.

    PGD uses the direction alone, so the scale is free. This avoids two roundings that would leave a
    confident teacher unattacked. First, p_y - 1 is 0 in float32 from a logit gap of 17 on; a row
    sums to 0, so the entry of the largest probability is computed as minus the sum of the others.
    Second, small values would underflow on their way back through a 16-bit model.
    """
    probs = torch.softmax(logits.double(), dim=-1)
    if targets.dim() == 1:
        targets = F.one_hot(targets, logits.shape[-1])
    gradient = probs - targets
    top = probs.argmax(dim=-1, keepdim=True)
    gradient.scatter_(1, top, 0.0)
    gradient.scatter_(1, top, -gradient.sum(dim=-1, keepdim=True))
    largest = gradient.abs().amax(dim=-1, keepdim=True)
    return (gradient / torch.where(largest > 0, largest, 1.0)).to(logits.dtype)


def perturb(
    discretizer: Discretizer,
    model: Callable[[Tensor], Tensor],
    attack: PGD,
    pixels: Tensor,
    targets: Tensor,
    keys: Tensor,
    order: Literal["paper", "authors"] = "paper",
) -> tuple[Tensor, Tensor]:
    """Attack `model` on `pixels` [B, 3, H, W]; arguments as in `PGD.__call__`.

    Returns (base, base + delta), each [B, 3, H, W]: base is x (order "paper") or Q(x) ("authors").
    """
    if order == "paper":
        return pixels, attack(model, pixels, targets, keys)

    @torch.no_grad()
    def discretized(images: Tensor) -> Tensor:
        return discretizer(images).images

    base = discretized(pixels)
    return base, attack(model, base, targets, keys, between=discretized)


def discretize(
    discretizer: Discretizer,
    model: Callable[[Tensor], Tensor],
    attack: PGD,
    pixels: Tensor,
    targets: Tensor,
    keys: Tensor,
    order: Literal["paper", "authors"] = "paper",
) -> Discretized:
    """Make discrete adversarial images: Q(x + delta), where delta raises the cross-entropy of `model`
    (DAD, arXiv 2311.01441, eq. 8).

    Args:
        discretizer: Q, such as `load_discretizer(...)`.
        model: pixels [B, 3, H, W] -> logits [B, C]; its weights get no gradient.
        attack: the attack; its `eps` and `step_size` are in the unit of the pixels.
        pixels: float32 [B, 3, H, W] in [0, 1].
        targets: labels int64 [B], or probabilities [B, C].
        keys: int64 [B], an id of each sample, which determines its random start.
        order: "paper", or "authors": Q(Q(x) + delta), as their code does.

    Returns:
        `images`, float32 [B, 3, H, W] in [0, 1], and `codes`, int64 [B, h, w], or None without a
        codebook.
    """
    _, perturbed = perturb(discretizer, model, attack, pixels, targets, keys, order)
    with torch.no_grad():
        return discretizer(perturbed)
