"""Teachers of open_clip: published weights by tag or hub name, local weights of a named architecture, or a file that names its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dad_fast.config.fields import nearest
from dad_fast.config.schema import PrecisionConfig, TeacherConfig
from dad_fast.data.classes import ClassMap
from dad_fast.errors import DataError, EnvironmentProblem, UsageError
from dad_fast.models.student import PROBE
from dad_fast.models.teacher import TEACHER, UNKNOWN, Teacher, check_classes
from dad_fast.models.weights.declared import (
    checked_clip,
    checked_published,
    no_more_parameters_than,
    without_downloads,
)
from dad_fast.models.weights.files import asset, load_strictly, read_state_dict, sha256_file
from dad_fast.models.weights.fingerprint import fingerprint
from dad_fast.models.zeroshot import prompt_names, resolve_templates, zero_shot_head

try:
    import open_clip
except ImportError:
    raise EnvironmentProblem(
        "--teacher: open_clip is missing; pip install open_clip_torch"
    ) from None

log = logging.getLogger(__name__)

Tokenizer = Callable[[list[str]], Tensor]
Head = tuple[
    Tensor, Tensor, bool
]  # weight [C, F], bias [C], and whether its features are made unit
OPENAI: Mapping[
    str, Any
] = {  # how an image becomes pixels, in open_clip's words, where nothing says otherwise
    "mean": open_clip.OPENAI_DATASET_MEAN,
    "std": open_clip.OPENAI_DATASET_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


@dataclass(frozen=True)
class Clip:
    """A loaded CLIP and what belongs to its weights."""

    model: nn.Module
    tokenizer: Callable[[], Tokenizer]  # made when prompts are; some need files of the hub
    preprocess: Mapping[str, Any]  # the keys of OPENAI
    templates: Sequence[str] = ()
    provenance: str = UNKNOWN
    sha256: str | None = None


def load_clip_teacher(
    cfg: TeacherConfig, classes: ClassMap, precision: PrecisionConfig, device: torch.device
) -> Teacher:
    """open_clip:ARCH/TAG, open_clip:ARCH@FILE, hf-hub:REPO, embedded:NAME, or FILE; see `teacher.load_teacher`."""
    if cfg.name.startswith("open_clip:"):
        arch, at, file = cfg.name.removeprefix("open_clip:").partition("@")
        clip = _from_weights(arch, file) if at else _from_tag(cfg.name, *arch.partition("/")[::2])
    elif cfg.name.startswith("hf-hub:"):
        clip = _published(cfg.name, cfg.name)
    else:
        clip = _from_own_file(cfg.name)
    model = clip.model.eval().to(device)
    size = model.visual.image_size
    tower = ImageTower(model.visual)
    weight, bias, unit_features = (
        _read_head(cfg.head, classes, tower)
        if cfg.head
        else _zero_shot(clip, model, classes, cfg.templates)
    )
    return Teacher(
        tower,
        (weight, bias),
        name=cfg.name,
        classes=classes,
        image_size=size[0] if isinstance(size, (tuple, list)) else size,
        mean=clip.preprocess["mean"],
        std=clip.preprocess["std"],
        precision=precision,
        unit_features=unit_features,
        provenance=clip.provenance,
        weights_sha256=clip.sha256,
        interpolation="bilinear"
        if clip.preprocess["interpolation"] == "bilinear"
        else "bicubic",  # "random" is for training
        squashed=clip.preprocess["resize_mode"] == "squash",
    )


class ImageTower(nn.Module):
    """CLIP's image tower and projection, without the text tower, which is not needed once the head is made."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, x: Tensor) -> Tensor:
        features = self.visual(x)
        return (
            features[0] if isinstance(features, tuple) else features
        )  # CoCa's tower returns its tokens too


def _from_own_file(name: str) -> Clip:
    path = (
        asset(f"{name.removeprefix('embedded:')}-clip.safetensors")
        if name.startswith("embedded:")
        else name
    )
    state, metadata = read_state_dict(path)
    if TEACHER not in metadata:
        raise DataError(
            f"--teacher {path}: the file does not name its architecture; write open_clip:ARCH@{path} or timm:NAME@{path}"
        )
    try:
        described = checked_clip(metadata[TEACHER])
        model = _clip_within(described["model_cfg"], state, path)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise DataError(f"--teacher {path}: its metadata {TEACHER} is damaged ({why})") from None
    _load(model, state, path)
    context = described["model_cfg"]["text_cfg"]["context_length"]
    tokenizer = lambda: open_clip.SimpleTokenizer(context_length=context)  # noqa: E731
    seen = described["seen"] or UNKNOWN
    preprocess = {**OPENAI, "mean": described["mean"], "std": described["std"]}
    return Clip(model, tokenizer, preprocess, described["templates"], seen, sha256_file(path))


