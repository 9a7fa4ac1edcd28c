"""Who owns a run's name, what may change between attempts, and when it is finished."""

from __future__ import annotations

import json

import pytest
import yaml

from raylora.base.errors import JobError
from raylora.base.segments import SegmentWriter
from raylora.base.storage import Storage, open_storage
from raylora.training.run_folder import claim_run, finished_steps, next_attempt

JOB = {
    "name": "cats",
    "store": "here",
    "network": {"rank": 8, "alpha": None},
    "training": {"steps": 10, "epochs": None, "seed": 0},
    "fleet": {"workers": 1},
    "memory": {"max_micro_batch": 8},
    "log": {"every_steps": 10},
    "preview": {"prompts": []},
}


def job(**sections: object) -> dict[str, object]:
    changed = dict(JOB)
    for name, value in sections.items():
        held = changed[name]
        changed[name] = {**held, **value} if isinstance(held, dict) else value  # type: ignore[dict-item]
    return changed


def claim(storage: Storage, given: dict[str, object], *, extend: bool = False) -> None:
    claim_run(storage, given, name="cats", extend=extend)


def held(storage: Storage) -> object:
    return yaml.safe_load(storage.read("job.yaml"))


@pytest.fixture
def here(tmp_path) -> Storage:
    return open_storage(str(tmp_path / "run"))


def test_a_new_name_is_taken_and_the_same_job_has_it(storage: Storage):
    claim(storage, JOB)
    assert held(storage) == JOB
    claim(storage, JOB)
    claim(storage, JOB, extend=True)
    assert held(storage) == JOB


def test_another_jobs_name_is_refused_with_what_differs(storage: Storage):
    claim(storage, JOB)
    with pytest.raises(JobError) as caught:
        claim(storage, job(network={"rank": 16}, training={"seed": 3}))
    (problem,) = caught.value.problems
    assert "name: the run 'cats' in " in problem
    assert "network.rank was 8, is 16; training.seed was 0, is 3." in problem
    assert problem.endswith("Choose another `name`, or undo the change to resume.")
    assert held(storage) == JOB


def test_many_differences_are_counted(here: Storage):
    claim(here, JOB)
    with pytest.raises(JobError, match="and 3 more"):
        claim(here, job(network={f"word{i}": i for i in range(8)}))


@pytest.mark.parametrize("section", ["fleet", "memory", "log", "preview"])
def test_what_changes_no_result_may_change(here: Storage, section: str):
    claim(here, JOB)
    claim(here, job(**{section: {"other": 5}}))
    claim(here, job(store="moved"))


def test_more_steps_are_asked_for_by_name(here: Storage):
    claim(here, JOB)
    with pytest.raises(JobError, match=r"training.steps was 10, is 20. .* add --extend"):
        claim(here, job(training={"steps": 20}))
    claim(here, job(training={"steps": 20}), extend=True)
    assert held(here) == job(training={"steps": 20})
    claim(here, job(training={"steps": 20}))


def test_an_extended_run_is_finished_no_more(here: Storage):
    claim(here, JOB)
    here.write("result.json", json.dumps({"steps": 10}).encode())
    claim(here, JOB)
    assert finished_steps(here) == 10
    claim(here, job(training={"steps": 20}), extend=True)
    assert finished_steps(here) is None


def test_a_length_in_other_words_is_an_extension(here: Storage):
    claim(here, JOB)
    claim(here, job(training={"steps": None, "epochs": 3.0}), extend=True)
    claim(here, job(training={"steps": None, "epochs": 3.5}), extend=True)
    with pytest.raises(JobError, match="Choose another `name`"):
        claim(here, job(training={"steps": None, "epochs": 1.0}), extend=True)


@pytest.mark.parametrize("extend", [False, True])
def test_a_run_is_not_made_shorter(here: Storage, extend: bool):
    claim(here, JOB)
    with pytest.raises(JobError, match=r"steps was 10, is 5\. Choose another `name`"):
        claim(here, job(training={"steps": 5}), extend=extend)


def test_an_extension_changes_nothing_else(here: Storage):
    claim(here, JOB)
    with pytest.raises(JobError, match="Choose another `name`"):
        claim(here, job(training={"steps": 20, "seed": 1}), extend=True)


def test_attempts_count_those_that_said_something(storage: Storage):
    assert next_attempt(storage) == 1
    for attempt in (1, 2):
        SegmentWriter(storage, "events", attempt=attempt, every_seconds=0.0).add({"event": "x"})
    assert next_attempt(storage) == 3
