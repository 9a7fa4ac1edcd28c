"""The whole road over a real S3 server behind a proxy that counts requests and does harm."""

from __future__ import annotations

import pytest
import torch
from faultproxy import FaultProxy
from small import ROOT, final_state, saved_file, small_job, train_small

from raylora.base import storage_s3
from raylora.base.storage import open_storage
from raylora.check import check_job
from raylora.families.sd15 import Sd15
from raylora.job import Job
from raylora.local import cache_here

IMAGES = 12


@pytest.fixture
def images_url(s3_url: str) -> str:
    storage = open_storage(f"{s3_url}/images")
    folder = ROOT / "jobs/quickstart/demo-data/train"
    for image in sorted(folder.glob("*.png"))[:IMAGES]:
        storage.write(image.name, image.read_bytes())
        storage.write(f"{image.stem}.txt", image.with_suffix(".txt").read_bytes())
    return storage.url


def s3_job(images: str, store: str, name: str) -> Job:
    return small_job(
        store,
        name=name,
        data__folder=images,
        training__images_per_step=2,
        training__save_every_steps=2,
    )


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("the encoders were loaded though nothing changed")


@pytest.mark.slow
def test_a_second_run_fetches_decodes_and_encodes_nothing(
    fault_proxy: FaultProxy, images_url: str, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_small(s3_job(images_url, f"{s3_url}/store", "first"))
    assert fault_proxy.count("GET", "*/images/*.png") >= IMAGES
    fault_proxy.reset_counts()
    monkeypatch.setattr(Sd15, "load_encoder", refuse)
    train_small(s3_job(images_url, f"{s3_url}/store", "second"))
    assert fault_proxy.count("GET", "*/images/*") == 0
    assert fault_proxy.count("PUT", "*/caches/*") == 0


@pytest.mark.slow
def test_one_new_caption_encodes_one_text_and_rehash_reads_all_again(
    fault_proxy: FaultProxy, images_url: str, s3_url: str
) -> None:
    job = s3_job(images_url, f"{s3_url}/store", "caption")
    cache_here(check_job(job))
    key = next(e.key for e in open_storage(images_url).entries() if e.key.endswith(".txt"))
    open_storage(images_url).write(key, b"ink icon, something new, object")
    fault_proxy.reset_counts()
    plan = check_job(job).plans[0]
    assert (plan.missing("text"), plan.missing("latents")) == (1, 0)
    assert fault_proxy.count("GET", "*/images/*") == 1
    plan = check_job(job, rehash=True).plans[0]
    assert (plan.missing("text"), plan.missing("latents")) == (1, 0)
    assert fault_proxy.count("GET", "*/images/*") == 1 + 2 * IMAGES


@pytest.mark.slow
def test_a_run_through_storms_is_the_run_of_a_calm_day(
    fault_proxy: FaultProxy, images_url: str, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_s3, "FIRST_WAIT_SECONDS", 0.01)
    calm = s3_job(images_url, f"{s3_url}/calm", "run")
    stormy = s3_job(images_url, f"{s3_url}/stormy", "run")
    train_small(calm)
    for kind, pattern in [
        ("503", "*/stormy/caches/*"),
        ("reset", "*/stormy/caches/*index*"),
        ("reset_after", "*/stormy/*manifest.json"),
        ("503_after", "*/stormy/*/job.yaml"),
        ("slow", "*/images/*.png"),
        ("reset", "*/images/*.png"),
        ("503", "*/stormy/*state.safetensors"),
        ("reset_after", "*/stormy/*adapter.safetensors"),
    ]:
        fault_proxy.fail_next(2, pattern=pattern, kind=kind, seconds=0.2)
    train_small(stormy)
    assert fault_proxy.unspent() == [], "a storm that met nobody proves nothing"
    for read in (final_state, saved_file):
        left, right = read(stormy), read(calm)
        assert all(torch.equal(left[name], right[name]) for name in right)
