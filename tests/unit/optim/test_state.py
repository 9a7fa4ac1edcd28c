"""What an optimizer remembers comes back bit for bit, and what people get disturbs nothing."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from least_squares import Problem, each
from safetensors.torch import load, save
from torch import Tensor, nn

from raylora.base.errors import TrainingError
from raylora.optim.kinds import KINDS
from raylora.optim.optimizers import OptimizerOptions, make_optimizer
from raylora.optim.state import flatten, restore, shown_values

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in [*KINDS, "torch.optim:NAdam", "torch.optim:Rprop"]},
    "adafactor, fixed": ("adafactor", {"relative_step": False, "beta1": 0.9}),
    "adafactor, warmed": ("adafactor", {"warmup_init": True}),
    "adamw, its amsgrad": ("adamw", {"amsgrad": True}),
    "prodigy, sliced": ("prodigy", {"slice_p": 11, "use_bias_correction": True}),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes': nothing is paged on a CPU
        yield


def stored(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `flatten` gives, after the way through a file."""
    tensors, facts = flatten(optimizer)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    return load(save(tensors)), json.loads(json.dumps(facts, allow_nan=False))


def warm_up(name: str) -> Any:
    """Of three steps; not for the one that divides by its first rate."""
    return lambda step: 1.0 if KINDS.get(name, KINDS["adamw"]).never_zero else min(1.0, step / 3)


@pytest.mark.parametrize("way", each(WAYS))
@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_resumed_optimizer_goes_on_bit_for_bit(way: str, after: int):
    name, args = WAYS[way]
    options = OptimizerOptions(name=name, args=args)
    whole = Problem(options)
    whole.move(range(after), warm_up(name))
    resumed = Problem(options, whole.values())
    restore(resumed.optimizer, *stored(whole.optimizer))
    for one in (whole, resumed):
        one.move(range(after, after + 6), warm_up(name))
    assert all(torch.equal(a, b) for a, b in zip(whole.values(), resumed.values(), strict=True))
    again, facts = stored(resumed.optimizer)
    tensors, same = stored(whole.optimizer)
    assert facts == same
    assert again.keys() == tensors.keys()
    for name_, tensor in tensors.items():
        assert again[name_].dtype == tensor.dtype
        assert torch.equal(again[name_], tensor), name_


@pytest.mark.parametrize("name", each(["adamw", "adamw8bit", "prodigy", "adamw_schedule_free"]))
def test_without_its_state_an_optimizer_goes_elsewhere(name: str):
    """So that the test above can fail."""
    options = OptimizerOptions(name=name)
    whole = Problem(options)
    whole.move(range(5), warm_up(name))
    fresh = Problem(options, whole.values())
    for one in (whole, fresh):
        one.move(range(5, 8), warm_up(name))
    assert not torch.equal(whole.values()[0], fresh.values()[0])


@pytest.mark.slow
def test_maps_that_parameters_share_are_stored_once_and_shared_again():
    options = OptimizerOptions(name="adamw8bit")
    whole = Problem(options)
    whole.move(range(2), warm_up("adamw8bit"))
    tensors, _ = flatten(whole.optimizer)
    assert len([name for name in tensors if "qmap1" in name]) == 1
    resumed = Problem(options, whole.values())
    restore(resumed.optimizer, *stored(whole.optimizer))
    first, second = (resumed.optimizer.state[leaf]["qmap1"] for leaf in resumed.leaves[:2])
    assert first is second


def test_what_the_job_gives_is_the_jobs_after_a_resume():
    before = Problem(OptimizerOptions(weight_decay=0.5, betas=(0.5, 0.5)))
    before.move(range(2), warm_up("adamw"))
    after = Problem(OptimizerOptions(weight_decay=0.1))
    restore(after.optimizer, *stored(before.optimizer))
    assert after.optimizer.param_groups[0]["weight_decay"] == 0.1
    assert after.optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_another_optimizer_or_other_groups_are_refused():
    tensors, facts = flatten(Problem(OptimizerOptions()).optimizer)
    with pytest.raises(TrainingError, match=r"AdamW, and the job's is .*Lion"):
        restore(Problem(OptimizerOptions(name="lion")).optimizer, tensors, facts)
    alone = make_optimizer(
        OptimizerOptions(),
        [{"params": [nn.Parameter(torch.zeros(3))], "rate": 1e-4, "name": "unet"}],
    )
    with pytest.raises(TrainingError, match="groups of parameters are not those of the job"):
        restore(alone, tensors, facts)


