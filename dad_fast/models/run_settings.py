"""The settings of the run that a weights file lies in, and the view of an image that its model was judged with."""

from __future__ import annotations

from pathlib import Path

from dad_fast.config import Config, from_toml
from dad_fast.errors import DataError
from dad_fast.models.student import Student


def run_settings(weights: Path) -> tuple[Config | None, Path]:
    """The settings in config.toml beside a model's file, or of the run that its checkpoint is in, and that folder; None without one."""
    folder = weights.absolute().parent
    for place in (folder, folder.parent.parent):
        if (place / "config.toml").is_file():
            try:
                text = (place / "config.toml").read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(
                    f"{place / 'config.toml'}: cannot be read ({error}); restore it or remove it"
                ) from None
            return from_toml(text, str(place / "config.toml")), place
    return None, folder


def take_view(student: Student, cfg: Config | None) -> None:
    """Give `student` the crop and the filter that its run judges it with, where they are not its own: its file then says them.

    What is read needs it only where its file is older than that.
    """
    if cfg is not None:
        student.crop_pct = cfg.augment.crop_pct or student.crop_pct
        student.interpolation = cfg.augment.interpolation or student.interpolation
        student.spec |= {"crop_pct": student.crop_pct, "interpolation": student.interpolation}
