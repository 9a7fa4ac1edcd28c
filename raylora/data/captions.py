"""The text of an image: read from the file beside it or what stands in for it, then drawn.

The order in which a caption is put together is that of sd-scripts: prefix and suffix, a line and
its wildcards, tags, secondary separator. Weights such as `(tag:1.2)` are text like any other.
"""

from __future__ import annotations

import math
import re

import numpy as np
from pydantic import Field, field_validator

from raylora.base.errors import DataError
from raylora.base.options import Options
from raylora.base.seeds import shuffled_order, uniforms, whole_number

# A doubled brace, or `{...}`. What stands inside may hold doubled braces, and it is never given
# back to try a shorter match (`++`): a `{` without its own `}` stays as it is written.
_WILDCARD = re.compile(r"\{\{|\}\}|\{((?:\}\}|[^}])++)\}")


class CaptionWords(Options):
    """Where captions come from, and what is done to them at each draw."""

    caption_extensions: tuple[str, ...] = (".txt", ".caption")
    """Endings of the text file beside each image, in the order they are looked for."""
    class_tokens: str | None = None
    """Caption of images without a text file; the concept of an `N_concept` folder goes before."""
    default_caption: str | None = None
    """Caption of images with neither a text file, nor a concept, nor class tokens; null refuses
    them."""
    caption_prefix: str | None = None
    """Put before a caption, with a space between; of several lines, before the first."""
    caption_suffix: str | None = None
    """Put after a caption, with a space between; of several lines, after the last."""
    enable_wildcard: bool = False
    """Take a random line of the text file, and one of a, b, c where `{a|b|c}` is written; a brace
    is then written twice, `{{` or `}}`. Off: the first line, as it is written."""
    shuffle_caption: bool = False
    """Put the tags, parted by `caption_separator`, into a random order."""
    caption_separator: str = Field(",", min_length=1)
    """What parts the tags of a caption. Tags that were shuffled, dropped or warmed up are joined by
    a comma and a space, whatever it is."""
    keep_tokens: int = Field(0, ge=0)
    """How many of the first tags stay where they are and are never dropped."""
    keep_tokens_separator: str | None = None
    """Written in a caption, parts the tags that stay from the others; a second one begins the tags
    that stay at the end. Such a caption ignores `keep_tokens`. It is taken out of the text where
    tags are shuffled, dropped or warmed up, and left in it otherwise."""
    secondary_separator: str | None = None
    """Tags joined by it are moved and dropped as one; it becomes `caption_separator` at the end."""
    caption_dropout_rate: float = Field(0.0, ge=0, le=1)
    """Share of showings that are trained with an empty caption, without prefix or suffix."""
    caption_dropout_every_n_epochs: int = Field(0, ge=0)
    """Train every n-th epoch with empty captions; 0 never does. Epochs count from 1."""
    caption_tag_dropout_rate: float = Field(0.0, ge=0, le=1)
    """Probability that a tag is left out, each for itself; tags that stay are never left out."""
    token_warmup_min: int = Field(1, ge=0)
    """How many of the tags that may move are shown at the first step of the warm-up."""
    token_warmup_step: float = Field(0.0, ge=0)
    """Steps over which more and more tags are shown; below 1 a share of the run. It depends on the
    step, so it needs captions that are encoded as they are shown: `data.cache_text: false`."""

    @field_validator("caption_extensions")
    @classmethod
    def _extensions_begin_with_a_dot(cls, extensions: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [extension for extension in extensions if not extension.startswith(".")]
        if wrong:
            raise ValueError(f"{wrong[0]!r} does not begin with a dot. Write '.{wrong[0]}'.")
        return extensions


def read_caption(data: bytes) -> str:
    r"""The whole text of a caption file, lines ended by \n; UTF-8 with or without a mark.

    Raises:
        DataError: the file is blank or not UTF-8; the message is the reason, without a name.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"the caption file is not UTF-8 (byte {error.start}); save it as UTF-8"
        ) from error
    if not text.strip():
        raise DataError("the caption file is empty; write a caption, or delete it")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def caption_lines(text: str, words: CaptionWords) -> str:
    """What of a file's text is a caption: its first line or, with wildcards, all but blank ones."""
    lines = [line.strip() for line in text.split("\n")]
    if not words.enable_wildcard:
        return lines[0]
    return "\n".join(line for line in lines if line)


def caption_of(text: str | None, concept: str | None, words: CaptionWords) -> str | None:
    """The caption of an image before anything is drawn; None where it has none at all.

    Args:
        text: what its text file says, or None without a file. "" is a caption.
        concept: the concept of its `N_concept` folder, or None in another folder.
        words: have what stands in for both.
    """
    stands_in = (text, concept, words.class_tokens, words.default_caption)
    return next((caption for caption in stands_in if caption is not None), None)


def has_warmup(words: CaptionWords) -> bool:
    """Whether the tags that are shown depend on the step."""
    return words.token_warmup_step > 0


def is_drawn(words: CaptionWords) -> bool:
    """Whether a caption may differ from one showing to the next; being dropped whole is apart."""
    return words.enable_wildcard or _parts_tags(words)


def is_dropped(words: CaptionWords, u: float, epoch: int) -> bool:
    """Whether a showing is trained with an empty caption.

    Args:
        words: have the rate and the epochs.
        u: in [0, 1), drawn for this showing.
        epoch: counted from 1; an epoch 0 would be dropped by every `n`.
    """
    every = words.caption_dropout_every_n_epochs
    return u < words.caption_dropout_rate or (every > 0 and epoch % every == 0)


def warmup_share(words: CaptionWords, step: int, total_steps: int) -> float:
    """How far the token warm-up is at `step`, counted from 0; 1 or more when over or not wanted."""
    steps = words.token_warmup_step
    if steps < 1:
        steps = math.floor(steps * total_steps)
    return step / steps if steps else 1.0


def draw_caption(
    caption: str,
    words: CaptionWords,
    generator: np.random.Generator | None,
    *,
    warmup: float = 1.0,
) -> str:
    """Put together the text of one showing that is not dropped whole.

    Args:
        caption: the `caption_lines` of what `caption_of` gives.
        words: what is done to it.
        generator: draws the line, the wildcards, the order and the tags that are left out. None
            draws nothing, for held-out images: first line, first alternatives, tags as written.
        warmup: the `warmup_share` of the step.
    """
    text = _chosen_line(_with_ends(caption, words), words, generator)
    if _parts_tags(words):
        text = ", ".join(_drawn_tags(text, words, generator, warmup))
    if words.secondary_separator:
        text = text.replace(words.secondary_separator, words.caption_separator)
    return text


def _with_ends(caption: str, words: CaptionWords) -> str:
    before = f"{words.caption_prefix} " if words.caption_prefix else ""
    after = f" {words.caption_suffix}" if words.caption_suffix else ""
    return before + caption + after


def _chosen_line(text: str, words: CaptionWords, generator: np.random.Generator | None) -> str:
    lines = text.split("\n")
    if not words.enable_wildcard:
        return lines[0]

    def written(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        alternative = _one_of(match[1].split("|"), generator)
        return alternative.replace("{{", "{").replace("}}", "}")

    return _WILDCARD.sub(written, _one_of(lines, generator))


def _one_of(choices: list[str], generator: np.random.Generator | None) -> str:
    return choices[0 if generator is None else whole_number(generator, len(choices))]


def _parts_tags(words: CaptionWords) -> bool:
    """Whether anything is done to tags; a caption is otherwise never taken apart."""
    return words.shuffle_caption or words.caption_tag_dropout_rate > 0 or has_warmup(words)


def _drawn_tags(
    text: str, words: CaptionWords, generator: np.random.Generator | None, warmup: float
) -> list[str]:
    first, loose, last = _parted_tags(text, words)
    loose = loose[: _shown_count(len(loose), words.token_warmup_min, warmup)]
    if generator is not None and words.shuffle_caption:
        loose = [loose[place] for place in shuffled_order(generator, len(loose))]
    if generator is not None and words.caption_tag_dropout_rate > 0:
        kept = uniforms(generator, len(loose)) >= words.caption_tag_dropout_rate
        loose = [tag for tag, keep in zip(loose, kept, strict=True) if keep]
    return first + loose + last


def _parted_tags(text: str, words: CaptionWords) -> tuple[list[str], list[str], list[str]]:
    """The tags that stay in front, those that may move, and those that stay at the end."""
    separator = words.keep_tokens_separator
    if not separator or separator not in text:
        tags = _tags(text, words)
        return tags[: words.keep_tokens], tags[words.keep_tokens :], []
    # As sd-scripts: a third separator is part of a tag, and only here are empty tags left out.
    parts = (*text.split(separator, 2), "")[:3]
    first, loose, last = ([tag for tag in _tags(part, words) if tag] for part in parts)
    return first, loose, last


def _tags(text: str, words: CaptionWords) -> list[str]:
    return [tag.strip() for tag in text.strip().split(words.caption_separator)]


def _shown_count(count: int, least: int, warmup: float) -> int:
    """How many of `count` tags the warm-up shows, the first ones: from `least` up to all."""
    if warmup >= 1:
        return count
    # 0.29 * 100 is a little below 29 in floats.
    return math.floor(warmup * (count - least) + 1e-9) + least
