"""Students: any timm model, with its normalisation inside, and the file that a trained one is handed over in."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.layers import BatchNormAct2d, convert_splitbn_model
from torch import Tensor, nn

from dad_fast.config.fields import nearest
from dad_fast.config.schema import StudentConfig
from dad_fast.errors import DadFastError, DataError, EnvironmentProblem, UsageError
from dad_fast.models.weights.declared import (
    check_model_kwargs,
    checked_spec,
    no_more_parameters_than,
)
from dad_fast.models.weights.files import load_strictly, read_state_dict, write_safetensors

log = logging.getLogger(__name__)

STUDENT, CLASSES = "dad_fast.student", "dad_fast.classes"  # metadata keys of a student's file
PROBE = "dad_fast.probe"  # in the place of STUDENT where the file holds a linear probe


class Student(nn.Module):
    """A timm classifier: pixels float [B, 3, H, W] in [0, 1] -> logits [B, num_classes]."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, spec: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.spec = model, dict(spec)
        self.name, self.num_classes, self.image_size = (
            spec["name"],
            spec["num_classes"],
            spec["img_size"],
        )
        self.crop_pct, self.interpolation = spec["crop_pct"], spec["interpolation"]
        self.register_buffer("mean", torch.tensor(spec["mean"]).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec["std"]).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model((pixels - self.mean) / self.std)

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimizers do not decay though they are matrices, such as position embeddings."""
        names: set[str] = getattr(self.model, "no_weight_decay", set)()
        return {f"model.{name}" for name in names}

    @property
    def has_batch_stats(self) -> bool:
        """Whether its outputs in training depend on the other images of the batch."""
        return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.modules())

    def contents(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What its file holds: tensors by timm's own keys, auxiliary batch norms left out, and what is needed to build it as metadata."""
        return {k: v for k, v in self.model.state_dict().items() if ".aux_bn." not in k}, {
            STUDENT: json.dumps(self.spec)
        }


def build_student(
    cfg: StudentConfig, num_classes: int, img_size: int = 0, num_groups: int = 2
) -> Student:
    """A new student with the weights that `cfg` names; `img_size` 0 is the model's own.

    With `bn = "aux"` every batch norm gets statistics of its own for each of the `num_groups` equal parts of a batch (AdvProp,
    arXiv 1911.09665); evaluation uses those of the first part, the clean images. A method with one group needs none.

    Raises UsageError for an unknown model or argument, DataError for weights of another architecture, EnvironmentProblem for
    pretrained weights that cannot be had and a timm that cannot convert the batch norms.
    """
    kwargs: dict[str, Any] = dict(cfg.model_kwargs)
    if cfg.drop_path:
        kwargs["drop_path_rate"] = cfg.drop_path
    if cfg.drop:
        kwargs["drop_rate"] = cfg.drop
    local = bool(cfg.weights or cfg.init_from)  # these replace what a download would bring
    try:
        check_model_kwargs(cfg.model_kwargs)
    except ValueError as error:
        raise UsageError(f"student.model_kwargs: {error}") from None
    model = _create(cfg.name, num_classes, img_size, kwargs, cfg.pretrained and not local)
    data = resolve_data_config({}, model=model)
    from_hub = cfg.name.startswith(
        "hf-hub:"
    )  # the file names what the hub said, so that reading it needs no network
    spec = {
        "name": model.pretrained_cfg["architecture"] if from_hub else cfg.name,
        "model_kwargs": {
            **(getattr(model, "pretrained_model_args", {}) if from_hub else {}),
            **cfg.model_kwargs,
        },
        "num_classes": num_classes,
        "img_size": img_size or data["input_size"][-1],
        "mean": list(data["mean"]),
        "std": list(data["std"]),
        "crop_pct": data["crop_pct"],
        "interpolation": data["interpolation"],
    }
    student = Student(model, spec)
    for weights in filter(None, (cfg.weights, cfg.init_from)):
        load_student_weights(student, weights)
    if cfg.bn == "aux" and num_groups > 1:
        fused = any(isinstance(module, BatchNormAct2d) for module in student.model.modules())
        if (
            fused and convert_splitbn_model(BatchNormAct2d(1)).eval()(-torch.ones(1, 1, 1, 1)) < 0
        ):  # its ReLU is gone
            raise EnvironmentProblem(
                f"--bn aux: timm {timm.__version__} loses the activations of {cfg.name}; pip install 'timm>=1.0.31'"
            )
        student.model = convert_splitbn_model(student.model, num_splits=num_groups)
    return student


