"""PyTorch's pickled checkpoints, opened without running anything that is in them.

`torch.load(weights_only=True)` builds tensors and plain containers and refuses the rest. The Lightning checkpoints that VQGANs are
published as also name a few classes (callbacks, omegaconf's containers, numpy's scalars) that say nothing about the weights. Each of
these names, and no other, is answered by an inert stand-in, so that the real class is neither imported nor called.
"""

from __future__ import annotations

import io
import os
import pickletools
import re
import struct
import warnings
import zipfile
from _compat_pickle import (
    IMPORT_MAPPING,
    NAME_MAPPING,
)  # what torch, too, makes of the names of Python 2
from pathlib import Path
from typing import IO, Any

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
_CALLBACKS = (
    "model_checkpoint.ModelCheckpoint",
    "early_stopping.EarlyStopping",
    "lr_monitor.LearningRateMonitor",
    "base.Callback",
)
_OMEGACONF = (
    "dictconfig.DictConfig",
    "listconfig.ListConfig",
    "base.ContainerMetadata",
    "base.Metadata",
)
_NODES = ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "Path", "String")
_NUMPY = (
    "core.multiarray.scalar",
    "_core.multiarray.scalar",
    "core.multiarray._reconstruct",
    "_core.multiarray._reconstruct",
)
_TYPES = (
    "bool",
    "dict",
    "float",
    "int",
    "list",
    "object",
    "str",
    "tuple",
)  # omegaconf notes what a value should be

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
    **{
        f"{module}.{name}": Inert
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath")
    },
}

# Of what torch would call itself, what weights need: not torch.FloatTensor(10**10) and its kind, which fill the memory.
_KNOWN = re.compile(
    r"torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state|sparse_tensor|qtensor|meta_tensor_no_storage)"
    r"|torch\.(storage\.|cuda\.)?[A-Z]\w*Storage|torch\.[a-z]\w*|torch\.Size|torch\.serialization\._get_layout"
    r"|torch\.nn\.parameter\.Parameter|collections\.(OrderedDict|Counter)|builtins\.(set|complex)|_codecs\.encode"
)
_LEGACY_PICKLES = (
    5  # of a file without an archive: magic number, version, system, content, keys of what follows
)


def read_pickle(path: Path) -> Any:
    """What a file of torch.save holds, on the CPU.

    Raises DataError where the file is damaged, is a TorchScript archive, is compressed, or names anything but tensors, plain containers and
    `STAND_INS`. Names are looked at before anything is built, for torch itself lets a pickle fill the memory by some of them.
    """
    try:
        with open(path, "rb") as file:
            is_zip = file.read(2) == b"PK"
            file.seek(0)
            names = _names_in_archive(path) if is_zip else _names(file, _LEGACY_PICKLES)
        if refused := sorted(
            name for name in names if not (name in STAND_INS or _KNOWN.fullmatch(name))
        ):
            raise DataError(
                f"{path}: refused, because it asks for {ascii(refused[0])[1:-1][:100]}, which weights do not need and which could do harm; "
                "give a safetensors file, or one that holds only the state dict"
            )
        with (
            safe_globals([(stand_in, name) for name, stand_in in STAND_INS.items()]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # about protocols: what cannot be read is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way: EOFError, KeyError, struct.error, RuntimeError ...
        raise _damaged(path, error) from None


def _names_in_archive(path: Path) -> set[str]:
    """The names in an archive's pickle, as torch finds it."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise DataError(
            f"{path}: a TorchScript archive (as OpenAI published CLIP), which holds code; {_instead(path)}"
        )
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise DataError(
            f"{path}: compressed inside, which torch.save never does and which could be of any size; give a safetensors file"
        )
    _check_directory(path)
    return _names(io.BytesIO(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")), 1)


def _check_directory(path: Path) -> None:
    """Raises ValueError unless the archive's list of entries lies where its end says, right before it.

    Python takes the list that lies before the end, torch the one that the end points to: a forged file could have two.
    """
    with open(path, "rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - 98))
        tail = (
            file.read()
        )  # the end in 64 bits (56 bytes), where that is, 20 bytes, and the end, 22 bytes
    stop = length - 22
    size, start = struct.unpack("<LL", tail[-10:-2])
    if tail[-42:-38] == b"PK\x06\x07":
        stop = length - 98
        size, start = struct.unpack("<QQ", tail[40:56])
        if tail[:4] != b"PK\x06\x06" or struct.unpack("<Q", tail[-34:-26]) != (stop,):
            raise ValueError("its list of entries cannot be found")
    if tail[-22:-18] != b"PK\x05\x06" or start + size != stop:
        raise ValueError("its list of entries is not where its end says")


def _names(file: IO[bytes], pickles: int) -> set[str]:
    """Every name that the next `pickles` ask for, as MODULE.NAME of Python 3. Nothing is built.

    Raises ValueError for instructions that ask for a name in another way than torch.save does.
    """
    found = set()
    for _ in range(pickles):
        for instruction, argument, _ in pickletools.genops(file):
            if instruction.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
                raise ValueError(f"its pickle has the instruction {instruction.name}")
            if instruction.name == "GLOBAL":
                module, _, name = str(argument).partition(" ")
                module, name = NAME_MAPPING.get(
                    (module, name), (IMPORT_MAPPING.get(module, module), name)
                )
                found.add(f"{module}.{name}")
    return found


def _damaged(path: Path, error: Exception) -> DataError:
    said = re.search(r"WeightsUnpickler error: (.+)", str(error))
    why = said[1] if said else (str(error).splitlines() or [type(error).__name__])[0]
    why = why[:120]
    return DataError(
        f"{path}: not a weights file, or damaged ({why}); fetch it again, or give a safetensors file"
    )


def _instead(path: Path) -> str:
    """Where the weights of a TorchScript archive are to be had as safetensors."""
    try:
        import open_clip
    except ImportError:
        return "give the same weights as safetensors"
    arch = path.stem.removesuffix(
        "px"
    )  # OpenAI's files keep their names: ViT-L-14.pt, RN50.pt, ViT-L-14-336px.pt
    repository = open_clip.get_pretrained_cfg(arch, "openai").get("hf_hub", "").strip("/")
    if not repository:
        return "give the same weights as safetensors"
    return f"use open_clip_model.safetensors of {repository} on the Hugging Face hub, as open_clip:{arch}-quickgelu@FILE"
