"""Stable Diffusion 3 and 3.5: a transformer over pictures and text, three text encoders, flow
matching.

The models are told apart by their transformers' config: 3.5 norms queries and keys, and 3.5 medium
has a second attention, over the picture alone, in some of its blocks. T5 may be missing: a base
without text_encoder_3 gets zeros for it, as diffusers' pipeline gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad

from raylora.base.errors import WeightsError
from raylora.base.options import known_as
from raylora.base.site import Place, Site
from raylora.base.unit import Unit
from raylora.components.clip import clip_place, clip_sites, clip_units, empty_clip, load_clip
from raylora.components.dit import (
    PATCH,
    Asked,
    FlowRenderer,
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

_CLASS = "SD3Transformer2DModel"
_FLOAT32_BYTES = 4
_CLIP_TOKENS = 77
_CLIPS = ("text_encoder", "text_encoder_2")
_T5 = "text_encoder_3"
_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", _T5: "tokenizer_3"}


class Sd3Options(FamilyOptions):
    """Stable Diffusion 3 medium, 3.5 medium, 3.5 large and models of their layout."""

    layout: ClassVar[str] = "sd3"
    native_resolution: ClassVar[int] = 1024
    bucket_step: ClassVar[int] = 64

    kind: Literal["sd3"] = "sd3"
    t5_max_tokens: int = Field(
        256,
        ge=77,
        le=MOST_T5_TOKENS,
        json_schema_extra=known_as(
            sd_scripts="--t5xxl_max_token_length", guides="T5 sequence length"
        ),
    )
    """Tokens that T5 reads of a caption, with its last one; shorter captions are padded to it, and
    a base without T5 has so many zeros. Both CLIPs read the first 75 of their own. Previews use the
    same."""
    mask_clip: bool = Field(False, json_schema_extra=known_as(sd_scripts="--apply_lg_attn_mask"))
    """Let both CLIPs read captions without looking at the padding behind them. SD 3 was trained
    without and other programs draw without, so leave it off unless they are told to mask too.
    Previews use the same."""
    mask_t5: bool = Field(
        False,
        json_schema_extra=known_as(sd_scripts="--apply_t5_attn_mask", guides="T5 attention mask"),
    )
    """The same for T5."""
    clip_l_dropout: float = Field(
        0.0, ge=0, le=1, json_schema_extra=known_as(sd_scripts="--clip_l_dropout_rate")
    )
    """Share of samples that are trained with zeros for what the first CLIP says of the caption. SD
    3 was trained so with each of its encoders, and draws with any of them missing."""
    clip_g_dropout: float = Field(
        0.0, ge=0, le=1, json_schema_extra=known_as(sd_scripts="--clip_g_dropout_rate")
    )
    """The same for the second CLIP."""
    t5_dropout: float = Field(
        0.0, ge=0, le=1, json_schema_extra=known_as(sd_scripts="--t5_dropout_rate")
    )
    """The same for T5."""


class Sd3(Family):
    """Transformer, CLIP-L and OpenCLIP-bigG with projections, T5 where there is one, VAE and
    scheduler."""

    component = "transformer"
    usual_sampler = "euler"
    usual_steps = 28
    usual_draw = "logit_normal"
    usual_shift = "base"

    def __init__(self, base: Base, options: Sd3Options) -> None:
        self.base = base
        config = dit_config(base, kind="sd3", name=_CLASS)
        self._vae_facts = vae_facts(base, kind="sd3")
        self._has_t5 = base.has(_T5)
        self.text_components = (*_CLIPS, _T5) if self._has_t5 else _CLIPS
        clips = [base.config(component) for component in _CLIPS]
        self._widths = [int(one["hidden_size"]) for one in clips]
        self._pooled_widths = [int(one["projection_dim"]) for one in clips]
        self._text_width = int(config["joint_attention_dim"])
        self._check_widths(config)
        self._refuse_without_t5(options)
        self._layers = int(config["num_layers"])
        self._heads = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
        self._options = options
        self.process = Flow()
        self.pixels_per_latent = self._vae_facts.pixels_per_latent
        self.latent_channels = self._vae_facts.channels
        self.size_step = PATCH * self.pixels_per_latent
        self.blocks = (self._layers, 0, 0)
        self.encoder_dropout = (options.clip_l_dropout, options.clip_g_dropout)
        if self._has_t5:
            self.encoder_dropout += (options.t5_dropout,)
        model = _model(config)
        self.usual_guidance = 7.0 if model == "medium" else 4.5
        self.max_tokens = options.t5_max_tokens - 1 if self._has_t5 else _CLIP_TOKENS - 2
        self.longer_tokens = ()
        if self._has_t5 and options.t5_max_tokens < MOST_T5_TOKENS:
            self.token_advice = f"Set family.t5_max_tokens, up to {MOST_T5_TOKENS}."
        text = (_CLIP_TOKENS + options.t5_max_tokens) * self._text_width
        self.text_bytes = (text + sum(self._pooled_widths)) * _FLOAT32_BYTES
        self.metadata = {
            "ss_base_model_version": f"sd3-{model}",
            "ss_sd_model_name": base.name,
            "ss_apply_lg_attn_mask": str(options.mask_clip),
            "ss_apply_t5_attn_mask": str(options.mask_t5),
            "modelspec.architecture": f"stable-diffusion-3-{model}",
        }

    def _check_widths(self, config: Mapping[str, Any]) -> None:
        takes, makes = int(config["in_channels"]), self._vae_facts.channels
        if takes != makes:
            raise WeightsError(
                f"{self.base.name}: its transformer reads latents of {takes} channels, and the VAE "
                f"makes {makes}: it is another family's. Set family.vae to one that belongs to it, "
                "or leave family.vae out."
            )
        pooled = sum(self._pooled_widths)
        if config["pooled_projection_dim"] != pooled:
            raise WeightsError(
                f"{self.base.name}: its transformer reads pooled text "
                f"{config['pooled_projection_dim']} wide, and text_encoder and text_encoder_2 give "
                f"{pooled}. Give the CLIPs that belong to it in family.parts."
            )
        text = self.base.config(_T5)["d_model"] if self._has_t5 else self._text_width
        if text != self._text_width:
            raise WeightsError(
                f"{self.base.name}: its transformer reads text {self._text_width} wide, and "
                f"{_T5} gives {text}. Give the T5 that belongs to it in family.parts."
            )

    def _refuse_without_t5(self, options: Sd3Options) -> None:
        given = {"mask_t5": options.mask_t5, "t5_dropout": options.t5_dropout}
        idle = [word for word, value in given.items() if value]
        if idle and not self._has_t5:
            raise WeightsError(
                f"family.{idle[0]} is of T5, and {self.base.name} has no {_T5}. Leave it out, or "
                f"give a T5: family.parts: {{{_T5}: ...}}."
            )

    def load_denoiser(self, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The transformer."""
        transformer = load_dit(self.base, _CLASS, dtype=dtype, device=device)
        self.alter("transformer", transformer)
        return transformer

    def encoder_facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Names the VAE and the text encoders by their bytes."""
        latents_facts = {
            "family": "sd3",
            "vae": self.base.content_hash("vae"),
            "scaling": self._vae_facts.scaling,
            "shift": self._vae_facts.shift,
            "pick": "mode",
            "dtype": "float32",
        }
        parts = self.text_components
        text_facts = {
            "family": "sd3",
            "text_encoders": [self.base.content_hash(one) for one in parts],
            "tokenizers": [self.base.tokenizer_hash(_TOKENIZERS[one]) for one in parts],
            "t5_max_tokens": self._options.t5_max_tokens,
            "mask_clip": self._options.mask_clip,
            "mask_t5": self._options.mask_t5,
            "dtype": "float32",
        }
        return latents_facts, text_facts | self.merged_texts()

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """By T5's tokenizer, which reads the most; by CLIP's where there is no T5."""
        return count_caption_tokens(self._tokenizers[self.text_components[-1]], captions)

    @property
    def vae_facts(self) -> VaeFacts:
        """What the VAE's config says."""
        return self._vae_facts

    def skeletons(self) -> tuple[nn.Module, Models]:
        """All from their configs."""
        encoders = {one: empty_clip(self.base, one, projected=True) for one in _CLIPS}
        if self._has_t5:
            encoders[_T5] = empty_t5(self.base, _T5)
        return empty_dit(self.base, _CLASS), encoders

    def load_text_encoder(
        self, component: str, *, dtype: torch.dtype, device: torch.device
    ) -> nn.Module:
        """A CLIP with its projection, or T5."""
        if component == _T5:
            encoder = load_t5(self.base, component, dtype=dtype, device=device)
        else:
            encoder = load_clip(self.base, component, projected=True, dtype=dtype, device=device)
        self.alter(component, encoder)
        return encoder

    def tokens(self, captions: Sequence[str]) -> dict[str, NDArray[Any]]:
        """`ids` and `ids_2` (B, 77) of the CLIPs, `ids_3` (B, T) of T5; `mask`, `mask_2` and
        `mask_3` likewise where they are looked at."""
        found = {}
        for component, (ids, mask) in self._words.items():
            clip = component != _T5
            length = _CLIP_TOKENS if clip else self._options.t5_max_tokens
            held = padded_tokens(self._tokenizers[component], captions, length)
            found[ids] = held.ids_BT
            if self._options.mask_clip if clip else self._options.mask_t5:
                found[mask] = held.mask_BT
        return found

    @cached_property
    def _words(self) -> dict[str, tuple[str, str]]:
        """Of each encoder's ids and mask."""
        names = (("ids", "mask"), ("ids_2", "mask_2"), ("ids_3", "mask_3"))
        return dict(zip(self.text_components, names, strict=False))

    def read_text(
        self, component: str, encoder: nn.Module, tokens: Mapping[str, Tensor]
    ) -> Conditions:
        """`text` (B, T, D), and of a CLIP `pooled` (B, D)."""
        ids, mask = self._words[component]
        if component == _T5:
            return {"text": read_t5(encoder, tokens[ids], tokens.get(mask))}
        hidden, pooled = _read_clip(encoder, tokens[ids], tokens.get(mask))
        return {"text": hidden, "pooled": pooled}

    def join_texts(
        self, said: Mapping[str, Mapping[str, Tensor]], tokens: Mapping[str, Tensor]
    ) -> Conditions:
        """`text` (B, 77 + T, D): both CLIPs side by side, filled up with zeros, and T5 behind
        them; `pooled` (B, D) of both CLIPs."""
        clips = torch.cat([said[one]["text"] for one in _CLIPS], dim=-1)
        clips = pad(clips, (0, self._text_width - clips.shape[-1]))
        if self._has_t5:
            t5 = said[_T5]["text"]
        else:
            t5 = clips.new_zeros(len(clips), self._options.t5_max_tokens, self._text_width)
        pooled = torch.cat([said[one]["pooled"] for one in _CLIPS], dim=-1)
        return {"text": torch.cat([clips, t5], dim=1), "pooled": pooled}

    def sites(self, denoiser: nn.Module) -> list[Site]:
        """Every layer of the transformer."""
        return dit_sites(denoiser, section="joint", doubles=self._layers)

    def text_sites(self, text_encoders: Models) -> list[Site]:
        """Every layer of the text encoders."""
        found = [site for one in _CLIPS for site in clip_sites(one, text_encoders[one])]
        return found + (t5_sites(_T5, text_encoders[_T5]) if self._has_t5 else [])

    def units(self, denoiser: nn.Module) -> list[Unit]:
        """The transformer's blocks."""
        return dit_units(denoiser)

    def text_units(self, text_encoders: Models) -> dict[str, list[Unit]]:
        """The layers of both CLIPs and of T5."""
        units = {**dict.fromkeys(_CLIPS, clip_units), _T5: t5_units}
        return {one: units[one](one, encoder) for one, encoder in text_encoders.items()}

    def place(self, name: str) -> Place:
        """The transformer by its makers' names; the text encoders are te1, te2 and te3."""
        component, _, path = name.partition(".")
        if component in _CLIPS:
            return clip_place(name, f"lora_te{_CLIPS.index(component) + 1}")
        if component == _T5:
            return t5_place(name, "lora_te3")
        section, number, rest = about_layer(path, section="joint")
        if not section:
            # Its modulation gives shift and scale to its makers, scale and shift to diffusers.
            return Place("lora_unet", _OUTER[rest], halves_swapped=rest == "norm_out.linear")
        return self._joint_place(number, rest)

    def _joint_place(self, number: int, rest: str) -> Place:
        text = (rest.startswith("attn.") and "add" in rest) or "_context" in rest
        block = f"joint_blocks.{number}.{'context' if text else 'x'}_block"
        attention, _, layer = rest.partition(".")
        if layer in _JOINED:
            path = f"{block}.{attention}.qkv"
            return part_of_joined(path, _JOINED[layer], (self._heads,) * 3)
        if layer in _ATTENTION:
            return Place("lora_unet", f"{block}.{attention}.{_ATTENTION[layer]}")
        # Behind the last block nothing reads the text: its modulation is as the last layer's.
        last = rest == "norm1_context.linear" and number == self._layers - 1
        path = f"{block}.{_JOINT[rest.replace('_context', '')]}"
        return Place("lora_unet", path, halves_swapped=last)

    def predict(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        conditions: Mapping[str, Tensor],
    ) -> Tensor:
        """noisy (B, 16, H, W), timesteps (B,) -> (B, 16, H, W).

        Args:
            timesteps: kept in float32, which diffusers embeds as they are.
            conditions: `text` (B, T, D), `pooled` (B, D); `dropped` (B, E), 1 where an encoder's
                part of them is zero.
        """
        text, pooled = conditions["text"], conditions["pooled"]
        if "dropped" in conditions:
            text, pooled = self._without(text, pooled, conditions["dropped"])
        prediction: Tensor = denoiser(
            hidden_states=noisy,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=timesteps,
            return_dict=False,
        )[0]
        return prediction

    def _without(self, text: Tensor, pooled: Tensor, dropped_BE: Tensor) -> tuple[Tensor, Tensor]:
        first, second, *t5 = (1 - dropped_BE.to(text.dtype)).split(1, dim=1)
        # The zeros behind both CLIPs stay what they are.
        behind = self._text_width - sum(self._widths)
        clip_l, clip_g, rest = text[:, :_CLIP_TOKENS].split([*self._widths, behind], dim=-1)
        clips = torch.cat([clip_l * first[..., None], clip_g * second[..., None], rest], dim=-1)
        others = text[:, _CLIP_TOKENS:]
        if t5:
            others = others * t5[0][..., None]
        pooled_l, pooled_g = pooled.split(self._pooled_widths, dim=-1)
        return torch.cat([clips, others], dim=1), torch.cat(
            [pooled_l * first, pooled_g * second], dim=-1
        )

    def _renderer(
        self,
        denoiser: nn.Module,
        prompts: Prompts,
        decoder: Decoder,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Renderer:
        pipeline = self._pipeline(denoiser, {}, None)
        pipeline.vae_scale_factor = self.pixels_per_latent
        return FlowRenderer(pipeline, prompts, decoder, _asked, dtype=dtype, device=device)

    def load_pipeline(
        self,
        denoiser: nn.Module | None = None,
        text_encoders: Models | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Any:
        """StableDiffusion3Pipeline."""
        encoders = text_encoders or self.load_text_encoders(dtype=dtype, device=device)
        vae = load_vae(self.base, dtype=dtype, device=device)
        return self._pipeline(
            denoiser or self.load_denoiser(dtype=dtype, device=device), encoders, vae
        )

    def _pipeline(self, transformer: nn.Module, encoders: Models, vae: nn.Module | None) -> Any:
        from diffusers import StableDiffusion3Pipeline

        return StableDiffusion3Pipeline(
            vae=vae,
            transformer=transformer,
            scheduler=base_scheduler(self.base),
            **{one: encoders.get(one) for one in _TOKENIZERS},
            **{word: self._tokenizers.get(one) for one, word in _TOKENIZERS.items()},
        )

    @cached_property
    def _tokenizers(self) -> dict[str, Any]:
        return {one: self.base.tokenizer(_TOKENIZERS[one]) for one in self.text_components}


def _model(config: Mapping[str, Any]) -> str:
    """sd-scripts' word for the model."""
    if not config.get("qk_norm"):
        return "medium"
    return "5-medium" if config.get("dual_attention_layers") else "5-large"


def _read_clip(encoder: Any, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The layer before the last, without CLIP's final norm, (B, 77, D), and the projected pooled
    state (B, D)."""
    device = encoder.device
    output = encoder(
        ids.to(device, non_blocking=True),
        attention_mask=None if mask is None else mask.to(device, non_blocking=True),
        output_hidden_states=True,
    )
    return output.hidden_states[-2], output.text_embeds


def _asked(asked: Asked) -> dict[str, Any]:
    return {"latents": asked.latents, "guidance_scale": asked.guidance}


_JOINED = {
    "to_q": 0,
    "to_k": 1,
    "to_v": 2,
    "add_q_proj": 0,
    "add_k_proj": 1,
    "add_v_proj": 2,
}
_ATTENTION = {
    "to_out.0": "proj",
    "to_add_out": "proj",
    "norm_q": "ln_q",
    "norm_k": "ln_k",
    "norm_added_q": "ln_q",
    "norm_added_k": "ln_k",
}
_JOINT = {
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
    "norm1.linear": "adaLN_modulation.1",
}
_OUTER = {
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}

family = Sd3
options = Sd3Options
