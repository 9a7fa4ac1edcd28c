"""LoKr: the change of a weight is the Kronecker product of a small matrix and a larger one.

ΔW = scale · w1 ⊗ w2, where w2, and if wished w1, is itself a low-rank product. It is never formed:
with x as an (m, n) matrix it gives w1 x w2ᵀ, two small products.

Source: Edalati et al. 2022, arXiv 2212.10650; names, shapes and first weights are those of the
LyCORIS project (Yeh et al. 2023, arXiv 2309.14859).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from raylora.base.options import known_as
from raylora.base.site import Site
from raylora.networks import Arrays, Call, Draw, Network, NetworkOptions, Parameters, Weight
from raylora.networks.lora import uniform


class LokrOptions(NetworkOptions):
    """A Kronecker product of a small matrix and a larger one."""

    kind: Literal["lokr"] = "lokr"
    alpha: float | None = Field(
        None,
        gt=0,
        json_schema_extra=known_as(
            formula="alpha / rank multiplies the adapter's output; 1 where neither block is "
            "low-rank",
            sd_scripts="--network_alpha (1 where not given)",
            guides="linear_alpha",
        ),
    )
    """Strength is alpha / rank; null means alpha = rank (strength 1). Layers whose two blocks are
    both whole have no rank to divide by: every program reads them at strength 1, so they are
    trained so."""
    factor: int = Field(
        -1,
        ge=-1,
        json_schema_extra=known_as(
            formula="outputs = l k, inputs = m n; w1 is l x m, w2 is k x n, l and m the largest "
            "divisors up to factor and to the square root",
            source="Yeh et al. 2023, arXiv 2309.14859",
            sd_scripts="none (LyCORIS: factor)",
        ),
    )
    """Size of the smaller block; -1 picks the divisor nearest to a square. 4 to 16 is usual: the
    smaller it is, the more numbers the larger block has."""
    decompose_both: bool = Field(
        False,
        json_schema_extra=known_as(
            formula="w1 = w1_a w1_b too", sd_scripts="none (LyCORIS: decompose_both)"
        ),
    )
    """Make the smaller block low-rank as well, where that has fewer numbers than the whole."""
    full_matrix: bool = Field(
        False,
        json_schema_extra=known_as(
            formula="w1 and w2 whole", sd_scripts="none (LyCORIS: full_matrix)"
        ),
    )
    """Keep both blocks whole on every layer; size is then set by `factor` alone."""
    tucker: bool = Field(
        False,
        json_schema_extra=known_as(
            formula="w2 = sum over i, j of t2[i, j] w2_a[i] w2_b[j]; t2 is R x R with the kernel",
            source="Yeh et al. 2023, arXiv 2309.14859",
            sd_scripts="none (LyCORIS: use_tucker)",
            guides="Tucker, CP decomposition",
        ),
    )
    """On convolutions larger than 1x1, a core with the kernel between two matrices. ComfyUI reads
    such files; LyCORIS' own reader does not."""
    unbalanced: bool = Field(
        False,
        json_schema_extra=known_as(
            formula="w1 is k x m and w2 l x n: the outputs' larger part in the small block",
            sd_scripts="none (LyCORIS: unbalanced_factorization)",
        ),
    )
    """Swap the outputs' two parts between the blocks: the first then has more numbers, and the
    second fewer."""

    def problems(self, network: Network) -> Iterator[str]:
        """Those of every network, and what whole blocks make useless."""
        yield from super().problems(network)
        if not self.full_matrix:
            return
        without = "network.full_matrix keeps both blocks whole"
        if self.rank != type(self)().rank:
            yield f"{without}, so network.rank {self.rank} would do nothing. Leave one of them out."
        alphas = {
            "alpha": self.alpha,
            "alphas": self.alphas or None,
            "block_alphas": self.block_alphas,
            "conv_block_alphas": self.conv_block_alphas,
        }
        for word, given in alphas.items():
            if given is not None:
                yield f"{without}, which are read at strength 1. Leave out network.{word}."
        if self.decompose_both:
            yield f"{without}, and network.decompose_both splits them. Choose one of the two."
        if self.tucker:
            yield f"{without}, and network.tucker splits the larger one. Choose one of the two."

    def scale_at(self, site: Site) -> float:
        """alpha / rank; 1 where both blocks are whole."""
        blocks = blocks_at(self, site)
        return 1.0 if blocks.first_whole and blocks.second_whole else super().scale_at(site)

    def form_at(self, site: Site) -> tuple[object, ...]:
        """The blocks; a rank where one of them is low-rank, a core where that is the larger."""
        blocks = blocks_at(self, site)
        whole = blocks.first_whole and blocks.second_whole
        core = self.tucker and site.kernel != (1, 1) and not blocks.second_whole
        return blocks, None if whole else self.rank_at(site), self.scale_at(site), core


