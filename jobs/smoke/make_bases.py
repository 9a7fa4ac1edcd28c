"""Make a tiny base of each model family, with random weights, to try the whole road on.

    python jobs/smoke/make_bases.py [FOLDER] [KIND ...]

A few megabytes each, in diffusers layout, complete: denoiser, VAE, text encoders, tokenizers,
scheduler. They draw coloured noise; what they are good for is to see that a job of a family runs,
that its file is read elsewhere, and that pictures change. Same bits on every run of one machine.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
CLIP_TOKENIZER = HERE.parent / "quickstart" / "tiny-sd" / "tokenizer"
T5_TOKENIZER = HERE / "t5-tokenizer"

CLIP = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "projection_dim": 32,
    "hidden_act": "quick_gelu",
}
BIG_CLIP = {**CLIP, "hidden_act": "gelu"}
T5 = {
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
UNET = {
    "sample_size": 32,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 16,
}
# One VAE halves once, so that a picture of 64 pixels has 32 latent cells a side.
VAE = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
}


def _clip(tokenizer: Any, *, projected: bool = False, **words: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{**CLIP, **words},
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _clip_tokenizer(*, pad: str | None = None) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CLIP_TOKENIZER)
    if pad is not None:
        tokenizer.pad_token = pad
    return tokenizer


def _t5(width: int) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(T5_TOKENIZER)
    return tokenizer, T5EncoderModel(T5Config(d_model=width, vocab_size=len(tokenizer), **T5))


def _vae(*, scaling: float, channels: int = 4, shift: float | None = None) -> Any:
    from diffusers import AutoencoderKL

    quantised = shift is None
    return AutoencoderKL(
        latent_channels=channels,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=quantised,
        use_post_quant_conv=quantised,
        sample_size=64,
        **VAE,
    )


def _stable_diffusion(
    tokenizer: Any, text: Any, *, prediction: str = "epsilon", **unet: Any
) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    return StableDiffusionPipeline(
        tokenizer=tokenizer,
        text_encoder=text,
        unet=UNet2DConditionModel(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            **UNET,
            **unet,
        ),
        vae=_vae(scaling=0.18215),
        scheduler=DDIMScheduler(
            prediction_type=prediction, clip_sample=False, set_alpha_to_one=False, **BETAS
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd15() -> Any:
    """CLIP-L, predicts epsilon."""
    tokenizer = _clip_tokenizer()
    return _stable_diffusion(tokenizer, _clip(tokenizer), attention_head_dim=4)


def sd2() -> Any:
    """OpenCLIP-H, linear projections, predicts v."""
    tokenizer = _clip_tokenizer(pad="!")
    return _stable_diffusion(
        tokenizer,
        _clip(tokenizer, num_hidden_layers=3, hidden_act="gelu"),
        prediction="v_prediction",
        attention_head_dim=(2, 4),
        use_linear_projection=True,
    )


def sdxl() -> Any:
    """CLIP-L and OpenCLIP-bigG, told the picture's size and crop."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    first, second = _clip_tokenizer(), _clip_tokenizer(pad="!")
    return StableDiffusionXLPipeline(
        tokenizer=first,
        tokenizer_2=second,
        text_encoder=_clip(first),
        text_encoder_2=_clip(second, projected=True, **BIG_CLIP),
        unet=UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=64,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
            **UNET,
        ),
        vae=_vae(scaling=0.13025),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", **BETAS),
        force_zeros_for_empty_prompt=True,
    )


def _sd3(**words: Any) -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    first, second = _clip_tokenizer(), _clip_tokenizer(pad="!")
    third, t5 = _t5(64)
    return StableDiffusion3Pipeline(
        tokenizer=first,
        tokenizer_2=second,
        tokenizer_3=third,
        text_encoder=_clip(first, projected=True),
        text_encoder_2=_clip(second, projected=True, **BIG_CLIP),
        text_encoder_3=t5,
        transformer=SD3Transformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_attention_heads=4,
            attention_head_dim=8,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            pos_embed_max_size=96,
            **{"num_layers": 2, **words},
        ),
        vae=_vae(scaling=1.5305, channels=16, shift=0.0609),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def sd3() -> Any:
    """CLIP-L, OpenCLIP-bigG and T5."""
    return _sd3()


def sd35() -> Any:
    """The same with a second attention in the first block and normed q and k, as 3.5 medium has."""
    return _sd3(num_layers=3, dual_attention_layers=(0,), qk_norm="rms_norm")


def _flux(*, guidance: bool) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    clip_tokenizer = _clip_tokenizer()
    t5_tokenizer, t5 = _t5(32)
    shifting = {
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    }
    return FluxPipeline(
        tokenizer=clip_tokenizer,
        tokenizer_2=t5_tokenizer,
        text_encoder=_clip(clip_tokenizer),
        text_encoder_2=t5,
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=1,
            num_single_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            axes_dims_rope=(4, 6, 6),
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=guidance,
        ),
        vae=_vae(scaling=0.3611, channels=16, shift=0.1159),
        scheduler=FlowMatchEulerDiscreteScheduler(**(shifting if guidance else {"shift": 1.0})),
    )


def flux1() -> Any:
    """FLUX.1-dev: CLIP-L, T5, guidance embedded."""
    return _flux(guidance=True)


def schnell() -> Any:
    """FLUX.1-schnell: no guidance."""
    return _flux(guidance=False)


KINDS = {make.__name__: make for make in (sd15, sd2, sdxl, sd3, sd35, flux1, schnell)}


def make_base(kind: str, folder: str | Path) -> Path:
    """Build a tiny base and leave it in `folder`, unless it is there already."""
    place = Path(folder)
    if (place / "model_index.json").is_file():
        return place
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = KINDS[kind]()
    pipeline.save_pretrained(place)
    return place


def main() -> None:
    """Make those that are named, or all."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder, *kinds = sys.argv[1:] or [str(HERE / "bases")]
    for kind in kinds or KINDS:
        place = make_base(kind, Path(folder) / kind)
        size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        sys.stdout.write(f"{place}  {size / 2**20:.1f} MiB\n")


if __name__ == "__main__":
    main()