class Remembers(torch.optim.SGD):
    """An optimizer with whatever in its state."""

    seen = 0

    def keep(self, value: object) -> None:
        self.state[self.param_groups[0]["params"][0]]["kept"] = value


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([1.5], dtype=torch.bfloat16),
        torch.tensor(True),
        torch.zeros(0, 3),
        [1, 2.5, None, {"a": torch.ones(2), 3: (True, "x")}],
        float("inf"),
        0.1 + 0.2,
    ],
    ids=str,
)
def test_any_plain_value_comes_back(value: Any):
    one, other = (Remembers([nn.Parameter(torch.zeros(2))], lr=1) for _ in range(2))
    one.keep(value)
    restore(other, *stored(one))
    (found,) = (state["kept"] for state in other.state.values())
    assert repr(found) == repr(value)


def test_a_number_that_the_optimizer_itself_counts_comes_back():
    one, other = (Remembers([nn.Parameter(torch.zeros(2))], lr=1) for _ in range(2))
    one.seen, other.seen = 7, 0
    restore(other, *stored(one))
    assert other.seen == 7


@pytest.mark.parametrize(("name", "steps"), [("adamw", "meta"), ("torch.optim:NAdam", "cpu")])
def test_state_goes_to_its_parameters_device_and_counts_to_where_torch_wants_them(
    name: str, steps: str
):
    options = OptimizerOptions(name=name)
    whole = Problem(options)
    whole.move(range(2), warm_up(name))
    away = nn.Parameter(torch.zeros(8, 640, device="meta"))
    rest = [nn.Parameter(torch.zeros(*shape, device="meta")) for shape in ((640, 8), (5, 1))]
    optimizer = make_optimizer(
        options,
        [
            {"params": [away], "rate": 1e-4, "name": "textencoder"},
            {"params": rest, "rate": 1e-4, "name": "unet"},
        ],
    )
    restore(optimizer, *stored(whole.optimizer))
    state = optimizer.state[away]
    assert (state["exp_avg"].device.type, state["step"].device.type) == ("meta", steps)


@pytest.mark.parametrize("value", [object(), {1.5: 2}, {1, 2}, torch.float32])
def test_what_cannot_be_stored_is_refused_by_name(value: object):
    optimizer = Remembers([nn.Parameter(torch.zeros(2))], lr=1)
    optimizer.keep(value)
    with pytest.raises(TrainingError, match=r"Remembers remembers 0\.0\.kept, a "):
        flatten(optimizer)
    stray = Remembers([nn.Parameter(torch.zeros(2))], lr=1)
    stray.state["elsewhere"] = {"kept": 1}
    with pytest.raises(TrainingError, match="belong to no parameter"):
        flatten(stray)


def test_the_values_shown_are_the_average_and_training_goes_on_as_if_they_were_not():
    for name in ("adamw_schedule_free", "sgd_schedule_free", "radam_schedule_free"):
        options = OptimizerOptions(name=name, learning_rate=1e-2)
        looked, plain = Problem(options), Problem(options)
        walked = [leaf.detach().clone() for leaf in looked.leaves]
        points = []
        for step in range(12):
            looked.move(range(step, step + 1), lambda step: 1.0)
            plain.move(range(step, step + 1), lambda step: 1.0)
            points.append(looked.optimizer.state[looked.leaves[0]]["z"].clone())
            with shown_values(looked.optimizer):
                shown = looked.leaves[0].detach().clone()
        assert all(torch.equal(a, b) for a, b in zip(looked.values(), plain.values(), strict=True))
        if name != "radam_schedule_free":  # whose rate, and so each point's weight, grows
            torch.testing.assert_close(
                shown, torch.stack(points).mean(0), rtol=1e-4, atol=1e-5
            )  # float32, put together from y and z
        assert not torch.equal(shown, looked.leaves[0])
        assert not torch.equal(shown, walked[0])


def test_other_optimizers_show_what_they_train():
    problem = Problem(OptimizerOptions())
    problem.move(range(2), lambda step: 1.0)
    values = problem.values()
    with shown_values(problem.optimizer):
        assert all(torch.equal(a, b) for a, b in zip(problem.values(), values, strict=True))


def test_values_come_back_when_showing_them_fails():
    problem = Problem(OptimizerOptions(name="adamw_schedule_free"))
    problem.move(range(3), lambda step: 1.0)
    values = problem.values()
    with pytest.raises(RuntimeError), shown_values(problem.optimizer):
        raise RuntimeError
    assert all(torch.equal(a, b) for a, b in zip(problem.values(), values, strict=True))
    problem.move(range(3, 4), lambda step: 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*KINDS])
def test_a_resumed_optimizer_goes_on_bit_for_bit_on_a_gpu(name: str):
    options = OptimizerOptions(name=name)
    whole = Problem(options, device="cuda")
    whole.move(range(5), warm_up(name))
    resumed = Problem(options, whole.values(), device="cuda")
    restore(resumed.optimizer, *stored(whole.optimizer))
    for one in (whole, resumed):
        one.move(range(5, 8), warm_up(name))
    assert all(torch.equal(a, b) for a, b in zip(whole.values(), resumed.values(), strict=True))
