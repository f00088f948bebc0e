"""Names of the corruptions. Imports nothing heavy, so that names are checked before torch is."""

from __future__ import annotations

# The 15 of ImageNet-C.
STANDARD = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
NAMES = (*STANDARD, "invert")


def num_severities(name: str) -> int:
    """Return the number of severities, from 1 on: five, or one for `invert`."""
    return 1 if name == "invert" else 5
