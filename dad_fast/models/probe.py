"""Linear probe: a teacher's frozen image encoder under a new linear layer.

Only the layer is trained, saved and averaged.

The file of a probe holds `weight` [C, F] and `bias` [C], and as metadata the teacher's name and a
hash of the encoder. The file also works as a `--teacher-head`, so that the probe can teach a
student.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from dad_fast.config.schema import AugmentConfig, PrecisionConfig, TeacherConfig
from dad_fast.errors import DataError, UsageError
from dad_fast.models.load_teacher import load_teacher
from dad_fast.models.places import checkpoint_file
from dad_fast.models.registry import is_registered, split_names
from dad_fast.models.student import Student
from dad_fast.models.teacher import Teacher
from dad_fast.models.weights.declared import (
    CLASSES,
    PROBE,
    check_classes,
    check_encoder,
    probe_spec,
    recorded_classes,
)
from dad_fast.models.weights.files import load_strictly, read_state_dict
from dad_fast.models.weights.limits import without_downloads
from dad_fast.registry import PYTHON

# Prefix of the encoder's keys in a probe's state dict
ENCODER = "encoder."


class Probe(Student):
    """Encoder and linear layer: pixels float [B, 3, H, W] in [0, 1] -> logits float32 [B, C].

    The encoder stays in eval mode and needs no gradient. State dicts omit it, and copies of the
    probe share it.
    """

    def __init__(self, encoder: Teacher, spec: Mapping[str, Any]) -> None:
        super().__init__(
            nn.Linear(spec["num_features"], spec["num_classes"]),
            {**spec, "mean": [0.0] * 3, "std": [1.0] * 3},
        )
        nn.init.zeros_(self.model.weight)
        nn.init.zeros_(self.model.bias)
        self.spec = dict(spec)
        self.encoder = encoder
        self.register_state_dict_post_hook(_drop_encoder)
        self.register_load_state_dict_post_hook(_forget_encoder)

    def __deepcopy__(self, memo: dict[int, Any]) -> Probe:
        made = Probe(self.encoder, self.spec).to(self.model.weight.device)
        made.model = copy.deepcopy(self.model, memo)
        return made.train(self.training)

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """Return the input of the linear layer, float32 [B, F], normalised for CLIP."""
        return self.encoder.features(pixels)

    def logits(self, features: Tensor) -> Tensor:
        """Return logits float32 [B, C] of features [B, F].

        Ignores autocast: the layer is too small to gain from it.
        """
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.model(features.float())
        return logits

    def forward(self, pixels: Tensor) -> Tensor:
        return self.calibrated(self.logits(self.features(pixels)))

    @property
    def has_batch_stats(self) -> bool:
        # Those of the encoder are fixed.
        return False

    def contents(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        metadata = {PROBE: json.dumps(self.spec), **self.calibration_metadata()}
        return dict(self.model.state_dict()), metadata


def _drop_encoder(module: nn.Module, state: dict[str, Tensor], prefix: str, local: Any) -> None:
    for key in [key for key in state if key.startswith(prefix + ENCODER)]:
        del state[key]


def _forget_encoder(module: nn.Module, incompatible: _IncompatibleKeys) -> None:
    incompatible.missing_keys[:] = [
        key for key in incompatible.missing_keys if not key.startswith(ENCODER)
    ]


@torch.no_grad()
def build_probe(
    teacher: Teacher,
    encoder_sha256: str,
    *,
    img_size: int = 0,
    init: Literal["zeros", "zero-shot"] = "zeros",
    init_from: str = "",
) -> Probe:
    """Build a new probe on `teacher`'s encoder; `img_size` 0 is the encoder's own.

    init: zeros, or the teacher's own head. init_from: the run (or file) of another probe on the
    same encoder, to take the initial weights from.

    Raises UsageError for a teacher without a linear head to start from, DataError for a file that
    is no probe on this encoder.
    """
    side = teacher.image_size
    pixels = torch.zeros(1, 3, side, side, device=teacher.mean.device)
    probe = Probe(
        teacher,
        {
            "name": f"linear probe on {teacher.name}",
            "teacher": teacher.name,
            "encoder_sha256": encoder_sha256,
            "encoder_size": side,
            "num_features": teacher.features(pixels).shape[1],
            "unit_features": teacher.unit_features,
            "num_classes": teacher.num_classes,
            "img_size": img_size or side,
            "crop_pct": float(teacher.crop_pct),
            "interpolation": teacher.interpolation,
            "squashed": teacher.squashed,
        },
    )
    if init == "zero-shot":
        teacher.check_head()
        if teacher.whole is not None:
            raise UsageError(
                f"--lp-init zero-shot: teacher {teacher.name} has no zero-shot head; "
                "use --lp-init zeros"
            )
        probe.model.weight.copy_(teacher.head_weight)
        probe.model.bias.copy_(teacher.head_bias)
    if init_from:
        path = checkpoint_file(init_from)
        state, metadata = read_state_dict(path)
        spec = probe_spec(path, metadata)
        check_classes(f"--init-from {path}", metadata, teacher.classes)
        check_encoder(f"--init-from {path}", spec, encoder_sha256)
        load_strictly(probe.model, state, path)
    return probe


def probe_views(augment: AugmentConfig, student: Student) -> AugmentConfig:
    """Return the augmentation that a run trains on.

    A probe whose evaluation squashes images squashes them instead of a centre crop, too.
    """
    if isinstance(student, Probe) and student.squashed and augment.crop == "center":
        return replace(augment, crop="squash")
    return augment


def load_probe(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Probe:
    """Load the probe of a file with the given content, in eval mode, on the encoder that it names.

    A teacher's file that has moved is looked for next to `path`; a hub's model is found in the
    hub's cache and not downloaded. Raises DataError if the metadata is damaged or the encoder is
    another one, and the errors of `load_teacher`.
    """
    spec = probe_spec(path, metadata)
    num_classes, num_features = spec["num_classes"], spec["num_features"]
    if "weight" not in state or state["weight"].shape != (num_classes, num_features):
        raise DataError(
            f"{path}: its weight does not have the {num_classes:,} classes and {num_features:,} "
            "features of its metadata"
        )
    classes = recorded_classes(path, metadata.get(CLASSES), num_classes)
    name = _found(spec["teacher"], path)
    if name.startswith(PYTHON):
        # Importing a module because a file names it would let the file run code.
        raise DataError(
            f"{path}: its encoder {name} is a user's own module, which is never imported because "
            "a file names it; train the probe on a registered teacher"
        )
    if len(split_names(name)) > 1:
        raise DataError(
            f"{path}: its encoder {name} is not here; put its file at that path, or next to this one"
        )
    timm_name = name.removeprefix("timm:")
    is_timm = timm_name != name
    if is_timm and "@" not in name and not _on_hub(timm_name):
        raise DataError(
            f"{path}: its encoder {name} has no weights on a hub; train it on timm:{timm_name}@FILE"
        )
    # The probe's own file is the head, so that no other one is made or needed; reading it compares
    # the encoder's fingerprint.
    img_size = spec["encoder_size"] if is_timm else 0
    cfg = TeacherConfig(name=name, head=str(path), img_size=img_size)
    with without_downloads():
        teacher = load_teacher(cfg, classes, PrecisionConfig(), torch.device("cpu"))
    teacher.name = spec["teacher"]
    probe = Probe(teacher, spec)
    load_strictly(probe.model, state, path)
    return probe.eval()


def _on_hub(name: str) -> bool:
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return known is not None and bool(known.hf_hub_id)


def _found(name: str, path: Path) -> str:
    """Replace a moved file in `name` by the file of that name next to `path`, if there is one."""
    has_scheme = is_registered(name)
    before, at, file = name.rpartition("@") if has_scheme else ("", "", name)
    if has_scheme and not at:
        return name
    neighbour = path.parent / Path(file).name
    if not Path(file).exists() and neighbour.is_file():
        return f"{before}{at}{neighbour}"
    return name