class Blocks(NamedTuple):
    """How one layer's weight is split: outputs = first[0] · second[0], inputs likewise."""

    first: tuple[int, int]
    second: tuple[int, int]
    first_whole: bool
    second_whole: bool


def blocks_at(options: LokrOptions, site: Site) -> Blocks:
    """Sizes of the two blocks at a layer, and which of them has no fewer numbers as a product."""
    (few_out, many_out), (few_in, many_in) = (
        two_factors(size, options.factor) for size in (site.outputs, site.inputs)
    )
    if options.unbalanced:
        few_out, many_out = many_out, few_out
    rank, full = options.rank_at(site), options.full_matrix
    first_whole = full or not options.decompose_both or 2 * rank >= max(few_out, few_in)
    second_whole = full or 2 * rank >= max(many_out, many_in)
    return Blocks((few_out, few_in), (many_out, many_in), first_whole, second_whole)


def two_factors(size: int, factor: int) -> tuple[int, int]:
    """A size as the product of a smaller and a larger number.

    A factor that divides it is one of them. Else the smaller is the largest divisor up to the
    factor, and without one (-1) up to the square root.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    small = largest_divisor(size, size if factor < 1 else factor)
    return small, size // small


def largest_divisor(size: int, limit: int) -> int:
    """The largest divisor of a size that is neither above a limit nor above the square root."""
    return max(n for n in range(1, int(size**0.5) + 1) if size % n == 0 and n <= max(limit, 1))


def initial(options: LokrOptions, site: Site, draw: Draw, weight: Weight) -> Arrays:
    """The larger block, or its second half, zero: a fresh adapter changes nothing.

    The others are uniform within 1/sqrt(numbers in), as a layer of their shape would be.
    """
    blocks, rank = blocks_at(options, site), options.rank_at(site)
    (few_out, few_in), (many_out, many_in) = blocks.first, blocks.second
    kernel = site.kernel if site.kernel != (1, 1) else ()
    found: Arrays = {}
    if blocks.first_whole:
        found["lokr_w1"] = uniform(draw, few_out, few_in)
    else:
        found["lokr_w1_a"] = uniform(draw, few_out, rank)
        found["lokr_w1_b"] = uniform(draw, rank, few_in)
    if blocks.second_whole:
        found["lokr_w2"] = np.zeros((many_out, many_in, *kernel))
    elif options.tucker and kernel:
        found["lokr_t2"] = uniform(draw, rank, rank, *kernel)
        found["lokr_w2_a"] = uniform(draw, rank, many_out)
        found["lokr_w2_b"] = np.zeros((rank, many_in))
    else:
        found["lokr_w2_a"] = uniform(draw, many_out, rank)
        found["lokr_w2_b"] = np.zeros((rank, many_in, *kernel))
    return found


def forward(parameters: Parameters, call: Call) -> Tensor:
    """The adapted output; a gate leaves out whole rows."""
    held = {word: tensor.to(call.x.dtype) for word, tensor in parameters.items()}
    output = _on_pixels(held, call) if call.site.kind == "conv" else _on_tokens(held, call.x)
    if call.gate is not None:
        output = call.gate(output)
    return call.base_output + call.scale * call.strength * output


def _on_tokens(held: Parameters, x: Tensor) -> Tensor:
    """w1 X w2ᵀ, where X is x's last axis as (m, n)."""
    first_LM = first_block(held)
    hidden = x.unflatten(-1, (first_LM.shape[1], -1))
    if "lokr_w2" in held:
        hidden = F.linear(hidden, held["lokr_w2"])
    else:
        hidden = F.linear(F.linear(hidden, held["lokr_w2_b"]), held["lokr_w2_a"])
    return (first_LM @ hidden).flatten(-2)


