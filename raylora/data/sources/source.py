"""Where the images of a set are: a folder, a folder of tars, or the folder of a list of images."""

from __future__ import annotations

from pydantic import Field

from raylora.base.errors import DataError
from raylora.base.options import Options, known_as
from raylora.base.storage import Storage, open_storage


class SourceWords(Options):
    """Where the images of a set are."""

    folder: str | None = None
    """Where the images are: a path, `file:///…` or `s3://bucket/prefix`. Children named `N_concept`
    are shown N times an epoch; without such children the images directly in it are used."""
    recursive: bool = False
    """Also take images from folders below."""
    tars: bool = False
    """The folder holds WebDataset tars (`*.tar`), with the images and captions inside."""
    manifest: str | None = None
    """A list of images with their captions: Parquet, JSONL, or sd-scripts' metadata JSON. The
    images are named relative to `folder`, or to the list's own folder where none is given."""
    repeats: int = Field(1, ge=1)
    """How often an epoch shows each image; an `N_concept` folder's N goes before it."""
    is_reg: bool = False
    """Regularisation images: shown until there are as many showings of them as of the others in the
    group, their loss weighed by `prior_loss_weight`."""
    output_preservation: bool = Field(
        False,
        json_schema_extra=known_as(
            formula="target = the base's own prediction of the same noisy latents",
            sd_scripts="custom_attributes.diff_output_preservation of a subset (there without "
            "is_reg too)",
            guides="differential output preservation",
        ),
    )
    """Train these regularisation images (`is_reg`) towards what the base alone predicts, not
    towards the images, so that nothing but what is trained changes; it costs a second prediction
    of each."""
    group: int = Field(0, ge=0)
    """Regularisation images keep the balance with the sets of their own group; sd-scripts calls a
    group a data set."""
    validation_split: float = Field(0.0, ge=0, lt=1)
    """Share of the images that is held out of training, for the held-out loss; regularisation
    images never are."""
    validation_seed: int = 0
    """Seed of the choice of the images that are held out."""


def open_source(words: SourceWords, cache: Storage) -> Storage:
    """The storage whose keys name the images of a set.

    Args:
        cache: where the tables of tars are kept.

    Raises:
        DataError: neither a folder nor a manifest is given.
    """
    if words.folder is not None:
        storage = open_storage(words.folder)
    elif words.manifest is not None:
        from raylora.data.sources.manifest import manifest_place

        storage, _ = manifest_place(words.manifest)
    else:
        raise DataError("no folder of images is given. Set folder, or manifest.")
    if not words.tars:
        return storage
    # Imported here: a job is read without Arrow.
    from raylora.data.sources.tars import TarFolder

    return TarFolder(storage, cache)
