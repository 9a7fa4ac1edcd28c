"""A base of SD 1.5's layout with random weights, and pictures to train it on.

Small enough for one CPU, and with every layer of the real one: 16 transformer blocks, 192 layers
that an adapter sits on. What is measured is time; what it learns means nothing.

So that nobody gains by a base of odd shape, its parts cost as in SD 1.5, whose VAE and text encoder
take 1.41 times the operations of the UNet's forward at 512 px, and 1.59 times at 256
(`encoding_share` of its own configs).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

TOKENIZER = Path(__file__).parents[1] / "jobs" / "quickstart" / "tiny-sd" / "tokenizer"
CONTEXT = 64
"""Width of the text encoder and of cross-attention."""


def make_base(folder: Path) -> Path:
    """A whole diffusers folder; always the same weights. 8.6 M parameters in the UNet."""
    if (folder / "model_index.json").is_file():
        return folder
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64, 128, 128),
        attention_head_dim=4,  # of SD 1.5's configs: the number of heads
        cross_attention_dim=CONTEXT,
        sample_size=32,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 48, 48),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=4,
        sample_size=256,
    )
    vocabulary = len(json.loads((TOKENIZER / "tokenizer.json").read_text())["model"]["vocab"])
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=CONTEXT,
            intermediate_size=4 * CONTEXT,
            num_hidden_layers=6,
            num_attention_heads=4,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts = {"unet": unet, "vae": vae, "text_encoder": text, "scheduler": scheduler}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    shutil.copytree(TOKENIZER, folder / "tokenizer", dirs_exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(_index(), indent=2))
    return folder


def encoding_share(folder: Path, side: int) -> float:
    """Operations of encoding a picture of `side` pixels and a caption, per those of the UNet."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
        latents, tokens = torch.empty(1, 4, side // 8, side // 8), torch.zeros(1, 77).long()
        context = torch.empty(1, 77, unet.config.cross_attention_dim)
        with FlopCounterMode(display=False) as encoding:
            vae.encode(torch.empty(1, 3, side, side))
            text(tokens)
        with FlopCounterMode(display=False) as forward:
            unet(latents, torch.zeros(1), context)
    return encoding.get_total_flops() / forward.get_total_flops()


def _index() -> dict[str, object]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def make_pictures(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """JPEGs of soft coloured noise with a caption each, and metadata.jsonl for other trainers."""
    if (folder / "metadata.jsonl").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    lines = []
    for number in range(count):
        small = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:04d}.jpg", quality=90)
        caption = f"picture {number}, soft colours"
        (folder / f"{number:04d}.txt").write_text(caption)
        lines.append(json.dumps({"file_name": f"{number:04d}.jpg", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder
