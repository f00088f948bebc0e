"""Train image classifiers that are robust to distribution shift, by discrete adversarial
distillation (DAD, arXiv 2311.01441).

`import dad_fast as df`; docs/api.md lists the names below. They are imported on first use, so that
`import dad_fast` and `dad-fast -h` load neither numpy nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dad_fast.api.evaluate import evaluate, export
    from dad_fast.api.models import load_discretizer, load_student, load_teacher
    from dad_fast.api.run import Run
    from dad_fast.api.train import train
    from dad_fast.data.sources.registry import open_source
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
    "Run",
    "TargetStore",
    "Teacher",
    "__version__",
    "discretize",
    "evaluate",
    "export",
    "load_discretizer",
    "load_student",
    "load_teacher",
    "losses",
    "open_source",
    "train",
]

_WHERE = {
    "train": "dad_fast.api.train:train",
    "Run": "dad_fast.api.run:Run",
    "evaluate": "dad_fast.api.evaluate:evaluate",
    "export": "dad_fast.api.evaluate:export",
    "load_student": "dad_fast.api.models:load_student",
    "load_teacher": "dad_fast.api.models:load_teacher",
    "load_discretizer": "dad_fast.api.models:load_discretizer",
    "open_source": "dad_fast.data.sources.registry:open_source",
    "PGD": "dad_fast.methods.attack:PGD",
    "discretize": "dad_fast.methods.attack:discretize",
    "losses": "dad_fast.methods.losses",
    "Teacher": "dad_fast.models.teacher:Teacher",
    "VQGAN": "dad_fast.discretizers.vqgan.model:VQGAN",
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
    """Return the version in pyproject.toml of the checkout, or that of the installed package."""
    from pathlib import Path

    project = Path(__file__).parents[1] / "pyproject.toml"
    if project.exists():
        import tomllib

        table = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
        if table.get("name") == "dad-fast":
            return table["version"]
    from importlib.metadata import version

    return version("dad-fast")
