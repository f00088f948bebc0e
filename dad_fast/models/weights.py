"""Weights files: safetensors, and pickles that hold nothing but tensors and a few known harmless objects.

A pickle can run any code when it is opened. Here it is read by torch's `weights_only` unpickler, which knows tensors; what a
Lightning checkpoint holds besides (callbacks, omegaconf settings, NumPy scalars) becomes an object that does nothing. Every other
name in the file refuses it.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dad_fast.errors import DataError, UsageError

ASSETS = Path(__file__).resolve().parent.parent / "assets"


class Inert:
    """Stands for an object of a checkpoint that is not needed: takes any arguments and any state, keeps and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _plain_dict(*args: Any) -> dict[Any, Any]:
    return {}


# What Lightning checkpoints of VQGANs are known to hold besides tensors. The callbacks are keys of a dictionary there.
_CALLBACKS = ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping", "lr_monitor.LearningRateMonitor", "base.Callback")
_INERT = (
    *(f"{package}.callbacks.{name}" for package in ("pytorch_lightning", "lightning.pytorch") for name in _CALLBACKS),
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata", "base.Metadata")),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "String", "Integer", "Float", "Boolean")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray", "argparse.Namespace", "typing.Any"),
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "_local.PosixPath")),
    *(f"builtins.{name}" for name in ("dict", "list", "tuple", "int", "float", "str", "bool", "object")),  # omegaconf's type hints
)
_DICTS = tuple(f"{package}.utilities.parsing.AttributeDict" for package in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric"))
_STAND_INS = [*((Inert, name) for name in _INERT), *((dict, name) for name in _DICTS), (_plain_dict, "collections.defaultdict")]


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
    """Tensors by name, on the CPU, and the file's text metadata (empty for pickles). Nothing in the file is executed.

    Pickles may hold the tensors at the top, or under "state_dict" (Lightning, timm) or "model". DataError, one line with the path,
    for a file that is missing, damaged, holds anything else, or is a TorchScript archive.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such weights file; check the path")
    try:
        with open(path, "rb") as file:
            head = file.read(9)
        if path.suffix == ".safetensors" or head[8:] == b"{":
            with safe_open(path, framework="pt") as tensors:
                return {key: tensors.get_tensor(key) for key in tensors.keys()}, dict(tensors.metadata() or {})
        if zipfile.is_zipfile(path):
            _refuse_torchscript(path)
    except SafetensorError as error:
        raise DataError(f"{path}: not a safetensors file, or damaged ({_line(error)}); fetch it again") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read ({_line(error)}); fetch it again or mend its permissions") from None
    return _only_tensors(_unpickle(path), path), {}


def _unpickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_STAND_INS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about protocols: what cannot be read is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        if name := re.search(r"GLOBAL (\S+)", str(error)):
            raise DataError(
                f"{path}: refused, because it asks for {name[1]}, which weights do not need and which could run code; "
                "give a safetensors file, or one that holds only the state dict"
            ) from None
        raise DataError(f"{path}: not a weights file, or damaged; give a safetensors file, or a state dict saved by torch.save") from None
    except Exception as error:  # what the unpickler raises on garbage: EOFError, RuntimeError, KeyError, UnicodeDecodeError ...
        raise DataError(f"{path}: not a weights file, or damaged ({_line(error)}); fetch it again") from None


def _only_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path}: holds no state dict; save one by torch.save(model.state_dict(), FILE)")
    for key, value in content.items():
        if not isinstance(key, str) or type(value) not in (Tensor, nn.Parameter):
            raise DataError(f"{path}: {str(key)[:60]!r} is not a tensor; give a file that holds only a state dict")
    return {key: value.detach() for key, value in content.items()}


def _refuse_torchscript(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if not any(name.endswith("/constants.pkl") for name in archive.namelist()):
            return
    use = "give the same weights as safetensors"
    try:
        import open_clip
    except ImportError:
        pass
    else:
        # OpenAI's files keep their names: ViT-L-14.pt, RN50.pt, ViT-L-14-336px.pt.
        arch = path.stem.removesuffix("px")
        if repository := open_clip.get_pretrained_cfg(arch, "openai").get("hf_hub"):
            use = f"use open_clip_model.safetensors of {repository.strip('/')} on the Hugging Face hub, as open_clip:{arch}-quickgelu@FILE"
    raise DataError(f"{path}: a TorchScript archive (as OpenAI published CLIP), which holds code; {use}")


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and text metadata so that `path` is either the whole new file or what it was before."""
    path = Path(path)
    data = save({key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}, dict(metadata))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load `state` into `model`; DataError naming the first differing keys where names or shapes are not exactly the model's.

    Floating-point numbers take the model's dtype. A model made on the meta device takes over copies of the tensors.
    """
    own = model.state_dict()
    if problems := list(_differences(own, state)):
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise DataError(f"{path}: weights of another architecture: {'; '.join(problems[:3])}{more}")
    if any(tensor.is_meta for tensor in own.values()):
        model.load_state_dict({key: state[key].to(own[key].dtype, copy=True) for key in own}, assign=True)
    else:
        model.load_state_dict(dict(state))


def _differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterable[str]:
    yield from (f"missing {key}" for key in own if key not in state)
    yield from (f"unexpected {key}" for key in state if key not in own)
    for key in own:
        if key in state and own[key].shape != state[key].shape:
            yield f"{key} is {list(state[key].shape)}, not {list(own[key].shape)}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
