"""From a folder to the tensors of training rows; what is done again, and what never is."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datafolders import (
    CountingStorage,
    NoEncoder,
    NumpyEncoder,
    fill_folder,
    image_bytes,
    small_options,
)
from faultproxy import FaultProxy
from numpy.typing import NDArray

from raylora.base.errors import DataError
from raylora.base.storage import Storage, open_storage
from raylora.data import dataset as dataset_module
from raylora.data import encode, plan
from raylora.data.dataset import (
    Dataset,
    PlanFacts,
    WorkItem,
    load_dataset,
    prepare,
    prepare_and_encode,
    run_item,
)
from raylora.data.decode import decode_image, encoder_input, fit_image
from raylora.data.source import DataOptions

FACTS: dict[str, Any] = {
    "latents_facts": NumpyEncoder.latents_facts,
    "text_facts": NumpyEncoder.text_facts,
}


@pytest.fixture
def cache_url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/cache"


@pytest.fixture(autouse=True)
def _own_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLORA_LOCAL_CACHE", str(tmp_path / "local"))


def build(
    options: DataOptions, cache_url: str, encoder: NumpyEncoder | None = None, **more: Any
) -> Dataset:
    """The road without Ray; without an encoder, nothing may be encoded."""
    make = NoEncoder if encoder is None else lambda: encoder
    return prepare_and_encode(options, cache_url, make_encoder=make, **FACTS, **more)


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
        for module in (plan, encode, dataset_module):
            monkeypatch.setattr(module, "open_storage", self._open)

    def _open(self, url: str) -> Storage:
        self.opened.append(CountingStorage(open_storage(url)))
        return self.opened[-1]

    def reads_of(self, url: str) -> Counter[str]:
        return sum((one.reads for one in self.opened if one.url == url), Counter())


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
        geometry = options.buckets.place(row.original_size)
        assert row.original_size == (pixels.shape[1], pixels.shape[0])
        assert (row.bucket, row.crop) == (geometry.bucket, geometry.crop)
        fitted = encoder_input(fit_image(pixels, geometry, options.colour))
        expected = encoder.encode_images(fitted[None])["latents"][0]
        assert got["latents"].tobytes() == expected.tobytes()
        text = encoder.encode_texts([row.caption])
        assert got["text"].tobytes() == text["text"][0].tobytes()
        assert got["pooled"].tobytes() == text["pooled"][0].tobytes()
    (empty,) = dataset.fetch_texts([""])
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
    assert (second.rows, second.bad) == (first.rows, first.bad)
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
        ({"bucket_reso_steps": 8}, 5, 0),
        ({"bucket_no_upscale": True}, 5, 0),
        ({"enable_bucket": False}, 5, 0),
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


def test_other_encoders_have_other_folders(tmp_path: Path, cache_url: str):
    folder = fill_folder(tmp_path / "images", 3)
    options = small_options(folder)
    one = prepare(options, cache_url, **FACTS)
    two = prepare(options, cache_url, **{**FACTS, "text_facts": {"clip_skip": 2}})
    assert one.facts.latents_folder == two.facts.latents_folder
    assert one.facts.text_folder != two.facts.text_folder
    cache = open_storage(cache_url)
    recipe = json.loads(cache.read(f"{two.facts.text_folder}/recipe.json"))
    assert recipe == {"kind": "text", "format": 1, "encoder": {"clip_skip": 2}}
    recipe = json.loads(cache.read(f"{one.facts.latents_folder}/recipe.json"))
    assert recipe["image"]["resolution"] == [96, 96]


@pytest.mark.parametrize("workers", [1, 2, 5, 40])
def test_there_are_two_items_a_worker_where_entries_allow(
    tmp_path: Path, cache_url: str, workers: int
):
    folder = fill_folder(tmp_path / "images", 30)
    done = prepare(small_options(folder), cache_url, workers=workers, **FACTS)
    latents = [item for item in done.items if item.kind == "latents"]
    texts = [item for item in done.items if item.kind == "text"]
    assert len(latents) >= min(30, 2 * workers)
    assert len(texts) >= min(31, 2 * workers)
    assert sum(len(item.entries) for item in latents) == done.missing("latents") == 30
    assert sum(len(item.entries) for item in texts) == done.missing("text") == 31
    for item in latents:
        keys = {key for _, key in item.entries}
        assert {row.bucket for row in done.rows if row.key in keys} == {item.bucket}
    if workers < 10:
        assert len({len(item.entries) for item in texts}) <= 2  # none is much shorter
    assert len(pickle.dumps((done.facts, latents[0]))) < 4000


def test_items_may_be_done_anywhere_and_twice(tmp_path: Path, cache_url: str):
    folder = fill_folder(tmp_path / "images", 8)
    options = small_options(folder)
    expected = as_bytes(build(options, str(tmp_path / "other"), NumpyEncoder()))
    planned = prepare(options, cache_url, workers=2, **FACTS)
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


def test_loading_an_unfinished_plan_is_an_error(tmp_path: Path, cache_url: str):
    folder = fill_folder(tmp_path / "images", 3)
    planned = prepare(small_options(folder), cache_url, **FACTS)
    with pytest.raises(DataError, match="latents are not in the cache"):
        load_dataset(planned)
    run_item(planned.facts, planned.items[0], NumpyEncoder())
    for item in planned.items:
        if item.kind == "latents":
            run_item(planned.facts, item, NumpyEncoder())
    with pytest.raises(DataError, match="4 of 4 texts are not in the cache"):
        load_dataset(planned)


def quarantine(cache_url: str) -> dict[str, str]:
    lines = open_storage(cache_url).read("quarantine.jsonl").decode().splitlines()
    return {line["key"]: line["reason"] for line in map(json.loads, lines)}


def test_bad_files_are_left_out_listed_and_not_fetched_again(
    tmp_path: Path, cache_url: str, monkeypatch: pytest.MonkeyPatch
):
    folder = fill_folder(tmp_path / "images", 20)
    folder.write("image-0001.png", b"")
    folder.write("image-0002.png", image_bytes((96, 96), 3)[:-900])  # its header is whole
    folder.write("image-0003.txt", b"\xff\xfe\x00")
    folder.write("twin.png", folder.read("image-0002.png"))
    folder.write("twin.txt", b"twin of a truncated file")
    options = small_options(folder, max_bad=0.25)
    dataset = build(options, cache_url, NumpyEncoder())
    reasons = {one.key: one.reason for one in dataset.bad}
    assert list(reasons) == ["image-0001.png", "image-0002.png", "image-0003.png", "twin.png"]
    assert reasons["image-0001.png"] == "the file is empty"
    assert "truncated" in reasons["image-0002.png"]
    assert "not UTF-8" in reasons["image-0003.png"]
    assert quarantine(cache_url) == reasons
    assert len(dataset.rows) == 17
    counted = Counted(monkeypatch)
    assert build(options, cache_url).bad == dataset.bad
    assert counted.reads_of(folder.url) == {}

    folder.write("image-0002.png", image_bytes((96, 96), 3))
    encoder = NumpyEncoder()
    repaired = build(options, cache_url, encoder)
    assert encoder.images == 1
    assert len(repaired.rows) == 18
    assert "image-0002.png" not in quarantine(cache_url)


def test_too_many_bad_images_stop_the_run_with_reasons(tmp_path: Path, cache_url: str):
    folder = fill_folder(tmp_path / "images", 10)
    folder.write("image-0001.png", b"")
    with pytest.raises(
        DataError,
        match=r"1 of 10 images cannot be used, more than data.max_bad 0.05 allows. image-0001.png: "
        r"the file is empty. Repair or remove them, or raise data.max_bad",
    ):
        prepare(small_options(folder), cache_url, **FACTS)
    folder.write("image-0001.png", image_bytes((96, 96), 3)[:-900])
    with pytest.raises(DataError, match=r"1 of 10 images cannot be used.*truncated"):
        build(small_options(folder), cache_url, NumpyEncoder())


def test_a_data_set_without_captions_is_an_error_that_lists_files(tmp_path: Path, cache_url: str):
    folder = open_storage(str(tmp_path / "images"))
    for name in "abc":
        folder.write(f"{name}.png", image_bytes((96, 96), 1))
    with pytest.raises(DataError, match=r"a.png: no caption.*So have 2 more: b.png, c.png\."):
        prepare(small_options(folder), cache_url, **FACTS)
    dataset = build(small_options(folder, default_caption="x"), cache_url, NumpyEncoder())
    assert {row.caption for row in dataset.rows} == {"x"}


def test_concept_folders_give_repeats_and_captions(tmp_path: Path, cache_url: str):
    folder = open_storage(str(tmp_path / "images"))
    fill_folder(folder.within("3_red cat"), 2)
    folder.delete("3_red cat/image-0001.txt")
    dataset = build(small_options(folder), cache_url, NumpyEncoder())
    assert [(row.repeats, row.caption) for row in dataset.rows] == [
        (3, "picture 0"),
        (3, "red cat"),
    ]


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
    assert len(prepare(options, cache_url, **facts).rows) == 5


def test_a_file_that_changes_while_it_is_cached_is_not_taken_for_the_old_one(
    tmp_path: Path, cache_url: str
):
    folder = fill_folder(tmp_path / "images", 4)
    options = small_options(folder)
    planned = prepare(options, cache_url, **FACTS)
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
from datafolders import NumpyEncoder, small_options
from raylora.data.dataset import prepare, run_item

class Slow(NumpyEncoder):
    def encode_images(self, pixels):
        time.sleep(0.005)
        return super().encode_images(pixels)

plan = prepare(small_options(sys.argv[1]), sys.argv[2], latents_facts=NumpyEncoder.latents_facts,
               text_facts=NumpyEncoder.text_facts, workers=8)
print("planned", flush=True)
for item in plan.items:
    run_item(plan.facts, item, Slow())
"""


