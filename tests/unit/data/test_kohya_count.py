"""An epoch counted as sd-scripts counts it, against what it counted itself."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raylora.data.balance import balanced_repeats
from raylora.data.kohya_count import batches_per_epoch, steps_for_epochs, updates_per_epoch
from raylora.data.pixels.bucket import Buckets, Size

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = json.loads((GOLDEN / "epochs.json").read_text())["cases"]
BUCKETS = Buckets((256, 256), minimum=128, maximum=512, step=64)


def images(folders: dict[str, int], cycle: list[list[int]]) -> list[tuple[Size, int]]:
    """Size and repeats of every image, in the order in which sd-scripts was given the folders."""
    return [
        ((cycle[number % len(cycle)][0], cycle[number % len(cycle)][1]), int(repeats))
        for name, count in folders.items()
        for repeats in [name.partition("_")[0]]
        if repeats.isdecimal()
        for number in range(count)
    ]


def ratio(size: Size) -> float:
    return size[0] / size[1]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['train']}-{case['batch_size']}")
def test_an_epoch_has_the_showings_batches_and_updates_of_sd_scripts(case: dict[str, Any]):
    train = images(case["train"], case["image_sizes_cycle"])
    reg = images(case["reg"], case["image_sizes_cycle"])
    target = sum(repeats for _, repeats in train)
    assert target == case["num_train_images"]
    assert sum(repeats for _, repeats in reg) == case["num_reg_images"]

    balanced = balanced_repeats(np.array([repeats for _, repeats in reg], dtype=np.int64), target)
    shown = [*train, *((size, int(n)) for (size, _), n in zip(reg, balanced, strict=True) if n)]
    showings: Counter[Size] = Counter()
    for size, repeats in shown:
        showings[BUCKETS.place(size).bucket] += repeats
    assert case["buckets"] == {
        str(number): {"resolution": list(bucket), "count": showings[bucket]}
        for number, bucket in enumerate(sorted(showings))
    }
    errors = [abs(ratio(BUCKETS.place(size).bucket) - ratio(size)) for size, _ in shown]
    assert float(np.mean(errors)) == pytest.approx(case["mean_ar_error"], abs=1e-12)

    accumulation = case["grad_accum"]
    batches = batches_per_epoch(showings.values(), case["batch_size"])
    assert batches == case["batches_per_epoch"]
    updates = [updates_per_epoch(batches, accumulation=accumulation, processes=n) for n in (1, 2)]
    assert updates == [case["updates_per_epoch_1proc"], case["updates_per_epoch_2proc"]]
    steps = steps_for_epochs(3, batches, accumulation=accumulation)
    assert steps == case["max_train_steps_for_3_epochs_1proc"]


def test_each_bucket_keeps_its_own_short_batch():
    assert batches_per_epoch([5, 1, 0, 8], 4) == 2 + 1 + 0 + 2


def test_one_rounding_gives_what_the_two_of_sd_scripts_give():
    """Its steps for epochs divide once, ceil(L / P / GA), its updates an epoch twice."""
    for batches in range(1, 60):
        for processes in range(1, 9):
            for accumulation in range(1, 9):
                once = math.ceil(batches / processes / accumulation)
                shares = {"processes": processes, "accumulation": accumulation}
                assert updates_per_epoch(batches, **shares) == once
                assert steps_for_epochs(4, batches, **shares) == 4 * once
