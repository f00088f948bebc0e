"""One process against several: training steps with and without all-reduce, and the all-reduce
alone.

Every process has a batch of the same size. Model: the time of a step of N processes is that of N
separate processes (on a CPU they share cores and memory) plus the all-reduce of the gradients;
`predicted` is this sum, from earlier comparisons.

The peer is DistributedDataParallel, which overlaps a part of the all-reduce with the backward pass;
its `predicted` is without that part.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

from benchmarks.bench import Bench
from benchmarks.ddp import share_before_the_last_bucket
from dad_fast.distributed.launch import STORE

ROOT = Path(__file__).parents[1]
BATCH = 32  # images a process: where the all-reduce weighs most
METHODS = ("kd", "dad")


class Pool:
    """Worker processes that run one command at a time, all together."""

    def __init__(self, bench: Bench, num: int, together: bool, folder: Path) -> None:
        arguments = [bench.size, bench.device.type, str(BATCH)]
        self.processes = []
        for rank in range(num):
            env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            if sys.platform == "linux":
                env["GLOO_SOCKET_IFNAME"] = "lo"
            if together:
                identity = {
                    "RANK": rank,
                    "LOCAL_RANK": rank,
                    "WORLD_SIZE": num,
                    STORE: folder / f"rendezvous-{num}",
                }
                env |= {name: str(value) for name, value in identity.items()}
            elif bench.device.type == "cuda":
                env |= {"CUDA_VISIBLE_DEVICES": str(rank)}
            command = [sys.executable, "-m", "benchmarks.scaling_worker", *arguments]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.processes.append(subprocess.Popen(command, env=env, text=True, **pipes))  # type: ignore[call-overload]
        self.num_parameters = next(int(self._answer(process)) for process in self.processes)

    def call(self, line: str) -> None:
        for process in self.processes:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        for process in self.processes:
            self._answer(process)

    def function(self, line: str) -> Callable[[], None]:
        return lambda: self.call(line)

    @staticmethod
    def _answer(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        answer = process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a process of the benchmark ended with {process.wait()}")
        return answer

    def close(self) -> None:
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            process.wait(60)


@contextmanager
def pools(bench: Bench, num: int) -> Iterator[tuple[Pool, Pool, Pool]]:
    """Yield one process, `num` separate processes, and `num` connected processes."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        made = []
        for size, together in ((1, False), (num, False), (num, True)):
            made.append(Pool(bench, size, together, Path(folder)))
            stack.callback(made[-1].close)
        yield made[0], made[1], made[2]


def test_scaling(bench: Bench) -> None:
    num = torch.cuda.device_count() if bench.device.type == "cuda" else min(2, os.cpu_count() or 1)
    if num < 2:
        pytest.skip("several processes need several cores or GPUs")
    with pools(bench, num) as (alone, apart, together):
        numbers = together.num_parameters
        sizes = {f"{factor} x the gradients": factor * numbers for factor in (1, 4, 16)}
        bench.compare(
            f"all-reduce, {num} processes",
            {name: together.function(f"reduce {size}") for name, size in sizes.items()},
            baseline="1 x the gradients",
            work=1,
            unit="all-reduce",
            config={"num_parameters": numbers},
            seconds=6,
        )
        reduce_ms = bench.session.groups[bench.group][-1]["rows"][0]["ms"]["median"]
        for method in METHODS:
            what = {
                "method": method,
                "batch_size": BATCH,
                "processes": num,
                "num_parameters": numbers,
            }

            def compare(
                name: str,
                other: str,
                pool: Pool,
                predicted: dict[str, float],
                what: dict[str, object] = what,
            ) -> float:
                line = f"step {what['method']}"
                return bench.compare(
                    name,
                    {"1 process": alone.function(line), other: pool.function(line)},
                    baseline="1 process",
                    work=BATCH,
                    unit="img of a process",
                    config=what,
                    predicted=predicted,
                    seconds=9,
                )[other]

            ratio = compare(
                f"{method}, what {num} processes share", f"{num} processes apart", apart, {}
            )
            one_ms = bench.session.groups[bench.group][-1]["rows"][0]["ms"]["median"]
            compare(
                f"{method}, {num} processes",
                f"{num} processes",
                together,
                {f"{num} processes": ratio + reduce_ms / one_ms},
            )

            ours, num_bytes = (
                bench.session.groups[bench.group][-1]["rows"][1]["ms"]["median"],
                4 * numbers,
            )
            share = share_before_the_last_bucket(num_bytes)
            peers = {
                "one tensor": together.function(f"step {method}"),
                "DDP": together.function(f"ddp {method}"),
            }
            bench.compare(
                f"{method}, {num} processes, gradients",
                peers,
                baseline="one tensor",
                work=BATCH,
                unit="img of a process",
                predicted={"DDP": 1 - share * reduce_ms / ours},
                seconds=9,
                config=what | {"gradient_bytes": num_bytes, "share": share},
            )
