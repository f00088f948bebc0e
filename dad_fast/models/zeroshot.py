"""Zero-shot head: class names and prompts through CLIP's text tower.

Source: Radford et al., arXiv 2103.00020, section 3.1.

ImageNet's 80,000 prompts take minutes on a CPU, so a head of many prompts is cached, under a hash
of all that it depends on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from dad_fast.cache import cache_dir, write_cache
from dad_fast.data.classes import ClassMap
from dad_fast.errors import DataError, UsageError
from dad_fast.files import read_text
from dad_fast.models.weights.files import fingerprint, read_state_dict

log = logging.getLogger(__name__)

# Number of prompts from which on a head is cached
MANY_PROMPTS = 2000
# Cosine of two text embeddings from which on their classes are named as nearly alike
NEARLY_ALIKE = 0.999
# Seconds between progress lines where stderr is no terminal
LINE_SECONDS = 10.0
SIMPLE = ("a photo of a {}.",)
_WNID = re.compile(r"n\d{8}")


def is_imagenet(classes: ClassMap) -> bool:
    """Return whether every class folder is a wnid of ImageNet-1k."""
    return all(_WNID.fullmatch(folder) for folder in classes.folders) and set(
        classes.folders
    ) <= set(_imagenet_wnids())


def _imagenet_wnids() -> list[str]:
    from timm.data import ImageNetInfo

    return list(ImageNetInfo().label_names())


def imagenet_columns(classes: ClassMap) -> list[int]:
    """Return the index of each class of `classes` in an ImageNet-1k head, by wnid."""
    position = {wnid: i for i, wnid in enumerate(_imagenet_wnids())}
    return [position[folder] for folder in classes.folders]


def prompt_names(classes: ClassMap) -> list[str]:
    """Return the names of classes in prompts: OpenAI's for ImageNet, else the class map's."""
    if not is_imagenet(classes):
        return classes.names
    from open_clip import IMAGENET_CLASSNAMES

    return [IMAGENET_CLASSNAMES[column] for column in imagenet_columns(classes)]


def resolve_templates(
    templates: str | Sequence[str], classes: ClassMap, own: Sequence[str] = ()
) -> list[str]:
    """Return prompts with one {} each.

    "auto" takes the weights' `own`, else the 80 of ImageNet for its classes, else "simple".

    Raises DataError for a file that does not exist, UsageError for a prompt without exactly one {}.
    """
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
        lines = [line.strip() for line in read_text(templates).splitlines()]
        found = [line for line in lines if line]
    else:
        raise DataError(
            f"--templates {templates}: no such file; give auto, imagenet, simple, or a text file "
            "with one prompt a line"
        )
    wrong = [prompt for prompt in found if prompt.count("{}") != 1]
    if wrong or not found:
        problem = repr(wrong[0]) if wrong else "an empty list"
        raise UsageError(
            f"--templates: {problem}: each prompt needs one {{}} where the class name goes"
        )
    return found


def zero_shot_head(
    clip: nn.Module,
    tokenizer: Callable[[], Callable[[list[str]], Tensor]],
    names: Sequence[str],
    templates: Sequence[str],
) -> Tensor:
    """Return the weight [C, F] of a zero-shot head.

    Each row is the mean of the normalised text features of a name's prompts, normalised again.

    `tokenizer` makes the tokenizer, and is not called for a cached head.
    """
    if len(names) * len(templates) < MANY_PROMPTS:
        tokenize = tokenizer()
        _warn_of_cut_prompts(tokenize, names, templates)
        return _compute(clip, tokenize, names, templates)
    device = next(clip.parameters()).device
    made_from = json.dumps(
        [fingerprint(clip), list(names), list(templates), device.type, torch.__version__]
    )
    path = cache_dir() / "heads" / f"{hashlib.sha256(made_from.encode()).hexdigest()}.safetensors"
    try:
        weight = read_state_dict(path)[0]["weight"].to(device)
        if _is_head(weight, len(names)):
            return weight
    except (DataError, KeyError):
        # Not cached yet, or damaged: compute it.
        pass
    tokenize = tokenizer()
    _warn_of_cut_prompts(tokenize, names, templates)
    weight = _compute(clip, tokenize, _counted(names), templates)
    write_cache(path, save({"weight": weight.cpu().contiguous()}))
    return weight


def check_distinct(weight: Tensor, classes: ClassMap) -> None:
    """Check that no two classes have the same row of length 1 in a zero-shot head [C, F].

    Logits of such classes are equal, so the teacher never predicts the second one and the filter
    drops all of its adversarial images. Raises DataError; for ImageNet's own names, of which two
    pairs are equal, it logs a warning. It also logs one for rows that are nearly alike.
    """
    names = [
        f"{folder} ({name!r})"
        for folder, name in zip(classes.folders, prompt_names(classes), strict=True)
    ]
    _, groups, sizes = weight.unique(dim=0, return_inverse=True, return_counts=True)
    alike = [
        [names[i] for i in (groups == group).nonzero().flatten().tolist()]
        for group in (sizes > 1).nonzero().flatten().tolist()
    ]
    if alike:
        problem = (
            f"the teacher cannot tell apart {_listed(alike)}: their prompts are equal to its text "
            "tower"
        )
        if not is_imagenet(classes):
            raise DataError(f"{problem}; give these classes different names in a --class-map")
        log.warning("%s; their logits are equal", problem)

    pairs = []
    for i, row in enumerate(weight):
        is_near = (weight[i + 1 :] @ row >= NEARLY_ALIKE) & (groups[i + 1 :] != groups[i])
        pairs += [[names[i], names[i + 1 + j]] for j in is_near.nonzero().flatten().tolist()]
    if pairs:
        more = f" and {len(pairs) - 3:,} more pairs" if len(pairs) > 3 else ""
        log.warning(
            "the teacher can hardly tell apart %s%s: the cosine of their text embeddings is %g or "
            "more; give these classes more different names in a --class-map, or more --templates",
            _listed(pairs),
            more,
            NEARLY_ALIKE,
        )


def _listed(groups: Sequence[Sequence[str]]) -> str:
    return "; ".join(" and ".join(group[:3]) for group in groups[:3])


def _warn_of_cut_prompts(
    tokenize: Callable[[list[str]], Tensor], names: Sequence[str], templates: Sequence[str]
) -> None:
    """Log a warning if the longest prompt does not fit into the text tower's context."""
    prompt = max(templates, key=len).replace("{}", max(names, key=len))
    tokens, longer = tokenize([prompt, prompt + " a"])
    if torch.equal(tokens, longer):
        log.warning(
            "the prompt %r is cut after %d tokens, the text tower's context; shorten the class "
            "name (--class-map) or the prompt (--templates)",
            prompt[:80],
            len(tokens),
        )