def start_child(folder: str, cache_url: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, folder, cache_url, str(Path(__file__).parent)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


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
        missing.append(prepare(options, cache_url, **FACTS).missing("latents"))
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
    planned = prepare(options, cache_url, workers=8, **FACTS)
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
    plans = [prepare(small_options(folder), f"{s3_url}/cache", **FACTS) for _ in range(2)]

    def work(number: int) -> None:
        for item in plans[number].items:
            run_item(plans[number].facts, item, Shifted(float(number)))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    readers = [load_dataset(plans[n], local_dir=str(tmp_path / f"local-{n}")) for n in range(2)]
    assert as_bytes(readers[0]) == as_bytes(readers[1])


@pytest.mark.parametrize("role", ["train", "held out"])
def test_two_folders_share_a_cache_and_a_quarantine(tmp_path: Path, cache_url: str, role: str):
    for name in ("train", "held out"):
        folder = fill_folder(tmp_path / name, 3)
        folder.write("bad.png", name.encode())
        folder.write("bad.txt", b"bad")
        build(small_options(folder, max_bad=0.5), cache_url, NumpyEncoder())
    lines = open_storage(cache_url).read("quarantine.jsonl").decode().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["bad.png", "bad.png"]
    assert any(role in json.loads(line)["folder"] for line in lines)


def test_progress_is_told_for_each_item(tmp_path: Path, cache_url: str):
    folder = fill_folder(tmp_path / "images", 3)
    told: list[tuple[WorkItem, int]] = []
    on_item: Callable[[WorkItem, encode.ItemReport], None] = lambda item, report: told.append(  # noqa: E731
        (item, report.encoded)
    )
    build(small_options(folder), cache_url, NumpyEncoder(), on_item=on_item)
    assert sum(encoded for _, encoded in told) == 3 + 4


def test_the_facts_of_a_plan_name_its_places(tmp_path: Path, cache_url: str):
    folder = fill_folder(tmp_path / "images", 2)
    facts = prepare(small_options(folder), cache_url, **FACTS).facts
    assert isinstance(facts, PlanFacts)
    assert facts.latents_folder.startswith("latents-")
    assert facts.text_folder.startswith("text-")
    assert len(facts.latents_folder) == len("latents-") + 16
