"""Mixing on the device against a loop over single samples in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dad_fast.config.schema import AugmentConfig
from dad_fast.data.augment.mixing import mix, soft_targets, to_pixels
from dad_fast.data.augment.records import CUTMIX, MIXUP, NO_MIX, mix_record


def reference(images, labels, mixes, num_classes, smoothing):
    """Mix uint8 [B, 3, H, W] with one mix a sample -> pixels and targets, float64."""
    pixels = images.astype(np.float64) / 255.0
    targets = np.full((len(labels), num_classes), smoothing / num_classes)
    targets[np.arange(len(labels)), labels] += 1.0 - smoothing
    out, soft = pixels.copy(), targets.copy()
    for i, (kind, lam, (y0, y1, x0, x1)) in enumerate(mixes):
        j = i + 1 if i % 2 == 0 else i - 1
        if kind == CUTMIX:
            out[i, :, y0:y1, x0:x1] = pixels[j, :, y0:y1, x0:x1]
            share = 1.0 - (y1 - y0) * (x1 - x0) / (images.shape[2] * images.shape[3])
            assert share == pytest.approx(lam)
        elif kind == MIXUP:
            out[i] = lam * pixels[i] + (1 - lam) * pixels[j]
        soft[i] = lam * targets[i] + (1 - lam) * targets[j]
    return out, soft


def arguments(mixes):
    return (
        torch.tensor([m[0] for m in mixes]),
        torch.tensor([m[1] for m in mixes]).float(),
        torch.tensor([m[2] for m in mixes]),
    )


@pytest.mark.parametrize("side", [1, 7, 16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mix_equals_the_loop(side, smoothing):
    aug = AugmentConfig(mixup=0.8, cutmix=1.0, mixup_prob=0.8)
    mixes = [m for pair in range(20) for m in [mix_record(aug, side, 3, 1, pair)] * 2]
    assert {m.kind for m in mixes} == {NO_MIX, MIXUP, CUTMIX}
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (40, 3, side, side), dtype=np.uint8)
    labels = random.integers(0, 5, 40)
    kind, lam, box = arguments(mixes)
    pixels = to_pixels(torch.from_numpy(images))
    before = pixels.clone()
    mixed = mix(pixels, torch.from_numpy(labels), kind, lam, box, 5, smoothing)
    expected, targets = reference(images, labels, mixes, 5, smoothing)
    np.testing.assert_allclose(mixed.pixels.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(mixed.targets.numpy(), targets, atol=1e-6)
    np.testing.assert_allclose(mixed.targets.sum(1).numpy(), 1.0, atol=1e-6)
    neighbours = labels.reshape(-1, 2)[:, ::-1].reshape(-1)
    assert mixed.second_labels.tolist() == [
        int(n if m.kind else own) for n, own, m in zip(neighbours, labels, mixes, strict=True)
    ]
    assert torch.equal(pixels, before)


def test_unmixed_images_are_bit_exact_also_in_odd_batches():
    pixels = to_pixels(torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8))
    labels = torch.tensor([0, 1, 2, 0, 1])
    mixed = mix(pixels, labels, *arguments([(NO_MIX, 1.0, (0, 0, 0, 0))] * 5), 3)
    assert torch.equal(mixed.pixels, pixels) and torch.equal(mixed.second_labels, labels)
    assert torch.equal(mixed.targets, torch.eye(3)[labels])


def test_to_pixels_and_targets():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    pixels = to_pixels(images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))
    assert (
        pixels.is_contiguous()
        and pixels.dtype == torch.float32
        and float(pixels.max()) == 1.0
        and float(pixels.min()) == 0.0
    )
    timm_mixup = pytest.importorskip("timm.data.mixup")
    labels = torch.tensor([2, 0])
    expected = timm_mixup.mixup_target(labels, 4, 1.0, 0.1)
    assert torch.allclose(soft_targets(labels, 4, 0.1), expected)


def test_mix_is_captured_without_host_synchronization():
    """The whole function traces into one graph (no .item(), no branch on a tensor)."""
    mixes = [(MIXUP, 0.3, (0, 0, 0, 0))] * 2 + [(CUTMIX, 0.75, (0, 2, 0, 2))] * 2
    inputs = (torch.rand(4, 3, 4, 4), torch.tensor([0, 1, 2, 0]), *arguments(mixes))
    traced = torch.compile(lambda *a: mix(*a, 3, 0.1).pixels, backend="eager", fullgraph=True)
    assert torch.equal(traced(*inputs), mix(*inputs, 3, 0.1).pixels)
