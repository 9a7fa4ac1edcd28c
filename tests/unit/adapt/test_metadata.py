"""The words in a LoRA file's header."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from adapters import GOLDEN, random_adapter

from raylora.adapt.lora_file import adapter_bytes, read_adapter
from raylora.adapt.metadata import AdapterFacts, adapter_metadata

# What raylora says besides: ModelSpec recommends its hash, and the job is how a run is repeated.
OURS = {"raylora.base_precision", "raylora.job", "raylora.version"}

FACTS = AdapterFacts(
    raylora_version="0.1.0",
    job_json='{"name": "icons"}',
    output_name="icons",
    architecture="stable-diffusion-v1/lora",
    base_model_version="sd_v1",
    prediction_type="v",
    resolution=(512, 768),
    rank=8,
    alpha=4.0,
    images_per_step=4,
    steps=120,
    epoch=3,
    max_steps=200,
    epochs=5,
    seed=7,
    learning_rate=2e-3,
    optimizer="torch.optim.AdamW(weight_decay=0.01)",
    schedule="cosine",
    started_at=1_700_000_000.25,
    finished_at=1_700_000_060.75,
    session_id=12345,
    train_images=173,
    batches_per_epoch=44,
)


def words_in_file(facts: AdapterFacts) -> dict[str, str]:
    data = adapter_bytes(random_adapter(), adapter_metadata(facts), dtype=torch.float16)
    return read_adapter(data).metadata


@pytest.mark.parametrize(
    ("run", "facts"),
    [
        ("default_te_unet_dim8", FACTS),
        (
            "rich_options",
            replace(FACTS, clip_skip=2, author="A. Person", network_args={"conv_dim": "4"}),
        ),
    ],
)
def test_a_file_has_every_word_that_sd_scripts_writes(run: str, facts: AdapterFacts) -> None:
    assert (
        set(words_in_file(facts))
        == set(json.loads((GOLDEN / "metadata_keys.json").read_text())[run]) | OURS
    )


def test_values_are_what_str_makes_of_them() -> None:
    words = adapter_metadata(FACTS)
    assert all(isinstance(value, str) for value in words.values())
    assert words["ss_network_dim"] == "8"
    assert words["ss_network_alpha"] == "4.0"
    assert words["ss_resolution"] == "(512, 768)"
    assert words["ss_learning_rate"] == "0.002"
    assert words["ss_training_started_at"] == "1700000000.25"
    assert words["ss_gradient_checkpointing"] == "False"
    assert words["ss_clip_skip"] == "None"
    assert words["ss_training_comment"] == "None"
    assert words["ss_total_batch_size"] == "4"
    assert words["raylora.job"] == '{"name": "icons"}'


def test_folders_tags_and_buckets_are_json() -> None:
    facts = replace(
        FACTS,
        dataset_folders={"10_cat": {"n_repeats": 10, "img_count": 3}},
        tag_frequency={"10_cat": {"chat noir": 2, "été": 1}},
        bucket_info={"buckets": {"0": {"resolution": [512, 512], "count": 30}}},
    )
    words = words_in_file(facts)
    assert json.loads(words["ss_dataset_dirs"]) == facts.dataset_folders
    assert json.loads(words["ss_tag_frequency"]) == facts.tag_frequency
    assert json.loads(words["ss_bucket_info"]) == facts.bucket_info
    assert json.loads(words["ss_reg_dataset_dirs"]) == {}


def test_modelspec_says_what_the_specification_asks() -> None:
    facts = replace(FACTS, title="Icons", trigger_phrase="ink icon", clip_skip=2)
    spec = {
        word.removeprefix("modelspec."): value
        for word, value in adapter_metadata(facts).items()
        if word.startswith("modelspec.")
    }
    assert spec == {
        "sai_model_spec": "1.0.1",
        "architecture": "stable-diffusion-v1/lora",
        "implementation": "diffusers",
        "implementation_version": "raylora/0.1.0",
        "title": "Icons",
        "resolution": "512x768",
        "date": "2023-11-14T22:14:20+00:00",
        "prediction_type": "v",
        "encoder_layer": "2",
        "trigger_phrase": "ink icon",
    }


def test_the_same_facts_give_the_same_words() -> None:
    assert adapter_metadata(FACTS) == adapter_metadata(replace(FACTS))
