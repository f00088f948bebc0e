"""Folder of checkpoints: all that a run needs to resume bit for bit, written so that a crash leaves
the previous one whole.

    checkpoints/step-N/model.safetensors    what evaluation uses (EMA when on), with its metadata
    checkpoints/step-N/train.safetensors    student, EMA, optimizer, generators, meter: tensors only
    checkpoints/step-N/state.json           counters, settings, SHA-256 of both files and of itself
    checkpoints/latest, checkpoints/best    symbolic links

A checkpoint is written under a temporary name, synced and renamed; state.json is its last file.
Nothing is pickled.

Own code because torch's distributed checkpoint reads its metadata by raw pickle, and safetensors
has no checksums.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dad_fast.errors import DataError
from dad_fast.files import disk_error, sync
from dad_fast.models.weights.files import sha256_file

FILES = ("model.safetensors", "train.safetensors")
STATE = "state.json"
# Of state.json and the names in train.safetensors. Other formats are refused.
FORMAT = 2


@dataclass
class Checkpoint:
    """A loaded checkpoint: `tensors` as given to `save`, `state` its JSON part."""

    path: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class CheckpointFolder:
    """The `checkpoints/` folder of a run."""

    def __init__(self, root: Path, keep: int):
        self.root = root
        self.keep = max(1, keep)
        # The step that the run resumed from, and its checkpoint if that was the best.
        self._loaded: int | None = None
        self._best: Path | None = None

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        write_model: Callable[[Path], None],
        best: bool,
        prune: bool = True,
    ) -> Path:
        """Write `step-N` and link `latest` (and `best`) to it; `prune` if asked for.

        Raises a one-line error if the disk fails; the previous checkpoint is whole then.
        """
        final = self.root / f"step-{step}"
        temporary = self.root / f".step-{step}.tmp"
        aside = self.root / f".step-{step}.old"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            write_model(temporary / FILES[0])
            on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(on_host, temporary / FILES[1])
            # Through JSON and back: the digest must be that of the state as it will be read.
            own = json.loads(json.dumps({**state, "step": step, "best": best, "format": FORMAT}))
            hashes = {name: sha256_file(temporary / name) for name in FILES} | {STATE: _digest(own)}
            (temporary / STATE).write_text(json.dumps({**own, "sha256": hashes}))
            for path in [*temporary.iterdir(), temporary]:
                sync(path)
            # A resumed run saves the same step again. Moved aside, so that at every moment one of
            # them is whole.
            if final.exists():
                shutil.rmtree(aside, ignore_errors=True)
                final.rename(aside)
            temporary.rename(final)
            sync(self.root)
            self._link("latest", final.name)
            if best:
                self._link("best", final.name)
            if prune:
                self.prune(step)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            fix = "resume with --resume auto: the checkpoint before is whole"
            raise disk_error(error, final, fix) from error
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return final

    def prune(self, saved: int, protected: int | None = None) -> None:
        """Delete all but the `keep` latest checkpoints, the best and that of step `protected`.

        Those of the future of another run go too, and what a killed process left unfinished: after
        a resume from step N, checkpoints of later steps belong to the run before it. saved: the
        step of the last `save`.
        """
        best = os.path.realpath(self.root / "best")
        found = self._newest_first()
        abandoned = []
        if self._loaded is not None:
            abandoned = [path for path in found if _step(path) > max(self._loaded, saved)]
        covered = [path for path in found if path not in abandoned][: self.keep]
        covered += [path for path in found if _step(path) == protected]
        for path in found:
            if path in abandoned or (path not in covered and os.path.realpath(path) != best):
                # Renamed first: a partly deleted checkpoint must not look like one.
                gone = self.root / f".{path.name}.gone"
                shutil.rmtree(gone, ignore_errors=True)
                path.rename(gone)
        for suffix in ("tmp", "old", "gone"):
            for torn in self.root.glob(f".step-*.{suffix}"):
                shutil.rmtree(torn, ignore_errors=True)
        if (self.root / "best").is_symlink() and not (self.root / "best").exists():
            (self.root / "best").unlink()

    def load(self, path: str, log: Callable[[str], None]) -> Checkpoint | None:
        """Load the newest undamaged checkpoint (`path` = "auto"; None if there is none), or the one
        at `path`.

        `log` gets lines about damaged checkpoints. The next `save` deletes checkpoints of later
        steps. Raises DataError if `path` is missing or damaged, or "auto" finds damaged checkpoints
        only.
        """
        if path != "auto" and not Path(path).exists():
            raise DataError(
                f"--resume {path}: no such file or folder; name a run's folder RUN or "
                "RUN/checkpoints/step-N, or write --resume auto"
            )
        self._finish_renames()
        if path == "auto":
            found = self._newest(log)
        elif (Path(path) / "checkpoints").is_dir():
            # The folder of another run.
            found = CheckpointFolder(Path(path) / "checkpoints", self.keep).load("auto", log)
        else:
            found = self._read(Path(path))
        if found is not None:
            self._loaded = found.state["step"]
            self._best = found.path if found.state["best"] else self._best_before(self._loaded)
        return found

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, sound or not, the newest first."""
        self._finish_renames()
        return [_step(path) for path in self._newest_first()]

    def is_sound(self, step: int, log: Callable[[str], None]) -> bool:
        """Read the checkpoint of a step. `log` gets a line if it is damaged."""
        try:
            self._read(self.path_of(step))
        except DataError as error:
            log(f"{error}; trying the checkpoint before it")
            return False
        return True

    def path_of(self, step: int) -> Path:
        return self.root / f"step-{step}"

    def best_step(self) -> int | None:
        """Return the step of the best checkpoint, or None before the first validation."""
        best = self.root / "best"
        return _step(best.resolve()) if best.exists() else None

    def settle(self) -> None:
        """Finish an interrupted `save` before the run resumes: update the links, delete checkpoints
        that are old or later than the one that the run resumes from.
        """
        if self._best is not None and self._best.resolve().parent == self.root.resolve():
            self._link("best", self._best.resolve().name)
        if self._loaded is not None and self.path_of(self._loaded).is_dir():
            self._link("latest", self.path_of(self._loaded).name)
            self.prune(self._loaded)

    def _best_before(self, step: int) -> Path | None:
        """Return the best checkpoint up to a step if the link `best` leads beyond it."""
        linked = self.best_step()
        if linked is None or linked <= step:
            return None
        for path in self._newest_first():
            with suppress(OSError, ValueError, KeyError):
                if _step(path) < step and json.loads((path / STATE).read_text())["best"]:
                    return path
        return None

    def _finish_renames(self) -> None:
        """Restore what a process that was killed between the two renames of `save` put aside."""
        for aside in self.root.glob(".step-*.old"):
            final = self.root / aside.name[1:].removesuffix(".old")
            if not final.exists():
                aside.rename(final)

    def _newest(self, log: Callable[[str], None]) -> Checkpoint | None:
        damaged = ""
        for candidate in self._newest_first():
            try:
                found = self._read(candidate)
            except DataError as error:
                damaged = str(error)
                log(f"{error}; trying the checkpoint before it")
            else:
                return found
        if damaged:
            raise DataError(
                f"{self.root}: no sound checkpoint is left ({damaged}); start again with "
                "--overwrite"
            )
        return None

    def _read(self, path: Path) -> Checkpoint:
        try:
            state = json.loads((path / STATE).read_text())
            hashes = state.pop("sha256")
            found = {name: sha256_file(path / name) for name in FILES} | {STATE: _digest(state)}
            for name, digest in found.items():
                if hashes[name] != digest:
                    raise DataError(f"checkpoint {path} is damaged: {name} is not what was written")
            if state.get("format") != FORMAT:
                formats = f"format {state.get('format', 1)}, not {FORMAT}"
                raise DataError(
                    f"checkpoint {path} was written by another version of dad-fast ({formats}): "
                    "resume with that version"
                )
            if type(state["step"]) is not int or state["step"] < 0:
                raise ValueError('"step" is not a number of steps')
            if type(state["best"]) is not bool:
                raise ValueError('"best" is not true or false')
            return Checkpoint(path, load_file(path / FILES[1]), state)
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
            SafetensorError,
        ) as error:
            raise DataError(
                f"checkpoint {path} cannot be read: {type(error).__name__}: {error}"
            ) from None

    def _link(self, name: str, target: str) -> None:
        temporary = self.root / f".{name}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, self.root / name)
        sync(self.root)

    def _newest_first(self) -> list[Path]:
        found = (path for path in self.root.glob("step-*") if path.name[5:].isdecimal())
        return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def snapshot(*groups: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Copy tensors to host memory.

    A tensor in several groups is copied once. Within a group, which becomes one file, no two copies
    share memory.
    """
    copies: dict[Any, Tensor] = {}
    taken = []
    for group in groups:
        mine: dict[str, Tensor] = {}
        seen = set()
        for name, tensor in group.items():
            key: tuple[Any, ...] = (id(tensor),)
            if tensor.numel():
                key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if key not in copies or key in seen:
                copies[key] = tensor.detach().to("cpu", copy=True).contiguous()
            seen.add(key)
            mine[name] = copies[key]
        taken.append(mine)
    return taken


def generator_tensors(device: torch.device) -> dict[str, Tensor]:
    """Return the state of every global random generator: Python's, NumPy's, torch's and the
    device's.
    """
    version, words, gauss = random.getstate()
    python = torch.tensor([version, *words], dtype=torch.int64)
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {
        "generator.python": python,
        "generator.python_gauss": torch.tensor(
            [float("nan") if gauss is None else gauss], dtype=torch.float64
        ),
        "generator.numpy": torch.tensor([*map(int, keys), position, has_gauss], dtype=torch.int64),
        "generator.numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "generator.torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        tensors["generator.device"] = torch.cuda.get_rng_state(device)
    return tensors


def restore_generators(tensors: dict[str, Tensor], device: torch.device) -> None:
    """Restore the state of `generator_tensors`.

    Without a state of this kind of device its generator stays as seeded.
    """
    version, *words = tensors["generator.python"].tolist()
    gauss = tensors["generator.python_gauss"].item()
    random.setstate((version, tuple(words), None if gauss != gauss else gauss))
    *keys, position, has_gauss = tensors["generator.numpy"].tolist()
    np.random.set_state(
        (
            "MT19937",
            np.array(keys, dtype=np.uint32),
            position,
            has_gauss,
            tensors["generator.numpy_gauss"].item(),
        )
    )
    torch.set_rng_state(tensors["generator.torch"])
    if device.type == "cuda" and "generator.device" in tensors:
        torch.cuda.set_rng_state(tensors["generator.device"], device)
