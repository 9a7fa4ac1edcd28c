"""A data set of a million images: memory, listing, planning; and reading samples from S3.

    python benchmarks/data.py [--rows 1000000] [--samples 1600] [--json]

The million rows are made up: a storage that lists names, and what an earlier run remembered of the
files. Everything else is the product's own road. Each part runs in a process of its own; memory is
counted from where a block begins.

Reading: samples of Stable Diffusion 1.5 size (latents 4x64x64 and text 77x768, float32) lie in a
real S3 server on this machine. raylora's loader is compared with a plain loop that gets one object
for each tensor, two threads each; then steps of 8 samples are taken at 200 samples a second.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import results

PARTS = ("index", "listing", "second run", "reading")
STEP_IMAGES = 8
PACE = 200.0
"""Samples a second that a trainer asks for, in the last measurement."""
READ_THREADS = 2


def main() -> None:
    """Measure, print, and write the results; or, as a child, one part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=1600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print the JSON, not the table")
    options = parser.parse_args()
    if options.part:
        print(json.dumps(_MEASURE[options.part](options)))
        return
    result: dict[str, Any] = {"benchmark": "data", "rows": options.rows}
    for part in PARTS:
        command = [sys.executable, __file__, "--part", part, "--rows", str(options.rows)]
        command += ["--samples", str(options.samples), "--rounds", str(options.rounds)]
        child = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=_environment())
        result[part] = json.loads(child.stdout)
    result["machine"] = results.machine()
    path = results.write("data", result, _text(result))
    print(json.dumps(result, indent=1) if options.json else _text(result))
    print(f"written: {path}", file=sys.stderr)


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def measure_index(options: argparse.Namespace) -> dict[str, Any]:
    """Rows as training holds them, and the order of an epoch."""
    from raylora.data.steps import StepPlan

    rows = _rows(options.rows)
    with _Measured() as planned:
        plan = StepPlan(rows, STEP_IMAGES, 0)
        plan.samples(0)
    with _Measured() as stepped:
        for step in range(1000):
            plan.samples(step)
    with _Measured() as next_epoch:
        plan.samples(plan.steps_per_epoch)
    return {
        "row_bytes": round(rows.nbytes / len(rows), 1),
        "planned": planned.told(),
        "next_epoch": next_epoch.told(),
        "milliseconds_a_step": round(stepped.seconds, 4),
        "index_mib": round(rows.nbytes / 2**20, 1),
    }


def measure_listing(options: argparse.Namespace) -> dict[str, Any]:
    """A million images with captions, listed and matched."""
    from raylora.data.sources.listing import list_set

    storage, words = _made_up(options.rows), _set_options()
    with _Measured() as walked:
        count = sum(1 for _ in storage.scan())
    with _Measured() as listed:
        listing = list_set(storage, words)
    assert len(listing.images) == options.rows
    return {"objects": count, "names_alone": walked.told(), "listed": listed.told()}


def measure_second_run(options: argparse.Namespace) -> dict[str, Any]:
    """All that `check` does with a data set that was seen before: no file is read."""
    from unittest import mock

    from raylora.base.storage import open_storage
    from raylora.data import examine
    from raylora.data.examine import Memories, examine_set
    from raylora.data.options import DataOptions
    from raylora.data.sources.remembered import sources_folder

    storage, words = _made_up(options.rows), _set_options()
    with tempfile.TemporaryDirectory(prefix="data-") as name:
        cache = open_storage(name)
        _remember(cache, sources_folder(storage.url), options.rows)
        with mock.patch.object(examine, "open_source", return_value=storage), _Measured() as seen:
            found = examine_set(
                0, words, DataOptions(folder="x"), cache, Memories(cache, ()), trust=True
            )
    assert len(found.training) == options.rows
    assert not found.bad
    return seen.told()


