"""What a step trains on, taken from the cache or encoded as it is shown."""

from __future__ import annotations

import io
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datafolders import (
    FACTS,
    Counted,
    NumpyEncoder,
    build,
    fill_folder,
    image_bytes,
    plan_of,
    small_options,
    small_sets,
)
from numpy.typing import NDArray
from PIL import Image

from raylora.base.errors import DataError
from raylora.base.storage import Storage, open_storage
from raylora.data.cache.recipe import text_key
from raylora.data.dataset import Dataset
from raylora.data.steps import StepPlan
from raylora.data.supply import Extras, Supply, measured_tensors
from raylora.data.variants import Chooser

DRAWN: dict[str, Any] = {"random_crop": True, "flip_aug": True, "shuffle_caption": True}


def supply_of(
    dataset: Dataset, encoder: NumpyEncoder | None = None, *, seed: int = 0
) -> tuple[Supply, StepPlan]:
    plan = StepPlan(dataset.rows, 4, 0)
    chooser = Chooser(dataset.facts.sets, seed=seed, total_steps=100)
    return Supply(dataset, plan, chooser, encoder), plan


def steps_of(
    dataset: Dataset, encoder: NumpyEncoder | None = None, *, epochs: int = 1, seed: int = 0
) -> list[list[dict[str, tuple[Any, bytes]]]]:
    """The tensors of some epochs, comparable to the bit."""
    supply, plan = supply_of(dataset, encoder, seed=seed)
    return [
        [
            {name: ((array.dtype, array.shape), array.tobytes()) for name, array in one.items()}
            for one in supply.fetch(plan.samples(step), step)
        ]
        for step in range(epochs * plan.steps_per_epoch)
    ]


def tagged(folder: Storage, count: int) -> Storage:
    for number in range(count):
        letters = ", ".join("abcdefgh"[: number + 2])
        folder.write(f"image-{number:04d}.txt", letters.encode())
    return folder


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"fit": "pad", "background": "#102030", "repeats": 2},
        {"caption_prefix": "p", "caption_suffix": "s", "secondary_separator": " "},
        {"caption_dropout_rate": 0.4, "caption_dropout_every_n_epochs": 3},
        {"alpha_mask": True, "resize_interpolation": "bicubic"},
        {"enable_bucket": False, "resolution": 112},
    ],
    ids=str,
)
def test_where_nothing_is_drawn_live_tensors_are_those_of_the_cache_to_the_bit(
    tmp_path: Path, cache_url: str, words: dict[str, Any]
):
    folder = fill_folder(tmp_path / "images", 5)
    expected = steps_of(build(small_options(folder, **words), cache_url, NumpyEncoder()), epochs=3)
    live = small_options(folder, cache="none", **words)
    encoder = NumpyEncoder()
    assert steps_of(build(live, f"{cache_url}-live", encoder), encoder, epochs=3) == expected
    texts = small_options(folder, cache_text=False, **words)
    assert steps_of(build(texts, cache_url, encoder), encoder, epochs=3) == expected


def test_what_is_drawn_as_it_is_shown_changes_with_step_and_seed_alone(
    tmp_path: Path, cache_url: str
):
    folder = tagged(fill_folder(tmp_path / "images", 5, shapes=[(140, 96)]), 5)
    data = small_options(folder, cache="none", **DRAWN)
    dataset, encoder = build(data, cache_url, NumpyEncoder()), NumpyEncoder()
    once = steps_of(dataset, encoder, epochs=4)
    assert steps_of(dataset, encoder, epochs=4) == once
    shown = {one["latents"] for step in once for one in step}
    assert len(shown) > 12  # of 20 showings; crops of one image seldom meet
    assert steps_of(dataset, encoder, epochs=4, seed=1) != once
    # A part of a step, as a worker fetches it, is the same.
    supply, plan = supply_of(dataset, encoder)
    whole = supply.fetch(plan.samples(1), 1)
    for at, sample in enumerate(plan.samples(1)):
        (alone,) = supply.fetch([sample], 1)
        assert {name: array.tobytes() for name, array in alone.items()} == {
            name: array.tobytes() for name, array in whole[at].items()
        }


