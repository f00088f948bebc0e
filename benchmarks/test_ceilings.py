"""What this device can do at best: a plain matrix product and a copy, the references of every
TFLOP/s and byte.
"""

from __future__ import annotations

import torch

from benchmarks.bench import Bench


def test_matrix_product(bench: Bench) -> None:
    """Random data: zeros take less power, and run at clocks that no real product has."""
    side, dtype = (8192, torch.bfloat16) if bench.device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(side, side, device=bench.device, dtype=dtype) for _ in range(2))
    name = f"{side} x {side}, {str(dtype).removeprefix('torch.')}"
    bench.compare(
        "matrix product",
        {name: lambda: a @ b},
        baseline=name,
        work=1,
        unit="product",
        flops={name: 2 * side**3},
        seconds=5,
        config={"side": side, "dtype": str(dtype).removeprefix("torch.")},
    )


def test_copy(bench: Bench) -> None:
    """Copy of a tensor larger than any cache; bytes read and written."""
    num_bytes = 2**32 if bench.device.type == "cuda" else 2**26
    source = torch.randint(256, (num_bytes,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    bench.compare(
        "copy",
        {"copy": lambda: target.copy_(source)},
        baseline="copy",
        work=2 * num_bytes / 1e9,
        unit="GB",
        seconds=5,
        config={"bytes": num_bytes},
    )
