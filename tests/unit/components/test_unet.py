"""A UNet's layers: how many its config means, what each does, and SDXL's makers' names."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from true_configs import SD2_UNET, SD15_UNET, SDXL_UNET, Configured

from raylora.base.errors import WeightsError
from raylora.components.unet import (
    empty_unet,
    load_unet,
    residual_layers,
    sgm_block,
    sgm_path,
    transformer_layers,
    unet_sites,
)

TINY_XL: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "attention_head_dim": (2, 4),
    "block_out_channels": (32, 64),
    "cross_attention_dim": 64,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "projection_class_embeddings_input_dim": 80,
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
}
# The way up samples behind a block without attention first, as SDXL never does.
EARLY: dict[str, Any] = {
    **TINY_XL,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


@cache
def unet_of(name: str) -> nn.Module:
    configs = {
        "sd15": SD15_UNET,
        "sd2": SD2_UNET,
        "sdxl": SDXL_UNET,
        "tiny": TINY_XL,
        "early": EARLY,
    }
    return empty_unet(Configured({"unet": configs[name]}))


@pytest.mark.parametrize(
    ("config", "inner", "residual"),
    [(SD15_UNET, 192, 86), (SD2_UNET, 192, 86), (SDXL_UNET, 722, 66)],
)
def test_a_config_means_a_number_of_layers(config: dict[str, Any], inner: int, residual: int):
    assert transformer_layers(config) == inner
    assert residual_layers(config) == residual


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl", "tiny"])
def test_every_layer_is_listed_with_what_it_does(name: str):
    unet = unet_of(name)
    sites = unet_sites(unet, lambda path: None)
    listed = {site.name.partition(".")[2]: site for site in sites}
    assert len(listed) == len(sites)
    with_weights = {
        path for path, module in unet.named_modules() if list(module.parameters(recurse=False))
    }
    assert set(listed) == with_weights
    rules = [
        (r".*\.attn[12]\.to_", "attention"),
        (r".*\.ff\.net\.", "mlp"),
        (r".*\.attentions\.\d+\.proj_(in|out)$", "projection"),
        (r".*\.(conv[12]?|conv_shortcut|time_emb_proj)$", "residual"),
        (r"conv_(in|out)$|(time|add)_embedding\.linear_[12]$", "embedder"),
        (r".*norm", "norm"),
    ]
    for path, site in listed.items():
        role = next(role for rule, role in rules if re.match(rule, path))
        assert site.role == role, path
        layer: Any = unet.get_submodule(path)
        assert (site.kind == "norm") == (role == "norm")
        if site.kind != "norm":
            assert [site.outputs, site.inputs] == list(layer.weight.shape[:2])
        else:
            assert [site.outputs] == list(layer.weight.shape)
        section = re.match(r"(down|mid|up)_block(?:s\.(\d+))?", path)
        assert site.section == (section[1] if section else "")
        assert site.number == int((section and section[2]) or 0)


def test_a_unet_without_a_layer_is_noticed():
    unet = empty_unet(Configured({"unet": TINY_XL}))
    unet.mid_block.attentions[0].proj_in = nn.Identity()  # type: ignore[union-attr, index, operator]
    with pytest.raises(WeightsError, match="UNet has 87 layers to train, and its config means 88"):
        unet_sites(unet, lambda path: None)
    unet = empty_unet(Configured({"unet": TINY_XL}))
    unet.mid_block.resnets[0].conv1 = nn.Identity()  # type: ignore[union-attr, index, operator]
    with pytest.raises(
        WeightsError, match="UNet has 118 layers to train, and its config means 119"
    ):
        unet_sites(unet, lambda path: None)


def sgm(path: str, config: dict[str, Any]) -> str:
    attended = ["CrossAttn" in block for block in config["up_block_types"]]
    return sgm_path(path, deep=config["layers_per_block"], attended=attended)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config"), [("sdxl", SDXL_UNET), ("tiny", TINY_XL), ("early", EARLY)]
)
def test_the_makers_names_are_those_that_diffusers_converts(name: str, config: dict[str, Any]):
    """Through diffusers' reader of single-file checkpoints, each weight comes back to its name."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    parameters = list(unet_of(name).state_dict())
    checkpoint = {}
    for number, parameter in enumerate(parameters):
        path, _, word = parameter.rpartition(".")
        # its size tells it apart
        held = torch.empty(number, device="meta")
        checkpoint[f"model.diffusion_model.{sgm(path, config)}.{word}"] = held
    assert len(checkpoint) == len(parameters)
    read = convert_ldm_unet_checkpoint(checkpoint, {**unet_of(name).config})
    assert {key: len(held) for key, held in read.items()} == {
        parameter: number for number, parameter in enumerate(parameters)
    }


@pytest.mark.parametrize(("config", "place"), [(TINY_XL, 2), (EARLY, 1), (SDXL_UNET, 2)])
def test_a_sampler_follows_what_its_block_has(config: dict[str, Any], place: int):
    """The makers' blocks are lists: a residual block, attention where there is one, a sampler."""
    last = config["layers_per_block"]
    found = sgm("up_blocks.0.upsamplers.0.conv", config)
    assert found == f"output_blocks.{last}.{place}.conv"


@pytest.mark.slow
def test_blocks_are_counted_as_sd_scripts_counts_them():
    sites = unet_sites(unet_of("sdxl"), lambda path: sgm_block(sgm(path, SDXL_UNET)))
    held = Counter(site.block for site in sites if site.role in ("attention", "mlp", "projection"))
    deep, shallow = 102, 22
    expected = {5: shallow, 6: shallow, 8: deep, 9: deep, 11: deep}
    expected |= {13: deep, 14: deep, 15: deep, 16: shallow, 17: shallow, 18: shallow}
    assert held == expected
    ends = {site.name: site.block for site in sites if site.role == "embedder"}
    assert ends == {
        "unet.time_embedding.linear_1": 0,
        "unet.time_embedding.linear_2": 0,
        "unet.add_embedding.linear_1": 0,
        "unet.add_embedding.linear_2": 0,
        "unet.conv_in": 1,
        "unet.conv_out": 22,
    }
    assert {site.block for site in sites} == set(range(23))


class Weighted(Configured):
    """A UNet with weights."""

    def __init__(self, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
        super().__init__({"unet": config})
        self._weights = weights

    def weights(self, component: str) -> dict[str, torch.Tensor]:
        assert component == "unet"
        return self._weights


@pytest.mark.slow
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_our_attention_is_that_of_diffusers(linear: bool, dtype: torch.dtype):
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    config = {**TINY_XL, "addition_embed_type": None, "use_linear_projection": linear}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = UNet2DConditionModel(**config).state_dict()
        noisy, text = torch.randn(2, 4, 8, 12).to(dtype), torch.randn(2, 77, 64).to(dtype)
    base, cpu = Weighted(config, weights), torch.device("cpu")
    timesteps = torch.tensor([3, 800])
    with torch.no_grad():
        plain, ours = (
            load_unet(base, dtype=dtype, device=cpu, plain=plain)(noisy, timesteps, text).sample
            for plain in (True, False)
        )
    assert_close(ours, plain, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)
