"""Kinds of test sets after `--suite`, by name. To add one: a file with a factory, and a line here.

A factory is called as `open(path, classes, options)`: the path after "=" ("" where there is none),
the class list of the evaluated model and `suites.base.SuiteOptions`. It returns an `EvalSet`, or a
`Source` whose classes are the model's. `--suite KIND=PATH` and `--suite KIND` also take factories
of other packages (entry points of `dad_fast.suites`) and `python:MODULE:FACTORY`.

Imports neither torch nor numpy, so that help texts can list the kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dad_fast.registry import Registry

if TYPE_CHECKING:
    from dad_fast.data.classes import ClassMap
    from dad_fast.data.sources.base import Source
    from dad_fast.evaluation.suites.base import EvalSet, SuiteOptions

SuiteFactory = Callable[[str, "ClassMap", "SuiteOptions"], "EvalSet | Source"]
SUITES: Registry[SuiteFactory] = Registry("kind of test set", "dad_fast.suites", "--suite")
SUBSET = "subset"
# Their class folders are classes of ImageNet.
PUBLISHED = {
    "imagenet": "IMAGENET",
    "imagenet-v2": "IMAGENET_V2",
    "imagenet-a": "IMAGENET_A",
    "imagenet-r": "IMAGENET_R",
    "imagenet-sketch": "IMAGENET_SKETCH",
    "imagenet-c": "IMAGENET_C",
    "imagenet-stylized": "IMAGENET_STYLIZED",
    "objectnet": "OBJECTNET",
}
for _name, _attribute in PUBLISHED.items():
    SUITES.add(_name, f"dad_fast.evaluation.suites.published:{_attribute}.open")
SUITES.add(SUBSET, "dad_fast.evaluation.suites.folders:open_subset")
