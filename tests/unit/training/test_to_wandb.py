"""Weights & Biases, offline: what its own client wrote to disk."""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raylora.base.errors import OptionError
from raylora.base.storage import Storage, open_storage
from raylora.training.options import LogOptions, WandbOptions
from raylora.training.to_wandb import WandbRun, wandb_id
from raylora.training.trackers import make_trackers, report_problems

OFFLINE = WandbOptions(
    project="cats", entity="us", group="tries", tags=("ink", "tiny"), mode="offline"
)


@pytest.fixture
def here(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "run"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the client writes; nothing of the person's own settings is read."""
    for word in ("DIR", "CONFIG_DIR", "CACHE_DIR", "DATA_DIR"):
        (tmp_path / word).mkdir()
        monkeypatch.setenv(f"WANDB_{word}", str(tmp_path / word))
    return tmp_path / "DIR"


def records(folder: Path) -> list[Any]:
    """Of every run's file, in order of time: blocks of 32 KiB, of pieces with 7 bytes before."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda f: f.stat().st_mtime):
        for data in _whole(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            found.append(record)
    return found


def _whole(raw: bytes) -> Iterator[bytes]:
    at, held = 7, b""
    while at + 7 <= len(raw):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", raw[at + 4 : at + 7])
        if not kind:
            break
        held += raw[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield held
            held = b""


def history(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for record in records(folder):
        if record.HasField("history"):
            items = {
                ".".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            rows.append({k: v for k, v in items.items() if not k.startswith("_")})
    return rows


@pytest.mark.slow  # starts their process
def test_a_run_and_its_resume_are_one_run_there(here: Storage, folder: Path):
    job = {"name": "cats", "network": {"rank": 8}}
    for done, finished in ((0, False), (1, True)):
        (tracker,) = make_trackers(LogOptions(wandb=OFFLINE), here, attempt=1, name="cats", job=job)
        tracker.begin(done)
        began = int(time.time())
        for step in (done + 1, done + 2):
            tracker.add(step, {"loss/current": 0.5 * step, "lr/denoiser": 1e-3})
        tracker.flush()
        tracker.close(finished=finished)
        while int(time.time()) == began:  # their folders are named by the second
            time.sleep(0.05)
    rows = history(folder)
    assert [(row["step"], row["loss/current"]) for row in rows] == [
        (1, 0.5),
        (2, 1.0),
        (2, 1.0),
        (3, 1.5),
    ]
    runs = [record.run for record in records(folder) if record.HasField("run")]
    assert {run.run_id for run in runs} == {wandb_id(here)}
    held = runs[0]
    assert (held.project, held.entity, held.run_group) == ("cats", "us", "tries")
    assert (held.display_name, set(held.tags)) == ("cats", {"ink", "tiny"})
    config = {item.key: json.loads(item.value_json) for item in held.config.update}
    assert config["network"] == {"rank": 8}
    assert not held.git.remote_url
    codes = [record.exit.exit_code for record in records(folder) if record.HasField("exit")]
    assert codes == [1, 0]


def test_the_id_is_drawn_once_and_is_another_runs_own(here: Storage, tmp_path: Path):
    assert wandb_id(here) == wandb_id(here)
    assert wandb_id(open_storage(str(tmp_path / "other"))) != wandb_id(here)


def test_the_key_comes_from_the_environment_and_its_absence_is_told(
    monkeypatch: pytest.MonkeyPatch,
):
    online = LogOptions(wandb=WandbOptions())
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert report_problems(online) == []
    monkeypatch.delenv("WANDB_API_KEY")
    (problem,) = report_problems(online)
    assert "no WANDB_API_KEY" in problem
    assert report_problems(LogOptions(wandb=OFFLINE)) == []


def test_a_missing_package_names_its_extra(here: Storage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(OptionError, match="raylora\\[wandb\\]"):
        WandbRun(OFFLINE, here, name="cats", job={})
    monkeypatch.setattr("raylora.training.trackers.find_spec", lambda name: None)
    (problem,) = report_problems(LogOptions(wandb=OFFLINE))
    assert 'pip install "raylora[wandb]"' in problem
