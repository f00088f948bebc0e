"""Registries: a name maps to an object, and other packages may add names.

A name is looked up in this order:
1. the entries that were added here, each a "module:attribute" that is imported when it is first used;
2. entry points of installed packages in the registry's group, for instance `dad_fast.methods`;
3. `python:MODULE:ATTRIBUTE`, a user's own module.

Imports neither torch nor numpy, so that help texts and checks of settings can list what there is.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from dad_fast.errors import UsageError

T = TypeVar("T")
PYTHON = "python:"


class Registry(Generic[T]):
    """Maps names to objects.

    kind: what an entry is, for messages. group: the entry points that add entries.
    flag: the command-line flag that takes a name, for messages.
    """

    def __init__(self, kind: str, group: str, flag: str) -> None:
        self.kind = kind
        self.group = group
        self.flag = flag
        self._entries: dict[str, T | str] = {}
        self._found: dict[str, EntryPoint] | None = None

    def add(self, name: str, entry: T | str) -> None:
        """Add an object, or "module:attribute", which is imported when it is first used."""
        self._entries[name] = entry

    def own_names(self) -> tuple[str, ...]:
        """Names of the entries that were added here. Cheap: searches no installed packages."""
        return tuple(self._entries)

    def names(self) -> tuple[str, ...]:
        """Names of the entries: built-in ones first, then those of other packages."""
        return tuple(dict.fromkeys([*self._entries, *self._plugins()]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: str) -> bool:
        return name in self._entries or name.startswith(PYTHON) or name in self._plugins()

    def __getitem__(self, name: str) -> T:
        """Return the entry called `name`. Raises UsageError for an unknown name."""
        if name in self._entries:
            entry = self._entries[name]
            return self._load(entry, name) if isinstance(entry, str) else entry
        if name.startswith(PYTHON):
            return self._load(name.removeprefix(PYTHON), name)
        plugins = self._plugins()
        if name in plugins:
            return self._load(plugins[name].value, name)
        close = get_close_matches(name, self.names(), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        known = ", ".join(self.names()) or "none"
        raise UsageError(f"{self.flag} {name}: no such {self.kind}{hint} (known: {known})")

    def find(self, name: str) -> T | None:
        """Return the entry of a name that stands in a file, or None.

        Never imports `python:MODULE:ATTRIBUTE`: a file must not choose what code runs.
        """
        return None if name.startswith(PYTHON) or name not in self else self[name]

    def split(self, text: str) -> tuple[str, str]:
        """Return the name of an entry and its argument: "jpeg:75" gives ("jpeg", "75").

        `python:MODULE:ATTRIBUTE` is a name as a whole, with an optional third colon before the argument.
        """
        if not text.startswith(PYTHON):
            name, _, argument = text.partition(":")
            return name, argument
        module, _, rest = text.removeprefix(PYTHON).partition(":")
        attribute, _, argument = rest.partition(":")
        return f"{PYTHON}{module}:{attribute}", argument

    def _plugins(self) -> dict[str, EntryPoint]:
        # Searched once: it reads the metadata of every installed package.
        if self._found is None:
            self._found = {point.name: point for point in entry_points(group=self.group)}
        return self._found

    def _load(self, where: str, name: str) -> T:
        module, _, attribute = where.partition(":")
        if not module or not attribute:
            raise UsageError(f"{self.flag} {name}: write {PYTHON}MODULE:ATTRIBUTE")
        try:
            found: Any = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            raise UsageError(f"{self.flag} {name}: cannot import {where}: {error}") from None
        return found
