"""FLUX.1: a transformer of double and single blocks, T5 text, CLIP's pooled text, flow matching.

The two open models are told apart by their transformers' config: dev is told a guidance as a
number, which its makers distilled into it; schnell is not, and draws in one to four steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from raylora.base.errors import WeightsError
from raylora.base.options import known_as
from raylora.base.site import Place, Site
from raylora.base.unit import Unit
from raylora.components.clip import clip_place, clip_sites, clip_units, empty_clip, load_clip
from raylora.components.dit import (
    PATCH,
    Asked,
    FlowRenderer,
    Unrounded,
    about_layer,
    dit_config,
    dit_sites,
    dit_units,
    empty_dit,
    load_dit,
    part_of_joined,
)
from raylora.components.pipelines import base_scheduler
from raylora.components.t5 import (
    MOST_T5_TOKENS,
    count_caption_tokens,
    empty_t5,
    load_t5,
    padded_tokens,
    read_t5,
    t5_place,
    t5_sites,
    t5_units,
)
from raylora.components.texts import Conditions, Prompts
from raylora.components.vae import Decoder, VaeFacts, load_vae, vae_facts
from raylora.diffusion.process import Flow
from raylora.families import Family, FamilyOptions, Models, Renderer
from raylora.weights.base import Base

_CLASS = "FluxTransformer2DModel"
_FLOAT32_BYTES = 4
_CLIP_TOKENS = 77
_MLP_RATIO = 4
_DEV_GUIDANCE = 1.0
"""What dev is told in training: that of a model without guidance, so that what it predicts is what
the pictures are."""
_TEXT_MASK = "text_mask"
"""(B, T), 1 where the caption is; a condition where `mask_t5` is on."""


class Flux1Options(FamilyOptions):
    """FLUX.1-dev, FLUX.1-schnell and models of their layout."""

    layout: ClassVar[str] = "flux1"
    native_resolution: ClassVar[int] = 1024
    bucket_step: ClassVar[int] = 64

    kind: Literal["flux1"] = "flux1"
    guidance: float | None = Field(
        None,
        ge=0,
        json_schema_extra=known_as(
            source="Meng et al. 2022, arXiv 2210.03142",
            sd_scripts="--guidance_scale (3.5)",
            guides="guidance embedding, distilled guidance",
        ),
    )
    """The guidance that FLUX.1-dev is told in training; null is 1, which is none: pictures are what
    they are without any. Previews have their own, preview.embedded_guidance. FLUX.1-schnell is told
    none and refuses a number."""
    t5_max_tokens: int | None = Field(
        None,
        ge=77,
        le=MOST_T5_TOKENS,
        json_schema_extra=known_as(
            sd_scripts="--t5xxl_max_token_length", guides="T5 sequence length"
        ),
    )
    """Tokens that T5 reads of a caption, with its last one; shorter captions are padded to it. Null
    is what the base was made with: 512 for dev, 256 for schnell. Fewer make the cache smaller and
    steps faster, and draw a little otherwise. Previews use the same."""
    mask_t5: bool = Field(
        False,
        json_schema_extra=known_as(sd_scripts="--apply_t5_attn_mask", guides="T5 attention mask"),
    )
    """Hide the padding behind a caption, from T5 and from the transformer. FLUX was trained without
    and other programs draw without, so leave it off unless they are told to mask too. Previews use
    the same."""


class Flux1(Family):
    """Transformer, CLIP-L, T5, VAE and scheduler.

    Attributes:
        guided: whether the transformer is told a guidance, as dev's is.
    """

    component = "transformer"
    text_components = ("text_encoder", "text_encoder_2")
    usual_guidance = 1.0
    usual_sampler = "euler"
    usual_draw = "logit_normal"
    usual_shift = "resolution"
    # On an H100 one of its recordings gave numbers that were not finite, and why is not known.
    recorded = False

    def __init__(self, base: Base, options: Flux1Options) -> None:
        self.base = base
        config = dit_config(base, kind="flux1", name=_CLASS)
        self._vae_facts = vae_facts(base, kind="flux1")
        self.guided = bool(config.get("guidance_embeds", False))
        _check_widths(base, config, self._vae_facts.channels)
        if options.guidance is not None and not self.guided:
            raise WeightsError(
                f"family.guidance is {options.guidance:g}, and {base.name} is told no guidance: it "
                "is FLUX.1-schnell or of its kind. Leave it out."
            )
        self._heads = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
        self._guidance = _DEV_GUIDANCE if options.guidance is None else options.guidance
        self._length = options.t5_max_tokens or (512 if self.guided else 256)
        self._masked = options.mask_t5
        self.process = Flow()
        self.pixels_per_latent = self._vae_facts.pixels_per_latent
        self.latent_channels = self._vae_facts.channels
        self.size_step = PATCH * self.pixels_per_latent
        self.blocks = (int(config["num_layers"]), 0, int(config["num_single_layers"]))
        self.usual_steps = 28 if self.guided else 4
        self.usual_embedded_guidance = 3.5 if self.guided else None
        self.max_tokens = self._length - 1
        self.longer_tokens = ()
        if self._length < MOST_T5_TOKENS:
            self.token_advice = f"Set family.t5_max_tokens, up to {MOST_T5_TOKENS}."
        widths = int(config["joint_attention_dim"]) + self._masked
        pooled = int(config["pooled_projection_dim"])
        self.text_bytes = (self._length * widths + pooled) * _FLOAT32_BYTES
        self.metadata = {
            "ss_base_model_version": "flux1",
            "ss_sd_model_name": base.name,
            "ss_model_type": "flux",
            "ss_apply_t5_attn_mask": str(self._masked),
            "ss_guidance_scale": str(self._guidance if self.guided else None),
            "modelspec.architecture": f"flux-1-{'dev' if self.guided else 'schnell'}",
        }

    def load_denoiser(self, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The transformer."""
        transformer = load_dit(self.base, _CLASS, dtype=dtype, device=device)
        self.alter("transformer", transformer)
        return transformer

    def encoder_facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Names the VAE and both text encoders by their bytes."""
        latents_facts = {
            "family": "flux1",
            "vae": self.base.content_hash("vae"),
            "scaling": self._vae_facts.scaling,
            "shift": self._vae_facts.shift,
            "pick": "mode",
            "dtype": "float32",
        }
        text_facts = {
            "family": "flux1",
            "text_encoders": [self.base.content_hash(one) for one in self.text_components],
            "tokenizers": [self.base.tokenizer_hash(one) for one in ("tokenizer", "tokenizer_2")],
            "t5_max_tokens": self._length,
            "mask_t5": self._masked,
            "dtype": "float32",
        }
        return latents_facts, text_facts | self.merged_texts()

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """By T5's tokenizer. CLIP reads the first 75 of its own."""
        return count_caption_tokens(self._tokenizers[1], captions)

    @property
    def vae_facts(self) -> VaeFacts:
        """What the VAE's config says."""
        return self._vae_facts

    def skeletons(self) -> tuple[nn.Module, Models]:
        """All from their configs."""
        return empty_dit(self.base, _CLASS), {
            "text_encoder": empty_clip(self.base, "text_encoder"),
            "text_encoder_2": empty_t5(self.base, "text_encoder_2"),
        }

    def load_text_encoder(
        self, component: str, *, dtype: torch.dtype, device: torch.device
    ) -> nn.Module:
        """CLIP-L or T5."""
        load = load_clip if component == "text_encoder" else load_t5
        encoder = load(self.base, component, dtype=dtype, device=device)
        self.alter(component, encoder)
        return encoder

    def tokens(self, captions: Sequence[str]) -> dict[str, NDArray[Any]]:
        """`ids` (B, 77) of CLIP and `ids_2` (B, T) of T5; `mask_2`, (B, T), with `mask_t5`."""
        clip, t5 = self._tokenizers
        second = padded_tokens(t5, captions, self._length)
        found = {"ids": padded_tokens(clip, captions, _CLIP_TOKENS).ids_BT, "ids_2": second.ids_BT}
        return {**found, "mask_2": second.mask_BT} if self._masked else found

    def read_text(self, component: str, encoder: Any, tokens: Mapping[str, Tensor]) -> Conditions:
        """`pooled` (B, D) of CLIP, `text` (B, T, D) of T5."""
        if component == "text_encoder_2":
            return {"text": read_t5(encoder, tokens["ids_2"], tokens.get("mask_2"))}
        ids = tokens["ids"].to(encoder.device, non_blocking=True)
        return {"pooled": encoder(ids).pooler_output}

    def join_texts(
        self, said: Mapping[str, Mapping[str, Tensor]], tokens: Mapping[str, Tensor]
    ) -> Conditions:
        """`text` and `pooled`; `text_mask`, (B, T), with `mask_t5`."""
        text, mask = said["text_encoder_2"]["text"], tokens.get("mask_2")
        found = {"text": text, "pooled": said["text_encoder"]["pooled"]}
        return found if mask is None else {**found, _TEXT_MASK: mask.to(text)}

    def sites(self, denoiser: nn.Module) -> list[Site]:
        """Every layer of the transformer."""
        return dit_sites(denoiser, section="double", doubles=self.blocks[0])

    def text_sites(self, text_encoders: Models) -> list[Site]:
        """Every layer of both text encoders."""
        first, second = self.text_components
        return [
            *clip_sites(first, text_encoders[first]),
            *t5_sites(second, text_encoders[second]),
        ]

    def units(self, denoiser: nn.Module) -> list[Unit]:
        """Double blocks, then single ones."""
        return dit_units(denoiser)

    def text_units(self, text_encoders: Models) -> dict[str, list[Unit]]:
        """The layers of CLIP and of T5."""
        units = {"text_encoder": clip_units, "text_encoder_2": t5_units}
        return {one: units[one](one, encoder) for one, encoder in text_encoders.items()}

    def place(self, name: str) -> Place:
        """The transformer by its makers' names, CLIP as te1 and T5 as te3."""
        component, _, path = name.partition(".")
        if component == "text_encoder":
            return clip_place(name, "lora_te1")
        if component == "text_encoder_2":
            return t5_place(name, "lora_te3")
        section, number, rest = about_layer(path, section="double")
        if not section:
            return _outer_place(rest)
        block = f"{section}_blocks.{number}"
        return (self._single_place if section == "single" else self._double_place)(block, rest)

    def _double_place(self, block: str, rest: str) -> Place:
        stream = "txt" if rest in _TEXT_LAYERS or "_context" in rest else "img"
        if rest in _JOINED:
            path = f"{block}.{stream}_attn.qkv"
            return part_of_joined(path, _JOINED[rest], (self._heads,) * 3)
        plain = rest.replace("_context", "")
        return Place("lora_unet", f"{block}.{stream}_{_DOUBLE[plain]}")

    def _single_place(self, block: str, rest: str) -> Place:
        if rest in _JOINED or rest == "proj_mlp":
            widths = (*(self._heads,) * 3, _MLP_RATIO * self._heads)
            return part_of_joined(f"{block}.linear1", _JOINED.get(rest, 3), widths)
        return Place("lora_unet", f"{block}.{_SINGLE[rest]}")

    def predict(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        conditions: Mapping[str, Tensor],
    ) -> Tensor:
        """noisy (B, 16, H, W), timesteps (B,) -> (B, 16, H, W).

        Args:
            conditions: `text` (B, T, D), `pooled` (B, D); `text_mask` (B, T) with `mask_t5`.
        """
        height, width = noisy.shape[2:]
        text = conditions["text"]
        told: dict[str, Any] = {}
        if self.guided:
            guidance = torch.full_like(timesteps, self._guidance, dtype=torch.float32)
            told["guidance"] = Unrounded(guidance)
        if _TEXT_MASK in conditions:
            tokens = height // PATCH * (width // PATCH)
            told["joint_attention_kwargs"] = _hidden_padding(conditions[_TEXT_MASK], tokens)
        packed: Tensor = denoiser(
            hidden_states=pack_latents(noisy),
            encoder_hidden_states=text,
            pooled_projections=conditions["pooled"],
            timestep=Unrounded(timesteps / self.process.steps),
            img_ids=patch_positions(height, width, device=noisy.device),
            txt_ids=torch.zeros(text.shape[1], 3, device=noisy.device),
            return_dict=False,
            **told,
        )[0]
        return unpack_latents(packed, height, width)

    def _renderer(
        self,
        denoiser: nn.Module,
        prompts: Prompts,
        decoder: Decoder,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Renderer:
        pipeline = self._pipeline(denoiser, dict.fromkeys(self.text_components), None)
        pipeline.vae_scale_factor = self.pixels_per_latent
        return FlowRenderer(
            pipeline,
            prompts,
            decoder,
            self._asked,
            dtype=dtype,
            device=device,
            around=lambda told: _padding_hidden(denoiser, told),
            latents_of=unpack_latents,
        )

    def _asked(self, asked: Asked) -> dict[str, Any]:
        words: dict[str, Any] = {
            "latents": pack_latents(asked.latents),
            "true_cfg_scale": asked.guidance,
        }
        if self.guided:
            usual = self.usual_embedded_guidance
            words["guidance_scale"] = usual if asked.embedded is None else asked.embedded
        return words

    def load_pipeline(
        self,
        denoiser: nn.Module | None = None,
        text_encoders: Models | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Any:
        """FluxPipeline."""
        encoders = text_encoders or self.load_text_encoders(dtype=dtype, device=device)
        vae = load_vae(self.base, dtype=dtype, device=device)
        return self._pipeline(
            denoiser or self.load_denoiser(dtype=dtype, device=device), encoders, vae
        )

    def _pipeline(
        self,
        transformer: nn.Module,
        encoders: Mapping[str, nn.Module | None],
        vae: nn.Module | None,
    ) -> Any:
        from diffusers import FluxPipeline

        first, second = self._tokenizers
        return FluxPipeline(
            vae=vae,
            tokenizer=first,
            tokenizer_2=second,
            transformer=transformer,
            scheduler=base_scheduler(self.base),
            **encoders,
        )

    @cached_property
    def _tokenizers(self) -> tuple[Any, Any]:
        return self.base.tokenizer("tokenizer"), self.base.tokenizer("tokenizer_2")


def _check_widths(base: Base, config: Mapping[str, Any], channels: int) -> None:
    takes, patch = config["in_channels"], PATCH * PATCH * channels
    if takes != (config.get("out_channels") or takes):
        raise WeightsError(
            f"{base.name}: its transformer takes {takes} numbers a patch: this is a FLUX.1 for "
            "filling or for control pictures, which raylora does not train. Use FLUX.1-dev or "
            "-schnell."
        )
    if takes != patch:
        raise WeightsError(
            f"{base.name}: its transformer takes {takes} numbers a patch, and the VAE's latents "
            f"make {patch}: it is another family's. Set family.vae to FLUX.1's, or leave "
            "family.vae out."
        )
    text = base.config("text_encoder_2")["d_model"]
    if config["joint_attention_dim"] != text:
        raise WeightsError(
            f"{base.name}: its transformer reads text {config['joint_attention_dim']} wide, and "
            f"text_encoder_2 gives {text}. Give the T5 that belongs to it in family.parts."
        )


_JOINED = {
    "attn.to_q": 0,
    "attn.to_k": 1,
    "attn.to_v": 2,
    "attn.add_q_proj": 0,
    "attn.add_k_proj": 1,
    "attn.add_v_proj": 2,
}
_TEXT_LAYERS = (
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.norm_added_q",
    "attn.norm_added_k",
)
_DOUBLE = {
    "attn.to_out.0": "attn.proj",
    "attn.to_add_out": "attn.proj",
    "attn.norm_q": "attn.norm.query_norm",
    "attn.norm_k": "attn.norm.key_norm",
    "attn.norm_added_q": "attn.norm.query_norm",
    "attn.norm_added_k": "attn.norm.key_norm",
    "ff.net.0.proj": "mlp.0",
    "ff.net.2": "mlp.2",
    "norm1.linear": "mod.lin",
}
_SINGLE = {
    "proj_out": "linear2",
    "norm.linear": "modulation.lin",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
_OUTER = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}


def _outer_place(path: str) -> Place:
    """Of what is outside of the blocks. The last layer's modulation gives shift and scale to its
    makers, scale and shift to diffusers."""
    return Place("lora_unet", _OUTER[path], halves_swapped=path == "norm_out.linear")


def pack_latents(latents: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H/2 W/2, 4 C): each token is a patch, channels first within it."""
    patches = latents.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
    packed: Tensor = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return packed


def unpack_latents(packed: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack_latents`."""
    rows = packed.unflatten(1, (height // PATCH, width // PATCH))
    patches = rows.unflatten(3, (-1, PATCH, PATCH))
    latents: Tensor = patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    return latents


def patch_positions(height: int, width: int, *, device: torch.device) -> Tensor:
    """Row and column of each token behind a 0, (H/2 W/2, 3) float32; text is at 0, 0, 0."""
    down, across = (torch.arange(side // PATCH, device=device) for side in (height, width))
    grid = torch.cartesian_prod(down, across).float()
    return torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=1)


def _hidden_padding(mask_BT: Tensor, tokens: int) -> dict[str, Tensor]:
    """What attention is told so that nothing looks at the text's padding."""
    picture = torch.ones(len(mask_BT), tokens, dtype=torch.bool, device=mask_BT.device)
    return {"attention_mask": torch.cat([mask_BT.bool(), picture], dim=1)[:, None, None]}


@contextmanager
def _padding_hidden(transformer: nn.Module, told: Sequence[Conditions]) -> Iterator[None]:
    """Within it, the transformer hides the padding of these texts from whoever calls it."""

    def hide(module: nn.Module, arguments: Any, words: dict[str, Any]) -> Any:
        for one in told:
            if words["encoder_hidden_states"] is one["text"]:
                mask = one[_TEXT_MASK].expand(len(words["hidden_states"]), -1)
                hidden = _hidden_padding(mask, words["hidden_states"].shape[1])
                return arguments, {**words, "joint_attention_kwargs": hidden}
        raise AssertionError("the pipeline hands on the texts that it is given")

    if any(_TEXT_MASK not in one for one in told):
        yield
        return
    hook = transformer.register_forward_pre_hook(hide, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


family = Flux1
options = Flux1Options