def _is_head(weight: Tensor, num_classes: int) -> bool:
    """Return whether `weight` has one normalised row for each class."""
    if weight.ndim != 2 or len(weight) != num_classes:
        return False
    norms = weight.float().norm(dim=1)
    return torch.allclose(norms, torch.ones_like(norms))


def _compute(
    clip: nn.Module,
    tokenize: Callable[[list[str]], Tensor],
    names: Sequence[str] | Iterator[str],
    templates: Sequence[str],
) -> Tensor:
    from open_clip import build_zero_shot_classifier

    device = next(clip.parameters()).device
    # Functions, not format strings: a prompt may hold other braces.
    prompts = [partial(template.replace, "{}") for template in templates]
    rows = [
        build_zero_shot_classifier(clip, tokenize, [name], prompts, device=device)[:, 0]
        for name in names
    ]
    return torch.stack(rows)


def _counted(names: Sequence[str]) -> Iterator[str]:
    """Yield the names and print progress, every `LINE_SECONDS` where stderr is no terminal."""
    is_terminal, last = sys.stderr.isatty(), time.monotonic()
    for done, name in enumerate(names):
        if is_terminal or time.monotonic() - last > LINE_SECONDS:
            last = time.monotonic()
            text = f"zero-shot head: {done:,} of {len(names):,} classes"
            start, end = ("\r", "") if is_terminal else ("", "\n")
            print(f"{start}{text}", end=end, file=sys.stderr, flush=True)
        yield name
    if is_terminal:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
