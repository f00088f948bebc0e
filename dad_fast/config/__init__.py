"""Settings of a run: what they are (schema), where they come from (resolve), and how they are written (toml)."""

from .launch import Launch
from .resolve import check, preset_names, resolve
from .schema import Config
from .toml import from_toml, to_toml
from .variants import differences, expand

__all__ = ["Config", "Launch", "check", "differences", "expand", "from_toml", "preset_names", "resolve", "to_toml"]
