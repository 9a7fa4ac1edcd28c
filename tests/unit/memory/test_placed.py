"""A placed model: what is computed again, what lies where, and what a failure leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from placed_models import Block, chain
from torch import Tensor, nn

from raylora.adapt.attach import Attachment
from raylora.base.site import Site
from raylora.base.unit import Unit
from raylora.memory.checkpoint import again, recomputed_units, recomputing_in
from raylora.memory.host import HostMemory, lies_on_host
from raylora.memory.placed import Placed
from raylora.memory.setting import Setting
from raylora.memory.tracker import PeakTracker

CPU = torch.device("cpu")
WIDTHS = [16, 40, 24, 8, 32]
EVERY = [
    Setting(),
    Setting("mlp"),
    Setting("alternate"),
    Setting("all"),
    Setting(streamed=0.5),
    Setting(streamed=1.0),
    Setting("all", streamed=1.0, offload=True),
]


def placed_chain(setting: Setting, **words: Any) -> tuple[nn.Module, Placed]:
    model, units = chain(WIDTHS)
    placed = Placed(model, units, device=CPU, **words)
    placed.apply(setting)
    return model, placed


def given() -> Tensor:
    return torch.linspace(-1, 1, 24).view(3, 8).requires_grad_(True)


def gradient(model: nn.Module) -> Tensor:
    x = given()
    model(x).square().sum().backward()
    assert x.grad is not None
    return x.grad


PLAIN = gradient(chain(WIDTHS)[0])


def test_of_each_kind_every_second_unit_is_alternate():
    kinds = [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.ReLU, nn.Linear]
    units = [Unit(str(n), nn.Linear(1, 1) if k is nn.Linear else k()) for n, k in enumerate(kinds)]
    assert recomputed_units(units, "alternate") == (0, 1, 4, 5)
    assert recomputed_units(units, "all") == (0, 1, 2, 3, 4, 5)
    assert recomputed_units(units, "none") == recomputed_units(units, "mlp") == ()


@pytest.mark.parametrize(
    ("setting", "twice"),
    [
        (Setting(), []),
        (Setting("all"), [0, 1, 2, 3, 4]),
        (Setting("alternate"), [0, 2, 4]),
        (Setting("mlp"), []),
        (Setting(streamed=0.4), [1]),
    ],
)
def test_only_what_the_setting_says_is_computed_again(setting: Setting, twice: list[int]):
    model, placed = placed_chain(setting)
    if setting.streamed:
        assert list(placed.streamed) == twice
    runs = {"norm": [0] * len(WIDTHS), "mlp": [0] * len(WIDTHS)}
    for word, counts in runs.items():
        for number, block in enumerate(model):  # type: ignore[arg-type]
            inner = getattr(block, word)
            (inner if word == "norm" else inner[0]).register_forward_hook(_count(counts, number))
    assert torch.equal(gradient(model), PLAIN)
    wanted = [2 if number in twice else 1 for number in range(len(WIDTHS))]
    assert runs["norm"] == wanted
    assert runs["mlp"] == ([2] * len(WIDTHS) if setting.checkpointing == "mlp" else wanted)


def _count(counts: list[int], number: int) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        counts[number] += 1

    return hook


@pytest.mark.parametrize("setting", EVERY[1:])
def test_less_is_kept_for_the_backward_pass(setting: Setting):
    kept = []
    for one in (Setting(), setting):
        model, _ = placed_chain(one)
        held: list[int] = []

        def keep(tensor: Tensor, held: list[int] = held) -> Tensor:
            held.append(0 if lies_on_host(tensor.untyped_storage()) else tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(given())
        kept.append(sum(held))
    assert kept[1] < kept[0]


@pytest.mark.parametrize("second", EVERY)
@pytest.mark.parametrize("first", EVERY)
def test_any_setting_follows_any_other(first: Setting, second: Setting):
    model, placed = placed_chain(first)
    assert torch.equal(gradient(model), PLAIN)
    placed.apply(second)
    assert placed.setting == second
    assert torch.equal(gradient(model), PLAIN)
    assert torch.equal(gradient(model), PLAIN)


def test_what_a_setting_gives_up_is_freed():
    model, placed = placed_chain(Setting())
    with PeakTracker() as tracker:
        tracker.add([*model.parameters(), *model.buffers()])
        whole = tracker.now_bytes
        placed.apply(Setting(streamed=1.0))
        assert tracker.now_bytes == 2 * -(-placed.ring_bytes // 2 // 512) * 512
        placed.apply(Setting())
        assert tracker.now_bytes == whole


def test_memory_runs_out_within_a_unit_and_the_next_pass_is_right():
    for setting in EVERY:
        for number in (0, 2, 4):
            for visit in (1, 2):
                model, placed = placed_chain(setting)
                remove = _fail(model[number].mlp[1], visit)  # type: ignore[index]
                twice = number in placed._again or setting.checkpointing == "mlp"
                if visit == 1 or twice:
                    with pytest.raises(torch.OutOfMemoryError):
                        gradient(model)
                remove()
                assert all(lies_on_host(one) for one in _storages(placed))
                assert torch.equal(gradient(model), PLAIN)
                placed.apply(Setting("all", streamed=0.7))
                assert torch.equal(gradient(model), PLAIN)


def _fail(module: nn.Module, visit: int) -> Callable[[], None]:
    visits = 0

    def hook(*_: Any) -> None:
        nonlocal visits
        visits += 1
        if visits == visit:
            raise torch.OutOfMemoryError("in mid-pass")

    return module.register_forward_hook(hook).remove


def _storages(placed: Placed) -> list[torch.UntypedStorage]:
    """Of the weights of streamed units, which are the host's while the units do not run."""
    modules = [placed.units[number].module for number in placed.streamed]
    return [p.untyped_storage() for one in modules for p in (*one.parameters(), *one.buffers())]