def test_with_cache_text_off_pictures_are_cached_and_captions_are_not(
    tmp_path: Path, cache_url: str
):
    folder = tagged(fill_folder(tmp_path / "images", 4), 4)
    data = small_options(folder, cache_text=False, shuffle_caption=True, flip_aug=True, variants=2)
    encoder = NumpyEncoder()
    dataset = build(data, cache_url, encoder)
    assert encoder.images == 8
    assert set(encoder.captions) == {""}
    seen = steps_of(dataset, encoder, epochs=6)
    assert encoder.images == 8
    assert len({one["text"] for step in seen for one in step}) > 12  # orders come anew each time
    with pytest.raises(AssertionError):
        supply_of(dataset)


def test_with_no_cache_only_what_is_measured_is_encoded_ahead(tmp_path: Path, cache_url: str):
    folder = tagged(fill_folder(tmp_path / "images", 8), 8)
    data = small_options(folder, cache="none", validation_split=0.25, **DRAWN)
    encoder = NumpyEncoder()
    dataset = build(data, cache_url, encoder)
    assert encoder.images == 2
    assert len(set(encoder.captions)) == 3
    assert dataset.held_out is not None
    tensors = measured_tensors(dataset.held_out, dataset.held_out.rows)
    assert [one["mask"].min() for one in tensors] == [1.0] * 2
    assert [float(one["weight"]) for one in tensors] == [1.0] * 2
    build(data, cache_url)  # and not again


def test_variants_in_the_cache_are_exactly_those_that_training_asks_for(
    tmp_path: Path, cache_url: str, monkeypatch: pytest.MonkeyPatch
):
    folder = tagged(fill_folder(tmp_path / "images", 5, shapes=[(140, 96), (96, 140)]), 5)
    sets = ({"random_crop": True, "flip_aug": True}, {"shuffle_caption": True, "resolution": 112})
    data = small_sets(*sets, folder=folder.url, variants=3, caption_dropout_rate=0.2)
    plan = plan_of(data, cache_url, **FACTS)
    pictures = [key for item in plan.items for one in item.pictures for key, _ in one.looks]
    texts = [key for item in plan.items for key, _ in item.texts]
    assert len(set(pictures)) == len(pictures)
    assert len(set(texts)) == len(texts)
    asked: dict[str, set[bytes]] = {"pictures": set(), "texts": set()}
    dataset = build(data, cache_url, NumpyEncoder())
    for kind, found in asked.items():
        fetch = getattr(Dataset, f"fetch_{kind}")

        def watched(self: Dataset, keys: Any, fetch: Any = fetch, found: Any = found) -> Any:
            found.update(keys)
            return fetch(self, keys)

        monkeypatch.setattr(Dataset, f"fetch_{kind}", watched)
    steps_of(dataset, epochs=3)
    assert asked["pictures"] == set(pictures)
    assert asked["texts"] <= set(texts)
    # An epoch's dropped captions may be those of a whole block; no variant is there for nothing.
    plain = small_sets(*sets, folder=folder.url, variants=3)
    asked["texts"].clear()
    steps_of(build(plain, cache_url), epochs=3)
    assert asked["texts"] | {text_key("")} == set(texts)


