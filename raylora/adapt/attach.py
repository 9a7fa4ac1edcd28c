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
Change = Callable[[Tensor, Tensor], Tensor]
"""(x, what the frozen layer gave) -> what the adapted one gives."""
_ROUNDED_NUMBERS = 2**27
"""Most numbers of which a rounded copy is kept. Larger adapters have larger layers, whose casts a
GPU does not notice, and the bytes would be missing elsewhere."""


class Adapter:
    """The trained parameters of one network over many sites, of one model or several.

    Attributes:
        network: whose pure function is applied.
        sites: the frozen layers, in the order of the models.
        values: (N,) every trained parameter, flat; an `nn.Parameter` for the optimizer.
        gradients: (N,) where autograd accumulates; also `values.grad`. Empty after
            `keep_no_gradients`.
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
        self._rounded: dict[str, dict[str, Tensor]] | None = None
        self._copies: _Rounded | None = None

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
        """What one layer gives with the adapter on it; `base_output` may be written over."""
        name = site.name
        if self.strength == 0 or name not in self.parameters:
            return base_output
        gate = part = None
        if self.dropout is not None:
            gate, part = self.dropout.gate(site), self.dropout.part(site)
        rounded = None if self._rounded is None else self._rounded[name]
        call = Call(
            *(x, base_output, self.scales[name], self.strength, site, layer, gate, part),
            rounded=rounded,
            overwrite=True,
        )
        return self.network.forward(self.parameters[name], call)

    def traced(self, site: Site, layer: nn.Module) -> Change:
        """What `adapted` does in training, for a compiler: at full strength, and with nothing
        looked up by the site's name, so that layers that are alike share what is compiled."""
        if site.name not in self.parameters:
            return lambda x, base_output: base_output
        pure, held, scale = self.network.pure, self.parameters[site.name], self.scales[site.name]
        return lambda x, base_output: pure(held, Call(x, base_output, scale, 1.0, site, layer))

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within it, the models are the base's."""
        strength, self.strength = self.strength, 0.0
        try:
            yield
        finally:
            self.strength = strength

    @contextmanager
    def rounded_to(self, dtype: torch.dtype, *, always: bool = False) -> Iterator[None]:
        """Within it, a pass forward and back in a dtype: all numbers are rounded to it at once.

        The same numbers as when each layer rounds its own, with fewer operations, which is what a
        small model's step takes its time for on a GPU. The values must not be moved within it.

        Args:
            always: however many numbers there are.
        """
        small = (always or len(self.values) <= _ROUNDED_NUMBERS) and self.network.low_rank
        if dtype == self.values.dtype or not small or not len(self.gradients):
            yield
            return
        if self._copies is None or self._copies.dtype != dtype:
            self._copies = _Rounded(self, dtype)
        self._rounded = self._copies.of(self)
        try:
            yield
        finally:
            self._rounded = None

    def forget_rounded(self) -> None:
        """Give the copy up that `rounded_to` keeps from one pass to the next."""
        self._copies = None

    def keep_no_gradients(self) -> None:
        """Give the gradients' buffer up: each leaf then has its own gradient, as autograd makes it,
        for whoever takes it from there at once."""
        self.gradients = self.gradients.new_zeros(0)
        self.values.grad = None
        for held in self.parameters.values():
            for leaf in held.values():
                leaf.grad = None

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


class _Rounded:
    """An adapter's numbers in another dtype, laid out in the same way."""

    def __init__(self, adapter: Adapter, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._values = torch.empty_like(adapter.values.data, dtype=dtype)
        self._constants = torch.empty_like(adapter.constants, dtype=dtype)
        self._views = {
            site: {word: self._view(leaf) for word, leaf in held.items()}
            for site, held in adapter.parameters.items()
        }

    def _view(self, leaf: Tensor) -> Tensor:
        flat = self._values if leaf.requires_grad else self._constants
        start = leaf.storage_offset()
        return flat[start : start + leaf.numel()].view(leaf.shape)

    def of(self, adapter: Adapter) -> dict[str, dict[str, Tensor]]:
        """site name -> parameter name -> the numbers as they are now."""
        self._values.copy_(adapter.values.data)
        self._constants.copy_(adapter.constants)
        return self._views


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
        held = [one for one in (self.under, self.adapter) if isinstance(one, Adapter)]
        changes = [one.traced(site, module) for one in held]

        def adapted(x: Tensor) -> Tensor:
            output: Tensor = base_forward(x)
            if torch.compiler.is_compiling():
                for change in changes:
                    output = change(x, output)
                return output
            if self.under is not None:
                output = self.under.adapted(site, module, x, output)
            adapter = self.adapter
            return output if adapter is None else adapter.adapted(site, module, x, output)

        module.forward = adapted
