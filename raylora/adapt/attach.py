"""Putting an adapter on frozen models, with all of its numbers in one flat buffer.

One buffer of values and one of gradients make the fleet's sum, the clip, the checksum, the
optimizer and the checkpoint one operation each, whatever the number of layers. What moves at one
rate lies together, so that each of the optimizer's groups is a piece of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raylora.adapt.dropout import Dropout
from raylora.adapt.keys import layer_at
from raylora.base.seeds import draw_generator, sample_number
from raylora.base.site import Site
from raylora.networks import Arrays, Call, Draw, Network, NetworkOptions, Weight

Member = tuple[str, str]
"""A site's name and a parameter's."""


class Adapter:
    """The trained parameters of one network over many sites, of one model or several.

    Attributes:
        network: whose pure function is applied.
        sites: the frozen layers, in the order of the models.
        values: (N,) every trained parameter, flat; an `nn.Parameter` for the optimizer.
        gradients: (N,) where autograd accumulates; also `values.grad`.
        constants: (M,) those that are not trained, flat; no part of the optimizer's or the
            average's.
        groups: a piece of the flat buffer for each group of parameters, in order.
        parameters: site name -> parameter name -> leaf tensor, a view into `values`, or into
            `constants` without a gradient.
        scales: site name -> alpha / rank.
        strength: how much of the change is applied; 0 is the base model.
        dropout: what training leaves out; None leaves out nothing.
    """

    def __init__(
        self,
        network: Network,
        sites: Sequence[Site],
        initial: Mapping[str, Mapping[str, NDArray[np.float64]]],
        scales: Mapping[str, float],
        *,
        dtype: torch.dtype,
        device: torch.device,
        groups: Sequence[Sequence[Member]] | None = None,
        constants: Mapping[str, frozenset[str]] | None = None,
    ) -> None:
        """`groups` is every trained (site, parameter) once, in the order of the buffer; None is one
        group in the order of the sites. `constants` are a site's words that are not trained."""
        self.network = network
        self.sites = list(sites)
        self.scales = dict(scales)
        self.strength = 1.0
        self.dropout: Dropout | None = None
        frozen = constants or {}
        every = [(site.name, word) for site in self.sites for word in initial[site.name]]
        kept = [one for one in every if one[1] in frozen.get(one[0], ())]
        trained = [one for one in every if one not in set(kept)]
        members = [trained] if groups is None else [list(group) for group in groups]
        assert sorted(trained) == sorted(one for group in members for one in group)
        self._members = members
        moving = [one for group in members for one in group]
        self.parameters: dict[str, dict[str, Tensor]] = {site: {} for site, _ in every}
        self.values = nn.Parameter(self._laid_out(moving, initial, dtype, device))
        self.constants = self._laid_out(kept, initial, dtype, device)
        self.gradients = torch.zeros_like(self.values.data)
        self.values.grad = self.gradients
        start = 0
        for site_name, word in moving:
            leaf = self.parameters[site_name][word].requires_grad_(True)
            leaf.grad = self.gradients[start : start + leaf.numel()].view(leaf.shape)
            start += leaf.numel()
        sizes = [sum(initial[site][word].size for site, word in group) for group in members]
        ends = np.cumsum([0, *sizes]).tolist()
        self.groups = [slice(start, end) for start, end in pairwise(ends)]

    def _laid_out(
        self,
        members: Sequence[Member],
        initial: Mapping[str, Mapping[str, NDArray[np.float64]]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """One flat buffer of these; each becomes a view into it in `parameters`."""
        arrays = [(site, word, initial[site][word]) for site, word in members]
        flat = torch.empty(sum(array.size for *_, array in arrays), dtype=dtype, device=device)
        start = 0
        for site, word, array in arrays:
            leaf = flat[start : start + array.size].view(array.shape)
            leaf.copy_(torch.from_numpy(np.asarray(array)))
            self.parameters[site][word] = leaf
            start += array.size
        return flat

    def adapted(self, site: Site, layer: nn.Module, x: Tensor, base_output: Tensor) -> Tensor:
        """What one layer gives with the adapter on it."""
        name = site.name
        if self.strength == 0 or name not in self.parameters:
            return base_output
        gate = part = None
        if self.dropout is not None:
            gate, part = self.dropout.gate(site), self.dropout.part(site)
        call = Call(x, base_output, self.scales[name], self.strength, site, layer, gate, part)
        return self.network.forward(self.parameters[name], call)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within it, the models are the base's."""
        strength, self.strength = self.strength, 0.0
        try:
            yield
        finally:
            self.strength = strength

    @contextmanager
    def dropping(self, step: int, samples: Sequence[int]) -> Iterator[None]:
        """Within it, the batch is these samples at this step, and dropout is theirs."""
        if self.dropout is None:
            yield
            return
        self.dropout.begin(step, samples)
        try:
            yield
        finally:
            self.dropout.end()

    def flat(self, group: int) -> nn.Parameter:
        """A group's piece of the buffer with its gradient, for optimizers that need no shapes."""
        if len(self.groups) == 1:
            return self.values
        piece = nn.Parameter(self.values.data[self.groups[group]])
        piece.grad = self.gradients[self.groups[group]]
        return piece

    def leaves(self, group: int) -> list[Tensor]:
        """A group's parameters in their shapes, with their gradients."""
        return [self.parameters[site][word] for site, word in self._members[group]]

    def modules(self) -> dict[str, dict[str, Tensor]]:
        """Tensors of each site as a LoRA file names them; detached, on the CPU."""
        exported = {}
        for site in self.sites:
            held = {word: leaf.detach() for word, leaf in self.parameters[site.name].items()}
            tensors = self.network.export(held, site, self.scales[site.name])
            exported[site.name] = {name: t.cpu() for name, t in tensors.items()}
        return exported


def first_weights(
    network: Network,
    options: NetworkOptions,
    sites: Sequence[Site],
    *,
    seed: int,
    weight_of: Callable[[Site], Weight] | None = None,
) -> dict[str, Arrays]:
    """A new adapter's parameters, by site and word.

    Args:
        weight_of: a site's frozen weight, for networks that begin from it; see `weights_in`.
    """
    found = {}
    for site in sites:
        weight = _no_weight if weight_of is None else weight_of(site)
        found[site.name] = network.initial(options, site, _draw(seed, site), weight)
    return found


def weights_in(models: Mapping[str, nn.Module]) -> Callable[[Site], Weight]:
    """Gives the frozen weights of loaded models, by component; each only where it is asked for."""

    def weight_of(site: Site) -> Weight:
        def weight() -> NDArray[np.float64]:
            held = layer_at(models[site.component], site.name).weight
            assert isinstance(held, Tensor)
            return np.asarray(held.detach().cpu().double().numpy(), dtype=np.float64)

        return weight

    return weight_of


def _no_weight() -> NDArray[np.float64]:
    raise AssertionError("this network begins from the frozen weights: give `weight_of`")


def _draw(seed: int, site: Site) -> Draw:
    generator = draw_generator(seed, 0, sample_number(site.name, 0), "initial weights")
    return lambda shape: generator.uniform(-1.0, 1.0, shape)


class Adapts(Protocol):
    """What layers can be routed through: an adapter, or a pack of them."""

    @property
    def sites(self) -> list[Site]:
        """The layers that it is for."""

    def adapted(self, site: Site, layer: nn.Module, x: Tensor, base_output: Tensor) -> Tensor:
        """What one layer gives with it; the base's output where it has nothing for the layer."""


class Attachment:
    """Layers of one model whose output passes through whichever adapter is set.

    `attachment.adapter = None` gives the base model back; another adapter may be set at any time,
    which is how a preview replica changes LoRA between two requests. Under it there may be a frozen
    one, which is then part of what the other calls the base.
    """

    def __init__(
        self,
        model: nn.Module,
        component: str,
        adapter: Adapts | None = None,
        *,
        under: Adapts | None = None,
    ) -> None:
        self.model = model
        self.component = component
        self.adapter = adapter
        self.under = under
        self._attached: dict[str, nn.Module] = {}
        for adapts in (under, adapter):
            if adapts is not None:
                self.attach([site for site in adapts.sites if site.component == component])

    def attach(self, sites: Sequence[Site]) -> None:
        """Route these sites' outputs through the adapter; sites already routed stay so."""
        for site in sites:
            if site.name not in self._attached:
                module = layer_at(self.model, site.name)
                self._route(module, site)
                self._attached[site.name] = module

    def detach(self) -> None:
        """Give every layer its own forward back."""
        for module in self._attached.values():
            del module.forward
        self._attached.clear()

    def _route(self, module: nn.Module, site: Site) -> None:
        base_forward = module.forward

        def adapted(x: Tensor) -> Tensor:
            output: Tensor = base_forward(x)
            if self.under is not None:
                output = self.under.adapted(site, module, x, output)
            adapter = self.adapter
            return output if adapter is None else adapter.adapted(site, module, x, output)

        module.forward = adapted
