"""Putting an adapter on a frozen model, with all of its numbers in one flat buffer.

One buffer of values and one of gradients make the fleet's sum, the clip, the checksum, the
optimizer and the checkpoint one operation each, whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raylora.base.seeds import draw_generator, sample_number
from raylora.base.site import Site
from raylora.networks import Draw, Network, NetworkOptions


class Adapter:
    """The trained parameters of one network over many sites.

    Attributes:
        network: whose pure function is applied.
        sites: the frozen layers, in the order of the flat buffer.
        values: (N,) every parameter, flat; an `nn.Parameter` for the optimizer.
        gradients: (N,) where autograd accumulates; also `values.grad`.
        parameters: site name -> parameter name -> leaf tensor, a view into `values`.
        scales: site name -> alpha / rank.
        strength: multiplies every scale; 0 is the base model.
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
    ) -> None:
        self.network = network
        self.sites = list(sites)
        self.scales = dict(scales)
        self.strength = 1.0
        arrays = [(s.name, word, a) for s in self.sites for word, a in initial[s.name].items()]
        count = sum(a.size for _, _, a in arrays)
        self.values = nn.Parameter(torch.empty(count, dtype=dtype, device=device))
        self.gradients = torch.zeros_like(self.values.data)
        self.values.grad = self.gradients
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

    def modules(self) -> dict[str, dict[str, Tensor]]:
        """Tensors of each site as a LoRA file names them; detached, on the CPU."""
        exported = {}
        for site in self.sites:
            held = {word: leaf.detach() for word, leaf in self.parameters[site.name].items()}
            tensors = self.network.export(held, site, self.scales[site.name])
            exported[site.name] = {name: t.cpu() for name, t in tensors.items()}
        return exported


def fresh_adapter(
    network: Network,
    options: NetworkOptions,
    sites: Sequence[Site],
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Adapter:
    """A new adapter; each site's first weights come from its own name and the seed."""
    initial = {site.name: network.initial(options, site, _draw(seed, site)) for site in sites}
    scales = {site.name: options.scale_at(site) for site in sites}
    return Adapter(network, sites, initial, scales, dtype=dtype, device=device)


def _draw(seed: int, site: Site) -> Draw:
    generator = draw_generator(seed, 0, sample_number(site.name, 0), "initial weights")
    return lambda shape: generator.uniform(-1.0, 1.0, shape)


class Attachment:
    """Layers of a model whose output passes through whichever adapter is set.

    `attachment.adapter = None` gives the base model back; another adapter may be set at any time,
    which is how a preview replica changes LoRA between two requests.
    """

    def __init__(self, model: nn.Module, component: str, adapter: Adapter | None = None) -> None:
        self.model = model
        self.component = component
        self.adapter = adapter
        self._attached: dict[str, nn.Module] = {}
        if adapter is not None:
            self.attach(adapter.sites)

    def attach(self, sites: Sequence[Site]) -> None:
        """Route these sites' outputs through the adapter; sites already routed stay so."""
        for site in sites:
            if site.name not in self._attached:
                module = self.model.get_submodule(site.name.removeprefix(self.component + "."))
                self._route(module, site.name)
                self._attached[site.name] = module

    def detach(self) -> None:
        """Give every layer its own forward back."""
        for module in self._attached.values():
            del module.forward
        self._attached.clear()

    def _route(self, module: nn.Module, name: str) -> None:
        base_forward = module.forward

        def adapted(x: Tensor) -> Tensor:
            base_output: Tensor = base_forward(x)
            adapter = self.adapter
            if adapter is None or adapter.strength == 0 or name not in adapter.parameters:
                return base_output
            scale = adapter.scales[name] * adapter.strength
            return adapter.network.forward(adapter.parameters[name], x, base_output, scale)

        module.forward = adapted
