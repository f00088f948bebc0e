"""The mixed back end (decoding on the GPU) against PIL, with looser bounds than on the CPU."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("nvidia.dali")
pytest.importorskip("timm")
torch = pytest.importorskip("torch")

from dali_cases import CENTER, FULL, Files, decoded, errors, jpeg, photos, record_of

from dad_fast.data.augment.policy import ARGUMENTS, GEOMETRIC
from dad_fast.data.augment.records import Erase
from dad_fast.data.loaders.dali.loader import DaliLoader
from dad_fast.data.loaders.loader import TrainLoader
from tests.data.test_dali import FIELDS, collect, nobody_reads, shades
from tests.data.test_dali_parity import check, every_argument, ruler, shift_in_pixels, sides

pytestmark = pytest.mark.gpu

# nvJPEG and the hardware decoder round transform and chroma differently: mean and 99th percentile
# of the levels.
DECODED = (1.0, 6, 255)
# Operations that turn a difference of one level into many.
THRESHOLDS = ("equalize", "posterize", "solarize", "solarize_add", "contrast", "sharpness")
LOOSE = (4.0, 64, 255)


def test_decoding_crops_flips_and_resizes():
    crops = ((0, 0, 400, 300), (7, 9, 112, 112), (100, 50, 60, 70))
    for flip in (False, True):
        cases = [(data, crop) for data in photos() for crop in crops]
        records = [
            record_of(decoded(data), 112, crop=crop, hflip=flip, vflip=flip) for data, crop in cases
        ]
        check(errors([data for data, _ in cases], records, "cuda"), DECODED, "decoded")


@pytest.mark.parametrize("name", list(ARGUMENTS))
def test_colours_of_each_operation(name):
    ops = sides(name)
    for data in photos():
        records = [record_of(decoded(data), 96, crop=(40, 30, 96, 96), ops=(op,)) for op in ops]
        loose = ARGUMENTS[name][0] in (*THRESHOLDS, *GEOMETRIC)
        check(errors([data] * len(ops), records, "cuda"), LOOSE if loose else DECODED, name)


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if ARGUMENTS[name][0] in GEOMETRIC])
def test_geometry_to_half_a_pixel(name):
    assert every_argument(name)
    image = ruler(60, 60, 4)
    ops = sides(name)
    records = [record_of(image, 60, ops=(op,)) for op in ops]
    for op, shift in zip(
        ops,
        shift_in_pixels([jpeg(image, quality=100, subsampling=0)] * len(ops), records, 4, "cuda"),
        strict=True,
    ):
        assert np.percentile(shift, 99) <= 0.5 and shift.mean() < 0.25, (
            op,
            shift.max(),
            shift.mean(),
        )


def test_erasing_is_exact():
    image = decoded(photos()[0])
    erase = Erase(13, 8, 50, 61, "pixel", 99)
    found = errors(
        [photos()[0]], [record_of(image, 112, crop=(7, 31, 112, 112), erase=erase)], "cuda"
    )
    assert not found[0, 13:63, 8:69].any()


def test_batches_stay_on_the_device():
    """Images are complete before the consumer's stream reads them and stay while it holds them.

    Covers fail-over and unusual files.
    """
    device = torch.device("cuda", 0)
    files = [*shades(), nobody_reads(3)]
    source = Files(files, plain=[number % 5 != 0 for number in range(len(files))])
    loader = DaliLoader(source, FULL, 32, 6, 3, 2, device=device, pin_memory=True)
    side = torch.cuda.Stream()
    kept = []
    with torch.cuda.stream(side):
        for batch in loader.batches(0, 10):
            assert batch.images.device == device and batch.images.dtype == torch.uint8
            assert (
                batch.images.is_contiguous(memory_format=torch.channels_last)
                and batch.labels.is_pinned()
            )
            kept.append((batch, batch.images.clone()))
    torch.cuda.synchronize()
    assert all(torch.equal(batch.images, copy) for batch, copy in kept)
    assert loader.replaced == ["file30"] and loader.failed_over == 2
    theirs = collect(TrainLoader(source, FULL, 32, 6, 3, 0), 0, 10)
    for name in FIELDS:
        assert torch.equal(torch.cat([getattr(batch, name) for batch, _ in kept]), theirs[name]), (
            name
        )


def test_resume_gives_the_same_samples():
    source = Files(shades())
    device = torch.device("cuda")
    whole = collect(DaliLoader(source, CENTER, 32, 6, 3, 2, device=device), 0, 10)
    rest = collect(DaliLoader(source, CENTER, 32, 6, 3, 2, device=device), 4, 10)
    assert torch.equal(whole["samples"][24:], rest["samples"])
    assert (
        whole["images"][24:].int() - rest["images"].int()
    ).abs().float().mean() < 0.5  # which decoder takes a file may differ
