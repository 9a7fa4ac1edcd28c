"""Other algorithms of the LyCORIS project: BOFT, GLoRA, (IA)³, whole weights, and norms.

Each is written here from its paper, under the words of that project's files. What it has beside
these are kinds of their own (lora, locon, dora, loha, lokr, oft, dylora).

| algo | change | source |
| --- | --- | --- |
| boft | outputs turned by a product of butterflies, W' = Bₘ … B₁ W | arXiv 2311.06243 |
| glora | ΔW = scale · (W a1 a2 + b1 b2) | arXiv 2306.07967 |
| ia3 | each output, or each input, times 1 + weight | arXiv 2205.05638 |
| full | ΔW and Δbias themselves | |
| norms | scale and shift of normalisations | |
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from raylora.base.options import known_as
from raylora.base.site import Site
from raylora.networks import (
    Arrays,
    Call,
    Draw,
    Network,
    NetworkOptions,
    Parameters,
    Weight,
    lora,
    oft,
)
from raylora.networks.dora import along, through, unbiased

_KINDS = {
    "lora": "lora",
    "locon": "locon",
    "dora": "dora",
    "loha": "loha",
    "lokr": "lokr",
    "oft": "oft",
    "diag-oft": "oft",
    "dylora": "dylora",
}
"""Its words for what is a kind of its own here."""
_RANKED = ("boft", "glora")
_USED_BY = {
    "rank": _RANKED,
    "alpha": _RANKED,
    "alphas": _RANKED,
    "block_alphas": _RANKED,
    "conv_block_alphas": _RANKED,
    "rescale": ("boft",),
    "on_input": ("ia3",),
    "dropout": ("glora",),
    "rank_dropout": ("glora",),
}
"""Options that only some algorithms have a use for."""


class LycorisOptions(NetworkOptions):
    """Other algorithms of that project, one of them at a time."""

    kind: Literal["lycoris"] = "lycoris"
    algo: Literal["boft", "glora", "ia3", "full", "norms"] = Field(
        "glora",
        json_schema_extra=known_as(
            source="boft: Liu et al. 2023; glora: Chavan et al. 2023; ia3: Liu et al. 2022",
            sd_scripts="--network_module lycoris.kohya with --network_args algo",
        ),
    )
    """Which of them. glora: LoRA that can also reuse the layer's own weight. boft: rotations of all
    outputs among each other, with few numbers. ia3: one number for each output or input, the
    smallest there is; ComfyUI does not read it. full: the whole weight and bias, as large as the
    layers. norms: scale and shift of normalisations alone, which `layers: [norm]` chooses."""
    rank: int = Field(
        16,
        ge=1,
        le=4096,
        json_schema_extra=known_as(
            formula="glora: width of a1 a2 and of b1 b2; boft: a block's size is the largest even "
            "number up to rank that is the layer's outputs over a power of two",
            sd_scripts="--network_dim",
            guides="dim, factor",
        ),
    )
    """Width of glora's two pairs; the largest block of boft. The others have none."""
    alpha: float | None = Field(
        None,
        gt=0,
        json_schema_extra=known_as(
            formula="glora: alpha / rank multiplies the change; boft: Q times alpha · outputs / "
            "norm of Q, where that is below 1",
            sd_scripts="--network_alpha; constraint",
        ),
    )
    """glora's strength is alpha / rank, null is 1. boft is turned by so much at most, null is no
    limit. The others have none."""
    rescale: bool = Field(False, json_schema_extra=known_as(sd_scripts="none (LyCORIS: rescaled)"))
    """boft: learn a strength for each output beside the rotation."""
    on_input: bool = Field(
        False, json_schema_extra=known_as(sd_scripts="none (LyCORIS: train_on_input)")
    )
    """ia3: a number for each input instead of each output."""

    @field_validator("algo", mode="before")
    @classmethod
    def _is_no_kind_of_its_own(cls, algo: Any) -> Any:
        if isinstance(algo, str) and algo in _KINDS:
            raise ValueError(f"{algo} is a kind of its own. Set network.kind: {_KINDS[algo]}.")
        return algo

    def problems(self, network: Network) -> Iterator[str]:
        """Those of every network, and options that the algorithm has no use for."""
        yield from super().problems(network)
        given = {
            "rank": self.rank != type(self).model_fields["rank"].default,
            "alpha": self.alpha is not None,
            "alphas": bool(self.alphas),
            "block_alphas": self.block_alphas is not None,
            "conv_block_alphas": self.conv_block_alphas is not None,
            "rescale": self.rescale,
            "on_input": self.on_input,
            "dropout": bool(self.dropout),
            "rank_dropout": bool(self.rank_dropout),
        }
        for word, is_given in given.items():
            algos = _USED_BY[word]
            if is_given and self.algo not in algos:
                yield (
                    f"network.{word}: {self.algo} has none. Leave it out, or set network.algo: "
                    f"{' or '.join(algos)}."
                )

    def scale_at(self, site: Site) -> float:
        """alpha / rank of glora, the largest norm of Q of boft (0 is no limit), 1 of the others."""
        if self.algo == "boft":
            return oft.limit_at(self, site)
        return super().scale_at(site) if self.algo == "glora" else 1.0

    def form_at(self, site: Site) -> tuple[object, ...]:
        """boft has blocks in the place of a rank, and what is as large as the layer has nothing."""
        if self.algo == "boft":
            return butterfly(site.outputs, self.rank_at(site)), self.scale_at(site)
        return super().form_at(site) if self.algo == "glora" else ()


