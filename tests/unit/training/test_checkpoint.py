"""Checkpoints: whole or not at all, exact, and the damaged passed over."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from raylora.base.errors import MissingObject
from raylora.base.storage import Storage, open_storage
from raylora.training.checkpoint import (
    State,
    checkpoint_steps,
    prune,
    read_checkpoint,
    read_facts,
    read_newest,
    write_checkpoint,
)

FACTS = {"dataset": "abc", "shares": [0.25, 0.75]}


def state(step: int, value: float = 1.0) -> State:
    tensors = {"values": torch.full((5,), value), "optimizer/step": torch.tensor(float(step))}
    return State(step, tensors, dict(FACTS))


@pytest.fixture
def here(tmp_path) -> Storage:
    return open_storage(str(tmp_path / "run"))


def test_what_was_written_is_read(storage: Storage):
    assert read_newest(storage) is None
    write_checkpoint(storage, state(20, 0.1), b"the lora")
    write_checkpoint(storage, state(100, 0.2), b"a later one")
    assert checkpoint_steps(storage) == [20, 100]
    newest = read_newest(storage)
    assert newest is not None
    assert (newest.step, newest.facts) == (100, FACTS)
    assert torch.equal(newest.tensors["values"], torch.full((5,), 0.2))
    assert torch.equal(read_checkpoint(storage, 20).tensors["values"], torch.full((5,), 0.1))
    assert storage.read("checkpoints/000020/adapter.safetensors") == b"the lora"


def test_without_a_manifest_there_is_no_checkpoint(here: Storage):
    write_checkpoint(here, state(1), b"")
    write_checkpoint(here, state(2), b"")
    here.delete("checkpoints/000002/manifest.json")
    assert checkpoint_steps(here) == [1]
    newest = read_newest(here)
    assert newest is not None
    assert newest.step == 1
    write_checkpoint(here, state(2, 5.0), b"")
    assert float(read_checkpoint(here, 2).tensors["values"][0]) == 5.0


def test_a_complete_checkpoint_is_left_as_it_is(here: Storage):
    write_checkpoint(here, state(1, 1.0), b"first")
    write_checkpoint(here, state(1, 2.0), b"second")
    assert here.read("checkpoints/000001/adapter.safetensors") == b"first"
    assert float(read_checkpoint(here, 1).tensors["values"][0]) == 1.0


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_damaged_one_is_passed_over_and_told(
    here: Storage, name: str, caplog: pytest.LogCaptureFixture
):
    write_checkpoint(here, state(1), b"")
    write_checkpoint(here, state(2), b"")
    data = here.read(f"checkpoints/000002/{name}")
    here.write(f"checkpoints/000002/{name}", data[:-1] + bytes([data[-1] ^ 1]))
    with caplog.at_level("WARNING", logger="raylora"):
        newest = read_newest(here)
    assert newest is not None
    assert newest.step == 1
    assert "checkpoint 2 is damaged" in caplog.text
    here.delete(f"checkpoints/000001/{name}")
    assert read_newest(here) is None
    with pytest.raises(MissingObject):
        read_checkpoint(here, 1)


def test_the_manifest_names_sizes_and_hashes(here: Storage):
    import hashlib

    write_checkpoint(here, state(3), b"the lora")
    manifest = json.loads(here.read("checkpoints/000003/manifest.json"))
    assert manifest["step"] == 3
    assert set(manifest["objects"]) == {"adapter.safetensors", "state.safetensors", "state.json"}
    for name, told in manifest["objects"].items():
        data = here.read(f"checkpoints/000003/{name}")
        assert told == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_steps_are_sorted_as_numbers(here: Storage):
    for step in (9, 1_000_000, 10, 999_999):
        write_checkpoint(here, state(step), b"")
    assert checkpoint_steps(here) == [9, 10, 999_999, 1_000_000]


def test_pruning_leaves_the_newest_whole(storage: Storage):
    for step in (1, 2, 3):
        write_checkpoint(storage, state(step), b"x")
    prune(storage, 2)
    assert checkpoint_steps(storage) == [2, 3]
    assert len(storage.entries("checkpoints")) == 8
    prune(storage, 5)
    assert checkpoint_steps(storage) == [2, 3]


def test_pruning_spares_what_the_newest_names(storage: Storage):
    for step in (1, 2, 3, 4):
        kept = replace(state(step), facts={**FACTS, "keep": [2] if step == 4 else [1, 3]})
        write_checkpoint(storage, kept, b"x")
    prune(storage, 1)
    assert checkpoint_steps(storage) == [2, 4]
    assert len(storage.entries("checkpoints")) == 8
    assert read_facts(storage, 4)["keep"] == [2]
