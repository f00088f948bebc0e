"""PyTorch's pickled checkpoints, opened without running anything that is in them.

`torch.load(weights_only=True)` builds tensors and plain containers and refuses the rest. The Lightning checkpoints that VQGANs are
published as also name a few classes (callbacks, omegaconf's containers, numpy's scalars) that say nothing about the weights. Each of
these names, and no other, is answered by an inert stand-in, so that the real class is neither imported nor called.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.serialization import safe_globals

from dad_fast.errors import DataError


class Inert:
    """Takes the place of an object that is not needed: accepts any arguments and any state, and keeps none."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class InertDict:
    """The same for subclasses of dict: what is made is a plain dict, since torch lets a pickle set items of nothing else."""

    def __new__(cls, *args: Any) -> Any:
        return {}


_LIGHTNING = ("pytorch_lightning", "lightning.pytorch")
_CALLBACKS = ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping", "lr_monitor.LearningRateMonitor", "base.Callback")
_OMEGACONF = ("dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata", "base.Metadata")
_NODES = ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "Path", "String")
_NUMPY = ("core.multiarray.scalar", "_core.multiarray.scalar", "core.multiarray._reconstruct", "_core.multiarray._reconstruct")
_TYPES = ("bool", "dict", "float", "int", "list", "object", "str", "tuple")  # omegaconf notes what a value should be

STAND_INS: dict[str, type] = {
    **{f"{package}.callbacks.{name}": Inert for package in _LIGHTNING for name in _CALLBACKS},
    **{f"{package}.utilities.parsing.AttributeDict": InertDict for package in _LIGHTNING},
    "lightning.fabric.utilities.data.AttributeDict": InertDict,
    **{f"omegaconf.{name}": Inert for name in _OMEGACONF},
    **{f"omegaconf.nodes.{name}Node": Inert for name in _NODES},
    **{f"numpy.{name}": Inert for name in (*_NUMPY, "dtype", "ndarray")},
    **{f"builtins.{name}": Inert for name in _TYPES},
    "typing.Any": Inert,
    "argparse.Namespace": Inert,
    "collections.defaultdict": InertDict,
    **{f"{module}.{name}": Inert for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")},
}


def read_pickle(path: Path) -> Any:
    """What a file of torch.save holds, on the CPU.

    Raises DataError where the file is damaged, is a TorchScript archive, is compressed, or names anything but tensors, plain containers and
    `STAND_INS`.
    """
    entries = _archive_entries(path)
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise DataError(f"{path}: a TorchScript archive (as OpenAI published CLIP), which holds code; {_instead(path)}")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise DataError(f"{path}: compressed inside, which torch.save never does and which could be of any size; give a safetensors file")
    try:
        with safe_globals([(stand_in, name) for name, stand_in in STAND_INS.items()]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about protocols: what cannot be read is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way: EOFError, KeyError, struct.error, RuntimeError ...
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise DataError(
                f"{path}: refused, because it asks for {refused[1]}, which weights do not need and which could run code; "
                "give a safetensors file, or one that holds only the state dict"
            ) from None
        raise _damaged(path, error) from None


def _archive_entries(path: Path) -> list[zipfile.ZipInfo]:
    """Of a zip archive, as torch.save writes them; none of a bare pickle. What Python cannot list, torch does not get to read."""
    try:
        with open(path, "rb") as file:
            if file.read(2) != b"PK":
                return []
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except Exception as error:  # BadZipFile, UnicodeDecodeError, NotImplementedError, struct.error ...
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> DataError:
    why = (str(error).splitlines() or [type(error).__name__])[0][:120]
    return DataError(f"{path}: not a weights file, or damaged ({why}); fetch it again, or give a safetensors file")


def _instead(path: Path) -> str:
    """Where the weights of a TorchScript archive are to be had as safetensors."""
    try:
        import open_clip
    except ImportError:
        return "give the same weights as safetensors"
    arch = path.stem.removesuffix("px")  # OpenAI's files keep their names: ViT-L-14.pt, RN50.pt, ViT-L-14-336px.pt
    repository = open_clip.get_pretrained_cfg(arch, "openai").get("hf_hub", "").strip("/")
    if not repository:
        return "give the same weights as safetensors"
    return f"use open_clip_model.safetensors of {repository} on the Hugging Face hub, as open_clip:{arch}-quickgelu@FILE"
