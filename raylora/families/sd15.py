"""Stable Diffusion 1.x: a UNet with cross-attention, CLIP-L text, a four-channel VAE."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from raylora.base.encoder import Encoder
from raylora.base.errors import WeightsError
from raylora.base.fingerprint import file_fingerprint
from raylora.base.site import Site
from raylora.diffusion.attention import attention
from raylora.diffusion.clip_text import Chunks, caption_tokens, chunk_captions, encode_chunks
from raylora.diffusion.halving import in_halves
from raylora.diffusion.process import Prediction, Process
from raylora.diffusion.samplers import DrawNoise, Sampler, make_sampler
from raylora.diffusion.schedules import alphas_cumprod
from raylora.families import Family, FamilyOptions, Models, Renderer, site_of

MaxTokens = Literal[75, 150, 225]
_FLOAT32_BYTES = 4


class Sd15Options(FamilyOptions):
    """Stable Diffusion 1.x and models of its layout."""

    native_resolution: ClassVar[int] = 512
    bucket_step: ClassVar[int] = 64

    kind: Literal["sd15"] = "sd15"
    clip_skip: int = Field(1, ge=1)
    """Which layer of CLIP the text is taken from, counted from the last, which is 1. Many anime
    bases were trained with 2. Previews use the same."""
    max_tokens: MaxTokens = 75
    """Tokens of a caption that are read: 75, 150 or 225. What is longer is cut off. Above 75, CLIP
    reads the caption in chunks of 75. Previews use the same."""
    weighted_captions: bool = False
    """Read weights in captions and in prompts of previews: (x) is 1.1 times as strong, (x:1.3) 1.3
    times, [x] 1.1 times weaker. Off, such brackets are text."""


class Sd15(Family):
    """A diffusers folder with unet, vae, text_encoder, tokenizer and scheduler."""

    component = "unet"

    def __init__(self, folder: Path, options: Sd15Options) -> None:
        self.folder = folder
        self._vae_folder = Path(options.vae) if options.vae else folder / "vae"
        unet = _config(folder / "unet", "UNet2DConditionModel")
        of_another = "family.vae must be a VAE's folder in diffusers layout." if options.vae else ""
        vae = _config(self._vae_folder, "AutoencoderKL", wants=of_another or _WHOLE_BASE)
        text = _read_json(folder / "text_encoder" / "config.json")
        scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
        if unet.get("addition_embed_type"):
            raise WeightsError(
                f"{folder}/unet/config.json has addition_embed_type {unet['addition_embed_type']!r}"
                ": this is not Stable Diffusion 1.x. Choose the family that fits the weights."
            )
        prediction: Prediction = scheduler.get("prediction_type", "epsilon")
        if prediction not in ("epsilon", "v_prediction"):
            raise WeightsError(
                f"{folder}/scheduler/scheduler_config.json has prediction_type {prediction!r}; "
                "sd15 knows epsilon and v_prediction."
            )
        if options.clip_skip > text["num_hidden_layers"]:
            raise WeightsError(
                f"family.clip_skip is {options.clip_skip}, and the text encoder in {folder} has "
                f"{text['num_hidden_layers']} layers. Choose 1 to {text['num_hidden_layers']}."
            )
        self.process = Process(prediction, alphas_cumprod(scheduler))
        self.pixels_per_latent = 2 ** (len(vae["block_out_channels"]) - 1)
        self.latent_channels = int(vae["latent_channels"])
        # The UNet halves its latents once between each two of its blocks.
        self.size_step = self.pixels_per_latent * 2 ** (len(unet["block_out_channels"]) - 1)
        self._scaling = float(vae.get("scaling_factor", 0.18215))
        self._options = options
        self.max_tokens = options.max_tokens
        self.longer_tokens = tuple(n for n in get_args(MaxTokens) if n > options.max_tokens)
        self.text_bytes = (options.max_tokens + 2) * text["hidden_size"] * _FLOAT32_BYTES
        self.metadata = {
            "ss_base_model_version": "sd_v1",
            "ss_v2": "False",
            "ss_sd_model_name": folder.name,
            "ss_clip_skip": str(options.clip_skip),
            "modelspec.architecture": "stable-diffusion-v1",
            "modelspec.prediction_type": "v" if prediction == "v_prediction" else "epsilon",
        }

    def load_denoiser(self, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The UNet, built empty and filled from the memory-mapped file."""
        from diffusers.models.attention_processor import Attention
        from safetensors.torch import load_file

        unet = self._empty_unet()
        weights = load_file(_weights_file(self.folder / "unet", "diffusion_pytorch_model"))
        held = {name: tensor.to(dtype=dtype, device=device) for name, tensor in weights.items()}
        unet.load_state_dict(held, assign=True)
        for layer in unet.modules():
            if isinstance(layer, Attention):
                layer.forward = partial(_attend, layer)
        self.alter("unet", unet)
        return unet.requires_grad_(False).eval()

    def fingerprint(self) -> str:
        """Of the UNet's file, wherever it lies, and of what is merged into it."""
        file = file_fingerprint(_weights_file(self.folder / "unet", "diffusion_pytorch_model"))
        return " ".join([file, *(f"{part} {name}" for part, name in sorted(self.altered.items()))])

    def encoder_facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Names the VAE and the text encoder by the bytes of their files."""
        vae = _weights_file(self._vae_folder, "diffusion_pytorch_model")
        text = _weights_file(self.folder / "text_encoder", "model")
        tokenizer = self.folder / "tokenizer"
        latents_facts = {
            "family": "sd15",
            "vae": _file_hash(vae),
            "vae_config": _file_hash(self._vae_folder / "config.json"),
            "scaling": self._scaling,
            "pick": "mode",
            "dtype": "float32",
        }
        text_facts = {
            "family": "sd15",
            "text_encoder": _file_hash(text),
            "text_config": _file_hash(self.folder / "text_encoder" / "config.json"),
            "tokenizer": [_file_hash(f) for f in sorted(tokenizer.glob("*")) if f.is_file()],
            "max_tokens": self._options.max_tokens,
            "clip_skip": self._options.clip_skip,
            "weighted_captions": self._options.weighted_captions,
            "dtype": "float32",
        }
        if "text_encoder" in self.altered:
            text_facts["merged"] = self.altered["text_encoder"]
        return latents_facts, text_facts

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """By the base's own tokenizer; with `weighted_captions`, of the text without the syntax."""
        weighted = self._options.weighted_captions
        return [
            len(tokens) for tokens in caption_tokens(self._tokenizer, captions, weighted=weighted)
        ]

    def latents_bytes(self, bucket: tuple[int, int]) -> int:
        """float32, as the encoder gives them."""
        width, height = (side // self.pixels_per_latent for side in bucket)
        return self.latent_channels * width * height * _FLOAT32_BYTES

    def load_encoder(self, *, device: torch.device) -> Encoder:
        """VAE and CLIP in float32."""
        parts = self._parts(torch.float32, device)
        return _Sd15Encoder(parts, self._options, *self.encoder_facts())

    def skeletons(self) -> tuple[nn.Module, Models]:
        """Both from their configs."""
        from transformers import CLIPTextConfig, CLIPTextModel

        config = CLIPTextConfig.from_pretrained(self.folder / "text_encoder")
        with torch.device("meta"):
            text = CLIPTextModel(config)
        return self._empty_unet(), {"text_encoder": text}

    def _empty_unet(self) -> nn.Module:
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        with torch.device("meta"):
            unet: nn.Module = UNet2DConditionModel.from_config(_known(self.folder / "unet"))
        return unet

    def load_text_encoders(self, *, dtype: torch.dtype, device: torch.device) -> Models:
        """CLIP alone."""
        return {"text_encoder": self._load_text_encoder(dtype, device)}

    def tokens(self, captions: Sequence[str]) -> dict[str, NDArray[Any]]:
        """`ids` and `weights`, (B, N, 77) each."""
        chunks = _chunks(self._tokenizer, self._options, captions)
        return {"ids": chunks.ids_BNT.numpy(), "weights": chunks.weights_BNT.numpy()}

    def read_tokens(self, text_encoders: Models, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`text` (B, T, D) in CLIP's dtype."""
        chunks = Chunks(tokens["ids"], tokens["weights"])
        skip = self._options.clip_skip
        return {"text": encode_chunks(text_encoders["text_encoder"], chunks, clip_skip=skip)}

    def sites(self, denoiser: nn.Module, layers: str, *, convolutions: bool = False) -> list[Site]:
        """Linears and 1x1 convolutions inside the transformer blocks, as sd-scripts chooses.

        With `convolutions` also all of the residual blocks and the samplers.
        """
        from diffusers.models.downsampling import Downsample2D
        from diffusers.models.resnet import ResnetBlock2D
        from diffusers.models.transformers.transformer_2d import Transformer2DModel
        from diffusers.models.upsampling import Upsample2D

        found = []
        wanted: tuple[type[nn.Module], ...] = (Transformer2DModel,)
        if convolutions:
            wanted = (*wanted, ResnetBlock2D, Downsample2D, Upsample2D)
        for block, model in denoiser.named_modules():
            if not isinstance(model, wanted):
                continue
            for name, module in model.named_modules():
                path = f"{self.component}.{block}.{name}"
                inner = isinstance(model, Transformer2DModel)
                if inner and layers == "attention" and ".attn" not in path:
                    continue
                site = site_of(path, module, block=_block_index(block))
                if site is not None and not (inner and site.kernel != (1, 1)):
                    found.append(site)
        config: Any = denoiser.config
        _expect("UNet", len(found), _unet_layers(config, layers, convolutions=convolutions))
        return found

    def text_sites(self, text_encoders: Models, layers: str) -> list[Site]:
        """Linears of CLIP's layers; its attention only, where `layers` says so."""
        encoder = text_encoders["text_encoder"]
        found = []
        for path, module in encoder.named_modules():
            if ".layers." not in f".{path}" or (layers == "attention" and ".mlp" in path):
                continue
            # Older transformers have the level; names have it always.
            path = f"text_encoder.text_model.{path.removeprefix('text_model.')}"
            site = site_of(path, module)
            found += [site] if site else []
        config: Any = encoder.config
        each = 4 if layers == "attention" else 6
        _expect("text encoder", len(found), each * config.num_hidden_layers)
        return found

    def predict(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        conditions: Mapping[str, Tensor],
    ) -> Tensor:
        """noisy (B, 4, H, W), timesteps (B,), conditions["text"] (B, T, D) -> (B, 4, H, W)."""
        prediction: Tensor = denoiser(noisy, timesteps, conditions["text"], return_dict=False)[0]
        return prediction

    def load_renderer(self, denoiser: nn.Module, text_encoders: Models | None = None) -> Renderer:
        """The diffusers pipeline around this denoiser, in its dtype and on its device."""
        weight = next(denoiser.parameters())
        parts = self._parts(weight.dtype, weight.device, text_encoders)
        return _Sd15Renderer(parts, self._options, denoiser, self.folder)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder / "tokenizer")

    def _load_text_encoder(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        from transformers import CLIPTextModel

        text = CLIPTextModel.from_pretrained(self.folder / "text_encoder", dtype=dtype)
        self.alter("text_encoder", text)
        loaded: nn.Module = text.to(device).requires_grad_(False).eval()
        return loaded

    def _parts(
        self, dtype: torch.dtype, device: torch.device, text_encoders: Models | None = None
    ) -> dict[str, Any]:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(self._vae_folder, torch_dtype=dtype)
        held = text_encoders or self.load_text_encoders(dtype=dtype, device=device)
        return {
            "vae": vae.to(device).requires_grad_(False).eval(),
            "text_encoder": held["text_encoder"],
            "tokenizer": self._tokenizer,
        }


def _attend(
    layer: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: None = None,
) -> Tensor:
    """An attention layer's forward, without the options of diffusers' that SD 1.x does not use."""
    others = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    query, key, value = layer.to_q(hidden_states), layer.to_k(others), layer.to_v(others)
    projected: Tensor = layer.to_out[0](attention(query, key, value, heads=layer.heads))
    return projected


def _unet_layers(config: Any, layers: str, *, convolutions: bool) -> int:
    """How many layers a UNet's config means; 192 in SD 1.5, 278 with its convolutions."""
    down, up, mid = config.down_block_types, config.up_block_types, 1
    deep, channels = int(config.layers_per_block), config.block_out_channels
    transformers = mid + sum("CrossAttn" in block for block in down) * deep
    transformers += sum("CrossAttn" in block for block in up) * (deep + 1)
    count = transformers * (8 if layers == "attention" else 12)
    if convolutions:
        blocks = len(channels)
        residual = blocks * deep + 2 * mid + blocks * (deep + 1)
        widened = sum(before != after for before, after in pairwise((channels[0], *channels)))
        shortcuts = widened + blocks * (deep + 1)  # on the way up all are joined with another
        samplers = 2 * (blocks - 1)
        count += 3 * residual + shortcuts + samplers
    return count


def _expect(model: str, found: int, wanted: int) -> None:
    """A library that names its classes anew must not shrink the adapter without a word."""
    if found != wanted:
        raise WeightsError(
            f"the {model} has {found} layers to train, and its config means {wanted}. The "
            "installed diffusers or transformers builds it otherwise: install the versions that "
            "raylora's pyproject.toml names."
        )


def _block_index(path: str) -> int | None:
    """sd-scripts' count of a UNet's blocks: 1-11 on the way down, 12, 13-24 on the way up."""
    found = re.match(
        r"(down|mid|up)_block(?:s\.(\d+)\.(attentions|resnets|\w+samplers)\.(\d+))?", path
    )
    if found is None:
        return None
    if found[1] == "mid":
        return 12
    within = 2 if found[3].endswith("samplers") else int(found[4])
    return (1 if found[1] == "down" else 13) + 3 * int(found[2]) + within


def _chunks(tokenizer: Any, options: Sd15Options, captions: Sequence[str]) -> Chunks:
    return chunk_captions(
        tokenizer, captions, max_tokens=options.max_tokens, weighted=options.weighted_captions
    )


def _encode_captions(
    parts: dict[str, Any], options: Sd15Options, captions: Sequence[str]
) -> Tensor:
    """(B, T, D): what the UNet sees of texts, the same for captions and for prompts."""
    chunks = _chunks(parts["tokenizer"], options, captions)
    return encode_chunks(parts["text_encoder"], chunks, clip_skip=options.clip_skip)


class _Sd15Encoder:
    """VAE mode and CLIP's hidden states; 77, 152 or 227 tokens."""

    def __init__(
        self,
        parts: dict[str, Any],
        options: Sd15Options,
        latents_facts: dict[str, Any],
        text_facts: dict[str, Any],
    ) -> None:
        self._parts = parts
        self._options = options
        self._scaling = float(latents_facts["scaling"])
        self.latents_facts = latents_facts
        self.text_facts = text_facts

    @torch.no_grad()
    def encode_images(self, pixels: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        vae = self._parts["vae"]

        def encode(batch: Tensor) -> Tensor:
            latents: Tensor = vae.encode(batch.to(vae.device)).latent_dist.mode()
            return (latents * self._scaling).cpu()

        return {"latents": in_halves(encode, torch.from_numpy(pixels)).numpy()}

    @torch.no_grad()
    def encode_texts(self, captions: Sequence[str]) -> dict[str, NDArray[Any]]:
        hidden = _encode_captions(self._parts, self._options, captions)
        return {"text": hidden.cpu().numpy()}


class _Sd15Renderer:
    """diffusers' StableDiffusionPipeline with the base's own scheduler config and our text."""

    def __init__(
        self, parts: dict[str, Any], options: Sd15Options, denoiser: nn.Module, folder: Path
    ) -> None:
        from diffusers import StableDiffusionPipeline
        from diffusers.schedulers import DDIMScheduler

        self._parts = parts
        self._options = options
        self._pipeline = StableDiffusionPipeline(
            **parts,
            unet=denoiser,
            scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        self._pipeline.set_progress_bar_config(disable=True)
        # As the pipeline leaves it: configs of old bases are mended there.
        self._scheduler_config = dict(self._pipeline.scheduler.config)

    def render(
        self,
        prompt: str,
        *,
        negative: str,
        latents: Tensor,
        steps: int,
        guidance: float,
        sampler: Sampler = "ddim",
        noise: DrawNoise | None = None,
        process: Process | None = None,
    ) -> NDArray[np.uint8]:
        dtype, device = self._pipeline.unet.dtype, self._pipeline.unet.device
        factor = self._pipeline.vae_scale_factor
        self._pipeline.scheduler = make_sampler(
            sampler, self._scheduler_config, process=process, noise=noise
        )
        with torch.no_grad():
            # One at a time, as the pipeline does: a batch of two sums in another order.
            wanted, unwanted = (
                _encode_captions(self._parts, self._options, [text]) for text in (prompt, negative)
            )
            pictures = self._pipeline(
                prompt_embeds=wanted,
                negative_prompt_embeds=unwanted,
                height=latents.shape[2] * factor,
                width=latents.shape[3] * factor,
                latents=latents.to(dtype=dtype, device=device),
                num_inference_steps=steps,
                guidance_scale=guidance,
                output_type="np",
            ).images
        return np.asarray((pictures[0] * 255).round().clip(0, 255), dtype=np.uint8)


_WHOLE_BASE = (
    "family.weights must be a folder in diffusers layout (unet, vae, text_encoder, tokenizer, "
    "scheduler)."
)


def _read_json(path: Path, *, wants: str = _WHOLE_BASE) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise WeightsError(f"{path} is missing. {wants}") from None
    except json.JSONDecodeError as error:
        raise WeightsError(f"{path} is not JSON ({error}). Fetch the file again.") from None
    return found


def _config(folder: Path, wanted: str, *, wants: str = _WHOLE_BASE) -> dict[str, Any]:
    config = _read_json(folder / "config.json", wants=wants)
    if config.get("_class_name") != wanted:
        raise WeightsError(
            f"{folder}/config.json is a {config.get('_class_name')}, sd15 needs a {wanted}. Choose "
            "the family that fits the weights."
        )
    return config


def _known(folder: Path) -> dict[str, Any]:
    return _read_json(folder / "config.json")


def _weights_file(folder: Path, stem: str) -> Path:
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(
        f"{folder} has no {stem}.safetensors. Pickle weights (.bin, .ckpt) are not read: convert "
        "the model to safetensors first."
    )


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


family = Sd15
options = Sd15Options
