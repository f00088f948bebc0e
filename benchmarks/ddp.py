"""The peer of engine/shared_gradients.py: the same training step with torch's DistributedDataParallel around the student.

DDP sums gradients in buckets while the backward pass goes on; the product sums one flat tensor after it. What DDP can hide is what it has
sent before the last bucket is full, and no more than the backward pass takes.
"""

from __future__ import annotations

from torch.nn.parallel import DistributedDataParallel

from dad_fast.engine.step import TrainStep

FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # bytes, torch's own


def with_ddp(step: TrainStep) -> TrainStep:
    """`step`, changed to leave its gradients to DDP: on a static graph, in buckets that the gradients are views of."""
    (learner,) = step.learners
    learner.update.num_processes = 1  # no sum of its own, and DDP divides
    learner.forward = DistributedDataParallel(
        learner.student, static_graph=True, gradient_as_bucket_view=True
    )
    return step


def share_before_the_last_bucket(num_bytes: int) -> float:
    """Of the gradients, what DDP can sum while the backward pass still goes on, with torch's bucket sizes."""
    if num_bytes <= FIRST_BUCKET:
        return 0.0
    last = (num_bytes - FIRST_BUCKET) % BUCKET or BUCKET
    return 1.0 - last / num_bytes
