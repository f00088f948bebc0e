"""Running means of a step's scalars, kept on the device until they are read."""

from __future__ import annotations

import torch
from torch import Tensor

from dad_fast.distributed import process_group as distributed


class Meter:
    """Sums scalars over steps; only `read` waits for the device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Add the scalars of one step."""
        values = {name: value.float() for name, value in scalars.items()}
        self.sums = {
            name: self.sums[name] + value if name in self.sums else value.clone()
            for name, value in values.items()
        }
        self.count += 1

    def peek(self) -> dict[str, float]:
        """Return the means since the last read, in one transfer."""
        if not self.count:
            return {}
        values = (torch.stack(list(self.sums.values())) / self.count).tolist()
        return dict(zip(self.sums, values, strict=True))

    def read(self) -> dict[str, float]:
        """Return the means since the last read, in one transfer, and start again."""
        means = self.peek()
        self.sums, self.count = {}, 0
        return means

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums for a checkpoint: a run resumed within a log window logs the same
        means.
        """
        return {f"meter.{name}": value for name, value in self.sums.items()} | {
            "meter": torch.tensor(self.count)
        }

    def restore(self, processes: list[dict[str, Tensor]], device: torch.device) -> None:
        """Restore sums.

        processes: the `tensors` of one process, or of several, whose mean is taken.
        """
        names = [name for name in processes[0] if name.startswith("meter.")]
        means = {
            name: torch.stack([one[name] for one in processes]).mean(0).to(device) for name in names
        }
        self.sums = {name.removeprefix("meter."): value for name, value in means.items()}
        self.count = int(processes[0]["meter"])


def over_processes(means: dict[str, float], largest: dict[str, float]) -> dict[str, float]:
    """Return `means` averaged over the processes, and the largest value of each in `largest`.

    A collective.
    """
    found = distributed.all_gather_json([means, largest])
    averages = {name: sum(one[name] for one, _ in found) / len(found) for name in means}
    return averages | {name: max(one[name] for _, one in found) for name in largest}
