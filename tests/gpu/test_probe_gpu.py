"""Probing a GPU."""

from __future__ import annotations

import time

import pytest
import torch

from raylora.base.units import GIB
from raylora.memory.options import MemoryOptions
from raylora.memory.probe import probe, probe_links

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_a_gpu_is_probed_in_about_half_a_second_and_nothing_stays_behind() -> None:
    device = torch.device("cuda", 0)
    probe(device, options=MemoryOptions())  # whatever is loaded once
    held = torch.cuda.memory_allocated(device)
    began = time.perf_counter()
    card = probe(device, options=MemoryOptions())
    assert time.perf_counter() - began < 1.0
    assert torch.cuda.memory_allocated(device) == held
    assert card.free_bytes is not None
    assert 0 < card.free_bytes <= card.total_bytes
    assert card.capability == torch.cuda.get_device_capability(device)
    # From a laptop's four lanes of PCIe 3 to links within a package.
    assert 1 < card.to_device_gbs < 1000
    assert 1 < card.to_host_gbs < 1000
    assert card.half_tflops > card.float_tflops > 1
    assert card.bandwidth_gbs > 50


def test_what_another_holds_is_not_free() -> None:
    device = torch.device("cuda", 0)
    before = probe(device, options=MemoryOptions()).free_bytes
    other = torch.empty(GIB, dtype=torch.uint8, device=device)
    after = probe(device, options=MemoryOptions()).free_bytes
    assert before is not None
    assert after is not None
    assert before - after == pytest.approx(len(other), rel=0.1)


def test_every_gpu_is_counted() -> None:
    assert probe_links().devices == torch.cuda.device_count()
