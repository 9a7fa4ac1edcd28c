"""LoRA: a frozen layer's output plus scale * up(down(x)).

Source: Hu et al. 2021, arXiv 2106.09685. Linear layers and convolutions. A frozen `down` is LoRA-FA
(Zhang et al. 2023, arXiv 2308.03303), alpha / sqrt(rank) rsLoRA (Kalajdzievski 2023, arXiv
2312.03732), a start at the weight's principal directions PiSSA (Meng et al. 2024, arXiv
2404.02948).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from raylora.base.options import known_as
from raylora.base.site import Site
from raylora.networks import Arrays, Call, Draw, Network, NetworkOptions, Parameters, Weight

DROPS = frozenset({"dropout", "rank_dropout", "module_dropout"})
"""What a network with a rank-sized hidden can leave out."""
_SPARE = 16  # directions beyond those asked for, which make the last of them exact sooner
_ROUNDS = 8  # each squares how far the asked directions stand above the others


class LowRankOptions(NetworkOptions):
    """What LoRA and LoCon may also be told."""

    scaling: Literal["rank", "sqrt_rank"] = Field(
        "rank",
        json_schema_extra=known_as(
            formula="rank: alpha / rank; sqrt_rank: alpha / sqrt(rank)",
            source="Kalajdzievski 2023, arXiv 2312.03732",
            sd_scripts="none",
            guides="rsLoRA, rank-stabilised LoRA",
        ),
    )
    """What alpha is divided by. sqrt_rank keeps wide adapters (64 and more) learning as fast as
    narrow ones; files are written so that every reader applies the same."""
    freeze_down: bool = Field(
        False,
        json_schema_extra=known_as(
            formula="down stays as it was drawn, up alone is trained",
            source="Zhang et al. 2023, arXiv 2308.03303",
            sd_scripts="networks.lora_fa",
            guides="LoRA-FA",
        ),
    )
    """Train `up` alone. Layers then need not remember their inputs, which saves memory where
    gradient checkpointing is off, and half of the optimizer's state; it learns a little less."""
    start: Literal["plain", "pissa"] = Field(
        "plain",
        json_schema_extra=known_as(
            formula="W x + alpha / rank (up(down(x)) - up0(down0(x))); up0 down0 is W's best "
            "approximation of that rank, divided by alpha / rank",
            source="Meng et al. 2024, arXiv 2404.02948 (there W is changed instead)",
            sd_scripts="none",
            guides="PiSSA",
        ),
    )
    """Where training begins. plain: at random. pissa: at the weight's largest singular directions,
    which often learns faster. The base stays as it is, so the file works with any program; it is a
    LoRA of twice the rank."""

    def problems(self, network: Network) -> Iterator[str]:
        """Those of every network, and what does not go together here."""
        yield from super().problems(network)
        if self.scaling == "sqrt_rank" and not self.gives_alpha:
            yield (
                "network.scaling is sqrt_rank, and without network.alpha the strength is 1 however "
                "alpha is divided. Give network.alpha (1 to 4 is usual with it), or leave scaling "
                "out."
            )
        if self.start == "plain":
            return
        if self.freeze_down:
            yield (
                "network.freeze_down keeps `down` as it was drawn, and network.start pissa trains "
                "it from a better place. Choose one of them."
            )
        if self.max_norm is not None:
            yield (
                "network.max_norm scales both halves down, which with network.start pissa is no "
                "smaller change: it would pull them away from where they began. Leave one of them "
                "out."
            )
        if self.initial is not None:
            yield (
                "network.initial is a file to begin from, and network.start pissa is where to "
                "begin without one. Leave one of them out."
            )

    @property
    def gives_alpha(self) -> bool:
        """Whether some layer's strength is not simply 1."""
        lists = self.block_alphas or self.conv_block_alphas
        return self.alpha is not None or bool(self.alphas) or lists is not None

    def divided(self, alpha: float, rank: int) -> float:
        """The strength that an alpha means at a rank."""
        return alpha / (rank if self.scaling == "rank" else math.sqrt(rank))


class LoraOptions(LowRankOptions):
    """Low-rank adapters on linear layers and 1x1 convolutions."""

    kind: Literal["lora"] = "lora"


def initial(options: LowRankOptions, site: Site, draw: Draw, weight: Weight) -> Arrays:
    """Halves as `network.start` says; either way a fresh adapter changes nothing."""
    rank = options.rank_at(site)
    if options.start == "pissa":
        return _principal(weight(), rank, options.scale_at(site), site, draw)
    return plain(rank, site, draw)


