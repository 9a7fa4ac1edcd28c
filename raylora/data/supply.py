"""The tensors of a step's showings: taken from the cache, or encoded as they are shown."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raylora.base.encoder import Encoder
from raylora.base.errors import DataError, MissingObject
from raylora.base.storage import open_storage
from raylora.data.cache.recipe import LatentsNamer, text_key
from raylora.data.dataset import Dataset
from raylora.data.encode import encode_captions, encode_pictures, is_finite
from raylora.data.pixels.augment import true_crop
from raylora.data.pixels.bucket import Size
from raylora.data.pixels.pictures import ImageFile, PictureSource
from raylora.data.rows import Row
from raylora.data.steps import SampleRef, StepPlan
from raylora.data.variants import PLAIN, Chooser, Showing, draw_picture, draw_text

Tensors = Mapping[str, NDArray[np.generic]]
Tokens = Callable[[Sequence[str]], Mapping[str, NDArray[np.generic]]]
"""Captions -> what a text encoder in training reads, each with B first."""

PRESERVE = "preserve"
"""(), 1 where the target is what the base alone predicts (`output_preservation`)."""
GEOMETRY = "geometry"
"""(6,) float32 in pixels: height and width of the picture as it was found, top and left of what is
shown of it once it was resized, height and width of that."""
DROPPED = "dropped"
"""(E,) float32, 1 for each text encoder that the showing is trained without."""
UNCAST = (GEOMETRY, DROPPED)
"""What predictions take as it is, in any precision: 16 bits would round sizes above 256."""


@dataclass(frozen=True, slots=True)
class Extras:
    """What a family wants of each showing beside pictures and texts.

    Attributes:
        geometry: how the picture was cut (`GEOMETRY`).
        encoder_dropout: share of showings that are trained without each text encoder; `DROPPED`
            comes where any is above 0.
    """

    geometry: bool = False
    encoder_dropout: tuple[float, ...] = ()


NO_EXTRAS = Extras()

# As the cache encodes captions, so that a caption has the same numbers both ways.
_TEXT_BATCH = 16


def measured_tensors(
    dataset: Dataset,
    rows: Sequence[Row],
    tokens: Tokens | None = None,
    extras: Extras = NO_EXTRAS,
) -> list[Tensors]:
    """The tensors of held-out rows, which count alike; all of a picture where it has no mask.

    Args:
        tokens: given where the text encoder is trained, so that a cached caption would be old.
        extras: of them nothing is dropped.
    """
    counts = {"weight": np.ones((), np.float32)}
    none = [False] * len(extras.encoder_dropout)
    return [
        {**_with_mask(one), **counts, **_extras(extras, row, row.crop, none)}
        for one, row in zip(_first_variants(dataset, rows, tokens), rows, strict=True)
    ]


def _first_variants(
    dataset: Dataset, rows: Sequence[Row], tokens: Tokens | None
) -> Sequence[Tensors]:
    if tokens is None:
        return dataset.fetch(rows)
    sets, seed = dataset.facts.sets, dataset.facts.data.variant_seed
    captions = [
        draw_text(sets[row.set], row.caption, row.number, seed=seed, variant=PLAIN) for row in rows
    ]
    texts = _split(tokens(captions), len(rows))
    pictures = dataset.fetch_pictures([row.latents_key for row in rows])
    return [{**text, **picture} for picture, text in zip(pictures, texts, strict=True)]


def _extras(
    extras: Extras, row: Row, crop: Size, dropped: Sequence[bool]
) -> dict[str, NDArray[np.float32]]:
    """What the family wants of a showing of a row that is cut at `crop`."""
    found = {}
    if extras.geometry:
        sizes = [*row.original_size[::-1], *crop[::-1], *row.bucket[::-1]]
        found[GEOMETRY] = np.array(sizes, np.float32)
    if any(extras.encoder_dropout):
        found[DROPPED] = np.array(dropped, np.float32)
    return found


def _split(batch: Mapping[str, NDArray[np.generic]], count: int) -> list[Tensors]:
    return [{name: array[i] for name, array in batch.items()} for i in range(count)]


_Cut = tuple[Tensors, Size]
"""A picture's tensors, and left and top of its true crop."""


