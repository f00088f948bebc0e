"""Recognition of files of predictions (`eval --save-predictions`). Imports no torch."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

# Metadata key of a file of records.
PREDICTIONS = "dad_fast.predictions"


def is_records(path: str | Path) -> bool:
    """Return whether a file contains records; reads only its metadata."""
    try:
        with safe_open(path, framework="np") as file:
            return PREDICTIONS in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False
