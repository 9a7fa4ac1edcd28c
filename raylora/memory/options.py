"""Options of memory: what a worker may do to fit, and what is fixed whatever it is."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from raylora.base.options import Options, known_as
from raylora.memory.setting import Checkpointing


class MemoryOptions(Options):
    """What a worker may hold at once, and what it does to get by with less.

    Where a word is `auto`, each worker takes what is fastest of what fits its own card. None of it
    changes what is computed, except `base` and `states`, which are one choice for the whole run.
    """

    base: Literal["auto", "full", "int8", "fp8", "nf4"] = Field(
        "auto",
        json_schema_extra=known_as(
            source="int8: one scale a row; fp8: e4m3, one scale a block; nf4: Dettmers et al. "
            "2023, arXiv 2305.14314",
            sd_scripts="--fp8_base",
            guides="quantised base, QLoRA",
        ),
    )
    """How the frozen linears of the denoiser's blocks are held. full: as training.precision says.
    int8, fp8, nf4: in 8, 8 and 4 bits, and brought back for each product; what is learned differs a
    little. auto: the best of them, in this order, with which every worker fits; a run keeps to it
    on any fleet. nf4 needs `pip install "raylora[bnb]"`."""
    states: Literal["auto", "full", "8bit"] = Field(
        "auto", json_schema_extra=known_as(guides="8-bit Adam, paged optimizer")
    )
    """The optimizer's states. full: as optimizer.name has them. 8bit: adamw and lion keep theirs in
    8 bits a number, as adamw8bit and lion8bit do. auto: full where that fits every worker. One
    choice for the run."""
    checkpointing: Literal["auto", Checkpointing] = Field(
        "auto",
        json_schema_extra=known_as(
            source="Chen et al. 2016, arXiv 1604.06174", sd_scripts="--gradient_checkpointing"
        ),
    )
    """Blocks that keep only their input and are computed again for their gradients: none, mlp (of
    each block the feed-forward part), alternate (every second block) or all. The same numbers with
    less memory, for the time of up to one more forward pass."""
    streaming: Literal["auto"] | float = Field(
        "auto",
        json_schema_extra=known_as(
            sd_scripts="--blocks_to_swap", guides="block swap, layer offloading"
        ),
    )
    """Share of the denoiser's blocks, 0 to 1 by bytes, that lie in host memory and come to the
    device when they are needed; the next comes while one computes. Nothing is copied back."""
    offload_inputs: Literal["auto"] | bool = Field(
        "auto",
        json_schema_extra=known_as(
            sd_scripts="--cpu_offload_checkpointing", guides="activation offload"
        ),
    )
    """What blocks that are computed again were given waits in host memory."""
    host_states: Literal["auto"] | bool = "auto"
    """The optimizer's states lie in host memory and its step is done there, where it is rounded
    otherwise. For large adapters on small cards; auto does so only where nothing else fits."""
    fused_backward: bool = Field(
        False, json_schema_extra=known_as(sd_scripts="--fused_backward_pass")
    )
    """Move each layer's adapter as soon as its gradient is there, and drop the gradient. Saves 4
    bytes a trained number: worth it for ranks of 64 and more. Needs one worker, one micro-batch and
    optimizer.max_grad_norm: 0."""
    fused_groups: int | None = Field(
        None, ge=2, json_schema_extra=known_as(sd_scripts="--fused_optimizer_groups")
    )
    """The same in so many groups of layers, each moved when its last gradient is there. Give this
    or fused_backward."""
    attention: Literal["auto", "flash", "efficient", "cudnn", "math"] = Field(
        "auto", json_schema_extra=known_as(sd_scripts="--sdpa, --xformers, --flash_attn")
    )
    """Which of torch's kernels computes attention. auto lets torch choose."""
    cuda_graphs: Literal["auto"] | bool = Field(
        "auto", json_schema_extra=known_as(sd_scripts="none", guides="CUDA graphs")
    )
    """Record the kernels of a micro-batch once a bucket, and start them as one from then on:
    several times faster where a GPU waits to be told what to do, as it does with SD 1.5 and SDXL.
    Each recording is compared with the plain micro-batch before it is used. Needs cached captions,
    no dropout and nothing offloaded. auto does so for LoRA and LoCon on the Stable Diffusion
    families; true for any network and FLUX.1 too, and refuses a job where it cannot be."""
    compile: bool = Field(False, json_schema_extra=known_as(sd_scripts="--torch_compile"))
    """Compile the denoiser's blocks, one graph a bucket: faster steps on a GPU after a minute or
    more at the start. Numbers are rounded otherwise."""
    vae_tiling: Literal["auto"] | bool = Field(
        "auto", json_schema_extra=known_as(guides="VAE tiling, VAE slicing")
    )
    """Decode previews in tiles. Pictures then differ a little where tiles meet; what is trained
    does not."""
    max_micro_batch: int | None = Field(None, ge=1)
    """Images that go through the denoiser together, at most; null is up to 8 as they fit, or 1
    where training.sums is exact, which allows no more."""
    encode_batch: int | None = Field(None, ge=1)
    """Pictures that go through the VAE together when they are cached; null is 1 on a CPU and what
    its free memory holds on a GPU. Out of memory halves it."""
    budget_gib: float | None = Field(None, gt=0)
    """Device memory that a worker may take, at most; null is what is free. On a CPU, where nothing
    limits it otherwise, tensors beyond the budget are refused as a GPU refuses them."""
    reserve_gib: float = Field(0.5, ge=0)
    """Device memory that a plan leaves free, for what no prediction knows: workspaces of kernels,
    fragments, other programs."""
    host_gib: float | None = Field(None, gt=0)
    """Host memory that the base and what is offloaded may take on a machine, at most; null is 70 %
    of what is free."""
    max_slowdown: float | None = Field(None, ge=1)
    """Take a smaller base where the best one that fits is more than so many times slower than it,
    summed over the fleet; null never does."""

    @property
    def fused(self) -> bool:
        """Whether the adapter is moved within the backward pass."""
        return self.fused_backward or self.fused_groups is not None

    @field_validator("streaming", mode="before")
    @classmethod
    def _is_a_share(cls, given: object) -> object:
        if isinstance(given, bool):
            raise ValueError(
                f"memory.streaming is {str(given).lower()}, which is no share: give auto or 0 to 1."
            )
        return given

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if isinstance(self.streaming, float | int) and not 0 <= self.streaming <= 1:
            raise ValueError(
                f"memory.streaming is {self.streaming:g}, which is no share: give auto or 0 to 1."
            )
        if self.fused_backward and self.fused_groups is not None:
            raise ValueError(
                "memory.fused_backward and memory.fused_groups: give one of them. Both move the "
                "adapter within the backward pass, one layer or one group at a time."
            )
        if self.offload_inputs is True and self.checkpointing == "none" and not self.streaming:
            raise ValueError(
                "memory.offload_inputs moves what blocks that are computed again were given, and "
                "with memory.checkpointing: none no block is. Choose all or alternate."
            )
        if self.budget_gib is not None and self.reserve_gib >= self.budget_gib:
            raise ValueError(
                f"memory.budget_gib is {self.budget_gib:g}, of which memory.reserve_gib "
                f"{self.reserve_gib:g} leaves nothing. Raise the one or lower the other."
            )
        if self.max_slowdown is not None and self.base != "auto":
            raise ValueError(
                f"memory.max_slowdown chooses between bases, and memory.base is {self.base}. Set "
                "it to auto, or leave max_slowdown out."
            )
        return self
