"""Model of the time of a step on many GPUs: compute, loader and all-reduce.

Tables for docs/distributed.md: python -m benchmarks.scaling

    step(N) = max(compute, loader) + all_reduce(N)

The all-reduce does not overlap the backward pass (see distributed/gradients.py). In a machine of 8
GPUs it is a ring over NVLink; between m machines each GPU reduces its eighth over its own network
card, between a reduce-scatter and an all-gather inside:

    all_reduce = 2 (7/8) S / nvlink + 2 (m-1)/m (S/8) / card + latencies                  S: bytes of the gradients

The group `scaling` checks the form of the model, not these numbers, on a CPU with gloo: it compares
step(N) with the sum of its parts measured alone. Not yet run on several GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

GPUS_PER_MACHINE = 8
GFLOP = {
    "kd, R-50": 24.3 + 162.0,
    "kd, ViT-B": 105.2 + 162.0,
    "dad, ViT-B": 2 * 105.2 + 2 * 162.0 + 330.6 + 172.0 + 360.1,
}
GFLOP |= {"dad, stored, ViT-B": 2 * 105.2, "dad, stored, R-50": 2 * 24.3}
PARAMETERS = {"R-50": 25.6e6, "ViT-B": 86.6e6}
ACHIEVED = 0.55 * 790e12  # FLOP/s of one H200, to be measured
IMAGE_BYTES = 110e3  # an ImageNet JPEG
LOADER = 8000.0  # images/s of one GPU's share of the machine, to be measured


@dataclass(frozen=True)
class Network:
    """Achieved bytes/s of an all-reduce, and seconds per hop."""

    nvlink: float = 350e9
    card: float = 40e9  # 400 Gbit/s a GPU
    cards: int = GPUS_PER_MACHINE  # of a machine, shared by its GPUs
    hop: float = 15e-6


def all_reduce(num_bytes: float, num_gpus: int, network: Network) -> float:
    """Return the seconds of an all-reduce of `num_bytes` over `num_gpus`."""
    inside = min(num_gpus, GPUS_PER_MACHINE)
    machines = -(-num_gpus // GPUS_PER_MACHINE)
    seconds = (
        2 * (inside - 1) / inside * num_bytes / network.nvlink
        + 2 * inside.bit_length() * network.hop
    )
    if machines > 1:
        between = num_bytes / network.cards / network.card
        seconds += 2 * (machines - 1) / machines * between + 2 * machines.bit_length() * network.hop
    return seconds


def step_seconds(
    kind: str, batch_size: int, num_gpus: int, network: Network
) -> tuple[float, float]:
    """Return the seconds of (max of compute and loader, all-reduce) for `batch_size` images a GPU."""
    compute = max(batch_size * GFLOP[kind] * 1e9 / ACHIEVED, batch_size / LOADER)
    num_bytes = 4 * PARAMETERS[kind.rpartition(" ")[2]]
    return compute, all_reduce(num_bytes, num_gpus, network) if num_gpus > 1 else 0.0


def efficiency(kind: str, batch_size: int, num_gpus: int, network: Network) -> float:
    """Return the images per second of one of `num_gpus` GPUs, relative to a single GPU."""
    alone, _ = step_seconds(kind, batch_size, 1, network)
    return alone / sum(step_seconds(kind, batch_size, num_gpus, network))


def table() -> str:
    fast, slow = Network(), Network(card=10e9, cards=1)  # 100 Gbit/s a machine
    heads = (
        "step, images a GPU",
        "one GPU, ms",
        "8",
        "64",
        "512",
        "64, 100 Gbit/s a machine",
        "reads a machine, GB/s",
    )
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for kind in GFLOP:
        for batch_size in (32, 256):
            alone = step_seconds(kind, batch_size, 1, fast)[0]
            shares = [efficiency(kind, batch_size, n, fast) for n in (8, 64, 512)] + [
                efficiency(kind, batch_size, 64, slow)
            ]
            reads = GPUS_PER_MACHINE * batch_size / alone * IMAGE_BYTES / 1e9
            values = [f"{1e3 * alone:,.0f}", *(f"{share:.0%}" for share in shares), f"{reads:.1f}"]
            lines.append(f"| {kind}, {batch_size} | " + " | ".join(values) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
