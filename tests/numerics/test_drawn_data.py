"""Training on drawn data: cached ahead or encoded as it is shown, on any fleet, resumed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from children import Child, together
from PIL import Image
from small import ROOT, final_state, open_run, small_job, train_small
from test_fleet import train_member

from raylora.assemble import open_store
from raylora.check import check_job
from raylora.data.cache.recipe import text_key
from raylora.job import Job
from raylora.local import begin, cache_here
from raylora.training.loader import micro_batches
from raylora.training.step import losses_at, sample_losses

HOLDOUT = str(ROOT / "jobs/quickstart/demo-data/holdout")
DRAWN: dict[str, Any] = {
    "data__fit": "crop",
    "data__shuffle_caption": True,
    "data__caption_tag_dropout_rate": 0.2,
    "data__caption_dropout_rate": 0.3,
    "data__flip_aug": True,
    "data__color_aug": True,
    "data__random_crop": True,
}
LIVE = {"data__cache": "none", "data__token_warmup_step": 0.5}
STEPS = 8


def job(store: Path, cache: Path, **more: Any) -> Job:
    given = {
        "data__folder": HOLDOUT,
        "data__cache": str(cache),
        "training__steps": STEPS,
        "training__images_per_step": 6,
        "training__save_every_steps": 3,
        "optimizer__learning_rate": 1e-2,
        **more,
    }
    return small_job(str(store), **given)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cached", "live"])
def test_drawn_data_trains_the_same_bits_on_two_workers_as_on_one(
    tmp_path: Path, cache: Path, how: str
):
    drawn = {**DRAWN, "training__sums": "exact", **(LIVE if how == "live" else {})}
    one = job(tmp_path / "one", cache, **drawn)
    Child(train_small, one).result()
    two = job(tmp_path / "two", cache, fleet__workers=2, fleet__shares=(2.0, 1.0), **drawn)
    together(2, train_member, two, None)
    assert_same(final_state(one), final_state(two))
    plain = job(tmp_path / "plain", cache, training__sums="exact", data__fit="crop")
    Child(train_small, plain).result()
    assert not torch.equal(final_state(plain)["values"], final_state(one)["values"])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cached", "live"])
def test_a_resumed_run_draws_what_the_unbroken_one_draws(tmp_path: Path, cache: Path, how: str):
    given = job(tmp_path, cache, **{**DRAWN, **(LIVE if how == "live" else {})})
    train_small(given)
    unbroken = final_state(given)
    storage = open_store(given)
    for entry in storage.entries():  # as a kill after the first checkpoint leaves it
        if "/000003/" not in entry.key and entry.key not in ("job.yaml",):
            storage.delete(entry.key)
    train_small(given)
    assert_same(final_state(given), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("live", [{"data__cache": "none"}, {"data__cache_text": False}], ids=str)
def test_where_nothing_is_drawn_encoding_at_each_step_trains_what_the_cache_trains(
    tmp_path: Path, cache: Path, live: dict[str, Any]
):
    cached = job(tmp_path / "cached", cache)
    train_small(cached)
    shown = job(tmp_path / "shown", cache, **live)
    train_small(shown)
    assert_same(final_state(shown), final_state(cached))


@pytest.mark.slow
def test_a_dropped_caption_is_the_empty_one_and_is_chosen_at_training_time(
    tmp_path: Path, cache: Path
):
    run = open_run(job(tmp_path, cache, data__caption_dropout_rate=0.5))
    loader = run.parts.loader
    (empty,) = loader.dataset.fetch_texts([text_key("")])
    dropped = [
        bool((tensors["text"] == empty["text"]).all())
        for step in range(STEPS)
        for tensors in loader.take(step)[1]
    ]
    run.close()
    assert 0.25 * len(dropped) < sum(dropped) < 0.75 * len(dropped)
    again = open_run(job(tmp_path / "2", cache, data__caption_dropout_rate=0.0))
    assert not any(
        bool((tensors["text"] == empty["text"]).all())
        for step in range(STEPS)
        for tensors in again.parts.loader.take(step)[1]
    )
    again.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["area", "plain"])
def test_only_what_a_mask_lets_through_is_in_the_loss(
    tmp_path: Path, one_icon_masked: Path, kind: str
):
    folder, masks = str(one_icon_masked / "images"), str(one_icon_masked / "masks")
    sets = [{"folder": folder, "mask_folder": masks}, {"folder": folder}]
    given = {"data__sets": sets, "data__fit": "crop", "training__images_per_step": 2}
    run = open_run(job(tmp_path, tmp_path / "cache", loss__mask=kind, **given))
    parts = run.parts
    _, tensors, _ = parts.loader.take(0)
    masked = sorted(tensors, key=lambda one: float(one["mask"].mean()))
    batch = {name: torch.from_numpy(np.stack([one[name] for one in masked])) for name in masked[0]}
    assert batch["mask"][0, 0].unique(dim=0).tolist() == [[1.0] * 8 + [0.0] * 8]
    assert batch["mask"][1].min() == 1
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=batch["latents"].shape)).float()
    timesteps = torch.tensor([200, 700])
    predicted = []
    predict = parts.predict

    def seen(*arguments: Any) -> torch.Tensor:
        predicted.append(predict(*arguments))
        return predicted[0]

    parts.predict = seen
    losses = losses_at(parts, batch, noise, timesteps).detach()
    run.close()
    target = parts.process.target(batch["latents"], noise, timesteps)
    error = (predicted[0].detach() - target).double().square()
    left = error[0, :, :, :8].mean() * (1 if kind == "area" else 0.5)
    torch.testing.assert_close(losses.double(), torch.stack([left, error[1].mean()]))


@pytest.mark.slow
def test_regularisation_images_weigh_what_the_job_says(tmp_path: Path):
    sets = [{"folder": HOLDOUT}, {"folder": HOLDOUT, "is_reg": True}]
    run = open_run(
        job(
            tmp_path,
            tmp_path / "cache",
            data__sets=sets,
            data__prior_loss_weight=0.25,
            training__images_per_step=16,
        )
    )
    samples, tensors, _ = run.parts.loader.take(0)
    for mates, batch in micro_batches(samples, tensors, 8):
        numbers = [mate.number for mate in mates]
        weighed = sample_losses(run.parts, batch, numbers, 0).detach()
        alike = {**batch, "weight": torch.ones(len(mates))}
        plain = sample_losses(run.parts, alike, numbers, 0).detach()
        of_sets = [int(run.parts.loader.dataset.rows.set[mate.row]) for mate in mates]
        expected = torch.tensor([0.25 if of_set else 1.0 for of_set in of_sets])
        torch.testing.assert_close(weighed, plain * expected)
    run.close()
    assert {int(run.parts.loader.dataset.rows.set[one.row]) for one in samples} == {0, 1}


@pytest.mark.slow
def test_a_bad_image_found_while_encoding_changes_no_later_start(tmp_path: Path):
    """The balance of regularisation images is the same on the first start as on the next."""
    (tmp_path / "images").mkdir()
    for file in sorted(Path(HOLDOUT).glob("a*")):
        (tmp_path / "images" / file.name).write_bytes(file.read_bytes())
    broken = next((tmp_path / "images").glob("*.png"))
    broken.write_bytes(broken.read_bytes()[:-200])
    sets = [{"folder": str(tmp_path / "images")}, {"folder": HOLDOUT, "is_reg": True}]
    given = job(tmp_path, tmp_path / "cache", data__sets=sets, data__max_bad=0.9)
    found = []
    for _ in range(2):
        begun = begin(check_job(given), cache_here, extend=False, moved=False)
        assert not isinstance(begun, dict)
        found.append(begun[1].training)
    assert found[0].rows.fingerprint() == found[1].rows.fingerprint()
    assert [one.key for one in found[0].bad] == [broken.name]
    shown = [int(found[0].rows.repeats[found[0].rows.set == number].sum()) for number in (0, 1)]
    assert shown[0] == shown[1] > 0


@pytest.fixture
def one_icon_masked(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    image = Image.open(next(Path(HOLDOUT).glob("alien.*"))).convert("RGB").resize((64, 64))
    image.save(tmp_path / "images/alien.png")
    (tmp_path / "images/alien.txt").write_text("ink icon, alien")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "masks/alien.png")
    return tmp_path


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
