"""Work items done anywhere, twice, at once, and after a kill."""

from __future__ import annotations

import pickle
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datafolders import (
    FACTS,
    NumpyEncoder,
    as_bytes,
    build,
    fill_folder,
    image_bytes,
    plan_of,
    small_options,
)
from numpy.typing import NDArray

from raylora.base.errors import DataError
from raylora.base.storage import open_storage
from raylora.data.cache.recipe import text_key
from raylora.data.dataset import (
    Dataset,
    load_dataset,
    run_item,
)


def test_items_may_be_done_anywhere_and_twice(tmp_path: Path, cache_url: str):
    folder = fill_folder(tmp_path / "images", 8)
    options = small_options(folder)
    expected = as_bytes(build(options, str(tmp_path / "other"), NumpyEncoder()))
    planned = plan_of(options, cache_url, workers=2, **FACTS)
    for item in [*planned.items, planned.items[0]]:
        facts, sent = pickle.loads(pickle.dumps((planned.facts, item)))
        assert run_item(facts, sent, NumpyEncoder()).bad == ()
    dataset = pickle.loads(pickle.dumps(load_dataset(planned)))
    assert as_bytes(dataset) == expected
    dataset.close()
    assert as_bytes(dataset) == expected


@pytest.mark.parametrize("batch", [2, 16])
def test_batches_of_images_give_the_same_entries(tmp_path: Path, cache_url: str, batch: int):
    folder = fill_folder(tmp_path / "images", 7)
    one = build(small_options(folder), cache_url, NumpyEncoder())
    other = build(small_options(folder), f"{cache_url}-2", NumpyEncoder(), image_batch=batch)
    assert as_bytes(one) == as_bytes(other)


def test_text_batches_are_always_full(tmp_path: Path, cache_url: str):
    sizes = []

    class Watching(NumpyEncoder):
        def encode_texts(self, captions: Any) -> dict[str, NDArray[Any]]:
            sizes.append(len(captions))
            return super().encode_texts(captions)

    folder = fill_folder(tmp_path / "images", 20)
    build(small_options(folder), cache_url, Watching())
    assert sizes == [16] * len(sizes)


def test_latents_that_are_not_numbers_quarantine_the_image(tmp_path: Path, cache_url: str):
    class Overflowing(NumpyEncoder):
        def encode_images(self, pixels: Any) -> dict[str, NDArray[Any]]:
            tensors = super().encode_images(pixels)
            if self.images == 2:
                tensors["latents"][:] = np.nan
            return tensors

    folder = fill_folder(tmp_path / "images", 5)
    options = small_options(folder, max_bad=0.3)
    dataset = build(options, cache_url, Overflowing())
    assert [one.reason for one in dataset.bad] == [
        "the image encoder gave NaN or infinity; try it in a wider dtype"
    ]
    assert len(build(options, cache_url).rows) == 4
    # Another encoder may do better: the verdict was not about the file.
    facts = {**FACTS, "latents_facts": {"dtype": "float32"}}
    assert len(plan_of(options, cache_url, **facts).rows) == 5


def test_an_image_lacks_none_of_its_variants_or_is_bad(tmp_path: Path, cache_url: str):
    class OverflowingOnce(NumpyEncoder):
        def encode_images(self, pixels: Any) -> dict[str, NDArray[Any]]:
            tensors = super().encode_images(pixels)
            if self.images == 6:
                tensors["latents"][:] = np.nan
            return tensors

    folder = fill_with_tags(tmp_path / "images", 5)
    options = small_options(folder, **DRAWN, max_bad=0.3)
    dataset = build(options, cache_url, OverflowingOnce())
    (bad,) = dataset.bad
    assert len(dataset.rows) == 4
    assert bad.key not in {row.key for row in dataset.rows}
    assert len(every_entry(dataset)) > 16
    assert build(options, cache_url).bad == dataset.bad


