"""What is done to fit changes no number: each setting against the plain run, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import pytest
import torch
from bases import open_tiny
from placed_models import Tiny, open_placed
from torch import Tensor, nn

from raylora.families import Family
from raylora.memory.host import lies_on_host
from raylora.memory.setting import Setting

SETTINGS = {
    "none": Setting(),
    "mlp": Setting(checkpointing="mlp"),
    "alternate": Setting(checkpointing="alternate"),
    "all": Setting(checkpointing="all"),
    "streamed 0.3": Setting(streamed=0.3),
    "streamed 0.5": Setting(streamed=0.5),
    "streamed 1": Setting(streamed=1.0),
    "offload": Setting(checkpointing="all", offload=True),
    "offload alternate": Setting(checkpointing="alternate", offload=True),
    "mlp, streamed 0.5": Setting(checkpointing="mlp", streamed=0.5),
    "everything": Setting(checkpointing="all", streamed=1.0, offload=True),
    "alternate, streamed, offload": Setting("alternate", streamed=0.3, offload=True),
}
KINDS = ("sd15", "sdxl", "sd3", "flux1")


@cache
def opened(kind: str) -> Family:
    return open_tiny(kind)


@cache
def plain(kind: str, trains_text: bool = True) -> Mapping[str, Tensor]:
    """What comes out where nothing is placed: no setting was ever applied to these models."""
    tiny = open_placed(opened(kind), trains_text=trains_text)
    tiny.close()
    found = tiny.step()
    assert found["gradients"].any()
    return {**found, "look": tiny.look()}


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name


def device_bytes(model: nn.Module) -> int:
    """Of storages of weights that are not the host's."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
    return sum(one.nbytes() for one in storages.values() if not lies_on_host(one))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_gives_the_plain_run_s_bits_whatever_was_before(kind: str):
    tiny = open_placed(opened(kind))
    for word in (*SETTINGS, "streamed 0.3", "all", "everything", "none"):
        tiny.apply(SETTINGS[word])
        for name, tensor in {**tiny.step(), "look": tiny.look()}.items():
            assert torch.equal(tensor, plain(kind)[name]), (word, name)
    tiny.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_denoiser_alone_is_exact_too(kind: str):
    tiny = open_placed(opened(kind), trains_text=False, setting=SETTINGS["everything"])
    same(tiny.step(), plain(kind, trains_text=False))
    tiny.close()


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_bytes_leave_the_device(kind: str):
    tiny = open_placed(opened(kind))
    for component, placed in tiny.placed.items():
        model = tiny.denoiser if component == tiny.family.component else tiny.encoders[component]
        whole = device_bytes(model)
        assert placed.resident_bytes <= whole
        placed.apply(Setting(streamed=1.0))
        outside = device_bytes(model)
        assert placed.streamed_bytes > 0
        assert placed.streamed == tuple(range(len(placed.units)))
        assert outside <= whole - 0.99 * (placed.streamed_bytes - 256 * _tensors(placed.units))
        assert 0 < placed.ring_bytes <= 2 * placed.streamed_bytes
        placed.apply(Setting())
        assert (placed.streamed_bytes, placed.ring_bytes) == (0, 0)
        assert device_bytes(model) >= placed.resident_bytes
    tiny.close()


def _tensors(units: tuple[object, ...]) -> int:
    return sum(
        len([*unit.module.parameters(), *unit.module.buffers()])  # type: ignore[attr-defined]
        for unit in units
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_previews_are_the_same_with_everything_on_the_host(kind: str):
    drawn = []
    for setting in (Setting(), SETTINGS["everything"]):
        tiny = open_placed(opened(kind), setting=setting)
        drawn.append(_draw(tiny))
        same(tiny.step(), plain(kind))  # a preview leaves nothing behind
        assert np.array_equal(_draw(tiny), drawn[0])
        tiny.close()
    assert np.array_equal(*drawn)


def _draw(tiny: Tiny) -> np.ndarray:
    family = tiny.family
    side = 2 * family.size_step // family.pixels_per_latent
    latents = torch.linspace(-2, 2, family.latent_channels * side * side)
    renderer = family.load_renderer(
        tiny.denoiser, tiny.encoders, dtype=torch.float32, device=tiny.device
    )
    return renderer.render(
        "a cat",
        negative="",
        latents=latents.view(1, family.latent_channels, side, side),
        steps=2,
        guidance=3.0,
        sampler=family.usual_sampler,
    )


@pytest.mark.slow
@pytest.mark.parametrize("base", ["int8", "fp8"])
@pytest.mark.parametrize("kind", ["sdxl", "flux1"])
def test_units_in_fewer_bits_are_streamed_exactly(kind: str, base: str):
    resident = open_placed(opened(kind), base=base)  # type: ignore[arg-type]
    wanted = {**resident.step(), "look": resident.look()}
    assert not torch.equal(wanted["prediction"], plain(kind)["prediction"]), "they are held so"
    for word in ("streamed 0.5", "everything"):
        tiny = open_placed(opened(kind), base=base, setting=SETTINGS[word])  # type: ignore[arg-type]
        same({**tiny.step(), "look": tiny.look()}, wanted)
        tiny.apply(SETTINGS["alternate, streamed, offload"])
        same(tiny.step(), wanted)
        tiny.close()


@pytest.mark.parametrize("network", ["dora", "loha"])
def test_networks_that_read_the_frozen_weight_find_it(network: str):
    plainly = open_placed(opened("sd15"), network=network)
    wanted = plainly.step()
    tiny = open_placed(opened("sd15"), network=network, setting=SETTINGS["everything"])
    same(tiny.step(), wanted)
