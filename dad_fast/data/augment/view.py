"""The evaluation view of an image: timm's evaluation transform, as data."""

from __future__ import annotations

from typing import Any, NamedTuple

from dad_fast.config.schema import AugmentConfig


class View(NamedTuple):
    """Size, share of the resized image kept, filter, and whether the image is squashed to a square
    instead of cropped: the arguments of `eval_transform`.
    """

    image_size: int
    crop_pct: float
    interpolation: str
    squashed: bool = False

    def with_settings(self, augment: AugmentConfig) -> View:
        """Return the view with the user's size, share and filter where they are set."""
        return self._replace(
            image_size=augment.img_size or self.image_size,
            crop_pct=augment.crop_pct or self.crop_pct,
            interpolation=augment.interpolation or self.interpolation,
        )

    def record(self) -> dict[str, Any]:
        """Return the view as stores and results record it. Only squashed views have `squashed`, so
        that the others equal those of earlier versions.
        """
        squashed = {"squashed": True} if self.squashed else {}
        return {
            "img_size": self.image_size,
            "crop_pct": self.crop_pct,
            "interpolation": self.interpolation,
            **squashed,
        }
