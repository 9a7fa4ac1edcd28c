"""Training the text encoder: what moves, that gradients are right, and what is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import MakeJob, final_state, open_run, train_small
from torch import Tensor

from raylora.adapt.lora_file import read_adapter
from raylora.adapt.predictions import verify_predictions
from raylora.assemble import open_store
from raylora.models import open_family
from raylora.training.loop import Run, run_training
from raylora.training.report import read_metrics
from raylora.training.step import losses_at, train_step

TEXT = "text_encoder."


def moved(run: Run, step: Callable[[], object]) -> set[str]:
    """The models in which anything changed."""
    adapter = run.parts.adapter
    before = {site: held["up"].detach().clone() for site, held in adapter.parameters.items()}
    step()
    changed = [
        site for site, up in before.items() if not torch.equal(up, adapter.parameters[site]["up"])
    ]
    return {site.partition(".")[0] for site in changed}


@pytest.mark.parametrize(
    ("train", "models"),
    [
        ("denoiser", {"unet"}),
        ("text_encoder", {"text_encoder"}),
        ("both", {"unet", "text_encoder"}),
    ],
)
def test_what_network_train_names_is_moved(make_job: MakeJob, train: str, models: set[str]):
    run = open_run(make_job(network__train=train, training__images_per_step=1))
    step = lambda: [train_step(run.parts, number) for number in range(2)]  # noqa: E731
    assert moved(run, step) == models
    assert {site.component for site in run.parts.adapter.sites} == models
    run.close()


def test_gradients_of_the_text_encoder_are_those_of_finite_differences(make_job: MakeJob):
    run = open_run(
        make_job(
            network__train="both",
            training__precision="fp64",
            training__images_per_step=1,
            memory__checkpointing="all",
        )
    )
    parts = run.parts
    with torch.no_grad():
        parts.adapter.values += 0.02 * torch.sin(torch.arange(len(parts.adapter.values)))
    _, tensors, _ = parts.loader.take(0)
    batch = {word: torch.from_numpy(held.copy())[None] for word, held in tensors[0].items()}
    noise, timesteps = torch.ones_like(batch["latents"]), torch.tensor([300])
    assert {"ids", "weights"} < set(batch)

    def loss() -> Tensor:
        return losses_at(parts, batch, noise, timesteps).sum()

    parts.adapter.gradients.zero_()
    loss().backward()
    site = next(s.name for s in parts.adapter.sites if s.name.startswith(TEXT))
    for word in ("down", "up"):
        leaf = parts.adapter.parameters[site][word]
        assert leaf.grad is not None
        place = int(leaf.grad.abs().flatten().argmax())
        found = float(leaf.grad.flatten()[place])
        with torch.no_grad():
            flat = leaf.view(-1)
            flat[place] += 1e-5
            above = float(loss())
            flat[place] -= 2e-5
            below = float(loss())
            flat[place] += 1e-5
        assert found != 0
        assert found == pytest.approx((above - below) / 2e-5, rel=1e-5)
    run.close()


@pytest.mark.parametrize(
    "optimizer",
    [
        {"weight_decay": 0.5},
        # At a rate of 0 it would go on averaging.
        pytest.param({"name": "adamw_schedule_free"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_after_its_stop_the_text_encoder_stays_and_the_denoiser_goes_on(
    make_job: MakeJob, optimizer: dict[str, Any]
):
    run = open_run(
        make_job(
            network__train="both",
            training__steps=4,
            training__images_per_step=1,
            schedule__name="constant",
            schedule__warmup_steps=0,
            optimizer={**optimizer, "text_encoder_stop": 0.5},
        )
    )
    step = lambda: [train_step(run.parts, number) for number in range(2)]  # noqa: E731
    assert moved(run, step) == {"unet", "text_encoder"}
    assert moved(run, lambda: train_step(run.parts, 2)) == {"unet"}
    text = [site.name for site in run.parts.adapter.sites if site.name.startswith(TEXT)]
    assert all(
        not leaf.grad.any()  # type: ignore[union-attr]
        for name in text
        for leaf in run.parts.adapter.parameters[name].values()
    ), "its gradient would shorten the denoiser's"
    run.close()


@pytest.mark.slow
def test_the_file_of_both_means_the_same_to_diffusers(make_job: MakeJob, tmp_path):
    job = make_job(network__train="both", network__rank=4)
    train_small(job)
    data = open_store(job).read(f"{job.name}.safetensors")
    modules = read_adapter(data).modules
    assert sum(name.startswith("lora_te_") for name in modules) == 12
    (tmp_path / "both.safetensors").write_bytes(data)
    report = verify_predictions(tmp_path / "both.safetensors", open_family(job))
    assert report.effect > 1e-3
    assert report.modules == len(modules)


@pytest.mark.slow
def test_the_held_out_loss_is_measured_with_the_trained_encoder(make_job: MakeJob, one_icon: str):
    given = {"validation__folder": one_icon, "validation__every_steps": 3}
    alone = make_job(name="alone", network__train="text_encoder", **given)
    cached = make_job(name="cached", **given)
    found = {}
    for job in (alone, cached):
        run = open_run(job, report=True)
        run_training(run)
        run.close()
        rows = read_metrics(open_store(job))
        found[job.name] = [row["validation"] for row in rows if "validation" in row]
    # a fresh adapter changes nothing, and live captions are those of the cache to rounding
    assert found["alone"][0] == pytest.approx(found["cached"][0], rel=1e-5)
    assert len({round(loss, 7) for loss in found["alone"]}) == 3, "text alone moves the loss"
    assert final_state(alone)["values"].any()
