"""Diffusion transformers: where layers are, how many there are, and what is not rounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from bases import random_folder
from diffusers.image_processor import VaeImageProcessor

from raylora.base.errors import WeightsError
from raylora.base.site import Place, Site
from raylora.components.dit import (
    About,
    FlowRenderer,
    Unrounded,
    about_layer,
    dit_sites,
    empty_dit,
    part_of_joined,
)
from raylora.weights.base import Base, open_base

CLASSES = {"sd35": ("sd3", "SD3Transformer2DModel"), "flux1": ("flux1", "FluxTransformer2DModel")}
DOUBLES = {"sd35": 3, "flux1": 1}


def tiny(kind: str) -> tuple[Base, str]:
    family, name = CLASSES[kind]
    return open_base(str(random_folder(kind)), kind=family), name


def sites_of(kind: str, change: Callable[[Any], None] = lambda model: None) -> dict[str, Site]:
    model = empty_dit(*tiny(kind))
    change(model)
    found = dit_sites(model, section="double", doubles=DOUBLES[kind])
    return {site.name.removeprefix("transformer."): site for site in found}


def test_layers_are_told_by_block():
    assert about_layer("transformer_blocks.7.attn.to_q", section="joint") == About(
        "joint", 7, "attn.to_q"
    )
    assert about_layer("single_transformer_blocks.11.proj_out", section="double") == About(
        "single", 11, "proj_out"
    )
    assert about_layer("proj_out", section="joint") == About("", 0, "proj_out")


@pytest.mark.parametrize(
    ("kind", "path", "role", "section", "number", "block"),
    [
        ("flux1", "transformer_blocks.0.attn.add_q_proj", "attention", "double", 0, 0),
        ("flux1", "transformer_blocks.0.ff_context.net.2", "mlp", "double", 0, 0),
        ("flux1", "transformer_blocks.0.norm1_context.linear", "modulation", "double", 0, 0),
        ("flux1", "single_transformer_blocks.1.attn.to_v", "attention", "single", 1, 2),
        ("flux1", "single_transformer_blocks.1.proj_mlp", "mlp", "single", 1, 2),
        ("flux1", "single_transformer_blocks.1.proj_out", "mlp", "single", 1, 2),
        ("flux1", "single_transformer_blocks.0.norm.linear", "modulation", "single", 0, 1),
        ("flux1", "single_transformer_blocks.0.attn.norm_q", "norm", "single", 0, 1),
        ("flux1", "time_text_embed.guidance_embedder.linear_1", "embedder", "", 0, None),
        ("flux1", "proj_out", "embedder", "", 0, None),
        ("sd35", "transformer_blocks.0.attn2.to_out.0", "attention", "double", 0, 0),
        ("sd35", "transformer_blocks.2.attn.norm_added_k", "norm", "double", 2, 2),
        ("sd35", "norm_out.linear", "embedder", "", 0, None),
        ("sd35", "pos_embed.proj", "embedder", "", 0, None),
    ],
)
def test_sites_say_what_and_where_they_are(
    kind: str, path: str, role: str, section: str, number: int, block: int | None
):
    site = sites_of(kind)[path]
    assert (site.role, site.section, site.number, site.block) == (role, section, number, block)


def test_the_patches_of_sd3_are_a_convolution():
    site = sites_of("sd35")["pos_embed.proj"]
    assert (site.kind, site.kernel, site.stride) == ("conv", (2, 2), (2, 2))


@pytest.mark.parametrize("kind", list(CLASSES))
def test_a_library_that_builds_other_layers_is_told(kind: str):
    def drop(model: Any) -> None:
        del model.transformer_blocks[0].ff.net[2]

    with pytest.raises(WeightsError, match=r"the transformer has \d+ layers .* config means"):
        sites_of(kind, drop)


def test_parts_of_a_joined_layer_lie_one_behind_the_other():
    widths = (3, 3, 3, 12)
    places = [part_of_joined("x.linear1", i, widths) for i in range(4)]
    assert [place.rows for place in places] == [(0, 3, 21), (3, 6, 21), (6, 9, 21), (9, 21, 21)]
    assert {place.kohya for place in places} == {"lora_unet_x_linear1"}
    assert Place("lora_unet", "x.linear1", (0, 3, 21)) == places[0]


def test_what_is_not_to_be_rounded_is_not():
    value = torch.tensor([0.9013])
    assert Unrounded(value).to(torch.bfloat16) is value


def test_a_negative_prompt_is_not_read_where_nothing_looks_at_it():
    class Pipeline:
        """What a renderer asks of a pipeline of diffusers'."""

        vae_scale_factor = 2
        scheduler: Any = type("Scheduler", (), {"config": {}})
        image_processor = VaeImageProcessor()
        asked: dict[str, Any]

        def set_progress_bar_config(self, disable: bool) -> None:
            assert disable

        def __call__(self, **words: Any) -> Any:
            self.asked = words
            return type("Output", (), {"images": words["latents"]})

    class Prompts:
        def read(self, prompts: Sequence[str]) -> None:
            pass

        def of(self, prompt: str) -> dict[str, torch.Tensor]:
            read_of.append(prompt)
            return {"text": torch.zeros(1, 2, 3), "pooled": torch.zeros(1, 3)}

    class Decoder:
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return torch.full((1, 3, *(2 * side for side in latents.shape[2:])), 2.0)

    read_of: list[str] = []
    pipeline = Pipeline()
    parts: Any = (pipeline, Prompts(), Decoder())
    renderer = FlowRenderer(
        *parts,
        lambda asked: {"scale": asked.guidance, "latents": asked.latents},
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    for guidance in (1.0, 1.5):
        picture = renderer.render(
            "yes", negative="no", latents=torch.zeros(1, 16, 2, 3), steps=2, guidance=guidance
        )
        assert picture.shape == (4, 6, 3)
        assert (picture == 255).all(), "what is too bright is white"
        assert (pipeline.asked["height"], pipeline.asked["width"]) == (4, 6)
        assert pipeline.asked["scale"] == guidance
        assert ("negative_prompt_embeds" in pipeline.asked) is (guidance > 1)
    assert read_of == ["yes", "yes", "no"]
