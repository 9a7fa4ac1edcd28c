"""A recorded step computed again: the same loss, the same images, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
from small import MakeJob, open_run, train_small

from raylora.assemble import open_store
from raylora.base.errors import JobError, TrainingError
from raylora.local import train
from raylora.training.replay import replay_step
from raylora.training.report import read_metrics


@pytest.mark.slow
def test_every_recorded_step_comes_out_again(make_job: MakeJob):
    job = make_job(training__save_every_steps=2, optimizer__learning_rate=1e-2)
    train_small(job)
    storage = open_store(job)
    before = storage.entries()
    rows = {row["done"]: row for row in read_metrics(storage)}
    for step in (1, 2, 3, 6):
        run = open_run(job)
        found = replay_step(run, step)
        run.close()
        assert found.replayed == found.recorded == rows[step]["loss"]
        assert len(found.keys) == 4
        names = {row.key for row in run.parts.loader.dataset.rows}
        assert set(found.keys) <= names
    assert storage.entries() == before


@pytest.mark.slow
def test_a_step_before_an_extension_is_replayed_at_the_rate_it_had(make_job: MakeJob):
    given = {"training__save_every_steps": 2, "schedule__name": "cosine"}
    train_small(make_job(training__steps=6, **given))
    longer = make_job(training__steps=8, **given)
    train(longer, extend=True, prove=False)
    for step in (4, 6, 8):
        run = open_run(longer)
        found = replay_step(run, step)
        run.close()
        assert found.replayed == found.recorded


@pytest.mark.slow
def test_a_text_encoder_that_had_stopped_before_an_extension_stands_in_a_replay(make_job: MakeJob):
    given = {
        "network__train": "both",
        "optimizer__text_encoder_stop": 0.5,
        "optimizer__learning_rate": 1e-2,
        "optimizer__max_grad_norm": 1e-3,  # so that a gradient of its shortens the others
        "training__save_every_steps": 3,
        "schedule__warmup_steps": 0,
    }
    train_small(make_job(training__steps=6, **given))
    longer = make_job(training__steps=12, **given)
    train(longer, extend=True, prove=False)
    for step in (3, 6, 9):
        run = open_run(longer)
        found = replay_step(run, step)
        run.close()
        assert found.replayed == found.recorded


@pytest.mark.slow
def test_a_step_that_is_not_recorded_is_told(make_job: MakeJob):
    job = make_job(training__steps=2)
    run = open_run(job)
    with pytest.raises(JobError, match="step 1 is not recorded: the run has no steps"):
        replay_step(run, 1)
    run.close()
    train_small(job)
    run = open_run(job)
    with pytest.raises(JobError, match="step 3 is not recorded: the run has steps 1 to 2"):
        replay_step(run, 3)
    run.close()


def test_other_samples_than_were_recorded_are_told(make_job: MakeJob, one_icon: str):
    job = make_job(data__folder=one_icon, training__steps=1, training__images_per_step=1)
    train_small(job)
    for file in list(Path(one_icon).iterdir()):
        file.rename(file.with_stem("other"))
    run = open_run(job)
    with pytest.raises(TrainingError, match="gives other samples than were recorded"):
        replay_step(run, 1)
    run.close()
