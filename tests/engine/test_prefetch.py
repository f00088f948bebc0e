"""Prefetching: unchanged batches on a CPU, two static buffers on a GPU."""

from __future__ import annotations

import pytest
import torch

from dad_fast.data.loaders.loader import Batch
from dad_fast.engine.prefetch import feed


def batch(number: int) -> Batch:
    size = 4
    images = torch.full((size, 8, 8, 3), number, dtype=torch.uint8).permute(0, 3, 1, 2)
    index = torch.arange(size) + size * number
    return Batch(
        images,
        index,
        index,
        index,
        index,
        index.float(),
        index[:, None].repeat(1, 4),
        0,
        number,
        (),
    )


def test_cpu_batches_pass_unchanged():
    made = [batch(i) for i in range(3)]
    assert all(a is b for a, b in zip(feed(iter(made), torch.device("cpu")), made, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["pinned", "cuda"])
def test_gpu_batches_use_two_static_buffers(where):
    """Later batches do not overwrite a batch that slow work still reads."""
    device = torch.device("cuda")
    made = (batch(i).pin_memory() if where == "pinned" else batch(i).to(device) for i in range(20))
    big = torch.randn(4096, 4096, device=device)
    sums, addresses = [], set()
    for number, got in enumerate(feed(made, device)):
        assert got.step == number and got.images.is_cuda and got.images.stride() == (192, 1, 24, 3)
        for _ in range(5):
            big @ big
        sums.append((got.images.double().sum(), got.labels.sum()))
        addresses.add(got.images.data_ptr())
    assert len(addresses) == 2
    assert [(int(a), int(b)) for a, b in sums] == [
        (number * 768, 16 * number + 6) for number in range(20)
    ]
