"""Randomness that is the same bits everywhere, for ever."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

from raylora.base.seeds import Purpose, draw_generator, draw_normal, sample_number

# A change of these bits makes every saved run unrepeatable. They may never change.
GOLDEN = "9ad5250468687e577613078e6ef1adbcd620061ed9923de5e834d0166154c3c7"

SEEDS = (0, 7, 2**63)
STEPS = (0, 1, 2**31)
SAMPLES = (0, 1, sample_number("10_cat/a.png", 0))
# Those of the first release; others have come since.
PURPOSES: tuple[Purpose, ...] = (
    *("initial weights", "noise", "timestep", "order", "validation", "preview", "variant", "test"),
)
TABLE = list(itertools.product(SEEDS, STEPS, SAMPLES, PURPOSES))


def draws(seed: int, step: int, sample: int, purpose: Purpose) -> bytes:
    normal = draw_normal((3, 5), seed=seed, step=step, sample=sample, purpose=purpose)
    generator = draw_generator(seed, step, sample, purpose)
    uniform, whole = generator.random(4), generator.integers(0, 1000, 4)
    order = generator.permutation(10)
    return b"".join(
        part.astype(part.dtype.newbyteorder("<")).tobytes()
        for part in (normal, uniform, whole.astype(np.int64), order.astype(np.int64))
    )


def test_the_bits_are_those_of_the_first_release():
    digest = hashlib.sha256()
    for row in TABLE:
        digest.update(draws(*row))
    for key in ("a.png", "10_cat/ü 貓.png"):
        digest.update(sample_number(key, 3).to_bytes(8, "little"))
    assert digest.hexdigest() == GOLDEN


@pytest.mark.parametrize("row", TABLE[::17])
def test_the_generator_is_the_philox_of_the_paper(row: tuple[int, int, int, Purpose]):
    seed, step, sample, purpose = row
    purpose_bits = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "big")
    # numpy counts up before it makes its first block.
    blocks = [philox([block, step, sample, 0], [seed, purpose_bits]) for block in (1, 2)]
    raw = draw_generator(*row).bit_generator.random_raw(8)
    assert [int(word) for word in raw] == blocks[0] + blocks[1]


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10, written from Salmon et al. 2011, section 3.3 and table 2."""
    words, keys, mask = list(counter), list(key), 2**64 - 1
    for _ in range(10):
        high0, low0 = divmod(words[0] * 0xD2E7470EE14C6C93, 2**64)
        high1, low1 = divmod(words[2] * 0xCA5A826395121157, 2**64)
        words = [high1 ^ words[1] ^ keys[0], low1, high0 ^ words[3] ^ keys[1], low0]
        keys[0] = (keys[0] + 0x9E3779B97F4A7C15) & mask
        keys[1] = (keys[1] + 0xBB67AE8584CAA73B) & mask
    return words


def test_a_draw_does_not_depend_on_what_was_drawn_before():
    forwards = [draws(*row) for row in TABLE]
    backwards = [draws(*row) for row in reversed(TABLE)]
    assert forwards == backwards[::-1]


def test_another_process_draws_the_same():
    code = (
        "from raylora.base.seeds import draw_normal; import sys;"
        "sys.stdout.buffer.write("
        "draw_normal((8,), seed=7, step=3, sample=5, purpose='noise').tobytes())"
    )
    command = [sys.executable, "-c", code]
    there = subprocess.run(
        command, check=True, capture_output=True, env=os.environ | {"PYTHONHASHSEED": "3"}
    )
    here = draw_normal((8,), seed=7, step=3, sample=5, purpose="noise")
    assert there.stdout == here.tobytes()


def test_seed_step_sample_and_purpose_each_change_everything():
    seen = [draw_generator(*row).random(8) for row in TABLE]
    assert len({tuple(values) for values in seen}) == len(TABLE)
    flat = np.concatenate(seen)
    assert len(np.unique(flat)) == len(flat)


def test_a_negative_seed_is_a_seed_of_its_own():
    assert draws(-1, 0, 0, "noise") != draws(1, 0, 0, "noise")


def test_a_longer_draw_begins_with_the_shorter():
    short = draw_normal((10,), seed=1, step=2, sample=3, purpose="noise")
    long = draw_normal((1000,), seed=1, step=2, sample=3, purpose="noise")
    np.testing.assert_array_equal(long[:10], short)


def test_normals_are_normal_within_and_across_samples():
    within = draw_normal((100_000,), seed=7, step=1, sample=1, purpose="noise")
    across = np.array(
        [draw_normal((1,), seed=7, step=1, sample=n, purpose="noise")[0] for n in range(5000)]
    )
    for numbers in (within, across):
        # Five standard errors of a mean and of a variance of so many normal numbers.
        assert abs(numbers.mean()) < 5 / len(numbers) ** 0.5
        assert abs(numbers.var() - 1) < 5 * (2 / len(numbers)) ** 0.5


def test_neighbouring_streams_are_not_correlated():
    rows = np.stack(
        [draw_normal((4096,), seed=7, step=n, sample=n % 3, purpose="noise") for n in range(20)]
    )
    correlations = np.corrcoef(rows)[np.triu_indices(20, k=1)]
    assert np.abs(correlations).max() < 5 / 4096**0.5  # five standard errors


def test_uniform_draws_fill_their_range_evenly():
    values = [draw_generator(7, step, 1, "timestep").integers(0, 10) for step in range(5000)]
    counts = np.bincount(values, minlength=10)
    # chi square with 9 degrees of freedom: 33.7 is its 0.9999 quantile.
    assert ((counts - 500.0) ** 2 / 500.0).sum() < 33.7


@pytest.mark.parametrize(
    ("one", "other"),
    [(("a.png", 0), ("a.png", 1)), (("a.png", 0), ("b.png", 0)), (("a1", 1), ("a", 11))],
)
def test_every_showing_of_every_image_has_its_number(one: tuple[str, int], other: tuple[str, int]):
    assert sample_number(*one) != sample_number(*other)
    assert sample_number(*one) == sample_number(*one)
    assert 0 <= sample_number(*one) < 2**64
