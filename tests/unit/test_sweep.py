"""Search spaces and campaigns, without Ray: what is tried, what is refused, what is best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small import QUICKSTART, ROOT

from raylora.base.errors import JobError, UserError
from raylora.base.segments import SegmentWriter
from raylora.campaign import (
    Campaign,
    best_job,
    finished_leaderboard,
    load_campaign,
    make_leaderboard,
    write_leaderboard,
)
from raylora.job import load_job
from raylora.sweep import SweepOptions
from raylora.training.checkpoint import State, write_checkpoint

RATES = [1e-4, 1e-3, 1e-2]


def space_of(**given: Any) -> dict[str, Any]:
    """A search space over two options, with `given` in place of some words."""
    return {
        "name": "sweep",
        "job": str(QUICKSTART),
        "space": {
            "optimizer.learning_rate": {"choice": RATES},
            "network.rank": {"choice": [2, 4]},
        },
        "grace_steps": 20,
        **given,
    }


def campaign_of(folder: Path, *overrides: str, **given: Any) -> Campaign:
    """The campaign of a space file with these words, its store in `folder`."""
    file = folder / "space.yaml"
    file.write_text(yaml.safe_dump(space_of(**given), sort_keys=False))
    return load_campaign(file, [f"store={folder / 'store'}", *overrides])


def pretend(campaign: Campaign, number: int, losses: dict[int, float], *, done: bool) -> None:
    """Leave in the store what a trial leaves that measured these losses."""
    run = campaign.trials[number].storage
    rows = SegmentWriter(run, "metrics", attempt=1)
    for step, loss in losses.items():
        rows.add({"done": step, "validation": loss})
        if step:
            write_checkpoint(run, State(step, {"values": torch.zeros(1)}, {}), b"adapter")
    rows.flush()
    if done:
        run.write("result.json", b"{}")


def test_a_grid_tries_every_combination_in_the_order_of_the_file() -> None:
    trials = SweepOptions.model_validate(space_of()).trials()
    assert [(t["optimizer.learning_rate"], t["network.rank"]) for t in trials] == [
        (1e-4, 2),
        (1e-4, 4),
        (1e-3, 2),
        (1e-3, 4),
        (1e-2, 2),
        (1e-2, 4),
    ]


def test_random_draws_stay_in_their_ranges_and_more_samples_repeat_none() -> None:
    ranges = {
        "optimizer.learning_rate": {"loguniform": [1e-5, 1e-2]},
        "data.max_bad": {"uniform": [0.1, 0.3]},
        "network.rank": {"choice": [2, 4, 8]},
    }
    few, many = (
        SweepOptions.model_validate(space_of(space=ranges, search="random", samples=n)).trials()
        for n in (8, 64)
    )
    assert many[:8] == few
    rates = sorted(trial["optimizer.learning_rate"] for trial in many)
    assert rates[0] >= 1e-5
    assert rates[-1] <= 1e-2
    assert 1e-4 < rates[32] < 1e-3  # the middle of three decades, by the logarithm
    assert all(0.1 <= trial["data.max_bad"] <= 0.3 for trial in many)
    assert {trial["network.rank"] for trial in many} == {2, 4, 8}


def test_another_seed_draws_other_values() -> None:
    ranges = {"optimizer.learning_rate": {"loguniform": [1e-5, 1e-2]}}
    drawn = [
        SweepOptions.model_validate(
            space_of(space=ranges, search="random", samples=4, seed=seed)
        ).trials()
        for seed in (0, 1)
    ]
    assert all(one not in drawn[1] for one in drawn[0])


def test_a_combination_is_tried_once() -> None:
    options = space_of(space={"network.rank": {"choice": [2, 4]}}, search="random", samples=50)
    trials = SweepOptions.model_validate(options).trials()
    assert sorted(trial["network.rank"] for trial in trials) == [2, 4]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"space": {"network.rank": {"choise": [1]}}}, "Did you mean 'choice'"),
        ({"space": {"network.rank": 4}}, "4 is no range"),
        ({"space": {"network.rank": {"choice": [1], "uniform": [1, 2]}}}, "exactly one of choice"),
        ({"space": {"network.rank": {"uniform": [2, 1]}}}, r"\[2.0, 1.0\] must rise"),
        ({"space": {"network.rank": {"loguniform": [0, 1]}}}, "must be above 0"),
        ({"space": {"network.rank": {"uniform": [1, 2]}}}, "a grid needs a choice"),
        ({"space": {"name": {"choice": ["a"]}}}, "name cannot be swept"),
        ({"space": {"loss.name": {"choice": ["l2"]}}}, "unlike losses cannot be compared"),
        ({"samples": 3}, "samples belongs to search: random"),
        ({"search": "random"}, "needs samples"),
        ({"every_trial": {"network.rank": 2}}, "in space and in every_trial"),
        ({"every_trial": {"store": "x"}}, "store cannot be set there"),
        ({"sheduler": "asha"}, "Did you mean 'scheduler'"),
    ],
)
def test_a_space_that_cannot_work_is_refused(
    tmp_path: Path, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(JobError, match=said):
        campaign_of(tmp_path, **given)


def test_every_unknown_path_is_told_at_once(tmp_path: Path) -> None:
    space = {"network.rnak": {"choice": [1]}, "optimizer.learning_rate.x": {"choice": [1]}}
    with pytest.raises(JobError) as caught:
        campaign_of(tmp_path, space=space, every_trial={"traning.steps": 3})
    assert len(caught.value.problems) == 3
    assert "space.network.rnak: the job has no such option. Did you mean 'rank'?" in str(
        caught.value
    )
    assert "every_trial.traning.steps" in str(caught.value)


def test_every_value_that_makes_no_job_is_told_with_its_path(tmp_path: Path) -> None:
    space = {
        "network.rank": {"choice": [0, 4]},
        "optimizer.learning_rate": {"choice": [1e-3, "fast"]},
    }
    with pytest.raises(JobError) as caught:
        campaign_of(tmp_path, space=space)
    assert len(caught.value.problems) == 2
    assert "space: network.rank 0: network.rank is 0" in str(caught.value)
    assert "space: optimizer.learning_rate 'fast'" in str(caught.value)


def test_a_job_without_held_out_images_has_no_best(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"has no validation\.folder"):
        campaign_of(tmp_path, "validation.folder=null")


def test_asha_that_could_stop_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="grace_steps is 20, and a trial has 10 steps"):
        campaign_of(tmp_path, every_trial={"training.steps": 10})


def test_asha_may_look_at_the_last_step(tmp_path: Path) -> None:
    assert campaign_of(tmp_path, every_trial={"training.steps": 20}).trials


def test_a_swept_path_cannot_be_set_too(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"space\.network\.rank is swept"):
        campaign_of(tmp_path, "network.rank=8")


def test_a_trial_is_the_job_with_its_values_in_one_process(tmp_path: Path) -> None:
    campaign = campaign_of(tmp_path, every_trial={"training.steps": 40})
    trial = campaign.trials[3]
    assert trial.job.name == "sweep-003"
    assert (trial.job.optimizer.learning_rate, trial.job.network.rank) == (1e-3, 4)
    assert trial.job.training.steps == 40
    assert trial.job.fleet.count == 1
    assert trial.job.preview.prompts == ()
    # Each measurement has its checkpoint, so a trial may be stopped after any.
    assert trial.job.training.save_every_steps == trial.job.validation.every_steps == 50
    assert trial.job.training.keep_last == 2


def test_what_is_set_on_the_command_line_wins(tmp_path: Path) -> None:
    campaign = campaign_of(tmp_path, "training.steps=33", every_trial={"training.steps": 40})
    assert {trial.job.training.steps for trial in campaign.trials} == {33}


def test_the_leaderboard_ranks_by_the_last_loss_that_has_a_file(tmp_path: Path) -> None:
    campaign = campaign_of(tmp_path, space={"network.rank": {"choice": [2, 4, 8, 16]}})
    pretend(campaign, 0, {0: 0.9, 50: 0.5, 100: 0.4}, done=True)
    pretend(campaign, 1, {0: 0.9, 50: 0.7}, done=False)
    pretend(campaign, 2, {0: 0.1}, done=False)  # never trained: its loss is the base's
    pretend(campaign, 3, {0: 0.9, 50: float("nan")}, done=False)

    board = make_leaderboard(campaign, stopped={1, 3}, errors={2: "no memory"})

    rows = [(row["trial"][-1], row["state"], row["steps"]) for row in board["trials"]]
    assert rows[:2] == [("0", "finished", 100), ("1", "stopped early", 50)]
    assert sorted(rows[2:]) == [("2", "failed", 0), ("3", "stopped early", 50)]
    assert board["trials"][0]["adapter"].endswith("/runs/sweep-000/sweep-000.safetensors")
    assert board["trials"][1]["adapter"].endswith("checkpoints/000050/adapter.safetensors")
    assert not board["finished"]


def test_the_winning_job_is_the_job_with_the_winners_values_only(tmp_path: Path) -> None:
    campaign = campaign_of(tmp_path, every_trial={"training.steps": 40})
    with pytest.raises(UserError, match="no winner yet"):
        best_job(campaign)
    pretend(campaign, 0, {40: 0.5}, done=True)
    pretend(campaign, 5, {40: 0.4}, done=True)
    write_leaderboard(campaign, make_leaderboard(campaign, stopped=(), errors={}))

    (tmp_path / "best.yaml").write_text(best_job(campaign, ["schedule.warmup_steps=3"]))

    best, plain = load_job(tmp_path / "best.yaml"), load_job(QUICKSTART)
    assert (best.name, best.optimizer.learning_rate, best.network.rank) == ("sweep-best", 1e-2, 4)
    assert best.schedule.warmup_steps == 3
    assert (best.training, best.preview, best.fleet) == (plain.training, plain.preview, plain.fleet)


def test_a_finished_campaign_is_known_and_a_changed_one_is_not(tmp_path: Path) -> None:
    campaign = campaign_of(tmp_path, space={"network.rank": {"choice": [2]}})
    pretend(campaign, 0, {400: 0.4}, done=True)
    write_leaderboard(campaign, make_leaderboard(campaign, stopped=(), errors={}))
    assert finished_leaderboard(campaign) is not None
    longer = campaign_of(tmp_path, "training.steps=500", space={"network.rank": {"choice": [2]}})
    assert finished_leaderboard(longer) is None


def test_the_spaces_in_the_tree_are_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for file in sorted((ROOT / "tune_spaces").glob("*.yaml")):
        assert load_campaign(file).trials, json.dumps(file.name)


def test_what_makes_trials_unlike_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        campaign_of(tmp_path, every_trial={"validation.patience": 3, "training.seed": None})
    first, second = caught.value.problems
    assert first.startswith("validation.patience ends a run by its own measurements")
    assert second.startswith("training.seed is null")


def test_measurements_in_epochs_have_their_checkpoints_too(tmp_path: Path) -> None:
    given = {
        "validation.every_steps": None,
        "validation.every_epochs": 3,
        "training.save_every_steps": 7,
        "training.keep_last": 5,
    }
    training = campaign_of(tmp_path, every_trial=given).trials[0].job.training
    assert (training.save_every_steps, training.save_every_epochs) == (None, 3)
    assert training.keep_last == 5
