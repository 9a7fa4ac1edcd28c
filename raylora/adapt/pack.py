"""Several adapters on one base at once: each row of a batch goes through its own.

Trials of a sweep and grids of previews share the base and differ in the adapter alone. One forward
of the base serves them all, and what each adapter adds is computed for the rows that are its own,
exactly as if it were there alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raylora.adapt.attach import Adapter
from raylora.base.errors import OptionError
from raylora.base.site import Site
from raylora.networks import Call, Parameters


@dataclass(frozen=True)
class _Rows:
    """Of the batch at hand: whose adapter each row takes, how much of it, and who takes none."""

    index_B: Tensor
    strength_B: Tensor
    bare_B: Tensor | None

    def stretched(self, rows: int) -> _Rows:
        """The same where each sample has several rows, as a caption of several chunks has."""
        times, rest = divmod(rows, len(self.index_B))
        assert rest == 0, f"{rows} rows for {len(self.index_B)} samples"
        if times == 1:
            return self
        bare = None if self.bare_B is None else self.bare_B.repeat_interleave(times)
        return _Rows(
            self.index_B.repeat_interleave(times), self.strength_B.repeat_interleave(times), bare
        )


class _Chosen(torch.autograd.Function):
    """Each row's own copy of a parameter; the gradients of equal rows are added up where they are.

    As a product with a matrix of zeros and ones, since adding at an index is in no fixed order on a
    GPU, and since what autograd would hand back has K times the parameter's size for every layer.
    """

    @staticmethod
    def forward(ctx: Any, values_KN: Tensor, gradients_KN: Tensor, rows: _Rows) -> Tensor:
        ctx.rows, ctx.gradients_KN = rows, gradients_KN
        return values_KN[rows.index_B]

    @staticmethod
    def backward(ctx: Any, grad_BN: Tensor) -> tuple[None, None, None]:
        adapters = torch.arange(len(ctx.gradients_KN), device=grad_BN.device)
        whose_KB = (adapters[:, None] == ctx.rows.index_B).to(grad_BN.dtype)
        ctx.gradients_KN.addmm_(whose_KB, grad_BN)
        return None, None, None


class Pack:
    """K adapters of one network over the same sites, as stacked parameters.

    It takes the place of an adapter: `attachment.adapter = pack`. Outside of `rows` it is the base.

    Attributes:
        sites: the frozen layers.
        values: (K, N) every trained parameter, row k laid out as `adapters[k].values`; an
            `nn.Parameter` for optimizers.
        gradients: (K, N) where autograd accumulates; also `values.grad`. A row is reached by the
            samples of its adapter alone.
        constants: (K, M) those that are not trained.
        parameters: site name -> parameter name -> (K, …) view into these.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        """Copy the adapters' numbers.

        Raises:
            OptionError: they are not alike in network, layers, shapes or order, or have dropout or
                a slice of ranks to draw, which belong to one adapter.
        """
        first = adapters[0]
        for other in adapters:
            _refuse_unlike(first, other)
        self.sites = first.sites
        self._network = first.network
        self.values = nn.Parameter(torch.stack([one.values.detach() for one in adapters]))
        self.gradients = torch.zeros_like(self.values.data)
        self.values.grad = self.gradients
        self.constants = torch.stack([one.constants for one in adapters])
        self.parameters: dict[str, dict[str, Tensor]] = {}
        self._pieces: dict[str, dict[str, tuple[slice, torch.Size, bool]]] = {}
        self._scales: dict[str, Tensor] = {}
        for site in self.sites:
            held = first.parameters[site.name]
            pieces = {word: _piece(leaf) for word, leaf in held.items()}
            self._pieces[site.name] = pieces
            self.parameters[site.name] = {
                word: (self.values.data if moves else self.constants)[:, piece].view(-1, *shape)
                for word, (piece, shape, moves) in pieces.items()
            }
            scales = [one.scales[site.name] for one in adapters]
            self._scales[site.name] = torch.tensor(scales, dtype=torch.float64).to(first.values)
        self._rows: _Rows | None = None

    @contextmanager
    def rows(self, index: Sequence[int], strength: Sequence[float] | None = None) -> Iterator[None]:
        """Within it, sample b of the batch goes through adapter `index[b]`.

        Args:
            index: one for each sample of the models' batch, in its order. A pipeline that draws
                under guidance predicts [negatives, positives] at once: name each twice there.
            strength: how much of its adapter each sample gets, 1 for all where none is given; a
                sample with 0 gets the base, bit for bit.
        """
        wanted = [1.0] * len(index) if strength is None else list(strength)
        assert len(wanted) == len(index), f"{len(wanted)} strengths for {len(index)} samples"
        assert all(0 <= k < len(self.values) for k in index), f"no such adapter: {index}"
        device = self.values.device
        bare = torch.tensor([one == 0 for one in wanted]) if 0 in wanted else None
        before = self._rows
        self._rows = _Rows(
            torch.tensor(index).to(device, non_blocking=True),
            torch.tensor(wanted, dtype=torch.float64).to(
                device, self.values.dtype, non_blocking=True
            ),
            None if bare is None else bare.to(device, non_blocking=True),
        )
        try:
            yield
        finally:
            self._rows = before

    def adapted(self, site: Site, layer: nn.Module, x: Tensor, base_output: Tensor) -> Tensor:
        """What one layer gives, each row with its own adapter on it."""
        if self._rows is None or site.name not in self.parameters:
            return base_output
        rows = self._rows.stretched(len(x))
        if self._network.halves is not None and site.kernel == (1, 1):
            found = self._low_rank(site, rows, x, base_output)
        else:
            found = self._each(site, layer, rows, x, base_output)
        if rows.bare_B is None:
            return found
        bare = rows.bare_B.view(-1, *[1] * (found.dim() - 1))
        return torch.where(bare, base_output, found)

    def _low_rank(self, site: Site, rows: _Rows, x: Tensor, base_output: Tensor) -> Tensor:
        """Two batched products; of linear layers and 1x1 convolutions."""
        assert self._network.halves is not None
        down_BRI, up_BOR = torch.func.vmap(self._network.halves)(self._chosen(site, rows))
        amount_B = self._scales[site.name][rows.index_B] * rows.strength_B
        down_BRI, up_BOR = down_BRI.to(x.dtype), (up_BOR * amount_B.view(-1, 1, 1)).to(x.dtype)
        if site.kind == "conv":
            change_BOP = up_BOR @ (down_BRI @ x.flatten(2))
            return base_output + change_BOP.view(base_output.shape)
        tokens = x.flatten(1, -2) if x.dim() > 2 else x[:, None]
        change_BNO = (tokens @ down_BRI.mT) @ up_BOR.mT
        return base_output + change_BNO.view(base_output.shape)

    def _each(
        self, site: Site, layer: nn.Module, rows: _Rows, x: Tensor, base_output: Tensor
    ) -> Tensor:
        """The network's own forward, written for one row and batched by torch."""
        pure, dtype = self._network.pure, base_output.dtype

        def one(held: Parameters, x: Tensor, base: Tensor, scale: Tensor, much: Tensor) -> Tensor:
            return pure(held, Call(x[None], base[None], scale, much, site, layer))[0].to(dtype)

        scale_B = self._scales[site.name][rows.index_B]
        batched: Tensor = torch.func.vmap(one)(
            self._chosen(site, rows), x, base_output, scale_B, rows.strength_B
        )
        return batched

    def _chosen(self, site: Site, rows: _Rows) -> dict[str, Tensor]:
        """Each row's own parameters, (B, …)."""
        found = {}
        for word, (piece, shape, moves) in self._pieces[site.name].items():
            if moves:
                flat: Tensor = _Chosen.apply(  # type: ignore[no-untyped-call]
                    self.values[:, piece], self.gradients[:, piece], rows
                )
            else:
                flat = self.constants[:, piece][rows.index_B]
            found[word] = flat.view(-1, *shape)
        return found


def _piece(leaf: Tensor) -> tuple[slice, torch.Size, bool]:
    """Where a parameter lies in its adapter's buffer, its shape, and whether it is trained."""
    start = int(leaf.storage_offset())
    return slice(start, start + leaf.numel()), leaf.shape, leaf.requires_grad


def _refuse_unlike(first: Adapter, other: Adapter) -> None:
    if first.network is not other.network or first.sites != other.sites:
        raise OptionError(
            "These adapters are of other networks or sit on other layers. Only adapters that are "
            "alike but for their numbers, alphas and strengths can share a pass."
        )
    if _layout(first) != _layout(other):
        raise OptionError(
            "These adapters have other ranks, or parameters in another order. Only adapters that "
            "are alike but for their numbers, alphas and strengths can share a pass."
        )
    if other.dropout is not None:
        raise OptionError(
            "network.dropout, rank_dropout, module_dropout and DyLoRA's slices are drawn for one "
            "adapter at a time. Leave them out, or train these one after the other."
        )


def _layout(adapter: Adapter) -> list[tuple[str, str, tuple[slice, torch.Size, bool]]]:
    return [
        (site, word, _piece(leaf))
        for site, held in adapter.parameters.items()
        for word, leaf in held.items()
    ]
