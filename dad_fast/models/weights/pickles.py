"""Reader of PyTorch's pickled checkpoints that executes nothing in them.

`torch.load(weights_only=True)` builds tensors and plain containers and refuses the rest. Published
VQGANs are Lightning checkpoints, which also name a few classes (callbacks, omegaconf's containers,
numpy's scalars) that the weights do not need. Each of these names, and no other, maps to an inert
stand-in, so that the real class is neither imported nor called.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickletools
import re
import struct
import warnings
import zipfile

# torch maps the names of Python 2 by these tables, too.
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from pathlib import Path
from typing import IO, Any

import torch
from torch.serialization import safe_globals

from dad_fast.errors import DataError
from dad_fast.models.weights.published import published_weights


class Inert:
    """Stand-in for an unneeded object: accepts any arguments and any state, and keeps none."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class InertDict:
    """Stand-in for subclasses of dict.

    Makes a plain dict, the only type whose items torch lets a pickle set.
    """

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
# omegaconf records the expected type of a value.
_TYPES = ("bool", "dict", "float", "int", "list", "object", "str", "tuple")

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

# The names torch allows that weights need. Others, such as torch.FloatTensor(10**10), would fill
# the memory.
_KNOWN = re.compile(
    r"torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state|sparse_tensor|qtensor|meta_tensor_no_storage)"
    r"|torch\.(storage\.|cuda\.)?[A-Z]\w*Storage|torch\.[a-z]\w*|torch\.Size|torch\.serialization\._get_layout"
    r"|torch\.nn\.parameter\.Parameter|collections\.(OrderedDict|Counter)|builtins\.(set|complex)|_codecs\.encode"
)
# Pickles in a file without an archive: magic number, version, system, content, storage keys
_LEGACY_PICKLES = 5


def read_pickle(path: Path) -> Any:
    """Return the content of a torch.save file, on the CPU.

    Raises DataError if the file is damaged, compressed or a TorchScript archive, or if it names
    anything but tensors, plain containers and `STAND_INS`. Names are checked before anything is
    built, since some that torch allows fill the memory.
    """
    try:
        with open(path, "rb") as file:
            is_zip = file.read(2) == b"PK"
            file.seek(0)
            names = _names_in_archive(path) if is_zip else _names(file, _LEGACY_PICKLES)
        refused = sorted(
            name for name in names if name not in STAND_INS and not _KNOWN.fullmatch(name)
        )
        if refused:
            raise DataError(
                f"{path}: refused, because it asks for {ascii(refused[0])[1:-1][:100]}, which "
                "weights do not need and which could do harm; "
                "give a safetensors file, or one that holds only the state dict"
            )
        with (
            safe_globals([(stand_in, name) for name, stand_in in STAND_INS.items()]),
            warnings.catch_warnings(),
        ):
            # Warnings about protocols; errors are reported below.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except Exception as error:
        # A damaged pickle fails in many ways: EOFError, KeyError, struct.error, RuntimeError ...
        raise _damaged(path, error) from None


def _names_in_archive(path: Path) -> set[str]:
    """Return the names in an archive's pickle, located as torch locates it."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise DataError(
            f"{path}: a TorchScript archive (as OpenAI published CLIP), which holds code; "
            f"{_instead(path)}"
        )
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise DataError(
            f"{path}: compressed inside, which torch.save never does and which could be of any "
            "size; give a safetensors file"
        )
    _check_directory(path)
    return _names(io.BytesIO(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")), 1)


def _check_directory(path: Path) -> None:
    """Raise ValueError unless the end record points to the list of entries right before it.

    Python reads the list before the end record, torch the one that the record points to: a forged
    file could have two.
    """
    with open(path, "rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - 98))
        # End record in 64 bits (56 bytes), its location (20 bytes), end record (22 bytes)
        tail = file.read()
    stop = length - 22
    size, start = struct.unpack("<LL", tail[-10:-2])
    if tail[-42:-38] == b"PK\x06\x07":
        stop = length - 98
        size, start = struct.unpack("<QQ", tail[40:56])
        if tail[:4] != b"PK\x06\x06" or struct.unpack("<Q", tail[-34:-26]) != (stop,):
            raise ValueError("its list of entries cannot be found")
    if tail[-22:-18] != b"PK\x05\x06" or start + size != stop:
        raise ValueError("its list of entries is not where its end record points")


def _names(file: IO[bytes], pickles: int) -> set[str]:
    """Return every name in the next `pickles` pickles, as MODULE.NAME of Python 3.

    Raises ValueError for instructions that torch.save does not use to refer to a name.
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
    found = re.search(r"WeightsUnpickler error: (.+)", str(error))
    reason = found[1] if found else (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(
        f"{path}: not a weights file, or damaged ({reason[:120]}); download it again, or give a "
        "safetensors file"
    )


def _instead(path: Path) -> str:
    """Say which safetensors file has the weights of a TorchScript archive."""
    try:
        import open_clip
    except ImportError:
        return "give the same weights as safetensors"
    with open(path, "rb") as file:
        known = published_weights(path, hashlib.file_digest(file, "sha256").hexdigest())
    # OpenAI's files are named by architecture: ViT-L-14.pt, RN50.pt, ViT-L-14-336px.pt.
    arch = known.arch if known else path.stem.removesuffix("px")
    repository = open_clip.get_pretrained_cfg(arch, "openai").get("hf_hub", "").strip("/")
    if not repository:
        return "give the same weights as safetensors"
    return (
        f"use open_clip_model.safetensors of {repository} on the Hugging Face hub, "
        f"as open_clip:{arch}-quickgelu@FILE"
    )
