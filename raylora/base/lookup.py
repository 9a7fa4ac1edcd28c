"""Finding plug-ins by listing their folder, and guessing what a mistyped word meant."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Sequence
from types import ModuleType

from raylora.base.errors import OptionError


def plugins(package: str) -> list[str]:
    """Names of the plug-in files in a package folder, sorted; the words allowed in the YAML."""
    found = importlib.import_module(package)
    return sorted(module.name for module in pkgutil.iter_modules(found.__path__))


def load_plugin(package: str, kind: str) -> ModuleType:
    """Import the plug-in file `kind` of a plug-in folder.

    Raises:
        OptionError: there is no such file; the message lists those that exist.
    """
    known = plugins(package)
    if kind not in known:
        raise OptionError(f"{kind!r} is not known.{did_you_mean(kind, known)}")
    return importlib.import_module(f"{package}.{kind}")


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """A sentence to put after 'unknown': the nearest allowed word, or all of them."""
    words = sorted(allowed)
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Allowed: {', '.join(words)}." if words else ""


def some_of(words: Sequence[str], most: int) -> str:
    """The first words for a message, and how many more there are."""
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more
