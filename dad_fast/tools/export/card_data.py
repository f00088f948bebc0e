"""Front matter of a model card: the Hugging Face hub's metadata, with results as its model-index."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

TASK = "image-classification"
# Key of a suite's results -> metric of the hub, title, factor from our unit to the hub's
METRICS = {
    "top1": ("accuracy", "top-1 accuracy", 0.01),
    "top5": ("accuracy", "top-5 accuracy", 0.01),
    "ece": ("expected_calibration_error", "expected calibration error", 0.01),
    "nll": ("negative_log_likelihood", "negative log-likelihood", 1.0),
}
# A calibration changes these after the evaluation.
OF_CONFIDENCES = ("ece", "nll")


def front_matter(
    name: str, data: str, suites: Mapping[str, Any], *, is_timm: bool, is_calibrated: bool
) -> str:
    """Return YAML between lines of dashes; accuracies and ECE are shares of 1, as on the hub.

    name: of the model. data: name of the training data. suites: name -> results of a test set.
    """
    skipped = OF_CONFIDENCES if is_calibrated else ()
    results = list(_eval_results(data, suites, skipped))
    card = ModelCardData(
        library_name="timm" if is_timm else None,
        license="unknown",
        model_name=name if results else None,
        pipeline_tag=TASK,
        tags=[TASK, "dad-fast"],
        eval_results=results or None,
    )
    return f"---\n{card.to_yaml()}\n---"


def _eval_results(
    data: str, suites: Mapping[str, Any], skipped: tuple[str, ...]
) -> Iterator[EvalResult]:
    for suite, found in suites.items():
        for key, (metric, title, factor) in METRICS.items():
            value = found.get(key)
            if key in skipped or value is None or not math.isfinite(value):
                continue
            yield EvalResult(
                task_type=TASK,
                dataset_type=suite,
                dataset_name=f"{suite} (model trained on {data})" if data else suite,
                metric_type=metric,
                metric_name=title,
                metric_value=round(factor * value, 6),
            )
