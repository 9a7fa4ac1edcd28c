"""What a job needs: from the table, from this machine's cache, or measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bases import open_tiny
from small import small_job

import raylora.measure
from raylora.base.lookup import plugins
from raylora.job import Job, with_overrides
from raylora.measure import asked_of_job, need_of_job, planning_family
from raylora.measure.on_meta import measured_entry
from raylora.memory.table import in_table
from raylora.models import load_adapted
from raylora.weights.short_names import SHORT_NAMES

BUCKET = (64, 64)


def usual(weights: str, **overrides: Any) -> Job:
    """A plain job on a usual base."""
    job = Job.model_validate(
        {
            "name": "usual",
            "family": {"kind": SHORT_NAMES[weights].kind, "weights": weights},
            "data": {"folder": "."},
            "training": {"steps": 1, "seed": 0, "precision": "bf16"},
        }
    )
    return with_overrides(job, {path.replace("__", "."): held for path, held in overrides.items()})


@pytest.fixture
def never_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("RAYLORA_HOME", str(tmp_path))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it was measured")

    monkeypatch.setattr(raylora.measure, "measured_entry", refuse)


@pytest.mark.usefixtures("never_measured")
@pytest.mark.parametrize("weights", SHORT_NAMES)
def test_a_usual_job_is_found_in_the_table_at_its_rank(weights: str) -> None:
    for rank in (4, 128):
        job = usual(weights, network__rank=rank, network__alpha=1, optimizer__name="lion")
        need = need_of_job(job, planning_family(job), (1024, 1024))
        entry = in_table(weights, (1024, 1024), "bf16")
        assert entry is not None
        assert need == entry.at(rank)
        assert need.adapter_numbers == rank * entry.adapter_numbers[1]


@pytest.mark.usefixtures("never_measured")
@pytest.mark.parametrize(
    "other",
    [
        {"network__layers": "attention"},
        {"network__kind": "locon"},
        {"network__dropout": 0.1},
        {"network__ranks": {"*.attn1.*": 4}},
        {"network__start": "pissa"},
        {"network__train": "both"},
        {"family__max_tokens": 150},
        {"family__training_adapter": "other.safetensors"},
        {"memory__attention": "math"},
        {"optimizer__rates": {"*.attn2.*": 0}},
        {"training__precision": "fp64"},
    ],
    ids=str,
)
def test_another_job_is_not_taken_from_the_table(other: dict[str, Any]) -> None:
    job = usual("sd15", **other)
    family = planning_family(usual("sd15"))
    with pytest.raises(AssertionError, match="it was measured"):
        need_of_job(job, family, (512, 512))


@pytest.mark.usefixtures("never_measured")
def test_a_usual_base_is_planned_without_being_there() -> None:
    job = usual("flux-dev", family__parts={"text_encoder_2": "/nowhere/t5.safetensors"})
    family = planning_family(job)
    assert family.base.config("transformer")["num_layers"] == 19


@pytest.mark.slow
def test_the_table_at_a_rank_is_what_a_job_of_that_rank_is_measured_at() -> None:
    job = usual("sd15", network__rank=24)
    told = need_of_job(job, planning_family(job), (512, 512))
    measured = need_of_job(job, planning_family(job), (512, 512), table=False, cache=False)
    assert told.adapter_numbers == measured.adapter_numbers
    assert (told.denoiser, told.text_encoders) == (measured.denoiser, measured.text_encoders)
    for kind, step in measured.steps.items():
        assert told.steps[kind].work == step.work
        for images in (1, 3, 16):
            expected = step.dynamic.at(images)
            found = told.steps[kind].dynamic.at(images)
            # For any rank, the last 512 bytes of small tensors are rounded up.
            assert expected <= found <= 1.002 * expected


@pytest.mark.slow
def test_what_was_measured_is_remembered_until_something_else_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("RAYLORA_HOME", str(tmp_path))
    family, measured = open_tiny("sd15"), []

    def counting(*args: Any, **words: Any) -> Any:
        measured.append(args)
        return measured_entry(*args, **words)

    monkeypatch.setattr(raylora.measure, "measured_entry", counting)
    job = small_job(str(tmp_path))
    first = need_of_job(job, family, BUCKET)
    assert need_of_job(job, family, BUCKET) == first
    assert len(measured) == 1
    for other in ({"name": "another"}, {"training.steps": 9}, {"store": "elsewhere"}):
        assert need_of_job(with_overrides(job, other), family, BUCKET) == first
    assert len(measured) == 1
    larger = need_of_job(with_overrides(job, {"network.rank": 32}), family, BUCKET)
    assert larger.adapter_numbers > first.adapter_numbers
    need_of_job(job, family, (64, 128))
    assert len(measured) == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", plugins("raylora.networks"))
def test_every_network_is_measured_as_it_is_trained(kind: str, tmp_path: Any) -> None:
    job = small_job(str(tmp_path), network={"kind": kind})
    family = open_tiny("sd15")
    entry = measured_entry(job, family, BUCKET, kinds=["none", "all"])
    trained = load_adapted(job, family, torch.device("cpu")).adapter
    assert entry.adapter_numbers == (trained.values.numel(), 0)
    assert entry.adapter_constants == trained.constants.numel()
    none, most = (entry.at().steps[one] for one in ("none", "all"))
    assert none.dynamic.at(2) > most.dynamic.at(2) > 0
    assert none.work.flops < most.work.flops


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd15", "sd2", "sdxl", "sd3", "flux1"])
def test_text_encoders_in_training_are_part_of_the_step(kind: str, tmp_path: Any) -> None:
    family = open_tiny(kind)
    bare = {"family": {"kind": kind, "weights": family.base.name}}
    alone, both = (
        measured_entry(
            small_job(str(tmp_path), **bare, network={"train": train}),
            family,
            BUCKET,
            kinds=["all"],
        )
        for train in ("denoiser", "both")
    )
    assert both.trains_text == tuple(both.text_encoders)
    assert alone.trains_text == ()
    assert both.adapter_numbers > alone.adapter_numbers
    assert both.steps["all"].at().work.flops > alone.steps["all"].at().work.flops


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "family_words", "words"),
    [
        ("flux1", {"mask_t5": True}, {}),
        ("sd3", {"mask_t5": True, "mask_clip": True, "t5_dropout": 0.1}, {}),
        ("sdxl", {"max_tokens": 150}, {"loss__name": "huber", "training__precision": "fp64"}),
        ("sd15", {}, {"training__precision": "fp16", "network": {"start": "pissa"}}),
        ("sd15", {}, {"network": {"dropout": 0.1, "rank_dropout": 0.1, "module_dropout": 0.1}}),
    ],
    ids=lambda one: str(one)[:30],
)
def test_what_a_job_adds_is_part_of_what_it_needs(
    kind: str, family_words: dict[str, Any], words: dict[str, Any], tmp_path: Any
) -> None:
    family, plain = open_tiny(kind, **family_words), open_tiny(kind)
    bare = {"kind": kind, "weights": family.base.name}
    job = small_job(str(tmp_path), family={**bare, **family_words}, **words)
    usually = small_job(str(tmp_path), family=bare, training__precision="fp16")
    need = measured_entry(job, family, BUCKET, kinds=["none"]).at()
    least = measured_entry(usually, plain, BUCKET, kinds=["none"]).at()
    assert need.steps["none"].dynamic.at(3) > least.steps["none"].dynamic.at(3)
    assert need.predict.dynamic.at(3) >= least.predict.dynamic.at(3)


def test_a_job_asks_for_what_its_words_say(tmp_path: Any) -> None:
    asked = asked_of_job(
        small_job(
            str(tmp_path),
            training__images_per_step=6,
            training__sums="exact",
            ema__decay=0.99,
            optimizer__name="adamw",
        )
    )
    assert (asked.images_per_step, asked.exact_sums, asked.ema) == (6, True, True)
    assert asked.state_bytes == 8
    assert asked.state_bytes_8bit == pytest.approx(2, rel=0.02)
    assert not asked.previews
    prodigy = asked_of_job(small_job(str(tmp_path), optimizer__name="prodigy"))
    assert (prodigy.state_bytes, prodigy.state_bytes_8bit) == (16, None)