def plain(rank: int, site: Site, draw: Draw) -> Arrays:
    """`down` uniform within 1/sqrt(numbers in), `up` zero.

    The bound is that of Kaiming's uniform with a = sqrt(5), which sd-scripts uses. `down` is (R, I)
    for a linear layer or a 1x1 convolution, (R, I, kh, kw) for a larger one; `up` (O, R).
    """
    size = site.kernel if site.kernel != (1, 1) else ()
    return {
        "down": uniform(draw, rank, site.inputs, *size),
        "up": np.zeros((site.outputs, rank)),
    }


def uniform(draw: Draw, rows: int, *inputs: int) -> NDArray[np.float64]:
    """Numbers within 1/sqrt(numbers in)."""
    drawn: NDArray[np.float64] = draw((rows, *inputs)) / np.sqrt(math.prod(inputs))
    return drawn


def constants(options: LowRankOptions, site: Site) -> frozenset[str]:
    """A frozen `down`; the start that PiSSA's change is counted from."""
    if options.start == "pissa":
        return frozenset({"start_down", "start_up"})
    return frozenset({"down"} if options.freeze_down else ())


def _principal(
    weight: NDArray[np.float64], rank: int, scale: float, site: Site, draw: Draw
) -> Arrays:
    """Halves whose product, times scale, is the best approximation of the weight of that rank."""
    matrix_OK = weight.reshape(site.outputs, -1)
    outer_OR, sizes_R, inner_RK = largest_directions(matrix_OK, rank, draw)
    roots_R = np.sqrt(sizes_R / scale)
    up, down = outer_OR * roots_R, roots_R[:, None] * inner_RK
    if site.kernel != (1, 1):
        down = down.reshape(rank, site.inputs, *site.kernel)
    # The change is counted from what the buffers hold, so both must be rounded alike: two copies.
    return {"down": down, "up": up, "start_down": down.copy(), "start_up": up.copy()}


