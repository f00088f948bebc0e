"""Names of augmentation policies (`--aa`) and the check of their spelling. Imports no numpy."""

from __future__ import annotations

import re

from dad_fast.config.fields import nearest
from dad_fast.errors import UsageError

AUTO_AUGMENT = ("v0", "v0r", "original", "originalr", "3a")
TRIVIAL = ("ta", "trivial-wide")
# What may follow a policy's name after a dash. timm ignores a key without digits, so `mstdinf`
# would mean two things.
_SECTIONS = {
    "rand": re.compile(r"(m|n|inc|mmax)\d+|(p|mstd)\d+(\.\d+)?|t(weights|3a|3aw)"),
    "augmix": re.compile(r"m\d+|w[1-9]\d*|d\d+|mstd\d+(\.\d+)?|a(?!0+(\.0+)?$)\d+(\.\d+)?"),
    "pixmix": re.compile(r"k[1-9]\d*|b[1-9]\d*|m([1-9]|10)|all[01]"),
    "prime": re.compile(r"w[1-9]\d*|d[1-9]\d*"),
    **dict.fromkeys(AUTO_AUGMENT, re.compile(r"mstd\d+(\.\d+)?")),
}
_HOW = {
    "rand": "timm writes it as rand-m9-mstd0.5-inc1 (m n p mstd mmax inc t; mstd101 draws the "
    "magnitude evenly from 0 to m)",
    "augmix": "timm writes it as augmix-m3-w3-d2 (m w d a mstd); b1, its blended form, is left out",
    "pixmix": "write it as pixmix-k4-b4-m1-all1 (k rounds at most, b strength of the mixing, m 1 to "
    "10 magnitude, all0 leaves out operations of ImageNet-C)",
    "prime": "write it as prime-w3-d2 (w chains, d operations in each)",
}
# Why DALI cannot execute a policy's records
_NOT_IN_DALI = {
    "augmix": "DALI does not average chains of operations",
    "pixmix": "DALI does not mix in pictures",
    "prime": "DALI does not average chains of operations",
}


def dali_lacks(policy: str) -> str:
    """Return why DALI cannot execute the records of a policy; empty where it can."""
    return _NOT_IN_DALI.get(policy.split("-")[0], "")


def check_policy(text: str) -> None:
    """Raise UsageError that names --aa for a policy that is not known or not written right."""
    if text in TRIVIAL:
        return
    name, *sections = text.split("-")
    if name not in _SECTIONS:
        known = (
            *("rand-m9-mstd0.5-inc1", "augmix-m3-w3", "pixmix-k4-b4", "prime"),
            *(*AUTO_AUGMENT, *TRIVIAL),
        )
        raise UsageError(
            f"--aa {text}: no such policy{nearest(name, (*_SECTIONS, *TRIVIAL))} (such as "
            f"{', '.join(known)})"
        )
    for section in sections:
        if not _SECTIONS[name].fullmatch(section):
            how = _HOW.get(name, f"write {name} or {name}-mstd0.5")
            raise UsageError(f"--aa {text}: cannot read {section!r}; {how}")
