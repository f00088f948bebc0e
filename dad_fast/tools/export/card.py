"""Model card of an export: loading, training, results, limits, licence, checks."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dad_fast.config import Config
from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.names import shown
from dad_fast.errors import DataError
from dad_fast.methods.registry import METHODS
from dad_fast.models.places import run_settings
from dad_fast.models.registry import split_names
from dad_fast.models.student import Student
from dad_fast.tools.export.card_data import front_matter


@dataclass(frozen=True)
class RunFacts:
    """Facts of a model from its run's folder: settings, and results.json if the file is the
    evaluated model.
    """

    cfg: Config | None = None
    results: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)


def read_run(weights: Path) -> RunFacts:
    """Read the facts of the run that contains the file `weights`: RUN or RUN/checkpoints/step-N.
    Missing files are left out.

    Raises DataError or UsageError for a damaged file.
    """
    cfg, run = run_settings(weights)
    if cfg is None:
        return RunFacts()
    evaluated = weights.absolute() == run / "model.safetensors"
    results = _object(run / "results.json") if evaluated else {}
    return RunFacts(cfg, results, _object(run / "run.json"))


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: cannot be read ({type(error).__name__}); restore it, or remove it to get a "
            "card without it"
        ) from None
    if not isinstance(found, dict):
        raise DataError(
            f"{path}: not a JSON object; restore it, or remove it to get a card without it"
        )
    return found


def model_card(
    student: Student,
    classes: ClassMap,
    metadata: Mapping[str, str],
    weights: str,
    run: RunFacts,
    checks: Mapping[str, float],
    files: Sequence[str],
    repository: str = "",
) -> str:
    """Return Markdown with front matter for the Hugging Face hub.

    weights     "EMA" or "raw"
    checks      name of what was read back -> largest difference of logits
    repository  USER/REPO of the hub, if the folder is uploaded
    """
    try:
        parts = [
            front_matter(
                repository.rpartition("/")[2] or student.name,
                "" if run.cfg is None else short_name(run.cfg.data.data_dir),
                run.results.get("suites") or {},
                is_timm="config.json" in files,
                is_calibrated=student.calibration is not None,
            ),
            *_title(student, classes, metadata),
            *_loading(student, files, repository),
            *_training(student, metadata, weights, run),
            *_results(student, weights, run),
            *_limits(student, classes, run),
            *_licence(run),
            *_verified(checks),
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"results.json or run.json: not the format that a run writes ({type(error).__name__}: "
            f"{error})"
        ) from None
    return "\n".join(parts) + "\n"


def md(value: Any) -> str:
    """Escape text from a file for Markdown: one line, no markup, no control characters."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(shown(str(value)), quote=False))


def _title(student: Student, classes: ClassMap, metadata: Mapping[str, str]) -> Iterator[str]:
    method = metadata.get("dad_fast.method", "")
    names = ", ".join(md(name) for name in classes.names[:8])
    if len(classes) > 8:
        names += f" and {len(classes) - 8:,} more"
    yield f"# {md(student.name)}" + (f", trained by {md(method)}" if method else "")
    yield f"\nClassifies images of {student.image_size} × {student.image_size} pixels as one of {len(classes):,} classes: {names}."


def _loading(student: Student, files: Sequence[str], repository: str) -> Iterator[str]:
    yield "\n## How to load it\nDIR is the folder of this file."
    if repository and "config.json" in files:
        yield f"From the hub: `timm.create_model('hf-hub:{repository}', pretrained=True)`, or"
        yield f"`dad-fast predict timm:hf-hub:{repository} IMAGE.jpg`. From its folder:"
    if "config.json" in files:
        yield "```python\nimport timm\n"
        yield 'model = timm.create_model("local-dir:DIR", pretrained=True).eval()'
        yield "transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))"
        yield "logits = model(transform(image.convert('RGB')).unsqueeze(0))  # of a PIL image\n```"
        yield "By the architecture's name, with `pretrained_cfg` from the file:"
        yield "```python\nimport json, timm\n\nconfig = json.load(open('DIR/config.json'))"
        yield "overlay = {**config['pretrained_cfg'], 'file': 'DIR/model.safetensors'}"
        yield "model = timm.create_model("
        yield "    config['architecture'], pretrained=True, pretrained_cfg_overlay=overlay, **config.get('model_args', {})\n).eval()\n```"
    pixels = f"[batch, 3, {student.image_size}, {student.image_size}]"
    if "model.onnx" in files:
        yield f"As ONNX: pixels float32 {pixels} in [0, 1], normalised by the graph; any batch size."
        yield "```python\nimport onnxruntime\n\nsession = onnxruntime.InferenceSession('DIR/model.onnx')"
        yield "(logits,) = session.run(['logits'], {'pixels': pixels})\n```"
    if "model.pt2" in files:
        yield f"As a program of torch.export, with the same pixels {pixels}. Load only files that you trust: they may contain code."
        yield "```python\nimport torch\n\nmodel = torch.export.load('DIR/model.pt2').module()\n```"
    yield "From the command line: `dad-fast predict DIR IMAGE.jpg`"


def _method_text(method: str) -> str:
    spec = METHODS.find(method)
    return spec.card_text if spec is not None else md(method) or "not recorded"