def _not_on_norms(options: LycorisOptions, site: Site) -> str | None:
    if site.kind == "norm":
        return f"{options.algo} is for linear layers and convolutions, and this is a norm"
    return None


# boft: a product of block-diagonal rotations, each over outputs further apart


def butterfly(outputs: int, rank: int) -> tuple[int, int, int] | None:
    """(stages, blocks, size of a block) of a layer's rotation; None where there is none.

    Blocks have an even size, and their number is a power of two: stage i turns groups of
    size · 2^i outputs, so that after the last one every output reaches every other.
    """
    for size in range(rank - rank % 2, 0, -2):
        blocks, rest = divmod(outputs, size)
        if rest == 0 and blocks & (blocks - 1) == 0:
            return blocks.bit_length(), blocks, size
    return None


def _boft_fits(options: LycorisOptions, site: Site) -> str | None:
    if site.kind == "norm" or butterfly(site.outputs, options.rank_at(site)):
        return _not_on_norms(options, site)
    odd = site.outputs
    while odd % 2 == 0:
        odd //= 2
    enough = f" (network.rank {2 * odd} is enough)" if odd < site.outputs else ""
    return (
        f"its {site.outputs} outputs are no power of two times an even number up to network.rank "
        f"{options.rank_at(site)}{enough}, so boft has no blocks for them"
    )


def _boft_initial(options: LycorisOptions, site: Site, draw: Draw, weight: Weight) -> Arrays:
    """Zero: every stage is then the identity. `oft_blocks` (stages, blocks, size, size)."""
    shape = butterfly(site.outputs, options.rank_at(site))
    assert shape is not None
    found: Arrays = {"oft_blocks": np.zeros((*shape, shape[-1]))}
    return {**found, "rescale": np.ones(site.outputs)} if options.rescale else found


def _boft_forward(parameters: Parameters, call: Call) -> Tensor:
    """Turns what the frozen layer gave, stage by stage, or its weight where that has fewer columns.

    Which of the two does not depend on how many samples there are.
    """
    output = unbiased(call)
    turns_MNST = oft.turn(parameters["oft_blocks"], call.scale).to(output.dtype)
    frozen = call.layer.weight
    assert isinstance(frozen, Tensor)
    if frozen[0].numel() < output[0].numel() // call.site.outputs:
        turned_OK = _turned(frozen.to(output.dtype).flatten(1), turns_MNST)
        change = through(call.x, turned_OK, call.site)
    elif call.site.kind == "conv":
        change = _turned(output.flatten(2), turns_MNST).reshape(output.shape)
    else:
        change = _turned(output.mT.contiguous(), turns_MNST).mT
    return oft.added(change, output, parameters, call)


