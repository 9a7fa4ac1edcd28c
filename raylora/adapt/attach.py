"""Putting an adapter on frozen models, with all of its numbers in one flat buffer.

One buffer of values and one of gradients make the fleet's sum, the clip, the checksum, the
optimizer and the checkpoint one operation each, whatever the number of layers. What moves at one
rate lies together, so that each of the optimizer's groups is a piece of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raylora.adapt.dropout import Dropout
from raylora.adapt.keys import layer_at
from raylora.base.seeds import draw_generator, sample_number
from raylora.base.site import Site
from raylora.networks import Draw, Network, NetworkOptions

Member = tuple[str, str]
"""A site's name and a parameter's."""


class Adapter:
    """The trained parameters of one network over many sites, of one model or several.

    Attributes:
        network: whose pure function is applied.
        sites: the frozen layers, in the order of the models.
        values: (N,) every parameter, flat; an `nn.Parameter` for the optimizer.
        gradients: (N,) where autograd accumulates; also `values.grad`.
        groups: a piece of the flat buffer for each group of parameters, in order.
        parameters: site name -> parameter name -> leaf tensor, a view into `values`.
        scales: site name -> alpha / rank.
        strength: multiplies every scale; 0 is the base model.
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
    ) -> None:
        """`groups` is every (site, parameter) once, in the order of the buffer; None is one group
        in the order of the sites."""
        self.network = network
        self.sites = list(sites)
        self.scales = dict(scales)
        self.strength = 1.0
        self.dropout: Dropout | None = None
        every = [(site.name, word) for site in self.sites for word in initial[site.name]]
        members = [every] if groups is None else [list(group) for group in groups]
        assert sorted(every) == sorted(one for group in members for one in group)
        self._members = members
        arrays = [(site, word, initial[site][word]) for group in members for site, word in group]
        count = sum(a.size for _, _, a in arrays)
        self.values = nn.Parameter(torch.empty(count, dtype=dtype, device=device))
        self.gradients = torch.zeros_like(self.values.data)
        self.values.grad = self.gradients
        sizes = [sum(initial[site][word].size for site, word in group) for group in members]
        ends = np.cumsum([0, *sizes]).tolist()
        self.groups = [slice(start, end) for start, end in pairwise(ends)]
        self.parameters: dict[str, dict[str, Tensor]] = {s.name: {} for s in self.sites}
        start = 0
        for site_name, word, array in arrays:
            piece = slice(start, start + array.size)
            start += array.size
            leaf = self.values.data[piece].view(array.shape)
            leaf.copy_(torch.from_numpy(np.asarray(array)))
            leaf.requires_grad_(True)
            leaf.grad = self.gradients[piece].view(array.shape)
            self.parameters[site_name][word] = leaf

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
    network: Network, options: NetworkOptions, sites: Sequence[Site], *, seed: int
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """A new adapter's parameters, by site and word."""
    return {site.name: network.initial(options, site, _draw(seed, site)) for site in sites}


def _draw(seed: int, site: Site) -> Draw:
    generator = draw_generator(seed, 0, sample_number(site.name, 0), "initial weights")
    return lambda shape: generator.uniform(-1.0, 1.0, shape)


class Attachment:
    """Layers of one model whose output passes through whichever adapter is set.

    `attachment.adapter = None` gives the base model back; another adapter may be set at any time,
    which is how a preview replica changes LoRA between two requests.
    """

    def __init__(self, model: nn.Module, component: str, adapter: Adapter | None = None) -> None:
        self.model = model
        self.component = component
        self.adapter = adapter
        self._attached: dict[str, nn.Module] = {}
        if adapter is not None:
            self.attach([site for site in adapter.sites if site.component == component])

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
        base_forward, name = module.forward, site.name

        def adapted(x: Tensor) -> Tensor:
            base_output: Tensor = base_forward(x)
            adapter = self.adapter
            if adapter is None or adapter.strength == 0 or name not in adapter.parameters:
                return base_output
            scale = adapter.scales[name] * adapter.strength
            gate = adapter.dropout.gate(site) if adapter.dropout else None
            held = adapter.parameters[name]
            return adapter.network.forward(held, x, base_output, scale, site, gate)

        module.forward = adapted