def _clip_within(
    model_cfg: Mapping[str, Any], state: Mapping[str, Tensor], path: str | Path
) -> nn.Module:
    """A new CLIP of the shape that a file says, first without memory: its size has to be the file's."""
    with (
        no_more_parameters_than(state, path),
        torch.device("meta"),
        suppress(RuntimeError),
    ):  # where values are needed, as in the next lines
        open_clip.CLIP(**model_cfg)
    with no_more_parameters_than(state, path):
        model: nn.Module = open_clip.CLIP(**model_cfg)
    return model


def _from_weights(arch: str, file: str) -> Clip:
    config = _known_arch(arch)
    state, _ = read_state_dict(file)
    own = _beside(Path(file))
    quick, says = bool(config.get("quick_gelu")), own.get("model_cfg", {}).get("quick_gelu")
    if own.get("model_cfg") and bool(says) != quick:
        right = arch.removesuffix("-quickgelu") if quick else f"{arch}-quickgelu"
        raise UsageError(
            f"--teacher open_clip:{arch}@{file}: the open_clip_config.json beside it says another activation; write {right}"
        )
    with without_downloads():
        model = _create(f"open_clip:{arch}@{file}", arch, pretrained_text=False)
    _load(model, state, file)
    preprocess = _preprocess(arch, own)
    log.warning(
        "teacher %s: architecture %s with %s, mean %s, std %s, as named or published for it; OpenAI's own weights need an ARCH-quickgelu",
        *(
            file,
            arch,
            "QuickGELU" if quick else "GELU",
            *([round(x, 4) for x in preprocess[key]] for key in ("mean", "std")),
        ),
    )
    return Clip(model, lambda: _tokenizer_at_hand(arch), preprocess, sha256=sha256_file(file))


def _from_tag(name: str, arch: str, tag: str) -> Clip:
    config = _known_arch(arch)
    published = open_clip.get_pretrained_cfg(arch, tag)
    if not published:
        tags = open_clip.list_pretrained_tags_by_model(arch)
        hint = nearest(tag, tags) or (f"; it has {', '.join(tags[:6])}" if tags else "")
        raise UsageError(
            f"--teacher {name}: {arch} has no weights {tag!r}{hint}; local weights are open_clip:{arch}@FILE"
        )
    # The activation belongs to the weights: with the other one CLIP is silently several points worse.
    quick = bool(published.get("quick_gelu"))
    if config.get("quick_gelu") and not quick:
        raise UsageError(
            f"--teacher {name}: these weights use GELU; write open_clip:{arch.removesuffix('-quickgelu')}/{tag}"
        )
    return _published(name, arch, pretrained=tag, force_quick_gelu=quick)


def _published(name: str, arch: str, **kwargs: Any) -> Clip:
    model = _create(name, arch, require_pretrained=True, **kwargs)
    return Clip(model, lambda: _tokenizer(arch), {**OPENAI, **model.visual.preprocess_cfg})


def _create(name: str, arch: str, **kwargs: Any) -> Any:
    try:
        with _quiet():
            return open_clip.create_model(arch, **kwargs)
    except Exception as error:  # open_clip, the hub's client and urllib each have their own errors
        why = " ".join(str(error).split())[:120]
        raise EnvironmentProblem(
            f"--teacher {name}: cannot be had ({why}); give a local file: open_clip:ARCH@FILE"
        ) from None


def _tokenizer_at_hand(arch: str) -> Tokenizer:
    """For weights in a local file: nobody named the hub, which some tokenizers would be fetched from."""
    with without_downloads():
        return _tokenizer(arch)


