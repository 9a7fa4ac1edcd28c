"""A pack on whole models: each sample gets what its adapter alone gives, texts and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from adapters import fresh_adapter
from bases import open_tiny
from torch import Tensor, nn
from torch.testing import assert_close

from raylora.adapt.attach import Adapter, Adapts, Attachment
from raylora.adapt.pack import Pack
from raylora.base.layers import chosen_sites
from raylora.families import Family
from raylora.networks import get_network

CPU = torch.device("cpu")
CAPTIONS = ["a cat", "a red house by the sea, " * 20, ""]
FAMILIES: dict[str, dict[str, Any]] = {
    "sd15": {"max_tokens": 225, "clip_skip": 2},
    "sd2": {},
    "sdxl": {"max_tokens": 150, "weighted_captions": True},
    "sd3": {"mask_clip": True},
    "flux1": {"mask_t5": True},
}
NETWORKS = ["lora", "locon", "dora", "loha", "lokr", "oft", "dylora"]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def adapters_for(kind: str, family: Family, models: Mapping[str, nn.Module]) -> list[Adapter]:
    """Three, unlike in their numbers and strengths, on every model."""
    network = get_network(kind)
    encoders = {name: model for name, model in models.items() if name != family.component}
    made = []
    for seed, alpha in enumerate((3.0, 1.0, 2.0)):
        options = network.options(rank=2, alpha=alpha)
        every = [*family.sites(models[family.component]), *family.text_sites(encoders)]
        sites = chosen_sites(
            options,
            every,
            convolutions=options.convolutions and family.blocks[1] > 0,
            blocks=family.blocks,
            ends=family.block_ends,
        )
        adapter = fresh_adapter(
            network,
            options,
            [site for site in sites if network.fits(options, site) is None],
            seed=seed,
            dtype=torch.float64,
            device=CPU,
            models=models,
        )
        with torch.no_grad():
            adapter.values += 0.1 * normal(seed, *adapter.values.shape)
        made.append(adapter)
    return made


def predict(family: Family, models: Mapping[str, nn.Module], rows: list[int]) -> Tensor:
    """With the captions and latents of these samples."""
    side = 2 * family.size_step // family.pixels_per_latent
    latents = normal(1, len(CAPTIONS), family.latent_channels, side, side)[rows]
    captions = [CAPTIONS[row] for row in rows]
    tokens = {word: torch.from_numpy(held) for word, held in family.tokens(captions).items()}
    encoders = {name: model for name, model in models.items() if name != family.component}
    told = family.read_tokens(encoders, tokens)
    if family.wants_geometry:
        told["geometry"] = torch.tensor([[64.0, 64, 0, 8, 64, 64]]).expand(len(rows), -1)
    times = torch.tensor([100.0, 500.0, 900.0])[rows]
    flow = family.process.prediction == "flow"
    return family.predict(models[family.component], latents, times if flow else times.long(), told)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, "lora") for family in FAMILIES]
    + [("sd3" if n % 2 else "sdxl", kind) for n, kind in enumerate(NETWORKS[1:])],
)
def test_each_sample_goes_through_its_own_adapter(family: str, kind: str):
    base = open_tiny(family, **FAMILIES[family])
    models = {
        base.component: base.load_denoiser(dtype=torch.float64, device=CPU),
        **base.load_text_encoders(dtype=torch.float64, device=CPU),
    }
    adapters = adapters_for(kind, base, models)
    pack = Pack(adapters)
    attached = [Attachment(model, name, adapters[0]) for name, model in models.items()]

    def routed(through: Adapts | None) -> None:
        for attachment in attached:
            attachment.adapter = through

    index, strength = [2, 0, 1], [1.0, 0.5, 0.0]
    expected = []
    for row, (k, much) in enumerate(zip(index, strength, strict=True)):
        adapters[k].strength = much
        routed(adapters[k])
        expected.append(predict(base, models, [row]))
        if much:
            expected[-1].square().sum().backward()
    routed(None)
    plain = predict(base, models, [0, 1, 2])
    routed(pack)
    with pack.rows(index, strength):
        found = predict(base, models, [0, 1, 2])
        found.square().sum().backward()
    # float64 has 53 bits; timesteps and sizes are embedded in float32 either way.
    assert_close(found, torch.cat(expected), rtol=0, atol=1e-9)
    assert torch.equal(found[2], plain[2])
    assert float((found - plain)[:2].norm()) > 0.01 * float(plain[:2].norm())
    for k, adapter in enumerate(adapters):
        size = float(adapter.gradients.norm())
        assert float((pack.gradients[k] - adapter.gradients).norm()) <= 1e-7 * size
        assert (size > 0) == (k != 1)
