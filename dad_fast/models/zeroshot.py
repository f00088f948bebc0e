"""The zero-shot head: class names and prompts through CLIP's text tower (Radford et al., arXiv 2103.00020, section 3.1).

ImageNet's 80,000 prompts take minutes on a CPU, so a head of many prompts is kept in the cache, by what it was made from.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from dad_fast.cache import cache_dir, write_cache
from dad_fast.data.classes import ClassMap
from dad_fast.errors import DataError, UsageError
from dad_fast.models.weights.files import read_state_dict
from dad_fast.models.weights.fingerprint import fingerprint

MANY_PROMPTS = 2000
LINE_SECONDS = 10.0
SIMPLE = ("a photo of a {}.",)
_WNID = re.compile(r"n\d{8}")


def is_imagenet(classes: ClassMap) -> bool:
    """Whether every class folder is a wnid of ImageNet-1k."""
    return all(_WNID.fullmatch(folder) for folder in classes.folders) and set(
        classes.folders
    ) <= set(_imagenet_wnids())


def _imagenet_wnids() -> list[str]:
    from timm.data import ImageNetInfo

    return list(ImageNetInfo().label_names())


def imagenet_columns(classes: ClassMap) -> list[int]:
    """The output of an ImageNet-1k head that belongs to each class of `classes`, by wnid."""
    position = {wnid: i for i, wnid in enumerate(_imagenet_wnids())}
    return [position[folder] for folder in classes.folders]


def prompt_names(classes: ClassMap) -> list[str]:
    """What stands for each class in a prompt: OpenAI's names for ImageNet, else the class map's."""
    if not is_imagenet(classes):
        return classes.names
    from open_clip import IMAGENET_CLASSNAMES

    return [IMAGENET_CLASSNAMES[column] for column in imagenet_columns(classes)]


def resolve_templates(
    templates: str | Sequence[str], classes: ClassMap, own: Sequence[str] = ()
) -> list[str]:
    """Prompts with one {} each. "auto" takes the weights' `own`, else ImageNet's 80 where the classes are ImageNet's, else "simple"."""
    if not isinstance(templates, str):
        found = list(templates)
    elif templates == "auto" and own:
        found = list(own)
    elif templates == "imagenet" or (templates == "auto" and is_imagenet(classes)):
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        found = [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    elif templates in ("auto", "simple"):
        found = list(SIMPLE)
    elif Path(templates).is_file():
        found = [
            line.strip()
            for line in Path(templates).read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
    else:
        raise DataError(
            f"--templates {templates}: no such file; give auto, imagenet, simple, or a text file with one prompt a line"
        )
    wrong = [prompt for prompt in found if prompt.count("{}") != 1]
    if wrong or not found:
        raise UsageError(
            f"--templates: {wrong[0] if wrong else 'an empty list'!r}: each prompt needs one {{}} where the class name goes"
        )
    return found


def zero_shot_head(
    clip: nn.Module,
    tokenizer: Callable[[], Callable[[list[str]], Tensor]],
    names: Sequence[str],
    templates: Sequence[str],
) -> Tensor:
    """Weight [C, F] of unit rows: for each name the mean of its prompts' unit text features, made unit again.

    `tokenizer` makes the tokenizer, which is not needed where a head of many prompts is in the cache.
    """
    if len(names) * len(templates) < MANY_PROMPTS:
        return _compute(clip, tokenizer(), names, templates)
    device = next(clip.parameters()).device
    made_from = json.dumps(
        [fingerprint(clip), list(names), list(templates), device.type, torch.__version__]
    )
    path = cache_dir() / "heads" / f"{hashlib.sha256(made_from.encode()).hexdigest()}.safetensors"
    try:
        weight = read_state_dict(path)[0]["weight"].to(device)
        if (
            weight.ndim == 2
            and len(weight) == len(names)
            and torch.allclose(weight.float().norm(dim=1), weight.new_ones((), dtype=torch.float))
        ):
            return weight
    except (DataError, KeyError):  # not there yet, or damaged: it is made again
        pass
    weight = _compute(clip, tokenizer(), _counted(names), templates)
    write_cache(path, save({"weight": weight.cpu().contiguous()}))
    return weight


@torch.no_grad()
def _compute(
    clip: nn.Module,
    tokenize: Callable[[list[str]], Tensor],
    names: Sequence[str] | Iterator[str],
    templates: Sequence[str],
) -> Tensor:
    device = next(clip.parameters()).device
    rows = []
    for name in names:
        tokens = tokenize([template.replace("{}", name) for template in templates]).to(device)
        features = F.normalize(clip.encode_text(tokens).float(), dim=-1)  # [templates, F]
        rows.append(F.normalize(features.mean(dim=0), dim=-1))
    return torch.stack(rows)


def _counted(names: Sequence[str]) -> Iterator[str]:
    """The names, counted on a terminal, and elsewhere on a line now and then."""
    terminal, last = sys.stderr.isatty(), time.monotonic()
    for done, name in enumerate(names):
        if terminal or time.monotonic() - last > LINE_SECONDS:
            last = time.monotonic()
            text = f"zero-shot head: {done:,} of {len(names):,} classes"
            print(
                f"\r{text}" if terminal else text,
                end="" if terminal else "\n",
                file=sys.stderr,
                flush=True,
            )
        yield name
    if terminal:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
