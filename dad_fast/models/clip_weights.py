"""CLIPs of open_clip with their weights: by tag or hub name, or from a local file.

A local file needs the name of its architecture, unless its metadata describes the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dad_fast.config.fields import nearest
from dad_fast.errors import DataError, EnvironmentProblem, UsageError
from dad_fast.models.teacher import UNKNOWN
from dad_fast.models.weights.declared import TEACHER, checked_clip, checked_published
from dad_fast.models.weights.files import load_strictly, read_state_dict, sha256_file
from dad_fast.models.weights.hub import hub_client, reason_of
from dad_fast.models.weights.limits import no_more_parameters_than, without_downloads
from dad_fast.models.weights.published import published_weights
from dad_fast.models.weights.unwrap import unwrap

try:
    import open_clip
except ImportError:
    raise EnvironmentProblem(
        "--teacher: open_clip is missing; pip install open_clip_torch"
    ) from None

log = logging.getLogger(__name__)

Tokenizer = Callable[[list[str]], Tensor]

# Preprocessing of images, by open_clip's keys, for weights that do not record their own
OPENAI: Mapping[str, Any] = {
    "mean": open_clip.OPENAI_DATASET_MEAN,
    "std": open_clip.OPENAI_DATASET_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}

# Entries of the text tower, which some models keep under "text."
TEXT_TOWER = (
    "text_projection",
    "positional_embedding",
    "token_embedding",
    "transformer.",
    "ln_final.",
)


@dataclass(frozen=True)
class Clip:
    """A loaded CLIP and the settings that belong to its weights."""

    model: nn.Module
    # Called only if prompts are needed; some tokenizers need files of the hub
    tokenizer: Callable[[], Tokenizer]
    # The keys of OPENAI
    preprocess: Mapping[str, Any]
    templates: Sequence[str] = ()
    provenance: str = UNKNOWN
    sha256: str | None = None


def clip_from_own_file(
    path: str | Path, state: dict[str, Tensor], metadata: Mapping[str, str]
) -> Clip:
    """Load the content of a file whose metadata describes its CLIP. Raises DataError."""
    if TEACHER not in metadata:
        raise DataError(
            f"--teacher {path}: the file does not name its architecture; write "
            f"open_clip:ARCH@{path} or timm:NAME@{path}"
        )
    try:
        described = checked_clip(metadata[TEACHER])
        model = _clip_within(described["model_cfg"], state, path)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise DataError(f"--teacher {path}: its metadata {TEACHER} is damaged ({reason})") from None
    _load(model, state, path)
    context_length = described["model_cfg"]["text_cfg"]["context_length"]
    return Clip(
        model,
        tokenizer=lambda: open_clip.SimpleTokenizer(context_length=context_length),
        preprocess={**OPENAI, "mean": described["mean"], "std": described["std"]},
        templates=described["templates"],
        provenance=described["seen"] or UNKNOWN,
        sha256=sha256_file(path),
    )


def _clip_within(
    model_cfg: Mapping[str, Any], state: Mapping[str, Tensor], path: str | Path
) -> nn.Module:
    """Build the CLIP of a file's metadata, first on the meta device to check its size."""
    # Some models need values while they are built. The next lines report any other error.
    with no_more_parameters_than(state, path), torch.device("meta"), suppress(RuntimeError):
        open_clip.CLIP(**model_cfg)
    with no_more_parameters_than(state, path):
        model: nn.Module = open_clip.CLIP(**model_cfg)
    return model


def clip_from_weights(arch: str, file: str) -> Clip:
    """Load local weights of a named architecture. Raises UsageError and DataError."""
    config = _known_arch(arch)
    state, _ = read_state_dict(file)
    published = _published_config(Path(file))
    own_model_cfg = published.get("model_cfg", {})
    quick_gelu = bool(config.get("quick_gelu"))
    if own_model_cfg and bool(own_model_cfg.get("quick_gelu")) != quick_gelu:
        right = arch.removesuffix("-quickgelu") if quick_gelu else f"{arch}-quickgelu"
        raise UsageError(
            f"--teacher open_clip:{arch}@{file}: the open_clip_config.json next to it names "
            f"another activation; write {right}"
        )
    sha256 = sha256_file(file)
    known = published_weights(Path(file), sha256)
    if known is not None and known.quick_gelu != quick_gelu:
        activation = "QuickGELU" if known.quick_gelu else "GELU"
        raise UsageError(
            f"--teacher open_clip:{arch}@{file}: these are the published weights "
            f"{known.arch}/{known.tag}, which use {activation}; write "
            f"open_clip:{known.teacher_arch}@{file}"
        )
    with without_downloads():
        model = _create(f"open_clip:{arch}@{file}", arch, pretrained_text=False)
    _load(model, state, file)
    preprocess = _preprocess(arch, published)
    log.warning(
        "teacher %s: architecture %s with %s, mean %s, std %s, as named or published for it; "
        "OpenAI's own weights need an ARCH-quickgelu",
        file,
        arch,
        "QuickGELU" if quick_gelu else "GELU",
        [round(value, 4) for value in preprocess["mean"]],
        [round(value, 4) for value in preprocess["std"]],
    )
    return Clip(model, lambda: _tokenizer_at_hand(arch), preprocess, sha256=sha256)


