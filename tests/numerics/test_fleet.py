"""The same LoRA from any fleet: two processes of unlike speed and share, and one."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from children import Child, together
from small import final_state, first_values, small_job, train_small

from raylora.assemble import claim, make_run
from raylora.check import check_job
from raylora.job import Job
from raylora.local import cache_here
from raylora.training.loop import run_training
from raylora.training.reduce import Alone, Distributed
from raylora.training.report import read_metrics

STEPS = 40


def fleet_job(store: Path, precision: str, **more: object) -> Job:
    return small_job(
        str(store),
        training__steps=STEPS,
        training__images_per_step=6,
        training__precision=precision,
        optimizer__learning_rate=1e-3,
        data__cache=str(store.parent / "cache"),
        **more,
    )


def train_member(rank: int, job: Job, slow_rank: int | None) -> list[float]:
    """What one worker of the group does; the slow one really is slower, image by image."""
    torch.set_num_threads(1)
    checked = check_job(job)
    storage, _ = claim(job)
    datasets = cache_here(checked)
    group, device = Distributed(), torch.device("cpu")
    run = make_run(job, checked.family, datasets, storage, group, device, prove=False)
    if rank == slow_rank:
        predict = run.parts.predict

        def slowly(denoiser, noisy, timesteps, conditions):  # type: ignore[no-untyped-def]
            time.sleep(0.05 * len(noisy))
            return predict(denoiser, noisy, timesteps, conditions)

        run.parts.predict = slowly
    run_training(run)
    return list(run.parts.shares.weights)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Job]:
    """The job that one process has trained, of a precision and a kind of sums; each once."""

    @functools.cache
    def trained(precision: str, sums: str) -> Job:
        job = fleet_job(tmp_path_factory.mktemp("alone") / "one", precision, training__sums=sums)
        Child(train_small, job).result()
        return job

    return trained


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "sums", "shares", "limit"),
    [
        # fp32 has 24 bits: 6e-8 a sum, over 40 steps through Adam's division by small roots
        ("fp32", "fast", (3.0, 1.0), 1e-5),
        ("fp32", "fast", "measured", 1e-5),
        ("fp64", "fast", (1.0, 2.0), 1e-11),
        ("fp32", "exact", "measured", 0.0),
    ],
)
def test_two_unlike_workers_train_the_lora_of_one(
    tmp_path: Path,
    alone: Callable[[str, str], Job],
    precision: str,
    sums: str,
    shares: object,
    limit: float,
) -> None:
    fleet = fleet_job(
        tmp_path / "two",
        precision,
        training__sums=sums,
        fleet__workers=2,
        fleet__shares=shares,
        fleet__refit_every_steps=5,
        memory__max_micro_batch=2 if sums == "fast" else None,
    )
    slow = 1 if shares == "measured" else None
    weights = together(2, train_member, fleet, slow)
    one, two = (final_state(job)["values"] for job in (alone(precision, sums), fleet))
    moved = (one - first_values(fleet, Alone())).norm()
    difference = (one - two).norm() / moved
    print(f"{precision} {sums} {shares}: moved {moved:.4f}, off {difference:.2e}, {weights[0]}")
    assert moved > 1
    assert difference <= limit
    assert one.dtype == (torch.float64 if precision == "fp64" else torch.float32)
    if shares == "measured":
        assert weights[0] == weights[1]
        assert weights[0][0] > 0.55, "the slow worker kept an equal share"
    counts = {tuple(row["shares"]) for row in read_metrics(claim(fleet)[0])}
    assert all(a != b for a, b in counts if shares != "measured")


def drifting_member(rank: int, job: Job) -> tuple[float, float, float]:
    checked = check_job(job)
    storage, _ = claim(job)
    run = make_run(
        job,
        checked.family,
        cache_here(checked),
        storage,
        Distributed(),
        torch.device("cpu"),
        prove=False,
    )
    optimizer, scale = run.parts.mover.optimizer, run.parts.loss_scale
    step = optimizer.step

    def drift(*arguments: object) -> None:
        step()
        if rank == 1:
            run.parts.adapter.values.data[0] += 1e-3  # as an unlike GPU's rounding, only larger
        # Prodigy and its like keep the rate that they estimate as such a number.
        optimizer.param_groups[0]["d"] = 0.1 + rank
        scale.on, scale.factor = True, 2.0**rank

    optimizer.step = drift  # type: ignore[assignment]
    run_training(run)
    value = float(run.parts.adapter.values.detach()[0])
    return value, optimizer.param_groups[0]["d"], scale.factor


@pytest.mark.slow
def test_a_worker_whose_adapter_drifted_gets_the_first_ones_again(tmp_path: Path) -> None:
    job = small_job(
        str(tmp_path),
        training__steps=4,
        fleet__workers=2,
        fleet__shares=(1.0, 1.0),
        fleet__checksum_every_steps=2,
    )
    first, second = together(2, drifting_member, job)
    assert first == second
    assert first[1:] == (0.1, 1.0)
    events = [entry.key for entry in claim(job)[0].entries("events")]
    text = b"".join(claim(job)[0].read(key) for key in events)
    assert text.count(b"drift mended") == 2
