"""Settings of a run: what they are (schema), where they come from (resolve), and how they are written (toml)."""

from dad_fast.config.options import Launch
from dad_fast.config.resolve import preset_names
from dad_fast.config.schema import Config
from dad_fast.config.toml import from_toml, to_toml
from dad_fast.config.variants import differences, expand

__all__ = [
    "Config",
    "Launch",
    "differences",
    "expand",
    "from_toml",
    "preset_names",
    "to_toml",
]