def measure_reading(options: argparse.Namespace) -> dict[str, Any]:
    """Samples from a real S3 server: raylora's loader, and a plain loop."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from s3server import BUCKET, OWNER, running_s3_server

    from raylora.data.cache import read

    read.FETCHERS = READ_THREADS  # as the plain loop has
    with (
        tempfile.TemporaryDirectory(prefix="data-") as name,
        _folder(Path(name) / "s3") as folder,
        running_s3_server(folder) as server,
    ):
        os.environ.update(
            AWS_ACCESS_KEY_ID=OWNER[0],
            AWS_SECRET_ACCESS_KEY=OWNER[1],
            AWS_REGION="us-east-1",
            AWS_ENDPOINT_URL=server.url,
        )
        samples = _Samples(f"s3://{BUCKET}/cache", f"s3://{BUCKET}/plain", options.samples)
        ours, plain = [], []
        for number in range(options.rounds):
            local = Path(name) / f"local-{number}"
            ours.append(samples.read_with_the_loader(local))
            plain.append(samples.read_plainly())
        again = samples.read_with_the_loader(local)
        wait = samples.take_at_a_pace(Path(name) / "local-pace")
    return {
        "samples": options.samples,
        "sample_bytes": samples.sample_bytes,
        "raylora": results.quartiles(ours),
        "plain loop": results.quartiles(plain),
        "ratio": results.quartiles([a / b for a, b in zip(ours, plain, strict=True)]),
        "raylora_from_the_local_cache": round(again, 1),
        **wait,
    }


class _Samples:
    """The same tensors twice in a store: in a cache, and as one object for each tensor."""

    def __init__(self, cache_url: str, plain_url: str, count: int) -> None:
        from raylora.base.storage import open_storage
        from raylora.data.cache.write import ShardWriter
        from raylora.data.dataset import PlanFacts
        from raylora.data.options import DataOptions

        self.cache, self.plain = open_storage(cache_url), open_storage(plain_url)
        self.rows = _rows(count, bucket=(512, 512))
        data = DataOptions(folder="x")
        self.facts = PlanFacts(
            data, (_set_options(),), cache_url, "latents-x", "text-x", ("x",), ("x",)
        )
        random = np.random.default_rng(0)
        pictures = ShardWriter(self.cache, "latents-x", "512x512", flush_seconds=1e9)
        texts = ShardWriter(self.cache, "text-x", "text", flush_seconds=1e9)
        with ThreadPoolExecutor(8) as pool:
            for number in range(count):
                row = self.rows[number]
                latents = random.standard_normal((4, 64, 64), dtype=np.float32)
                text = random.standard_normal((77, 768), dtype=np.float32)
                pictures.add(row.latents_key, {"latents": latents}, {})
                texts.add(row.text_key, {"text": text}, {})
                for word, tensor in (("latents", latents), ("text", text)):
                    pool.submit(self.plain.write, f"{number}.{word}.npy", _npy(tensor))
        pictures.flush()
        texts.flush()
        self.sample_bytes = latents.nbytes + text.nbytes

    def read_with_the_loader(self, local: Path) -> float:
        """Samples a second of an epoch's steps, as fast as they come."""
        loader = self._loader(local)
        began = time.perf_counter()
        for step in range(loader.plan.steps_per_epoch):
            loader.take(step)
        seconds = time.perf_counter() - began
        self._close(loader)
        return len(self.rows) / seconds

    def read_plainly(self) -> float:
        """Samples a second of two threads that get the objects of a step, one step ahead."""

        def get(number: int) -> dict[str, Any]:
            words = ("latents", "text")
            return {w: np.load(io.BytesIO(self.plain.read(f"{number}.{w}.npy"))) for w in words}

        order = np.random.default_rng(1).permutation(len(self.rows)).tolist()
        began = time.perf_counter()
        with ThreadPoolExecutor(READ_THREADS) as pool:
            for _ in pool.map(get, order):
                pass
        return len(order) / (time.perf_counter() - began)

    def take_at_a_pace(self, local: Path) -> dict[str, float]:
        """How long steps wait for their samples when a step takes its time, as on a GPU."""
        loader = self._loader(local)
        pause = STEP_IMAGES / PACE
        waits = []
        loader.take(0)
        for step in range(1, loader.plan.steps_per_epoch):
            time.sleep(pause)
            began = time.perf_counter()
            loader.take(step)
            waits.append(time.perf_counter() - began)
        self._close(loader)
        return {
            "pace": PACE,
            "wait_share": round(sum(waits) / (pause * len(waits)), 5),
            "longest_wait_ms": round(max(waits) * 1000, 2),
        }

    def _loader(self, local: Path) -> Any:
        from raylora.data.dataset import Dataset
        from raylora.data.steps import StepPlan
        from raylora.data.supply import Supply
        from raylora.data.variants import Chooser
        from raylora.training.loader import Loader
        from raylora.training.shares import Shares

        plan = StepPlan(self.rows, STEP_IMAGES, 0)
        dataset = Dataset(self.rows, (), self.facts, str(local))
        chooser = Chooser(self.facts.sets, seed=0, total_steps=plan.steps_per_epoch)
        return Loader(Supply(dataset, plan, chooser, None), plan, Shares(1), 0)

    def _close(self, loader: Any) -> None:
        loader.close()
        loader.dataset.close()


