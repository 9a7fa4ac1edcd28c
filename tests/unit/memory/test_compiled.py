"""Compiled units: one graph for all that are alike, one more a bucket, and the same numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.testing import assert_close

from raylora.adapt.attach import Adapter, Attachment
from raylora.base.lookup import plugins
from raylora.base.unit import Unit
from raylora.components.sites import site_of
from raylora.diffusion.attention import attention
from raylora.memory.checkpoint import again
from raylora.memory.compiled import compile_units
from raylora.networks import get_network

WIDTH, BLOCKS = 16, 3
KINDS = [kind for kind in plugins("raylora.networks") if kind != "lycoris"]


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """Attention and a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x_BTD: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x_BTD)).chunk(3, dim=-1)
        gathered: Tensor = self.out(attention(query, key, value, heads=1))
        return x_BTD + nn.functional.gelu(gathered)


class Model(nn.Module):
    """Equal blocks, kept or computed again."""

    def __init__(self, *, recomputes: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.recomputes = recomputes

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = again(block, x) if self.recomputes else block(x)
        return x


def made(
    backend: str | None, *, network: str = "lora", recomputes: bool = False
) -> tuple[Model, Adapter, Attachment]:
    torch.manual_seed(0)
    model = Model(recomputes=recomputes).requires_grad_(False)
    if backend:
        units = [Unit(f"m.{n}", block) for n, block in enumerate(model.blocks)]
        compile_units(units, backend=backend)
    sites = [
        site_of(f"m.{path}", module, role="attention", section="", number=0)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    chosen = get_network(network)
    options, draw = chosen.options(kind=network), np.random.default_rng(0)
    first = {
        site.name: {
            word: array + draw.normal(size=array.shape) * 0.05
            for word, array in chosen.initial(
                options,
                site,
                lambda shape: draw.uniform(-1, 1, shape),
                lambda site=site: _weight(model, site.name),
            ).items()
        }
        for site in sites
        if site is not None
    }
    adapter = Adapter(
        chosen,
        [site for site in sites if site is not None],
        first,
        dict.fromkeys(first, 0.5),
        dtype=torch.float32,
        device=torch.device("cpu"),
        constants={s.name: chosen.constants(options, s) for s in sites if s is not None},
    )
    return model, adapter, Attachment(model, "m", adapter)


def _weight(model: Model, name: str) -> np.ndarray:
    layer = model.get_submodule(name.removeprefix("m."))
    return layer.weight.detach().double().numpy()  # type: ignore[operator,union-attr,no-any-return]


def passed(model: Model, adapter: Adapter, tokens: int) -> tuple[Tensor, Tensor]:
    adapter.gradients.zero_()
    x = torch.linspace(-1, 1, tokens * WIDTH).view(1, tokens, WIDTH)
    given = model(x.requires_grad_(True))
    given.square().mean().backward()
    return given.detach(), adapter.gradients.clone()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.slow
def test_compiled_blocks_give_the_numbers_of_plain_ones():
    model, adapter, _ = made("inductor")
    plain, other, _ = made(None)
    for one, same in zip(passed(model, adapter, 8), passed(plain, other, 8), strict=True):
        assert_close(one, same, rtol=1e-5, atol=1e-6)  # float32, in another order
    assert graphs() == 1


@pytest.mark.slow
@pytest.mark.parametrize("recomputes", [False, True])
def test_equal_blocks_share_a_graph_and_each_bucket_adds_one(recomputes: bool):
    model, adapter, _ = made("aot_eager", recomputes=recomputes)
    plain, other, _ = made(None)
    for count, tokens in enumerate((8, 12), start=1):
        for _ in range(2):
            found = passed(model, adapter, tokens)
        assert graphs() == count
        for one, same in zip(found, passed(plain, other, tokens), strict=True):
            assert_close(one, same, rtol=1e-5, atol=1e-6)  # sums in another order
    assert not counters["graph_break"]


@pytest.mark.slow
def test_what_people_look_at_compiles_nothing_and_is_as_without():
    model, adapter, attachment = made("eager")
    plain, other, plainly = made(None)
    passed(model, adapter, 8)
    known = graphs()
    x = torch.linspace(-1, 1, 20 * WIDTH).view(1, 20, WIDTH)
    with torch.no_grad():
        for strength in (1.0, 0.5, 0.0):
            adapter.strength = other.strength = strength
            assert torch.equal(model(x), plain(x))
        attachment.adapter = plainly.adapter = None
        assert torch.equal(model(x), plain(x))
    assert graphs() == known


@pytest.mark.slow
@pytest.mark.parametrize("network", KINDS)
def test_every_network_compiles_without_a_break(network: str):
    model, adapter, _ = made("eager", network=network)
    plain, other, _ = made(None, network=network)
    for one, same in zip(passed(model, adapter, 8), passed(plain, other, 8), strict=True):
        assert_close(one, same, rtol=1e-4, atol=1e-6)  # plain operations for written-out ones
    assert not counters["graph_break"]
    assert graphs() == 1
    assert adapter.gradients.any()
