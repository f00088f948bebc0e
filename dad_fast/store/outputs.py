"""Stored form of a teacher's logits.

    full         fp16 of z - max z, [C]; fp32 max z
    topk:K@T     the K largest: uint16 classes, fp16 z - max z; fp32 max z;
                 fp32 log of the others' sum of exp((z - max z) / T)

A constant added to all logits does not change their softmax, so z - max z suffices at any
temperature, and fp16 is then most precise for the likely classes: |error| <= 2^-11 |z - max z|.
CLIP's logits (scale 100) are 10 to 35; stored directly their error would be up to 2^-7, for the
likeliest class too.

`topk` gives each of the other C - K classes the same logit, so that their softmax at temperature T
has the right sum: the teacher's distribution at T is exact on the K classes and uniform over the
rest.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from dad_fast.errors import UsageError

# Lowest number of fp16; its softmax is that of minus infinity.
LOWEST = -65504.0


@dataclass(frozen=True)
class OutputsForm:
    """`full` (k = 0), or the `k` largest logits and the mass of the others at `temperature`."""

    k: int = 0
    temperature: float = 0.0

    @classmethod
    def parse(cls, text: str, num_classes: int) -> OutputsForm:
        """Parse `full` or `topk:K@T`, 1 <= K < C, T > 0. Raises UsageError for other texts."""
        if text == "full":
            return cls()
        found = re.fullmatch(r"topk:([1-9]\d{0,4})@(\d{1,4}(?:\.\d{1,4})?)", text)
        if not found or float(found[2]) == 0:
            raise UsageError(
                f"outputs {text!r}: write full, or topk:K@T with the K largest logits "
                "and the temperature T of distillation"
            )
        k = int(found[1])
        if k >= num_classes or num_classes > 65536:
            raise UsageError(
                f"outputs {text!r}: there are {num_classes} classes; "
                "K must be less, and classes at most 65536"
            )
        return cls(k, float(found[2]))

    def __str__(self) -> str:
        return f"topk:{self.k}@{self.temperature:g}" if self.k else "full"

    def fields(self, num_classes: int) -> list[Any]:
        """Return the fields of a record that hold outputs."""
        if not self.k:
            return [("max_logit", "<f4"), ("logits", "<f2", (num_classes,))]
        return [
            ("max_logit", "<f4"),
            ("rest", "<f4"),
            ("classes", "<u2", (self.k,)),
            ("logits", "<f2", (self.k,)),
        ]

    def encode(self, logits: np.ndarray, records: np.ndarray) -> None:
        """Fill these fields of `records` [N] from float [N, C], all finite."""
        z = np.ascontiguousarray(logits, dtype=np.float32)
        top = z.max(axis=1, keepdims=True)
        relative = z - top
        records["max_logit"] = top[:, 0]
        if not self.k:
            records["logits"] = np.maximum(relative, LOWEST)
            return
        order = np.argsort(-relative, axis=1, kind="stable")
        classes = order[:, : self.k]
        records["classes"] = classes
        records["logits"] = np.maximum(np.take_along_axis(relative, classes, 1), LOWEST)
        others = np.take_along_axis(relative, order[:, self.k :], 1).astype(np.float64)
        others = others / self.temperature
        largest = others[:, :1]
        records["rest"] = largest[:, 0] + np.log(np.exp(others - largest).sum(axis=1))

    def decode(self, records: np.ndarray, num_classes: int) -> np.ndarray:
        """Return the logits minus their maximum, float16 [N, C]."""
        if not self.k:
            return records["logits"]
        rest = records["rest"].astype(np.float64)
        level = self.temperature * (rest - math.log(num_classes - self.k))
        # Rounded before the broadcast, which takes a tenth of the time.
        rounded = np.maximum(level, LOWEST).astype(np.float16)
        logits = np.empty((len(records), num_classes), np.float16)
        logits[:] = rounded[:, None]
        logits[np.arange(len(records))[:, None], records["classes"]] = records["logits"]
        return logits
