"""Train plainly and with CUDA graphs on the tape, in one of several processes over gloo.

Prints a JSON line for each case: what differs between the two, and a hash of the weights and EMA of
this process.
"""

from __future__ import annotations

import hashlib
import json
import os

import torch

from dad_fast.config.schema import Config
from dad_fast.distributed import process_group as distributed
from tests.graph_steps import BATCH_NORM, BF16, FP16, STEPS, Case, differences, train
from tests.graph_tape import tape

CPU = torch.device("cpu")
CASES = (
    Case("ce"),
    Case("dat+dad", BATCH_NORM, parts=2, bad_steps=(9,)),  # of the second process's, in step 4
    Case("kd", BATCH_NORM, optim={"opt": "sgd"}),
    Case("kd", BATCH_NORM, sections={"precision": BF16}),
    Case("kd", BATCH_NORM, sections={"precision": FP16}),
)


def main() -> None:
    torch.set_num_threads(1)
    distributed.init(Config(device="cpu"))
    world, rank = distributed.world(), distributed.rank()
    for case in CASES:
        batches = [case.batch(number * world + rank) for number in range(STEPS)]
        with tape():
            plain = train(case.make(CPU, "off"), batches)
            step = case.make(CPU, "on")
            graphed = train(step, batches)
        assert step.graphs is not None and step.graphs.captured
        found = hashlib.sha256()
        for name, value in graphed[-1].items():
            if name.startswith(("student", "ema")):
                found.update(value.numpy().tobytes())
        print(json.dumps([differences(plain, graphed), found.hexdigest()]))
    distributed.barrier()
    distributed.close()
    # Skips the unloading of modules, which takes long.
    os._exit(0)


if __name__ == "__main__":
    main()