def clip_from_tag(name: str, arch: str, tag: str) -> Clip:
    """Load published weights by tag. Raises UsageError for a wrong tag, EnvironmentProblem."""
    config = _known_arch(arch)
    published = open_clip.get_pretrained_cfg(arch, tag)
    if not published:
        tags = open_clip.list_pretrained_tags_by_model(arch)
        hint = nearest(tag, tags) or (f"; it has {', '.join(tags[:6])}" if tags else "")
        raise UsageError(
            f"--teacher {name}: {arch} has no weights {tag!r}{hint}; local weights are "
            f"open_clip:{arch}@FILE"
        )
    # The activation belongs to the weights: the other one costs several points of accuracy without
    # an error.
    quick_gelu = bool(published.get("quick_gelu"))
    if config.get("quick_gelu") and not quick_gelu:
        raise UsageError(
            f"--teacher {name}: these weights use GELU; write "
            f"open_clip:{arch.removesuffix('-quickgelu')}/{tag}"
        )
    return clip_from_hub(name, arch, pretrained=tag, force_quick_gelu=quick_gelu)


def clip_from_hub(name: str, arch: str, **kwargs: Any) -> Clip:
    """Download published weights. Raises EnvironmentProblem if they are not available."""
    model = _create(name, arch, require_pretrained=True, **kwargs)
    return Clip(model, lambda: _tokenizer(arch), {**OPENAI, **model.visual.preprocess_cfg})


def clip_without_weights(name: str, arch: str) -> Clip:
    """Build a CLIP with meta tensors for weights. Downloads nothing.

    Raises UsageError for an unknown architecture, EnvironmentProblem for one whose configuration is
    not available.
    """
    if not name.startswith("hf-hub:"):
        _known_arch(arch)
    with without_downloads(), torch.device("meta"):
        model = _create(name, arch, device="meta", load_weights=False, pretrained_text=False)
    return Clip(model, lambda: _tokenizer_at_hand(arch), {**OPENAI, **model.visual.preprocess_cfg})


def _create(name: str, arch: str, **kwargs: Any) -> Any:
    try:
        with hub_client():
            return open_clip.create_model(arch, **kwargs)
    except Exception as error:
        # open_clip, the hub's client and urllib each have errors of their own.
        raise EnvironmentProblem(
            f"--teacher {name}: not available ({reason_of(error)}); give a local file: open_clip:ARCH@FILE"
        ) from None


def _tokenizer_at_hand(arch: str) -> Tokenizer:
    """Make the tokenizer of a local weights file without downloads from the hub."""
    with without_downloads():
        return _tokenizer(arch)


def _tokenizer(arch: str) -> Tokenizer:
    try:
        with hub_client():
            tokenizer: Tokenizer = open_clip.get_tokenizer(arch)
        return tokenizer
    except ImportError as error:
        # Errors that transformers raises itself do not name the package that it lacks.
        needed = (
            f"the package {error.name}" if error.name else f"another package: {reason_of(error)}"
        )
        raise EnvironmentProblem(
            f"--teacher {arch}: its tokenizer needs {needed}; pip install "
            f"{error.name or 'it'}, or give --teacher-head, which needs no prompts"
        ) from None
    except Exception as error:
        raise EnvironmentProblem(
            f"--teacher {arch}: its tokenizer's files are not available ({reason_of(error)}); fill the hub's "
            "cache on a machine with a network, or give --teacher-head, which needs no prompts"
        ) from None


def _known_arch(arch: str) -> dict[str, Any]:
    # With a colon or a slash in the name, open_clip would ask the hub or read a folder.
    config = None if set(arch) & set(":/") else open_clip.get_model_config(arch)
    if config is None:
        raise UsageError(
            f"--teacher open_clip:{arch}: open_clip has no such "
            f"architecture{nearest(arch, open_clip.list_models())}"
        )
    return dict(config)


def _published_config(file: Path) -> dict[str, Any]:
    """Read the open_clip_config.json next to the weights; empty if there is none."""
    path = file.with_name("open_clip_config.json")
    if not path.is_file():
        return {}
    try:
        return checked_published(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: not the JSON that open_clip writes ({error}); download it again or move it "
            "away from the weights"
        ) from None


def _preprocess(arch: str, published_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the preprocessing of local weights.

    It is that of the file next to them, else the settings that all published weights of `arch`
    share, else OpenAI's.
    """
    given = published_config.get("preprocess_cfg", {})
    if "mean" in given and "std" in given:
        return {**OPENAI, **given}
    published = [
        open_clip.get_pretrained_cfg(arch, tag)
        for tag in open_clip.list_pretrained_tags_by_model(arch)
    ]
    shared = {}
    for key in OPENAI:
        values = {str(cfg[key]): cfg[key] for cfg in published}
        if len(values) == 1:
            (shared[key],) = values.values()
    if published and not {"mean", "std"} <= shared.keys():
        log.warning(
            "published weights of %s differ in mean and std: using OpenAI's, unless there is an "
            "open_clip_config.json next to them",
            arch,
        )
        return dict(OPENAI)
    return {**OPENAI, **shared}


def _load(model: Any, state: dict[str, Tensor], path: str | Path) -> None:
    """Load strictly, after adapting the entries of files by other versions of open_clip."""
    own = model.state_dict()
    state = {
        key: value.float() if value.is_floating_point() else value
        for key, value in unwrap(state, path, own).items()
    }
    if "positional_embedding" in state and "text.positional_embedding" in own:
        state = {
            f"text.{key}" if key.startswith(TEXT_TOWER) else key: value
            for key, value in state.items()
        }
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in own and scalar in state and state[scalar].numel() == 1:
            state[scalar] = state[scalar].reshape(own[scalar].shape)
    load_strictly(model, state, path)
