"""Peer of distributed/gradients.py: the same training step with torch's DistributedDataParallel
around the student.

DDP sums gradients in buckets during the backward pass; this project sums one flat tensor after it.
DDP can hide only the buckets that it sends before the last one is full, and at most the time of the
backward pass.
"""

from __future__ import annotations

from torch.nn.parallel import DistributedDataParallel

from dad_fast.engine.step import TrainStep

FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # bytes, torch's own


def with_ddp(step: TrainStep) -> TrainStep:
    """Change `step` so that DDP sums its gradients: static graph, gradients as views of the
    buckets.
    """
    (learner,) = step.learners
    learner.update.num_processes = 1  # no sum of its own; DDP divides
    learner.forward = DistributedDataParallel(
        learner.student, static_graph=True, gradient_as_bucket_view=True
    )
    return step


def share_before_the_last_bucket(num_bytes: int) -> float:
    """Return the share of the gradients that DDP can sum during the backward pass, with torch's
    bucket sizes.
    """
    if num_bytes <= FIRST_BUCKET:
        return 0.0
    last = (num_bytes - FIRST_BUCKET) % BUCKET or BUCKET
    return 1.0 - last / num_bytes