def _turned(y_OP: Tensor, turns_MNST: Tensor) -> Tensor:
    """What the stages add to y, (..., O, P); only differences are kept."""
    change_OP = torch.zeros_like(y_OP)
    for stage, turn_NST in enumerate(turns_MNST.unbind()):
        apart = 2**stage * turn_NST.shape[-1] // 2
        mixed = (y_OP + change_OP).unflatten(-2, (-1, 2, apart)).transpose(-3, -2)
        mixed = turn_NST @ mixed.flatten(-4, -2).unflatten(-2, turn_NST.shape[:2])
        apart_again = mixed.flatten(-3, -2).unflatten(-2, (-1, apart, 2)).transpose(-3, -2)
        change_OP = change_OP + apart_again.flatten(-4, -2)
    return change_OP


def _boft_merged(
    parameters: Parameters, site: Site, scale: float, held: Parameters
) -> dict[str, Tensor]:
    weight_OK = held["weight"].flatten(1)
    turns_MNST = oft.turn(parameters["oft_blocks"].double(), scale)
    return oft.rescaled(weight_OK + _turned(weight_OK, turns_MNST), parameters, held)


# glora: LoRA, and a low-rank change of what the layer is given


def _glora_initial(options: LycorisOptions, site: Site, draw: Draw, weight: Weight) -> Arrays:
    """a1 (I, R), b1 (O, R) at random; a2 (R, I), b2 (R, I, …) zero, so that nothing is changed."""
    rank = options.rank_at(site)
    kernel = site.kernel if site.kernel != (1, 1) else ()
    return {
        "a1": lora.uniform(draw, site.inputs, rank),
        "a2": np.zeros((rank, site.inputs)),
        "b1": lora.uniform(draw, site.outputs, rank),
        "b2": np.zeros((rank, site.inputs, *kernel)),
    }


def _glora_forward(parameters: Parameters, call: Call) -> Tensor:
    """W a1 is formed, which is (O, R): what is added is then two LoRAs."""
    frozen = call.layer.weight
    assert isinstance(frozen, Tensor)
    x, site = call.x, call.site
    reused = _times_a1(frozen.to(x.dtype), parameters["a1"].to(x.dtype))
    narrowed = lora.out_of_rank(x, parameters["a2"], site)
    hidden = lora.into_rank(x, parameters["b2"], site)
    if call.gate is not None:
        narrowed, hidden = call.gate(narrowed), call.gate(hidden)
    change = through(narrowed, reused, site) + lora.out_of_rank(hidden, parameters["b1"], site)
    return call.base_output + call.scale * call.strength * change


def _times_a1(weight: Tensor, a1_IR: Tensor) -> Tensor:
    """W a1, (O, R) or (O, R, kh, kw)."""
    if weight.dim() == 2:
        return weight @ a1_IR
    return torch.einsum("oihw,ir->orhw", weight, a1_IR)


def _glora_export(parameters: Parameters, site: Site, scale: float) -> dict[str, Tensor]:
    found = {}
    for word, tensor in parameters.items():
        small = site.kind == "conv" and tensor.dim() == 2
        found[f"{word}.weight"] = tensor[:, :, None, None] if small else tensor
    rank = len(parameters["a2"])
    return {**found, "alpha": torch.tensor(scale * rank, dtype=torch.float32)}


def _glora_merged(
    parameters: Parameters, site: Site, scale: float, held: Parameters
) -> dict[str, Tensor]:
    exact = {word: tensor.double() for word, tensor in parameters.items()}
    weight = held["weight"]
    reused = torch.einsum("or...,ri->oi...", _times_a1(weight, exact["a1"]), exact["a2"])
    own = (exact["b1"] @ exact["b2"].flatten(1)).view(weight.shape)
    return {**held, "weight": weight + scale * (reused + own)}


