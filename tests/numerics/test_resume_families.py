"""Of every family and network, a run that stopped half-way ends on the bits of the unbroken one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import random_folder
from small import ROOT, open_run
from torch import Tensor

from raylora.adapt.layout import laid_out
from raylora.adapt.lora_file import AdapterModule, adapter_bytes
from raylora.adapt.onto import names_of
from raylora.assemble import open_store
from raylora.base.lookup import plugins
from raylora.job import Job, load_job, with_overrides
from raylora.models import open_family
from raylora.training.checkpoint import read_checkpoint
from raylora.training.loop import run_training
from raylora.training.report import read_metrics

STEPS = 6
FAMILIES: dict[str, dict[str, Any]] = {
    "sd15": {"family.max_tokens": 150, "network.dropout": 0.1},
    "sd2": {"family.clip_skip": 2, "memory.checkpointing": "all"},
    "sdxl": {
        "network.train": "both",
        "network.module_dropout": 0.1,
        "family.max_tokens": 150,
        "data.random_crop": True,
        "data.flip_aug": True,
        "data.fit": "crop",
    },
    "sd3": {
        "family.clip_l_dropout": 0.3,
        "family.clip_g_dropout": 0.3,
        "family.t5_dropout": 0.3,
        "network.train": "both",
        "network.rank_dropout": 0.1,
        "ema.decay": 0.9,
    },
    "flux1": {
        "network.train": "both",
        "network.text_encoders": ["text_encoder", "text_encoder_2"],
        "family.mask_t5": True,
        "memory.checkpointing": "all",
    },
}
"""What each family has of its own, with some of what any has."""
AVERAGE = {"ema.decay": 0.9}
DROPPED = {"dropout": 0.1, "rank_dropout": 0.1, "module_dropout": 0.1}
NETWORKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora, pissa, by the root": (
        {"kind": "lora", "start": "pissa", "scaling": "sqrt_rank", "alpha": 2.0, **DROPPED},
        AVERAGE,
    ),
    "lora, frozen down": ({"kind": "lora", "freeze_down": True, **DROPPED}, AVERAGE),
    "locon, tucker": ({"kind": "locon", "conv_rank": 2, "tucker": True, **DROPPED}, AVERAGE),
    "dora": ({"kind": "dora", "dropout": 0.1, "rank_dropout": 0.1}, AVERAGE),
    "loha": ({"kind": "loha", "tucker": True, "layers": "all", "module_dropout": 0.1}, AVERAGE),
    "lokr": ({"kind": "lokr", "rank": 2, "factor": 4}, AVERAGE),
    "oft": ({"kind": "oft", "rescale": True}, AVERAGE),
    "dylora": ({"kind": "dylora", "rank": 4, "unit": 2, **DROPPED}, AVERAGE),
    "boft": ({"kind": "lycoris", "algo": "boft"}, AVERAGE),
    "glora": ({"kind": "lycoris", "algo": "glora"}, AVERAGE),
    "ia3": ({"kind": "lycoris", "algo": "ia3"}, AVERAGE),
    "full": ({"kind": "lycoris", "algo": "full"}, AVERAGE),
    "norms": ({"kind": "lycoris", "algo": "norms", "layers": ["norm"]}, AVERAGE),
}


def test_every_family_and_network_is_here():
    assert set(FAMILIES) == set(plugins("raylora.families"))
    kinds = {network["kind"] for network, _ in NETWORKS.values()}
    assert kinds == set(plugins("raylora.networks"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def job_of(family: str, store: Path, cache: str, given: dict[str, Any]) -> Job:
    return with_overrides(
        load_job(ROOT / "jobs" / "smoke" / f"{family}.yaml"),
        {
            "family.weights": str(random_folder(family)),
            "store": str(store),
            "data.cache": cache,
            "training.steps": STEPS,
            "training.images_per_step": 2,
            "training.save_every_steps": STEPS // 2,
            "optimizer.learning_rate": 3e-3,
            "schedule.warmup_steps": 0,
            "validation.folder": None,
            "preview.prompts": [],
            "export.naming": "kohya",
            **given,
        },
    )


def training_adapter_of(store: Path, cache: str) -> str:
    """A random LoRA for FLUX.1's denoiser, as a file."""
    job = job_of("flux1", store / "other", cache, {})
    run = open_run(job)
    try:
        adapter = run.parts.adapter
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            adapter.values.copy_(torch.randn(adapter.values.shape, generator=generator) * 0.05)
        assert run.saver is None
        modules = [AdapterModule(name, held) for name, held in adapter.modules().items()]
    finally:
        run.close()
    names = names_of(open_family(job))
    file = store / "beneath.safetensors"
    file.write_bytes(adapter_bytes(laid_out(modules, names, "kohya"), {}, dtype=torch.float32))
    return str(file)


def finished(job: Job) -> tuple[dict[str, Tensor], list[float]]:
    """Train from the newest checkpoint to the end: its state, and the losses of all steps."""
    run = open_run(job, report=True)
    try:
        run_training(run)
    finally:
        run.close()
    storage = open_store(job)
    losses = [row["loss"] for row in read_metrics(storage) if "loss" in row]
    return read_checkpoint(storage, STEPS).tensors, losses


def is_resumed_exactly(job: Job) -> None:
    unbroken, losses = finished(job)
    storage = open_store(job)
    start = read_checkpoint(storage, STEPS // 2).tensors["values"]
    assert not torch.equal(unbroken["values"], start), "the second half moved nothing"
    for entry in storage.entries(f"checkpoints/{STEPS:06d}"):
        storage.delete(entry.key)
    resumed, again = finished(job)
    assert again == losses
    assert len(losses) == STEPS
    assert resumed.keys() == unbroken.keys()
    for name, tensor in unbroken.items():
        assert torch.equal(resumed[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_on_as_if_it_had_not_stopped(family: str, tmp_path: Path, cache: str):
    given = dict(FAMILIES[family])
    if family == "flux1":
        given["family.training_adapter"] = training_adapter_of(tmp_path, cache)
    is_resumed_exactly(job_of(family, tmp_path, cache, given))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_goes_on_as_if_it_had_not_stopped(name: str, tmp_path: Path, cache: str):
    network, more = NETWORKS[name]
    given = {"network": network, "optimizer.text_encoder_rate": None, **more}
    is_resumed_exactly(job_of("sd15", tmp_path, cache, given))
