"""Reading YAML as a person means it: a word given twice is a mistake, and 1e-4 is a number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from raylora.base.errors import JobError


def read_yaml_file(path: str | Path, *, wanted: str, holds: str) -> dict[str, Any]:
    """The sections of a YAML file.

    Args:
        wanted: what a person should give instead of a file that cannot be read, "a job file".
        holds: the end of "<path> must hold ...".

    Raises:
        JobError: it cannot be read, is not YAML, gives a word twice, or holds no sections.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise JobError(f"{path}: cannot be read ({error.strerror}). Give {wanted}.") from None
    except UnicodeDecodeError:
        raise JobError(f"{path} is not a text file in UTF-8. Give {wanted}.") from None
    try:
        tree = parse_yaml(text)
    except _GivenTwice as error:
        raise JobError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        raise JobError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise JobError(f"{path} must hold {holds}.")
    return tree


def parse_yaml(text: str) -> Any:
    """Plain data of a YAML text; yaml.YAMLError when it is none, or gives a word twice."""
    return yaml.load(text, _Loader)


class _GivenTwice(yaml.YAMLError):
    """PyYAML itself would silently keep the second."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, stricter about words and as YAML 1.2 about numbers."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A section; says which word it has twice, and in which lines."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key.value, str) and key.value in lines:
                raise _GivenTwice(
                    f"{key.value!r} is given twice, in lines {lines[key.value]} and {line}. Take "
                    "one out."
                )
            lines[str(key.value)] = line
        return super().construct_mapping(node, deep=deep)


# YAML 1.1, which PyYAML reads, takes 1e-4 and 1.0e4 for text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)