def _on_pixels(held: Parameters, call: Call) -> Tensor:
    """The same over the channels of (B, m n, H, W); the kernel is w2's."""
    first_LM, site = first_block(held), call.site
    groups = call.x.unflatten(1, (first_LM.shape[1], -1)).flatten(0, 1)
    if "lokr_w2" in held:
        hidden = F.conv2d(groups, _kernel(held["lokr_w2"]), None, site.stride, site.padding)
    elif "lokr_t2" in held:
        hidden = F.conv2d(groups, _kernel(held["lokr_w2_b"]))
        hidden = F.conv2d(hidden, held["lokr_t2"], None, site.stride, site.padding)
        hidden = F.conv2d(hidden, _kernel(held["lokr_w2_a"].T))
    else:
        hidden = F.conv2d(groups, _kernel(held["lokr_w2_b"]), None, site.stride, site.padding)
        hidden = F.conv2d(hidden, _kernel(held["lokr_w2_a"]))
    grouped_BMKP = hidden.unflatten(0, (len(call.x), -1)).flatten(3)
    mixed_BLKP = torch.einsum("lm,bmkp->blkp", first_LM, grouped_BMKP)
    return mixed_BLKP.reshape(len(call.x), -1, *hidden.shape[2:])


def _kernel(weight: Tensor) -> Tensor:
    return weight if weight.dim() == 4 else weight[:, :, None, None]


def first_block(parameters: Parameters) -> Tensor:
    """w1, (l, m)."""
    if "lokr_w1" in parameters:
        return parameters["lokr_w1"]
    return parameters["lokr_w1_a"] @ parameters["lokr_w1_b"]


def second_block(parameters: Parameters) -> Tensor:
    """w2, (k, n) or (k, n, kh, kw)."""
    if "lokr_w2" in parameters:
        return parameters["lokr_w2"]
    outer, inner = parameters["lokr_w2_a"], parameters["lokr_w2_b"]
    if "lokr_t2" in parameters:
        return torch.einsum("rshw,rk,sn->knhw", parameters["lokr_t2"], outer, inner)
    return (outer @ inner.flatten(1)).view(len(outer), *inner.shape[1:])


def export(parameters: Parameters, site: Site, scale: float) -> dict[str, Tensor]:
    """The blocks under LyCORIS' names; w2 has the kernel, w2_b it flattened, as readers expect.

    Readers divide alpha by the rank of a low-rank block. Where there is none they ignore it, so
    the strength goes into w1.
    """
    found = dict(parameters)
    if site.kind == "conv" and "lokr_w2" in found:
        found["lokr_w2"] = _kernel(found["lokr_w2"])
    if "lokr_w2_b" in found:
        found["lokr_w2_b"] = found["lokr_w2_b"].flatten(1)
    inner = found.get("lokr_w1_b", found.get("lokr_w2_b"))
    if inner is None:
        found["lokr_w1"] = found["lokr_w1"] * scale
        return {**found, "alpha": torch.tensor(1.0)}
    return {**found, "alpha": torch.tensor(scale * len(inner), dtype=torch.float32)}


def merged(parameters: Parameters, site: Site, scale: float, held: Parameters) -> dict[str, Tensor]:
    """The weight plus scale times the Kronecker product."""
    exact = {word: tensor.double() for word, tensor in parameters.items()}
    first, second = first_block(exact), second_block(exact)
    if second.dim() == 4:
        first = first[:, :, None, None]
    change = scale * torch.kron(first, second.contiguous())
    return {**held, "weight": held["weight"] + change.view(held["weight"].shape)}


network = Network(
    options=LokrOptions,
    initial=initial,
    forward=forward,
    export=export,
    merged=merged,
    drops=frozenset({"module_dropout"}),
)
