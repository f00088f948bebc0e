"""Weights files: read safetensors and PyTorch checkpoints, write safetensors, load strictly."""

from __future__ import annotations

import hashlib
import json
import logging
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

log = logging.getLogger(__name__)

ASSETS = Path(__file__).resolve().parents[2] / "assets"

# Bytes that a tensor of a pickle may be expanded to
_SMALL = 1 << 20

# Metadata key of files that we write: SHA-256 of the whole file, with _OPEN in place of the hash
_SEAL = "dad_fast.sha256"
_OPEN = "0" * 64


def asset(name: str) -> Path:
    """Return the path of the embedded weights file `name`. Raises UsageError if there is none."""
    path = ASSETS / name
    if not path.is_file():
        known = sorted(file.name for file in ASSETS.glob("*.safetensors"))
        raise UsageError(f"no embedded file {name}: there are {', '.join(known) or 'none'}")
    return path


def sha256_file(path: str | Path) -> str:
    """Return the hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(module: nn.Module) -> str:
    """Return the hex SHA-256 of all parameters and persistent buffers.

    It covers name, dtype, shape and bytes, in the order of the names.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_state_dict(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file or a PyTorch checkpoint.

    Returns tensors by name, on the CPU, and text metadata (empty for pickles).
    Of a checkpoint {"state_dict": ...} or {"model": ...} that entry is read, or its average (EMA)
    in "state_dict_ema" or "model_ema", as timm does. No code in a file is executed: see
    `pickles.py`. Raises DataError if the file is missing, damaged or unsafe to read.
    Any changed bit of a file by `write_safetensors` counts as damage, unless it hits the name of
    its checksum's key.
    """
    path = Path(path)
    if not path.is_file():
        problem = "a folder, not a" if path.is_dir() else "no such"
        raise DataError(f"{path}: {problem} weights file: check the path")
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}): check its permissions"
        ) from error

    # safetensors: eight bytes for the length of the header, then the header, which is JSON. This
    # test comes first, since the eight bytes may look like the start of any other format.
    is_safetensors = start[8:] == b"{"
    # A zip archive, or a bare pickle as torch wrote before 1.6
    is_pickle = start.startswith((b"PK", b"\x80"))
    if is_pickle and not is_safetensors:
        return _tensors(read_pickle(path), path), {}
    if not is_safetensors:
        problem = "neither safetensors nor a PyTorch checkpoint" if start else "empty"
        raise DataError(
            f"{path}: {problem}: download it again, and check that it is the weights and not a web "
            "page or a Git LFS pointer"
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            metadata = dict(file.metadata() or {})
        seal = metadata.pop(_SEAL, None)
        if seal is not None and seal != _digest(path, seal):
            raise DataError(
                f"{path}: damaged, or changed since it was written: take it from a copy, or leave "
                f"{_SEAL} out of its metadata"
            )
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path}: not a safetensors file, or damaged ({error}): download it again"
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
    """Return the state dict in the content of a checkpoint. Raises DataError for anything else."""
    if isinstance(content, dict):
        for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
            if isinstance(content.get(key), dict):
                content = content[key]
                if key.endswith("_ema"):
                    log.warning("%s: read its averaged weights (%s)", path, key)
                break
    if not isinstance(content, dict) or not content:
        raise DataError(
            f"{path}: holds no state dict, neither bare nor under state_dict or model: save one "
            "with safetensors"
        )
    for key, value in content.items():
        if not isinstance(key, str) or type(value) not in (Tensor, nn.Parameter):
            raise DataError(
                f"{path}: its entry {str(key)[:60]!r} is no tensor, so this is no state dict: save "
                "one with safetensors"
            )
        if not _is_plain(value):
            raise DataError(
                f"{path}: its tensor {key[:60]!r} is sparse, quantized, without values or larger "
                "than its storage"
            )
    num_bytes = sum(value.numel() * value.element_size() for value in content.values())
    if num_bytes > 4 * path.stat().st_size + _SMALL:
        raise DataError(
            f"{path}: its tensors are views of the same numbers again and again; save a state dict "
            "with safetensors"
        )
    return {key: value.detach() for key, value in content.items()}


def _is_plain(tensor: Tensor) -> bool:
    """Return whether all values are in memory: an expanded tensor could be of any size."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= max(tensor.untyped_storage().nbytes(), _SMALL)


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors and metadata atomically, with a checksum that `read_state_dict` verifies."""
    held = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    data = _ordered(save(held, {**metadata, _SEAL: _OPEN}))
    seal = hashlib.sha256(data).hexdigest()
    # Unescaped quotes make this match unique in the header, which precedes the tensors.
    quoted = f'"{_SEAL}":"%s"'
    atomic_write_bytes(path, data.replace((quoted % _OPEN).encode(), (quoted % seal).encode(), 1))


def _ordered(data: bytes) -> bytes:
    """Sort the metadata of a safetensors file.

    The library's order is random, and equal runs should write equal files.
    """
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load `state` into `model`.

    Raises DataError, naming the first differing keys, unless names and shapes are the model's.

    Floating-point numbers take the model's dtype. A model on the meta device gets copies of the
    tensors.
    """
    own = model.state_dict()
    problems = list(_differences(own, state))
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        if set(own) == set(state):
            what = "weights of this architecture in another size"
        elif set(own) > set(state):
            what = "incomplete, or weights of another architecture"
        else:
            what = "weights of another architecture"
        raise DataError(f"{path}: {what}: {'; '.join(problems[:3])}{more}")
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