class _Measured:
    """Seconds and growth of memory of a block."""

    def __enter__(self) -> _Measured:
        gc.collect()
        pa.default_memory_pool().release_unused()
        _forget_peak()
        self.before_mib = _now_mib()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began
        self.peak_mib = _peak_mib()
        gc.collect()
        pa.default_memory_pool().release_unused()
        self.after_mib = _now_mib()

    def told(self) -> dict[str, float]:
        """For the results."""
        return {
            "seconds": round(self.seconds, 3),
            "kept_mib": round(self.after_mib - self.before_mib, 1),
            "peak_mib": round(self.peak_mib - self.before_mib, 1),
        }


def _now_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _peak_mib() -> float:
    """The highest since `_forget_peak`."""
    found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found
    return int(found.group(1)) / 2**10


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _rows(count: int, bucket: tuple[int, int] | None = None) -> Any:
    """Rows with keys and captions of usual lengths, in sixteen buckets or one."""
    from raylora.data.rows import Rows

    random = np.random.default_rng(0)
    wide = 256 + 64 * random.integers(0, 13, count).astype(np.int32)
    sizes = np.stack([wide, 512 * 512 // wide // 64 * 64], axis=1).astype(np.int32)
    if bucket:
        sizes[:] = bucket
    keys = [f"folder-{n // 10_000:03d}/image-{n:07d}.jpg" for n in range(count)]
    captions = [f"a photo of subject {n}, outdoors, daylight, high detail" for n in range(count)]
    return Rows(
        keys=pa.array(keys, pa.string()),
        captions=pa.array(captions, pa.large_string()),
        set=np.zeros(count, np.int16),
        repeats=np.ones(count, np.int32),
        bucket=sizes,
        original_size=sizes,
        latents_keys=random.integers(0, 256, (count, 1, 16), np.uint8),
        text_keys=random.integers(0, 256, (count, 1, 16), np.uint8),
        crops=np.zeros((count, 1, 2), np.int32),
        masks=pa.nulls(count, pa.string()),
    )


def _set_options() -> Any:
    from raylora.data.options import DataOptions, Native, resolve

    return resolve(DataOptions(folder="x", recursive=True), Native(512, 64))[0]


def _names(count: int) -> Iterator[str]:
    for number in range(count):
        yield f"folder-{number // 10_000:03d}/image-{number:07d}"


def _made_up(count: int) -> Any:
    """A storage that lists a million images with captions, and holds none."""
    from raylora.base.storage import Entry, Storage

    class MadeUp(Storage):
        url = "file:///made-up"

        def scan(self, prefix: str = "") -> Iterator[Entry]:
            for number, name in enumerate(_names(count)):
                yield Entry(f"{name}.jpg", 200_000 + number, f"tag-{number:027d}")
                yield Entry(f"{name}.txt", 60, f"tag-{number:027d}")

        def entries(self, prefix: str = "") -> list[Entry]:
            return list(self.scan(prefix))

        def _nothing(self, *_: Any) -> Any:
            raise AssertionError("a file was read")

        read = read_range = write = create = entry = delete = within = _nothing

    return MadeUp()


def _remember(cache: Any, folder: str, count: int) -> None:
    """What an earlier run would have left of the made-up files, in objects of 100,000 rows."""
    import pyarrow.parquet as pq

    from raylora.base.numbered import NumberedWriter
    from raylora.data.sources.remembered import SCHEMA

    writer, random = NumberedWriter(cache, folder, ".parquet"), np.random.default_rng(0)
    names = list(_names(count))
    for start in range(0, count, 100_000):
        part = names[start : start + 100_000]
        size = len(part)
        hashes = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(32), 2 * size, [None, pa.py_buffer(random.bytes(64 * size))]
        )
        sides = random.integers(400, 1400, (2, size), np.int32)
        numbers = range(start, start + size)
        columns = [
            [f"{name}.jpg" for name in part] + [f"{name}.txt" for name in part],
            [200_000 + n for n in numbers] + [60] * size,
            [f"tag-{n:027d}" for n in numbers] * 2,
            hashes,
            sides[0].tolist() + [0] * size,
            sides[1].tolist() + [0] * size,
            [None] * size + [f"a photo of subject {n}, outdoors, daylight" for n in numbers],
            [None] * (2 * size),
            [""] * (2 * size),
        ]
        arrays = [
            column if isinstance(column, pa.Array) else pa.array(column, kind)
            for column, kind in zip(columns, SCHEMA.types, strict=True)
        ]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(arrays, schema=SCHEMA), sink)
        writer.put(bytes(sink.getvalue()))


