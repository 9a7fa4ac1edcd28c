"""What an hour of a card costs: dated defaults, and a person's own figures over them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from raylora.base.errors import OptionError
from raylora.base.lookup import did_you_mean
from raylora.base.yaml_file import read_yaml_file
from raylora.memory.card import Card
from raylora.memory.cards import KNOWN, card_named, known_name

DEFAULTS = Path(__file__).with_name("prices.yaml")
_WORDS = {"dollars", "as_of", "source"}


@dataclass(frozen=True)
class Price:
    """What a card costs.

    Attributes:
        dollars: an hour, US; None is not known.
        as_of: when that was so, "2026-10"; empty is not said.
        source: whose price it is; empty is not said.
    """

    dollars: float | None
    as_of: str = ""
    source: str = ""

    @property
    def said(self) -> str:
        """For people: where it is from, and of when."""
        return " ".join(part for part in (self.source, self.as_of) if part)


def read_prices(file: str | None = None) -> dict[str, Price]:
    """The defaults, with what a file of the same form says over them.

    Raises:
        UserError: the file cannot be read, or a line of it is no price.
    """
    prices = _read(DEFAULTS)
    return prices if file is None else {**prices, **_read(Path(file), own=True)}


def priced(cards: Iterable[Card], prices: Mapping[str, Price]) -> list[Card]:
    """The same cards with what they cost."""
    return [
        replace(
            card, dollars_per_hour=prices.get(known_name(card.name) or card.name, _NONE).dollars
        )
        for card in cards
    ]


_NONE = Price(None)


def _read(path: Path, *, own: bool = False) -> dict[str, Price]:
    tree = read_yaml_file(path, wanted="a file of prices", holds="cards and what an hour costs")
    found = {}
    for word, given in tree.items():
        try:
            name = card_named(str(word)).name
        except OptionError:
            raise OptionError(
                f"{path}: {word} is no card.{did_you_mean(str(word), KNOWN)}"
            ) from None
        found[name] = _price(given, f"{path}: {word}", own=own)
    return found


def _price(given: Any, place: str, *, own: bool) -> Price:
    if isinstance(given, Mapping):
        unknown = sorted(set(map(str, given)) - _WORDS)
        if unknown:
            raise OptionError(
                f"{place}: {unknown[0]!r} is not known.{did_you_mean(unknown[0], _WORDS)}"
            )
        dollars, as_of = given.get("dollars"), given.get("as_of", "")
        dated = as_of.isoformat() if isinstance(as_of, date) else str(as_of)
        return Price(_dollars(dollars, place), dated, str(given.get("source", "")))
    return Price(_dollars(given, place), source="your prices file" if own else "")


def _dollars(given: Any, place: str) -> float | None:
    if given is None:
        return None
    number = isinstance(given, int | float) and not isinstance(given, bool)
    if not number or not math.isfinite(given) or given < 0:
        raise OptionError(
            f"{place} is {given!r}, which is no price. Write dollars an hour, as in "
            "`RTX4090: 0.34`, or null where it is not known."
        )
    return float(given)
