"""Damaged checkpoints: fall back to the one before and log it, or fail with one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from dad_fast.checkpoint.folder import CheckpointFolder
from dad_fast.errors import DataError

FILES = ("model.safetensors", "train.safetensors", "state.json")
STATE = {
    "config": 'method = "kd"\n',
    "best_top1": 12.5,
    "metrics_offset": 1234,
    "classes": '{"names": ["ä", "b"]}',
    "stores": {},
}


def write_two(root: Path) -> CheckpointFolder:
    folder = CheckpointFolder(root, keep=3)
    for step in (3, 6):
        tensors = {
            "student.weight": torch.full((4, 5), float(step)),
            "generator.torch": torch.arange(9, dtype=torch.uint8),
        }
        folder.save(
            step, tensors, STATE, lambda path: path.write_bytes(b"a model's bytes"), best=False
        )
    return folder


def check(root: Path, folder: CheckpointFolder) -> None:
    """Assert that step 3 is loaded in place of the damaged step 6, with one line in the log."""
    logged: list[str] = []
    found = folder.load("auto", logged.append)
    assert found is not None and found.state["step"] == 3
    assert torch.equal(found.tensors["student.weight"], torch.full((4, 5), 3.0))
    (line,) = logged
    assert "step-6" in line and "trying the checkpoint before it" in line and "\n" not in line
    with pytest.raises(DataError, match="step-6"):
        folder.load(str(root / "step-6"), logged.append)


@hypothesis.settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(
    name=st.sampled_from(FILES),
    where=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
    cut=st.booleans(),
)
def test_any_flipped_bit_and_any_cut_is_detected(
    tmp_path_factory: pytest.TempPathFactory, name: str, where: float, bit: int, cut: bool
) -> None:
    root = tmp_path_factory.mktemp("checkpoints")
    folder = write_two(root)
    path = root / "step-6" / name
    content = bytearray(path.read_bytes())
    at = int(where * len(content))
    if cut:
        del content[at:]
    else:
        content[at] ^= 1 << bit
    path.write_bytes(content)
    check(root, folder)


# model.safetensors is the same in both checkpoints, so that swapping it is no damage.
@pytest.mark.parametrize(
    ("damage", "name"),
    [
        *((damage, name) for damage in ("lost", "empty", "a folder") for name in FILES),
        *(("another's", name) for name in FILES if name != "model.safetensors"),
    ],
)
def test_missing_or_swapped_file_is_detected(tmp_path: Path, name: str, damage: str) -> None:
    folder = write_two(tmp_path)
    path = tmp_path / "step-6" / name
    content = (tmp_path / "step-3" / name).read_bytes()
    path.unlink()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "a folder":
        path.mkdir()
    elif damage == "another's":
        path.write_bytes(content)
    check(tmp_path, folder)


KEYS = st.sampled_from(["sha256", "step", "config", "x"])
LEAVES = st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=5)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=6,
)


@given(value=JSON)
def test_any_other_json_as_state_is_detected(
    tmp_path_factory: pytest.TempPathFactory, value: object
) -> None:
    root = tmp_path_factory.mktemp("checkpoints")
    folder = write_two(root)
    (root / "step-6" / "state.json").write_text(json.dumps(value))
    check(root, folder)


def test_without_a_sound_checkpoint_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = write_two(tmp_path)
    for step in (3, 6):
        (tmp_path / f"step-{step}" / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"no sound checkpoint is left.*--overwrite"):
        folder.load("auto", lambda line: None)
    assert len(list(tmp_path.glob("step-*"))) == 2


def test_other_names_in_the_folder_are_ignored(tmp_path: Path) -> None:
    folder = write_two(tmp_path)
    for name in ("step-x", "step-", "step-9.bak", ".step-12.tmp", "notes"):
        (tmp_path / name).mkdir()
    found = folder.load("auto", lambda line: None)
    assert found is not None and found.state["step"] == 6
