"""Tests of hostile pickles: no code runs, memory is bounded, and each is a quick one-line error."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from dad_fast.errors import DataError
from dad_fast.models.weights.files import read_state_dict
from tests.limits import cpu_limit


def refused(path: Path, *words: str) -> None:
    """Expect a one-line DataError within seconds."""
    with cpu_limit(), pytest.raises(DataError) as caught:
        read_state_dict(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600 and all(word in message for word in words), (
        message
    )


def test_a_compressed_checkpoint_is_refused(tmp_path: Path) -> None:
    """Torch would read compressed entries, so a small file could fill the memory."""
    torch.save({"w": torch.zeros(2_000_000)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    assert (tmp_path / "bomb.pth").stat().st_size < 20_000
    refused(tmp_path / "bomb.pth", "bomb.pth", "compressed inside", "safetensors")


@pytest.mark.parametrize(
    ("at", "byte"), [(0.6754430976643836, 0x40), (0.875, 0x80)], ids=["its version", "a name"]
)
def test_an_archive_that_zipfile_cannot_list_never_reaches_torch(
    tmp_path: Path, at: float, byte: int
) -> None:
    """Regression test, found by fuzzing: such an archive escaped the checks of its content."""
    torch.save({"state_dict": {"a.weight": torch.zeros(2, 3)}}, tmp_path / "w.pth")
    content = bytearray((tmp_path / "w.pth").read_bytes())
    for position in range(int(at * len(content)), len(content)):
        changed = content.copy()
        changed[position] = byte
        (tmp_path / "w.pth").write_bytes(changed)
        try:
            zipfile.ZipFile(tmp_path / "w.pth").close()
        # What zipfile raises for an unknown compression or a damaged name.
        except (NotImplementedError, UnicodeDecodeError):
            refused(tmp_path / "w.pth", "w.pth", "damaged")
            return
        except zipfile.BadZipFile:
            pass
    raise AssertionError("no such byte")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(1).expand(10**12),
        lambda: torch.zeros(3, device="meta"),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8),
    ],
    ids=["one number as a trillion", "no values", "sparse", "quantized"],
)
def test_tensors_larger_than_their_storage_are_refused(
    tmp_path: Path, make: Callable[[], Any]
) -> None:
    torch.save({"w": make()}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "w.pth", "tensor 'w'")


def test_views_of_stored_tensors_load(tmp_path: Path) -> None:
    torch.save(
        {"w": torch.arange(12.0).view(3, 4).t(), "v": torch.ones(1).expand(5)}, tmp_path / "w.pth"
    )
    state, _ = read_state_dict(tmp_path / "w.pth")
    assert torch.equal(state["w"], torch.arange(12.0).view(3, 4).t())
    assert torch.equal(state["v"], torch.ones(5))


def pickled(expression: str, path: Path) -> Path:
    """Archive of torch.save whose pickle is {"w": expression}, with four bytes of storage."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}U\x01w" + expression.encode("latin-1") + b"s.")
        for name, content in (("version", b"3\n"), ("byteorder", b"little"), ("data/0", bytes(4))):
            archive.writestr(f"x/{name}", content)
    return path


MANY = "\x8a\x05\0\0\0\0\x02"  # 2**33
BYTES = (
    "((U\x07storagectorch\nBoolStorage\nU\x010U\x03cpuK\x04tQK\0("
    + MANY
    + "t(K\0t\x89ccollections\nOrderedDict\n)RtR"
)
BOMBS = {
    "bytes": f"cbuiltins\nbytearray\n{MANY}\x85R",
    "bytes of Python 2": f"c__builtin__\nbytearray\n{MANY}\x85R",
    "a tensor": f"ctorch\nDoubleTensor\n{MANY}\x85R",
    "a copy of one number": "ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n(ctorch._utils\n_rebuild_tensor_v2\n"
    + BYTES
    + "ctorch\nfloat64\nU\x03cpu\x89tR",
    "a subclass": "ctorch._utils\n_rebuild_wrapper_subclass\n)R",
}


@pytest.mark.parametrize("expression", BOMBS.values(), ids=BOMBS)
def test_pickles_that_would_fill_the_memory_are_refused(tmp_path: Path, expression: str) -> None:
    """With torch.load(weights_only=True) these few bytes would become eight gigabytes and more."""
    refused(
        pickled(expression, tmp_path / "w.pth"),
        "w.pth: refused, because it asks for",
        "safetensors",
    )


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_no_pickle_protocol_executes_code(tmp_path: Path, protocol: int, zipped: bool) -> None:
    class Call:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "made"),)

    content = pickle.dumps({"w": Call()}, protocol)
    if zipped:
        with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
            archive.writestr("x/data.pkl", content)
            archive.writestr("x/version", "3\n")
    else:
        (tmp_path / "w.pth").write_bytes(content)
    refused(tmp_path / "w.pth", "w.pth")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "instructions",
    [
        "\x82\x01",
        "U\x03abcQ",
        "Pabc\n",
        "(S'x'\nios\nmkdir\n",
        "\x8a\x05\0\0\0\0\x02q\0",
        "(" * 10**5,
    ],
    ids=ascii,
)
def test_unknown_name_instructions_are_refused(tmp_path: Path, instructions: str) -> None:
    refused(pickled(instructions, tmp_path / "w.pth"), "w.pth")


def test_an_archive_with_two_entry_lists_is_refused(tmp_path: Path) -> None:
    """Python would check the second list, and torch load by the first."""
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    end64, end = content[-98:-42], content[-22:]
    start = int.from_bytes(end64[48:56], "little")
    twice = content[:-98] + content[start:-98]
    where = (len(twice)).to_bytes(8, "little")
    (tmp_path / "w.pth").write_bytes(
        twice + end64 + content[-42:-34] + where + content[-26:-22] + end
    )
    with zipfile.ZipFile(tmp_path / "w.pth") as archive:
        assert archive.infolist()
    refused(tmp_path / "w.pth", "w.pth", "list of entries")


@pytest.mark.parametrize(
    "shared", [torch.zeros(10**6), torch.zeros(1).expand(2**18)], ids=["whole", "expanded"]
)
def test_many_views_of_the_same_numbers_are_refused(tmp_path: Path, shared: Any) -> None:
    """Otherwise a small file could expand to a model of any size."""
    torch.save({f"w{i}": shared.view(-1) for i in range(500)}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "w.pth", "again and again")
    # Tied weights are not that
    torch.save({"embedding": shared[:1000], "head": shared[:1000]}, tmp_path / "w.pth")
    assert len(read_state_dict(tmp_path / "w.pth")[0]) == 2
