"""Needs that were measured before: a table that comes with raylora, and what this machine found.

An entry is for one base, bucket and arithmetic. Those of the table are of a plain lora on the usual
layers, for any rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, Self, cast

from raylora.base.fetch import cache_home, keep_text
from raylora.memory.footprint import Measured
from raylora.memory.need import Curve, ModelNeed, Need, UnitNeed
from raylora.memory.setting import Checkpointing
from raylora.memory.tracker import Amount, curve_at
from raylora.weights.true_configs import true_configs

Moments = tuple[Amount, ...]
_COMMON = ("denoiser", "text_encoders", "vae", "read_text", "adapter_numbers")
"""What is the same at every bucket."""
_PROGRAMS = ("torch", "diffusers", "transformers")
_CODE = (
    *("components", "diffusion", "families", "networks", "adapt", "memory", "training/step.py"),
    *("models.py", "measure"),
)
"""What numbers of this machine's cache depend on."""


@dataclass(frozen=True)
class Entry:
    """What `Need` says, at any rank.

    Attributes:
        arithmetic: that the steps are in.
        adapter_numbers: trained ones, and how many more for each rank.
    """

    denoiser: ModelNeed
    text_encoders: Mapping[str, ModelNeed]
    vae: int
    bucket: tuple[int, int]
    arithmetic: str
    steps: Mapping[Checkpointing, Measured]
    predict: Measured
    encode: Moments
    decode: Moments
    decode_tiled: Moments
    read_text: Mapping[str, Moments]
    adapter_numbers: tuple[int, int]
    adapter_constants: int = 0
    trains_text: tuple[str, ...] = ()

    def at(self, rank: int = 0) -> Need:
        """At one rank; of an entry that was measured at its own, as it was."""

        def curve(moments: Moments) -> Curve:
            return curve_at(moments, rank)

        return Need(
            denoiser=self.denoiser,
            text_encoders=self.text_encoders,
            vae=self.vae,
            bucket=self.bucket,
            arithmetic=self.arithmetic,
            steps={kind: step.at(rank) for kind, step in self.steps.items()},
            predict=self.predict.at(rank),
            encode=curve(self.encode),
            decode=curve(self.decode),
            decode_tiled=curve(self.decode_tiled),
            read_text={one: curve(moments) for one, moments in self.read_text.items()},
            adapter_numbers=self.adapter_numbers[0] + self.adapter_numbers[1] * rank,
            adapter_constants=self.adapter_constants,
            trains_text=self.trains_text,
        )

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        held = asdict(self)
        held["steps"] = {kind: step.plain() for kind, step in self.steps.items()}
        held["predict"] = self.predict.plain()
        return held

    @classmethod
    def from_plain(cls, held: Mapping[str, Any]) -> Self:
        """Back again."""
        curves = ("encode", "decode", "decode_tiled")
        changed = {
            "denoiser": _model(held["denoiser"]),
            "text_encoders": {one: _model(model) for one, model in held["text_encoders"].items()},
            "bucket": tuple(held["bucket"]),
            "steps": {kind: Measured.from_plain(step) for kind, step in held["steps"].items()},
            "predict": Measured.from_plain(held["predict"]),
            "read_text": {one: _moments(found) for one, found in held["read_text"].items()},
            "adapter_numbers": tuple(held["adapter_numbers"]),
            "trains_text": tuple(held["trains_text"]),
            **{curve: _moments(held[curve]) for curve in curves},
        }
        return cls(**{**held, **changed})


def _moments(held: Any) -> Moments:
    return tuple(Amount(*moment) for moment in held)


def _model(held: Mapping[str, Any]) -> ModelNeed:
    return ModelNeed(tuple(UnitNeed(**unit) for unit in held["units"]), held["other_numbers"])


# -- the table


def entry_name(bucket: tuple[int, int], arithmetic: str) -> str:
    """The name of an entry among those of a base."""
    width, height = bucket
    return f"{width}x{height} {'bf16' if arithmetic == 'fp16' else arithmetic}"


def in_table(base: str, bucket: tuple[int, int], arithmetic: str) -> Entry | None:
    """The entry of a usual base, by its short name; None where there is none."""
    held = _table(base)
    own = held.get("entries", {}).get(entry_name(bucket, arithmetic))
    if own is None:
        return None
    found = Entry.from_plain({**held["every"], **own})
    return replace(found, arithmetic=arithmetic)


def table_text(base: str, entries: Sequence[Entry]) -> str:
    """The file of a base in the table; what its entries have in common is there once."""
    plain = [json.loads(json.dumps(entry.plain())) for entry in entries]
    every = {word: plain[0][word] for word in _COMMON}
    assert all(one[word] == every[word] for one in plain for word in _COMMON)
    own = {
        entry_name(entry.bucket, entry.arithmetic): {
            word: value for word, value in one.items() if word not in _COMMON
        }
        for entry, one in zip(entries, plain, strict=True)
    }
    held = {"configs": configs_digest(base), "every": every, "entries": own}
    return json.dumps(held, separators=(",", ":")) + "\n"


def configs_digest(base: str) -> str:
    """Names the configs that a base's entries are of."""
    return hashlib.sha256(json.dumps(true_configs(base), sort_keys=True).encode()).hexdigest()


def made_of(base: str) -> str | None:
    """`configs_digest` when the base's file of the table was made; None where it has none."""
    return cast("str | None", _table(base).get("configs"))


@cache
def _table(base: str) -> Mapping[str, Any]:
    file = files(__package__) / "footprints" / f"{base}.json"
    return cast("Mapping[str, Any]", json.loads(file.read_text())) if file.is_file() else {}


# -- this machine's cache


def cached(facts: Mapping[str, Any]) -> Entry | None:
    """What was measured here before of a job with these facts; None where nothing was."""
    try:
        return Entry.from_plain(json.loads(_place(facts).read_text()))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def keep(facts: Mapping[str, Any], entry: Entry) -> None:
    """Remember an entry, so that others see all of it or nothing."""
    keep_text(_place(facts), json.dumps(entry.plain()))


def _place(facts: Mapping[str, Any]) -> Path:
    """Named by the facts, the programs that models are built by, and raylora's own code."""
    known = [dict(facts), [version(program) for program in _PROGRAMS], _code()]
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    return cache_home() / "footprints" / f"{digest[:32]}.json"


@cache
def _code() -> str:
    """What names the code that models, adapters and steps are made of."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for word in _CODE:
        place = package / word
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(file.read_bytes())
    return digest.hexdigest()
