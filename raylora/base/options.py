"""How options are declared: frozen pydantic models beside the code they set; unknown words refused.

The text under a field is its documentation (it reaches the JSON schema and the docs).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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


def explain(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Turn a pydantic error into one sentence per mistake, each with its dotted path."""
    return [_sentence(detail, root) for detail in error.errors(include_url=False)]


def _sentence(detail: ErrorDetails, root: type[BaseModel]) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    found = _shown(detail["input"])
    if detail["type"] == "extra_forbidden":
        section, _, word = path.rpartition(".")
        allowed = words_at(root, section)
        return f"{path}: no such option.{did_you_mean(word, allowed)}"
    if detail["type"] == "missing":
        return f"{path}: missing. Give it a value."
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] in {"value_error", "assertion_error"}:
        return f"{path}: {message}" if path else message
    return f"{path} is {found}: {message[:1].lower()}{message[1:]}."


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def words_at(root: type[BaseModel], path: str) -> list[str]:
    """Field names allowed in the section at the dotted path ('' is the root)."""
    model: type[BaseModel] | None = root
    for part in path.split(".") if path else []:
        field = model.model_fields.get(part) if model else None
        model = next(_models_in(field.annotation), None) if field else None
    return list(model.model_fields) if model else []


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models_in(inner)
