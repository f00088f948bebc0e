"""Recognition of weights that open_clip publishes, by their hash or their folder in the hub's cache."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

# The address of a file contains its SHA-256: OpenAI's as a folder, open_clip's own as the first 8
# digits at the end of the name.
_HASH = re.compile(r"/([0-9a-f]{64})/[^/]+$|-([0-9a-f]{8})\.pth?$")


class Published(NamedTuple):
    """Entry of open_clip's table."""

    arch: str  # without -quickgelu
    tag: str
    settings: Mapping[str, Any]

    @property
    def quick_gelu(self) -> bool:
        return bool(self.settings.get("quick_gelu"))

    @property
    def repository(self) -> str:
        """Repository on the Hugging Face hub, ORG/NAME, or ""."""
        return "/".join(str(self.settings.get("hf_hub") or "").split("/")[:2])

    @property
    def teacher_arch(self) -> str:
        """Architecture with the activation of these weights."""
        return f"{self.arch}-quickgelu" if self.quick_gelu else self.arch


def published_weights(path: Path, sha256: str) -> Published | None:
    """Return the entry of open_clip's table whose file this is; None if it is not known."""
    import open_clip

    cached = {part.removeprefix("models--") for part in path.parts if part.startswith("models--")}
    for arch, tag in open_clip.list_pretrained():
        settings = open_clip.get_pretrained_cfg(arch, tag)
        found = Published(arch.removesuffix("-quickgelu"), tag, settings)
        named = _HASH.search(str(settings.get("url") or ""))
        is_same_file = named is not None and sha256.startswith(named[1] or named[2])
        if is_same_file or found.repository.replace("/", "--") in cached:
            return found
    return None
