"""Who owns a run's name, what may change between attempts, and when it is finished."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from raylora.base.errors import JobError, TrainingError
from raylora.base.storage import Storage, open_storage
from raylora.memory.setting import Precision
from raylora.training.checkpoint import State, write_checkpoint
from raylora.training.run_folder import (
    claim_attempt,
    claim_run,
    finished_steps,
    keep_precision,
    read_precision,
    settle_move,
    still_ours,
)

JOB = {
    "name": "cats",
    "store": "here",
    "network": {"rank": 8, "alpha": None},
    "data": {"folder": "images", "cache": None, "max_bad": 0.1},
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


def claim(
    storage: Storage, given: dict[str, object], *, extend: bool = False, moved: bool = False
) -> None:
    claim_run(storage, given, name="cats", extend=extend, moved=moved)


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
    claim(here, job(data={"cache": "/scratch", "max_bad": 0.5}))


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


def test_attempts_are_numbered_one_after_the_other(storage: Storage):
    assert claim_attempt(storage) == 1
    assert claim_attempt(storage) == 2


def test_two_that_start_at_once_are_two_attempts(storage: Storage):
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: claim_attempt(storage), range(8)))
    assert sorted(taken) == list(range(1, 9))


def test_whoever_started_last_has_the_run(storage: Storage):
    first = claim_attempt(storage)
    still_ours(storage, first)
    second = claim_attempt(storage)
    with pytest.raises(TrainingError, match=rf"again by process {os.getpid()} on .*attempt 1"):
        still_ours(storage, first)
    still_ours(storage, second)


ELSEWHERE = {"folder": "elsewhere"}
CONTENT = {"dataset": "d1", "held_out": "none", "base": "b1"}


def test_another_place_is_refused_unless_the_person_says_that_it_moved(here: Storage):
    claim(here, JOB)
    with pytest.raises(JobError, match=r"data\.folder was .* add --moved"):
        claim(here, job(data=ELSEWHERE))
    for moved in (False, True):  # one after the other: a longer run is begun by what it holds
        with pytest.raises(JobError, match="Choose another `name`, or undo"):
            claim(here, job(data=ELSEWHERE, training={"steps": 20}), extend=True, moved=moved)
    with pytest.raises(JobError, match="Choose another `name`, or undo"):
        claim(here, job(data=ELSEWHERE, training={"seed": 3}), moved=True)
    claim(here, job(data=ELSEWHERE), moved=True)
    assert held(here) == JOB  # not before what lies there was compared


def test_a_move_is_settled_when_the_content_is_what_was_trained_on(here: Storage):
    claim(here, JOB)
    facts = {**CONTENT, "shares": [1.0], "looked": True}
    write_checkpoint(here, State(3, {}, facts), b"")
    moved = job(data=ELSEWHERE)
    with pytest.raises(JobError, match=r"base's weights are not those .* up to step 3"):
        settle_move(here, moved, {**CONTENT, "base": "b2"})
    assert held(here) == JOB
    settle_move(here, moved, CONTENT)
    assert held(here) == moved
    claim(here, moved)


def test_a_run_that_has_saved_nothing_may_move_anywhere(here: Storage):
    claim(here, JOB)
    settle_move(here, job(data=ELSEWHERE), {**CONTENT, "dataset": "d2"})
    assert held(here) == job(data=ELSEWHERE)


def test_what_a_run_began_with_is_kept_and_first_come(storage: Storage):
    assert read_precision(storage) is None
    began = Precision("bf16", base="int8", states="8bit")
    keep_precision(storage, began)
    keep_precision(storage, began)
    with pytest.raises(TrainingError, match=r"base='int8'.*base='full'"):
        keep_precision(storage, Precision("bf16"))
    assert read_precision(storage) == began


@pytest.mark.parametrize("begun_with", ["auto", "int8"])
def test_a_run_keeps_its_base_whatever_auto_would_choose_now(here: Storage, begun_with: str):
    claim(here, job(memory={"base": begun_with}))
    claim(here, job(memory={"base": "nf4"}))  # nothing has begun yet
    keep_precision(here, Precision(base="int8"))
    for same in ({"base": "auto"}, {"base": "int8"}, {"streaming": 0.5}, {"states": "full"}):
        claim(here, job(memory=same))
    with pytest.raises(JobError, match=r"memory\.base was 'int8', is 'full'"):
        claim(here, job(memory={"base": "full"}))
    with pytest.raises(JobError, match=r"memory\.states was 'full', is '8bit'"):
        claim(here, job(memory={"states": "8bit"}))
