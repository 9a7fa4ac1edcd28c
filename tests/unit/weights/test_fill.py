from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import originals
import pytest
import torch
from bases import random_folder
from children import Child
from safetensors.torch import save_file
from torch import nn

from raylora.base.errors import WeightsError
from raylora.weights.base import open_base
from raylora.weights.fill import fill
from raylora.weights.source import mapped_tensors

CPU = torch.device("cpu")
LARGE = {
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 10,
    "num_attention_heads": 8,
    "attention_head_dim": 128,
    "joint_attention_dim": 1024,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
"""A FLUX.1 of some 190 million weights."""


class Made(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.register_buffer("place", torch.zeros(4))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))


def empty() -> Made:
    with torch.device("meta"):
        return Made()


def held() -> dict[str, torch.Tensor]:
    return {
        "linear.weight": torch.arange(6.0, dtype=torch.float64).reshape(3, 2),
        "linear.bias": torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64),
        "place": torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64),
        "count": torch.tensor([300]),
    }


def test_weights_and_buffers_are_cast_and_counts_are_not():
    made = fill(empty().requires_grad_(False), held(), dtype=torch.bfloat16, device=CPU)
    assert made.linear.weight.tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    assert torch.equal(made.linear.bias, held()["linear.bias"].bfloat16())
    assert not made.linear.weight.requires_grad
    assert made.place.dtype == torch.bfloat16
    assert made.count.dtype == torch.int64
    assert made.state_dict().keys() == held().keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear.bias": None}, "Made: the weights lack: linear.bias. They are not of this model"),
        ({"more": torch.ones(1)}, "have beyond what its config means: more"),
        ({"place": torch.ones(5)}, "place has shape [5], and its config means [4]"),
    ],
)
def test_what_does_not_fit_is_told_by_name(change: dict[str, torch.Tensor | None], message: str):
    weights = {name: one for name, one in (held() | change).items() if one is not None}
    with pytest.raises(WeightsError, match=re.escape(message)):
        fill(empty(), weights, dtype=torch.float32, device=CPU)


def test_turned_weights_lie_in_order():
    turned = held() | {"linear.weight": held()["linear.weight"].T.contiguous().T}
    made = fill(empty(), turned, dtype=torch.float64, device=CPU)
    assert made.linear.weight.is_contiguous()
    assert torch.equal(made.linear.weight, held()["linear.weight"])


def test_a_filled_model_may_be_changed_and_the_file_stays(tmp_path: Path):
    path = tmp_path / "made.safetensors"
    save_file(held(), path)
    before = path.read_bytes()
    made = fill(
        empty().requires_grad_(False), mapped_tensors(path), dtype=torch.float64, device=CPU
    )
    made.linear.weight += 1.0
    assert made.linear.weight[0].tolist() == [1.0, 2.0]
    assert path.read_bytes() == before


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def _load(path: str, folder: str) -> tuple[int, int]:
    """The model's size and the peak of memory of this process's own while it is loaded."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(**LARGE)
    parts = {one: f"{folder}/{one}" for one in ("vae", "text_encoder", "text_encoder_2")}
    before, peak, ended = _anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            peak[0] = max(peak[0], _anonymous_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    base = open_base(path, kind="flux1", parts=parts)
    fill(model, base.weights("transformer"), dtype=torch.float16, device=CPU)
    ended.set()
    watcher.join()
    size = sum(one.numel() * 2 for one in model.state_dict().values())
    return size, max(peak[0], _anonymous_bytes()) - before


@pytest.mark.slow
def test_a_component_is_loaded_within_its_own_size_and_a_fifth(tmp_path: Path):
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        names = originals.flux(FluxTransformer2DModel(**LARGE).state_dict())
    weights = {
        name: torch.full(one.shape, i / 512, dtype=torch.bfloat16)
        for i, (name, one) in enumerate(names.items())
    }
    save_file(weights, tmp_path / "large.safetensors")
    del weights
    place = str(tmp_path / "large.safetensors")
    size, peak = Child(_load, place, str(random_folder("flux1"))).result()
    assert size > 370e6
    assert 0.95 * size < peak < 1.2 * size
