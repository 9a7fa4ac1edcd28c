"""Images per CPU second into the cache, against a plain loop; and what a second run costs.

    python benchmarks/cache.py [--images 120] [--rounds 3] [--json]

Both read the same JPEGs of 1024x768, bring them to 256 px and encode them with the same VAE on one
thread, in turns. The plain loop saves one .npy an image; raylora also lists, hashes and remembers
the sources, encodes the captions, and writes shards with an index.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import results
import torch
from base import make_base, make_pictures
from PIL import Image

from raylora.base.storage_file import FileStorage
from raylora.check import check_job
from raylora.job import Job, job_from, with_overrides
from raylora.local import cache_here

SIDE = 256


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print the JSON, not the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="cache-") as name:
        folder = Path(name)
        make_base(folder / "base")
        make_pictures(folder / "pictures", options.images, (1024, 768))
        result = _measure(folder, options.images, options.rounds)
    path = results.write("cache", result, _text(result))
    print(json.dumps(result, indent=1) if options.json else _text(result))
    print(f"written: {path}", file=sys.stderr)


def _measure(folder: Path, images: int, rounds: int) -> dict[str, Any]:
    job = _job(folder)
    ours, plain = [], []
    for number in range(rounds + 1):  # the first round warms up
        fresh = with_overrides(job, {"data.cache": str(folder / f"cache-{number}")})
        ours.append(_cpu_seconds(lambda job=fresh: cache_here(check_job(job))))  # type: ignore[misc]
        target = folder / f"plain-{number}"
        plain.append(_cpu_seconds(lambda target=target: _plain_loop(job, target)))  # type: ignore[misc]
    last = with_overrides(job, {"data.cache": str(folder / f"cache-{rounds}")})
    reads = _Reads()
    began = time.monotonic()
    again = _cpu_seconds(lambda: cache_here(check_job(last)))
    wall = time.monotonic() - began
    rate = [images / seconds for seconds in ours[1:]]
    rival = [images / seconds for seconds in plain[1:]]
    ratios = [a / b for a, b in zip(rate, rival, strict=True)]
    return {
        "benchmark": "cache",
        "machine": results.machine(),
        "images": images,
        "images_per_cpu_second": {
            "raylora": results.quartiles(rate),
            "plain loop": results.quartiles(rival),
        },
        "ratio": results.quartiles(ratios),
        "second_run": {
            "cpu_seconds": round(again, 3),
            "wall_seconds": round(wall, 3),
            "source_reads": reads.of(job.data.folder),
            "cache_reads": reads.of(str(last.data.cache)),
        },
    }


class _Reads:
    """Counts whole and ranged reads of file storage from now on, by folder."""

    def __init__(self) -> None:
        self._seen: list[str] = []
        for word in ("read", "read_range"):
            setattr(FileStorage, word, self._counting(getattr(FileStorage, word)))

    def _counting(self, read: Callable[..., bytes]) -> Callable[..., bytes]:
        def counted(storage: FileStorage, key: str, *rest: int) -> bytes:
            self._seen.append(f"{storage.url}/{key}")
            return read(storage, key, *rest)

        return counted

    def of(self, folder: str) -> int:
        """Reads below a folder."""
        return sum(url.startswith(f"file://{folder}/") for url in self._seen)


def _job(folder: Path) -> Job:
    return job_from(
        {
            "name": "cache",
            "store": str(folder / "store"),
            "family": {"kind": "sd15", "weights": str(folder / "base")},
            "data": {"folder": str(folder / "pictures"), "resolution": SIDE, "min_bucket_reso": 64},
            "training": {"steps": 1},
            "fleet": {"cpus_only": True},
        }
    )


def _plain_loop(job: Job, target: Path) -> None:
    """Decode, resize, crop, encode, save: what a script of ten lines does."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(f"{job.family.weights}/vae").requires_grad_(False)
    target.mkdir()
    rows = check_job(job).plans[0].rows
    for row in rows:
        width, height = row.bucket
        picture = Image.open(Path(job.data.folder) / row.key).convert("RGB")
        scale = max(width / picture.width, height / picture.height)
        size = (round(picture.width * scale), round(picture.height * scale))
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        picture = picture.resize(size, Image.Resampling.BOX)
        picture = picture.crop((left, top, left + width, top + height))
        pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 127.5 - 1)
        latents = vae.encode(pixels.permute(2, 0, 1)[None]).latent_dist.mode()
        np.save(target / f"{Path(row.key).stem}.npy", latents.numpy())


def _cpu_seconds(action: Callable[[], object]) -> float:
    began = time.process_time()
    action()
    return time.process_time() - began


def _text(result: dict[str, Any]) -> str:
    rates = result["images_per_cpu_second"]
    second = result["second_run"]
    return (
        f"# Cache: {result['images']} JPEGs of 1024x768 to {SIDE} px latents\n\n"
        f"{results.machine_line(result['machine'])}\n\n"
        "| | images per CPU second (median) |\n|---|---|\n"
        f"| raylora (sources, captions, shards and index included) | "
        f"{rates['raylora']['median']} |\n"
        f"| plain loop (pictures only) | {rates['plain loop']['median']} |\n"
        f"| ratio | {result['ratio']['median']} |\n\n"
        f"A second run took {second['cpu_seconds']} CPU s, {second['wall_seconds']} s in all, read "
        f"{second['source_reads']} source objects and {second['cache_reads']} cache objects.\n"
    )


if __name__ == "__main__":
    main()