def _training(
    student: Student, metadata: Mapping[str, str], weights: str, run: RunFacts
) -> Iterator[str]:
    yield "\n## How it was trained"
    method = metadata.get("dad_fast.method", "")
    yield f"- Method: {_method_text(method)}."
    kind = "average over the steps (EMA)" if weights == "EMA" else "of the last step (raw)"
    yield f"- Weights: {kind}."
    if student.calibration is not None:
        yield f"- Calibration: {md(student.calibration)}; the logits of all files here are divided by it."
    cfg, results, machine = run.cfg, run.results, run.machine
    if cfg is None:
        yield "- The weights were not in a run's folder, so nothing more is known."
        return
    data = short_name(cfg.data.data_dir)
    yield f"- Images: {md(data)}, split {md(cfg.data.train_split)}; {cfg.data.batch_size:,} to a batch, seed {cfg.seed}."
    if results:
        yield f"- {int(results['steps']):,} steps, {float(results['epochs']):.4g} epochs, {float(results['seconds']):,.0f} s."
    origin = md(short_name(cfg.student.init_from or cfg.student.weights))
    if not origin:
        origin = "timm's pretrained weights" if cfg.student.pretrained else "random weights"
    yield f"- Started from {origin}."
    for part in ("teacher", "discretizer"):
        found = results.get(part) or machine.get(part)
        if found:
            name = short_names(found["name"])
            yield f"- {part.capitalize()}: {md(name)} (trained on: {md(found['seen'])})."
        elif part == "teacher" and cfg.teacher.name:
            yield f"- Teacher: {md(short_names(cfg.teacher.name))} (trained on: not recorded)."
    if student.has_batch_stats and not METHODS[cfg.method].is_plain:
        yield f"- Batch norm over clean and attacked images: {cfg.student.bn}."
    versions = machine.get("packages") or {}
    named = ", ".join(
        f"{md(name)} {md(versions[name])}"
        for name in ("dad-fast", "torch", "timm")
        if name in versions
    )
    yield f"- Made with {named or 'versions that are not recorded'}."


def _results(student: Student, weights: str, run: RunFacts) -> Iterator[str]:
    yield "\n## Results"
    if not run.results:
        yield f"No results of these weights ({weights}) were found next to them; run `dad-fast eval` to evaluate them."
        return
    teacher = ((run.results.get("teacher") or {}).get("suites")) or {}
    if student.calibration is not None:
        yield "ECE and NLL of this table are from before the calibration.\n"
    head, line = (
        "| suite | images | top-1 % | 95 % interval | top-5 % | ECE % | NLL |",
        "|---" + 6 * "|---:" + "|",
    )
    yield head + (" teacher's top-1 % |" if teacher else "")
    yield line + ("---:|" if teacher else "")
    for name, found in run.results["suites"].items():
        low, high = found.get("top1_interval") or (None, None)
        interval = "–" if low is None else f"{_number(low, 1)} – {_number(high, 1)}"
        cells = [
            md(name),
            f"{int(found['num_images']):,}",
            _number(found["top1"], 1),
            interval,
            _number(found.get("top5"), 1),
        ]
        cells += [_number(found.get("ece"), 1), _number(found.get("nll"), 3)]
        if teacher:
            cells.append(_number((teacher.get(name) or {}).get("top1"), 1))
        yield f"| {' | '.join(cells)} |"

    short = math.floor(student.image_size / student.crop_pct)
    side = student.image_size
    resized = "both sides" if student.squashed else "shorter side"
    view = f"{resized} to {short} px ({md(student.interpolation)}), centre crop of {side} px"
    yield f"\nPreprocessing: {view}, decoded by PIL, no EXIF rotation."
    yield from (
        f"- {md(name)}: {md(found['protocol'])}"
        for name, found in run.results["suites"].items()
        if found.get("protocol")
    )
    yield "\nOne model of one seed; corruptions (names without a folder) are applied to the validation images."


def _limits(student: Student, classes: ClassMap, run: RunFacts) -> Iterator[str]:
    yield "\n## Limits"
    yield f"- It predicts one of its {len(classes):,} classes for every image, also if none is visible; confidences are the softmax."
    yield "- It was evaluated only on the suites above: test it yourself before using it for decisions about people or safety."
    if run.cfg is not None and run.cfg.teacher.name:
        yield "- It learns its teacher's errors too. A suite in the teacher's training data is not new to the student."
    yield "- Exported in float32 and checked on a CPU; other precisions and devices round differently."


def _licence(run: RunFacts) -> Iterator[str]:
    yield "\n## Licence"
    taught = run.cfg is not None and run.cfg.teacher.name
    sources = "the images, its teacher" if taught else "the images"
    yield f"Not recorded. It depends on {sources} and the weights that it started from; state it here before you publish the model."
    yield "dad-fast, which trained it, is Apache-2.0; this does not apply to these weights."


def _verified(checks: Mapping[str, float]) -> Iterator[str]:
    yield "\n## Checked when it was exported"
    yield "Read back and compared with the student on noise, smooth and flat images: largest difference of logits over the largest logit."
    yield from (f"- {name}: {difference:.1e}" for name, difference in checks.items())


def _number(value: Any, digits: int) -> str:
    return "–" if value is None else f"{float(value):.{digits}f}"


def short_names(name: str) -> str:
    """Return `short_name` of each teacher of an ensemble."""
    return "+".join(map(short_name, split_names(name)))


def short_name(name: str) -> str:
    """Return the last part of a path, so that no folder of the training machine is published."""
    before, at, path = str(name).rpartition("@")
    is_path = bool(set(path) & set("/\\")) and ":" not in path
    if is_path:
        path = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
    return f"{before}{at}{path}"
