"""Choice of the training loader: PIL or DALI."""

from __future__ import annotations

from contextlib import suppress
from importlib import metadata

import torch

from dad_fast.config.schema import AugmentConfig
from dad_fast.data.augment.names import dali_lacks
from dad_fast.data.loaders.loader import TrainLoader
from dad_fast.data.sources.base import Source
from dad_fast.errors import EnvironmentProblem

ALIASES = {"torchvision": "pil"}
# Samples of a source that are tested for JPEG files.
PROBED = 16


def train_loader(
    kind: str,
    source: Source,
    aug: AugmentConfig,
    img_size: int,
    batch_size: int,
    seed: int,
    workers: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    cycle: int = 0,
) -> TrainLoader:
    """Return the loader that `resolve_loader` names; `auto` takes PIL where DALI cannot be built.

    All loaders make the same batches. `why` of the loader is the reason for the choice. Raises the
    errors of `resolve_loader`, and EnvironmentProblem when `kind` is "dali" and it cannot be built.
    """
    device = torch.device(device)
    options = {"rank": rank, "world": world, "cycle": cycle, "pin_memory": device.type == "cuda"}
    arguments = source, aug, img_size, batch_size, seed, workers
    name, why = resolve_loader(kind, source, device)
    if kind == "auto" and name == "dali" and (lack := dali_lacks(aug.aa)):
        name, why = "pil", f"{lack} (--aa {aug.aa})"
    loader: TrainLoader | None = None
    if name == "dali":
        from dad_fast.data.loaders.dali.loader import DaliLoader

        try:
            loader = DaliLoader(*arguments, device=device, **options)
        except EnvironmentProblem as error:
            if kind == "dali":
                raise
            why = str(error).removeprefix("--loader dali: ").partition("; use ")[0]
    loader = loader or TrainLoader(*arguments, **options)
    loader.why = why
    return loader


def resolve_loader(kind: str, source: Source, device: torch.device) -> tuple[str, str]:
    """Return the name of the loader to use, "dali" or "pil", and the reason.

    Args:
        kind: "auto", "dali" or "pil" ("torchvision" is an alias of "pil").

    Raises EnvironmentProblem when `kind` is "dali" and DALI is not installed.
    """
    kind = ALIASES.get(kind, kind)
    if kind == "dali":
        check_dali()
    if kind != "auto":
        return kind, "asked for"
    if device.type != "cuda":
        # benchmarks, group loader
        return "pil", "on a CPU PIL is faster, unless large photographs are only cropped"
    if problem := _dali_problem():
        return "pil", problem
    samples = range(0, len(source), max(1, len(source) // PROBED))
    if not any(source.encoded(sample) is not None for sample in samples):
        return "pil", "the images are no JPEG files, which is what DALI decodes"
    return "dali", "DALI decodes on the GPU (not yet run on one)"


def check_dali() -> None:
    """Raise EnvironmentProblem when DALI is not installed."""
    if problem := _dali_problem():
        raise EnvironmentProblem(f"--loader dali: {problem}; or use --loader pil")


def _dali_problem() -> str:
    """Return why DALI cannot be used, with the fix; empty when it can."""
    try:
        from nvidia.dali import fn, math, pipeline_def, types  # noqa: F401
    except ImportError as error:
        package = f"nvidia-dali-cuda{(torch.version.cuda or '13').partition('.')[0]}0"
        placeholder = "PyPI's nvidia-dali is a placeholder"
        with suppress(metadata.PackageNotFoundError):
            metadata.version("nvidia-dali")
            return f"{placeholder}; pip uninstall nvidia-dali, then pip install {package}"
        if isinstance(error, ModuleNotFoundError):
            return f"DALI is not installed: pip install {package} ({placeholder})"
        why = " ".join(str(error).split())[:200]
        return f"DALI cannot be imported ({why}): pip install --force-reinstall {package}"
    return ""
