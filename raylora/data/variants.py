"""Which pictures and captions an image has, and which of them a showing takes.

Ahead of training an image is drawn `data.variants` times, each draw named by (variant_seed,
variant, image). A showing takes one of them by (seed, epoch, repeat, image), so that every variant
comes once before any comes again. What is encoded as it is shown is drawn by (seed, step, sample)
instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raylora.base.seeds import (
    Purpose,
    draw_generator,
    shuffled_order,
    uniforms,
    whole_number,
)
from raylora.data.captions import draw_caption, is_dropped, warmup_share
from raylora.data.options import DataOptions, SetOptions
from raylora.data.pixels.augment import Look, draw_look
from raylora.data.pixels.bucket import Size

VARIANTS = 8
"""Draws of an image where a job does not say."""
PLAIN = -1
"""In a variant's place: nothing is drawn."""


@dataclass(frozen=True, slots=True)
class Variants:
    """How many pictures and captions each image of a set has in the cache, and their seed."""

    pictures: int
    texts: int
    seed: int


def variants_of(options: SetOptions, data: DataOptions) -> Variants:
    """One where nothing is drawn, or where it is drawn as it is shown; else `data.variants`."""
    count = data.variants or VARIANTS
    return Variants(
        pictures=count if options.draws_pictures and not data.pictures_live else 1,
        texts=count if options.draws_texts and not data.texts_live else 1,
        seed=data.variant_seed,
    )


def draw_picture(
    options: SetOptions, size: Size, key: str, number: int, *, seed: int, variant: int
) -> Look:
    """One of an image's pictures: how it is cut, mirrored and coloured.

    Every second variant is mirrored where `flip_aug` is on, so that both ways are seen as often.

    Args:
        number: the image's, `sample_number(key, 0, set)`.
        variant: which, from 0; PLAIN draws nothing.

    Raises:
        DataError: no bucket can hold it; the message is the reason, without a file name.
    """
    if variant == PLAIN or not options.draws_pictures:
        return draw_look(size, key, options, None)
    first = whole_number(draw_generator(seed, 0, number, "variant"), 2) if options.flip_aug else 0
    generator = draw_generator(seed, variant, number, "picture")
    mirror = options.flip_aug and (first + variant) % 2 == 1
    return draw_look(size, key, options, generator, mirror=mirror)


def draw_text(options: SetOptions, caption: str, number: int, *, seed: int, variant: int) -> str:
    """One of an image's captions; PLAIN shuffles and drops nothing."""
    if variant == PLAIN or not options.draws_texts:
        return draw_caption(caption, options, None)
    return draw_caption(caption, options, draw_generator(seed, variant, number, "caption"))


@dataclass(frozen=True, slots=True)
class Showing:
    """One showing of an image, with all that its draws depend on."""

    image: int
    """The image's number, whichever showing it is."""
    sample: int
    """The showing's number (`SampleRef.number`)."""
    step: int
    epoch: int
    """From 0."""
    repeat: int
    repeats: int


class Chooser:
    """What a showing takes of what was drawn, and what is drawn for it.

    Args:
        sets: the job's sets, as `SampleRef.set` counts them.
        seed: `training.seed`.
        total_steps: of the run, for a warm-up that is given as a share.
    """

    def __init__(self, sets: Sequence[SetOptions], *, seed: int, total_steps: int) -> None:
        self._sets, self._seed, self._total = sets, seed, total_steps

    def picture(self, showing: Showing, count: int) -> int:
        """Which of `count` cached pictures."""
        return self._turn(showing, count, "picture turn")

    def text(self, showing: Showing, of_set: int, count: int) -> int | None:
        """Which of `count` cached captions; None is the empty one."""
        if self.is_dropped(showing, of_set):
            return None
        return self._turn(showing, count, "caption turn")

    def is_dropped(self, showing: Showing, of_set: int) -> bool:
        """Whether the showing is trained without its caption."""
        options = self._sets[of_set]
        if not (options.caption_dropout_rate or options.caption_dropout_every_n_epochs):
            return False
        generator = draw_generator(self._seed, showing.step, showing.sample, "caption dropout")
        return is_dropped(options, float(uniforms(generator, 1)[0]), showing.epoch + 1)

    def dropped_encoders(self, showing: Showing, rates: Sequence[float]) -> list[bool]:
        """Which text encoders the showing is trained without, each drawn by itself.

        Args:
            rates: share of showings, for each encoder.
        """
        generator = draw_generator(self._seed, showing.step, showing.sample, "encoder dropout")
        drawn = uniforms(generator, len(rates)).tolist()
        return [chance < rate for chance, rate in zip(drawn, rates, strict=True)]

    def live_picture(self, showing: Showing, of_set: int, size: Size, key: str) -> Look:
        """A picture drawn for this showing alone."""
        options = self._sets[of_set]
        generator = draw_generator(self._seed, showing.step, showing.sample, "picture")
        mirror = options.flip_aug and whole_number(generator, 2) == 1
        return draw_look(size, key, options, generator, mirror=mirror)

    def live_text(self, showing: Showing, of_set: int, caption: str) -> str:
        """A caption drawn for this showing alone; "" where it is dropped."""
        if self.is_dropped(showing, of_set):
            return ""
        options = self._sets[of_set]
        warmup = warmup_share(options, showing.step, self._total)
        generator = draw_generator(self._seed, showing.step, showing.sample, "caption")
        return draw_caption(caption, options, generator, warmup=warmup)

    def _turn(self, showing: Showing, count: int, purpose: Purpose) -> int:
        if count == 1:
            return 0
        before = showing.epoch * showing.repeats + showing.repeat
        generator = draw_generator(self._seed, before // count, showing.image, purpose)
        return shuffled_order(generator, count)[before % count]
