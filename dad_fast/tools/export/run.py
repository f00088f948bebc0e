"""`dad-fast export`: write a student as timm, ONNX or torch.export files.

Each is read back and compared first.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError

import dad_fast
from dad_fast.config.options import ExportOptions
from dad_fast.data.classes import ClassMap
from dad_fast.errors import UsageError
from dad_fast.files import atomic_write_json, atomic_write_text, disk_error, sync
from dad_fast.locks import LOCK, lock_folder
from dad_fast.models.load_student import load_raw_student, load_student, take_view
from dad_fast.models.places import checkpoint_file
from dad_fast.models.registry import MODULE
from dad_fast.models.student import Student
from dad_fast.models.weights.declared import CLASSES, PROBE, STUDENT, recorded_classes
from dad_fast.models.weights.files import sha256_file
from dad_fast.tools.export import graph
from dad_fast.tools.export.card import model_card, read_run, short_name
from dad_fast.tools.export.check import largest_difference, reference
from dad_fast.tools.export.push import Push
from dad_fast.tools.export.timm_folder import read_timm, write_timm

RECORD = "export.json"  # written last; marks a folder as an export that may be replaced


def run(options: ExportOptions) -> int:
    """Write the export and return the exit code."""
    target = Path(options.output).absolute()
    push = Push(options.push) if options.push else None
    # Not in the folder, which a new one replaces.
    with lock_folder(target, target.parent / f".{target.name}{LOCK}"):
        return _export(options, push)


def _export(options: ExportOptions, push: Push | None) -> int:
    target = Path(options.output)
    _check_target(target, options.overwrite)
    student, metadata, source, weights = _load(options.checkpoint, options.weights)
    if PROBE in metadata:
        student.name = f"linear probe on {short_name(student.spec['teacher'])}"
    classes = recorded_classes(source, metadata.get(CLASSES), student.num_classes)
    is_timm = STUDENT in metadata and not student.spec["name"].startswith(MODULE)
    formats = options.formats or (("timm",) if is_timm else ("onnx",))
    if "onnx" in formats:
        graph.check_onnx_packages()
    if "timm" in formats and not is_timm:
        raise UsageError(
            f"--format timm: {student.name} is not a timm model; use --format onnx torch"
        )

    facts = read_run(source)
    take_view(student, facts.cfg)
    if push is not None:
        push.check(source, weights, facts)
    with _new_folder(target) as folder:
        checks = _write(folder, student, classes, metadata, formats)
        files = sorted(path.name for path in folder.iterdir())
        card = model_card(student, classes, metadata, weights, facts, checks, files, options.push)
        atomic_write_text(folder / "README.md", card)
        packages = ("torch", "timm", *(graph.PACKAGES if "onnx" in formats else ()))
        record = {
            "dad_fast": dad_fast.__version__,
            "model": student.name,
            "weights": weights,
            "calibration": student.calibration and student.calibration._asdict(),
            "source": {"file": source.name, "sha256": sha256_file(source)},
            "files": {name: sha256_file(folder / name) for name in files},
            "largest_difference": checks,
            "packages": {name: version(name) for name in packages},
        }
        atomic_write_json(folder / RECORD, record)

    for name, difference in checks.items():
        print(f"{name:<28} equals the student to {difference:.1e} of the largest logit")
    if student.calibration is not None:
        print(f"calibrated: {student.calibration}; every file divides the logits by it")
    print(
        f"{target}: {', '.join([*files, 'README.md', RECORD])}; {student.name}, {weights} weights"
    )
    if push is not None:
        push.upload(target)
    return 0


def _load(checkpoint: str, weights: str) -> tuple[Student, dict[str, str], Path, str]:
    """Load the student; return it with its metadata, its file, and the kind of its weights ("EMA"
    or "raw").
    """
    path = checkpoint_file(checkpoint)
    student, metadata = load_student(path)
    averaged = metadata.get("dad_fast.ema") == "true"
    if weights == "ema" and not averaged:
        raise UsageError(f"--weights ema: {path} was trained without EMA; leave --weights out")
    if weights != "raw" or not averaged:
        return student, metadata, path, "EMA" if averaged else "raw"
    student, metadata, folder = load_raw_student(checkpoint)
    return student, {**metadata, "dad_fast.ema": "false"}, folder / "train.safetensors", "raw"


def _write(
    folder: Path,
    student: Student,
    classes: ClassMap,
    metadata: dict[str, str],
    formats: tuple[str, ...],
) -> dict[str, float]:
    """Write each format and read it back; return reader -> largest difference."""
    pairs = reference(student)
    checks: dict[str, float] = {}
    metadata = {**metadata, **student.contents()[1]}  # the current description
    if "timm" in formats:
        write_timm(folder, student, classes, metadata)
        checks["dad-fast"] = largest_difference(load_student(folder)[0], pairs, "model.safetensors")
        for name, model in read_timm(folder):
            checks[name] = largest_difference(model, pairs, name)
    if "onnx" in formats or "torch" in formats:
        program = graph.trace(student)
        metadata = {
            key: text for key, text in metadata.items() if key != PROBE
        } | graph.view_metadata(student)
        if "onnx" in formats:
            graph.write_onnx(folder / graph.ONNX, program, metadata)
            checks["onnxruntime"] = largest_difference(
                graph.read_onnx(folder / graph.ONNX), pairs, graph.ONNX
            )
        if "torch" in formats:
            graph.write_program(folder / graph.PROGRAM, program, metadata)
            checks["torch.export"] = largest_difference(
                graph.read_program(folder / graph.PROGRAM), pairs, graph.PROGRAM
            )
    return checks


def _check_target(target: Path, overwrite: bool) -> None:
    """Raise UsageError unless `target` is new, empty, or an export and `overwrite` is set."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        kind = "link" if target.is_symlink() else "file"
        raise UsageError(f"-o {target}: is a {kind}; name a new folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UsageError(
            f"-o {target}: exists; add --overwrite to replace an earlier export, or name another "
            "folder"
        )
    if not _is_export(target):
        raise UsageError(
            f"--overwrite: {target} holds no export, so it is not replaced; name another folder"
        )


def _is_export(folder: Path) -> bool:
    try:
        return "dad_fast" in json.loads((folder / RECORD).read_text())
    except (OSError, ValueError, TypeError, RecursionError):
        return False


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to fill; it replaces `target` on success and is removed on failure, which
    leaves `target` unchanged. The caller holds the lock of `target`.

    Clean up after a killed export first: remove its folder, and restore an earlier export that it
    had moved aside.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.parent / f".{target.name}.tmp"
    old = target.parent / f".{target.name}.old"
    if old.is_dir() and not target.exists():
        old.rename(target)
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    try:
        new.mkdir()
        yield new
        for path in [*new.iterdir(), new]:
            sync(path)
        try:
            if target.is_dir():
                target.rename(old)
            new.rename(target)
        except BaseException:
            if old.is_dir() and not target.exists():
                old.rename(target)
            raise
        sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise disk_error(error, target) from error
    finally:
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
