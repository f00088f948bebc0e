"""Reading weights files safely: safetensors, tensor-only pickles, and Lightning checkpoints with inert stand-ins."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dad_fast.errors import DataError, UsageError

ASSETS = Path(__file__).resolve().parent.parent / "assets"


def asset(name: str) -> Path:
    """Path of the embedded weights file `name`. UsageError where no such file is embedded."""
    path = ASSETS / name
    if not path.is_file():
        raise UsageError(f"no embedded file {name}: there are {', '.join(sorted(p.name for p in ASSETS.glob('*.safetensors'))) or 'none'}")
    return path


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state_dict(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name and the file's text metadata (empty for pickles). DataError where the file cannot be read safely."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such weights file: check the path")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})
    except SafetensorError as error:
        raise DataError(f"{path}: not a safetensors file, or damaged ({error}): fetch it again") from error


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and text metadata so that `path` is either the whole new file or what it was before."""
    path = Path(path)
    data = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, dict(metadata))
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load `state` into `model`; DataError naming the first differing keys where names or shapes are not exactly the model's."""
    own = model.state_dict()
    missing = [f"missing {key}" for key in own if key not in state]
    unexpected = [f"unexpected {key}" for key in state if key not in own]
    differing = [
        f"{key} is {list(state[key].shape)}, not {list(own[key].shape)}" for key in own if key in state and state[key].shape != own[key].shape
    ]
    if problems := missing + unexpected + differing:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise DataError(f"{path}: weights of another architecture: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(dict(state))
