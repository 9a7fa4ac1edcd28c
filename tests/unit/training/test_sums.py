"""Sums of a step: exact ones are the same bits in any order and any grouping."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import MakeJob, open_run
from torch import Tensor

from raylora.base.errors import JobError
from raylora.training.options import MOST_EXACT_IMAGES
from raylora.training.reduce import Alone
from raylora.training.sums import FRACTION_BITS, ExactSums, RoundedSums, Sums


class Worker:
    """One worker, with gradients of its own."""

    def __init__(self, make: Any, size: int, dtype: torch.dtype) -> None:
        self.gradients = torch.zeros(size, dtype=dtype)
        self.sums: Sums = make(SimpleNamespace(gradients=self.gradients))
        self.sums.begin()

    def take(self, gradient: Tensor, loss: Tensor) -> None:
        self.gradients += gradient
        self.sums.take(loss)


class Before(Alone):
    """Adds what the workers before told, so that the last one has what an all-reduce gives all."""

    size = 2

    def __init__(self) -> None:
        self.told: list[Tensor] = []

    def add_up(self, tensor: Tensor) -> None:
        own = tensor.clone()
        for told in self.told:
            tensor += told
        self.told.append(own)


def summed(
    make: Any, images: list[tuple[Tensor, Tensor]], parts: list[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(Gradients, loss) summed over several workers, each with its part of the images."""
    group, start = Before(), 0
    for count in parts:
        worker = Worker(make, len(images[0][0]), dtype)
        for image in images[start : start + count]:
            worker.take(*image)
        start += count
        loss_sum, _ = worker.sums.add_up(group, stop=False)
    return worker.gradients, loss_sum


def drawn(seed: int, count: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Gradients over twelve powers of ten, as real ones are."""
    generator = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        values = generator.standard_normal(50) * 10.0 ** generator.uniform(-11, 1, 50)
        loss = torch.tensor([generator.uniform(0, 2)])
        images.append((torch.from_numpy(values).to(dtype), loss.to(dtype)))
    return images


@given(seed=st.integers(0, 1000), data=st.data())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_sums_are_the_same_bits_in_any_order_over_any_workers(
    dtype: torch.dtype, seed: int, data: st.DataObject
):
    images = drawn(seed, 9, dtype)
    expected = summed(ExactSums, images, [9], dtype)
    order = data.draw(st.permutations(range(9)))
    cut = data.draw(st.integers(0, 9))
    found = summed(ExactSums, [images[i] for i in order], [cut, 9 - cut], dtype)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_rounded_sums_are_not_which_is_why_there_are_exact_ones():
    images = drawn(3, 9, torch.float32)
    forwards = Worker(RoundedSums, 50, torch.float32)
    backwards = Worker(RoundedSums, 50, torch.float32)
    for image, other in zip(images, reversed(images), strict=True):
        forwards.take(*image)
        backwards.take(*other)
    assert not torch.equal(forwards.gradients, backwards.gradients)


@given(seed=st.integers(0, 1000))
def test_an_exact_sum_is_the_sum_to_its_last_bit_but_one(seed: int):
    images = drawn(seed, 9, torch.float64)
    gradient, loss = summed(ExactSums, images, [9], torch.float64)
    step = 2.0**-FRACTION_BITS
    for found, terms in ((gradient, [g for g, _ in images]), (loss, [one[0] for _, one in images])):
        # Each of nine images is rounded by half a step at most; float64's own sum by 1e-15 of 90.
        error = (found - torch.stack(terms).sum(0)).abs().max()
        assert error <= 9 * step / 2 + 1e-13


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf, 256.0, -1e30])
def test_what_cannot_be_added_makes_all_of_it_nan(broken: float):
    images = drawn(0, 3, torch.float32)
    images[1][0][7] = broken
    gradient, loss = summed(ExactSums, images, [1, 2], torch.float32)
    assert gradient.isnan().all()
    assert loss.isnan()
    gradient, _ = summed(ExactSums, images[2:], [1], torch.float32)
    assert gradient.isfinite().all()


def test_the_largest_step_still_fits():
    gradient, loss = torch.full((2,), 255.0), torch.tensor([255.0])
    gradient[1] = -255.0
    worker = Worker(ExactSums, 2, torch.float32)
    for _ in range(MOST_EXACT_IMAGES):
        worker.take(gradient, loss)
    loss_sum, _ = worker.sums.add_up(Alone(), stop=False)
    assert worker.gradients.tolist() == [255.0 * MOST_EXACT_IMAGES, -255.0 * MOST_EXACT_IMAGES]
    assert float(loss_sum) == 255.0 * MOST_EXACT_IMAGES


@pytest.mark.parametrize("make", [RoundedSums, ExactSums])
def test_who_wants_to_stop_is_counted_and_the_next_step_begins_at_zero(make: Any):
    worker = Worker(make, 50, torch.float32)
    for stop in (True, False):
        worker.sums.begin()
        for image in drawn(1, 2, torch.float32):
            worker.take(*image)
        loss_sum, leaving = worker.sums.add_up(Alone(), stop=stop)
        assert bool(leaving) == stop
        first = worker.gradients.clone(), loss_sum.clone()
    worker.sums.begin()
    assert not worker.gradients.any()
    for image in drawn(1, 2, torch.float32):
        worker.take(*image)
    loss_sum, _ = worker.sums.add_up(Alone(), stop=False)
    assert torch.equal(worker.gradients, first[0])
    assert torch.equal(loss_sum, first[1])


def test_a_job_that_asks_for_exact_sums_takes_images_one_at_a_time(make_job: MakeJob):
    run = open_run(make_job(training__sums="exact"))
    assert isinstance(run.parts.sums, ExactSums)
    assert run.parts.micro_batch == 1
    run.close()
    run = open_run(make_job())
    assert isinstance(run.parts.sums, RoundedSums)
    assert run.parts.micro_batch == 8
    run.close()
    with pytest.raises(JobError, match=r"max_micro_batch is 4, and training\.sums: exact takes"):
        make_job(training__sums="exact", memory__max_micro_batch=4)


def test_more_images_than_fit_are_refused(make_job: MakeJob):
    with pytest.raises(JobError, match=r"exact adds at most 2047 images a step.*is 3000"):
        make_job(training__sums="exact", training__images_per_step=3000)
