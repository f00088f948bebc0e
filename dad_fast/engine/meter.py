"""Running sums of a step's scalars, kept on the device until somebody reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from dad_fast.engine import distributed


class Meter:
    """Sums over steps; only `read` touches the host."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, scalars: dict[str, Tensor]) -> None:
        for name, value in scalars.items():
            value = value.float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.count += 1

    def read(self) -> dict[str, float]:
        """Means since the last read, in one transfer; the sums start again."""
        if not self.count:
            return {}
        values = (torch.stack(list(self.sums.values())) / self.count).tolist()
        means = dict(zip(self.sums, values, strict=True))
        self.sums, self.count = {}, 0
        return means

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint: a run that resumes in the middle of a log window logs what the straight run logs. Means over the processes."""
        means = {name: distributed.all_reduce_sums(value.clone()) / distributed.world() for name, value in self.sums.items()}
        return {f"meter.{name}": value for name, value in means.items()} | {"meter": torch.tensor(self.count)}

    def restore(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        self.sums = {k.removeprefix("meter."): v.to(device) for k, v in tensors.items() if k.startswith("meter.")}
        self.count = int(tensors["meter"])


def over_processes(means: dict[str, float], most: dict[str, float]) -> dict[str, float]:
    """For the log: `means` averaged over the processes, and of `most` the largest value."""
    found = distributed.gather([means, most])
    averages = {name: sum(one[name] for one, _ in found) / len(found) for name in means}
    return averages | {name: max(one[name] for _, one in found) for name in most}
