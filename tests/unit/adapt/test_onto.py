"""Every program's names for one layer."""

from __future__ import annotations

import pytest
import torch
from adapters import kohya_name, random_module, sd15_place
from torch import Tensor

from raylora.adapt.lora_file import ALPHA, DOWN, UP, AdapterModule, adapter_bytes, read_adapter
from raylora.adapt.onto import check_sizes, onto, refuse_left
from raylora.base.errors import WeightsError
from raylora.base.site import Place, Site

QUERY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CLIP = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
SECOND = CLIP.replace("text_encoder", "text_encoder_2")
SITES = [Site(QUERY, "linear", 5, 3), Site(CLIP, "linear", 5, 3)]
PATH = QUERY.removeprefix("unet.")


def place(name: str) -> Place:
    """As SDXL has them: the UNet by other names than diffusers'."""
    component, _, path = name.partition(".")
    if component == "unet":
        path = path.replace("mid_block.attentions.0", "middle_block.1")
        return Place("lora_unet", path)
    return Place({"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[component], path)


def found_in(name: str, sites: list[Site] = SITES) -> tuple[set[str], list[str]]:
    halves = {DOWN: torch.ones(2, 5), UP: torch.ones(3, 2)}
    file = read_adapter(adapter_bytes([AdapterModule(name, halves)], {}, dtype=torch.float32))
    modules, left = onto(file, sites, place)
    assert all(module.name == site for site, module in modules.items())
    return set(modules), left


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q", QUERY),
        ("diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q", QUERY),
        (QUERY, QUERY),
        (f"base_model.model.{PATH}", QUERY),
        (f"lycoris_{PATH.replace('.', '_')}", QUERY),
        (f"lora_transformer_{PATH.replace('.', '_')}", QUERY),
        (f"lora_unet_{PATH.replace('.', '_')}", QUERY),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", CLIP),
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1", CLIP),
        (CLIP, CLIP),
        (CLIP.replace("text_model.", ""), CLIP),
        ("base_model.model.text_model.encoder.layers.0.mlp.fc1", CLIP),
        ("base_model.model.encoder.layers.0.mlp.fc1", CLIP),
    ],
)
def test_a_layer_is_found_by_every_programs_name(name: str, site: str) -> None:
    assert found_in(name) == ({site}, [])


def test_a_name_that_two_encoders_share_is_nobodys() -> None:
    name = "base_model.model.text_model.encoder.layers.0.mlp.fc1"
    assert found_in(name, [*SITES, Site(SECOND, "linear", 5, 3)]) == (set(), [name])


def test_what_is_for_no_layer_is_told_unless_it_changes_nothing() -> None:
    _, left = found_in("lora_unet_elsewhere")
    with pytest.raises(WeightsError, match="no such layer for 1 modules of the file: lora_unet_el"):
        refuse_left(left)
    empty = {DOWN: torch.zeros(2, 5), UP: torch.zeros(3, 2)}
    data = adapter_bytes([AdapterModule("lora_unet_elsewhere", empty)], {}, dtype=torch.float32)
    assert onto(read_adapter(data), SITES, place) == ({}, [])


def test_a_layer_by_two_names_is_refused() -> None:
    modules = [
        AdapterModule(name, random_module(QUERY, (3, 5)).tensors)
        for name in (kohya_name(QUERY), f"lycoris_{PATH.replace('.', '_')}")
    ]
    file = read_adapter(adapter_bytes(modules, {}, dtype=torch.float32))
    with pytest.raises(WeightsError, match="twice, by two names"):
        onto(file, SITES, sd15_place)


