"""Registries: where a name is looked up, what an unknown one says, and what files cannot choose."""

import pytest

from dad_fast import registry as module
from dad_fast.errors import UsageError
from dad_fast.registry import Registry


@pytest.fixture
def colours() -> Registry:
    made = Registry("colour", "dad_fast.colours", "--colour")
    made.add("red", "tests.test_registry:RED")
    made.add("blue", (0, 0, 1))
    return made


RED = (1, 0, 0)


def test_entries_are_objects_or_places_to_import(colours):
    assert colours["blue"] == (0, 0, 1)
    assert colours["red"] == colours["python:tests.test_registry:RED"] == RED
    assert colours.names() == colours.own_names() == ("red", "blue")


def test_unknown_name_gets_the_nearest(colours):
    with pytest.raises(UsageError, match="--colour rad: no such colour; did you mean red?"):
        colours["rad"]
    with pytest.raises(UsageError, match="write python:MODULE:ATTRIBUTE"):
        colours["python:os"]


def test_name_from_a_file_never_imports_a_users_module(colours):
    assert colours.find("blue") == (0, 0, 1)
    assert colours.find("green") is None
    assert colours.find("python:tests.test_registry:RED") is None


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("jpeg:75", ("jpeg", "75")),
        ("identity", ("identity", "")),
        ("python:a.b:c", ("python:a.b:c", "")),
        ("python:a.b:c:7", ("python:a.b:c", "7")),
    ],
)
def test_name_and_argument_are_split(colours, text, parts):
    assert colours.split(text) == parts


def test_installed_packages_are_searched_once(colours, monkeypatch):
    """A sweep asks for every setting of every cell; one search takes about 10 ms."""
    searches = []
    monkeypatch.setattr(module, "entry_points", lambda group: searches.append(group) or [])
    for _ in range(3):
        list(colours)
        assert "green" not in colours
    assert searches == ["dad_fast.colours"]
