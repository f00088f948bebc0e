"""Optimizers: timm's by name, fused where torch can, and those of NVIDIA's apex where it is
installed.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from dad_fast.config.schema import OptimConfig
from dad_fast.errors import EnvironmentProblem, UsageError

# The fused form of these skips a step on the device, where `found_inf` is set, and takes its
# learning rate from there.
FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)

# timm's names of apex's optimizers -> the same optimizer of torch.
OPTIMIZERS = {
    "fusedsgd": "sgd",
    "fusedadam": "adam",
    "fusedadamw": "adamw",
    "fusedlamb": "lamb",
    "fusednovograd": "novograd",
}


def build_optimizer(model: nn.Module, cfg: OptimConfig, cuda: bool) -> torch.optim.Optimizer:
    """Build timm's optimizer `cfg.opt`, without weight decay on biases and norms.

    With `layer_decay`, timm's groups of layers have a "lr_scale" each, by which `Update.begin`
    multiplies the learning rate.

    Raises UsageError for an unknown optimizer or argument, EnvironmentProblem for an apex optimizer
    that cannot run.
    """
    kwargs = dict(cfg.opt_kwargs)
    check_optimizer(cfg.opt, cuda)
    given: dict[str, Any] = {}
    if cfg.opt_betas:
        given["betas"] = cfg.opt_betas
    if cfg.opt_eps:
        given["eps"] = cfg.opt_eps
    if cfg.layer_decay:
        # timm finds the layers by the names of its own model, inside the student.
        given["layer_decay"] = cfg.layer_decay
        model = getattr(model, "model", model)

    def create(**extra: Any) -> torch.optim.Optimizer:
        return create_optimizer_v2(
            model,
            opt=cfg.opt,
            lr=cfg.lr,
            weight_decay=cfg.weight_decay,
            momentum=cfg.momentum,
            **given,
            **kwargs,
            **extra,
        )

    try:
        optimizer = create()
        if type(optimizer) in FUSED and not {"fused", "foreach"} & kwargs.keys():
            return create(fused=True)
        return optimizer
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        raise UsageError(
            f"--opt {cfg.opt} cannot be built: {error}; see timm.optim.list_optimizers() and "
            "optim.opt_kwargs"
        ) from None


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if `optimizer` skips a step, as if it had never come, where its `found_inf` is
    set on the device.
    """
    # A dampened first step differs from later ones, which only the host can tell apart.
    is_dampened = any(group.get("dampening") for group in optimizer.param_groups)
    is_fused = type(optimizer) in FUSED and bool(optimizer.defaults.get("fused"))
    return is_fused and not is_dampened


def fill_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Set the momentum buffers of a new SGD to zero.

    Its first step is the same as without buffers. Fused SGD would create them uninitialised, leave
    them so if it skips that step, and apply them in the next.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        for p in group["params"] if group["momentum"] else ():
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def apex_problem() -> tuple[str, str]:
    """Return (problem, fix) of the installed `apex`; both are empty for NVIDIA's with its compiled
    parts.

    Imports nothing. NVIDIA's has `apex.optimizers` and, built with its extensions, the module
    `amp_C`; PyPI's `apex` is a web toolkit.
    """
    spec = find_spec("apex")
    if spec is None:
        fix = "build it from NVIDIA's source with --cpp_ext --cuda_ext"
        return "it is not installed", f"{fix} (PyPI's apex is another package)"
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not any((folder / "optimizers").is_dir() for folder in folders):
        problem = "the installed apex is PyPI's web toolkit, not NVIDIA's"
        return problem, "pip uninstall -y apex, and build NVIDIA's from its source"
    if find_spec("amp_C") is None:
        problem = "NVIDIA's apex is here without its compiled parts (amp_C)"
        return problem, "build it from its source with --cpp_ext --cuda_ext"
    return "", ""


def check_optimizer(opt: str, cuda: bool) -> None:
    """Raise EnvironmentProblem for an apex optimizer that cannot run here.

    Not yet run with apex.
    """
    if opt.lower() not in OPTIMIZERS:
        return
    problem, fix = apex_problem()
    if not problem and not cuda:
        problem, fix = "it needs a CUDA device", "run on a GPU"
    if problem:
        raise EnvironmentProblem(
            f"--opt {opt} is NVIDIA apex's: {problem}; {fix}, or use --opt "
            f"{OPTIMIZERS[opt.lower()]}"
        )
