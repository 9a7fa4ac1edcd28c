"""Data folders and a small encoder for the tests of raylora/data."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raylora.base.storage import Entry, Storage, open_storage
from raylora.data import dataset as dataset_module
from raylora.data import encode, examine, plan
from raylora.data.dataset import CachePlan, Dataset, prepare, prepare_and_encode
from raylora.data.options import DataOptions, Native, SetOptions, resolve
from raylora.data.pixels import pictures
from raylora.data.sources import source

if TYPE_CHECKING:
    import pytest

# Four shapes, so that several buckets are in use.
SHAPES = [(96, 96), (128, 80), (80, 128), (100, 60)]


class NumpyEncoder:
    """Stands where a family's encoder would: a pure function of pixels and captions, in numpy."""

    latents_facts: ClassVar[dict[str, Any]] = {"family": "numpy", "vae": "mean of 8x8"}
    text_facts: ClassVar[dict[str, Any]] = {"family": "numpy", "text": "bytes of a hash"}

    def __init__(self) -> None:
        self.images = 0
        self.captions: list[str] = []

    def encode_images(self, pixels: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        self.images += len(pixels)
        batch, channels, height, width = pixels.shape
        cells = pixels.reshape(batch, channels, height // 8, 8, width // 8, 8).mean((3, 5))
        return {"latents": np.concatenate([cells, cells[:, :1] ** 2], axis=1)}

    def encode_texts(self, captions: Sequence[str]) -> dict[str, NDArray[Any]]:
        self.captions += captions
        digests = [hashlib.sha256(caption.encode()).digest() for caption in captions]
        text = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 4, 8).astype(np.float16)
        return {"text": text, "pooled": text.mean(axis=1, dtype=np.float32)}

    def encode_batches(self, batches: Sequence[Sequence[str]]) -> Iterator[dict[str, NDArray[Any]]]:
        return (self.encode_texts(captions) for captions in batches)


class NoEncoder:
    """Raises when it is made: nothing may be encoded."""

    def __init__(self) -> None:
        raise AssertionError("an encoder was made although nothing is missing")


class CountingStorage(Storage):
    """Another storage, counting the reads: `reads` by key, `read_bytes` in all."""

    def __init__(self, inner: Storage) -> None:
        self.inner, self.url = inner, inner.url
        self.reads: Counter[str] = Counter()
        self.read_bytes = 0

    def read(self, key: str) -> bytes:
        return self._count(key, self.inner.read(key))

    def read_range(self, key: str, start: int, length: int) -> bytes:
        return self._count(key, self.inner.read_range(key, start, length))

    def _count(self, key: str, data: bytes) -> bytes:
        self.reads[key] += 1
        self.read_bytes += len(data)
        return data

    def write(self, key: str, data: bytes) -> None:
        self.inner.write(key, data)

    def create(self, key: str, data: bytes) -> bool:
        return self.inner.create(key, data)

    def entries(self, prefix: str = "") -> list[Entry]:
        return self.inner.entries(prefix)

    def entry(self, key: str) -> Entry | None:
        return self.inner.entry(key)

    def delete(self, key: str) -> None:
        self.inner.delete(key)

    def within(self, prefix: str) -> Storage:
        return CountingStorage(self.inner.within(prefix))


def image_bytes(size: tuple[int, int], seed: int, form: str = "PNG") -> bytes:
    """A picture of smooth noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(sink, form)
    return sink.getvalue()


def fill_folder(place: Storage | str | Path, count: int, *, shapes: list[Any] = SHAPES) -> Storage:
    """`count` images with captions, `image-0003.png` and so on."""
    storage = place if isinstance(place, Storage) else open_storage(str(place))
    for number in range(count):
        image = image_bytes(shapes[number % len(shapes)], number)
        _put(storage, f"image-{number:04d}.png", image)
        _put(storage, f"image-{number:04d}.txt", f"picture {number}\nsecond line".encode())
    return storage


def _put(storage: Storage, key: str, data: bytes) -> None:
    scheme, _, folder = storage.url.partition("://")
    if scheme != "file":
        storage.write(key, data)
        return
    path = Path(folder) / key  # a storage would wait for the disk
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


SMALL: dict[str, Any] = {
    "resolution": 96,
    "min_bucket_reso": 64,
    "max_bucket_reso": 160,
    "bucket_reso_steps": 16,
    "local_cache_gib": 0.1,
}


def small_options(folder: Storage | str | Path, **changes: Any) -> DataOptions:
    """Options for images of about 96 px."""
    return DataOptions(folder=_url(folder), **{**SMALL, **changes})


def small_sets(*sets: dict[str, Any], **changes: Any) -> DataOptions:
    """Options for several sets of such images; folders as of `small_options`."""
    places = ("folder", "mask_folder")
    written = [
        {word: _url(value) if word in places else value for word, value in one.items()}
        for one in sets
    ]
    return DataOptions.model_validate({**SMALL, **changes, "sets": written})


def _url(folder: Storage | str | Path) -> str:
    return folder.url if isinstance(folder, Storage) else str(folder)


FACTS: dict[str, Any] = {
    "latents_facts": NumpyEncoder.latents_facts,
    "text_facts": NumpyEncoder.text_facts,
}


def build(
    options: DataOptions, cache_url: str, encoder: NumpyEncoder | None = None, **more: Any
) -> Dataset:
    """The road without Ray; without an encoder, nothing may be encoded."""
    make = NoEncoder if encoder is None else lambda: encoder
    return prepare_and_encode(
        options, sets_of(options), cache_url, make_encoder=make, **FACTS, **more
    )


def plan_of(options: DataOptions, cache_url: str, **more: Any) -> CachePlan:
    """`prepare` for a data section, as for Stable Diffusion 1.5."""
    return prepare(options, sets_of(options), cache_url, **more)


def sets_of(options: DataOptions) -> tuple[SetOptions, ...]:
    """The sets of a data section, as for Stable Diffusion 1.5."""
    return resolve(options, Native(512, 64))


def as_bytes(dataset: Dataset) -> dict[str, dict[str, bytes]]:
    tensors = dataset.fetch(dataset.rows)
    return {
        row.key: {name: array.tobytes() for name, array in one.items()}
        for row, one in zip(dataset.rows, tensors, strict=True)
    }


class Counted:
    """Counts the reads of every storage that raylora.data opens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: list[CountingStorage] = []
        for module in (plan, encode, dataset_module, examine, source, pictures):
            monkeypatch.setattr(module, "open_storage", self._open)

    def _open(self, url: str) -> Storage:
        self.opened.append(CountingStorage(open_storage(url)))
        return self.opened[-1]

    def reads_of(self, url: str) -> Counter[str]:
        return sum((one.reads for one in self.opened if one.url == url), Counter())
