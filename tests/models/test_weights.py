"""Tests of weights files: no code is executed, and unsafe files are a one-line error."""

import argparse
import collections
import io
import os
import pickle
import stat
import sys
import types
import zipfile

import pytest

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")
pytest.importorskip("safetensors")
from dad_fast.errors import DataError, UsageError
from dad_fast.models.weights.files import (
    asset,
    load_strictly,
    read_state_dict,
    sha256_file,
    write_safetensors,
)

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.zeros(2, dtype=torch.float16)}


def same(state, expected=STATE):
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert state[key].dtype == value.dtype and torch.equal(state[key], value)


def refused(path, *words):
    with pytest.raises(DataError) as error:
        read_state_dict(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 400, message
    for word in words:
        assert word in message, message


@pytest.fixture
def foreign(monkeypatch):
    """Make classes under foreign names while a file is written; remove them before it is read."""
    with monkeypatch.context() as patch:

        def make(module, name, base=object):
            for i, _ in enumerate(parts := module.split("."), start=1):
                package = ".".join(parts[:i])
                if package not in sys.modules:
                    patch.setitem(sys.modules, package, types.ModuleType(package))
            cls = type(name, (base,), {"__module__": module})
            patch.setattr(sys.modules[module], name, cls, raising=False)
            return cls

        make.undo = patch.undo
        yield make


@pytest.mark.parametrize("others", [None, {"epoch": 3}, {"args": argparse.Namespace(lr=1)}])
@pytest.mark.parametrize("under", ["state_dict", "model"])
@pytest.mark.parametrize("zipped", [True, False])
def test_tensor_pickles_load(tmp_path, others, under, zipped):
    content = collections.OrderedDict(STATE)
    torch.save(
        content if others is None else {under: content, **others},
        tmp_path / "w.pth",
        _use_new_zipfile_serialization=zipped,
    )
    state, metadata = read_state_dict(tmp_path / "w.pth")
    same(state)
    assert metadata == {}


def test_a_parameter_loads_as_a_tensor_without_gradient(tmp_path):
    torch.save({"w": torch.nn.Parameter(torch.ones(2))}, tmp_path / "w.pt")
    assert not read_state_dict(tmp_path / "w.pt")[0]["w"].requires_grad


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_lightning_checkpoint(tmp_path, foreign, package, zipped):
    checkpoint = foreign(f"{package}.callbacks.model_checkpoint", "ModelCheckpoint")
    attributes = foreign(f"{package}.utilities.parsing", "AttributeDict", dict)
    dict_config, list_config = (
        foreign("omegaconf.dictconfig", "DictConfig"),
        foreign("omegaconf.listconfig", "ListConfig"),
    )
    metadata, node = (
        foreign("omegaconf.base", "ContainerMetadata"),
        foreign("omegaconf.nodes", "AnyNode"),
    )
    config, inside = dict_config(), list_config()
    about, leaf = metadata(), node()
    about.__dict__ = {"ref_type": dict, "object_type": dict, "optional": True}
    # A cycle, as omegaconf has them
    leaf.__dict__ = {"_val": 4.5e-06, "_parent": config}
    inside.__dict__ = {"_content": [leaf], "_metadata": about}
    config.__dict__ = {"_content": {"betas": inside}, "_metadata": about}
    content = {
        "epoch": 7,
        "pytorch-lightning_version": "1.0.8",
        "callbacks": {
            checkpoint: {"best_model_score": np.float64(0.25), "best_model_path": "x.ckpt"}
        },
        "hyper_parameters": attributes(lr=1.0, config=config),
        "args": argparse.Namespace(size=np.int64(256)),
        "steps": collections.defaultdict(list, {"a": [1]}),
        "order": np.arange(3),
        "state_dict": collections.OrderedDict(STATE),
        "optimizer_states": [
            {
                "state": {0: {"step": 1, "exp_avg": torch.ones(2)}},
                "param_groups": [{"lr": 1e-3, "params": [0]}],
            }
        ],
    }
    torch.save(content, tmp_path / "last.ckpt", _use_new_zipfile_serialization=zipped)
    foreign.undo()
    allowed = set(torch.serialization.get_safe_globals())
    assert not any(name.startswith(("omegaconf", package)) for name in sys.modules)
    same(read_state_dict(tmp_path / "last.ckpt")[0])
    assert not any(name.startswith(("omegaconf", package)) for name in sys.modules)
    # Nothing of this stays allowed for the rest of the process
    assert set(torch.serialization.get_safe_globals()) == allowed


class Call:
    """Object that pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def hostile(proof, foreign):
    """Contents of hostile files; each would create the file `proof`."""
    command, source = f"touch {proof}", f"open({str(proof)!r}, 'w')"
    stand_in = foreign("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    state = foreign("omegaconf.dictconfig", "DictConfig")()
    state.__dict__ = {"_content": Call(os.system, command)}
    return {
        "system": Call(os.system, command),
        "others": {"state_dict": STATE, "callbacks": Call(os.system, command)},
        "inside": {
            "state_dict": {**STATE, "b": Call(os.system, command)},
            "model": [Call(os.system, command)],
        },
        "eval": {"state_dict": STATE, "x": Call(eval, source)},
        "exec": {"state_dict": STATE, "x": Call(exec, source)},
        "argument": {"state_dict": STATE, "x": Call(stand_in, Call(os.system, command))},
        "state": {"state_dict": STATE, "x": state},
        "getattr": {"state_dict": STATE, "x": Call(getattr, Call(__import__, "os"), "system")},
        "make": {"state_dict": STATE, "x": Call(open, str(proof), "w")},
    }


@pytest.mark.parametrize("form", ["zip", "old", "bare", "protocol 4"])
@pytest.mark.parametrize(
    "what", ["system", "others", "inside", "eval", "exec", "argument", "state", "getattr", "make"]
)
def test_hostile_pickles_have_no_effect(tmp_path, foreign, what, form):
    proof, path = tmp_path / "proof", tmp_path / "w.ckpt"
    content = hostile(proof, foreign)[what]
    if form == "bare":
        if isinstance(content, dict):
            content.pop("state_dict")  # tensors need torch.save
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(
            content,
            path,
            _use_new_zipfile_serialization=form != "old",
            pickle_protocol=4 if form == "protocol 4" else 2,
        )
    foreign.undo()
    refused(path, "safetensors")
    assert not proof.exists()


def test_the_error_names_the_refused_class(tmp_path):
    torch.save({"state_dict": STATE, "x": Call(os.getcwd)}, tmp_path / "w.ckpt")
    refused(tmp_path / "w.ckpt", f"{os.name}.getcwd", "give a safetensors file")
    torch.save({"state_dict": STATE, "x": Call(eval, "1")}, tmp_path / "w.ckpt")
    refused(tmp_path / "w.ckpt", "eval")


def test_torchscript_error_names_the_safetensors_file(tmp_path):
    # The members that tell one
    with zipfile.ZipFile(tmp_path / "ViT-L-14.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py", "version"):
            archive.writestr(f"ViT-L-14/{name}", b"")
    refused(tmp_path / "ViT-L-14.pt", "TorchScript", "safetensors")
    pytest.importorskip("open_clip")
    refused(
        tmp_path / "ViT-L-14.pt",
        "timm/vit_large_patch14_clip_224.openai",
        "open_clip:ViT-L-14-quickgelu@FILE",
    )
    (tmp_path / "ViT-L-14.pt").rename(tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "give the same weights as safetensors")


def test_files_without_a_state_dict_are_refused(tmp_path):
    for content in (
        torch.ones(3),
        [torch.ones(3)],
        {},
        {"state_dict": {}},
        {"a": 1, "b": torch.ones(1)},
        {3: torch.ones(1)},
        None,
        "text",
    ):
        torch.save(content, tmp_path / "w.pt")
        refused(tmp_path / "w.pt", "state dict", "safetensors")


def files(tmp_path):
    write_safetensors(tmp_path / "w.safetensors", STATE, {})
    whole = (tmp_path / "w.safetensors").read_bytes()
    for zipped in (True, False):
        data = io.BytesIO()
        torch.save(STATE, data, _use_new_zipfile_serialization=zipped)
        yield from (
            data.getvalue()[:n]
            for n in (2, 9, 60, len(data.getvalue()) // 2, len(data.getvalue()) - 7)
        )
    yield from (whole[:n] for n in (1, 8, 9, 40, len(whole) - 3))
    yield b"\xff" * 8 + b"{" + whole[9:]
    yield b""
    yield b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    yield b"<html>404</html>"
    yield bytes(range(256)) * 8
    yield b"\x80\x02}q\x00."


def test_damaged_files_are_refused(tmp_path):
    for i, data in enumerate(files(tmp_path)):
        path = tmp_path / f"{i}.bin"
        path.write_bytes(data)
        refused(path)


def test_missing_files_are_refused(tmp_path):
    refused(tmp_path / "none.pt", "no such weights file")
    refused(tmp_path, "a folder")


def test_safetensors_round_trip(tmp_path):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {**STATE, "t": STATE["a.weight"].T}, {"note": "ü"})
    state, metadata = read_state_dict(path)
    same(state, {**STATE, "t": STATE["a.weight"].T})
    assert metadata == {"note": "ü"} and len(sha256_file(path)) == 64
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_flipped_bit_of_a_written_file_is_detected(tmp_path):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, STATE, {"crop_pct": "0.875"})
    data = path.read_bytes()
    names = [
        range(start, start + len(name))
        for name in (b"__metadata__", b"dad_fast.sha256")
        for start in [data.index(name)]
    ]
    for bit in range(0, 8 * len(data), 7):
        if any(bit // 8 in name for name in names):  # the file then has no seal
            continue
        path.write_bytes(
            data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]
        )
        with pytest.raises(DataError):
            read_state_dict(path)


@pytest.mark.parametrize("magic", [b"\x80", b"PK"])
def test_a_header_length_that_looks_like_another_format(tmp_path, magic):
    """The first bytes of safetensors are a number, which may look like another format."""
    length = int.from_bytes(magic, "little")
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length)
    (tmp_path / "w.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + b"\0\0\x80\x3f"
    )
    assert (tmp_path / "w.safetensors").read_bytes().startswith(magic)
    same(read_state_dict(tmp_path / "w.safetensors")[0], {"a": torch.ones(1)})


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, STATE, {})
    before = path.read_bytes()

    def full(handle):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_safetensors(path, {"a": torch.ones(9)}, {})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_strict_loading_names_the_first_differing_keys():
    layer = torch.nn.Linear(3, 2)
    with pytest.raises(
        DataError,
        match="w.pt: weights of another architecture: missing weight; missing bias; unexpected a.weight and 1 ",
    ):
        load_strictly(layer, STATE, "w.pt")
    with pytest.raises(DataError, match=r"weight is \[2, 4\], not \[2, 3\]"):
        load_strictly(layer, {"weight": torch.ones(2, 4), "bias": torch.ones(2)}, "w.pt")
    load_strictly(layer, {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, "w.pt")
    assert torch.equal(layer.weight, torch.ones(2, 3))


def test_unknown_embedded_file():
    with pytest.raises(UsageError, match="no embedded file nothing.safetensors"):
        asset("nothing.safetensors")
