"""Training on a real cluster: images and runs in S3, two workers, one of them killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Child
from small import ROOT, final_state, first_values, small_job, train_small

from raylora.assemble import open_store
from raylora.base.errors import DataError, JobError
from raylora.base.segments import read_segments
from raylora.base.storage import open_storage
from raylora.check import check_job
from raylora.job import Job
from raylora.on_ray.train import train_on_ray
from raylora.training.checkpoint import checkpoint_steps
from raylora.training.reduce import Alone
from raylora.training.report import read_metrics

IMAGES = 24


@pytest.fixture(scope="module")
def images_url(s3_server: object) -> str:
    """Some of the demo images in a bucket."""
    url = "s3://raylora-tests/ray-train-images"
    storage = open_storage(url)
    folder = ROOT / "jobs/quickstart/demo-data/train"
    for image in sorted(folder.glob("*.png"))[:IMAGES]:
        storage.write(image.name, image.read_bytes())
        storage.write(f"{image.stem}.txt", image.with_suffix(".txt").read_bytes())
    return url


def fleet_job(images: str, store: str, name: str, sums: str, shares: object) -> Job:
    return small_job(
        store,
        name=name,
        data__folder=images,
        training__steps=20,
        training__images_per_step=3,
        training__save_every_steps=4,
        training__sums=sums,
        optimizer__learning_rate=1e-3,
        fleet__workers=2,
        fleet__cpus_per_worker=0.5,
        fleet__shares=shares,
        fleet__refit_every_steps=3,
    )


def kill_first_worker(job: Job) -> None:
    """kill -9 the process that worker 0 says it is, once a checkpoint is there."""
    storage = open_store(job)
    while not checkpoint_steps(storage):
        time.sleep(0.05)
    process = next(row["process"] for row in read_segments(storage, "events") if "process" in row)
    os.kill(process, signal.SIGKILL)


@pytest.mark.timeout(900)
def test_two_workers_train_the_lora_of_one_process_and_survive_a_kill(
    ray_cluster: None, images_url: str, s3_url: str
) -> None:
    told: list[dict[str, Any]] = []
    whole = fleet_job(images_url, s3_url, "whole", "fast", (2.0, 1.0))
    killed = fleet_job(images_url, s3_url, "killed", "exact", "measured")
    result = train_on_ray(check_job(whole), sinks=[told.append])
    assert result["steps"] == 20
    assert [row["done"] for row in told if "images_per_second" in row] == [10, 20]
    proofs = [row["proof_error"] for row in told if row.get("event") == "saved"]
    assert len(proofs) == 5
    assert max(proofs) < 1e-6

    alone, exact = (
        fleet_job(images_url, s3_url, f"alone-{sums}", sums, (2.0, 1.0))
        for sums in ("fast", "exact")
    )
    for job in (alone, exact):
        Child(train_small, job).result()
    one, two = final_state(alone)["values"], final_state(whole)["values"]
    moved = (one - first_values(alone, Alone())).norm()
    assert (one - two).norm() / moved < 1e-5  # fp32, sums in another order

    killer = threading.Thread(target=kill_first_worker, args=(killed,), daemon=True)
    killer.start()
    train_on_ray(check_job(killed))
    killer.join(1)
    assert not killer.is_alive()
    events = [row["event"] for row in read_segments(open_store(killed), "events")]
    assert "resumed" in events
    for name, tensor in final_state(exact).items():
        assert torch.equal(final_state(killed)[name], tensor), name
    assert [row["done"] for row in read_metrics(open_store(killed))] == list(range(1, 21))


def test_a_mistake_ends_before_any_worker_starts(ray_cluster: None, tmp_path: Path) -> None:
    job = small_job(str(tmp_path), data__folder=str(tmp_path / "nothing"))
    with pytest.raises((JobError, DataError), match="no image here"):
        train_on_ray(check_job(job))
