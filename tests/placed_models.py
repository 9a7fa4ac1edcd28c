"""Tiny models that are placed by settings, and what comes out of them: for tests of equal bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from adapters import fresh_adapter
from torch import Tensor, nn

from raylora.adapt.attach import Adapter, Attachment
from raylora.base.unit import Unit
from raylora.diffusion.process import Flow
from raylora.families import Family
from raylora.memory.host import HostMemory
from raylora.memory.placed import Placed
from raylora.memory.setting import BaseKind, Setting
from raylora.networks import get_network

CAPTIONS = ["a red cat", "rain on a roof, at night"]


@dataclass
class Tiny:
    """A family's models with an adapter on them, placed."""

    family: Family
    denoiser: nn.Module
    encoders: Mapping[str, nn.Module]
    adapter: Adapter
    placed: dict[str, Placed]
    device: torch.device

    def apply(self, setting: Setting) -> None:
        for one in self.placed.values():
            one.apply(setting)

    def close(self) -> None:
        for one in self.placed.values():
            one.close()

    def conditions(self) -> dict[str, Tensor]:
        """What the text encoders say of the captions."""
        read = {name: torch.from_numpy(held) for name, held in self.family.tokens(CAPTIONS).items()}
        said = dict(self.family.read_tokens(self.encoders, read))
        if self.family.wants_geometry:
            sizes = torch.tensor([640.0, 480.0, 0.0, 16.0, 64.0, 64.0], device=self.device)
            said["geometry"] = sizes.expand(len(CAPTIONS), 6)
        return said

    def predict(self) -> Tensor:
        side = self.family.size_step // self.family.pixels_per_latent
        shape = (len(CAPTIONS), self.family.latent_channels, side, 2 * side)
        noisy = torch.sin(torch.arange(torch.Size(shape).numel(), dtype=torch.float32)).view(shape)
        weight = next(self.denoiser.parameters())
        flow = isinstance(self.family.process, Flow)
        timesteps = torch.tensor([710.0, 130.0]) if flow else torch.tensor([710, 130])
        return self.family.predict(
            self.denoiser,
            noisy.to(self.device, weight.dtype),
            timesteps.to(self.device),
            self.conditions(),
        )

    def step(self) -> dict[str, Tensor]:
        """Prediction, loss and gradients of a pass forward and back."""
        self.adapter.gradients.zero_()
        prediction = self.predict()
        loss = prediction.float().square().mean()
        loss.backward()
        found = {"prediction": prediction, "loss": loss, "gradients": self.adapter.gradients}
        return {name: tensor.detach().cpu().clone() for name, tensor in found.items()}

    def look(self) -> Tensor:
        """A prediction without gradients."""
        with torch.no_grad():
            return self.predict().cpu()


def open_placed(
    family: Family,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    trains_text: bool = True,
    base: BaseKind = "full",
    setting: Setting | None = None,
    hosts: Mapping[str, HostMemory] | None = None,
    network: str = "lora",
) -> Tiny:
    """The family's models, loaded on the CPU and placed, and an adapter that changes something."""
    device, cpu = torch.device(device), torch.device("cpu")
    denoiser = family.load_denoiser(dtype=dtype, device=cpu)
    encoders = family.load_text_encoders(dtype=dtype, device=cpu)
    units = {family.component: family.units(denoiser), **family.text_units(encoders)}
    models = {family.component: denoiser, **encoders}
    kind = get_network(network)
    sites = family.sites(denoiser) + (family.text_sites(encoders) if trains_text else [])
    sites = [one for one in sites if one.kind == "linear" and one.role in ("attention", "mlp")]
    adapter = fresh_adapter(
        kind,
        kind.options(rank=2),
        sites,
        seed=0,
        dtype=torch.float32,
        device=device,
        models=models,
    )
    with torch.no_grad():
        adapter.values += 0.02 * torch.sin(torch.arange(len(adapter.values), device=device))
    placed = {
        component: Placed(
            model,
            units[component],
            device=device,
            host=(hosts or {}).get(component),
            base=base if component == family.component else "full",
        )
        for component, model in models.items()
    }
    for one in placed.values():
        one.apply(setting or Setting())
    for component, model in models.items():
        Attachment(model, component, adapter)
    return Tiny(family, denoiser, encoders, adapter, placed, device)


def chain(widths: Sequence[int], **words: Any) -> tuple[nn.Module, list[Unit]]:
    """A model of blocks in a row, of these widths within, with seeded weights."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(*(Block(width, generator) for width in widths))
    model.requires_grad_(False)
    units = [Unit(f"chain.{n}", block, (block.mlp,)) for n, block in enumerate(model)]  # type: ignore[arg-type]
    return model, units


class Block(nn.Module):
    """Eight numbers in, eight out, and a frozen MLP between."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Linear(width, 8))
        self.register_buffer("shift", torch.empty(8))
        for tensor in (*self.parameters(), self.shift):
            tensor.data.normal_(0.0, 0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.mlp(self.norm(x)) + self.shift
        return x + added