def test_a_file_that_changes_while_it_is_cached_is_not_taken_for_the_old_one(
    tmp_path: Path, cache_url: str
):
    folder = fill_folder(tmp_path / "images", 4)
    options = small_options(folder)
    planned = plan_of(options, cache_url, **FACTS)
    folder.write("image-0002.png", image_bytes((96, 96), 50))
    bad = [
        one for item in planned.items for one in run_item(planned.facts, item, NumpyEncoder()).bad
    ]
    assert [(one.key, one.reason[:7]) for one in bad] == [("image-0002.png", "changed")]
    with pytest.raises(DataError, match=r"image-0002.png.*Run the same command again"):
        load_dataset(planned)
    encoder = NumpyEncoder()
    assert len(build(options, cache_url, encoder).rows) == 4
    assert encoder.images == 1


DRAWN: dict[str, Any] = {
    "random_crop": True,
    "flip_aug": True,
    "shuffle_caption": True,
    "enable_bucket": False,
    "variants": 4,
}


def fill_with_tags(place: Path, count: int) -> Path:
    """Images with room to cut in, and captions of several tags."""
    fill_folder(place, count, shapes=[(160, 96), (96, 160)])
    for number in range(count):
        (place / f"image-{number:04d}.txt").write_text(f"{number}, b, c, d, e, f")
    return place


def every_entry(dataset: Dataset) -> dict[bytes, dict[str, bytes]]:
    """All that is cached of a data set, by its name."""
    pictures = [key for row in dataset.rows for key in row.latents_keys]
    texts = [text_key(""), *(key for row in dataset.rows for key in row.text_keys)]
    found = zip(
        [*pictures, *texts],
        [*dataset.fetch_pictures(pictures), *dataset.fetch_texts(texts)],
        strict=True,
    )
    return {key: {name: a.tobytes() for name, a in one.items()} for key, one in found}


@pytest.mark.parametrize("workers", [3, 8])
def test_however_the_work_is_shared_every_entry_has_the_same_bytes(
    tmp_path: Path, cache_url: str, workers: int
):
    options = small_options(fill_with_tags(tmp_path / "images", 6), **DRAWN)
    expected = every_entry(build(options, f"{cache_url}-1", NumpyEncoder()))
    assert len(expected) > 6 * 4 * 2 - 6
    planned = plan_of(options, cache_url, workers=workers, row_group_bytes=4000, **FACTS)
    items = [*planned.items, *planned.items[::3]]
    random.Random(workers).shuffle(items)
    with ThreadPoolExecutor(3) as pool:
        reports = list(
            pool.map(
                lambda item: run_item(planned.facts, item, NumpyEncoder(), image_batch=workers),
                items,
            )
        )
    assert not any(report.bad for report in reports)
    assert len(planned.items) > 2 * workers
    assert every_entry(load_dataset(planned)) == expected


def check_whole(cache_url: str) -> None:
    """Every index segment refers to a shard that is there, of that size."""
    import pyarrow.parquet as pq

    cache = open_storage(cache_url)
    for entry in cache.entries():
        if "/index/" in entry.key:
            metadata = pq.read_schema(cache_url.removeprefix("file://") + "/" + entry.key).metadata
            shard = cache.entry(metadata[b"shard"].decode())
            assert shard is not None
            assert shard.size_bytes == int(metadata[b"size_bytes"])


CHILD = """
import sys, time
sys.path.insert(0, sys.argv[3])
from datafolders import NumpyEncoder, plan_of, small_options
from raylora.data.dataset import run_item

class Slow(NumpyEncoder):
    def encode_images(self, pixels):
        time.sleep(0.005)
        return super().encode_images(pixels)

plan = plan_of(small_options(sys.argv[1]), sys.argv[2], latents_facts=NumpyEncoder.latents_facts,
               text_facts=NumpyEncoder.text_facts, workers=8)
print("planned", flush=True)
for item in plan.items:
    run_item(plan.facts, item, Slow())
"""


def start_child(folder: str, cache_url: str, program: str = CHILD) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, folder, cache_url, str(Path(__file__).parent)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