def _tokenizer(arch: str) -> Tokenizer:
    try:
        with _quiet():
            tokenizer: Tokenizer = open_clip.get_tokenizer(arch)
        return tokenizer
    except Exception as error:
        why = " ".join(str(error).split())[:120]
        raise EnvironmentProblem(
            f"--teacher {arch}: its tokenizer's files cannot be had ({why}); fill the hub's cache on a machine with a network, "
            "or give --teacher-head, which needs no prompts"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip logs that a model has no weights yet, and what failed; here the one is meant and the other raised."""
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _known_arch(arch: str) -> dict[str, Any]:
    config = (
        None if set(arch) & set(":/") else open_clip.get_model_config(arch)
    )  # which would ask the hub, or read a folder
    if config is None:
        raise UsageError(
            f"--teacher open_clip:{arch}: open_clip has no such architecture{nearest(arch, open_clip.list_models())}"
        )
    return dict(config)


def _beside(file: Path) -> dict[str, Any]:
    """The open_clip_config.json that the hub keeps beside the weights; empty where there is none."""
    path = file.with_name("open_clip_config.json")
    if not path.is_file():
        return {}
    try:
        return checked_published(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: not the JSON that open_clip writes ({error}); fetch it again or move it away from the weights"
        ) from None


def _preprocess(arch: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """Preprocessing of local weights: what the file beside them says, else what all published weights of `arch` share, else OpenAI's."""
    beside = own.get("preprocess_cfg", {})
    if "mean" in beside and "std" in beside:
        return {**OPENAI, **beside}
    published = [
        open_clip.get_pretrained_cfg(arch, tag)
        for tag in open_clip.list_pretrained_tags_by_model(arch)
    ]
    shared = {
        key: found[0]
        for key in OPENAI
        if len(found := list({str(cfg[key]): cfg[key] for cfg in published}.values())) == 1
    }
    if published and not {"mean", "std"} <= shared.keys():
        log.warning(
            "published weights of %s differ in mean and std: OpenAI's are taken, unless an open_clip_config.json lies beside",
            arch,
        )
        return dict(OPENAI)
    return {**OPENAI, **shared}


def _load(model: Any, state: dict[str, Tensor], path: str | Path) -> None:
    """Load strictly, after the changes of names and shapes between open_clip's versions."""
    state = {
        key.removeprefix("module."): value.float() if value.is_floating_point() else value
        for key, value in state.items()
    }
    own = model.state_dict()
    for leftover in (
        "input_resolution",
        "context_length",
        "vocab_size",
        "text.transformer.embeddings.position_ids",
    ):
        if leftover not in own:
            state.pop(leftover, None)
    if "positional_embedding" in state and "text.positional_embedding" in own:
        towers = (
            "text_projection",
            "positional_embedding",
            "token_embedding",
            "transformer.",
            "ln_final.",
        )
        state = {
            f"text.{key}" if key.startswith(towers) else key: value for key, value in state.items()
        }
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in own and scalar in state and state[scalar].numel() == 1:
            state[scalar] = state[scalar].reshape(own[scalar].shape)
    load_strictly(model, state, path)


def _zero_shot(clip: Clip, model: Any, classes: ClassMap, templates: str | Sequence[str]) -> Head:
    """Weight [C, F] times logit_scale, and bias [C]: SigLIP's logit_bias, else 0."""
    weight = zero_shot_head(
        model,
        clip.tokenizer,
        prompt_names(classes),
        resolve_templates(templates, classes, clip.templates),
    )
    bias = getattr(model, "logit_bias", None)
    return (
        weight * model.logit_scale.detach().exp().float(),
        torch.full((len(classes),), 0.0 if bias is None else float(bias)),
        True,
    )


def _read_head(path: str, classes: ClassMap, tower: ImageTower) -> Head:
    """A linear head: weight [C, F], bias [C] or none, and perhaps its class list. It is a fine-tuned one on image features as they are,
    or a linear probe of this very encoder, which says what its features were.
    """
    state, metadata = read_state_dict(path)
    weight, bias = state.get("weight"), state.get("bias")
    if weight is None or weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise DataError(
            f"--teacher-head {path}: needs a tensor weight [classes, features], and optionally bias [classes]"
        )
    if weight.shape[0] != len(classes):
        raise DataError(
            f"--teacher-head {path}: it has {weight.shape[0]} outputs, the data {len(classes)} classes; give its --class-map"
        )
    check_classes(f"--teacher-head {path}", metadata, classes)
    features = getattr(tower.visual, "output_dim", weight.shape[1])
    if features != weight.shape[1]:
        raise DataError(
            f"--teacher-head {path}: it takes {weight.shape[1]} features, the teacher has {features}; give this teacher's head"
        )
    unit = False
    if PROBE in metadata:
        from dad_fast.models.probe import check_encoder, probe_spec

        spec = probe_spec(Path(path), metadata)
        check_encoder(str(path), spec, fingerprint(tower))
        unit = spec["unit_features"]
    return weight.float(), torch.zeros(len(classes)) if bias is None else bias.float(), unit
