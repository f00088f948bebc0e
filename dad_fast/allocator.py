"""Settings of torch's GPU memory allocator. Imports nothing heavy."""

from __future__ import annotations

import os
import sys

# Both names: torch 2.9 takes this setting from the first alone (pytorch issue 183387), and releases
# before 2.12 call that name deprecated where the second is missing.
VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
EXPANDABLE = "expandable_segments:True"


def use_expandable_segments() -> None:
    """Let memory segments grow instead of leaving gaps, unless the user set the allocator up.

    Call it before torch is imported; child processes inherit it. Without it, the flagship's step
    reserves half as much again as it allocates (docs/gpu.md).
    """
    if sys.platform == "linux" and not _set_by():
        os.environ.update(dict.fromkeys(VARIABLES, EXPANDABLE))


def describe_allocator() -> tuple[str, str]:
    """Return the allocator's settings in this process's environment, and who set them."""
    name = _set_by()
    if not name:
        return "torch's default", "set neither by dad-fast nor in the environment"
    value = os.environ[name]
    if all(os.environ.get(variable) == EXPANDABLE for variable in VARIABLES):
        return value, "memory that is reserved stays close to memory that is allocated"
    return value, f"{name} is set in the environment"


def _set_by() -> str:
    """Return the variable that sets the allocator up; "" if none does."""
    names = (*VARIABLES, "PYTORCH_HIP_ALLOC_CONF")
    return next((name for name in names if name in os.environ), "")
