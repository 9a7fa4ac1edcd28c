"""How options are declared: frozen pydantic models beside the code they set; unknown words refused.

The text under a field is its documentation (it reaches the JSON schema and the docs).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from raylora.base.lookup import did_you_mean


class Options(BaseModel):
    """Base of every section of a job: frozen, unknown words refused, field texts kept."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )


def known_as(
    *, formula: str = "", source: str = "", sd_scripts: str = "", guides: str = ""
) -> dict[str, Any]:
    """What docs/training.md says of an option beside its text; for `Field(json_schema_extra=…)`.

    Args:
        formula: what it does to the numbers, in plain characters.
        source: a paper, or whoever's rule it is.
        sd_scripts: the option's name there, e.g. `--noise_offset`.
        guides: what people's guides call it, where that is another name.
    """
    words = {"formula": formula, "source": source, "sd_scripts": sd_scripts, "guides": guides}
    return {"known_as": {word: text for word, text in words.items() if text}}


def explain(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Turn a pydantic error into one sentence per mistake, each with its dotted path."""
    mistakes: dict[str, list[_Mistake]] = {}
    for detail in error.errors(include_url=False):
        path, choice = _path(detail["loc"], root)
        if detail["type"] == "too_short" and any(
            place.startswith(f"{path}.") for place in mistakes
        ):
            continue  # it counts the items that are wrong as missing
        mistakes.setdefault(path if choice is None else choice, []).append(_Mistake(path, detail))
    return [sentence for place, found in mistakes.items() for sentence in _told(place, found, root)]


@dataclass(frozen=True)
class _Mistake:
    path: str
    detail: ErrorDetails


def _path(loc: tuple[int | str, ...], root: type[BaseModel]) -> tuple[str, str | None]:
    """Dotted path without pydantic's names of a union's branches; the union's own, if there is."""
    models: list[type[BaseModel]] = [root]
    words: list[str] = []
    choice, branch_is_next = None, False
    for part in loc:
        if branch_is_next:
            choice, branch_is_next = ".".join(words), False
            continue
        words.append(str(part))
        if isinstance(part, str):
            fields = [m.model_fields[part] for m in models if part in m.model_fields]
            annotation = fields[0].annotation if fields else None
            models = list(_models_in(annotation))
            branch_is_next = _is_choice(annotation)
    return ".".join(words), choice


def _is_choice(annotation: Any) -> bool:
    """Whether it is a union of more than a type and None."""
    members = [one for one in get_args(annotation) if one is not type(None)]
    return get_origin(annotation) in (Union, UnionType) and len(members) > 1


def _told(place: str, mistakes: list[_Mistake], root: type[BaseModel]) -> list[str]:
    """One sentence each, but one alone where a value fits no branch of a union."""
    wrong_kind = ("_type", "_parsing", "literal_error")
    within = [m for m in mistakes if m.path != place or not m.detail["type"].endswith(wrong_kind)]
    told = within or mistakes
    if within or len(told) == 1:
        return [_sentence(mistake.path, mistake.detail, root) for mistake in told]
    wanted = " or ".join(
        _plain(mistake.detail["msg"]).removeprefix("Input should be ").partition(",")[0]
        for mistake in told
    )
    return [f"{place} is {_shown(told[0].detail['input'])}: input should be {wanted}."]


def _sentence(path: str, detail: ErrorDetails, root: type[BaseModel]) -> str:
    found = _shown(detail["input"])
    if detail["type"] == "extra_forbidden":
        section, _, word = path.rpartition(".")
        allowed = words_at(root, section)
        others = [kind for kind, words in _kinds_at(root, section).items() if word in words]
        if others:
            return f"{path}: no option of this kind; it is one of kind {one_of(others)}."
        theirs = _called(word, section, root)
        if theirs:
            return f"{path}: no such option. What sd-scripts calls {word} is {theirs} here."
        return f"{path}: no such option.{did_you_mean(word, allowed)}"
    if detail["type"] == "missing":
        return f"{path}: missing. Give it a value."
    message = _plain(detail["msg"])
    if detail["type"] in {"value_error", "assertion_error"}:
        named = not path or message.startswith((f"{path}.", f"{path} ", f"{path}:"))
        return message if named else f"{path}: {message}"
    return f"{path} is {found}: {message[:1].lower()}{message[1:]}."


def _called(word: str, section: str, root: type[BaseModel]) -> str:
    """The options of a section, or else of all, that stand for a word of sd-scripts; "" is none."""
    found = [path for path, names in _sd_scripts(root) if word in names]
    near = [path for path in found if path.rpartition(".")[0] == section]
    return " or ".join(dict.fromkeys(near or found))


def _sd_scripts(model: type[BaseModel], place: str = "") -> Iterator[tuple[str, list[str]]]:
    """Each option's path, and what sd-scripts calls it on its command line."""
    for word, field in model.model_fields.items():
        extra = field.json_schema_extra
        known = extra.get("known_as") if isinstance(extra, dict) else None
        said = str(known.get("sd_scripts", "")) if isinstance(known, dict) else ""
        if said.startswith("--"):
            names = re.findall(r"--(?:network_args |optimizer_args )?(\w{4,})", said)
            yield f"{place}{word}", names
        for inner in _models_in(field.annotation):
            yield from _sd_scripts(inner, f"{place}{word}.")


def one_of(words: Sequence[str]) -> str:
    """Allowed words as pydantic names them: 'a', 'b' or 'c'."""
    *first, last = (repr(word) for word in words)
    return f"{', '.join(first)} or {last}" if first else last


def _plain(message: str) -> str:
    """pydantic's words for Python's types, as a person who writes YAML knows them."""
    message = message.removeprefix("Value error, ").replace("a valid tuple", "a list")
    message = re.sub("^Tuple", "List", message)
    section = r"a valid dictionary or (instance of \w+|object to extract fields from)"
    message = re.sub(section, "a section of options", message)
    return message.replace("a valid dictionary", "names with values, or {} for none")


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()  # as YAML writes them
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def words_at(root: type[BaseModel], path: str) -> list[str]:
    """Field names allowed in the section at the dotted path ('' is the root)."""
    model: type[BaseModel] | None = root
    for part in path.split(".") if path else []:
        if part.isdecimal():
            continue
        field = model.model_fields.get(part) if model else None
        model = next(_models_in(field.annotation), None) if field else None
    return list(model.model_fields) if model else []


def _kinds_at(root: type[BaseModel], path: str) -> dict[str, list[str]]:
    """Where a section has several kinds: each with its words."""
    above, _, word = path.rpartition(".")
    field = root.model_fields.get(word) if word and not above else None
    models = list(_models_in(field.annotation)) if field else []
    return {
        str(model.model_fields["kind"].default): list(model.model_fields)
        for model in models
        if len(models) > 1 and "kind" in model.model_fields
    }


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models_in(inner)
