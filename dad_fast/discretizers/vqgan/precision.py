"""The precision of each stage of a step, in one table.

stage            with precision.amp          why
student          [precision] student         bfloat16 has float32's range: no loss scaling
teacher          [precision] teacher         likewise, with the input gradient of the attack
encoder          [precision] encoder         float16: a code is a rounding decision, and bfloat16 is 9 times as noisy
search           exact                       the fp64 argmin whatever the back end; outside autocast
decoder          [precision] decoder         bfloat16: its range needs no care, and images do not need more digits
attack, loss, EMA, optimizer     float32     sums, logarithms and small steps
"""

from __future__ import annotations

from typing import Literal

import torch

from dad_fast.config.schema import PrecisionConfig

Stage = Literal["student", "teacher", "encoder", "decoder"]


def stage_dtype(precision: PrecisionConfig, stage: Stage) -> torch.dtype:
    """The dtype of a stage that `[precision]` names; float32 without amp."""
    return getattr(torch, getattr(precision, stage)) if precision.amp else torch.float32
