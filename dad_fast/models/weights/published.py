"""Recognition of published weights: files listed in published.toml, and open_clip's table.

`python -m dad_fast.models.weights.published` prints the table of docs/weights.md.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

LIST = Path(__file__).with_suffix(".toml")

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


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """Entry of published.toml; an unknown field is empty."""

    name: str
    page: str
    file: str
    size: int = 0
    sha256: str = ""
    licence: str = ""
    argument: str = ""
    note: str = ""


@cache
def published_files() -> tuple[PublishedFile, ...]:
    """Return the entries of published.toml."""
    entries = tomllib.loads(LIST.read_text(encoding="utf-8"))["files"]
    return tuple(PublishedFile(**entry) for entry in entries)


def published_file(sha256: str) -> PublishedFile | None:
    """Return the entry with this hash; None if there is none."""
    return next((entry for entry in published_files() if entry.sha256 == sha256), None)


def markdown_table() -> str:
    """Return the table of docs/weights.md."""
    unknown = "not known"
    lines = ["| weights | file | bytes | SHA-256 | licence | use |", "|---|---|---:|---|---|---|"]
    for entry in published_files():
        size = f"{entry.size:,}" if entry.size else unknown
        digest = f"`{entry.sha256}`" if entry.sha256 else unknown
        argument = f"`{entry.argument}`" if entry.argument else ""
        use = "; ".join(filter(None, (argument, entry.note)))
        lines.append(
            f"| [{entry.name}]({entry.page}) | `{entry.file}` | {size} | {digest} "
            f"| {entry.licence or unknown} | {use} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table())
