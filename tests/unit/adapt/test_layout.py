"""Files of families that join layers: what is written, and what each reader makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapters import file_bytes, random_module
from safetensors.torch import load
from torch.testing import assert_close

from raylora.adapt.deltas import delta, delta_distance, delta_norm
from raylora.adapt.diffusers_reader import is_padded, read_with_diffusers
from raylora.adapt.keys import Naming
from raylora.adapt.kinds import DORA
from raylora.adapt.lora_file import ALPHA, DOWN, UP, AdapterModule, read_adapter
from raylora.adapt.onto import Names, onto
from raylora.base.errors import ExportError
from raylora.base.site import Place, Site

WIDE = 64
"""Of the transformer; FLUX has 3072."""
DOUBLE = "transformer.transformer_blocks.0.attn"
SINGLE = "transformer.single_transformer_blocks.1"
Q, K, V = (f"{DOUBLE}.to_{one}" for one in "qkv")
SQ, SK, SV = (f"{SINGLE}.attn.to_{one}" for one in "qkv")
MLP, LAST, CLIP = (
    f"{SINGLE}.proj_mlp",
    "transformer.norm_out.linear",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
)
OUT = CLIP.replace("q_proj", "out_proj")
JOINED = "lora_unet_double_blocks_0_img_attn_qkv"
PLACES = {
    **{
        name: Place(
            "lora_unet", "double_blocks.0.img_attn.qkv", (i * WIDE, (i + 1) * WIDE, 3 * WIDE)
        )
        for i, name in enumerate((Q, K, V))
    },
    **{
        name: Place("lora_unet", "single_blocks.1.linear1", (i * WIDE, (i + 1) * WIDE, 7 * WIDE))
        for i, name in enumerate((SQ, SK, SV))
    },
    MLP: Place("lora_unet", "single_blocks.1.linear1", (3 * WIDE, 7 * WIDE, 7 * WIDE)),
    f"{DOUBLE}.to_out.0": Place("lora_unet", "double_blocks.0.img_attn.proj"),
    LAST: Place("lora_unet", "final_layer.adaLN_modulation.1", halves_swapped=True),
    CLIP: Place("lora_te1", "text_model.encoder.layers.0.self_attn.q_proj"),
    OUT: Place("lora_te1", "text_model.encoder.layers.0.self_attn.out_proj"),
}
FLUX = Names(
    "flux1", PLACES.__getitem__, {"num_attention_heads": 4, "attention_head_dim": WIDE // 4}
)
WIDTHS = {MLP: 4 * WIDE, LAST: 2 * WIDE}
SITES = [Site(name, "linear", WIDE, WIDTHS.get(name, WIDE)) for name in PLACES]
NAMINGS: tuple[Naming, ...] = ("kohya", "comfyui", "diffusers")


def made(*names: str, rank: int = 4, alpha: float = 2.0) -> list[AdapterModule]:
    return [
        random_module(name, (WIDTHS.get(name, WIDE), WIDE), rank=rank, alpha=alpha, seed=seed)
        for seed, name in enumerate(names)
    ]


CASES: dict[str, list[AdapterModule]] = {
    "all of one rank": made(*PLACES),
    "q and v alone": made(Q, V),
    "k alone": made(K),
    "single without its MLP": made(SQ, SK, SV),
    "unequal ranks": [*made(Q, rank=2), *made(K, rank=5), *made(V, rank=3)],
    "unequal alphas": [*made(Q, alpha=1.0), *made(K, alpha=7.0), *made(V, alpha=1.0)],
    "one a rank of nine": [*made(SQ, rank=1), *made(SK, rank=9), *made(MLP, rank=2)],
}


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("case", CASES)
def test_what_was_written_is_read_back_layer_by_layer(case: str, naming: Naming) -> None:
    modules = CASES[case]
    file = read_adapter(file_bytes(modules, names=FLUX, naming=naming))
    found, left = onto(file, SITES, FLUX.place)
    assert left == []
    assert set(found) == {module.name for module in modules}
    for module in modules:
        wanted = delta(*module.low_rank)
        # Halves folded in float64 and rounded to float32 once each.
        limit = 3e-7 * float(wanted.abs().max())
        assert_close(delta(*found[module.name].low_rank), wanted, rtol=0, atol=limit)
        assert found[module.name].rank == module.rank


@pytest.mark.slow
@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("case", CASES)
def test_diffusers_reader_gives_each_part_exactly_the_trained_change(
    case: str, naming: Naming, tmp_path: Path
) -> None:
    modules = [module for module in CASES[case] if naming == "diffusers" or module.name != LAST]
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_bytes(modules, names=FLUX, naming=naming))
    reading = read_with_diffusers(path, FLUX, read_adapter(path))
    assert reading.problems == []
    for module in modules:
        wanted = delta(*module.low_rank)
        limit = 1e-6 * float(wanted.abs().max())
        assert_close(delta(*reading.modules[module.name]), wanted, rtol=0, atol=limit)
    # Parts that were not trained come as zeros, or not at all.
    for name in set(reading.modules) - {module.name for module in modules}:
        assert not delta(*reading.modules[name]).any()


def test_ups_lie_on_the_diagonal_and_alpha_grows_with_the_rank() -> None:
    q, k, v = modules = made(Q, K, V)
    file = load(file_bytes(modules, names=FLUX))
    assert set(file) == {f"{JOINED}.{word}" for word in (DOWN, UP, ALPHA)}
    assert file[f"{JOINED}.{ALPHA}"] == 3 * 2.0
    assert torch.equal(
        file[f"{JOINED}.{DOWN}"], torch.cat([one.tensors[DOWN] for one in (q, k, v)])
    )
    wanted = torch.block_diag(*(one.tensors[UP] for one in (q, k, v)))
    assert torch.equal(file[f"{JOINED}.{UP}"], wanted)


def test_a_missing_part_is_rows_of_zeros() -> None:
    file = load(file_bytes(made(Q, V), names=FLUX))
    up = file[f"{JOINED}.{UP}"]
    assert up.shape == (3 * WIDE, 8)
    assert file[f"{JOINED}.{ALPHA}"] == 2 * 2.0
    assert not up[WIDE : 2 * WIDE].any()


def test_halves_that_the_makers_have_in_the_other_order_are_turned() -> None:
    (module,) = made(LAST)
    file = load(file_bytes([module], names=FLUX))
    up = file[f"lora_unet_final_layer_adaLN_modulation_1.{UP}"]
    first, second = module.tensors[UP].chunk(2)
    assert torch.equal(up, torch.cat([second, first]))


def test_each_naming_has_its_own_names() -> None:
    modules = made(Q, OUT)
    clip = "text_model.encoder.layers.0.self_attn.out_proj"
    wanted = {
        "kohya": {JOINED, f"lora_te1_{clip.replace('.', '_')}"},
        "comfyui": {"diffusion_model.double_blocks.0.img_attn.qkv",
                    f"text_encoders.clip_l.transformer.{clip}"},
        "diffusers": {Q, f"text_encoder.{clip}"},
    }  # fmt: skip
    for naming in NAMINGS:
        file = read_adapter(file_bytes(modules, names=FLUX, naming=naming))
        assert set(file.modules) == wanted[naming]


def loha(name: str) -> AdapterModule:
    generator = torch.Generator().manual_seed(0)
    halves = {
        f"hada_w{n}_{h}": torch.randn(*((WIDE, 2) if h == "a" else (2, WIDE)), generator=generator)
        for n in "12"
        for h in "ab"
    }
    return AdapterModule(name, {**halves, ALPHA: torch.tensor(1.0)})


def dora(name: str) -> AdapterModule:
    (plain,) = made(name)
    return AdapterModule(name, {**plain.tensors, DORA: torch.ones(WIDE, 1)})


@pytest.mark.parametrize("kind", [loha, dora])
@pytest.mark.parametrize("naming", ["kohya", "comfyui"])
def test_what_cannot_be_joined_keeps_its_layers_apart_under_lycoris_names(
    kind: Callable[[str], AdapterModule], naming: Naming
) -> None:
    modules = [kind(name) for name in (Q, K, f"{DOUBLE}.to_out.0", CLIP)]
    file = read_adapter(file_bytes(modules, names=FLUX, naming=naming))
    assert {name for name in file.modules if name.startswith("lycoris_")} == {
        f"lycoris_transformer_blocks_0_attn_{layer}" for layer in ("to_q", "to_k", "to_out_0")
    }
    found, left = onto(file, SITES, FLUX.place)
    assert left == []
    for module in modules:
        for word, tensor in module.tensors.items():
            assert torch.equal(found[module.name].tensors[word], tensor)


def test_names_that_no_program_reads_are_refused() -> None:
    with pytest.raises(ExportError, match="diffusers has no names for loha"):
        file_bytes([loha(Q)], names=FLUX, naming="diffusers")
    (plain,) = made(Q)
    lengths = AdapterModule(Q, {**plain.tensors, DORA: torch.ones(1, WIDE)})
    wide = AdapterModule(Q, {**lengths.tensors, DORA: torch.ones(1, WIDE + 1)})
    with pytest.raises(ExportError, match="lengths by inputs"):
        file_bytes([wide], names=FLUX, naming="diffusers")
    with pytest.raises(ExportError, match="ComfyUI reads kohya's names for sd15"):
        file_bytes([random_module("unet.a", (3, 4))], naming="comfyui")


@pytest.mark.slow
@pytest.mark.parametrize("naming", ["kohya", "comfyui"])
def test_layers_as_wide_as_flux_are_read_by_diffusers_as_they_are(
    naming: Naming, tmp_path: Path
) -> None:
    wide, factor = 3072, 3072 // WIDE
    places = {
        name: replace(place, rows=place.rows and tuple(factor * row for row in place.rows))
        for name, place in PLACES.items()
    }
    names = Names(
        "flux1", places.__getitem__, {"num_attention_heads": 24, "attention_head_dim": 128}
    )
    modules = [
        random_module(name, (WIDTHS.get(name, WIDE) * factor, wide), rank=2, alpha=1.0, seed=seed)
        for seed, name in enumerate((Q, K, V, SQ, SV, MLP))
    ]
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_bytes(modules, names=names, naming=naming))
    file = read_adapter(path)
    assert not is_padded(file, names)
    reading = read_with_diffusers(path, names, file)
    for module in modules:
        error = delta_distance(reading.modules[module.name], module.low_rank)
        assert error <= 1e-6 * delta_norm([module.low_rank])