# ia3: a number for each output, or for each input


def _ia3_initial(options: LycorisOptions, site: Site, draw: Draw, weight: Weight) -> Arrays:
    if options.on_input:
        return {"of_inputs": np.zeros(site.inputs)}
    return {"of_outputs": np.zeros(site.outputs)}


def _ia3_forward(parameters: Parameters, call: Call) -> Tensor:
    if "of_outputs" in parameters:
        output = unbiased(call)
        change = along(parameters["of_outputs"], output, call.site) * output
    else:
        frozen = call.layer.weight
        assert isinstance(frozen, Tensor)
        x = along(parameters["of_inputs"], call.x, call.site) * call.x
        change = through(x, frozen, call.site)
    if call.gate is not None:
        change = call.gate(change)
    return call.base_output + call.strength * change


def _ia3_export(parameters: Parameters, site: Site, scale: float) -> dict[str, Tensor]:
    on_input = "of_inputs" in parameters
    weight = parameters["of_inputs" if on_input else "of_outputs"]
    if site.kind == "conv":
        weight = weight.view(1, -1, 1, 1)
    return {"weight": weight, "on_input": torch.tensor(int(on_input))}


def _ia3_merged(
    parameters: Parameters, site: Site, scale: float, held: Parameters
) -> dict[str, Tensor]:
    on_input = "of_inputs" in parameters
    numbers = parameters["of_inputs" if on_input else "of_outputs"].double()
    shape = [1] * held["weight"].dim()
    shape[int(on_input)] = -1
    return {**held, "weight": held["weight"] * (1 + numbers.view(shape))}


# full: the change itself


def _full_initial(options: LycorisOptions, site: Site, draw: Draw, weight: Weight) -> Arrays:
    """Zeros: `diff` (O, I) or (O, I, kh, kw), and `diff_b` (O,) where the layer has a bias."""
    kernel = site.kernel if site.kernel != (1, 1) else ()
    found: Arrays = {"diff": np.zeros((site.outputs, site.inputs, *kernel))}
    return {**found, "diff_b": np.zeros(site.outputs)} if site.bias else found


def _full_forward(parameters: Parameters, call: Call) -> Tensor:
    change = through(call.x, parameters["diff"], call.site)
    if "diff_b" in parameters:
        change = change + along(parameters["diff_b"], change, call.site)
    if call.gate is not None:
        change = call.gate(change)
    return call.base_output + call.strength * change


def _full_export(parameters: Parameters, site: Site, scale: float) -> dict[str, Tensor]:
    diff = parameters["diff"]
    if site.kind == "conv" and diff.dim() == 2:
        diff = diff[:, :, None, None]
    return {**parameters, "diff": diff}


def _full_merged(
    parameters: Parameters, site: Site, scale: float, held: Parameters
) -> dict[str, Tensor]:
    found = {"weight": held["weight"] + parameters["diff"].double().view(held["weight"].shape)}
    if "diff_b" in parameters:
        found["bias"] = held["bias"] + parameters["diff_b"].double()
    return {**held, **found}


# norms: what a normalisation multiplies with and adds


def _norms_fit(options: LycorisOptions, site: Site) -> str | None:
    if site.kind == "norm":
        return None
    return "norms is for normalisations alone (network.layers: [norm]), and this is none"


def _norms_initial(options: LycorisOptions, site: Site, draw: Draw, weight: Weight) -> Arrays:
    """Zeros: `w_norm` (O,), and `b_norm` (O,) where the norm has a shift."""
    found: Arrays = {"w_norm": np.zeros(site.outputs)}
    return {**found, "b_norm": np.zeros(site.outputs)} if site.bias else found


