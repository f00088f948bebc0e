"""Settings that a dry run assumes where the user names none. Imports no torch."""

from __future__ import annotations

from dad_fast.config import Config
from dad_fast.config.fields import with_values
from dad_fast.methods.registry import METHODS

NO_DATA = "(no --data-dir)"
# No such file, and so the published VQGAN f8
NO_DISCRETIZER = "(none).ckpt"


def with_assumptions(cfg: Config) -> Config:
    """Return `cfg` with names for data and discretizer if it has none."""
    assumed = {}
    if not cfg.data.data_dir:
        assumed["data.data_dir"] = NO_DATA
    if not cfg.discretizer.name and METHODS[cfg.method].needs_discretizer:
        assumed["discretizer.name"] = NO_DISCRETIZER
    return with_values(cfg, assumed)
