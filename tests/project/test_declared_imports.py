"""Every package that our code imports is declared in pyproject.toml, in the dependencies or the
extra that the code belongs to.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OURS = {
    "dad_fast",
    "kernels",
    "benchmarks",
    "tests",
    *(file.stem for folder in ("tests", "scripts") for file in (ROOT / folder).rglob("*.py")),
}
# Extras that users install; the others are for work on the project.
USER_EXTRAS = ("cuda12", "cuda13", "data", "demo", "export", "log")
# Not on the package index: built from source, and looked for by name.
BUILT_FROM_SOURCE = {"apex", "amp_C"}
# Of the clone that --authors-code names, and what its modules import.
AUTHORS_CODE = {"easyrobust", "loss", "einops"}
# Packages that cannot be installed everywhere, so that importlib.metadata may not know their
# modules.
MODULES = {
    "nvidia": {"nvidia-dali-cuda120", "nvidia-dali-cuda130"},
    "xformers": {"xformers"},
    "mlflow": {"mlflow-skinny"},
    "wandb": {"wandb"},
    "triton": {"triton"},
}
FUNCTIONS = {"importorskip", "import_module", "import_extra", "find_spec"}


class Import(NamedTuple):
    """`optional`: inside a function or a try statement, or a string for one of FUNCTIONS."""

    package: str
    place: str
    optional: bool


def imports(path: Path) -> Iterator[Import]:
    """Yield a file's absolute imports of other packages than ours and the standard library's."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node, optional in nodes(tree, False):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            names = [node.module]
        elif isinstance(node, ast.Call) and called_name(node) in FUNCTIONS and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                names = [argument.value]
                optional = True
        for name in names:
            package = name.partition(".")[0]
            if package and package not in OURS and package not in sys.stdlib_module_names:
                yield Import(package, f"{path.relative_to(ROOT)}:{node.lineno}", optional)


def nodes(parent: ast.AST, optional: bool) -> Iterator[tuple[ast.stmt | ast.expr, bool]]:
    """Yield the statements and expressions below `parent`, each with whether it is optional."""
    optional = optional or isinstance(
        parent, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.Try
    )
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.stmt | ast.expr):
            yield node, optional
        yield from nodes(node, optional)


def called_name(node: ast.Call) -> str:
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def imports_below(folder: Path) -> list[Import]:
    return [found for file in sorted(folder.rglob("*.py")) for found in imports(file)]


@cache
def library_imports() -> tuple[Import, ...]:
    found = imports_below(ROOT / "dad_fast") + imports_below(ROOT / "kernels")
    return tuple(item for item in found if item.package not in BUILT_FROM_SOURCE)


def declared(*extras: str) -> set[str]:
    """Return the distributions in the dependencies and in `extras`, with the extras that these
    include.
    """
    names = set()
    texts = [
        *PROJECT["dependencies"],
        *(text for extra in extras for text in PROJECT["optional-dependencies"][extra]),
    ]
    for requirement in map(Requirement, texts):
        if requirement.name == PROJECT["name"]:
            names |= declared(*requirement.extras)
        else:
            names.add(canonicalize_name(requirement.name))
    return names


@cache
def distributions() -> dict[str, set[str]]:
    """Map the modules that are installed, or named in MODULES, to distributions."""
    installed = {
        name: set(map(canonicalize_name, found))
        for name, found in metadata.packages_distributions().items()
    }
    return installed | {name: installed.get(name, set()) | more for name, more in MODULES.items()}


def undeclared(found: Iterable[Import], *extras: str) -> list[str]:
    """Return the imports of packages that the dependencies and `extras` do not declare."""
    allowed, modules = declared(*extras), distributions()
    return [
        f"{item.place} imports {item.package}"
        for item in found
        if not modules.get(item.package, {canonicalize_name(item.package)}) & allowed
    ]


def test_the_library_imports_its_dependencies_and_optional_packages() -> None:
    found = library_imports()
    # data/loaders/dali is imported only where DALI is installed.
    unguarded = [item for item in found if not item.optional and "loaders/dali/" not in item.place]
    assert undeclared(unguarded) == []
    assert undeclared(found, *USER_EXTRAS) == []


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("tests", ("test",)), ("benchmarks", ("bench",)), ("scripts", ("dev",))],
    ids=["tests", "benchmarks", "scripts"],
)
def test_other_code_imports_packages_of_its_extra(folder: str, extras: tuple[str, ...]) -> None:
    unlisted = BUILT_FROM_SOURCE | AUTHORS_CODE
    found = [item for item in imports_below(ROOT / folder) if item.package not in unlisted]
    assert undeclared([item for item in found if not item.optional], *extras) == []
    assert undeclared(found, *extras, *USER_EXTRAS) == []


def test_every_dependency_is_imported() -> None:
    modules = distributions()
    imported = {item.package for item in library_imports()}
    used = {name for package in imported for name in modules.get(package, set())}
    installed = {canonicalize_name(found.name) for found in metadata.distributions()}
    assert declared() & installed - used == set()


def test_an_undeclared_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    code = "import os, numpy.linalg\nimport no_such.part\ndef f():\n    from not_there import x\npytest.importorskip('nor.this')\n"
    (tmp_path / "file.py").write_text(code)
    found = imports_below(tmp_path)
    assert [(item.package, item.optional) for item in found] == [
        ("numpy", False),
        ("no_such", False),
        ("not_there", True),
        ("nor", True),
    ]
    expected = ["file.py:2 imports no_such", "file.py:4 imports not_there", "file.py:5 imports nor"]
    assert undeclared(found) == expected
