"""An image of a set as the encoder takes it: fetched, decoded, cut, mirrored, with its mask.

The cache and the encoding at each step both come through here, so they see the same pixels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raylora.base.errors import DataError
from raylora.base.storage import Storage, open_storage
from raylora.data.cache.recipe import ALPHA
from raylora.data.options import SetOptions
from raylora.data.pixels.augment import Look, apply_look
from raylora.data.pixels.bucket import Size
from raylora.data.pixels.decode import (
    Pixels,
    decode_image,
    decode_mask,
    decode_with_alpha,
    encoder_input,
    read_size,
)
from raylora.data.pixels.masks import fit_mask
from raylora.data.sources.source import open_source


@dataclass(frozen=True, slots=True)
class ImageFile:
    """The bytes of an image and of its mask, and what names them."""

    key: str
    data: bytes
    sha256: bytes
    size: Size
    """Upright width and height."""
    mask_data: bytes | None = None
    mask_name: bytes = b""
    """What the mask adds to the names of latents (`LatentsNamer.key`)."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture in its bucket.

    Attributes:
        pixels: (3, H, W) float32 in -1..1.
        mask: (H, W) bytes, 255 where the loss counts; None without a mask.
    """

    pixels: NDArray[np.float32]
    mask: NDArray[np.uint8] | None


class PictureSource:
    """Reads the images of one set; safe to use from many threads.

    Args:
        options: the set's.
        cache: where the tables of contents of tars are kept.
    """

    def __init__(self, options: SetOptions, cache: Storage) -> None:
        self.options = options
        self.storage = open_source(options, cache)
        self._masks = open_storage(options.mask_folder) if options.mask_folder else None

    def read(self, key: str, mask: str | None) -> ImageFile:
        """Fetch an image and its mask.

        Args:
            mask: the mask's key in the mask folder, where the set has one.

        Raises:
            DataError: it is not an image; the message is the reason, without a name.
            MissingObject: one of the two is not there any more.
        """
        return self.open(key, self.storage.read(key), mask)

    def open(self, key: str, data: bytes, mask: str | None) -> ImageFile:
        """`read` for an image whose bytes are here already."""
        digest = hashlib.sha256(data).digest()
        try:
            size = read_size(data, key)
        except DataError as error:
            raise DataError(without_name(error, key)) from error
        if self._masks is None or mask is None:
            alpha = ALPHA if self.options.alpha_mask else b""
            return ImageFile(key, data, digest, size, mask_name=alpha)
        mask_data = self._masks.read(mask)
        name = hashlib.sha256(mask_data).digest()
        return ImageFile(key, data, digest, size, mask_data, name)

    def show(self, file: ImageFile, look: Look) -> Shown:
        """The picture as a look has it.

        Raises:
            DataError: it cannot be decoded; the message is the reason, without a name.
        """
        options = self.options
        try:
            pixels, mask = self._decode(file, look.geometry.resized)
            shown = apply_look(pixels, look, options.colour, options.resize_interpolation)
            if mask is None and options.masked:  # opaque: all of it counts
                mask = np.full(pixels.shape[:2], 255, np.uint8)
            fitted = None if mask is None else fit_mask(mask, look, picture=file.size)
        except DataError as error:
            raise DataError(without_name(error, file.key)) from error
        return Shown(encoder_input(shown), fitted)

    def _decode(self, file: ImageFile, target: Size) -> tuple[Pixels, NDArray[np.uint8] | None]:
        colour = self.options.colour
        if self.options.alpha_mask:
            return decode_with_alpha(file.data, file.key, colour, target=target)
        pixels = decode_image(file.data, file.key, colour, target=target)
        mask = None if file.mask_data is None else decode_mask(file.mask_data, file.key)
        return pixels, mask


def without_name(error: Exception, key: str) -> str:
    """What an error says beside the file's name."""
    return str(error).removeprefix(f"{key}: ")


def decode_problem(data: bytes, key: str) -> str | None:
    """Why an image cannot be decoded whole; None when it can."""
    try:
        decode_image(data, key)
    except DataError as error:
        return without_name(error, key)
    return None
