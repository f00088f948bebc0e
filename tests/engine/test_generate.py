"""Content of a store: fixed blocks of a data set, with adversarial images as in training."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("open_clip")
import tests.engine.test_step as small
from dad_fast.data.augment.mixing import to_levels, to_pixels
from dad_fast.data.augment.view import View
from dad_fast.data.loaders.blocks import blocks, num_blocks
from dad_fast.data.sources.folder import FolderSource
from dad_fast.discretizers.identity import Identity
from dad_fast.methods.attack import PGD
from dad_fast.precompute.adversarial import adversarial
from tests.tiny import write_images

VIEW = View(16, 1.0, "bilinear")


def source(root: Path) -> FolderSource:
    return FolderSource(write_images(root) / "train")


@pytest.mark.parametrize("size", [1, 5, 24, 100])
def test_blocks_partition_the_samples_and_share_one_shape(tmp_path, size):
    data = source(tmp_path)
    made = list(blocks(data, range(num_blocks(data, size)), size, VIEW, workers=0))
    assert [i for block in made for i in block.samples[: block.num_real].tolist()] == list(
        range(len(data))
    )
    assert all(block.images.shape == (size, 3, 16, 16) and block.readable.all() for block in made)
    assert [
        label for block in made for label in block.labels[: block.num_real].tolist()
    ] == data.labels.tolist()


def test_blocks_do_not_depend_on_the_process(tmp_path):
    data = source(tmp_path)
    alone = next(blocks(data, [2], 5, VIEW, workers=0))
    (among,) = [block for block in blocks(data, range(5), 5, VIEW, workers=2) if block.number == 2]
    assert torch.equal(alone.images, among.images) and torch.equal(alone.samples, among.samples)


def test_unreadable_images_are_named_and_marked(tmp_path):
    data = source(tmp_path)
    (data.folder / data.keys[3]).write_bytes(b"\xff\xd8 no more")
    data.ok[1] = False
    (block,) = blocks(data, [0], 6, VIEW, workers=0)
    assert block.readable.tolist() == [
        True,
        False,
        True,
        False,
        True,
        True,
    ] and block.unreadable == (data.keys[3],)
    assert not block.images[1].any() and not block.images[3].any() and block.images[0].any()


@pytest.mark.parametrize("order", ["paper", "authors"])
def test_outputs_are_of_the_stored_pixels(order):
    teacher, discretizer, data = small.LinearTeacher(), small.discretizer(), small.batch()
    attack = PGD("l2", 0.5, 0.4, 2, 0.8)
    found = adversarial(
        teacher, discretizer, attack, order, data.images, data.labels, data.seeds, small.C
    )
    x = to_pixels(data.images)
    base, between = x, None
    if order == "authors":
        base, between = discretizer(x).images, lambda images: discretizer(images).images
    targets = torch.nn.functional.one_hot(data.labels, small.C).float()
    online = discretizer(attack(teacher, base, targets, data.seeds, between))
    assert torch.equal(found.codes, online.codes)
    assert torch.equal(found.images, to_levels(online.images)) and found.images.dtype == torch.uint8
    assert torch.equal(found.outputs, teacher(to_pixels(found.images)))
    assert torch.equal(found.kept, found.outputs.argmax(1) == data.labels)
    assert torch.equal(
        found.changed, (online.codes != discretizer(base).codes).float().mean((1, 2))
    )


def test_discretizer_without_codes_reports_no_share():
    data = small.batch()
    found = adversarial(
        small.LinearTeacher(),
        Identity(),
        PGD(),
        "paper",
        data.images,
        data.labels,
        data.seeds,
        small.C,
    )
    assert found.codes is None and found.changed is None
