"""Students: timm models that normalise their own input.

Building, saving and initial weights; see load_student.py to load one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data import resolve_data_config
from timm.layers import BatchNormAct2d, convert_splitbn_model, convert_sync_batchnorm
from torch import Tensor, nn

from dad_fast.config.fields import nearest
from dad_fast.config.schema import StudentConfig
from dad_fast.data.augment.view import View
from dad_fast.data.sources.names import shown
from dad_fast.errors import DadFastError, DataError, EnvironmentProblem, UsageError
from dad_fast.models import own_modules
from dad_fast.models.grad_checkpointing import (
    checkpoint_gradients,
    is_checkpointed,
    keep_statistics,
)
from dad_fast.models.places import checkpoint_file
from dad_fast.models.registry import MODULE
from dad_fast.models.weights.declared import (
    STUDENT,
    TEMPERATURE,
    check_model_kwargs,
    checked_spec,
    checked_temperature,
)
from dad_fast.models.weights.files import (
    load_strictly,
    read_state_dict,
    write_safetensors,
)
from dad_fast.models.weights.hub import hub_client, reason_of
from dad_fast.models.weights.limits import no_more_parameters_than
from dad_fast.models.weights.timm_files import (
    classifier_keys,
    create_timm,
    fit_timm,
    load_fitted,
)

log = logging.getLogger(__name__)

# Start of a student's name on the Hugging Face hub
HUB = "hf-hub:"


class Calibration(NamedTuple):
    """Temperature that divides the logits, and the split that it was fitted on."""

    temperature: float
    split: str
    num_images: int

    @classmethod
    def from_metadata(cls, path: Path, metadata: Mapping[str, str]) -> Calibration | None:
        """Read a file's calibration, if it has one. Raises DataError for a damaged one."""
        if TEMPERATURE not in metadata:
            return None
        try:
            return cls(**checked_temperature(metadata[TEMPERATURE]))
        except ValueError as error:
            raise DataError(f"{path}: its metadata {TEMPERATURE} is damaged ({error})") from None

    def to_json(self) -> str:
        return json.dumps(self._asdict())

    def __str__(self) -> str:
        return f"temperature {self.temperature:.4g}, fitted on {shown(self.split)}"


