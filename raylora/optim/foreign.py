"""Classes that a job names itself: `module:Class`, from any installed package."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from raylora.base.errors import OptionError
from raylora.base.lookup import did_you_mean

_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_DOTTED = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)\.([A-Z]\w*)")


def as_target(name: str, home: str) -> str | None:
    """`module:Class` for a class that is named so, as `module.Class`, or by its name in `home`.

    None where it is none of these. Nothing is imported but `home`.
    """
    if _TARGET.fullmatch(name):
        return name
    if dotted := _DOTTED.fullmatch(name):
        return f"{dotted[1]}:{dotted[2]}"
    found = getattr(importlib.import_module(home), name, None) if name[:1].isupper() else None
    return f"{home}:{name}" if isinstance(found, type) else None


@lru_cache
def load_class(target: str, base: type) -> type:
    """The class behind `module:Class`, which must be a kind of `base`.

    Raises:
        OptionError: there is no such module or class, or it is another kind of thing.
    """
    module_name, _, class_name = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise OptionError(
            f"{target} cannot be imported ({error}). Install its package where raylora runs, or "
            "choose another."
        ) from None
    found = getattr(module, class_name, None)
    if found is None:
        kinds = [name for name, one in vars(module).items() if _is_kind(one, base)]
        raise OptionError(f"{module_name} has no {class_name}.{did_you_mean(class_name, kinds)}")
    if not _is_kind(found, base):
        raise OptionError(
            f"{target} is not a kind of {base.__module__}.{base.__name__}. Name a class that is."
        )
    return found  # type: ignore[no-any-return]


def _is_kind(found: object, base: type) -> bool:
    return isinstance(found, type) and issubclass(found, base) and found is not base


def arguments_of(cls: type) -> dict[str, inspect.Parameter]:
    """The arguments by name that a class is made with."""
    return {
        name: parameter
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def takes_any(cls: type) -> bool:
    """Whether it also takes arguments that its signature does not name."""
    kinds = [parameter.kind for parameter in inspect.signature(cls).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def argument_problem(
    cls: type, args: Mapping[str, Any], taken: Mapping[str, str], option: str
) -> str | None:
    """What is wrong with the names of arguments; None when nothing is.

    Args:
        taken: names that are not the job's to give, with what to do instead.
        option: where they were written, e.g. "optimizer.args".
    """
    known = arguments_of(cls)
    for name in args:
        if name in taken:
            return f"{option}.{name}: {taken[name]}"
        if name not in known and not takes_any(cls):
            free = [word for word in known if word not in taken]
            return f"{option}.{name}: {cls.__name__} takes no such argument." + (
                did_you_mean(name, free) or " It takes none."
            )
        problem = _value_problem(args[name], known.get(name))
        if problem:
            return f"{option}.{name} is {args[name]!r:.60}: {problem}"
    return None


def _value_problem(value: Any, parameter: inspect.Parameter | None) -> str | None:
    """What is wrong with a value beside the one that the signature has; None where none can be."""
    usual = parameter.default if parameter is not None else None
    if isinstance(usual, bool):
        return None if isinstance(value, bool) else "give true or false."
    if isinstance(usual, int | float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if number or value is None else f"give a number, as {usual:g} is."
    return None
