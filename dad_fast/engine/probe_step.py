"""LP-CLIP in the training loop: what a linear probe's step computes, and what its batches hold besides images.

uint8 images -> features of the strong view (or kept ones) -> linear layer -> weighted cross-entropy to pseudo-labels -> update
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dad_fast.config.schema import Config
from dad_fast.data.augment.mixing import to_pixels
from dad_fast.data.loaders.loader import Batch
from dad_fast.engine.probe_features import FeatureTable
from dad_fast.engine.pseudo_labels import PseudoLabels
from dad_fast.engine.step import Generated, TrainStep
from dad_fast.engine.update import Update
from dad_fast.loggers.profiling import stage
from dad_fast.methods.lp_clip import consistency_loss, sample_weights
from dad_fast.models.probe import Probe


class ProbeStep(TrainStep):
    """The step of a linear probe. Its encoder is the teacher's, so that no other model runs."""

    def __init__(self, cfg: Config, probe: Probe, update: Update) -> None:
        super().__init__(cfg, probe, None, None, update)
        self.probe = probe
        compiled = cfg.engine.torchcompile
        self.encode: Callable[[Tensor], Tensor] = (
            torch.compile(probe.features, dynamic=False) if compiled else probe.features
        )

    def generate(self, batch: Batch) -> Generated:
        """In the place of images the features of the strong view, [B, F]; as targets labels int64 [B]; what each counts as `keep`."""
        cfg, features = self.cfg.lp_clip, batch.features
        if features is None:
            with torch.no_grad(), stage("encoder"):
                features = self.encode(to_pixels(batch.images, self.layout))
        labels, weights = batch.labels, None
        if cfg.labels == "pseudo":
            assert batch.pseudo_labels is not None and batch.confidence is not None, (
                "ProbeData joins them"
            )
            labels, weights = (
                batch.pseudo_labels,
                sample_weights(batch.confidence, cfg.weight, cfg.threshold),
            )
        return Generated([features], labels, labels, None, None, weights)

    def loss(self, generated: Generated) -> tuple[Tensor, dict[str, Tensor]]:
        features, labels, weights = generated.images[0], generated.targets, generated.keep
        with stage("objective"):
            counted = torch.ones_like(features[:, 0]) if weights is None else weights
            loss = consistency_loss(
                self.probe.logits(features), labels, counted, self.cfg.augment.smoothing
            )
        scalars = {"loss": loss.detach()}
        if weights is not None:
            scalars["weight"] = weights.mean()
            if self.cfg.lp_clip.threshold:
                scalars["kept"] = (weights != 0).float().mean()
        return loss, scalars


class ProbeData:
    """Pseudo-labels and, where the strong views are fixed, their features: made by one pass each before the first step."""

    def __init__(self, labels: PseudoLabels | None, features: FeatureTable | None) -> None:
        """labels: None where the data's own are learned. features: None where the encoder runs in every step."""
        self.labels, self.features = labels, features

    def prepare(self, say: Callable[[str], None]) -> None:
        """Make what is not there yet; `say` gets lines for the log."""
        if self.labels is not None:
            self.labels.prepare(say)
        if self.features is not None:
            self.features.prepare(say)
        else:
            why = "the strong view changes every epoch, so the encoder runs in every step (--lp-views N keeps N views)"
            say(f"features are not kept: {why}")

    def join(self, batches: Iterator[Batch], pin_memory: bool) -> Iterator[Batch]:
        """`batches` with the pseudo-labels of their samples."""
        for batch in batches:
            if self.labels is None:
                yield batch
                continue
            labels, confidence = self.labels.of(batch.samples.cpu())
            if pin_memory:
                labels, confidence = labels.pin_memory(), confidence.pin_memory()
            yield replace(batch, pseudo_labels=labels, confidence=confidence)
