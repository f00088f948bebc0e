"""The model card beside an export: what it is, what it was trained on and by, how well it does, what it is not, how to load it."""

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
from dad_fast.models.run_settings import run_settings
from dad_fast.models.student import Student


@dataclass(frozen=True)
class RunFacts:
    """What a run's folder says of a model: its settings, and results.json where the model is the one that was judged."""

    cfg: Config | None = None
    results: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)


def read_run(weights: Path) -> RunFacts:
    """Facts of the run that the file `weights` lies in: a run's folder, or RUN/checkpoints/step-N. A file that is not there is left out.

    Raises DataError or UsageError for one that is damaged.
    """
    cfg, run = run_settings(weights)
    if cfg is None:
        return RunFacts()
    judged = weights.absolute() == run / "model.safetensors"
    return RunFacts(cfg, _object(run / "results.json") if judged else {}, _object(run / "run.json"))


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: cannot be read ({type(error).__name__}); restore it, or remove it and have a card without it"
        ) from None
    if not isinstance(found, dict):
        raise DataError(
            f"{path}: not a JSON object; restore it, or remove it and have a card without it"
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
) -> str:
    """Markdown with the front matter of the Hugging Face hub. `weights`: "EMA" or "raw"; `checks`: differences by what was read back."""
    try:
        parts = [
            *_title(student, classes, metadata, files),
            *_loading(student, files),
            *_training(student, metadata, weights, run),
            *_results(student, weights, run),
            *_limits(student, classes, run),
            *_licence(run),
            *_verified(checks),
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"results.json or run.json: not as a run writes them ({type(error).__name__}: {error})"
        ) from None
    return "\n".join(parts) + "\n"


def md(value: Any) -> str:
    """Text from a file in Markdown: one line, no markup, no control characters."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(shown(str(value)), quote=False))


def _title(
    student: Student, classes: ClassMap, metadata: Mapping[str, str], files: Sequence[str]
) -> Iterator[str]:
    method = metadata.get("dad_fast.method", "")
    names = ", ".join(md(name) for name in classes.names[:8]) + (
        f" and {len(classes) - 8:,} more" if len(classes) > 8 else ""
    )
    library = "library_name: timm\n" if "config.json" in files else ""
    yield f"---\n{library}pipeline_tag: image-classification\nlicense: unknown\ntags: [image-classification, dad-fast]\n---"
    yield f"# {md(student.name)}" + (f", trained by {md(method)}" if method else "")
    yield f"\nClassifies images of {student.image_size} × {student.image_size} pixels as one of {len(classes):,} classes: {names}."


def _loading(student: Student, files: Sequence[str]) -> Iterator[str]:
    yield "\n## How to load it\nDIR is the folder of this file."
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
        yield f"As ONNX: pixels float32 {pixels} in [0, 1], normalised inside; any batch size."
        yield "```python\nimport onnxruntime\n\nsession = onnxruntime.InferenceSession('DIR/model.onnx')"
        yield "(logits,) = session.run(['logits'], {'pixels': pixels})\n```"
    if "model.pt2" in files:
        yield f"As a program of torch.export, with the same pixels {pixels}. Load only files that you trust: they may hold code."
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
    yield f"- Weights: {'their average over the steps (EMA)' if weights == 'EMA' else 'as the optimizer left them'}."
    cfg, results, machine = run.cfg, run.results, run.machine
    if cfg is None:
        yield "- The run's folder was not beside the weights, so nothing more is known."
        return
    data = short_name(cfg.data.data_dir)
    yield f"- Images: {md(data)}, split {md(cfg.data.train_split)}; {cfg.data.batch_size:,} to a batch, seed {cfg.seed}."
    if results:
        yield f"- {int(results['steps']):,} steps, {float(results['epochs']):.4g} epochs, {float(results['seconds']):,.0f} s."
    origin = "timm's pretrained weights" if cfg.student.pretrained else ""
    origin = md(short_name(cfg.student.init_from or cfg.student.weights)) or origin
    yield f"- Started from {origin or 'random weights'}."
    for part in ("teacher", "discretizer"):
        found = results.get(part) or machine.get(part)
        if found:
            yield f"- {part.capitalize()}: {md(short_name(found['name']))}. It has seen: {md(found['seen'])}."
        elif part == "teacher" and cfg.teacher.name:
            yield f"- Teacher: {md(short_name(cfg.teacher.name))}. What it has seen is not recorded."
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
        yield f"No results of these weights ({weights}) lay beside them: `dad-fast eval` judges them."
        return
    teacher = ((run.results.get("teacher") or {}).get("suites")) or {}
    yield "| suite | images | top-1 % | 95 % interval | top-5 % | ECE % | NLL |" + (
        " teacher's top-1 % |" if teacher else ""
    )
    yield "|---|---:|---:|---:|---:|---:|---:|" + ("---:|" if teacher else "")
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
    view = f"shorter side to {short} px ({md(student.interpolation)}), centre crop of {side} px"
    yield f"\nPreprocessing: {view}, decoded by PIL, no EXIF rotation."
    yield from (
        f"- {md(name)}: {md(found['protocol'])}"
        for name, found in run.results["suites"].items()
        if found.get("protocol")
    )
    yield "\nOne model of one seed; corruptions (names without a folder) are applied to the validation images."


def _limits(student: Student, classes: ClassMap, run: RunFacts) -> Iterator[str]:
    yield "\n## Limits"
    yield f"- It names one of its {len(classes):,} classes for every image, also where none is shown; confidences are the softmax's."
    yield "- It was judged on the suites above and on nothing else: not for decisions about people or safety without a test of your own."
    if run.cfg is not None and run.cfg.teacher.name:
        yield "- It takes over what its teacher knows, its errors too. A suite that the teacher has seen is not new to the student."
    yield "- Exported in float32 and checked on a CPU; other precisions and devices round differently."


def _licence(run: RunFacts) -> Iterator[str]:
    yield "\n## Licence"
    sources = "the images" + (
        ", its teacher" if run.cfg is not None and run.cfg.teacher.name else ""
    )
    yield f"Not recorded. It depends on {sources} and the weights that it started from; whoever publishes this model states it here."
    yield "dad-fast, which trained it, is Apache-2.0; that says nothing about these weights."


def _verified(checks: Mapping[str, float]) -> Iterator[str]:
    yield "\n## Checked when it was exported"
    yield "Read back and compared with the student on noise, smooth and flat images: largest difference of logits over the largest logit."
    yield from (f"- {name}: {difference:.1e}" for name, difference in checks.items())


def _number(value: Any, digits: int) -> str:
    return "–" if value is None else f"{float(value):.{digits}f}"


def short_name(name: str) -> str:
    """A path's last part: folders of the machine that trained are nobody's business."""
    before, at, path = str(name).rpartition("@")
    path = (
        path
        if path.startswith("embedded:") or not set(path) & set("/\\") or ":" in path
        else re.split(r"[/\\]", path.rstrip("/\\"))[-1]
    )
    return f"{before}{at}{path}"
