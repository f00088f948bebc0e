"""Ensembles of teachers: one teacher whose output is the mean of its members' outputs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dad_fast.models.teacher import Teacher


class MeanOutput(nn.Module):
    """Weighted mean of logits float [M, B, C] of M members -> logits [B, C].

    probabilities: out = T log(sum_i w_i softmax(l_i / T)), so that softmax(out / T) is exactly the
    mean of the members' softmax(l_i / T). Every loss, kernel and store that takes logits at
    temperature T then works with the mean of probabilities.
    logits: out = sum_i w_i l_i.
    """

    # float64 [M], their sum is 1
    weights: Tensor
    # float64, 0 for the mean of logits. A buffer, so that the hash of a teacher covers it.
    temperature: Tensor

    def __init__(self, weights: Sequence[float], average: str, temperature: float) -> None:
        """average: probabilities or logits."""
        super().__init__()
        self.of_logits = average == "logits"
        given = torch.tensor(weights, dtype=torch.float64)
        self.register_buffer("weights", given / given.sum())
        used = 0.0 if self.of_logits else temperature
        self.register_buffer("temperature", torch.tensor(used, dtype=torch.float64))

    def forward(self, logits: Tensor) -> Tensor:
        weights = self.weights.to(logits.dtype).view(-1, 1, 1)
        if self.of_logits:
            return (weights * logits).sum(dim=0)
        log_probs = F.log_softmax(logits / self.temperature, dim=-1)
        return self.temperature * torch.logsumexp(log_probs + weights.log(), dim=0)


class Ensemble(Teacher):
    """Several teachers as one: pixels float32 [B, 3, H, W] in [0, 1] -> logits float32 [B, C].

    Every member has its own input size, normalisation and precision, and runs once. In evaluation
    images have the view of the member with the largest input.
    """

    def __init__(
        self,
        members: Sequence[Teacher],
        *,
        name: str,
        weights: Sequence[float],
        average: str,
        temperature: float,
    ) -> None:
        """Join `members`, which have the same classes.

        weights: one for each, of any sum. average: probabilities, at `temperature`, or logits.
        """
        largest = max(members, key=lambda member: member.image_size)
        hashes = [member.weights_sha256 for member in members]
        files = " ".join(digest for digest in hashes if digest)
        all_known = all(hashes)
        super().__init__(
            nn.ModuleList(members),
            MeanOutput(weights, average, temperature),
            name=name,
            classes=largest.classes,
            image_size=largest.image_size,
            # Members normalise.
            mean=[0.0] * 3,
            std=[1.0] * 3,
            precision=largest.precision,
            provenance="; ".join(dict.fromkeys(member.provenance for member in members)),
            weights_sha256=hashlib.sha256(files.encode()).hexdigest() if all_known else None,
            crop_pct=largest.crop_pct,
            interpolation=largest.interpolation,
            squashed=largest.squashed,
        )
        self.average = average

    @property
    def members(self) -> list[Teacher]:
        return list(self.encoder.children())

    def weighted_members(self) -> list[tuple[float, Teacher]]:
        """Return the members with their weights, whose sum is 1."""
        return list(zip(self.mean_output.weights.tolist(), self.members, strict=True))

    @property
    def mean_output(self) -> MeanOutput:
        assert isinstance(self.whole, MeanOutput)
        return self.whole

    def features(self, pixels: Tensor) -> Tensor:
        """Return the members' features, each of length 1, side by side: float32 [B, sum of F]."""
        parts = [F.normalize(member.features(pixels), dim=-1) for member in self.members]
        return torch.cat(parts, dim=-1)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.mean_output(torch.stack([member(pixels) for member in self.members]))
