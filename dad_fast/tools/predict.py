"""`dad-fast predict`: print the most likely classes of images, from a trained or an exported
student.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dad_fast.config import Config
from dad_fast.config.fields import with_values
from dad_fast.config.options import PredictOptions
from dad_fast.data.augment.execute import eval_transform
from dad_fast.data.augment.mixing import to_pixels
from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.decode import EXTENSIONS, DecodeError, read_rgb
from dad_fast.data.sources.names import shown
from dad_fast.data.sources.registry import LISTINGS, SOURCES, find_listing
from dad_fast.distributed.device import resolve_device
from dad_fast.errors import DataError, UsageError
from dad_fast.evaluation.models import load_subject
from dad_fast.evaluation.suites.imagenet import imagenet_classes
from dad_fast.models.onnx_student import OnnxStudent
from dad_fast.models.student import Calibration, Student
from dad_fast.models.teacher import Teacher
from dad_fast.models.timm_teacher import hub_classes
from dad_fast.models.weights.declared import CLASSES, recorded_classes

# All have the view of their images.
Classifier = Student | Teacher | OnnxStudent
# The name of an image, and what PIL opens.
Picture = tuple[str, str | Path | BytesIO]
Predictions = list[tuple[float, int]]  # confidence and class, the most likely first


def run(options: PredictOptions) -> int:
    """Print the predictions and return the exit code.

    Raises DataError at the end if images could not be read.
    """
    device = resolve_device(options.device)
    model, classes = _open(options, device)
    show = _json_line if options.json else _text_line
    done = failed = 0
    images = find_images(options.images)
    while taken := list(islice(images, options.batch_size)):
        for (path, _), found in zip(taken, predict(model, taken, options.top, device), strict=True):
            done += 1
            if isinstance(found, DecodeError):
                failed += 1
                print(f"dad-fast: cannot read {found}", file=sys.stderr, flush=True)
            if options.json or not isinstance(found, DecodeError):
                print(show(path, found, classes), flush=not options.json)
    if failed:
        raise DataError(f"{failed:,} of {done:,} images could not be read; their names are above")
    return 0


def _open(options: PredictOptions, device: torch.device) -> tuple[Classifier, ClassMap]:
    """Load the model on `device`, with its classes. Everything but ONNX opens as in `eval`."""
    path = Path(options.model)
    only_onnx = (path / "model.onnx").is_file() and not (path / "model.safetensors").is_file()
    if path.is_dir() and only_onnx:
        path = path / "model.onnx"
    if path.suffix == ".onnx" and path.is_file():
        if options.device != "auto" and device.type != "cpu":
            raise UsageError(
                f"--device {device}: {path} runs on the CPU; leave --device out, or name the "
                "student's model.safetensors"
            )
        onnx = OnnxStudent(path)
        _mention(Calibration.from_metadata(path, onnx.metadata))
        return onnx, recorded_classes(path, onnx.metadata.get(CLASSES), onnx.num_classes)

    def classes_of_published() -> ClassMap:
        if options.class_map:
            return ClassMap.from_csv(options.class_map)
        return hub_classes(options.model) or imagenet_classes()

    cfg = with_values(Config(), {"data.class_map": options.class_map})
    subject = load_subject(options.model, cfg, classes_of_published, device)
    _mention(getattr(subject.model, "calibration", None))
    return subject.model.eval(), subject.classes


def _mention(calibration: Calibration | None) -> None:
    if calibration is not None:
        print(f"confidences are calibrated: {calibration}", file=sys.stderr)


def find_images(names: Sequence[str]) -> Iterator[Picture]:
    """Yield the named files, in named folders all image files by path, and the images of data
    sources (`hfds:NAME@test`); links to folders are not followed.

    Raises DataError for a folder without images.
    """
    for name in names:
        source = ":" in name and SOURCES.split(name)[0] in LISTINGS and not os.path.exists(name)
        listing = find_listing(name) if source else None
        if listing is not None:
            yield from listing.contents("")
            continue
        if not os.path.isdir(name):
            yield name, name
            continue
        inside = False
        for folder, folders, files in os.walk(name):
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            for file in sorted(files):
                if file.lower().endswith(EXTENSIONS) and not file.startswith("."):
                    inside = True
                    path = os.path.join(folder, file)
                    yield path, path
        if not inside:
            raise DataError(f"{shown(name)}: no images in this folder ({', '.join(EXTENSIONS)})")


@torch.no_grad()
def predict(
    model: Classifier, images: Sequence[Picture], top: int, device: torch.device
) -> list[Predictions | DecodeError]:
    """Return the `top` predictions of each image, or the error of an unreadable one."""

    def read(image: Picture) -> np.ndarray | DecodeError:
        name, file = image
        try:
            shown_as = "" if isinstance(file, (str, Path)) else shown(name)
            return eval_transform(read_rgb(file, shown_as), *model.view)
        except DecodeError as error:
            return error

    with ThreadPoolExecutor(min(8, torch.get_num_threads())) as pool:
        views = list(pool.map(read, images))
    found: list[Predictions | DecodeError] = [
        view if isinstance(view, DecodeError) else [] for view in views
    ]
    pixels = [view for view in views if not isinstance(view, DecodeError)]
    if pixels:
        # uint8 [B, 3, H, W]
        batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        call: Callable[[Tensor], Tensor] = model
        shares = call(to_pixels(batch.to(device))).float().softmax(1)
        best = shares.topk(min(top, model.num_classes))
        predictions = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        for i, view in enumerate(views):
            if not isinstance(view, DecodeError):
                found[i] = list(zip(*next(predictions), strict=True))
    return found


def _text_line(path: str, found: Any, classes: ClassMap) -> str:
    named = [f"{shown(classes.names[number])} {100 * share:.1f} %" for share, number in found]
    return f"{shown(path)}: {'; '.join(named)}"


def _json_line(path: str, found: Any, classes: ClassMap) -> str:
    """Format a JSON line in ASCII: safe on a terminal; bytes of a file name that are not UTF-8 stay
    as lone surrogates.
    """
    if isinstance(found, DecodeError):
        return json.dumps({"image": path, "error": str(found).removeprefix(f"{shown(path)}: ")})
    predictions = [
        {
            "class": number,
            "folder": classes.folders[number],
            "name": classes.names[number],
            "confidence": round(share, 6),
        }
        for share, number in found
    ]
    return json.dumps({"image": path, "predictions": predictions})
