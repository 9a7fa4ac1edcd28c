"""What a data set is: the `data:` section of a job, and the images and captions found under it.

Folders mean what they mean to kohya's scripts: images directly in the folder, or in children named
`N_concept`, each shown N times an epoch, with a text file of the same name beside each image.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from raylora.base.errors import DataError, OptionError
from raylora.base.log import get_logger
from raylora.base.options import Options
from raylora.base.storage import Entry, Storage
from raylora.data.bucket import Buckets, Size

log = get_logger("data")

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif"})
# Somebody may take these for images of the data set, so they are named rather than passed over.
OTHER_IMAGE_SUFFIXES = frozenset({".gif", ".tif", ".tiff", ".jxl", ".heic", ".heif", ".psd"})
_CONCEPT_FOLDER = re.compile(r"(?P<repeats>[0-9]+)_(?P<concept>.+)")
# The VAEs of all families shrink by 8 or less, a power of two.
PIXEL_STEP = 8


class DataOptions(Options):
    """The images and captions to train on, and how they are brought to size."""

    folder: str
    """Where the images are: a path, `file:///…` or `s3://bucket/prefix`. Children named `N_concept`
    are shown N times an epoch; without such children the images directly in it are used."""
    recursive: bool = False
    """Also take images from folders below."""
    caption_extensions: tuple[str, ...] = (".txt", ".caption")
    """Endings of the text file beside each image, in the order they are looked for."""
    default_caption: str | None = None
    """Caption of images without a text file that are in no `N_concept` folder; none is an error."""
    repeats: int = Field(1, ge=1)
    """How often an epoch shows each image; an `N_concept` folder's N goes before it."""

    resolution: int | tuple[int, int] = 512
    """Side of the square, or [width, height], in pixels. With buckets: the area none exceeds."""
    enable_bucket: bool = True
    """Train each image near its own shape; off, every image is brought to `resolution`."""
    min_bucket_reso: int = Field(256, ge=PIXEL_STEP)
    """Shortest side of a bucket in pixels."""
    max_bucket_reso: int = Field(1024, ge=PIXEL_STEP)
    """Longest side of a bucket in pixels. Below twice `resolution` it clips the longest shapes."""
    bucket_reso_steps: int = Field(64, ge=PIXEL_STEP, multiple_of=PIXEL_STEP)
    """Sides of buckets are multiples of this many pixels."""
    bucket_no_upscale: bool = False
    """Never enlarge an image; buckets are then made from the images' own sizes."""
    fit: Literal["crop", "pad"] = "crop"
    """`crop` fills the bucket and cuts what sticks out, evenly; `pad` shows all of the image and
    fills the rest with `background`, which suits icons and cut-outs."""
    background: str = Field("#ffffff", pattern=r"^#[0-9a-fA-F]{6}$")
    """Colour behind transparent pixels and around padded images, as #rrggbb."""

    order_seed: int = 0
    """Seed of the order in which images are shown; nothing else depends on it."""
    max_bad: float = Field(0.05, ge=0, le=1)
    """Share of images that may be unreadable; they are left out and listed. Above it: an error."""
    cache: str | None = None
    """Where latents and text embeddings are kept between runs; none is beside the run."""
    local_cache_gib: float = Field(2.0, gt=0)
    """Disk space on each machine for the parts of the cache in use, in GiB."""

    @field_validator("caption_extensions")
    @classmethod
    def _extensions_begin_with_a_dot(cls, extensions: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [extension for extension in extensions if not extension.startswith(".")]
        if wrong:
            raise ValueError(f"{wrong[0]!r} does not begin with a dot. Write '.{wrong[0]}'.")
        return extensions

    @model_validator(mode="after")
    def _resolution_can_be_trained(self) -> Self:
        if min(self.size) < PIXEL_STEP:
            raise ValueError(f"resolution {self.resolution} is below {PIXEL_STEP} px.")
        if not self.enable_bucket and any(side % PIXEL_STEP for side in self.size):
            raise ValueError(
                f"resolution {self.size[0]}x{self.size[1]} is not a multiple of {PIXEL_STEP} px, "
                "as it has to be without buckets. Change it, or set enable_bucket: true."
            )
        try:
            _ = self.buckets  # a set of buckets that cannot be is refused here
        except OptionError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def size(self) -> Size:
        """`resolution` as width and height."""
        return (self.resolution,) * 2 if isinstance(self.resolution, int) else self.resolution

    @property
    def colour(self) -> tuple[int, int, int]:
        """`background` as red, green and blue, 0 to 255."""
        red, green, blue = bytes.fromhex(self.background[1:])
        return red, green, blue

    @cached_property
    def buckets(self) -> Buckets:
        """The shapes these options train in."""
        return Buckets(
            self.size,
            enabled=self.enable_bucket,
            minimum=self.min_bucket_reso,
            maximum=self.max_bucket_reso,
            step=self.bucket_reso_steps,
            no_upscale=self.bucket_no_upscale,
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of the data set, as listed; nothing of it has been read yet."""

    key: str
    """The image's path relative to the data folder."""
    image: Entry
    caption: Entry | None
    repeats: int
    concept: str | None


@dataclass(frozen=True)
class Listing:
    """The samples of a folder, and what a person should know about what was left out."""

    samples: list[Sample]
    notes: list[str]


def list_samples(storage: Storage, options: DataOptions) -> list[Sample]:
    """The images of a data folder with their captions and repeats, sorted by key.

    What is left out is logged as a warning; `read_listing` hands it back instead.
    """
    listing = read_listing(storage, options)
    for note in listing.notes:
        log.warning("%s", note)
    return listing.samples


def read_listing(storage: Storage, options: DataOptions) -> Listing:
    """List a data folder by kohya's rules, reading names only.

    Raises:
        DataError: no image is found where one is looked for.
    """
    entries = {entry.key: entry for entry in storage.entries()}
    images = [key for key in entries if _suffix(key) in IMAGE_SUFFIXES]
    concepts = _concept_folders(entries)
    used = [key for key in images if _is_used(key, concepts, options)]
    if not used:
        raise DataError(_nothing_found(storage.url, images, options))
    notes = [*_left_out(entries, images, used, concepts)]
    ambiguous: list[str] = []
    samples = [_sample(key, entries, concepts, options, ambiguous) for key in sorted(used)]
    if ambiguous:
        notes.append(
            f"{_images(len(ambiguous))} with two caption files; the first of "
            f"{', '.join(options.caption_extensions)} is used: {_first_few(ambiguous)}."
        )
    return Listing(samples, notes)


def _sample(
    key: str,
    entries: dict[str, Entry],
    concepts: dict[str, tuple[int, str]],
    options: DataOptions,
    ambiguous: list[str],
) -> Sample:
    repeats, concept = concepts.get(_top_folder(key), (options.repeats, None))
    captions = [name for name in _caption_keys(key, options.caption_extensions) if name in entries]
    if len(captions) > 1:
        ambiguous.append(key)
    caption = entries[captions[0]] if captions else None
    return Sample(key, entries[key], caption, repeats, concept)


def _caption_keys(key: str, extensions: Iterable[str]) -> list[str]:
    """Names a caption may have; kohya also drops four face coordinates (`name_x_y_w_h.png`)."""
    path = PurePosixPath(key)
    stems = [path.stem]
    if path.stem.count("_") >= 4:
        stems.append(path.stem.rsplit("_", 4)[0])
    return [str(path.with_name(stem + ext)) for stem in stems if stem for ext in extensions]


def _concept_folders(keys: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Children of the data folder that are named `N_concept`, with N and the concept."""
    found: dict[str, tuple[int, str]] = {}
    for folder in {_top_folder(key) for key in keys}:
        match = _CONCEPT_FOLDER.fullmatch(folder)
        if match and int(match["repeats"]) >= 1:
            found[folder] = (int(match["repeats"]), match["concept"])
    return found


def _is_used(key: str, concepts: dict[str, tuple[int, str]], options: DataOptions) -> bool:
    if concepts and _top_folder(key) not in concepts:
        return False
    return options.recursive or key.count("/") == bool(concepts)


def _left_out(
    entries: Iterable[str], images: list[str], used: list[str], concepts: dict[str, tuple[int, str]]
) -> Iterable[str]:
    chosen = set(used)
    unused = Counter(key.rpartition("/")[0] for key in images if key not in chosen)
    for folder, count in sorted(unused.items()):
        yield f"{_images(count)} in {folder or 'the data folder itself'} not used: " + (
            "it is not named N_concept, as others beside it are."
            if concepts and _top_folder(f"{folder}/") not in concepts
            else "it is below the folder (data.recursive: true takes them)."
        )
    with_images = {_top_folder(key) for key in used}
    for folder in sorted(set(concepts) - with_images):
        yield f"no image directly in {folder}."
    others = Counter(_suffix(key) for key in entries if _suffix(key) in OTHER_IMAGE_SUFFIXES)
    for suffix, count in sorted(others.items()):
        yield f"{_images(count)} ending in {suffix} not used: convert to PNG, JPEG or WebP."


def _nothing_found(url: str, images: list[str], options: DataOptions) -> str:
    if not images:
        endings = " ".join(sorted(IMAGE_SUFFIXES))
        return f"{url}: no image here (looked for {endings}). Check data.folder."
    below = sorted({key.rpartition("/")[0] for key in images})
    return (
        f"{url}: no image directly here, but {len(images)} below, in {_first_few(below)}. Name "
        "these N_concept (N showings an epoch), or set data.recursive: true."
    )


def _first_few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _suffix(key: str) -> str:
    return PurePosixPath(key).suffix.lower()


def _top_folder(key: str) -> str:
    return key.partition("/")[0] if "/" in key else ""
