"""Test sets of a user's module, named `python:tests.evaluation.my_suites:FACTORY` after `--suite`."""

from __future__ import annotations

from pathlib import Path

from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.base import Source
from dad_fast.data.sources.folder import FolderSource
from dad_fast.evaluation.suites.base import EvalSet, SuiteOptions, as_eval_set


def folder(path: str, classes: ClassMap, options: SuiteOptions) -> Source:
    return FolderSource(Path(path), classes=classes, max_bad_share=options.max_bad_share)


def own(path: str, classes: ClassMap, options: SuiteOptions) -> EvalSet:
    """Find its images without a path."""
    assert path == ""
    return as_eval_set(folder("own-images", classes, options))
