"""Discrete adversarial distillation, fast.

`import dad_fast as df` gives `df.Teacher`, `df.VQGAN`, `df.PGD`, `df.discretize`, `df.losses`, `df.AdversarialStore` and
`df.TargetStore`. They are looked up when they are first used, so that the import itself (and `dad-fast -h`) loads neither numpy nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dad_fast.discretizers.vqgan.model import VQGAN
    from dad_fast.methods import losses
    from dad_fast.methods.attack import PGD, discretize
    from dad_fast.models.teacher import Teacher
    from dad_fast.store import AdversarialStore, TargetStore

    __version__: str

__all__ = [
    "PGD",
    "VQGAN",
    "AdversarialStore",
    "TargetStore",
    "Teacher",
    "__version__",
    "discretize",
    "losses",
]

_WHERE = {
    "Teacher": "dad_fast.models.teacher:Teacher",
    "VQGAN": "dad_fast.discretizers.vqgan.model:VQGAN",
    "PGD": "dad_fast.methods.attack:PGD",
    "discretize": "dad_fast.methods.attack:discretize",
    "losses": "dad_fast.methods.losses",
    "AdversarialStore": "dad_fast.store:AdversarialStore",
    "TargetStore": "dad_fast.store:TargetStore",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _WHERE:
        module, _, attribute = _WHERE[name].partition(":")
        value = importlib.import_module(module)
        value = getattr(value, attribute) if attribute else value
    else:
        raise AttributeError(f"module 'dad_fast' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """pyproject.toml is the one place of the version: read from the checkout, or as the installed package recorded it."""
    from pathlib import Path

    project = Path(__file__).parents[1] / "pyproject.toml"
    if project.exists():
        import tomllib

        table = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
        if table.get("name") == "dad-fast":
            return table["version"]
    from importlib.metadata import version

    return version("dad-fast")