def _create(
    name: str, num_classes: int, img_size: int, kwargs: dict[str, Any], pretrained: bool
) -> nn.Module:
    base = name.removeprefix("hf-hub:").removeprefix("timm:")
    if not name.startswith("hf-hub:") and not timm.is_model(base.partition(".")[0]):
        raise UsageError(
            f"--student {name}: timm has no such model{nearest(base, timm.list_models())}"
        )
    try:
        if img_size:
            try:  # vision transformers need to know it, convolutional networks do not take it
                return timm.create_model(
                    name,
                    pretrained=pretrained,
                    num_classes=num_classes,
                    img_size=img_size,
                    **kwargs,
                )
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **kwargs)
    except DadFastError:
        raise
    except Exception as error:  # timm's models check their arguments in many ways; the hub's client has its own errors
        why = (" ".join(str(error).split()) or type(error).__name__)[:160]
        if pretrained and not isinstance(error, TypeError):
            mend = "give --student-weights FILE and --no-pretrained"
            raise EnvironmentProblem(
                f"--student {name} --pretrained: its weights cannot be had ({why}); {mend}"
            ) from None
        raise UsageError(
            f"--student {name}: {why}; see student.model_kwargs, --drop and --drop-path"
        ) from None


def load_student_weights(student: Student, path: str | Path) -> None:
    """Take weights from a run's `model.safetensors` (a run or checkpoint folder will do), or from a tensor-only file of timm's keys.

    A classifier for another number of classes is left new, and said so. DataError where anything else differs.
    """
    path = checkpoint_file(path)
    state, _ = read_state_dict(path)
    state = {
        key.removeprefix("module.").removeprefix("model."): tensor for key, tensor in state.items()
    }
    own = student.model.state_dict()
    classifier = getattr(student.model, "pretrained_cfg", {}).get("classifier") or ()
    heads = tuple(
        f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier)
    )
    other = (
        [k for k in own if k.startswith(heads) and k in state and state[k].shape != own[k].shape]
        if heads
        else []
    )
    if other:
        old, new = state[other[0]].shape[0], own[other[0]].shape[0]
        log.warning(
            "%s has a classifier for %d classes, not %d: the student begins with a new one",
            path,
            old,
            new,
        )
        state |= {k: own[k] for k in own if k.startswith(heads)}
    load_strictly(student.model, state, path)


def save_student(path: str | Path, student: Student, extra_metadata: Mapping[str, str]) -> None:
    """Write what `student.contents` says, and more metadata."""
    state, metadata = student.contents()
    write_safetensors(path, state, {**metadata, **extra_metadata})


def load_student(path: str | Path) -> tuple[Student, dict[str, str]]:
    """The student that `save_student` wrote, in eval mode, and the file's metadata; a run or checkpoint folder will do.

    A linear probe comes with its encoder, as one model. Nothing is fetched or run because the file says so. Raises DataError for a file
    that is damaged or is not a student's.
    """
    path = checkpoint_file(path)
    state, metadata = read_state_dict(path)
    if PROBE in metadata:
        from dad_fast.models.probe import load_probe  # which needs this module

        return load_probe(path, state, metadata), metadata
    if STUDENT not in metadata:
        raise DataError(
            f"{path}: not a student of dad-fast (no {STUDENT} in its metadata); name a run's folder or its model.safetensors"
        )
    try:
        spec = checked_spec(metadata[STUDENT])
    except ValueError as error:
        raise DataError(f"{path}: its metadata {STUDENT} is damaged ({error})") from None
    student = Student(_create_as_declared(spec, state, path), spec)
    load_strictly(student.model, state, path)
    return student.eval(), metadata


def _create_as_declared(
    spec: Mapping[str, Any], state: Mapping[str, Tensor], path: Path
) -> nn.Module:
    """The new model that a file's metadata names, first without memory: its size has to be the file's."""
    arguments = spec["name"], spec["num_classes"], spec["img_size"], dict(spec["model_kwargs"])
    try:
        with no_more_parameters_than(state, path), torch.device("meta"):
            _create(*arguments, pretrained=False)
    except UsageError:
        pass  # a model that needs values while it is built; the next lines say what else may be wrong
    try:
        with no_more_parameters_than(state, path):
            return _create(*arguments, pretrained=False)
    except UsageError as error:
        raise DataError(
            f"{path}: the model that its metadata names cannot be built ({error})"
        ) from None


def checkpoint_file(path: str | Path) -> Path:
    """The weights file that `path` stands for: a file, a checkpoint folder, or a run's folder (its final model, or else its latest)."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.exists():
        raise DataError(
            f"{path}: no such checkpoint; name a run's folder, a checkpoint folder or a weights file"
        )
    for inside in ("model.safetensors", "checkpoints/latest/model.safetensors"):
        if (path / inside).is_file():
            return path / inside
    runs = sorted(p.parent for p in path.glob("*/seed-*/model.safetensors"))
    several = f"; it holds several runs, such as {runs[0]}" if runs else ""
    raise DataError(f"{path}: no model.safetensors and no checkpoints/latest here{several}")