def test_a_setting_that_runs_out_of_memory_is_followed_by_a_smaller_one():
    """Bringing units back needs memory; half-way, those that came are there, the others are not."""
    model, placed = placed_chain(Setting(streamed=1.0))
    with PeakTracker() as tracker:
        tracker.limit_bytes = 6000
        with pytest.raises(torch.OutOfMemoryError):
            placed.apply(Setting())
        assert 0 < len(placed.streamed) < len(WIDTHS)
        tracker.limit_bytes = None
        placed.apply(Setting(streamed=0.8))
    assert torch.equal(gradient(model), PLAIN)


def test_the_first_placing_may_run_out_of_memory_too():
    model, units = chain(WIDTHS)
    placed = Placed(model, units, device=CPU)
    with PeakTracker(limit_bytes=100), pytest.raises(torch.OutOfMemoryError):
        placed.apply(Setting(streamed=1.0))  # no room for the ring
    placed.apply(Setting(streamed=0.4))
    assert torch.equal(gradient(model), PLAIN)


@pytest.mark.parametrize("before", [True, False])
def test_adapters_on_layers_and_units_route_through_one_another(before: bool):
    found = []
    for setting in (Setting(), EVERY[-1]):
        model, units = chain(WIDTHS)
        sites = [Site("chain.1.mlp.0", "linear", 8, 40), Site("chain.3.mlp.2", "linear", 8, 8)]
        attached = [Attachment(model, "chain", _Doubles(sites))] if before else []
        placed = Placed(model, units, device=CPU)
        placed.apply(setting)
        attached += [] if before else [Attachment(model, "chain", _Doubles(sites))]
        found.append(gradient(model))
        attached[0].detach()
        assert torch.equal(gradient(model), PLAIN)
        placed.close()
        assert not any("forward" in vars(module) for module in model.modules())
        assert torch.equal(gradient(model), PLAIN)
    assert torch.equal(*found)
    assert not torch.equal(found[0], PLAIN)


class _Doubles:
    """What a layer gives, twice."""

    def __init__(self, sites: list[Site]) -> None:
        self.sites = sites

    def adapted(self, site: Site, layer: nn.Module, x: Tensor, base_output: Tensor) -> Tensor:
        return base_output * 2


