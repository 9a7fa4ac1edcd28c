"""Write docs/jobs.md: every option of the files a person writes, from the texts beside the code.

    python docs/make_jobs_page.py

A test compares the page with what this program makes, so a new option cannot be forgotten in it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from raylora.job import Job
from raylora.serving.options import RenderRequest, ServeOptions
from raylora.sweep import SweepOptions

PAGE = Path(__file__).parent / "jobs.md"
WIDTH = 110

INTRODUCTION = """\
# Every option

Made from the texts beside the code by `docs/make_jobs_page.py`; change them there, not here.

A job is one YAML file. Unknown words are refused, and every mistake is told at once, each with its
path. `--set network.rank=8` replaces one value; the part after `=` is YAML. An option without
"default" must be given. `null` is YAML's word for nothing.

Whole jobs: [jobs/quickstart.yaml](../jobs/quickstart.yaml),
[jobs/sd15_guide.yaml](../jobs/sd15_guide.yaml) and
[jobs/sd15_lora.yaml](../jobs/sd15_lora.yaml). Formulas, sources and other programs' names are in
[training.md](training.md). For editors that complete and check YAML,
`raylora schema` prints the job file's part as a JSON schema, which the repository keeps as
[job.schema.json](../job.schema.json).
"""

PARTS: tuple[tuple[str, str, type[BaseModel]], ...] = (
    ("The job file", "", Job),
    (
        "The search space file",
        "What `raylora tune` takes; see [sweeps.md](sweeps.md).",
        SweepOptions,
    ),
    (
        "Options of the preview endpoint",
        "What `raylora serve` takes as `--set word=value`; see [serving.md](serving.md).",
        ServeOptions,
    ),
    ("A request for a picture", "The JSON body of `POST /render`.", RenderRequest),
)

Schema = dict[str, Any]


def jobs_page() -> str:
    """The whole page."""
    lines = [INTRODUCTION]
    for title, about, model in PARTS:
        schema = model.model_json_schema()
        lines += [f"## {title}", "", about or schema["description"], ""]
        lines += _options(schema, schema.get("$defs", {}), path="")
    return "\n".join(lines)


def _options(schema: Schema, known: dict[str, Schema], *, path: str) -> Iterator[str]:
    """The options of one section, then its sections, each under a heading of its own."""
    required = schema.get("required", [])
    sections = []
    for word, field in schema["properties"].items():
        found = sections_in(field, known)
        place = f"{path}{word}"
        if found and all(_same_words(inner, schema) for inner in found):
            yield from _option(place, field, known, needed=False, what="a list of sections")
            continue
        if found and "anyOf" not in field and field.get("type") != "object":
            sections.append((place, field, found))
            continue
        yield from _option(place, field, known, needed=word in required)
        below = f"{place}.PATH." if field.get("type") == "object" else f"{place}[]."
        for inner in found:
            yield from _inner(below, inner, known)
    for place, field, found in sections:
        yield from _heading(place, field, found, known)


def _heading(
    place: str, field: Schema, found: list[Schema], known: dict[str, Schema]
) -> Iterator[str]:
    """A section; one for each kind, where plug-ins differ."""
    level = "#" * (3 + place.count("."))
    for inner in found:
        kind = inner["properties"].get("kind", {}).get("const")
        yield from (f"{level} {place}" + (f", kind: {kind}" if kind else ""), "")
        text = inner.get("description") or field.get("description", "")
        yield from (*wrapped(text), "")
        yield from _options(inner, known, path=f"{place}.")


def _inner(path: str, schema: Schema, known: dict[str, Schema]) -> Iterator[str]:
    for word, field in schema["properties"].items():
        yield from _option(f"{path}{word}", field, known, needed=False)


def _same_words(inner: Schema, section: Schema) -> bool:
    """Whether all words of a section within another are the other's too, told there."""
    return inner["properties"].keys() <= section["properties"].keys()


def _option(
    place: str, field: Schema, known: dict[str, Schema], *, needed: bool, what: str = ""
) -> Iterator[str]:
    """Two lines or more: the path, what it may be, the default; then its text."""
    default = "" if needed or "default" not in field else f"; default `{as_yaml(field['default'])}`"
    yield from wrapped(f"- `{place}`: {what or allowed_values(field, known)}{default}", indent="  ")
    text = field.get("description", "")
    if not text and "const" in field:
        text = f"Chooses this one, which the file `{field['const']}.py` gives."
    assert text, f"{place} has no text: write one under the field"
    yield from wrapped(text, indent="  ", first="  ")
    yield ""


def sections_in(field: Schema, known: dict[str, Schema]) -> list[Schema]:
    """The option classes that a field refers to."""
    if "$ref" in field:
        found = known[field["$ref"].rpartition("/")[2]]
        return [found] if "properties" in found else []
    inner = [*field.get("oneOf", []), *field.get("anyOf", [])]
    inner += [field[word] for word in ("items", "additionalProperties") if _is_schema(field, word)]
    return [section for one in inner for section in sections_in(one, known)]


def allowed_values(field: Schema, known: dict[str, Schema]) -> str:
    """What a value may be, in words."""
    if "anyOf" in field:
        return " or ".join(allowed_values(one, known) for one in field["anyOf"])
    if "$ref" in field:
        words = known[field["$ref"].rpartition("/")[2]]["properties"]
        return "{" + ", ".join(words) + "}"
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return " or ".join(f"`{word}`" for word in field["enum"])
    kind: str = field.get("type", "any value")
    if kind == "array" and "prefixItems" in field:
        return "[" + ", ".join(allowed_values(one, known) for one in field["prefixItems"]) + "]"
    if kind == "array":
        return f"a list of: {allowed_values(field['items'], known)}"
    if kind == "object":
        inner = field["additionalProperties"]
        return "path: value" if inner is True else f"path: {allowed_values(inner, known)}"
    return _NAMES.get(kind, kind) + _bounds(field)


_NAMES = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
}


def _bounds(field: Schema) -> str:
    said = {
        "minimum": "at least {}",
        "exclusiveMinimum": "above {}",
        "maximum": "at most {}",
        "exclusiveMaximum": "below {}",
        "multipleOf": "a multiple of {}",
        "maxLength": "at most {} characters",
        "pattern": "like `{}`",
    }
    found = [text.format(_number(field[word])) for word, text in said.items() if word in field]
    return f" ({', '.join(found)})" if found else ""


def _number(value: Any) -> str:
    return "2^63" if value == 2**63 else f"{value:g}" if isinstance(value, float) else str(value)


def _is_schema(field: Schema, word: str) -> bool:
    return isinstance(field.get(word), dict)


def as_yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def wrapped(text: str, *, indent: str = "", first: str = "") -> list[str]:
    parts = " ".join(text.split()).split("`")
    # Outside code, Markdown would take <run> for HTML.
    parts[::2] = [part.replace("<", "\\<") for part in parts[::2]]
    return textwrap.wrap(
        "`".join(parts),
        WIDTH,
        initial_indent=first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


if __name__ == "__main__":
    PAGE.write_text(jobs_page(), encoding="utf-8")
