"""The pieces of a picture sheet: round trip, damaged files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from dad_fast.errors import DataError
from dad_fast.report.pieces import IMAGES, METADATA, read_pieces, write_pieces

EXAMPLES = [{"label": "a", "answer": "b", "kept": False, "filtered": True}] * 2


def test_round_trip(tmp_path):
    levels = torch.randint(256, (3, 2, 3, 8, 12), generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([[[0.0, 1.5]], [[0.25, 0.0]]])
    images = levels / 255
    write_pieces(
        tmp_path / "s.safetensors",
        *images,
        scale=5,
        examples=EXAMPLES,
        attacked="t",
        shift=shift,
        num_codes=64,
    )
    found = read_pieces(tmp_path / "s.safetensors")
    for part, name in zip(levels, ("original", "discretized", "adversarial"), strict=True):
        assert np.array_equal(found.images[name], part.permute(0, 2, 3, 1).numpy())
    expected = (127.5 * (1 + 5 * (images[2] - images[1]))).clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert abs(found.images["difference"] - expected).max() <= 0.51
    assert found.shift.tolist() == shift.tolist()
    assert (found.scale, found.num_codes, found.attacked) == (5, 64, "t")
    assert found.examples == EXAMPLES


def test_difference_keeps_changes_below_one_level(tmp_path):
    image = torch.full((2, 3, 8, 8), 0.5)
    write_pieces(
        tmp_path / "s.safetensors",
        image,
        image,
        image + 5e-4,
        scale=500,
        examples=EXAMPLES,
        attacked="t",
    )
    found = read_pieces(tmp_path / "s.safetensors")
    assert np.unique(found.images["difference"]).tolist() == [159]
    assert found.shift is None
    assert found.num_codes == 0


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "foreign", "shapes", "missing"])
def test_damaged_file_is_named_in_the_error(tmp_path, damage):
    path = tmp_path / "sheet.safetensors"
    image = torch.zeros(2, 3, 8, 8)
    examples = EXAMPLES[:1] if damage == "shapes" else EXAMPLES
    write_pieces(path, image, image, image, scale=1, examples=examples, attacked="t")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage in ("empty", "text"):
        path.write_bytes(b"" if damage == "empty" else b"not a safetensors file at all")
    elif damage == "foreign":
        from safetensors.torch import save_file

        save_file({"weight": image}, path, {"format": "pt"})
    elif damage == "missing":
        path.unlink()
    with pytest.raises(DataError, match="sheet.safetensors: not the pieces"):
        read_pieces(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32])
@pytest.mark.parametrize("shape", [(1, 4, 4, 3), (1, 4, 4, 4), (1, 0, 4, 3), (2, 4, 4, 3), (4,)])
def test_other_types_and_shapes_are_refused(tmp_path, dtype, shape):
    from safetensors.torch import save_file

    described = json.dumps({"scale": 1, "num_codes": 2, "attacked": "t", "examples": [{}]})
    for kind in (dtype, torch.uint8):
        if kind is torch.uint8 and shape == (1, 4, 4, 3):
            continue
        tensors = {name: torch.zeros(shape).to(kind) for name in IMAGES}
        save_file(tensors, tmp_path / "s.safetensors", {METADATA: described})
        with pytest.raises(DataError, match="not the pieces"):
            read_pieces(tmp_path / "s.safetensors")


@pytest.mark.parametrize("examples", [[1], "x", None, {"a": 1}, []])
def test_invalid_examples_are_refused(tmp_path, examples):
    from safetensors.torch import save_file

    described = json.dumps({"scale": 1, "num_codes": 2, "attacked": "t", "examples": examples})
    tensors = {name: torch.zeros(1, 4, 4, 3, dtype=torch.uint8) for name in IMAGES}
    save_file(tensors, tmp_path / "s.safetensors", {METADATA: described})
    with pytest.raises(DataError, match="not the pieces"):
        read_pieces(tmp_path / "s.safetensors")
