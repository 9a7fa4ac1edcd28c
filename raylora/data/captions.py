"""The text of an image: the first line of the file beside it, or what stands in for it."""

from __future__ import annotations

import io

from raylora.base.errors import DataError
from raylora.data.source import DataOptions, Sample


def read_caption(data: bytes) -> str:
    """The caption in a text file: its first line, stripped; UTF-8 with or without a mark.

    Raises:
        DataError: the file is empty or not UTF-8; the message is the reason, without a name.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"the caption file is not UTF-8 (byte {error.start}); save it as UTF-8"
        ) from error
    if not text:
        raise DataError("the caption file is empty; write a caption, or delete it")
    return io.StringIO(text, newline=None).readline().strip()


def caption_of(sample: Sample, text: str | None, options: DataOptions) -> str:
    """What a sample is captioned with: its file, else its concept, else `data.default_caption`.

    Args:
        text: what `read_caption` found in the sample's caption file; None without a file.

    Raises:
        DataError: none of the three is there; the message names the image and the remedies.
    """
    for caption in (text, sample.concept, options.default_caption):
        if caption is not None:
            return caption
    looked_for = " and ".join(options.caption_extensions) or "no ending"
    raise DataError(
        f"{sample.key}: no caption beside the image (looked for {looked_for}). Write one, set "
        "data.default_caption, or put the image in a folder named N_concept."
    )
