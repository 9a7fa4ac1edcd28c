"""From a folder to the tensors of training rows; what is done again, and what never is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from datafolders import (
    FACTS,
    Counted,
    CountingStorage,
    NumpyEncoder,
    as_bytes,
    build,
    fill_folder,
    image_bytes,
    plan_of,
    sets_of,
    small_options,
)
from faultproxy import FaultProxy

from raylora.base.errors import DataError
from raylora.base.storage import Storage, open_storage
from raylora.data.cache.recipe import text_key
from raylora.data.dataset import (
    ItemReport,
    WorkItem,
    load_dataset,
    run_item,
)
from raylora.data.pixels.decode import decode_image, encoder_input, fit_image


def test_rows_say_what_they_are_and_their_tensors_are_what_the_encoder_made(
    storage: Storage, tmp_path: Path, cache_url: str
):
    cache = f"{storage.url}/cache" if storage.url.startswith("s3") else cache_url
    folder = fill_folder(storage.within("images"), 6)
    options = small_options(folder)
    dataset = build(options, cache, NumpyEncoder())
    assert [row.key for row in dataset.rows] == [f"image-{n:04d}.png" for n in range(6)]
    assert dataset.bad == ()
    encoder = NumpyEncoder()
    for row, got in zip(dataset.rows, dataset.fetch(dataset.rows), strict=True):
        pixels = decode_image(folder.read(row.key), row.key)
        geometry = sets_of(options)[0].buckets.place(row.original_size)
        assert row.original_size == (pixels.shape[1], pixels.shape[0])
        assert (row.bucket, row.crop) == (geometry.bucket, geometry.crop)
        fitted = encoder_input(fit_image(pixels, geometry, (255, 255, 255)))
        expected = encoder.encode_images(fitted[None])["latents"][0]
        assert got["latents"].tobytes() == expected.tobytes()
        text = encoder.encode_texts([row.caption])
        assert got["text"].tobytes() == text["text"][0].tobytes()
        assert got["pooled"].tobytes() == text["pooled"][0].tobytes()
    (empty,) = dataset.fetch_texts([text_key("")])
    assert empty["text"].tobytes() == encoder.encode_texts([""])["text"].tobytes()


def test_a_second_run_reads_no_source_and_makes_no_encoder(
    tmp_path: Path, cache_url: str, monkeypatch: pytest.MonkeyPatch
):
    folder = fill_folder(tmp_path / "images", 9)
    folder.write("broken.png", b"nonsense")
    folder.write("broken.txt", b"nonsense")
    options = small_options(folder, max_bad=0.5)
    encoder = NumpyEncoder()
    first = build(options, cache_url, encoder)
    assert encoder.images == 9
    before = {entry.key: entry for entry in open_storage(cache_url).entries()}
    counted = Counted(monkeypatch)
    second = build(options, cache_url)
    assert counted.reads_of(folder.url) == {}
    assert (list(second.rows), second.bad) == (list(first.rows), first.bad)
    assert second.rows.fingerprint() == first.rows.fingerprint()
    assert as_bytes(second) == as_bytes(first)
    assert {entry.key: entry for entry in open_storage(cache_url).entries()} == before


def test_the_s3_server_sees_no_request_for_a_source_on_the_second_run(
    fault_proxy: FaultProxy, s3_url: str
):
    options = small_options(fill_folder(f"{s3_url}/images", 5))
    fault_proxy.fail_next(3, pattern="*images/*", method="GET", kind="503")
    expected = as_bytes(build(options, f"{s3_url}/cache", NumpyEncoder()))
    fault_proxy.reset_counts()
    again = build(options, f"{s3_url}/cache")
    assert fault_proxy.count("GET", "*images/*") == 0
    assert fault_proxy.count("HEAD", "*images/*") == 0
    assert fault_proxy.count("PUT") == 0
    assert fault_proxy.count() < 30  # listings, and what is remembered
    assert as_bytes(again) == expected


def test_rehash_reads_every_source_and_encodes_what_really_changed(
    tmp_path: Path, cache_url: str, monkeypatch: pytest.MonkeyPatch
):
    folder = fill_folder(tmp_path / "images", 4)
    options = small_options(folder)
    build(options, cache_url, NumpyEncoder())
    # Another picture of the same size in bytes and the same time, as a careless copy leaves it.
    path = tmp_path / "images" / "image-0001.png"
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    size = path.stat().st_size
    path.write_bytes(image_bytes((96, 96), 77).ljust(size, b"\0")[:size])
    os.utime(path, ns=times)
    build(options, cache_url)  # not noticed
    counted = Counted(monkeypatch)
    encoder = NumpyEncoder()
    build(options, cache_url, encoder, rehash=True)
    assert encoder.images == 1
    # Each file once to hash it, and the changed one once more to encode it.
    assert sum(counted.reads_of(folder.url).values()) == 8 + 1
    build(options, cache_url)


def test_a_changed_caption_costs_one_text_and_a_changed_image_one_latent(
    tmp_path: Path, cache_url: str, monkeypatch: pytest.MonkeyPatch
):
    folder = fill_folder(tmp_path / "images", 8)
    options = small_options(folder)
    build(options, cache_url, NumpyEncoder())
    folder.write("image-0003.txt", b"another caption")
    counted = Counted(monkeypatch)
    encoder = NumpyEncoder()
    dataset = build(options, cache_url, encoder)
    assert encoder.images == 0
    assert [text for text in encoder.captions if text] == ["another caption"]
    assert counted.reads_of(folder.url) == {"image-0003.txt": 1}
    assert dataset.rows[3].caption == "another caption"

    folder.write("image-0005.png", image_bytes((96, 96), 99))
    encoder = NumpyEncoder()
    dataset = build(options, cache_url, encoder)
    assert (encoder.images, encoder.captions) == (1, [])

    folder.write("copy.png", folder.read("image-0005.png"))
    folder.write("copy.txt", b"another caption")
    assert len(build(options, cache_url).rows) == 9  # the same bytes under another name: nothing


@pytest.mark.parametrize(
    ("change", "images", "texts"),
    [
        ({"resolution": 112}, 5, 0),
        ({"fit": "pad"}, 5, 0),
        ({"background": "#000000"}, 5, 0),
        ({"resize_interpolation": "bicubic"}, 5, 0),
        # Two of the five images are 96x96 and keep their road; so do others where they fit.
        ({"bucket_reso_steps": 8}, 3, 0),
        ({"bucket_no_upscale": True}, 3, 0),
        ({"enable_bucket": False}, 3, 0),
        ({"min_bucket_reso": 72, "max_bucket_reso": 200}, 0, 0),
        ({"random_crop": True, "variants": 3}, 9, 0),
        ({"flip_aug": True, "variants": 3}, 5, 0),
        ({"color_aug": True, "variants": 1, "variant_seed": 1}, 1, 0),
        ({"caption_prefix": "red"}, 0, 5),
        ({"shuffle_caption": True}, 0, 0),
        ({"caption_dropout_rate": 0.5}, 0, 0),
        ({"caption_extensions": (".none",), "default_caption": "all"}, 0, 1),
        ({"order_seed": 3, "repeats": 4, "max_bad": 0.5, "local_cache_gib": 1.0}, 0, 0),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_options_make_again_exactly_what_they_change(
    tmp_path: Path, cache_url: str, change: dict[str, Any], images: int, texts: int
):
    folder = fill_folder(tmp_path / "images", 5)
    build(small_options(folder), cache_url, NumpyEncoder())
    encoder = NumpyEncoder()
    build(small_options(folder, **change), cache_url, encoder)
    assert (encoder.images, len(set(encoder.captions) - {""})) == (images, texts)
    build(small_options(folder), cache_url)  # what was there before is there still


def test_loading_an_unfinished_plan_is_an_error(tmp_path: Path, cache_url: str):
    folder = fill_folder(tmp_path / "images", 3)
    planned = plan_of(small_options(folder), cache_url, **FACTS)
    with pytest.raises(DataError, match="latents are not in the cache"):
        load_dataset(planned)
    run_item(planned.facts, planned.items[0], NumpyEncoder())
    for item in planned.items:
        if item.kind == "latents":
            run_item(planned.facts, item, NumpyEncoder())
    with pytest.raises(
        DataError, match="the captions of 3 images and the empty one are not in the cache"
    ):
        load_dataset(planned)


def test_progress_is_told_for_each_item(tmp_path: Path, cache_url: str):
    folder = fill_folder(tmp_path / "images", 3)
    told: list[tuple[WorkItem, int]] = []

    def on_item(item: WorkItem, report: ItemReport) -> None:
        told.append((item, report.encoded))

    build(small_options(folder), cache_url, NumpyEncoder(), on_item=on_item)
    assert sum(encoded for _, encoded in told) == 3 + 4


def test_what_the_rows_need_comes_to_the_local_disk_in_the_background(
    tmp_path: Path, cache_url: str, monkeypatch: pytest.MonkeyPatch
):
    folder = fill_folder(tmp_path / "images", 9)
    dataset = build(small_options(folder, variants=3, random_crop=True), cache_url, NumpyEncoder())
    before = as_bytes(dataset)
    dataset.fill()
    dataset.fill()  # begun already
    dataset.__dict__["_filling"][0].join()
    counted = CountingStorage(open_storage(cache_url))
    for reader in (dataset._latents, dataset._texts):
        monkeypatch.setattr(reader, "_storage", counted)
    dataset.fetch_pictures([key for row in dataset.rows for key in row.latents_keys])
    dataset.fetch_texts([text_key("")])  # of captions that are left out
    assert as_bytes(dataset) == before
    assert counted.reads == {}
    dataset.close()
    dataset.fill()
    dataset.close()  # ends a filling that goes on
    assert "_filling" not in dataset.__dict__
