"""30 kills (-9) at random moments and inside uploads: what is resumed ends bit-equal."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch
from children import Child
from faultproxy import FaultProxy
from small import final_state, saved_file, small_job, train_small

from raylora.assemble import open_store
from raylora.base.segments import read_segments
from raylora.job import Job
from raylora.training.checkpoint import checkpoint_steps
from raylora.training.report import read_metrics

KILLS_PER_STORE = 15
STEPS = 24


def killable(store: str, name: str) -> Job:
    return small_job(
        store,
        name=name,
        training__steps=STEPS,
        training__images_per_step=1,
        training__save_every_steps=2,
        log__every_steps=1,
    )


def kill_until_done(job: Job, moments: random.Random, kills: int) -> list[int]:
    """Start the job again and again, killing it at random moments until it ends.

    A moment is some time after up to three more checkpoints than before: in the start, between
    steps, within a save.

    Returns:
        How many checkpoints each kill left.
    """
    storage = open_store(job)
    left: list[int] = []
    while True:
        child = Child(train_small, job)
        wanted = len(checkpoint_steps(storage)) + moments.choice((0, 1, 1, 2, 3))
        while len(left) < kills and len(checkpoint_steps(storage)) < wanted:
            if not child.running(0.01):
                break
        if len(left) < kills and child.running(moments.uniform(0.0, 0.3)):
            child.kill()
            left.append(len(checkpoint_steps(storage)))
            continue
        child.result()
        return left


def assert_same_run(resumed: Job, unbroken: Job) -> None:
    """Bit-equal state and file; every step recorded, with the loss of the unbroken run."""
    for read in (final_state, saved_file):
        left, right = read(resumed), read(unbroken)
        assert left.keys() == right.keys()
        for name in right:
            assert torch.equal(left[name], right[name]), name
    losses = [
        [(row["done"], row["loss"], row["samples"]) for row in read_metrics(open_store(job))]
        for job in (resumed, unbroken)
    ]
    assert losses[0] == losses[1]
    assert [done for done, _, _ in losses[1]] == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "s3"])
def test_runs_killed_at_random_moments_end_bit_equal(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store = str(tmp_path) if kind == "file" else request.getfixturevalue("s3_url")
    unbroken = killable(store, "unbroken")
    Child(train_small, unbroken).result()
    moments = random.Random(5)
    left: list[int] = []
    resumed, runs = 0, 0
    while len(left) < KILLS_PER_STORE:
        runs += 1
        job = killable(store, f"killed-{runs}")
        left += kill_until_done(job, moments, min(8, KILLS_PER_STORE - len(left)))
        assert_same_run(job, unbroken)
        events = read_segments(open_store(job), "events")
        resumed += sum(row["event"] == "resumed" for row in events)
    print(f"{kind}: {len(left)} kills over {runs} runs, {resumed} resumed, left {left} checkpoints")
    # Else the kills came before anything was saved, and every start was a first one.
    assert resumed >= KILLS_PER_STORE // 2
    assert len(set(left)) >= 5


@pytest.mark.slow
def test_a_run_killed_inside_uploads_ends_bit_equal(fault_proxy: FaultProxy, s3_url: str) -> None:
    unbroken, killed = killable(s3_url, "unbroken"), killable(s3_url, "killed")
    Child(train_small, unbroken).result()
    uploads = {4: "adapter.safetensors", 8: "state.safetensors", 12: "manifest.json"}
    for step, pattern in uploads.items():
        holder: list[Child] = []

        def kill_it(*_: object, holder: list[Child] = holder) -> None:
            holder[0].process.kill()

        fault_proxy.on_put(f"*/killed/checkpoints/{step:06d}/{pattern}", 100, kill_it)
        holder.append(Child(train_small, killed))
        holder[0].process.join(60)
        assert holder[0].process.exitcode == -9, pattern
        before = list(range(2, step, 2))
        assert checkpoint_steps(open_store(killed)) == before, "half an upload became a checkpoint"
    Child(train_small, killed).result()
    assert_same_run(killed, unbroken)


@pytest.mark.slow
def test_a_checkpoint_damaged_later_is_passed_over(tmp_path: Path) -> None:
    unbroken, damaged = (killable(str(tmp_path), name) for name in ("unbroken", "damaged"))
    Child(train_small, unbroken).result()
    child = Child(train_small, damaged)
    while len(checkpoint_steps(open_store(damaged))) < 3:
        time.sleep(0.02)
    child.kill()
    storage = open_store(damaged)
    newest = f"checkpoints/{checkpoint_steps(storage)[-1]:06d}/state.safetensors"
    data = bytearray(storage.read(newest))
    data[-1] ^= 1
    storage.write(newest, bytes(data))
    Child(train_small, damaged).result()
    for name, tensor in final_state(unbroken).items():
        assert torch.equal(final_state(damaged)[name], tensor)
