"""Undamaged checkpoints of foreign content: a one-line error, soon."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
for package in ("timm", "mlxtend", "sklearn"):
    pytest.importorskip(package)
from safetensors.torch import load_file, save_file

from dad_fast.checkpoint.folder import STATE, _digest
from dad_fast.errors import DataError, UsageError
from dad_fast.models.weights.files import sha256_file
from tests.checkpoint.test_resume import config, run, trainer
from tests.limits import cpu_limit

GONE = "(gone)"  # a text, so that the tests' names are the same in every process
STATES: list[dict[str, Any]] = [
    *({"world": value} for value in (GONE, 0, 10**9, "1", 2)),
    *(
        {"optimizer": value}
        for value in (
            GONE,
            {"param_groups": [], "numbers": {}},
            {"param_groups": None, "numbers": {"x": 1}},
        )
    ),
    *({"config": value} for value in (GONE, "seed = 2", "[[[", 7)),
    {"data": GONE},
    {"best_top1": GONE},
    {"bad_images": 3},
]
TENSORS: dict[str, Any] = {
    "generator.torch": torch.zeros(5, dtype=torch.uint8),
    "generator.python": torch.zeros(3, dtype=torch.int64),
    "generator.numpy": torch.full((626,), -1, dtype=torch.int64),
    "bad_in_a_row": torch.zeros(7),
    "student.model.fc.weight": torch.zeros(1),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("run") / "r"
    cfg = config("ce", "max_steps=1")
    run(folder, cfg)
    return folder, cfg


def forged(
    made: tuple[Path, Any], tmp_path: Path, changes: dict[str, Any], tensors: dict[str, Any]
) -> Path:
    folder = tmp_path / "r"
    shutil.copytree(made[0], folder, symlinks=True)
    step = next((folder / "checkpoints").glob("step-*"))
    state = json.loads((step / STATE).read_text())
    hashes = state.pop("sha256")
    state = {key: value for key, value in (state | changes).items() if value is not GONE}
    if tensors:
        save_file(load_file(step / "train.safetensors") | tensors, step / "train.safetensors")
        hashes["train.safetensors"] = sha256_file(step / "train.safetensors")
    (step / STATE).write_text(json.dumps({**state, "sha256": hashes | {STATE: _digest(state)}}))
    return folder


@pytest.mark.parametrize(
    ("changes", "tensors"),
    [*((state, {}) for state in STATES), *(({}, {name: value}) for name, value in TENSORS.items())],
    ids=lambda value: next((f"{key}={item}"[:30] for key, item in value.items()), ""),
)
def test_foreign_checkpoint_state_is_a_one_line_error(
    made: tuple[Path, Any], tmp_path: Path, changes: dict[str, Any], tensors: dict[str, Any]
) -> None:
    folder = forged(made, tmp_path, changes, tensors)
    with cpu_limit(), pytest.raises((DataError, UsageError)) as caught:
        trainer(folder, made[1], "auto").start()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 4000