def _npy(tensor: Any) -> bytes:
    sink = io.BytesIO()
    np.save(sink, tensor)
    return sink.getvalue()


class _folder:
    """A new folder, as a context."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Path:
        self._path.mkdir()
        return self._path

    def __exit__(self, *_: object) -> None: ...


_MEASURE = {
    "index": measure_index,
    "listing": measure_listing,
    "second run": measure_second_run,
    "reading": measure_reading,
}


def _text(result: dict[str, Any]) -> str:
    index, listing, second = result["index"], result["listing"], result["second run"]
    reading, rows = result["reading"], f"{result['rows']:,}"
    ratio = reading["ratio"]
    lines = [
        "# A large data set",
        "",
        results.machine_line(result["machine"]),
        f"`python benchmarks/data.py --rows {result['rows']} --samples {reading['samples']}`",
        "",
        f"| {rows} images with captions | seconds | memory kept | peak | aim |",
        "|---|---|---|---|---|",
        f"| index held as columns | | {index['index_mib']:.0f} MiB | | |",
        _line("an epoch planned", index["planned"], "10 s, 300 MB"),
        _line("the next epoch planned", index["next_epoch"], ""),
        _line("names alone, from a made-up listing", listing["names_alone"], ""),
        _line("listed and matched with captions", listing["listed"], ""),
        _line("a second run: listed, remembered, in buckets, named", second, ""),
        "",
        f"A row takes {index['row_bytes']} bytes. A step of {STEP_IMAGES} is looked up in "
        f"{index['milliseconds_a_step']} ms.",
        "",
        f"| {reading['samples']} samples of {reading['sample_bytes'] / 1024:.0f} KiB from S3 | "
        "samples a second |",
        "|---|---|",
        f"| raylora's loader, {READ_THREADS} threads, nothing on the local disk | "
        f"{_quartiles(reading['raylora'])} |",
        f"| plain loop, {READ_THREADS} threads, one object a tensor | "
        f"{_quartiles(reading['plain loop'])} |",
        f"| ratio | {_quartiles(ratio)} |",
        f"| raylora's loader, second epoch | {reading['raylora_from_the_local_cache']} |",
        "",
        f"At {reading['pace']:.0f} samples a second, steps of {STEP_IMAGES}: they wait "
        f"{reading['wait_share']:.2%} of their time (aim: under 2 %), "
        f"{reading['longest_wait_ms']} ms at the longest. The S3 server ran on the same cores.",
        "",
    ]
    return "\n".join(lines)


def _line(name: str, told: dict[str, float], aim: str) -> str:
    seconds, kept, peak = told["seconds"], told["kept_mib"], told["peak_mib"]
    return f"| {name} | {seconds:.2f} | {kept:.0f} MiB | {peak:.0f} MiB | {aim} |"


def _quartiles(numbers: dict[str, float]) -> str:
    return f"{numbers['median']:.4g} ({numbers['low']:.4g} to {numbers['high']:.4g})"


if __name__ == "__main__":
    main()
