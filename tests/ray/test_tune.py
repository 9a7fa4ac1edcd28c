"""A campaign on a real cluster, its runs in S3: one trial resumed, one stopped, one broken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from children import Child
from small import QUICKSTART, ROOT, saved_file, train_small

from raylora.assemble import open_store
from raylora.base.errors import UserError
from raylora.base.segments import read_segments
from raylora.base.storage import open_storage
from raylora.campaign import Campaign, load_campaign, read_leaderboard
from raylora.job import with_overrides
from raylora.on_ray.tune import run_campaign
from raylora.training.checkpoint import State, write_checkpoint

ADAPTER = "adapter.safetensors"
KILLED_AFTER_2 = ("job.yaml", "attempts/", "metrics/", "events/", "checkpoints/000002/")
GOOD, BAD, BROKEN = 4e-3, 1e-6, 2e-3


def small_campaign(folder: Path, store: str, *overrides: str) -> Campaign:
    """Three learning rates, four steps each, measured every second; one trial at a time."""
    demo = ROOT / "jobs/quickstart"
    space = {
        "name": "rates",
        "job": str(QUICKSTART),
        "space": {"optimizer.learning_rate": {"choice": [GOOD, BAD, BROKEN]}},
        "every_trial": {
            "family.weights": str(demo / "tiny-sd"),
            "data.folder": str(demo / "demo-data/holdout"),
            "validation.folder": str(demo / "demo-data/holdout"),
            "validation.every_steps": 2,
            "validation.timesteps": [400],
            "schedule.warmup_steps": 0,
            "training.images_per_step": 2,
            "training.steps": 4,
        },
        "grace_steps": 2,
        "max_concurrent": 1,  # so that the scheduler sees the trials in the order of their numbers
    }
    file = folder / "space.yaml"
    file.write_text(yaml.safe_dump(space))
    return load_campaign(file, [f"store={store}", *overrides])


def leave_half(campaign: Campaign, folder: Path) -> dict[str, torch.Tensor]:
    """Make the first trial one that was killed after step 2; tensors of the unbroken one's file."""
    trial = campaign.trials[0]
    whole = with_overrides(trial.job, {"store": str(folder / "whole")})
    Child(train_small, whole).result()
    run = open_store(whole)
    for entry in run.entries():
        if entry.key.startswith(KILLED_AFTER_2):
            trial.storage.write(entry.key, run.read(entry.key))
    return saved_file(whole)


@pytest.mark.timeout(280)
def test_a_campaign_resumes_stops_and_ranks_its_trials(
    ray_cluster: None, tmp_path: Path, s3_url: str
) -> None:
    campaign = small_campaign(tmp_path, s3_url, "fleet.workers=1")
    expected = leave_half(campaign, tmp_path)
    good, bad, broken = campaign.trials
    foreign = State(2, {"values": torch.zeros(1)}, {"dataset": "another", "shares": [1.0]})
    write_checkpoint(broken.storage, foreign, b"")

    board = run_campaign(campaign)

    rows = [(row["trial"], row["state"], row["steps"]) for row in board["trials"]]
    assert rows == [
        ("rates-000", "finished", 4),
        ("rates-001", "stopped early", 2),
        ("rates-002", "failed", 0),
    ]
    assert board["trials"][0]["validation"] < board["trials"][1]["validation"]
    assert "images or captions are not those" in board["trials"][2]["error"]
    assert board["trials"][1]["adapter"] == f"{bad.storage.url}/checkpoints/000002/{ADAPTER}"
    events = [row["event"] for row in read_segments(good.storage, "events")]
    assert "resumed" in events
    for name, tensor in saved_file(good.job).items():
        assert torch.equal(tensor, expected[name]), name
    assert board["proof"]["trial"] == "rates-000"
    assert board["proof"]["worst_error"] < 1e-6  # the file holds fp32
    assert read_leaderboard(campaign) == board


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("fleet.cpus_per_worker=64", "No node of the cluster has 64 CPU"),
        ("fleet.cpus_only=false", "has 1 CPU and 1 GPU"),
        ("fleet.workers=[{gpu: A100}]", "1 CPU of kind A100"),
    ],
)
def test_a_trial_that_fits_no_node_is_refused_and_not_waited_for(
    ray_cluster: None, tmp_path: Path, override: str, said: str
) -> None:
    campaign = small_campaign(tmp_path, str(tmp_path / "store"), override)
    with pytest.raises(UserError, match=said):
        run_campaign(campaign)
    assert open_storage(str(tmp_path / "store")).entries() == []