def largest_directions(
    matrix_OK: NDArray[np.float64], count: int, draw: Draw
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The largest singular values with their vectors, of the same sign on every machine.

    By iterating on a random subspace, which for rank 16 of a 1280 x 1280 weight is some ten times
    less work than the whole decomposition. Where the matrix has fewer, the others are zero.

    Returns:
        (O, count) outer, (count,) sizes falling, (count, K) inner; each inner vector's largest
        number is positive.

    Source: Halko, Martinsson & Tropp 2011, arXiv 0909.4061, sections 4.5 and 5.1.
    """
    if matrix_OK.shape[0] < matrix_OK.shape[1]:
        inner_KR, sizes_R, outer_RO = _of_tall(matrix_OK.T, count, draw)
        outer_OR, inner_RK = outer_RO.T, inner_KR.T
    else:
        outer_OR, sizes_R, inner_RK = _of_tall(matrix_OK, count, draw)
    largest_R = np.abs(inner_RK).argmax(axis=1)
    signs_R = np.where(inner_RK[np.arange(count), largest_R] < 0, -1.0, 1.0)
    return outer_OR * signs_R, sizes_R, inner_RK * signs_R[:, None]


def _of_tall(
    matrix_LS: NDArray[np.float64], count: int, draw: Draw
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The same of a matrix that is no wider than it is long, of whatever sign."""
    long, short = matrix_LS.shape
    width = min(count + _SPARE, short)
    basis_SW, _ = np.linalg.qr(draw((short, width)))
    for _ in range(_ROUNDS):
        # Made upright again on the short side alone, where that costs least.
        basis_SW, _ = np.linalg.qr(matrix_LS.T @ (matrix_LS @ basis_SW))
    outer_LW, sizes_W, small_WW = np.linalg.svd(matrix_LS @ basis_SW, full_matrices=False)
    kept = min(count, width)
    outer, sizes, inner = np.zeros((long, count)), np.zeros(count), np.zeros((count, short))
    outer[:, :kept], sizes[:kept] = outer_LW[:, :kept], sizes_W[:kept]
    inner[:kept] = (small_WW @ basis_SW.T)[:kept]
    return outer, sizes, inner


def halves(parameters: Parameters) -> tuple[Tensor, Tensor]:
    """(down, up) whose product is the change; PiSSA's are twice as wide.

    U D - U0 D0 is taken as (U - U0) D + U0 (D - D0): both differences are small and exact, where
    the two products would cancel and leave the rounding of 16-bit activations.
    """
    down, up = parameters["down"], parameters["up"]
    if "start_down" not in parameters:
        return down, up
    start_down, start_up = parameters["start_down"], parameters["start_up"]
    return torch.cat([down, down - start_down]), torch.cat([up - start_up, start_up], dim=1)


class _Halves(NamedTuple):
    """Both halves of a layer as they are computed with, and what becomes of the results.

    Attributes:
        down_RI, up_OR: in the dtype that is computed in, or cast to it at each use.
        scale: of their product.
        overwrite: the base's output may be written over.
        sums: the gradients' own tensors, (down, up), to which they are added; None hands them back
            to autograd, which casts each and adds it in two operations more. Of a half that is not
            trained there is none.
    """

    down_RI: Tensor
    up_OR: Tensor
    scale: float
    overwrite: bool
    sums: tuple[Tensor | None, Tensor | None] | None

    def left(self, grad_down: Tensor | None, grad_up: Tensor) -> tuple[Tensor | None, ...]:
        """What is handed back of the gradients, once they are added where that is wanted."""
        if self.sums is None:
            return grad_down, grad_up
        for held, grad in zip(self.sums, (grad_down, grad_up), strict=True):
            if held is not None and grad is not None:
                held.add_(grad)
        return None, None


class _LowRank(torch.autograd.Function):
    """base + scale * x down^T up^T over tokens, keeping x and the rank-sized hidden for backward.

    Written out, because the usual wrapper keeps a copy of x in the adapter's dtype and the scaled
    and unscaled outputs, and dispatches three times as many operations. `down` and `up` are what
    the gradients are of; `halves` is what is computed with.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, base: Tensor, halves: _Halves
    ) -> Tensor:
        x_NI = x.flatten(0, -2)
        # Rank first, here and below: BLAS is two to four times slower where a result is R wide.
        hidden_RN = halves.down_RI.to(x.dtype) @ x_NI.T
        # A frozen down has no use for x, which is the larger by far.
        ctx.save_for_backward(x if down.requires_grad else None, hidden_RN)
        ctx.halves, ctx.shape = halves, x.shape
        up_RO = halves.up_OR.to(x.dtype).T
        if halves.overwrite and base.is_contiguous():
            # Autograd need not know: nothing keeps what a frozen layer gave.
            adapted = base.data
            adapted_NO = adapted.flatten(0, -2)
            torch.addmm(adapted_NO, hidden_RN.T, up_RO, alpha=halves.scale, out=adapted_NO)
            return adapted
        adapted = torch.addmm(base.flatten(0, -2), hidden_RN.T, up_RO, alpha=halves.scale)
        return adapted.view(base.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden_RN = ctx.saved_tensors
        halves: _Halves = ctx.halves
        grad_NO, up_RO = grad.flatten(0, -2), halves.up_OR.to(grad.dtype).T
        grad_hidden_RN = _product(up_RO, grad_NO.T, halves.scale, like=hidden_RN)
        grad_up_RO = _product(hidden_RN, grad_NO, halves.scale, like=up_RO)
        grad_down = None if x is None else grad_hidden_RN @ x.flatten(0, -2)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_hidden_RN.T @ halves.down_RI.to(grad.dtype)).view(ctx.shape)
        return grad_x, *halves.left(grad_down, grad_up_RO.T), grad, None


class _LowRankConv(torch.autograd.Function):
    """The same over feature maps (B, I, H, W), P pixels, for 1x1 convolutions."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, base: Tensor, halves: _Halves
    ) -> Tensor:
        hidden_BRP = halves.down_RI.to(x.dtype) @ x.flatten(2)
        ctx.save_for_backward(x if down.requires_grad else None, hidden_BRP)
        ctx.halves, ctx.shape = halves, x.shape
        up_BOR = halves.up_OR.to(x.dtype).expand(len(x), -1, -1)
        if halves.overwrite and base.is_contiguous():
            adapted = base.data
            adapted_BOP = adapted.flatten(2)
            torch.baddbmm(adapted_BOP, up_BOR, hidden_BRP, alpha=halves.scale, out=adapted_BOP)
            return adapted
        adapted = torch.baddbmm(base.flatten(2), up_BOR, hidden_BRP, alpha=halves.scale)
        return adapted.view(base.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden_BRP = ctx.saved_tensors
        halves: _Halves = ctx.halves
        grad_BOP = grad.flatten(2)
        grad_hidden_BRP = halves.up_OR.to(grad.dtype).T @ grad_BOP
        grad_up_RO = (hidden_BRP @ grad_BOP.mT).sum(0)
        if halves.scale != 1.0:
            grad_hidden_BRP *= halves.scale
            grad_up_RO *= halves.scale
        grad_down = None if x is None else (grad_hidden_BRP @ x.flatten(2).mT).sum(0)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (halves.down_RI.to(grad.dtype).T @ grad_hidden_BRP).view(ctx.shape)
        return grad_x, *halves.left(grad_down, grad_up_RO.T), grad, None


def _product(a: Tensor, b: Tensor, scale: float, *, like: Tensor) -> Tensor:
    """scale * a b, rounded twice where the scale is no power of two; `like` has its shape."""
    if scale == 1.0:
        return a @ b
    if math.frexp(scale)[0] == 0.5:  # scaling by it rounds nothing, so the product may do it
        return torch.addmm(like, a, b, beta=0, alpha=scale)
    return (a @ b).mul_(scale)


def forward(parameters: Parameters, call: Call) -> Tensor:
    """The adapted output; `down` (R, I) or (R, I, kh, kw) and `up` (O, R) are cast to x's dtype."""
    if call.gate is not None or parameters["down"].dim() != 2:
        return pure(parameters, call)
    down, up = halves(parameters)
    used, sums = (down, up), None
    if call.rounded is not None and "start_down" not in parameters:
        used = (call.rounded["down"], call.rounded["up"])
        sums = (down.grad, up.grad)
    scale = float(call.scale * call.strength)
    low_rank = _LowRankConv if call.site.kind == "conv" else _LowRank
    adapted: Tensor = low_rank.apply(  # type: ignore[no-untyped-call]
        call.x, down, up, call.base_output, _Halves(*used, scale, call.overwrite, sums)
    )
    return adapted


def pure(parameters: Parameters, call: Call) -> Tensor:
    """The same in plain operations; also with a gate, and for larger kernels."""
    down, up = halves(parameters)
    hidden = into_rank(call.x, down, call.site)
    if call.gate is not None:
        rank = parameters["up"].shape[1]
        hidden = gated(hidden, rank, call)
    return call.base_output + call.scale * call.strength * out_of_rank(hidden, up, call.site)


def gated(hidden: Tensor, rank: int, call: Call) -> Tensor:
    """What the gate leaves; a hidden of several times the rank loses the same of each."""
    assert call.gate is not None
    axis = 1 if call.site.kind == "conv" else -1
    if hidden.shape[axis] == rank:
        return call.gate(hidden)
    return torch.cat([call.gate(one) for one in hidden.split(rank, dim=axis)], dim=axis)


def into_rank(x: Tensor, down: Tensor, site: Site) -> Tensor:
    """x to the rank-sized hidden: (..., R), or (B, R, H', W') of a convolution."""
    down = down.to(x.dtype)
    if site.kind == "linear":
        return F.linear(x, down)
    kernel = down if down.dim() == 4 else down[:, :, None, None]
    return F.conv2d(x, kernel, stride=site.stride, padding=site.padding)


def out_of_rank(hidden: Tensor, up: Tensor, site: Site) -> Tensor:
    """The hidden to the layer's width."""
    up = up.to(hidden.dtype)
    if site.kind == "linear":
        return F.linear(hidden, up)
    return F.conv2d(hidden, up[:, :, None, None])


def export(parameters: Parameters, site: Site, scale: float) -> dict[str, Tensor]:
    """Tensors as kohya files hold them: 4-D for convolutions, alpha a number."""
    down, up = halves(parameters)
    if site.kind == "conv":
        down, up = down if down.dim() == 4 else down[:, :, None, None], up[:, :, None, None]
    alpha = torch.tensor(scale * len(down), dtype=torch.float32)
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": alpha}


def merged(parameters: Parameters, site: Site, scale: float, held: Parameters) -> dict[str, Tensor]:
    """The weight plus scale * up down."""
    down, up = (half.double() for half in halves(parameters))
    weight = held["weight"]
    change = scale * (up.flatten(1) @ down.flatten(1))
    return {**held, "weight": weight + change.view(weight.shape)}


network = Network(
    options=LoraOptions,
    initial=initial,
    forward=forward,
    export=export,
    merged=merged,
    pure=pure,
    constants=constants,
    halves=halves,
    fast=("up",),
    drops=DROPS,
)
