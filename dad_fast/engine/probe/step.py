"""LP-CLIP in the training loop: generator, learner and data of a linear probe.

uint8 images -> features of the strong view (or kept ones) -> linear layer
             -> weighted cross-entropy to pseudo-labels -> update
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dad_fast.config.schema import LpClipConfig
from dad_fast.data.augment.mixing import to_pixels
from dad_fast.data.loaders.loader import Batch
from dad_fast.engine.generator import Generator, Model, StepInputs
from dad_fast.engine.learner import Learner
from dad_fast.engine.probe.features import FeatureTable
from dad_fast.engine.probe.pseudo_labels import PseudoLabels
from dad_fast.loggers.profiling import stage
from dad_fast.methods.lp_clip import consistency_loss, sample_weights
from dad_fast.methods.registry import Images
from dad_fast.models.probe import Probe


class ProbeGenerator(Generator):
    """Makes features and pseudo-labels. The encoder is the teacher's: no other model runs."""

    def __init__(
        self,
        probe: Probe,
        settings: LpClipConfig,
        layout: torch.memory_format,
        encode: Model | None = None,
    ) -> None:
        """Create a generator. encode: computes the probe's features, for instance compiled."""
        self.settings = settings
        self.layout = layout
        self.encode = probe.features if encode is None else encode

    def __call__(self, batch: Batch) -> StepInputs:
        """Return features of the strong view [B, F], labels int64 [B], and as `keep` the weight of
        each sample.
        """
        features = batch.features
        if features is None:
            with torch.no_grad(), stage("encoder"):
                features = self.encode(to_pixels(batch.images, self.layout))
        labels, weights = batch.labels, None
        if self.settings.labels == "pseudo":
            assert batch.pseudo_labels is not None and batch.confidence is not None
            labels = batch.pseudo_labels
            weights = sample_weights(
                batch.confidence, self.settings.weight, self.settings.threshold
            )
        kind = Images.CLEAN
        return StepInputs({kind: features}, {kind: labels}, {}, weights)


class ProbeLearner(Learner):
    """Trains the linear layer by LP-CLIP's consistency loss."""

    def __init__(self, *arguments: Any, threshold: float, **options: Any) -> None:
        """Create a learner. threshold: `lp_clip.threshold`; the others as for `Learner`."""
        super().__init__(*arguments, **options)
        self.threshold = threshold

    def loss(self, inputs: StepInputs) -> tuple[Tensor, dict[str, Tensor]]:
        features = inputs.images[Images.CLEAN]
        labels = inputs.targets[Images.CLEAN]
        weights = inputs.keep
        assert isinstance(self.student, Probe)
        with stage("objective"):
            counted = torch.ones_like(features[:, 0]) if weights is None else weights
            logits = self.student.logits(features)
            loss = consistency_loss(logits, labels, counted, self.smoothing)
        scalars = {"loss": loss.detach()}
        if weights is not None:
            scalars["weight"] = weights.mean()
            if self.threshold:
                scalars["kept"] = (weights != 0).float().mean()
        return loss, scalars


class ProbeData:
    """Pseudo-labels and, for fixed strong views, features.

    One pass each makes them before the first step.
    """

    def __init__(self, labels: PseudoLabels | None, features: FeatureTable | None) -> None:
        """Create data of a probe.

        labels: None to learn the labels of the data. features: None to run the encoder in every
        step.
        """
        self.labels = labels
        self.features = features

    def prepare(self, log: Callable[[str], None]) -> None:
        """Make missing pseudo-labels and features; `log` gets lines of text."""
        if self.labels is not None:
            self.labels.prepare(log)
        if self.features is not None:
            self.features.prepare(log)
        else:
            log(
                "features are not kept: the strong view changes every epoch, so the encoder runs in "
                "every step (--lp-views N keeps N views)"
            )

    def join(self, batches: Iterator[Batch], pin_memory: bool) -> Iterator[Batch]:
        """Add pseudo-labels to `batches`."""
        for batch in batches:
            if self.labels is None:
                yield batch
                continue
            labels, confidence = self.labels.of(batch.samples.cpu())
            if pin_memory:
                labels, confidence = labels.pin_memory(), confidence.pin_memory()
            yield replace(batch, pseudo_labels=labels, confidence=confidence)
