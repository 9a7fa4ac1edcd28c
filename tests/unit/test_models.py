"""From a job to its models: which layers carry an adapter, what is left out, what is kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small import ROOT, small_job

from raylora.adapt.dropout import Dropout
from raylora.base.errors import WeightsError
from raylora.base.site import Site
from raylora.job import Job
from raylora.models import Adapted, files_fit, load_adapted, open_family

CPU = torch.device("cpu")
VAE = ROOT / "jobs/quickstart/tiny-sd/vae"


def job(**given: Any) -> Job:
    return small_job("nowhere", **given)


def loaded(**given: Any) -> Adapted:
    made = job(**given)
    return load_adapted(made, open_family(made), CPU)


def kept(dropped: Dropout | None, site: Site) -> torch.Tensor:
    assert dropped is not None
    dropped.begin(0, [1, 2, 3])
    gate = dropped.gate(site)
    assert gate is not None
    return gate(torch.ones(3, 20, 8))


@pytest.mark.parametrize("word", ["dropout", "rank_dropout", "module_dropout"])
def test_each_kind_of_dropout_is_on_alone_and_follows_the_seed(word: str):
    masks = []
    for seed in (1, 1, 2):
        adapter = loaded(**{f"network__{word}": 0.5}, training__seed=seed).adapter
        masks.append(torch.stack([kept(adapter.dropout, site) for site in adapter.sites[:8]]))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert loaded().adapter.dropout is None


@pytest.mark.parametrize(("layers", "mlp"), [("attention", False), ("attention_mlp", True)])
def test_layers_are_chosen_alike_in_denoiser_and_text_encoder(layers: str, mlp: bool):
    adapter = loaded(network__train="both", network__layers=layers).adapter
    found = {"unet": False, "text_encoder": False}
    for site in adapter.sites:
        found[site.component] |= ".mlp" in site.name or ".ff." in site.name
    assert found == {"unet": mlp, "text_encoder": mlp}


def test_a_model_whose_rate_is_0_gets_no_adapter():
    models = loaded(network__train="both", optimizer__text_encoder_rate=0)
    assert {site.component for site in models.adapter.sites} == {"unet"}
    assert [group.name for group in models.groups] == ["unet"]
    fewer = loaded(optimizer__block_rates={"mid": 0}).adapter.sites
    assert any(".up_blocks." in site.name for site in fewer)
    assert not any(".mid_block." in site.name for site in fewer)


def test_rates_follow_the_jobs_images_per_step_where_that_is_asked_for():
    given = {"training__images_per_step": 9, "optimizer__learning_rate": 1e-3}
    rates = [
        loaded(**given, optimizer__scale_rate=kind).groups[0].rate
        for kind in ("none", "linear", "sqrt")
    ]
    assert rates == pytest.approx([1e-3, 9e-3, 3e-3])


def numbers_kept(*, checkpointing: bool) -> tuple[int, torch.Tensor]:
    """How many numbers reading a caption keeps for its gradients, and these."""
    made = job(
        network__train="text_encoder", memory__checkpointing="all" if checkpointing else "none"
    )
    family = open_family(made)
    models = load_adapted(made, family, CPU)
    tokens = {name: torch.from_numpy(held) for name, held in family.tokens(["a cat"]).items()}
    held: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        read = family.read_tokens(models.text_encoders, tokens)["text"]
    read.square().sum().backward()
    return sum(held), models.adapter.gradients


def test_a_checkpointed_text_encoder_keeps_less_and_has_the_same_gradients():
    (whole, expected), (less, found) = (numbers_kept(checkpointing=on) for on in (False, True))
    assert less < whole / 4
    assert found.any()
    assert torch.equal(found, expected)


def test_another_vae_may_be_any_address_and_is_named_where_it_is_absent(tmp_path: Path):
    folder = tmp_path / "vae"
    shutil.copytree(VAE, folder)
    plain, other = (
        open_family(job(family__vae=vae)).encoder_facts() for vae in (None, f"file://{folder}")
    )
    assert plain == other, "the same files, wherever they lie"
    with pytest.raises(WeightsError, match=r"family\.vae: .*nowhere is not there"):
        open_family(job(family__vae=str(tmp_path / "nowhere")))


def test_what_is_not_trained_is_no_part_of_the_groups():
    models = loaded(network__freeze_down=True)
    adapter = models.adapter
    assert {word for group in models.groups for _, word in group.members} == {"up"}
    assert len(adapter.constants) == sum(
        held["down"].numel() for held in adapter.parameters.values()
    )
    assert not adapter.constants.requires_grad


def test_pissa_starts_from_the_bases_own_weights():
    models = loaded(network__start="pissa", network__rank=2)
    site = models.adapter.sites[0]
    layer = models.denoiser.get_submodule(site.name.removeprefix("unet."))
    held = models.adapter.parameters[site.name]
    best = (held["up"] @ held["down"]).detach().double()
    u, s, v = torch.linalg.svd(layer.weight.double().flatten(1))
    # rank 2 of the whole decomposition; the adapter's numbers have 24 bits
    expected = (u[:, :2] * s[:2]) @ v[:2]
    torch.testing.assert_close(best, expected, rtol=0, atol=1e-4)


def test_dylora_draws_its_slices_and_needs_no_dropout_for_it():
    adapter = loaded(network={"kind": "dylora", "rank": 8, "unit": 4}).adapter
    assert adapter.dropout is not None
    assert adapter.dropout.part(adapter.sites[0]) is None
    with adapter.dropping(0, [1, 2, 3]):
        part = adapter.dropout.part(adapter.sites[0])
        assert part is not None
        first, unit = part(8, torch.ones(3, 1))
    assert unit == 4
    assert set(first.tolist()) <= {0, 4}


def test_a_check_asks_for_no_weights(monkeypatch: pytest.MonkeyPatch):
    made = job(network__start="pissa", network__train="both")
    family = open_family(made)
    monkeypatch.setattr(type(family), "load_denoiser", None)
    monkeypatch.setattr(type(family), "load_text_encoders", None)
    files_fit(made, family)
