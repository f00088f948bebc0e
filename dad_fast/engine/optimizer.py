"""NVIDIA's apex: whether the package of that name is it, and the optimizers of its that timm knows. Nothing here needs it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from dad_fast.errors import EnvironmentProblem

# timm's names of apex's optimizers; the same from torch, which are fused here too.
OPTIMIZERS = {
    "fusedsgd": "sgd",
    "fusedadam": "adam",
    "fusedadamw": "adamw",
    "fusedlamb": "lamb",
    "fusednovograd": "novograd",
}


def apex_problem() -> tuple[str, str]:
    """(what is wrong, the mend), both empty where it is NVIDIA's with its compiled parts. Neither is imported.

    NVIDIA's has `apex.optimizers` and, built with its extensions, the module `amp_C`; PyPI's `apex` is a web toolkit.
    """
    spec = find_spec("apex")
    if spec is None:
        return (
            "it is not installed",
            "build it from NVIDIA's source with --cpp_ext --cuda_ext (PyPI's apex is another package)",
        )
    if not any(
        (Path(folder) / "optimizers").is_dir() for folder in spec.submodule_search_locations or []
    ):
        return (
            "the installed apex is PyPI's web toolkit, not NVIDIA's",
            "pip uninstall -y apex, and build NVIDIA's from its source",
        )
    if find_spec("amp_C") is None:
        return (
            "NVIDIA's apex is here without its compiled parts (amp_C)",
            "build it from its source with --cpp_ext --cuda_ext",
        )
    return "", ""


def check_optimizer(opt: str, cuda: bool) -> None:
    """EnvironmentProblem where `opt` is one of apex's and cannot run here. That adapter has not been run with apex yet."""
    if opt.lower() not in OPTIMIZERS:
        return
    problem, mend = apex_problem()
    if not problem and not cuda:
        problem, mend = "it needs a CUDA device", "run on a GPU"
    if problem:
        raise EnvironmentProblem(
            f"--opt {opt} is NVIDIA apex's: {problem}; {mend}, or use --opt {OPTIMIZERS[opt.lower()]}"
        )
