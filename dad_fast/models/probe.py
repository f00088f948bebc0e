"""A linear probe: a teacher's frozen image encoder under a new linear layer, which alone is trained, saved and averaged.

Its file holds `weight` [C, F] and `bias` [C], and in its metadata the teacher's name and a hash of the encoder. It is a
`--teacher-head` file too: with it the probe can teach a student.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from dad_fast.config.schema import PrecisionConfig, TeacherConfig
from dad_fast.errors import DataError, UsageError
from dad_fast.models.student import CLASSES, PROBE, Student, checkpoint_file
from dad_fast.models.teacher import Teacher, check_classes, load_teacher
from dad_fast.models.weights.declared import checked_probe, recorded_classes, without_downloads
from dad_fast.models.weights.files import load_strictly, read_state_dict
from dad_fast.models.weights.fingerprint import fingerprint

ENCODER = "encoder."


class Probe(Student):
    """Encoder and linear layer as one classifier: pixels float [B, 3, H, W] in [0, 1] -> logits float32 [B, C].

    The encoder is shared with whoever gave it: it stays in eval mode, needs no gradient, and is in no state dict and no copy.
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
        """What the linear layer sees, float32 [B, F]: for CLIP unit image features, as its zero-shot head has them."""
        return self.encoder.features(pixels)

    def logits(self, features: Tensor) -> Tensor:
        """Float32 [B, C] of features [B, F], whatever autocast is on: the layer is too small to gain by it."""
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.model(features.float())
        return logits

    def forward(self, pixels: Tensor) -> Tensor:
        return self.logits(self.features(pixels))

    @property
    def has_batch_stats(self) -> bool:
        return False  # those of the encoder are fixed

    def contents(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        return dict(self.model.state_dict()), {PROBE: json.dumps(self.spec)}


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
    """A new probe on `teacher`'s encoder; `img_size` 0 is the encoder's own.

    init: zeros, or the teacher's own head. init_from: the run (or file) of another probe on the same encoder, whose weights it starts from.

    Raises UsageError for a teacher that has no linear head to start from, DataError for a file that is no probe on this encoder.
    """
    side = teacher.image_size
    pixels = torch.zeros(1, 3, side, side, device=teacher.mean.device)
    probe = Probe(
        teacher,
        {
            "name": f"linear probe on {teacher.name}",
            "teacher": teacher.name,
            "encoder_sha256": encoder_sha256,
            "num_features": teacher.features(pixels).shape[1],
            "unit_features": teacher.unit_features,
            "num_classes": teacher.num_classes,
            "img_size": img_size or side,
            "crop_pct": float(teacher.crop_pct),
            "interpolation": teacher.interpolation,
        },
    )
    if init == "zero-shot":
        if teacher.whole is not None:
            raise UsageError(
                f"--lp-init zero-shot: teacher {teacher.name} has no zero-shot head; use --lp-init zeros"
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


def load_probe(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Probe:
    """The probe in a run's file, whose content is given, on the encoder that it names, in eval mode.

    A teacher's file that is not where it was is looked for beside `path`; one of a hub is found in the hub's cache, and not
    fetched. Raises DataError where the metadata is damaged or the encoder is another one, and what `load_teacher` raises where the
    teacher cannot be had.
    """
    spec = probe_spec(path, metadata)
    if "weight" not in state or state["weight"].shape != (
        spec["num_classes"],
        spec["num_features"],
    ):
        raise DataError(
            f"{path}: its weight is not of the {spec['num_classes']:,} classes and {spec['num_features']:,} features that it says"
        )
    classes = recorded_classes(path, metadata.get(CLASSES), spec["num_classes"])
    name = _found(spec["teacher"], path)
    # Its own file is the head, so that no text tower is asked for one; timm's models bring theirs.
    head = "" if name.startswith("timm:") else str(path)
    if (
        (timm_name := name.removeprefix("timm:")) != name
        and "@" not in name
        and not _on_hub(timm_name)
    ):
        raise DataError(
            f"{path}: its encoder {name} has no weights on a hub; train it on timm:{timm_name}@FILE"
        )
    with without_downloads():
        teacher = load_teacher(
            TeacherConfig(name=name, head=head), classes, PrecisionConfig(), torch.device("cpu")
        )
    teacher.name = spec["teacher"]
    if not head:  # else that of the head's file was checked on loading
        check_encoder(str(path), spec, fingerprint(teacher.encoder))
    probe = Probe(teacher, spec)
    load_strictly(probe.model, state, path)
    return probe.eval()


def _on_hub(name: str) -> bool:
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return known is not None and bool(known.hf_hub_id)


def probe_spec(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a probe's file says of itself; DataError where it is none or its metadata is damaged."""
    if PROBE not in metadata:
        raise DataError(
            f"{path}: not a linear probe of dad-fast (no {PROBE} in its metadata); name the run of an --method lp-clip"
        )
    try:
        return checked_probe(metadata[PROBE])
    except ValueError as error:
        raise DataError(f"{path}: its metadata {PROBE} is damaged ({error})") from None


def check_encoder(where: str, spec: Mapping[str, Any], sha256: str) -> None:
    """DataError where the encoder with the fingerprint `sha256` is not the one that the probe was trained on."""
    if spec["encoder_sha256"] != sha256:
        raise DataError(
            f"{where}: this probe belongs to another encoder ({spec['encoder_sha256'][:12]}…) than {spec['teacher']} now is "
            f"({sha256[:12]}…); give the weights that it was trained on"
        )


def _found(name: str, path: Path) -> str:
    """`name`, with its file replaced by that of the same name beside `path` where it is not where it was."""
    has_scheme = name.startswith(("open_clip:", "hf-hub:", "timm:", "embedded:"))
    before, at, file = name.rpartition("@") if has_scheme else ("", "", name)
    if has_scheme and not at:
        return name
    beside = path.parent / Path(file).name
    return f"{before}{at}{beside}" if not Path(file).exists() and beside.is_file() else name
