"""Weights files: safetensors, and PyTorch checkpoints as `dad_fast.models.weights.pickles` reads them; written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dad_fast.errors import DataError, UsageError
from dad_fast.files import atomic_write_bytes
from dad_fast.models.weights.pickles import read_pickle

_SMALL = 1 << 20  # bytes that a tensor may be expanded to
_SEAL = "dad_fast.sha256"  # in the metadata of what we write: of the whole file, with _OPEN in this place
_OPEN = "0" * 64
ASSETS = Path(__file__).resolve().parents[2] / "assets"


def asset(name: str) -> Path:
    """Path of the embedded weights file `name`. UsageError where no such file is embedded."""
    path = ASSETS / name
    if not path.is_file():
        raise UsageError(
            f"no embedded file {name}: there are {', '.join(sorted(p.name for p in ASSETS.glob('*.safetensors'))) or 'none'}"
        )
    return path


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state_dict(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, on the CPU, and the file's text metadata (empty for pickles), of a safetensors file or a PyTorch checkpoint.

    Of a checkpoint {"state_dict": ...} or {"model": ...} that entry is taken. Nothing in a file is executed: see
    `dad_fast.models.weights.pickles`. Raises DataError where the file is missing, damaged, or holds anything that cannot be read safely.
    A file of `write_safetensors` is damaged when any bit of it has changed (but for the name of its seal: then it has none).
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"{path}: {'a folder, not a' if path.is_dir() else 'no such'} weights file: check the path"
        )
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}): check its permissions"
        ) from error
    # safetensors: eight bytes for the length of the header, then the header, which is JSON. Asked first, since those bytes may be any.
    if start[8:] != b"{":
        if start.startswith(
            (b"PK", b"\x80")
        ):  # a zip archive, or a bare pickle as torch wrote before 1.6
            return _tensors(read_pickle(path), path), {}
        what = "empty" if not start else "neither safetensors nor a PyTorch checkpoint"
        raise DataError(
            f"{path}: {what}: fetch it again, or check that it is the weights themselves and not a page or a pointer to them"
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors, metadata = (
                {key: file.get_tensor(key) for key in file.keys()},
                dict(file.metadata() or {}),
            )
        seal = metadata.pop(_SEAL, None)
        if seal is not None and seal != _digest(path, seal):
            raise DataError(
                f"{path}: damaged, or changed since it was written: take it from a copy, or leave {_SEAL} out of its metadata"
            )
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path}: not a safetensors file, or damaged ({error}): fetch it again"
        ) from error
    return tensors, metadata


def _digest(path: Path, seal: str) -> str:
    with open(path, "rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
        hashed = hashlib.sha256(length + header.replace(seal.encode(), _OPEN.encode(), 1))
        while chunk := file.read(1 << 24):
            hashed.update(chunk)
    return hashed.hexdigest()


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in what a checkpoint holds."""
    if isinstance(content, dict):
        content = next(
            (content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)),
            content,
        )
    if not isinstance(content, dict) or not content:
        raise DataError(
            f"{path}: holds no state dict, neither bare nor under state_dict or model: save one with safetensors"
        )
    for key, value in content.items():
        if not isinstance(key, str) or type(value) not in (Tensor, nn.Parameter):
            raise DataError(
                f"{path}: its entry {str(key)[:60]!r} is no tensor, so this is no state dict: save one with safetensors"
            )
        if not _is_plain(value):
            raise DataError(
                f"{path}: its tensor {key[:60]!r} is sparse, quantized, without values or larger than what is stored of it"
            )
    if (
        sum(value.numel() * value.element_size() for value in content.values())
        > 4 * path.stat().st_size + _SMALL
    ):
        raise DataError(
            f"{path}: its tensors are views of the same numbers again and again; save a state dict with safetensors"
        )
    return {key: value.detach() for key, value in content.items()}


def _is_plain(tensor: Tensor) -> bool:
    """Values in memory, as many as it says: one stored number may otherwise stand for a tensor of any size."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= max(tensor.untyped_storage().nbytes(), _SMALL)


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors and text metadata so that `path` is either the whole new file or what it was before, and damage to it shows."""
    held = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    data = _ordered(save(held, {**metadata, _SEAL: _OPEN}))
    seal, quoted = (
        hashlib.sha256(data).hexdigest(),
        f'"{_SEAL}":"%s"',
    )  # such quotes stand nowhere else before the tensors
    atomic_write_bytes(path, data.replace((quoted % _OPEN).encode(), (quoted % seal).encode(), 1))


def _ordered(data: bytes) -> bytes:
    """The same safetensors file with its metadata in order: the library's order is random, and equal runs should be equal files."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load `state` into `model`; DataError naming the first differing keys where names or shapes are not exactly the model's.

    Floating-point numbers take the model's dtype. A model made on the meta device takes over copies of the tensors.
    """
    own = model.state_dict()
    if problems := list(_differences(own, state)):
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise DataError(f"{path}: weights of another architecture: {'; '.join(problems[:3])}{more}")
    if any(tensor.is_meta for tensor in own.values()):
        model.load_state_dict(
            {key: state[key].to(own[key].dtype, copy=True) for key in own}, assign=True
        )
    else:
        model.load_state_dict(dict(state))


def _differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterable[str]:
    yield from (f"missing {key}" for key in own if key not in state)
    yield from (f"unexpected {key}" for key in state if key not in own)
    for key in own:
        if key in state and own[key].shape != state[key].shape:
            yield f"{key} is {list(state[key].shape)}, not {list(own[key].shape)}"
