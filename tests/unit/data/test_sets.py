"""Several sets in one job: shared caches, regularisation images, held-out shares, masks."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datafolders import (
    FACTS,
    Counted,
    NumpyEncoder,
    build,
    fill_folder,
    image_bytes,
    plan_of,
    small_options,
    small_sets,
)
from PIL import Image

from raylora.base.errors import DataError
from raylora.base.storage import open_storage
from raylora.data.dataset import Dataset
from raylora.data.kohya_count import batches_per_epoch, steps_for_epochs, updates_per_epoch
from raylora.data.options import DataOptions
from raylora.data.rows import Row
from raylora.data.steps import StepPlan
from raylora.data.supply import Supply
from raylora.data.variants import Chooser

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = json.loads((GOLDEN / "epochs.json").read_text())["cases"]


def flat(size: tuple[int, int] = (96, 96), colour: Any = 128, mode: str = "L") -> bytes:
    sink = io.BytesIO()
    Image.new(mode, size, colour).save(sink, "PNG")
    return sink.getvalue()


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for key, data in files.items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def some(folder: Path, count: int, *, caption: str | None = "cat") -> Path:
    """Grey squares, each of its own shade."""
    for number in range(count):
        put(folder, {f"{number:02d}.png": flat(colour=number)})
        if caption is not None:
            put(folder, {f"{number:02d}.txt": f"{caption} {number}".encode()})
    return folder


def of_set(rows: Any, number: int) -> list[Row]:
    return [row for row in rows if row.set == number]


def shown(rows: Any, number: int) -> dict[str, int]:
    return {row.key: row.repeats for row in of_set(rows, number)}


# -- one folder, two sizes


def test_two_sizes_of_one_folder_share_reads_captions_and_memory(
    tmp_path: Path, cache_url: str, monkeypatch: pytest.MonkeyPatch
):
    folder = fill_folder(tmp_path / "images", 4)
    counted = Counted(monkeypatch)
    words = {"shuffle_caption": True, "flip_aug": True, "variants": 2}
    data = small_sets({}, {"resolution": 112}, folder=folder.url, **words)
    plan = plan_of(data, cache_url, **FACTS)
    assert counted.reads_of(folder.url) == Counter({entry.key: 1 for entry in folder.entries()})
    assert len(set(plan.facts.memory_folders)) == 1
    encoder = NumpyEncoder()
    dataset = build(data, cache_url, encoder)
    assert encoder.images == 2 * 2 * 4  # captions of one tag have one order, so one text each
    assert len(set(encoder.captions)) == 4 + 1
    small, large = (of_set(dataset.rows, number) for number in range(2))
    assert [row.key for row in small] == [row.key for row in large]
    for one, other in zip(small, large, strict=True):
        assert one.bucket != other.bucket
        assert one.number != other.number
        assert not set(one.latents_keys) & set(other.latents_keys)
    # A job with the second size alone finds its pictures there, but for what is drawn by set.
    plain = small_sets({}, {"resolution": 112}, folder=folder.url)
    build(plain, cache_url, NumpyEncoder())
    assert build(small_options(folder, resolution=112), cache_url).rows[0].set == 0
    folders = {entry.key.partition("/")[0] for entry in open_storage(cache_url).entries()}
    assert len([name for name in folders if name.startswith("sources-")]) == 1


def test_the_same_set_twice_is_drawn_twice(tmp_path: Path, cache_url: str):
    folder = fill_folder(tmp_path / "images", 6, shapes=[(130, 100)])
    for number in range(6):
        folder.write(f"image-{number:04d}.txt", b"a, b, c, d, e, f, g, h")
    words = {"random_crop": True, "shuffle_caption": True, "variants": 4}
    rows = plan_of(small_sets({}, {}, folder=folder.url, **words), cache_url, **FACTS).rows
    for one, other in zip(of_set(rows, 0), of_set(rows, 1), strict=True):
        assert one.text_keys != other.text_keys
        assert one.latents_keys != other.latents_keys
    steps = StepPlan(rows, 4, 0)
    numbers = [one.number for step in range(steps.steps_per_epoch) for one in steps.samples(step)]
    assert len(set(numbers)) == 12


def test_an_image_of_two_sets_is_encoded_once_where_it_looks_the_same(
    tmp_path: Path, cache_url: str
):
    one, other = some(tmp_path / "one", 3), some(tmp_path / "other", 3, caption="dog")
    encoder = NumpyEncoder()
    dataset = build(small_sets({"folder": one}, {"folder": other}), cache_url, encoder)
    assert encoder.images == 3
    assert len(dataset.rows) == 6
    assert len(set(encoder.captions)) == 6 + 1


def test_an_image_that_two_folders_have_and_that_is_broken_is_bad_in_both(
    tmp_path: Path, cache_url: str
):
    """It is encoded once, for the first set, and the verdict is remembered there."""
    broken = image_bytes((96, 96), 3)[:-900]
    folders = [some(tmp_path / name, 3) for name in ("one", "other")]
    for folder in folders:
        put(folder, {"broken.png": broken, "broken.txt": b"x"})
    data = small_sets(*({"folder": folder} for folder in folders), max_bad=0.5)
    dataset = build(data, cache_url, NumpyEncoder())
    assert [(one.set, one.key) for one in dataset.bad] == [(0, "broken.png"), (1, "broken.png")]
    assert all("truncated" in one.reason for one in dataset.bad)
    assert len(dataset.rows) == 6
    assert len(quarantined(cache_url)) == 2
    again = build(data, cache_url, NumpyEncoder())
    assert (again.bad, len(again.rows)) == (dataset.bad, 6)


def quarantined(cache_url: str) -> list[dict[str, str]]:
    lines = open_storage(cache_url).read("quarantine.jsonl").decode().splitlines()
    return [json.loads(line) for line in lines]


def test_sets_of_one_folder_list_a_bad_image_once(tmp_path: Path, cache_url: str):
    folder = put(some(tmp_path / "images", 3), {"bad.png": b"", "bad.txt": b"x"})
    data = small_sets({}, {"resolution": 112}, folder=str(folder), max_bad=0.5)
    dataset = build(data, cache_url, NumpyEncoder())
    assert [one.set for one in dataset.bad] == [0, 1]
    assert [line["key"] for line in quarantined(cache_url)] == ["bad.png"]


# -- regularisation images


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case['train']}-{case['reg']}-{case['batch_size']}"
)
def test_an_epoch_of_real_folders_is_that_of_sd_scripts(
    tmp_path: Path, cache_url: str, case: dict[str, Any]
):
    """One difference on purpose: folders of regularisation images go by their names here.

    There they go as the disk lists them: the case with 2_r and 1_s was recorded with 2_r first.
    """
    for role in ("train", "reg"):
        (tmp_path / role).mkdir()
        for name, count in case[role].items():
            for number in range(count):
                cycle = case["image_sizes_cycle"]
                size = tuple(cycle[number % len(cycle)])
                put(tmp_path / role / name, {f"{number:03d}.png": flat(size)})
                if role == "train":
                    put(tmp_path / role / name, {f"{number:03d}.txt": b"caption"})
    sets: list[dict[str, Any]] = [{"folder": str(tmp_path / "train")}]
    if case["reg"]:
        sets.append({"folder": str(tmp_path / "reg"), "is_reg": True})
    data = DataOptions.model_validate(
        {
            "resolution": 256,
            "min_bucket_reso": 128,
            "max_bucket_reso": 512,
            "bucket_reso_steps": 64,
            "sets": sets,
        }
    )
    rows = plan_of(data, cache_url, **FACTS).rows
    assert sum(row.repeats for row in of_set(rows, 0)) == case["num_train_images"]
    counts = rows.showings_by_bucket()
    if len(case["reg"]) == 2:
        # Sorted, one image of 2_r is the last to be taken and overshoots by one.
        assert case["reg"] == {"2_r": 2, "1_s": 3}
        assert list(shown(rows, 1).values()) == [1, 1, 1, 2, 2]
        counts[rows[0].bucket] -= 1
    assert case["buckets"] == {
        str(number): {"resolution": list(bucket), "count": counts[bucket]}
        for number, bucket in enumerate(sorted(counts))
    }
    errors = [
        abs(row.bucket[0] / row.bucket[1] - row.original_size[0] / row.original_size[1])
        for row in rows
    ]
    assert float(np.mean(errors)) == pytest.approx(case["mean_ar_error"], abs=1e-12)
    accumulation = case["grad_accum"]
    batches = batches_per_epoch(counts.values(), case["batch_size"])
    assert batches == case["batches_per_epoch"]
    updates = [updates_per_epoch(batches, accumulation=accumulation, processes=n) for n in (1, 2)]
    assert updates == [case["updates_per_epoch_1proc"], case["updates_per_epoch_2proc"]]
    steps = steps_for_epochs(3, batches, accumulation=accumulation)
    assert steps == case["max_train_steps_for_3_epochs_1proc"]


def test_there_are_eleven_recorded_epochs():
    assert len(CASES) == 11


def test_regularisation_images_balance_within_their_group(tmp_path: Path, cache_url: str):
    folders = {name: some(tmp_path / name, count) for name, count in COUNTS.items()}
    data = small_sets(
        {"folder": folders["a"], "repeats": 3},
        {"folder": folders["b"], "group": 1},
        {"folder": folders["few"], "is_reg": True},
        {"folder": folders["many"], "is_reg": True, "group": 1},
        {"folder": folders["more"], "is_reg": True},
    )
    plan = plan_of(data, cache_url, **FACTS)
    totals = [sum(shown(plan.rows, number).values()) for number in range(5)]
    assert totals == [9, 2, 5, 2, 4]
    # Two sets of a group are one list: 9 showings over 2 + 2 images, round after round.
    assert shown(plan.rows, 2) == {"00.png": 3, "01.png": 2}
    assert shown(plan.rows, 4) == {"00.png": 2, "01.png": 2}
    assert shown(plan.rows, 3) == {"00.png": 1, "01.png": 1}
    assert plan.notes == (
        "3 of 5 regularisation images are not used: the first 2 are as many showings as the 2 of "
        "the others.",
    )
    # What is not shown is not encoded either.
    encoder = NumpyEncoder()
    build(data, cache_url, encoder)
    assert encoder.images == 3  # 00 to 02; grey squares of all folders are alike


COUNTS = {"a": 3, "b": 2, "few": 2, "many": 5, "more": 2}


def test_a_group_of_regularisation_images_alone_is_refused(tmp_path: Path, cache_url: str):
    folder = some(tmp_path / "a", 2)
    reg = {"folder": some(tmp_path / "r", 2), "is_reg": True, "group": 1}
    message = (
        "data: the regularisation images of group 1 have no other images to keep the balance with. "
        "Add a set of the same group without is_reg."
    )
    for data in (small_sets({"folder": folder}, reg), small_sets(reg)):
        with pytest.raises(DataError) as caught:
            plan_of(data, cache_url, **FACTS)
        assert str(caught.value) == message


def test_regularisation_images_are_not_held_out(tmp_path: Path, cache_url: str):
    reg = {"folder": some(tmp_path / "r", 4), "is_reg": True}
    data = small_sets({"folder": some(tmp_path / "a", 4)}, reg, validation_split=0.5)
    plan = plan_of(data, cache_url, **FACTS)
    assert [int((plan.held_out.set == number).sum()) for number in (0, 1)] == [2, 0]


def test_bad_images_do_not_count_in_the_balance(tmp_path: Path, cache_url: str):
    folder = put(some(tmp_path / "a", 3), {"00.png": b"", "01.png": b""})
    reg = {"folder": some(tmp_path / "r", 3), "is_reg": True}
    rows = plan_of(small_sets({"folder": folder}, reg, max_bad=0.9), cache_url, **FACTS).rows
    assert (shown(rows, 0), shown(rows, 1)) == ({"02.png": 1}, {"00.png": 1})


def supply_of(dataset: Dataset, encoder: NumpyEncoder | None = None) -> tuple[Supply, StepPlan]:
    plan = StepPlan(dataset.rows, 4, 0)
    chooser = Chooser(dataset.facts.sets, seed=0, total_steps=100)
    return Supply(dataset, plan, chooser, encoder), plan


def epoch_of(dataset: Dataset) -> list[tuple[Row, Any]]:
    """What a whole epoch trains on."""
    supply, plan = supply_of(dataset)
    return [
        (dataset.rows[sample.row], tensors)
        for step in range(plan.steps_per_epoch)
        for sample, tensors in zip(
            plan.samples(step), supply.fetch(plan.samples(step), step), strict=True
        )
    ]


def test_the_weight_of_regularisation_images_reaches_what_is_trained(
    tmp_path: Path, cache_url: str
):
    reg = {"folder": some(tmp_path / "r", 2), "is_reg": True}
    data = small_sets({"folder": some(tmp_path / "a", 3)}, reg, prior_loss_weight=0.25)
    trained = epoch_of(build(data, cache_url, NumpyEncoder()))
    assert len(trained) == 6
    for row, tensors in trained:
        assert tensors["weight"] == np.float32(0.25 if row.set else 1.0)
        assert (tensors["weight"].shape, tensors["weight"].dtype) == ((), np.float32)
        assert "mask" not in tensors


# -- held-out shares


def held_keys(plan: Any) -> set[str]:
    return {row.key for row in plan.held_out}


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.1, 4), (0.25, 10), (0.99, 40)])
def test_the_named_share_is_held_out(tmp_path: Path, cache_url: str, share: float, count: int):
    folder = some(tmp_path / "a", 40)
    plan = plan_of(small_options(folder, validation_split=share), cache_url, **FACTS)
    assert (len(plan.held_out), len(plan.rows)) == (count, 40 - count)
    assert held_keys(plan) | {row.key for row in plan.rows} == {f"{n:02d}.png" for n in range(40)}
    other = small_options(folder, validation_split=share, validation_seed=1)
    if 0 < count < 40:
        assert held_keys(plan_of(other, cache_url, **FACTS)) != held_keys(plan)


def test_an_image_keeps_its_side_when_others_come_and_go(tmp_path: Path, cache_url: str):
    folder = some(tmp_path / "a", 60)
    data = small_options(folder, validation_split=0.2)
    before = held_keys(plan_of(data, cache_url, **FACTS))
    for number in range(60, 66):
        put(folder, {f"{number}.png": flat(colour=number), f"{number}.txt": b"x"})
    after = held_keys(plan_of(data, cache_url, **FACTS))
    # One more is held out of 66: of those that were there, one or two change sides.
    assert len({key for key in before ^ after if key < "60"}) <= 2
    assert after - before
    # The choice is by name alone: the order of the folder and its place do not count.
    moved = some(tmp_path / "b", 60)
    assert held_keys(plan_of(small_options(moved, validation_split=0.2), cache_url, **FACTS)) == (
        before
    )


def test_sets_of_one_folder_hold_out_the_same_images(tmp_path: Path, cache_url: str):
    folder = some(tmp_path / "a", 20)
    data = small_sets({}, {"resolution": 112}, folder=str(folder), validation_split=0.3)
    plan = plan_of(data, cache_url, **FACTS)
    by_set = [{row.key for row in of_set(plan.held_out, number)} for number in range(2)]
    assert by_set[0] == by_set[1]
    assert len(by_set[0]) == 6
    assert not held_keys(plan) & {row.key for row in plan.rows}


def test_held_out_images_are_measured_and_never_trained_on(tmp_path: Path, cache_url: str):
    folder = some(tmp_path / "a", 10)
    words = {"repeats": 2, "flip_aug": True, "variants": 2, "validation_split": 0.3}
    data = small_options(folder, **words)
    dataset = build(data, cache_url, NumpyEncoder())
    assert dataset.held_out is not None
    held = {row.key for row in dataset.held_out.rows}
    assert len(held) == 3
    trained = Counter(row.key for row, _ in epoch_of(dataset))
    assert trained == {f"{n:02d}.png": 2 for n in range(10) if f"{n:02d}.png" not in held}
    tensors = dataset.held_out.fetch(dataset.held_out.rows)
    assert [one["latents"].shape for one in tensors] == [(4, 12, 12)] * 3
    assert build(small_options(folder), cache_url, NumpyEncoder()).held_out is None


# -- masks


def alpha_image(shade: int, clear_columns: int, size: tuple[int, int] = (96, 96)) -> bytes:
    """Clear on the left."""
    pixels = np.full((size[1], size[0], 4), shade, np.uint8)
    pixels[..., 3] = 255
    pixels[:, :clear_columns, 3] = 0
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def half_mask(size: tuple[int, int] = (96, 96), black_columns: int = 48) -> bytes:
    pixels = np.full((size[1], size[0]), 255, np.uint8)
    pixels[:, :black_columns] = 0
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def masks_of(dataset: Dataset) -> dict[str, Any]:
    return {row.key: tensors["mask"] for row, tensors in epoch_of(dataset)}


HALF = np.concatenate([np.zeros((1, 12, 6)), np.ones((1, 12, 6))], axis=2).astype(np.float32)
ONES = np.ones((1, 12, 12), np.float32)


def test_a_mask_is_the_alpha_channel_at_the_size_of_the_latents(tmp_path: Path, cache_url: str):
    folder = put(
        tmp_path / "images",
        {
            "half.png": alpha_image(9, 48),
            "cell.png": alpha_image(8, 50),  # a quarter of a cell
            "opaque.png": flat(colour=7),
            "whole.png": alpha_image(6, 0),
        },
    )
    data = small_options(folder, alpha_mask=True, default_caption="x")
    found = masks_of(build(data, cache_url, NumpyEncoder()))
    assert all(mask.dtype == np.float32 for mask in found.values())
    assert np.array_equal(found["half.png"], HALF)
    assert np.array_equal(found["opaque.png"], ONES)
    assert np.array_equal(found["whole.png"], ONES)
    cell = HALF.copy()
    cell[:, :, 6] = 0.75
    assert np.array_equal(found["cell.png"], cell)


@pytest.mark.parametrize("name", ["opaque.png", "whole.png"])
def test_padding_does_not_count_whether_an_opaque_image_has_an_alpha_channel_or_not(
    tmp_path: Path, cache_url: str, name: str
):
    data_of = {"opaque.png": flat((96, 48), 7), "whole.png": alpha_image(7, 0, (96, 48))}
    folder = put(tmp_path / "images", {name: data_of[name]})
    data = small_options(
        folder, alpha_mask=True, default_caption="x", fit="pad", enable_bucket=False
    )
    (mask,) = masks_of(build(data, cache_url, NumpyEncoder())).values()
    assert mask[0, :, 0].tolist() == [0.0] * 3 + [1.0] * 6 + [0.0] * 3


def test_a_mask_is_the_picture_of_the_same_name_in_the_mask_folder(tmp_path: Path, cache_url: str):
    folder = some(tmp_path / "images", 2)
    put(tmp_path / "masks", {"00.png": half_mask(), "01.jpg": flat(colour=255)})
    put(tmp_path / "masks", {"nobody.png": half_mask()})
    data = small_options(folder, mask_folder=str(tmp_path / "masks"))
    dataset = build(data, cache_url, NumpyEncoder())
    assert [row.mask for row in dataset.rows] == ["00.png", "01.jpg"]
    found = masks_of(dataset)
    assert np.array_equal(found["00.png"], HALF)
    assert np.array_equal(found["01.png"], ONES)


def test_masks_are_mirrored_with_their_images(tmp_path: Path, cache_url: str):
    folder = some(tmp_path / "images", 1)
    put(tmp_path / "masks", {"00.png": half_mask()})
    words = {"flip_aug": True, "variants": 2, "repeats": 2}
    data = small_options(folder, mask_folder=str(tmp_path / "masks"), **words)
    dataset = build(data, cache_url, NumpyEncoder())
    found = [tensors["mask"] for _, tensors in epoch_of(dataset)]
    assert sorted(mask[0, 0, 0] for mask in found) == [0.0, 1.0]
    assert any(np.array_equal(mask, HALF[:, :, ::-1]) for mask in found)


def test_a_changed_mask_makes_exactly_its_image_again(
    tmp_path: Path, cache_url: str, monkeypatch: pytest.MonkeyPatch
):
    folder = some(tmp_path / "images", 4)
    masks = put(tmp_path / "masks", {f"{n:02d}.png": half_mask() for n in range(4)})
    data = small_options(folder, mask_folder=str(masks))
    build(data, cache_url, NumpyEncoder())
    put(masks, {"02.png": half_mask(black_columns=8)})
    counted, encoder = Counted(monkeypatch), NumpyEncoder()
    found = masks_of(build(data, cache_url, encoder))
    assert (encoder.images, encoder.captions) == (1, [])
    assert counted.reads_of(f"file://{folder}") == {"02.png": 1}
    # Once to see that it has changed, once to encode.
    assert counted.reads_of(f"file://{masks}") == {"02.png": 2}
    assert found["02.png"][0, 0].tolist() == [0.0] + [1.0] * 11
    assert np.array_equal(found["01.png"], HALF)


def test_an_image_without_its_mask_is_bad_and_says_why(tmp_path: Path, cache_url: str):
    folder = some(tmp_path / "images", 3)
    masks = put(tmp_path / "masks", {"00.png": half_mask(), "01.png": b"nonsense"})
    data = small_options(folder, mask_folder=str(masks), max_bad=0.9)
    dataset = build(data, cache_url, NumpyEncoder())
    assert {one.key: one.reason for one in dataset.bad} == {
        "01.png": "its mask 01.png: not an image that can be read, but text",
        "02.png": f"no mask of its name in {masks}",
    }
    assert [row.key for row in dataset.rows] == ["00.png"]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (half_mask()[:-30], "its mask 00.png: "),
        (
            half_mask((48, 96)),
            "its mask 00.png: a mask of 48x96 px does not fit a picture of 96x96",
        ),
    ],
    ids=["truncated", "other shape"],
)
@pytest.mark.parametrize("cache", [None, "none"])
def test_a_mask_that_cannot_be_used_is_told_and_when_it_is_mended_its_image_is_good_again(
    tmp_path: Path, cache_url: str, wrong: bytes, reason: str, cache: str | None
):
    folder = some(tmp_path / "images", 2)
    masks = put(tmp_path / "masks", {"00.png": wrong, "01.png": half_mask()})
    data = small_options(folder, mask_folder=str(masks), max_bad=0.5, cache=cache)
    dataset = build(data, cache_url, NumpyEncoder())
    assert [one.key for one in dataset.bad] == ["00.png"]
    assert dataset.bad[0].reason.startswith(reason)
    assert build(data, cache_url).bad == dataset.bad
    # The image itself is well: a set without masks trains on it.
    assert not build(small_options(folder), cache_url, NumpyEncoder()).bad
    put(masks, {"00.png": half_mask()})
    mended = build(data, cache_url, NumpyEncoder())
    assert (len(mended.rows), mended.bad) == (2, ())


def test_masks_that_another_set_trains_on_as_images_are_read_whole_all_the_same(
    tmp_path: Path, cache_url: str
):
    """Of an image the header is enough before it is encoded."""
    masks = put(tmp_path / "masks", {"00.png": half_mask()[:-30], "01.png": half_mask()})
    data = small_sets(
        {"folder": masks, "default_caption": "mask"},
        {"folder": some(tmp_path / "images", 2), "mask_folder": masks},
        max_bad=0.9,
    )
    bad = build(data, cache_url, NumpyEncoder()).bad
    assert [(one.set, one.key, one.reason.partition(":")[0]) for one in bad] == [
        (0, "00.png", "image file is truncated"),
        (1, "00.png", "its mask 00.png"),
    ]


def test_beside_images_with_masks_those_without_count_whole(tmp_path: Path, cache_url: str):
    masks = put(tmp_path / "masks", {"00.png": half_mask()})
    data = small_sets(
        {"folder": some(tmp_path / "a", 1), "mask_folder": masks},
        {"folder": some(tmp_path / "b", 2)},
        {"folder": put(tmp_path / "c", {"c.png": alpha_image(5, 48)}), "alpha_mask": True},
        default_caption="x",
    )
    found = {
        row.set: tensors["mask"]
        for row, tensors in epoch_of(build(data, cache_url, NumpyEncoder()))
    }
    assert np.array_equal(found[0], HALF)
    assert np.array_equal(found[1], ONES)
    assert np.array_equal(found[2], HALF)


def test_masked_and_unmasked_pictures_of_one_file_are_apart(tmp_path: Path, cache_url: str):
    folder = put(tmp_path / "images", {"a.png": alpha_image(5, 48)})
    plain = small_options(folder, default_caption="x")
    build(plain, cache_url, NumpyEncoder())
    encoder = NumpyEncoder()
    found = masks_of(
        build(small_options(folder, default_caption="x", alpha_mask=True), cache_url, encoder)
    )
    assert encoder.images == 1
    assert np.array_equal(found["a.png"], HALF)
    assert all("mask" not in tensors for _, tensors in epoch_of(build(plain, cache_url)))
