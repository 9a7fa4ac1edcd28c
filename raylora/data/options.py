"""The `data:` section of a job: sets of images, each with its words, and what holds for all.

A word written in the section holds for every set that does not write it itself, as sd-scripts'
`[general]` does for its data sets. `resolve` makes whole sets of them, with the family's sizes
where none are given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from pydantic import Field, ValidationError, field_serializer, model_validator

from raylora.base.errors import OptionError, UserError
from raylora.data.captions import CaptionWords, is_drawn
from raylora.data.pixels.augment import AugmentWords
from raylora.data.pixels.bucket import PIXEL_STEP, Buckets, BucketWords, Size
from raylora.data.pixels.masks import MaskWords
from raylora.data.sources.kohya_toml import read_kohya_sets
from raylora.data.sources.source import SourceWords


@dataclass(frozen=True, slots=True)
class Native:
    """What a family was made for; stands where a job says nothing."""

    resolution: int
    """Side of a square in pixels."""
    bucket_step: int
    """Sides of buckets are multiples of this many pixels."""


class SetWords(MaskWords, AugmentWords, CaptionWords, BucketWords, SourceWords):
    """A set of images; words that are not written here are those of the data section."""


class DataOptions(SetWords):
    """The images and captions to train on, and how they are brought to size. Words of a set that
    are written here hold for all `sets`."""

    toml: str | None = None
    """A data set file of sd-scripts, TOML or JSON. It is read once: its sets stand in the job's
    `sets` from then on."""
    sets: tuple[SetWords, ...] = ()
    """Several sets: other folders, resolutions, captions, regularisation images. Each may have the
    words above, from `folder` to `mask_folder`, and has the section's where it has none."""
    prior_loss_weight: float = Field(1.0, ge=0)
    """Weight of the loss of regularisation images (`is_reg`)."""

    variants: int | None = Field(None, ge=1)
    """How often captions and pictures are drawn for the cache where anything about them is random
    (tags shuffled, pictures cut or mirrored); training shows them in turn. Null is 8."""
    variant_seed: int = 0
    """Seed of these draws; not `training.seed`, so that a sweep over seeds shares a cache."""
    order_seed: int = 0
    """Seed of the order in which images are shown; nothing else depends on it."""
    max_bad: float = Field(0.05, ge=0, le=1)
    """Share of images that may be unreadable; they are left out and listed. Above it: an error."""
    cache: str | None = None
    """Where latents and text embeddings are kept between runs; null is beside the run. `none`
    encodes pictures and captions as they are shown, and draws them anew at each step."""
    cache_text: bool = True
    """Off: captions are encoded as they are shown, and drawn anew at each step; pictures are
    cached all the same. Where the text encoder is trained (`network.train`) it is off by itself."""
    local_cache_gib: float = Field(2.0, gt=0)
    """Disk space on each machine for the parts of the cache in use, in GiB."""

    @model_validator(mode="before")
    @classmethod
    def _read_toml(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("toml") is None:
            return given
        others = [word for word in ("sets", "folder", "manifest") if given.get(word)]
        if others:
            raise ValueError(f"data.toml and data.{others[0]}: give one of them.")
        rest = {word: value for word, value in given.items() if word != "toml"}
        try:
            return {**rest, "sets": read_kohya_sets(str(given["toml"]), rest)}
        except UserError as error:
            raise ValueError(f"data.toml: {error}") from error

    @field_serializer("sets")
    def _as_written(self, sets: tuple[SetWords, ...]) -> list[dict[str, Any]]:
        # What is not written stays unwritten: a word of the section may be changed later.
        return [one.model_dump(mode="json", exclude_unset=True) for one in sets]

    @property
    def pictures_live(self) -> bool:
        """Whether pictures are encoded as they are shown."""
        return self.cache == "none"

    @property
    def texts_live(self) -> bool:
        """Whether captions are encoded as they are shown."""
        return self.pictures_live or not self.cache_text


class SetOptions(SetWords):
    """A set with all its words, its own or those of the section or of the family."""

    resolution: tuple[int, int]
    min_bucket_reso: int = Field(ge=PIXEL_STEP)
    max_bucket_reso: int = Field(ge=PIXEL_STEP)
    bucket_reso_steps: int = Field(ge=PIXEL_STEP, multiple_of=PIXEL_STEP)
    plain: bool = False
    """Held out: nothing about it is drawn, whatever the words say."""

    @model_validator(mode="after")
    def _can_be_trained(self) -> Self:
        if self.folder is None and self.manifest is None:
            raise ValueError("folder: missing. Give the folder of the images, or a manifest.")
        size = f"resolution {self.resolution[0]}x{self.resolution[1]}"
        if min(self.resolution) < PIXEL_STEP:
            raise ValueError(f"{size} is below {PIXEL_STEP} px.")
        if not self.enable_bucket and any(side % PIXEL_STEP for side in self.resolution):
            raise ValueError(
                f"{size} is not a multiple of {PIXEL_STEP} px, as it has to be without buckets. "
                "Change it, or set enable_bucket: true."
            )
        if self.fit == "pad" and (self.random_crop or self.face_crop_aug_range):
            word = "random_crop" if self.random_crop else "face_crop_aug_range"
            raise ValueError(f"fit: pad shows all of an image, so {word} has nothing to cut.")
        faces = self.face_crop_aug_range
        if faces and faces[0] > faces[1]:
            raise ValueError(f"face_crop_aug_range {list(faces)}: the first is the lower one.")
        if self.alpha_mask and self.mask_folder:
            raise ValueError("alpha_mask and mask_folder: give one of them.")
        if self.output_preservation and not self.is_reg:
            raise ValueError(
                "output_preservation is for regularisation images, and these are trained for what "
                "they show. Set is_reg: true, or leave output_preservation out."
            )
        try:
            _ = self.buckets  # a set of buckets that cannot be is refused here
        except OptionError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def masked(self) -> bool:
        """Whether its images have masks."""
        return self.alpha_mask or self.mask_folder is not None

    @property
    def draws_pictures(self) -> bool:
        """Whether anything about a picture is drawn."""
        words = (self.flip_aug, self.color_aug, self.random_crop, self.face_crop_aug_range)
        return any(words) and not self.plain

    @property
    def draws_texts(self) -> bool:
        """Whether anything about a caption is drawn, apart from leaving it out."""
        return is_drawn(self) and not self.plain

    @property
    def colour(self) -> tuple[int, int, int]:
        """`background` as red, green and blue, 0 to 255."""
        red, green, blue = bytes.fromhex(self.background[1:])
        return red, green, blue

    @cached_property
    def buckets(self) -> Buckets:
        """The shapes its images are trained in."""
        return Buckets(
            self.resolution,
            enabled=self.enable_bucket,
            minimum=self.min_bucket_reso,
            maximum=self.max_bucket_reso,
            step=self.bucket_reso_steps,
            no_upscale=self.bucket_no_upscale,
        )

    def held_out(self, folder: str | None = None) -> SetOptions:
        """The same without anything drawn, for measuring; of another folder where one is given."""
        plain: dict[str, Any] = {"plain": True}
        if folder is not None:
            plain |= {"folder": folder, "tars": False, "manifest": None, "is_reg": False}
            plain |= {"output_preservation": False, "repeats": 1, "group": 0}
            plain |= {"mask_folder": None, "validation_split": 0.0}
        return self.model_copy(update=plain)


def resolve(data: DataOptions, native: Native) -> tuple[SetOptions, ...]:
    """The sets of a data section, whole.

    Raises:
        OptionError: a set cannot be trained; the message begins with its place in the job.
    """
    words = set(SetWords.model_fields)
    section = data.model_dump(include=words, exclude_unset=True)
    if not data.sets:
        return (_whole(section, native, "data"),)
    entries = [one.model_dump(exclude_unset=True) for one in data.sets]
    return tuple(
        _whole({**section, **entry}, native, f"data.sets.{number}")
        for number, entry in enumerate(entries)
    )


def _whole(given: dict[str, Any], native: Native, place: str) -> SetOptions:
    chosen = {word: value for word, value in given.items() if value is not None}
    resolution = chosen.get("resolution", native.resolution)
    size: Size = (resolution,) * 2 if isinstance(resolution, int) else tuple(resolution)
    defaults = {
        "min_bucket_reso": min(256, max(PIXEL_STEP, min(size) // 2)),
        "max_bucket_reso": max(PIXEL_STEP, 2 * max(size)),
        "bucket_reso_steps": native.bucket_step,
    }
    try:
        return SetOptions.model_validate({**defaults, **chosen, "resolution": size})
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise OptionError(f"{place}.{message}") from None
