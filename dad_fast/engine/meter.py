"""Running sums of a step's scalars, kept on the device until somebody reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from dad_fast.distributed import process_group as distributed


class Meter:
    """Sums over steps; only `read` touches the host."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, scalars: dict[str, Tensor]) -> None:
        values = {name: value.float() for name, value in scalars.items()}
        self.sums = {
            name: self.sums[name] + value if name in self.sums else value.clone()
            for name, value in values.items()
        }
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
        """For a checkpoint: a run that resumes in the middle of a log window logs what the straight run logs."""
        return {f"meter.{name}": value for name, value in self.sums.items()} | {
            "meter": torch.tensor(self.count)
        }

    def restore(self, processes: list[dict[str, Tensor]], device: torch.device) -> None:
        """processes: the `tensors` of one process, or of several, whose mean stands for them."""
        names = [name for name in processes[0] if name.startswith("meter.")]
        means = {
            name: torch.stack([one[name] for one in processes]).mean(0).to(device) for name in names
        }
        self.sums = {name.removeprefix("meter."): value for name, value in means.items()}
        self.count = int(processes[0]["meter"])


def over_processes(means: dict[str, float], most: dict[str, float]) -> dict[str, float]:
    """For the log: `means` averaged over the processes, and of `most` the largest value."""
    found = distributed.all_gather_json([means, most])
    averages = {name: sum(one[name] for one, _ in found) / len(found) for name in means}
    return averages | {name: max(one[name] for _, one in found) for name in most}
