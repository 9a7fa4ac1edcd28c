"""Options of a network that change nothing on the layers that carry it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from raylora.base.errors import OptionError
from raylora.base.site import Site
from raylora.networks import NetworkOptions

_LARGE = "It is for convolutions larger than 1x1, and none that it could shape carries the adapter"
_OWN = "Every layer that carries the adapter has its own, or no use for one"
_WHOLE = "The layers' blocks come out the same with and without it"
_REASONS = {
    "rank": _OWN,
    "alpha": _OWN,
    "conv_rank": _LARGE,
    "conv_alpha": _LARGE,
    "tucker": _LARGE,
    "factor": _WHOLE,
    "decompose_both": _WHOLE,
    "full_matrix": _WHOLE,
    "unbalanced": _WHOLE,
    "scaling": "Every layer has the same strength either way",
}
_LISTS = ("ranks", "block_ranks", "conv_block_ranks")
"""Whose zeros leave layers out, which is an effect on those that are not there."""
_ALPHAS = ("alphas", "block_alphas", "conv_block_alphas")


def refuse_idle(options: NetworkOptions, sites: Sequence[Site]) -> None:
    """Whatever is said of ranks, strengths and factors shows in some layer's adapter.

    An option is idle where both the usual value and one beside the given would make the same
    adapters (`NetworkOptions.form_at`); the usual value written out is not.

    Args:
        sites: that carry the adapter.

    Raises:
        OptionError: something of it does not.
    """
    forms = [options.form_at(site) for site in sites]
    for word in (*_REASONS, *_LISTS, *_ALPHAS):
        field = type(options).model_fields.get(word)
        if field is None or (value := getattr(options, word)) == field.default:
            continue
        if word in _LISTS and 0 in _numbers(value):
            continue
        others = (options.model_copy(update={word: one}) for one in (field.default, _beside(value)))
        if all([other.form_at(site) for site in sites] == forms for other in others):
            told = value if isinstance(value, int | float | str) else "given"
            shown = str(told).lower() if isinstance(told, bool) else told
            reason = _REASONS.get(word, f"{options.kind} has no use for these numbers there")
            raise OptionError(
                f"network.{word} is {shown}, and changes nothing. {reason}. Leave it out."
            )


def _beside(value: Any) -> Any:
    """A value of the same kind that means another adapter, where the option means anything."""
    if isinstance(value, bool | str):
        return value
    if isinstance(value, dict):
        return {word: _beside(held) for word, held in value.items()}
    if isinstance(value, tuple):
        return tuple(_beside(one) for one in value)
    return value + 1


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = tuple(value.values())
    for one in value:
        if isinstance(one, tuple):
            yield from one
        else:
            yield one