class Student(nn.Module):
    """Classifier of timm: pixels float [B, 3, H, W] in [0, 1] -> logits [B, num_classes].

    calibration: `dad-fast eval --calibrate` sets it; None in training.
    """

    mean: Tensor
    std: Tensor
    calibration: Calibration | None = None

    def __init__(self, model: nn.Module, spec: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.spec = dict(spec)
        self.name = spec["name"]
        self.num_classes = spec["num_classes"]
        self.image_size = spec["img_size"]
        self.crop_pct = spec["crop_pct"]
        self.interpolation = spec["interpolation"]
        self.squashed = spec.get("squashed", False)
        self.register_buffer("mean", torch.tensor(spec["mean"]).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec["std"]).view(1, -1, 1, 1), persistent=False)

    @property
    def view(self) -> View:
        """Return the evaluation view that belongs to the weights."""
        return View(self.image_size, self.crop_pct, self.interpolation, self.squashed)

    def forward(self, pixels: Tensor) -> Tensor:
        if not pixels.is_floating_point():
            # Else pixels of 0 to 255 would give logits that look like any others.
            raise TypeError(f"{self.name}: pixels are {pixels.dtype}; give floats in [0, 1]")
        return self.calibrated(self.model((pixels - self.mean) / self.std))

    def calibrated(self, logits: Tensor) -> Tensor:
        """Divide logits by the temperature of a calibrated model."""
        return logits if self.calibration is None else logits / self.calibration.temperature

    def no_weight_decay(self) -> set[str]:
        """Names of matrices that timm's optimizers do not decay, such as position embeddings."""
        names: set[str] = getattr(self.model, "no_weight_decay", set)()
        return {f"model.{name}" for name in names}

    @property
    def has_batch_stats(self) -> bool:
        """Return whether outputs in training mode depend on the other images of the batch."""
        return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.modules())

    def contents(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the content of the student's file: tensors by timm's keys, and metadata.

        Auxiliary batch norms are left out, and the metadata rebuilds the model.
        """
        state = self.model.state_dict()
        tensors = {key: tensor for key, tensor in state.items() if ".aux_bn." not in key}
        return tensors, {STUDENT: json.dumps(self.spec), **self.calibration_metadata()}

    def calibration_metadata(self) -> dict[str, str]:
        return {} if self.calibration is None else {TEMPERATURE: self.calibration.to_json()}


def build_student(
    cfg: StudentConfig, num_classes: int, img_size: int = 0, num_groups: int = 2
) -> Student:
    """Build a student with the initial weights that `cfg` names; `img_size` 0 is the model's own.

    With `bn = "aux"` and several groups, every batch norm keeps separate statistics for each of the
    `num_groups` equal parts of a batch (AdvProp, arXiv 1911.09665); evaluation uses those of the
    first part, the clean images.

    Raises UsageError for an unknown model or argument, DataError for weights of another
    architecture, EnvironmentProblem for pretrained weights that are not available and for a timm
    version that cannot convert the batch norms.
    """
    student_model(cfg.name)
    build = _own_student if cfg.name.startswith(MODULE) else _timm_student
    student = build(cfg, num_classes, img_size)
    if cfg.bn == "aux" and num_groups > 1:
        if _conversion_loses_activations(student.model):
            raise EnvironmentProblem(
                f"--bn aux: timm {timm.__version__} loses the activations of {cfg.name}; "
                "pip install 'timm>=1.0.31'"
            )
        student.model = convert_splitbn_model(student.model, num_splits=num_groups)
    if cfg.grad_checkpointing:
        checkpoint_gradients(student.model, cfg.name)
    return student


def _own_student(cfg: StudentConfig, num_classes: int, img_size: int) -> Student:
    """Build a student from a copy of the module that Python code passed."""
    return Student(*own_modules.student_module(cfg, num_classes, img_size))


def _timm_student(cfg: StudentConfig, num_classes: int, img_size: int) -> Student:
    kwargs: dict[str, Any] = dict(cfg.model_kwargs)
    if cfg.drop_path:
        kwargs["drop_path_rate"] = cfg.drop_path
    if cfg.drop:
        kwargs["drop_rate"] = cfg.drop
    if cfg.drop_block:
        kwargs["drop_block_rate"] = cfg.drop_block
    try:
        check_model_kwargs(cfg.model_kwargs)
    except ValueError as error:
        raise UsageError(f"student.model_kwargs: {error}") from None
    # Local weights replace pretrained ones, so nothing is downloaded for them.
    pretrained = cfg.pretrained and not cfg.weights and not cfg.init_from
    name, model_kwargs = student_model(cfg.name), dict(cfg.model_kwargs)
    model = _create(name, num_classes, img_size, kwargs, pretrained)
    _warn_of_cut(cfg.name, model, img_size)

    data = resolve_data_config({}, model=model)
    if name.startswith(HUB):
        # Record the architecture behind the hub's name, so that loading the student needs no
        # network.
        name = model.pretrained_cfg["architecture"]
        recorded = dict(getattr(model, "pretrained_model_args", {}))
        for own_entry in ("num_classes", "img_size"):
            recorded.pop(own_entry, None)
        model_kwargs = {**recorded, **model_kwargs}
    spec = {
        "name": name,
        "model_kwargs": model_kwargs,
        "num_classes": num_classes,
        "img_size": img_size or data["input_size"][-1],
        "mean": list(data["mean"]),
        "std": list(data["std"]),
        "crop_pct": data["crop_pct"],
        "interpolation": data["interpolation"],
        "squashed": data["crop_mode"] == "squash",
    }
    try:
        # What a run writes, its readers accept.
        spec = checked_spec(json.dumps(spec))
    except ValueError as error:
        raise UsageError(f"--student {cfg.name}: {error}; its file could not be read") from None
    student = Student(model, spec)
    for weights in (cfg.weights, cfg.init_from):
        if weights:
            load_student_weights(student, weights)
    return student


def _warn_of_cut(name: str, model: nn.Module, img_size: int) -> None:
    """Warn of an image size whose last rows and columns are in no patch of a transformer."""
    embedding = getattr(model, "patch_embed", None)
    size = getattr(embedding, "patch_size", None)
    if not img_size or size is None or getattr(embedding, "dynamic_img_pad", False):
        return
    patch = size if isinstance(size, int) else size[0]
    rest = img_size % patch
    if rest:
        log.warning(
            "--img-size %s: %s has patches of %s pixels, so the last %s rows and columns are cut off; "
            "%s and %s fit",
            *(img_size, name, patch, rest, img_size - rest, img_size - rest + patch),
        )


def _conversion_loses_activations(model: nn.Module) -> bool:
    """Return whether this timm version would drop the ReLU of fused norms of `model`."""
    if not any(isinstance(module, BatchNormAct2d) for module in model.modules()):
        return False
    converted = convert_splitbn_model(BatchNormAct2d(1)).eval()
    return bool(converted(-torch.ones(1, 1, 1, 1)) < 0)


def student_model(name: str) -> str:
    """Return the timm name or hub name of `--student NAME`, which may start with timm:.

    `module:CLASS` names the module that Python code passed. Raises UsageError for a model that timm
    does not have, and for a module that was not passed.
    """
    if name.startswith(MODULE):
        own_modules.find("student", name)
        return name
    model = name.removeprefix("timm:")
    if model.startswith(HUB):
        return model
    if model.startswith("timm/"):
        raise UsageError(
            f"--student {name}: a name of the hub; write {model.removeprefix('timm/')}, or "
            f"{HUB}{model}"
        )
    arch, at, file = model.partition("@")
    if at:
        raise UsageError(f"--student {name}: write --student {arch} --student-weights {file}")
    if not timm.is_model(model.partition(".")[0]):
        raise UsageError(
            f"--student {name}: timm has no such model{nearest(model, timm.list_models())}"
        )
    return model


def _create(
    name: str, num_classes: int, img_size: int, kwargs: dict[str, Any], pretrained: bool
) -> nn.Module:
    """Build a model by its name in timm or on the hub. See `build_student` for the errors."""
    arguments = {**kwargs, "pretrained": pretrained, "num_classes": num_classes}
    from_hub = name.startswith(HUB)
    try:
        with hub_client() if pretrained or from_hub else nullcontext():
            return create_timm(name, img_size, **arguments)
    except DadFastError:
        raise
    except Exception as error:
        # timm's models check their arguments in many ways, and the hub's client has errors of its
        # own.
        reason = reason_of(error)
        if from_hub and isinstance(error, OSError):
            raise EnvironmentProblem(
                f"--student {name}: not available ({reason}); without a network, give the name of "
                "its architecture and --student-weights FILE"
            ) from None
        if pretrained and not isinstance(error, TypeError):
            raise EnvironmentProblem(
                f"--student {name} --pretrained: its weights are not available ({reason}); "
                "give --student-weights FILE and --no-pretrained"
            ) from None
        raise UsageError(
            f"--student {name}: {reason}; see student.model_kwargs, --drop, --drop-path and "
            "--drop-block"
        ) from None


def load_student_weights(student: Student, path: str | Path) -> None:
    """Load initial weights: a run's file or folder, or a tensor-only file of the timm model.

    The file is read as timm's pretrained weights are, see `fit_timm`. A missing classifier, or one
    for another number of classes, is new, with a warning. Raises DataError for any other
    difference.
    """
    path = checkpoint_file(path)
    spec = student.spec
    arguments = spec["name"], spec["num_classes"], spec["img_size"], dict(spec["model_kwargs"])
    state = fit_timm(
        read_state_dict(path)[0], student.model, path, lambda: _create(*arguments, pretrained=True)
    )
    own = student.model.state_dict()
    head = classifier_keys(student.model)
    if any(key not in state or state[key].shape != own[key].shape for key in head):
        old, new = state.get(head[0]), own[head[0]].shape[0]
        log.warning(
            "%s has %s: the student starts with a new one",
            path,
            f"no classifier for the {new} classes"
            if old is None
            else f"a classifier for {old.shape[0]} classes, not {new}",
        )
        state |= {key: own[key] for key in head}
    load_fitted(student.model, state, path)


def save_student(path: str | Path, student: Student, extra_metadata: Mapping[str, str]) -> None:
    """Write the student's file: `student.contents()` and more metadata."""
    state, metadata = student.contents()
    write_safetensors(path, state, {**metadata, **extra_metadata})


def read_student(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Student:
    """Build the student of a file with the given content, in eval mode.

    Raises DataError for a file that is damaged.
    """
    try:
        spec = checked_spec(metadata[STUDENT])
    except ValueError as error:
        raise DataError(f"{path}: its metadata {STUDENT} is damaged ({error})") from None
    if spec["name"].startswith(MODULE):
        model = own_modules.module_of_file(spec["name"], path)
    else:
        model = _create_as_declared(spec, state, path)
    student = Student(model, spec)
    load_strictly(student.model, state, path)
    return student.eval()


def _create_as_declared(
    spec: Mapping[str, Any], state: Mapping[str, Tensor], path: Path
) -> nn.Module:
    """Build the model of a file's metadata, first on the meta device to check its size."""
    arguments = spec["name"], spec["num_classes"], spec["img_size"], dict(spec["model_kwargs"])
    try:
        with no_more_parameters_than(state, path), torch.device("meta"):
            _create(*arguments, pretrained=False)
    except UsageError:
        # Some models need values while they are built. The next lines report any other error.
        pass
    try:
        with no_more_parameters_than(state, path):
            return _create(*arguments, pretrained=False)
    except UsageError as error:
        raise DataError(
            f"{path}: the model that its metadata names cannot be built ({error})"
        ) from None


def share_batch_norm(student: Student, device: torch.device) -> None:
    """Replace batch norms by those over the images of all processes (--sync-bn).

    Not yet run on a GPU.
    """
    if device.type != "cuda":
        raise EnvironmentProblem(
            f"--sync-bn: torch synchronizes batch norms on CUDA only, and the run is on {device}; "
            "leave it out"
        )
    checkpointed = is_checkpointed(student.model)
    # New modules, without the hooks of the old ones.
    student.model = convert_sync_batchnorm(student.model)
    if checkpointed:
        keep_statistics(student.model)
