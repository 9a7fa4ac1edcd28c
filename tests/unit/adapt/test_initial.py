"""Starting from a LoRA file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from adapters import SD15, kohya_name, random_module, raw_bytes
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from raylora.adapt import initial
from raylora.adapt.initial import Initial
from raylora.adapt.keys import Naming
from raylora.adapt.lora_file import (
    DOWN,
    UP,
    AdapterFile,
    AdapterModule,
    adapter_bytes,
    read_adapter,
)
from raylora.adapt.onto import onto
from raylora.base.errors import WeightsError
from raylora.base.site import Site
from raylora.networks import NetworkOptions, get_network
from raylora.networks.locon import LoconOptions
from raylora.networks.lora import LoraOptions

PROJ = Site("unet.mid_block.attentions.0.proj_in", "conv", 6, 4)
Q = Site("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "linear", 4, 5)
CONV = Site("unet.mid_block.resnets.0.conv1", "conv", 4, 7, (3, 3), (1, 1), (1, 1), role="residual")
TEXT = Site("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "linear", 8, 8)
SITES = [PROJ, Q, CONV, TEXT]


def module(site: Site, *, rank: int = 3, alpha: float = 1.5) -> AdapterModule:
    kernel = site.kernel if site.kind == "conv" else ()
    return random_module(site.name, (site.outputs, site.inputs, *kernel), rank=rank, alpha=alpha)


def file(*modules: AdapterModule, naming: Naming = "kohya") -> AdapterFile:
    return read_adapter(raw_bytes(modules, naming))


def initial_weights(
    held: AdapterFile,
    sites: list[Site],
    options: NetworkOptions,
    fresh: Callable[[Site], Any],
    every: list[Site] = SITES,
) -> Initial:
    return initial.initial_weights(held, sites, options, fresh, SD15, every)


def fresh(site: Site) -> dict[str, NDArray[np.float64]]:
    return {"down": np.full((3, site.inputs), 7.0), "up": np.zeros((site.outputs, 3))}


def delta(found: Initial, site: Site) -> NDArray[np.float64]:
    """scale · up · down, (O, I) or (O, I, kh, kw), from first weights."""
    down, up = found.weights[site.name]["down"], found.weights[site.name]["up"]
    return found.scales[site.name] * np.tensordot(up, down, 1)


def delta_of(held: AdapterFile, site: Site) -> NDArray[np.float64]:
    name = site.name if held.spelling == "diffusers" else kohya_name(site.name)
    return held.delta(name).numpy()


def assert_deltas(found: Initial, held: AdapterFile, sites: list[Site]) -> None:
    for site in sites:
        wanted = delta_of(held, site)
        if site.kernel == (1, 1):
            wanted = wanted.reshape(site.outputs, site.inputs)
        assert_allclose(delta(found, site), wanted, rtol=1e-13, atol=1e-17)


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_the_files_delta_is_kept_at_the_jobs_own_scale(naming: Naming) -> None:
    held = file(*[module(site) for site in SITES], naming=naming)
    options = LoconOptions(rank=3, alpha=12.0, conv_rank=3, conv_alpha=0.9)
    found = initial_weights(held, SITES, options, fresh)
    assert found.sites == SITES
    assert [found.scales[site.name] for site in SITES] == [4.0, 4.0, 0.9 / 3, 4.0]
    assert_deltas(found, held, SITES)
    for site in SITES:  # down is the file's, so that its length is what training goes on from
        down = onto(held, SITES, SD15.place)[0][site.name].tensors[DOWN].double().numpy()
        assert_allclose(found.weights[site.name]["down"].ravel(), down.ravel(), rtol=0, atol=0)
    assert found.weights[CONV.name]["down"].shape == (3, 4, 3, 3)
    assert found.weights[PROJ.name]["down"].shape == (3, 6)
    assert found.weights[PROJ.name]["up"].shape == (4, 3)


def test_layers_that_the_file_leaves_out_start_fresh() -> None:
    held = file(module(Q))
    found = initial_weights(held, [PROJ, Q], LoraOptions(rank=3), fresh)
    assert found.sites == [PROJ, Q]
    assert (found.weights[PROJ.name]["down"] == 7).all()
    assert_deltas(found, held, [Q])


def test_a_module_of_zeros_that_only_fills_the_file_starts_fresh() -> None:
    empty = module(Q)
    for part in (DOWN, UP):
        empty.tensors[part].zero_()
    found = initial_weights(file(empty, module(PROJ)), [PROJ, Q], LoraOptions(rank=3), fresh)
    assert (found.weights[Q.name]["down"] == 7).all()
    ranks = LoraOptions(initial="a.safetensors", initial_ranks=True)
    assert initial_weights(file(empty, module(PROJ)), [PROJ, Q], ranks, fresh).sites == [PROJ]
    # Nor does it matter where the job does not train the layer.
    assert initial_weights(file(empty, module(PROJ)), [PROJ], ranks, fresh).sites == [PROJ]


def test_ranks_scales_and_layers_come_from_the_file_when_asked() -> None:
    held = file(module(Q, rank=2, alpha=5.0), module(CONV, rank=1, alpha=0.25))
    options = LoraOptions(rank=16, initial="a.safetensors", initial_ranks=True)
    found = initial_weights(held, SITES, options, fresh)
    assert found.sites == [Q, CONV]
    assert found.scales == {Q.name: 2.5, CONV.name: 0.25}
    assert found.weights[Q.name]["down"].shape == (2, 4)
    assert_deltas(found, held, [Q, CONV])


def test_another_rank_than_the_jobs_is_refused() -> None:
    held = file(module(Q, rank=2), module(PROJ))
    with pytest.raises(WeightsError) as caught:
        initial_weights(held, [PROJ, Q], LoraOptions(rank=3), fresh)
    assert str(caught.value) == (
        f"network.initial has other ranks than this job at 1 layers: {Q.name} (rank 2, the job's "
        "is 3). Set network.initial_ranks: true in place of network.rank to take the file's, or "
        "set network.rank to them."
    )


@pytest.mark.parametrize("ranks", [False, True])
@pytest.mark.parametrize(
    ("left", "remedy"),
    [(TEXT, "network.train: both"), (CONV, "network.kind: locon"), (Q, "network.layers")],
)
def test_layers_that_the_job_does_not_train_are_refused_with_what_would_train_them(
    left: Site, remedy: str, ranks: bool
) -> None:
    options: dict[str, Any] = {"initial": "a.safetensors", "initial_ranks": True} if ranks else {}
    with pytest.raises(WeightsError, match=f"has 1 layers that this job .*{remedy}") as caught:
        initial_weights(
            file(module(PROJ), module(left)), [PROJ], LoraOptions(rank=3, **options), fresh
        )
    assert left.name in str(caught.value)


def test_a_file_for_another_base_is_refused() -> None:
    wider = Site(Q.name, "linear", 9, 5)
    with pytest.raises(WeightsError, match="a weight of 5 x 9, the base's of 5 x 4"):
        initial_weights(file(module(wider)), [Q], LoraOptions(rank=3), fresh)
    pointwise = Site(CONV.name, "conv", 4, 7)
    with pytest.raises(WeightsError, match="a weight of 7 x 4 x 1 x 1, the base's of 7 x 4 x 3"):
        initial_weights(file(module(pointwise)), [CONV], LoraOptions(rank=3), fresh)
    foreign = read_adapter(
        adapter_bytes([AdapterModule("lora_te2_a", module(Q).tensors)], {}, dtype=torch.float32)
    )
    with pytest.raises(
        WeightsError, match=r"^network.initial: the LoRA is for SDXL or .*, and the"
    ):
        initial_weights(foreign, [Q], LoraOptions(rank=3), fresh)


def test_tuckers_three_factors_begin_as_two_with_the_same_product() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "lora_down.weight": torch.randn(3, 4, 1, 1, generator=generator),
        "lora_mid.weight": torch.randn(3, 3, 3, 3, generator=generator),
        "lora_up.weight": torch.randn(7, 3, 1, 1, generator=generator),
        "alpha": torch.tensor(1.5),
    }
    name = kohya_name(CONV.name)
    held = read_adapter(adapter_bytes([AdapterModule(name, tensors)], {}, dtype=torch.float32))
    options = LoconOptions(rank=3, conv_rank=3, conv_alpha=3.0)
    found = initial_weights(held, [CONV], options, fresh)
    down, mid, up = (tensors[f"lora_{w}.weight"].double().numpy() for w in ("down", "mid", "up"))
    wanted = 0.5 * np.einsum("oa,abhw,bi->oihw", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    assert_allclose(delta(found, CONV), wanted, rtol=1e-12, atol=1e-14)


def test_another_kind_of_network_is_refused_with_what_would_take_it() -> None:
    halves = {f"hada_w{n}_{h}": torch.ones(5 if h == "a" else 3, 3 if h == "a" else 4)
              for n in "12" for h in "ab"}  # fmt: skip
    held = read_adapter(
        adapter_bytes([AdapterModule(kohya_name(Q.name), halves)], {}, dtype=torch.float32)
    )
    with pytest.raises(WeightsError, match=r"has loha at .*Set network\.kind: loha"):
        initial_weights(held, [Q], LoraOptions(rank=3), fresh)
    found = initial_weights(held, [Q], get_network("loha").options(rank=3), fresh)
    assert {word: array.shape for word, array in found.weights[Q.name].items()} == {
        word: tuple(half.shape) for word, half in halves.items()
    }
    with pytest.raises(WeightsError, match=r"of 1 at .* the job of 2"):
        initial_weights(held, [Q], get_network("loha").options(rank=3, alpha=6.0), fresh)


def written(options: NetworkOptions, site: Site) -> AdapterFile:
    """A file of one layer, as a network with these options trains it."""
    network = get_network(options.kind)

    def draw(shape: tuple[int, ...]) -> NDArray[np.float64]:
        return np.random.default_rng(0).uniform(-1, 1, shape)

    drawn = network.initial(options, site, draw, lambda: draw((site.outputs, site.inputs)))
    parameters = {word: torch.from_numpy(array) + 0.1 for word, array in drawn.items()}
    parameters.pop("norm_gradient", None)
    exported = network.export(parameters, site, options.scale_at(site))
    one = AdapterModule(kohya_name(site.name), exported)
    return read_adapter(adapter_bytes([one], {}, dtype=torch.float32))


WIDE = Site(Q.name, "linear", 64, 64)


@pytest.mark.parametrize(
    ("kind", "of_file", "of_job"),
    [
        ("lokr", {"factor": 4}, {"factor": 8}),
        ("lokr", {"rank": 2}, {"rank": 2, "decompose_both": True}),
        ("dora", {}, {"axis": "input"}),
        ("oft", {"rank": 8}, {"rank": 4}),
        ("oft", {}, {"rescale": True}),
        ("lycoris", {"algo": "ia3"}, {"algo": "ia3", "on_input": True}),
        ("lycoris", {"algo": "ia3"}, {"algo": "full"}),
    ],
)
def test_a_file_of_another_form_than_the_jobs_is_refused(
    kind: str, of_file: dict[str, Any], of_job: dict[str, Any]
) -> None:
    make = get_network(kind).options
    held = written(make(kind=kind, **of_file), WIDE)
    same = initial_weights(held, [WIDE], make(kind=kind, **of_file), lambda site: {}, [WIDE])
    assert set(same.weights) == {WIDE.name}
    with pytest.raises(WeightsError, match=r"another form of|network\.algo is full"):
        initial_weights(held, [WIDE], make(kind=kind, **of_job), lambda site: {}, [WIDE])


@pytest.mark.parametrize("ranks", [False, True])
def test_what_no_file_has_is_as_the_job_says(ranks: bool) -> None:
    make = get_network("dora").options
    held = written(make(kind="dora"), WIDE)
    words: dict[str, Any] = {"initial": "a.safetensors", "initial_ranks": True} if ranks else {}
    options = make(kind="dora", norm_gradient=True, **words)
    found = initial_weights(
        held, [WIDE], options, lambda site: {"norm_gradient": np.ones(1)}, [WIDE]
    )
    assert "norm_gradient" in found.weights[WIDE.name]