# Puts each entry as soon as it is made, and makes one for each line that it is told.
CHILD_WITH_VARIANTS = """
import sys
from dataclasses import replace
sys.path.insert(0, sys.argv[3])
from datafolders import FACTS, NumpyEncoder, plan_of, small_options
from raylora.data.dataset import run_item
from test_encode import DRAWN

class Telling(NumpyEncoder):
    def encode_images(self, pixels):
        sys.stdin.readline()
        print("encoded", flush=True)
        return super().encode_images(pixels)

plan = plan_of(small_options(sys.argv[1], **DRAWN), sys.argv[2], **FACTS)
for item in plan.items:
    run_item(replace(plan.facts, flush_seconds=0.0), item, Telling())
"""


@pytest.mark.slow
@pytest.mark.parametrize("encoded", [3, 6, 13])
def test_a_kill_between_the_variants_of_an_image_costs_no_more_than_these(
    tmp_path: Path, cache_url: str, encoded: int
):
    folder = str(fill_with_tags(tmp_path / "images", 5))
    options = small_options(folder, **DRAWN)
    expected = every_entry(build(options, f"{cache_url}-unbroken", NumpyEncoder()))
    child = start_child(folder, cache_url, CHILD_WITH_VARIANTS)
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("go\n" * encoded)
    child.stdin.flush()
    for _ in range(encoded):
        assert child.stdout.readline() == "encoded\n"
    child.kill()
    child.communicate()
    check_whole(cache_url)
    total = plan_of(options, f"{cache_url}-other", **FACTS).missing("latents")
    missing = plan_of(options, cache_url, **FACTS).missing("latents")
    assert missing in (total - encoded, total - encoded + 1)  # the last may not be put yet
    other = start_child(folder, cache_url, CHILD_WITH_VARIANTS)
    told, _ = other.communicate()
    assert other.returncode == 0
    assert told.count("encoded") == missing
    assert every_entry(build(options, cache_url)) == expected


@pytest.mark.slow
def test_after_a_kill_only_what_is_missing_is_encoded(tmp_path: Path, cache_url: str):
    folder = fill_folder(tmp_path / "images", 60)
    options = small_options(folder)
    expected = as_bytes(build(options, f"{cache_url}-unbroken", NumpyEncoder()))
    missing = [60]
    for attempt in range(3):
        child = start_child(folder.url, cache_url)
        assert child.stdout is not None
        assert child.stdout.readline() == "planned\n"
        time.sleep(random.Random(attempt).uniform(0.02, 0.3))
        child.send_signal(signal.SIGKILL)
        child.wait()
        check_whole(cache_url)
        missing.append(plan_of(options, cache_url, **FACTS).missing("latents"))
    assert missing == sorted(missing, reverse=True)
    encoder = NumpyEncoder()
    dataset = build(options, cache_url, encoder)
    assert encoder.images == missing[-1]
    assert as_bytes(dataset) == expected


@pytest.mark.slow
def test_two_processes_that_cache_at_once_do_no_harm(tmp_path: Path, cache_url: str):
    folder = fill_folder(tmp_path / "images", 40)
    options = small_options(folder)
    expected = as_bytes(build(options, f"{cache_url}-alone", NumpyEncoder()))
    planned = plan_of(options, cache_url, workers=8, **FACTS)
    child = start_child(folder.url, cache_url)
    assert child.stdout is not None
    assert child.stdout.readline() == "planned\n"
    for item in planned.items:
        run_item(planned.facts, item, NumpyEncoder())
    child.stdout.read()
    assert child.wait() == 0
    check_whole(cache_url)
    assert as_bytes(build(options, cache_url)) == expected


def test_two_writers_of_unlike_numbers_agree_on_the_first(tmp_path: Path, s3_url: str):
    class Shifted(NumpyEncoder):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.shift = shift

        def encode_images(self, pixels: Any) -> dict[str, NDArray[Any]]:
            return {"latents": super().encode_images(pixels)["latents"] + self.shift}

    folder = fill_folder(f"{s3_url}/images", 8)
    plans = [plan_of(small_options(folder), f"{s3_url}/cache", **FACTS) for _ in range(2)]

    def work(number: int) -> None:
        for item in plans[number].items:
            run_item(plans[number].facts, item, Shifted(float(number)))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    readers = [load_dataset(plans[n], local_dir=str(tmp_path / f"local-{n}")) for n in range(2)]
    assert as_bytes(readers[0]) == as_bytes(readers[1])