def _norms_forward(parameters: Parameters, call: Call) -> Tensor:
    normal, axis = _normalised(call.x, call.layer)
    shape = [1] * normal.dim()
    shape[axis] = -1
    change = normal * parameters["w_norm"].to(normal.dtype).view(shape)
    if "b_norm" in parameters:
        change = change + parameters["b_norm"].to(normal.dtype).view(shape)
    if call.gate is not None:
        change = call.gate(change)
    return call.base_output + call.strength * change


def _normalised(x: Tensor, layer: nn.Module) -> tuple[Tensor, int]:
    """(x as the layer normalises it, before its scale and shift, the channels' axis)."""
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, eps=layer.eps), 1
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, eps=layer.eps), -1
    # A norm by root mean square; transformers and diffusers call its epsilon differently.
    word = "variance_epsilon" if hasattr(layer, "variance_epsilon") else "eps"
    return F.rms_norm(x, x.shape[-1:], eps=getattr(layer, word)), -1


def _norms_merged(
    parameters: Parameters, site: Site, scale: float, held: Parameters
) -> dict[str, Tensor]:
    found = {"weight": held["weight"] + parameters["w_norm"].double()}
    if "b_norm" in parameters:
        found["bias"] = held["bias"] + parameters["b_norm"].double()
    return {**held, **found}


def _as_they_are(parameters: Parameters, site: Site, scale: float) -> dict[str, Tensor]:
    return dict(parameters)


_WHOLE = frozenset({"module_dropout"})
_ALGORITHMS = {
    "boft": Network(
        LycorisOptions,
        _boft_initial,
        _boft_forward,
        oft.export,
        _boft_merged,
        fits=_boft_fits,
        drops=_WHOLE,
    ),
    "glora": Network(
        LycorisOptions,
        _glora_initial,
        _glora_forward,
        _glora_export,
        _glora_merged,
        fits=_not_on_norms,
        drops=lora.DROPS,
    ),
    "ia3": Network(
        LycorisOptions,
        _ia3_initial,
        _ia3_forward,
        _ia3_export,
        _ia3_merged,
        fits=_not_on_norms,
        drops=_WHOLE,
    ),
    "full": Network(
        LycorisOptions,
        _full_initial,
        _full_forward,
        _full_export,
        _full_merged,
        fits=_not_on_norms,
        drops=_WHOLE,
    ),
    "norms": Network(
        LycorisOptions,
        _norms_initial,
        _norms_forward,
        _as_they_are,
        _norms_merged,
        fits=_norms_fit,
        drops=_WHOLE,
    ),
}
_TOLD_BY = {
    "oft_blocks": "boft",
    "a1": "glora",
    "of_outputs": "ia3",
    "of_inputs": "ia3",
    "diff": "full",
    "w_norm": "norms",
}
"""A parameter that tells the algorithm."""


def _of(parameters: Parameters) -> Network:
    return _ALGORITHMS[next(_TOLD_BY[word] for word in parameters if word in _TOLD_BY)]


def initial(options: LycorisOptions, site: Site, draw: Draw, weight: Weight) -> Arrays:
    """The algorithm's first parameters; a fresh adapter changes nothing."""
    return _ALGORITHMS[options.algo].initial(options, site, draw, weight)


def forward(parameters: Parameters, call: Call) -> Tensor:
    """The adapted output."""
    return _of(parameters).forward(parameters, call)


def export(parameters: Parameters, site: Site, scale: float) -> dict[str, Tensor]:
    """The words of that project's files."""
    return _of(parameters).export(parameters, site, scale)


def merged(parameters: Parameters, site: Site, scale: float, held: Parameters) -> dict[str, Tensor]:
    """The layer's weight, and its bias where that is trained, with the adapter in it."""
    return _of(parameters).merged(parameters, site, scale, held)


def fits(options: LycorisOptions, site: Site) -> str | None:
    """Norms for `norms`, all but these for the others; boft where the outputs allow blocks."""
    return _ALGORITHMS[options.algo].fits(options, site)


network = Network(
    options=LycorisOptions,
    initial=initial,
    forward=forward,
    export=export,
    merged=merged,
    fits=fits,
    drops=lora.DROPS,
)
