from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import originals
import pytest
import torch
from bases import random_folder
from torch import Tensor

from raylora.base.errors import WeightsError
from raylora.weights.base import Base, open_base

KINDS = {
    "sd15": "sd15",
    "sd2": "sd2",
    "sdxl": "sdxl",
    "sd3": "sd3",
    "sd35": "sd3",
    "flux1": "flux1",
    "schnell": "flux1",
}
MODELS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


def opened(word: str, path: str, **parts: str) -> Base:
    """A checkpoint with the configs of the tiny base that it was made of."""
    return open_base(path, kind=KINDS[word], parts={"config": str(random_folder(word)), **parts})


def other_parts(word: str) -> dict[str, str]:
    """What FLUX's file has not: from the folder."""
    names = ("vae", "text_encoder", "text_encoder_2") if KINDS[word] == "flux1" else ()
    return {name: str(random_folder(word) / name) for name in names}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Level or not: transformers reads both."""
    bare = {name.removeprefix("text_model."): one for name, one in found.items()}
    wanted = {name.removeprefix("text_model."): one for name, one in expected.items()}
    assert bare.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(bare[name], tensor), name


@pytest.mark.parametrize("word", KINDS)
def test_a_checkpoint_has_the_weights_of_the_folder_it_was_made_of(word: str, tmp_path: Path):
    folder = random_folder(word)
    path = originals.save(originals.checkpoint(word, folder), tmp_path / "made.safetensors")
    base = opened(word, path, **other_parts(word))
    components = [name for name in MODELS if (folder / name).is_dir()]
    assert [name for name in MODELS if base.has(name)] == components
    for component in components:
        same(base.weights(component), originals.component(folder, component))


PIPELINES = {
    "sd15": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
}


@pytest.mark.slow
@pytest.mark.parametrize("word", PIPELINES)
def test_a_checkpoint_has_the_weights_that_diffusers_reads_from_it(word: str, tmp_path: Path):
    import diffusers

    folder = random_folder(word)
    weights = originals.checkpoint(word, folder)
    # diffusers takes it for one that changes nothing, whatever the file has.
    weights.pop("text_encoders.clip_l.transformer.text_projection.weight", None)
    path = originals.save(weights, tmp_path / "made.safetensors")
    pipeline = getattr(diffusers, PIPELINES[word]).from_single_file(
        path, config=str(folder), local_files_only=True
    )
    base = opened(word, path)
    # It tells two CLIPs apart by their widths, which are one here: no text_encoder_2.
    for component in ("unet", "transformer", "vae", "text_encoder"):
        model = getattr(pipeline, component, None)
        if model is not None:
            same(base.weights(component), model.state_dict())


@pytest.mark.slow
def test_a_second_clip_has_the_weights_that_diffusers_converter_gives(tmp_path: Path):
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    weights = originals.checkpoint("sdxl", random_folder("sdxl"))
    path = originals.save(weights, tmp_path / "made.safetensors")
    expected = convert_open_clip_checkpoint(None, weights, prefix="conditioner.embedders.1.model.")
    same(opened("sdxl", path).weights("text_encoder_2"), expected)


@pytest.mark.parametrize("word", ["flux1", "sd3", "sdxl"])
def test_a_denoiser_alone_needs_no_prefix(word: str, tmp_path: Path):
    folder = random_folder(word)
    path = originals.save(originals.denoiser(word, folder), tmp_path / "alone.safetensors")
    names = [name for name in MODELS[2:] if (folder / name).is_dir()]
    base = opened(word, path, **{name: str(folder / name) for name in names})
    component = "unet" if word == "sdxl" else "transformer"
    same(base.weights(component), originals.component(folder, component))


def test_components_come_from_files_of_their_own(tmp_path: Path):
    folder = random_folder("sd3")
    transformer = originals.save(originals.denoiser("sd3", folder), tmp_path / "sd3.safetensors")
    held = {name: originals.component(folder, name) for name in MODELS if (folder / name).is_dir()}
    parts = {
        "vae": originals.vae(held["vae"]),
        "text_encoder": originals.with_level(held["text_encoder"]),
        "text_encoder_2": originals.open_clip(held["text_encoder_2"]),
        "text_encoder_3": held["text_encoder_3"],
    }
    files = {
        name: originals.save(weights, tmp_path / f"{name}.safetensors")
        for name, weights in parts.items()
    }
    base = opened("sd3", transformer, **files)
    for component, expected in held.items():
        same(base.weights(component), expected)


def test_a_vae_file_replaces_a_folders_vae_by_either_names(tmp_path: Path):
    folder = random_folder("sd15")
    changed = {name: one + 1 for name, one in originals.component(folder, "vae").items()}
    for i, weights in enumerate(
        (
            originals.vae(changed),
            originals.below("first_stage_model.", originals.vae(changed)),
            changed,
        )
    ):
        path = originals.save(weights, tmp_path / f"{i}.safetensors")
        base = open_base(str(folder), kind="sd15", parts={"vae": path})
        same(base.weights("vae"), changed)
        assert base.config("vae")["latent_channels"] == 4


def test_clip_l_without_a_projection_has_one_that_changes_nothing(tmp_path: Path):
    folder = random_folder("sd3")
    weights = originals.checkpoint("sd3", folder)
    del weights["text_encoders.clip_l.transformer.text_projection.weight"]
    path = originals.save(weights, tmp_path / "made.safetensors")
    found = opened("sd3", path).weights("text_encoder")["text_projection.weight"]
    assert torch.equal(found, torch.eye(32))


def test_layers_that_sd2_does_not_read_are_left_out(tmp_path: Path):
    folder = random_folder("sd2")
    weights = originals.checkpoint("sd2", folder)
    layer = "cond_stage_model.model.transformer.resblocks"
    for name in [name for name in weights if name.startswith(f"{layer}.2.")]:
        weights[name.replace(f"{layer}.2.", f"{layer}.3.")] = weights[name].clone()
    weights["cond_stage_model.model.text_projection"] = torch.ones(32, 32)
    weights["cond_stage_model.model.logit_scale"] = torch.ones(())
    path = originals.save(weights, tmp_path / "made.safetensors")
    same(opened("sd2", path).weights("text_encoder"), originals.component(folder, "text_encoder"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_narrow_weights_keep_their_bits(dtype: torch.dtype, tmp_path: Path):
    folder = random_folder("flux1")
    narrow = {k: v.to(dtype) for k, v in originals.component(folder, "transformer").items()}
    joined = {k: v.to(dtype) for k, v in originals.denoiser("flux1", folder).items()}
    path = originals.save(joined, tmp_path / "made.safetensors")
    found = opened("flux1", path, **other_parts("flux1")).weights("transformer")
    for name, tensor in narrow.items():
        assert torch.equal(found[name].float(), tensor.float()), name


def config_of(weights: dict[str, Tensor], tmp_path: Path, **words: Any) -> dict[str, Any]:
    """Of the scheduler, for a checkpoint that brings no configs."""
    path = originals.save(weights, tmp_path / "made.safetensors", words.pop("metadata", None))
    return open_base(path, kind=words["kind"]).config("scheduler")


def test_marker_tensors_tell_sdxl_of_v_prediction(tmp_path: Path):
    weights = originals.checkpoint("sdxl", random_folder("sdxl"))
    assert config_of(weights, tmp_path, kind="sdxl")["prediction_type"] == "epsilon"
    weights |= {"v_pred": torch.zeros(0)}
    config = config_of(weights, tmp_path, kind="sdxl")
    assert config["prediction_type"] == "v_prediction"
    assert not config.get("rescale_betas_zero_snr")
    weights |= {"ztsnr": torch.zeros(0)}
    config = config_of(weights, tmp_path, kind="sdxl")
    assert config["rescale_betas_zero_snr"] is True
    assert config["timestep_spacing"] == "trailing"


@pytest.mark.parametrize(
    ("steps", "metadata", "expected"),
    [
        (None, None, "v_prediction"),
        (875_000, None, "epsilon"),
        (110_000, None, "v_prediction"),
        (None, {"modelspec.prediction_type": "epsilon"}, "epsilon"),
        (875_000, {"modelspec.prediction_type": "v"}, "v_prediction"),
    ],
)
def test_sd2_predicts_v_unless_the_file_says_otherwise(
    steps: int | None, metadata: dict[str, str] | None, expected: str, tmp_path: Path
):
    weights = originals.checkpoint("sd2", random_folder("sd2"))
    if steps is not None:
        weights["global_step"] = torch.tensor(steps)
    config = config_of(weights, tmp_path, kind="sd2", metadata=metadata)
    assert config["prediction_type"] == expected


def test_keys_tell_dev_from_schnell_and_35_from_3(tmp_path: Path):
    for word, expected in {
        "flux1": {"guidance_embeds": True, "num_layers": 1, "num_single_layers": 2},
        "schnell": {"guidance_embeds": False, "num_layers": 1, "num_single_layers": 2},
        "sd3": {"num_layers": 2, "pos_embed_max_size": 96, "qk_norm": None},
        "sd35": {"num_layers": 3, "dual_attention_layers": [0], "qk_norm": "rms_norm"},
    }.items():
        folder = random_folder(word)
        path = originals.save(originals.checkpoint(word, folder), tmp_path / f"{word}.safetensors")
        config = open_base(path, kind=KINDS[word], parts=other_parts(word)).config("transformer")
        assert {name: config.get(name) for name in expected} == expected


def test_the_header_tells_the_licence(tmp_path: Path):
    weights = originals.checkpoint("sd15", random_folder("sd15"))
    path = originals.save(weights, tmp_path / "made.safetensors", {"modelspec.license": "mit"})
    base = open_base(path, kind="sd15")
    assert (base.license, base.name) == ("mit", "made")


@pytest.mark.parametrize(
    ("word", "kind", "message"),
    [
        ("sdxl", "sd15", "made.safetensors is SDXL; set family.kind: sdxl"),
        ("sd15", "sdxl", "is Stable Diffusion 1.x; set family.kind: sd15"),
        ("sd2", "sd15", "is Stable Diffusion 2.x; set family.kind: sd2"),
        ("flux1", "sd3", "is FLUX.1; set family.kind: flux1"),
        ("sd35", "flux1", "is Stable Diffusion 3; set family.kind: sd3"),
    ],
)
def test_another_family_is_refused_by_name(word: str, kind: str, message: str, tmp_path: Path):
    weights = originals.checkpoint(word, random_folder(word))
    path = originals.save(weights, tmp_path / "made.safetensors")
    with pytest.raises(WeightsError, match=re.escape(message)):
        open_base(path, kind=kind)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"model.diffusion_model.input_blocks.0.0.weight": ones(8, 9, 3, 3)}, "reads 9 channels"),
        (
            {
                "img_in.weight": ones(8, 384),
                "double_blocks.0.img_attn.qkv.weight": ones(24, 8),
            },
            "its img_in has 384 channels",
        ),
        ({"double_stream_modulation_img.lin.weight": ones(2, 2)}, "is FLUX.2, which raylora"),
        ({"encoder.down.0.block.0.norm1.weight": ones(4)}, "a VAE alone; set family.vae"),
        ({"lora_unet_x.lora_down.weight": ones(4)}, "is a LoRA, not a base; family.loras"),
        ({"down_blocks.0.x": ones(4)}, "has diffusers' names"),
        ({"some": ones(4)}, "is no checkpoint of .* first tensors: some"),
        ({"some.scale_weight": ones(1)}, "holds scaled fp8 weights"),
        (
            {
                "input_blocks.0.0.weight": ones(8, 4, 3, 3),
                "label_emb.0.0.weight": ones(8, 8),
                "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": ones(8, 1280),
            },
            "is SDXL's refiner",
        ),
    ],
)
def test_what_is_no_base_is_told_what_it_is(
    weights: dict[str, Tensor], message: str, tmp_path: Path
):
    path = originals.save(weights, tmp_path / "made.safetensors")
    with pytest.raises(WeightsError, match=message):
        open_base(path, kind="sdxl")


def test_a_transformer_alone_asks_for_the_rest(tmp_path: Path):
    weights = originals.checkpoint("flux1", random_folder("flux1"))
    path = originals.save(weights, tmp_path / "made.safetensors")
    with pytest.raises(
        WeightsError,
        match=r"made has no vae and no text_encoder and no text_encoder_2\. Set family\.vae and "
        r"family\.parts\.text_encoder and family\.parts\.text_encoder_2",
    ):
        open_base(path, kind="flux1")


def test_a_file_of_another_component_is_refused(tmp_path: Path):
    folder = random_folder("sd15")
    path = originals.save(originals.component(folder, "text_encoder"), tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"family.vae: x.safetensors holds no vae"):
        open_base(str(folder), kind="sd15", parts={"vae": path})


def test_half_a_file_is_refused(tmp_path: Path):
    weights = originals.checkpoint("sd15", random_folder("sd15"))
    path = Path(originals.save(weights, tmp_path / "made.safetensors"))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match=r"is no whole \.safetensors file"):
        open_base(str(path), kind="sd15")


def test_tokenizers_come_from_a_folder_of_their_own(tmp_path: Path):
    folder = random_folder("sd15")
    weights = originals.checkpoint("sd15", folder)
    path = originals.save(weights, tmp_path / "made.safetensors")
    tokenizer = str(folder / "tokenizer")
    alone = open_base(path, kind="sd15", parts={"tokenizer": tokenizer})
    whole = open_base(str(folder), kind="sd15")
    assert alone.tokenizer_hash("tokenizer") == whole.tokenizer_hash("tokenizer")
    text = "a photo of a cat"
    assert alone.tokenizer("tokenizer")(text) == whole.tokenizer("tokenizer")(text)


@pytest.mark.parametrize("word", KINDS)
def test_one_model_has_one_content_hash_in_a_folder_and_in_a_file(word: str, tmp_path: Path):
    folder = random_folder(word)
    path = originals.save(originals.checkpoint(word, folder), tmp_path / "made.safetensors")
    alone, whole = opened(word, path, **other_parts(word)), open_base(str(folder), kind=KINDS[word])
    for component in MODELS:
        if whole.has(component):
            assert alone.content_hash(component) == whole.content_hash(component), component