def test_a_forward_that_somebody_set_is_run_and_given_back():
    model, units = chain(WIDTHS)
    block: Any = model[0]  # type: ignore[index]
    own = block.forward
    block.forward = own_twice = lambda x: own(own(x))
    wanted = gradient(model)
    placed = Placed(model, units, device=CPU)
    placed.apply(EVERY[-1])
    assert torch.equal(gradient(model), wanted)
    assert not torch.equal(wanted, PLAIN)
    placed.close()
    assert block.forward is own_twice


def test_inputs_by_name_and_in_tuples_reach_a_unit_and_their_gradients_come_back():
    class Told(Block):
        def forward(self, x: Tensor, told: Any = None, *, by: Tensor | None = None) -> Any:  # type: ignore[override]
            assert told is not None
            assert by is not None
            return super().forward(x) * by + told[0], {"kept": x}

    model = Told(16, torch.Generator().manual_seed(0)).requires_grad_(False)
    placed = Placed(model, [Unit("told", model)], device=CPU)
    found = []
    for setting in (Setting(), EVERY[-1]):
        placed.apply(setting)
        x, told, by = given(), given(), given()
        result, kept = model(x, (told,), by=by)
        (result + kept["kept"]).square().sum().backward()
        found.append([x.grad, told.grad, by.grad])
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert torch.equal(one, other)


def test_what_is_computed_again_is_so_within_the_context_that_was_asked_for():
    seen: list[str] = []
    now = ["outside"]

    @contextmanager
    def around() -> Iterator[None]:
        now.append("within")
        try:
            yield
        finally:
            now.pop()

    def function(x: Tensor) -> Tensor:
        seen.append(now[-1])
        return x.exp().exp()

    x = given()
    with recomputing_in(around):
        y = again(function, x)
    y.sum().backward()
    again(function, given()).sum().backward()
    with torch.no_grad():
        again(function, given())
    assert seen == ["outside", "within", "outside", "outside", "outside"]


def test_models_without_numbers_are_placed_to_be_counted():
    model, units = chain(WIDTHS)
    model.to("meta")
    meta = torch.device("meta")
    placed = Placed(model, units, device=meta)
    _, real_placed = placed_chain(Setting())
    for setting in EVERY:
        placed.apply(setting)
        real_placed.apply(setting)
        for word in ("streamed", "resident_bytes", "streamed_bytes", "ring_bytes"):
            assert getattr(placed, word) == getattr(real_placed, word)
        x = torch.empty(3, 8, device=meta, requires_grad=True)
        model(x).sum().backward()
        assert x.grad is not None
        on_host = [lies_on_host(one) for one in _storages(placed)]
        assert all(on_host)
        assert len(on_host) == 7 * len(placed.streamed)


def test_two_models_share_a_host_copy(tmp_path: Any):
    hosts = [HostMemory("weights", root=tmp_path) for _ in range(2)]
    first, _ = placed_chain(Setting(streamed=1.0), host=hosts[0])
    second, units = chain(WIDTHS)
    for parameter in second.parameters():
        parameter.data.zero_()  # so that they can only come from the other
    placed = Placed(second, units, device=CPU, host=hosts[1])
    placed.apply(Setting(streamed=1.0))
    assert torch.equal(gradient(second), PLAIN)
    assert torch.equal(gradient(first), PLAIN)
    for host in hosts:
        host.close()
    assert not list(tmp_path.iterdir())


def test_the_host_s_copy_of_a_unit_that_is_resident_again_is_given_back():
    host = HostMemory()
    _, placed = placed_chain(Setting(streamed=1.0), host=host)
    assert host.bytes == placed.streamed_bytes > 0
    placed.apply(Setting(streamed=0.5))
    assert host.bytes == placed.streamed_bytes > 0
    placed.apply(Setting())
    assert host.bytes == 0


def test_passes_without_gradients_between_those_with_do_no_harm():
    model, _ = placed_chain(EVERY[-1])
    wanted = chain(WIDTHS)[0](given()).detach()
    x = given()
    y = model(x)
    for guard in (torch.no_grad(), torch.inference_mode()):
        with guard:
            assert torch.equal(model(given()), wanted)
    y.square().sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, PLAIN)
    assert torch.equal(gradient(model), PLAIN)
