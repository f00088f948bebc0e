"""Distances between generated sets and test sets, with intervals and floors, from features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dad_fast.errors import DataError
from dad_fast.evaluation.metrics.intervals import interval
from dad_fast.tools.analyze.distances import (
    Projected,
    directions,
    gaussian_kernel,
    halves,
    median_distance,
    mmd2,
    squared_sw2_of_sorted,
)

FEWEST = 20  # images in the smallest set; smaller halves give no useful interval


def compare(
    sets: Mapping[str, Tensor],
    tests: Mapping[str, Tensor],
    *,
    projections: int,
    resamples: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Compare every set of `sets`, which includes "clean", with every test; features float64 [N, F]
    each, in random order.

    All are cut to the size n of the smallest, and every resample takes a random half of each (m = n
    // 2): the same rows of all sets and the same rows of all tests, so differences between sets are
    less noisy than the sets. Intervals hold 95 % of the resamples.

    Returns size (n), half (m), bandwidth, and under "tests" for each test:
      floor: sw2 and mmd2 between the two halves of the test set
      sets:  for each set sw2; sw2_squared_corrected (minus half of both self-distances);
             minus_clean (the same, minus that of the clean set); mmd2. Each is {"value",
             "interval"}; a value is the mean over resamples.
    Raises DataError if a set is too small or all clean images have the same features.
    """
    together = {
        **{("set", name): x for name, x in sets.items()},
        **{("test", name): x for name, x in tests.items()},
    }
    n = min(len(x) for x in together.values())
    if n < FEWEST:
        (_, name), x = min(together.items(), key=lambda item: len(item[1]))
        raise DataError(
            f"{name} has only {len(x)} images to compare, {FEWEST} are needed; raise --num-images, "
            "or add --no-filter"
        )

    together = {key: x[:n] for key, x in together.items()}
    bandwidth = median_distance(together["set", "clean"])
    if bandwidth < 1e-9:
        raise DataError("all clean images have the same features; check the model and --data-dir")
    split = {"set": halves(n, resamples, seed + 1), "test": halves(n, resamples, seed + 2)}
    along = directions(next(iter(together.values())).shape[1], projections, seed)

    projected = {key: Projected(x, along) for key, x in together.items()}
    own = {key: torch.zeros(resamples, dtype=torch.float64) for key in together}
    between = {
        (test, name): torch.zeros(resamples, dtype=torch.float64) for test in tests for name in sets
    }
    for r in range(resamples):
        first = {}
        for key, one in projected.items():
            first[key] = one.part(split[key[0]].first[r])
            own[key][r] = squared_sw2_of_sorted(first[key], one.part(split[key[0]].second[r]))
        for test, name in between:
            between[test, name][r] = squared_sw2_of_sorted(first["set", name], first["test", test])
        progress(r + 1, resamples)

    kernels = {
        name: gaussian_kernel(together["set", name], together["set", name], bandwidth)
        for name in sets
    }
    found_tests: dict[str, Any] = {}
    for test in tests:
        kernel = gaussian_kernel(together["test", test], together["test", test], bandwidth)
        floor_mmd = mmd2(kernel, kernel, kernel, *split["test"])
        corrected = {
            name: between[test, name] - (own["set", name] + own["test", test]) / 2 for name in sets
        }
        of_sets = {}
        for name in sets:
            across = gaussian_kernel(together["set", name], together["test", test], bandwidth)
            mmd = mmd2(kernels[name], kernel, across, split["set"].first, split["test"].first)
            of_sets[name] = {
                "sw2": _summary(between[test, name].sqrt()),
                "sw2_squared_corrected": _summary(corrected[name]),
                "minus_clean": _summary(corrected[name] - corrected["clean"]),
                "mmd2": _summary(mmd),
            }
        found_tests[test] = {
            "floor": {"sw2": _summary(own["test", test].sqrt()), "mmd2": _summary(floor_mmd)},
            "sets": of_sets,
        }
    return {
        "size": n,
        "half": n // 2,
        "bandwidth": bandwidth,
        "projections": projections,
        "resamples": resamples,
        "tests": found_tests,
    }


def _summary(values: Tensor) -> dict[str, Any]:
    return {"value": values.mean().item(), "interval": list(interval(np.asarray(values)))}
