"""`dad-fast doctor --weights FILE`: name a weights file by its hash, or describe its content.

Nothing in the file is executed, see `models/weights/pickles.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.names import shown
from dad_fast.discretizers.vqgan.config import PRESETS, config_from_json, infer_config
from dad_fast.errors import DadFastError, DataError
from dad_fast.models.weights.declared import CLASSES, PROBE, STUDENT, TEACHER, checked_spec
from dad_fast.models.weights.files import read_state_dict, sha256_file
from dad_fast.models.weights.published import PublishedFile, published_file, published_weights
from dad_fast.models.weights.unwrap import unwrap
from dad_fast.tools.doctor.row import Row, render

VQGAN = "dad_fast.vqgan"
# Entries that are shown of an unknown file.
SHOWN_KEYS = 4


def run(file: str) -> int:
    """Print the rows. Returns 0, or raises DataError for a file that is missing or unreadable."""
    path = Path(file)
    if not path.is_file():
        problem = "a folder, not a file" if path.is_dir() else "no such file"
        raise DataError(f"--weights {path}: {problem}")
    digest = sha256_file(path)
    print(render(Row("file", "ok", f"{path.stat().st_size:,} bytes, SHA-256 {digest}")))
    for row in identify(path, digest):
        print(render(row, whole_words=True))
    return 0


def identify(path: Path, sha256: str) -> Iterator[Row]:
    """Yield rows for the published entry of a file, or, without one, for its content."""
    entry = published_file(sha256)
    if entry is not None:
        yield from _published_rows(entry, path)
        return
    known = _in_open_clips_table(path, sha256)
    if known:
        yield known
        return
    yield Row(
        "published",
        "off",
        "unknown: not one of the files of docs/weights.md with a known hash, nor of open_clip's "
        "table; below is what it contains",
    )
    state, metadata = read_state_dict(path)
    yield from _content(path, state, metadata)


def _published_rows(entry: PublishedFile, path: Path) -> Iterator[Row]:
    licence = entry.licence or "not known"
    yield Row("published", "ok", f"{entry.name}, {entry.file} of {entry.page}; licence: {licence}")
    if entry.argument:
        yield Row("use", "ok", entry.argument.replace("FILE", str(path)))
    if entry.note:
        yield Row("note", "ok", entry.note)


def _in_open_clips_table(path: Path, sha256: str) -> Row | None:
    try:
        known = published_weights(path, sha256)
    except ImportError:
        return None
    if known is None:
        return None
    argument = f"--teacher open_clip:{known.teacher_arch}@{path}"
    return Row("published", "ok", f"open_clip's {known.arch}/{known.tag}; use: {argument}")


def _content(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[Row]:
    numbers = sum(tensor.numel() for tensor in state.values())
    yield Row("content", "ok", f"{len(state):,} tensors, {numbers / 1e6:,.1f} M numbers")
    known = _of_dad_fast(path, state, metadata) or _by_keys(path, unwrap(state, path))
    if known is not None:
        yield known
        return
    first = ", ".join(f"{shown(key)} {list(state[key].shape)}" for key in list(state)[:SHOWN_KEYS])
    yield Row("model", "off", f"no architecture recognized; its first entries: {first}")


def _of_dad_fast(
    path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Row | None:
    """Describe a file of this project by its metadata."""
    try:
        if VQGAN in metadata:
            config = config_from_json(metadata[VQGAN], path)
            return _vqgan(path, config)
        if TEACHER in metadata:
            return Row("model", "ok", f"a CLIP that names its architecture; use: --teacher {path}")
        if PROBE in metadata:
            return Row(
                "model", "ok", f"a linear probe; use: --teacher-head {path}, or dad-fast eval"
            )
        if STUDENT in metadata:
            name = checked_spec(metadata[STUDENT])["name"]
            what = f"a student of dad-fast, {shown(name)}"
            if CLASSES in metadata:
                what += f", {len(ClassMap.from_json(metadata[CLASSES]))} classes"
            return Row("model", "ok", f"{what}; use: --teacher {path}, --init-from {path}")
    except (DadFastError, ValueError) as error:
        return Row("model", "wrong", f"its metadata is damaged ({error})")
    return None


def _by_keys(path: Path, state: Mapping[str, Tensor]) -> Row | None:
    """Guess the architecture of a published state dict from its keys and shapes."""
    if "quantize.embedding.weight" in state:
        try:
            return _vqgan(path, infer_config(state, path))
        except DataError as error:
            return Row("model", "wrong", str(error))
    if "quantize.embed.weight" in state:
        return Row("model", "off", "a Gumbel VQGAN, which has another quantizer: not supported")
    if "visual.conv1.weight" in state and any("token_embedding" in key for key in state):
        names = _clip_names(state)
        what = "a CLIP with the keys of open_clip and OpenAI"
        if not names:
            return Row("model", "off", f"{what}, of no architecture that open_clip lists")
        fits = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        return Row(
            "model",
            "ok",
            f"{what}; its shapes fit {fits}; use: --teacher open_clip:ARCH@{path}; OpenAI's own "
            "weights need a name with -quickgelu",
        )
    if "blocks.0.attn.qkv.weight" in state and "patch_embed.proj.weight" in state:
        width, _, patch, _ = state["patch_embed.proj.weight"].shape
        return _timm(path, state, f"vision transformer, width {width}, patch {patch}")
    if "layer1.0.conv1.weight" in state:
        depths = [_count(state, f"layer{number}.") for number in (1, 2, 3, 4)]
        return _timm(path, state, f"ResNet with blocks {depths}")
    return None


def _vqgan(path: Path, config: Any) -> Row:
    preset = next((name for name, known in PRESETS.items() if known == config), "")
    what = (
        f"VQGAN, one of {config.n_embed:,} codes for {config.downsample} x {config.downsample} px"
    )
    shape = f", the shape of {preset}" if preset else ""
    return Row("model", "ok", f"{what}{shape}; use: --discretizer {path}")


def _timm(path: Path, state: Mapping[str, Tensor], what: str) -> Row:
    blocks = _count(state, "blocks.")
    depth = f", {blocks} blocks" if blocks else ""
    head = next((state[key] for key in ("head.weight", "fc.weight") if key in state), None)
    outputs = "no classifier" if head is None else f"{head.shape[0]:,} outputs"
    return Row(
        "model",
        "ok",
        f"{what}{depth}, with timm's or torchvision's keys; {outputs}; use: --student-weights "
        f"{path}, or --teacher timm:NAME@{path}",
    )


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Return the number of modules in a list that is called `prefix`."""
    return len({key.split(".")[prefix.count(".")] for key in state if key.startswith(prefix)})


def _clip_names(state: Mapping[str, Tensor]) -> list[str]:
    """Return the architectures of open_clip with these shapes; [] without open_clip."""
    try:
        import open_clip
    except ImportError:
        return []
    conv = state["visual.conv1.weight"]
    if not {"visual.proj", "visual.positional_embedding", "token_embedding.weight"} <= set(state):
        return []
    positions = state["visual.positional_embedding"].shape[0] - 1
    patch = conv.shape[-1]
    ours = {
        "embed_dim": state["visual.proj"].shape[1],
        "width": conv.shape[0],
        "layers": _count(state, "visual.transformer.resblocks."),
        "patch_size": patch,
        "image_size": patch * round(positions**0.5),
        "text_width": state["token_embedding.weight"].shape[1],
    }
    found = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name) or {}
        vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
        theirs = {
            "embed_dim": config.get("embed_dim"),
            **{key: vision.get(key) for key in ("width", "layers", "patch_size", "image_size")},
            "text_width": text.get("width"),
        }
        if theirs == ours:
            found.append(name)
    return found
