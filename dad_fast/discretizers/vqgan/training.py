"""Training of a VQGAN as a VQ-VAE (arXiv 1711.00937): no discriminator.

Straight-through gradients, codebook by gradient or by moving averages (appendix A.1 there), and
restarts of dead codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dad_fast.discretizers.vqgan.fsq import straight_through
from dad_fast.discretizers.vqgan.model import VQGAN
from dad_fast.kernels import nearest_code

# Steps without use that an entry has at the start, so that all restart in the first step.
NEVER_USED = 1_000_000


@dataclass(frozen=True)
class Pass:
    """One pass of a batch through a VQGAN in training. Losses are means over all values."""

    codes: Tensor  # int64 [B, h, w]
    decoded: Tensor  # [B, 3, H, W], in [-1, 1] but not clamped
    l1: Tensor  # of pixels in [-1, 1]
    l2: Tensor
    codebook: Tensor  # moves codes to latents; has no gradient with moving averages or FSQ
    commitment: Tensor  # moves latents to codes; 0 with FSQ


def training_pass(vqgan: VQGAN, pixels: Tensor, latents: Tensor) -> Pass:
    """Quantize and decode `latents` = vqgan.encode(`pixels`), and compute all losses.

    pixels: [B, 3, H, W] in [0, 1]. The gradient skips the rounding (straight-through estimator).
    """
    config = vqgan.config
    if config.quantizer == "fsq":
        codes = vqgan.lookup(latents)
        quantized = straight_through(latents, config.levels)
        codebook = commitment = latents.new_zeros(())
    else:
        z = vqgan.to_search(latents)
        # Not the prepared search: the codebook changes in every step.
        codes = nearest_code(z.detach(), vqgan.codebook.detach())
        chosen = vqgan.quantize.embedding(codes).permute(0, 3, 1, 2)  # [B, D, h, w]
        codebook = F.mse_loss(chosen, z.detach())
        commitment = F.mse_loss(z, chosen.detach())
        quantized = z + (chosen - z).detach()
    decoded = vqgan.decoder(vqgan.post_quant_conv(quantized))
    error = decoded - (2.0 * pixels - 1.0)
    return Pass(codes, decoded, error.abs().mean(), error.square().mean(), codebook, commitment)


class DeadCodes:
    """Moves codes that were not chosen for `patience` steps to random latents of the batch."""

    def __init__(self, vqgan: VQGAN, patience: int = 50) -> None:
        self.vqgan = vqgan
        self.patience = patience
        # Steps since each code was last chosen, int64 [K]
        self.unused = torch.full_like(vqgan.codebook[:, 0], NEVER_USED, dtype=torch.int64)

    @torch.no_grad()
    def restart(self, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Restart dead codes from `latents` [B, D, h, w]; return their numbers, int64 [n].

        generator: of the CPU; None draws from torch's own. Reads from the device.
        """
        dead = (self.unused > self.patience).nonzero().flatten()
        if len(dead):
            flat = rows(self.vqgan.to_search(latents))
            picked = torch.randint(len(flat), (len(dead),), generator=generator)
            self.vqgan.codebook[dead] = flat[picked.to(flat.device)]
            self.unused[dead] = 0
        return dead

    def count(self, codes: Tensor) -> None:
        """Count a step with these `codes` int64 [B, h, w]."""
        self.unused.add_(1)
        self.unused[codes.unique()] = 0


class MovingCodebook:
    """Codebook as the moving average of the latents that chose each code.

    N_k <- decay N_k + (1 - decay) n_k and m_k likewise with the sum of latents; e_k = m_k / N_k.
    Unit codes are divided by their length.
    """

    def __init__(self, vqgan: VQGAN, decay: float = 0.99) -> None:
        self.vqgan = vqgan
        self.decay = decay
        self.counts = torch.ones_like(vqgan.codebook[:, 0], requires_grad=False)  # [K]
        self.sums = vqgan.codebook.detach().clone()  # [K, D]

    @torch.no_grad()
    def restart(self, numbers: Tensor) -> None:
        """Forget the past of the codes `numbers`, which were set anew."""
        self.counts[numbers] = 1.0
        self.sums[numbers] = self.vqgan.codebook[numbers]

    @torch.no_grad()
    def update(self, latents: Tensor, codes: Tensor) -> None:
        """Move the codebook by `latents` [B, D, h, w] and their `codes` [B, h, w]."""
        flat, chosen = rows(self.vqgan.to_search(latents)), codes.flatten()
        counts = torch.zeros_like(self.counts).index_add_(0, chosen, flat.new_ones(len(flat)))
        sums = torch.zeros_like(self.sums).index_add_(0, chosen, flat)
        self.counts.lerp_(counts, 1.0 - self.decay)
        self.sums.lerp_(sums, 1.0 - self.decay)
        # A code that nothing chooses fades in both; its value stays.
        moved = self.sums / self.counts.clamp(min=1e-12)[:, None]
        if self.vqgan.config.quantizer == "unit":
            moved = F.normalize(moved, dim=-1)
        self.vqgan.codebook.copy_(moved.where(self.counts[:, None] > 1e-12, self.vqgan.codebook))


def rows(latents: Tensor) -> Tensor:
    """Return `latents` [B, D, h, w] as [B h w, D], without gradient."""
    return latents.detach().permute(0, 2, 3, 1).flatten(0, 2)


def perplexity(counts: Tensor) -> float:
    """Return exp of the entropy of `counts` [K]: the number of codes in even use that it is worth."""
    share = counts.double() / counts.sum().clamp(min=1)
    return float(torch.special.entr(share).sum().exp())