class Supply:
    """Gives a step's showings their tensors; safe to use from two threads.

    Besides what the encoders give, each has `weight` (), the weight of its loss, and, where any
    image of the data set has a mask, `mask` (1, h, w).

    Args:
        chooser: which variant a showing takes.
        encoder: of pictures or captions that are encoded as they are shown; None where none are.
        tokens: given where the text encoder is trained: captions are then handed on as tokens.
        extras: what the family wants beside.
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: StepPlan,
        chooser: Chooser,
        encoder: Encoder | None,
        tokens: Tokens | None = None,
        extras: Extras = NO_EXTRAS,
    ) -> None:
        self.dataset = dataset
        data, sets = dataset.facts.data, dataset.facts.sets
        self._pictures_live, self._texts_live = data.pictures_live, data.texts_live
        assert encoder is not None or tokens is not None or not self._texts_live
        self._tokens, self._extras = tokens, extras
        self._preserving = any(options.output_preservation for options in sets)
        self._preserved = [
            np.asarray(float(options.output_preservation), np.float32) for options in sets
        ]
        self._plan, self._chooser, self._encoder = plan, chooser, encoder
        self._masked = any(options.masked for options in sets)
        self._weights = [
            np.asarray(data.prior_loss_weight if options.is_reg else 1.0, np.float32)
            for options in sets
        ]
        self._lock = threading.Lock()
        dataset.fill()

    def close(self) -> None:
        """Let go of what the data set has opened."""
        self.dataset.close()

    def fetch(self, samples: Sequence[SampleRef], step: int) -> list[Tensors]:
        """The tensors of each showing of a step."""
        rows = [self.dataset.rows[sample.row] for sample in samples]
        showings = [
            self._showing(sample, row, step) for sample, row in zip(samples, rows, strict=True)
        ]
        pairs = list(zip(rows, showings, strict=True))
        pictures = self._live_pictures(pairs) if self._pictures_live else self._pictures(pairs)
        texts = self._live_texts(pairs) if self._texts_live else self._texts(pairs)
        rates = self._extras.encoder_dropout
        return [
            {
                **text,
                **(_with_mask(picture) if self._masked else picture),
                "weight": self._weights[row.set],
                **({PRESERVE: self._preserved[row.set]} if self._preserving else {}),
                **_extras(self._extras, row, crop, self._chooser.dropped_encoders(showing, rates)),
            }
            for (picture, crop), text, (row, showing) in zip(pictures, texts, pairs, strict=True)
        ]

    def _showing(self, sample: SampleRef, row: Row, step: int) -> Showing:
        epoch = step // self._plan.steps_per_epoch
        return Showing(row.number, sample.number, step, epoch, sample.repeat, row.repeats)

    def _pictures(self, pairs: Sequence[tuple[Row, Showing]]) -> list[_Cut]:
        turns = [self._chooser.picture(showing, len(row.latents_keys)) for row, showing in pairs]
        chosen = [(row, turn) for (row, _), turn in zip(pairs, turns, strict=True)]
        found = self.dataset.fetch_pictures([row.latents_keys[turn] for row, turn in chosen])
        crops = [row.crops[turn] for row, turn in chosen]
        return list(zip(found, crops, strict=True))

    def _texts(self, pairs: Sequence[tuple[Row, Showing]]) -> Sequence[Tensors]:
        keys = []
        for row, showing in pairs:
            variant = self._chooser.text(showing, row.set, len(row.text_keys))
            keys.append(text_key("") if variant is None else row.text_keys[variant])
        return self.dataset.fetch_texts(keys)

    def _live_pictures(self, pairs: Sequence[tuple[Row, Showing]]) -> list[_Cut]:
        return [self._live_picture(row, showing) for row, showing in pairs]

    def _live_picture(self, row: Row, showing: Showing) -> _Cut:
        source = self._sources[row.set]
        try:
            file = source.read(row.key, row.mask)
            if self._name(row, file) != row.latents_key:
                raise DataError(f"it is another picture, {file.size[0]}x{file.size[1]} px")
            look = self._chooser.live_picture(showing, row.set, file.size, row.key)
            shown = source.show(file, look)
        except (DataError, MissingObject) as error:
            raise DataError(
                f"{row.key}: it was good before training and is not now ({error}). Put it back, "
                "or run the same command again to go on without it."
            ) from error
        with self._lock:
            assert self._encoder is not None
            (tensors,) = encode_pictures(self._encoder, [shown])
        if not is_finite(tensors):
            raise DataError(f"{row.key}: the image encoder gave NaN or infinity. Remove it.")
        return tensors, true_crop(look)

    def _name(self, row: Row, file: ImageFile) -> bytes:
        """What the cache would call the row's first picture, of the bytes that are there now."""
        options, seed = self.dataset.facts.sets[row.set], self.dataset.facts.data.variant_seed
        look = draw_picture(options, file.size, row.key, row.number, seed=seed, variant=0)
        return LatentsNamer(options).key(file.sha256, look, file.mask_name)

    def _live_texts(self, pairs: Sequence[tuple[Row, Showing]]) -> Sequence[Tensors]:
        captions = [
            self._chooser.live_text(showing, row.set, row.caption) for row, showing in pairs
        ]
        if self._tokens is not None:
            return _split(self._tokens(captions), len(captions))
        found: list[Tensors] = []
        with self._lock:
            assert self._encoder is not None
            for start in range(0, len(captions), _TEXT_BATCH):
                part = captions[start : start + _TEXT_BATCH]
                found += encode_captions(self._encoder, part, _TEXT_BATCH)
        return found

    @cached_property
    def _sources(self) -> list[PictureSource]:
        facts = self.dataset.facts
        cache = open_storage(facts.cache_url)
        return [PictureSource(options, cache) for options in facts.sets]


def _with_mask(picture: Tensors) -> dict[str, Any]:
    found: dict[str, Any] = dict(picture)
    if "mask" not in found:
        height, width = found["latents"].shape[-2:]
        found["mask"] = np.ones((1, height, width), np.float32)
    return found