def test_each_variant_is_shown_once_in_as_many_epochs(tmp_path: Path, cache_url: str):
    folder = tagged(fill_folder(tmp_path / "images", 3, shapes=[(160, 96)]), 3)
    data = small_options(folder, variants=4, repeats=2, enable_bucket=False, **DRAWN)
    dataset = build(data, cache_url, NumpyEncoder())
    steps = steps_of(dataset, epochs=4)
    # Two epochs of two showings are a block of four.
    blocks = (steps[: len(steps) // 2], steps[len(steps) // 2 :])
    first, second = (Counter(one["latents"] for step in block for one in step) for block in blocks)
    assert set(first.values()) == {1}
    assert len(first) == 12
    assert first == second


# -- what a family wants beside


def ramp(width: int, height: int) -> bytes:
    """A picture whose red tells the column and whose green tells the row."""
    red, green = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([red, green, np.zeros_like(red)], axis=-1).astype(np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def edges(latents: NDArray[Any], width: int) -> tuple[int, int, bool]:
    """(top, left, mirrored) of what is shown of a `ramp`, by its colours; in the mirror where it is
    mirrored."""
    red, green = ((latents[i] + 1) / 2 * 255 for i in (0, 1))  # means of 8 columns and rows
    mirrored = bool(red[0, 0] > red[0, -1])
    first = red[0, 0]
    left = width - 1 - (first + 3.5) if mirrored else first - 3.5
    return round(float(green[0, 0] - 3.5)), round(float(left)), mirrored


@pytest.mark.parametrize("live", [False, True], ids=["cached", "live"])
@pytest.mark.parametrize("drawn", [{}, {"random_crop": True, "flip_aug": True}], ids=str)
def test_the_geometry_is_that_of_the_picture_that_is_shown(
    tmp_path: Path, cache_url: str, live: bool, drawn: dict[str, Any]
):
    folder = open_storage(str(tmp_path / "images"))
    sizes = {"wide.png": (140, 96), "tall.png": (96, 150)}
    for key, size in sizes.items():
        folder.write(key, ramp(*size))
        folder.write(f"{key[:-4]}.txt", b"a ramp")
    words = {"enable_bucket": False, "resolution": 96, **({"cache": "none"} if live else {})}
    data, encoder = small_options(folder, **words, **drawn), NumpyEncoder()
    dataset = build(data, cache_url, encoder)
    plan = StepPlan(dataset.rows, 4, 0)
    chooser = Chooser(dataset.facts.sets, seed=0, total_steps=100)
    supply = Supply(dataset, plan, chooser, encoder, extras=Extras(geometry=True))
    seen = set()
    for step in range(16):
        samples = plan.samples(step)
        for sample, one in zip(samples, supply.fetch(samples, step), strict=True):
            width, height = sizes[dataset.rows[sample.row].key]
            top, left, mirrored = edges(one["latents"], width)
            assert one["geometry"].dtype == np.float32
            assert one["geometry"].tolist() == [height, width, top, left, 96, 96]
            seen.add((width, top, left, mirrored))
            assert "dropped" not in one
    assert len(seen) > 6 if drawn else seen == {(140, 0, 22, False), (96, 27, 0, False)}
    if live:
        return
    rows = dataset.rows
    for row, one in zip(
        rows, measured_tensors(dataset, rows, extras=Extras(geometry=True)), strict=True
    ):
        top, left, _ = edges(one["latents"], row.original_size[0])
        assert one["geometry"].tolist() == [*row.original_size[::-1], top, left, 96, 96]


def test_encoders_are_dropped_each_at_its_rate_by_step_and_sample(tmp_path: Path, cache_url: str):
    folder = fill_folder(tmp_path / "images", 8)
    dataset = build(small_options(folder), cache_url, NumpyEncoder())
    plan = StepPlan(dataset.rows, 8, 0)
    chooser = Chooser(dataset.facts.sets, seed=3, total_steps=100)

    def dropped(*rates: float) -> NDArray[Any]:
        supply = Supply(dataset, plan, chooser, None, extras=Extras(encoder_dropout=rates))
        steps = [supply.fetch(plan.samples(step), step) for step in range(60)]
        return np.array([one["dropped"] for step in steps for one in step])

    found = dropped(0.2, 0.0, 0.6)
    assert found.dtype == np.float32
    assert found.shape == (480, 3)
    assert set(np.unique(found)) == {0.0, 1.0}
    # 480 draws: means within 5 deviations
    assert abs(found.mean(0) - [0.2, 0, 0.6]).max() < 5 * np.sqrt(0.25 / 480)
    assert abs(np.corrcoef(found[:, 0], found[:, 2])[0, 1]) < 5 / np.sqrt(480)
    assert np.array_equal(found, dropped(0.2, 0.0, 0.6))
    more = dropped(0.3, 0.0, 0.6)
    assert (more >= found).all(), "a higher rate drops these and more"
    supply = Supply(dataset, plan, chooser, None, extras=Extras(encoder_dropout=(0.0, 0.0)))
    assert "dropped" not in supply.fetch(plan.samples(0), 0)[0]
    held = measured_tensors(dataset, dataset.rows, extras=Extras(encoder_dropout=(0.9, 0.9)))
    assert {tuple(one["dropped"].tolist()) for one in held} == {(0.0, 0.0)}


# -- what goes wrong


@pytest.mark.parametrize("vanished", ["image-0002.png", "masks"])
def test_a_file_that_vanishes_while_it_is_trained_on_is_named(
    tmp_path: Path, cache_url: str, vanished: str
):
    folder = fill_folder(tmp_path / "images", 4, shapes=[(96, 96)])
    masks = fill_folder(tmp_path / "masks", 4, shapes=[(96, 96)])
    data = small_options(folder, cache="none", mask_folder=masks.url)
    encoder = NumpyEncoder()
    dataset = build(data, cache_url, encoder)
    supply, plan = supply_of(dataset, encoder)
    supply.fetch(plan.samples(0), 0)
    (masks if vanished == "masks" else folder).delete("image-0002.png")
    with pytest.raises(
        DataError,
        match=r"^image-0002\.png: it was good before training and is not now .*image-0002\.png.*"
        "run the same command again",
    ):
        supply.fetch(plan.samples(1), 1)


@pytest.mark.parametrize(
    "data", [b"", image_bytes((96, 96), 2)[:-900], image_bytes((48, 128), 2)], ids=len
)
def test_a_file_that_is_spoilt_or_reshaped_while_it_is_trained_on_is_named(
    tmp_path: Path, cache_url: str, data: bytes
):
    folder = fill_folder(tmp_path / "images", 4, shapes=[(96, 96)])
    encoder = NumpyEncoder()
    dataset = build(small_options(folder, cache="none"), cache_url, encoder)
    folder.write("image-0002.png", data)
    supply, plan = supply_of(dataset, encoder)
    with pytest.raises(DataError, match=r"^image-0002\.png: it was good before training"):
        supply.fetch(plan.samples(0), 0)


def test_latents_that_are_not_numbers_are_told_with_the_image(tmp_path: Path, cache_url: str):
    class Broken(NumpyEncoder):
        def encode_images(self, pixels: Any) -> dict[str, NDArray[Any]]:
            tensors = super().encode_images(pixels)
            tensors["latents"][0, 0, 0, 0] = np.inf
            return tensors

    folder = fill_folder(tmp_path / "images", 1)
    dataset = build(small_options(folder, cache="none"), cache_url, NumpyEncoder())
    supply, plan = supply_of(dataset, Broken())
    with pytest.raises(DataError, match=r"^image-0000.png: the image encoder gave NaN"):
        supply.fetch(plan.samples(0), 0)


def test_without_a_cache_broken_images_are_found_before_training(
    tmp_path: Path, cache_url: str, monkeypatch: pytest.MonkeyPatch
):
    folder = fill_folder(tmp_path / "images", 10)
    folder.write("image-0003.png", image_bytes((96, 96), 3)[:-900])  # its header is whole
    data = small_options(folder, cache="none", max_bad=0.2)
    plan = plan_of(data, cache_url, **FACTS)
    assert [(one.key, one.reason) for one in plan.bad] == [
        ("image-0003.png", "image file is truncated")
    ]
    encoder = NumpyEncoder()
    dataset = build(data, cache_url, encoder)
    assert len(dataset.rows) == 9
    assert len([one for step in steps_of(dataset, encoder) for one in step]) == 9
    counted = Counted(monkeypatch)
    assert plan_of(data, cache_url, **FACTS).bad == plan.bad
    assert counted.reads_of(folder.url) == {}
    # A run with a cache may have looked at the header alone; that is not taken for a whole look.
    other = f"{cache_url}-other"
    cached = plan_of(small_options(folder, max_bad=0.2), other, **FACTS)
    assert cached.bad == ()
    assert plan_of(data, other, **FACTS).bad == plan.bad
    with pytest.raises(DataError, match="1 of 10 images cannot be used"):
        plan_of(data.model_copy(update={"max_bad": 0.05}), cache_url, **FACTS)


def test_live_texts_are_encoded_in_full_batches_as_those_of_the_cache(
    tmp_path: Path, cache_url: str
):
    """On a GPU a caption's numbers depend on how many are encoded with it."""
    sizes: list[int] = []

    class Watching(NumpyEncoder):
        def encode_texts(self, captions: Any) -> dict[str, NDArray[Any]]:
            sizes.append(len(captions))
            return super().encode_texts(captions)

    folder = fill_folder(tmp_path / "images", 5)
    dataset = build(small_options(folder, cache_text=False), cache_url, Watching())
    supply, plan = supply_of(dataset, Watching())
    supply.fetch(plan.samples(0), 0)
    supply.fetch(5 * plan.samples(0), 0)
    assert sizes == [16] * (1 + 1 + 2)


def test_two_threads_may_fetch_at_once(tmp_path: Path, cache_url: str):
    class Alone(NumpyEncoder):
        busy = threading.Lock()

        def encode_images(self, pixels: Any) -> dict[str, NDArray[Any]]:
            assert self.busy.acquire(blocking=False), "two threads are in the encoder"
            try:
                return super().encode_images(pixels)
            finally:
                self.busy.release()

    folder = tagged(fill_folder(tmp_path / "images", 8), 8)
    dataset = build(small_options(folder, cache="none", **DRAWN), cache_url, NumpyEncoder())
    expected = steps_of(dataset, Alone(), epochs=4)
    supply, plan = supply_of(dataset, Alone())
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: supply.fetch(plan.samples(n), n), range(len(expected))))
    for step, others in zip(expected, found, strict=True):
        for one, other in zip(step, others, strict=True):
            assert {name: value[1] for name, value in one.items()} == {
                name: array.tobytes() for name, array in other.items()
            }


def test_held_out_captions_of_a_trained_encoder_are_whole_and_pictures_have_masks(
    tmp_path: Path, cache_url: str
):
    folder = tagged(fill_folder(tmp_path / "images", 8), 8)
    data = small_options(
        folder, validation_split=0.25, cache_text=False, shuffle_caption=True,
        caption_dropout_rate=0.9,
    )  # fmt: skip
    dataset = build(data, cache_url, NumpyEncoder())
    held_out = dataset.held_out
    assert held_out is not None
    asked: list[str] = []

    def tokens(captions: Any) -> dict[str, NDArray[Any]]:
        asked.extend(captions)
        return {"ids": np.arange(3 * len(captions)).reshape(-1, 3)}

    found = measured_tensors(held_out, held_out.rows, tokens)
    assert asked == [row.caption for row in held_out.rows]
    assert [one["ids"].tolist() for one in found] == [[0, 1, 2], [3, 4, 5]]
    for one, cached in zip(found, measured_tensors(held_out, held_out.rows), strict=True):
        assert one.keys() == {"ids", "latents", "mask", "weight"}
        assert np.array_equal(one["latents"], cached["latents"])
        assert one["mask"].shape == (1, *one["latents"].shape[-2:])
        assert one["mask"].min() == one["weight"] == 1.0


def test_what_is_preserved_is_told_of_each_showing_where_any_set_asks_for_it(
    tmp_path: Path, cache_url: str
):
    sets = []
    for name, count in (("plain", 4), ("kept", 2), ("reg", 2)):
        folder = fill_folder(tmp_path / name, count, shapes=[(96, 96)])
        sets.append({"folder": folder.url, "is_reg": name != "plain"})
    for asked in (True, False):
        sets[1]["output_preservation"] = asked
        dataset = build(small_sets(*sets), cache_url, NumpyEncoder())
        supply, plan = supply_of(dataset)
        samples = [one for step in range(plan.steps_per_epoch) for one in plan.samples(step)]
        shown = supply.fetch(samples, 0)
        if not asked:
            assert not any("preserve" in one for one in shown)
            continue
        found = {
            (dataset.rows[sample.row].set, float(one["preserve"]))
            for sample, one in zip(samples, shown, strict=True)
        }
        assert found == {(0, 0.0), (1, 1.0), (2, 0.0)}