LINEAR = Site("a", "linear", 8, 12)
CONV = Site("a", "conv", 8, 12, kernel=(3, 3))
POINT = Site("a", "conv", 8, 12)
NORM = Site("a", "norm", 12, 12, role="norm")
SIZED: list[tuple[dict[str, Tensor], Site, Site]] = [
    ({DOWN: torch.ones(2, 8), UP: torch.ones(12, 2), ALPHA: torch.ones(())}, LINEAR, CONV),
    ({DOWN: torch.ones(2, 8), UP: torch.ones(12, 2)}, POINT, CONV),
    ({DOWN: torch.ones(2, 8, 3, 3), UP: torch.ones(12, 2, 1, 1)}, CONV, POINT),
    ({f"hada_w{n}_{h}": torch.ones((12, 2) if h == "a" else (2, 72)) for n in "12" for h in "ab"},
     CONV, LINEAR),
    ({"lokr_w1": torch.ones(3, 2), "lokr_w2": torch.ones(4, 4, 3, 3)}, CONV, LINEAR),
    ({"lokr_w1": torch.ones(3, 2), "lokr_w2_a": torch.ones(4, 1), "lokr_w2_b": torch.ones(1, 36)},
     CONV, LINEAR),
    ({"lokr_w1": torch.ones(3, 2), "lokr_t2": torch.ones(1, 1, 3, 3),
      "lokr_w2_a": torch.ones(1, 4), "lokr_w2_b": torch.ones(1, 4)}, CONV, LINEAR),
    ({"oft_blocks": torch.ones(4, 3, 3)}, CONV, Site("a", "linear", 8, 16)),
    ({"oft_blocks": torch.ones(3, 4, 3, 3)}, LINEAR, Site("a", "linear", 8, 16)),
    ({"a1.weight": torch.ones(8, 2), "a2.weight": torch.ones(2, 8), "b1.weight": torch.ones(12, 2),
      "b2.weight": torch.ones(2, 8)}, LINEAR, CONV),
    ({"weight": torch.ones(8), "on_input": torch.ones(())}, CONV, Site("a", "linear", 12, 12)),
    ({"weight": torch.ones(12), "on_input": torch.zeros(())}, CONV, Site("a", "conv", 8, 6)),
    ({"diff": torch.ones(12, 8)}, LINEAR, CONV),
    ({"w_norm": torch.ones(12)}, NORM, Site("a", "norm", 8, 8)),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "site", "other"), SIZED)
def test_a_module_for_a_layer_of_another_size_is_refused(
    tensors: dict[str, Tensor], site: Site, other: Site
) -> None:
    module = AdapterModule("a", tensors)
    check_sizes(module, site)
    with pytest.raises(WeightsError, match=r"the file's layer has a weight of .*, the base's of"):
        check_sizes(module, other)


def rows(first: int, end: int) -> Place:
    return Place("lora_unet", "qkv", (first, end, 9))


def cut(**tensors: Tensor) -> dict[str, AdapterModule]:
    """What a module that joins q, k and v of three outputs each is for them apart."""
    places = {"unet.q": rows(0, 3), "unet.k": rows(3, 6), "unet.v": rows(6, 9)}
    sites = [Site(name, "linear", 5, 3) for name in places]
    words = {word.replace("__", "."): tensor for word, tensor in tensors.items()}
    file = read_adapter(
        adapter_bytes([AdapterModule("lora_unet_qkv", words)], {}, dtype=torch.float32)
    )
    found, left = onto(file, sites, places.__getitem__)
    assert not left
    return found


def test_a_joined_module_is_cut_with_each_parts_own_ranks_at_the_same_strength() -> None:
    down, up = torch.randn(6, 5), torch.zeros(9, 6)
    up[0:3, 0:2], up[3:6, 2:6] = torch.randn(3, 2), torch.randn(3, 4)
    found = cut(lora_down__weight=down, lora_up__weight=up, alpha=torch.tensor(3.0))
    assert set(found) == {"unet.q", "unet.k"}, "the third part changes nothing"
    for name, ranks in (("unet.q", slice(0, 2)), ("unet.k", slice(2, 6))):
        own_down, own_up, scale = found[name].low_rank
        first = 0 if name == "unet.q" else 3
        assert torch.equal(own_down, down[ranks])
        assert torch.equal(own_up, up[first : first + 3, ranks])
        assert scale == 0.5


def test_a_joined_modules_lengths_are_cut_by_rows_too() -> None:
    lengths = torch.arange(1.0, 10).view(9, 1)
    found = cut(
        lora_down__weight=torch.randn(2, 5),
        lora_up__weight=torch.randn(9, 2),
        alpha=torch.tensor(2.0),
        dora_scale=lengths,
    )
    assert torch.equal(found["unet.k"].tensors["dora_scale"].float(), lengths[3:6])
