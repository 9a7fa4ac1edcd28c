"""Texts through several encoders: order, what waits on the host, and what reading takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from true_configs import SD21, SDXL, Configured

from raylora.components import texts
from raylora.components.clip import empty_clip
from raylora.components.lent import Keeps
from raylora.components.t5 import empty_t5
from raylora.components.texts import Prompts, read_batches, reading_bytes
from raylora.memory.tracker import PeakTracker
from raylora.weights.true_configs import true_configs

CPU = torch.device("cpu")
FLUX = true_configs("flux-dev")
CLIP = {"hidden_size": 4, "intermediate_size": 8, "num_attention_heads": 1}


class Two:
    """Two encoders that say lengths of texts, and who was asked when."""

    text_components = ("text_encoder", "text_encoder_2")
    text_bytes = 100

    def __init__(self) -> None:
        self.base = Configured(dict.fromkeys(self.text_components, CLIP))
        self.asked: list[tuple[str, int]] = []

    def tokens(self, captions: Sequence[str]) -> dict[str, NDArray[Any]]:
        ids = np.array([[len(caption)] for caption in captions], np.int64)
        return {"ids": ids, "ids_2": 10 * ids}

    def load_text_encoder(self, component: str, **_: Any) -> nn.Module:
        return nn.Identity()

    def read_text(self, component: str, encoder: nn.Module, tokens: Any) -> dict[str, Tensor]:
        ids = tokens["ids" + component.removeprefix("text_encoder")]
        self.asked.append((component, len(ids)))
        return {"text": encoder(ids.float())}

    def join_texts(self, said: Any, tokens: Any) -> dict[str, Tensor]:
        return {"text": torch.cat([said[one]["text"] for one in self.text_components], dim=1)}


class Lent(Keeps):
    """Notes what is lent and when it is no longer needed."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.events: list[str] = []

    @contextmanager
    def lend(self, component: str, *words: Any, **more: Any) -> Iterator[nn.Module]:
        self.events.append(component)
        with super().lend(component, *words, **more) as model:
            yield model

    def clear(self) -> None:
        self.events.append("clear")


def test_an_encoder_reads_all_batches_that_may_wait_before_the_next_is_lent(monkeypatch: Any):
    family, lender = Two(), Lent()
    batches = [["a", "bb"], ["ccc"], ["dddd", "e"]]
    monkeypatch.setattr(texts, "_HOST_BYTES", 2 * 2 * family.text_bytes)
    found = list(read_batches(family, batches, lender, dtype=torch.float32))
    assert lender.events == ["text_encoder", "text_encoder_2"] * 2
    first, second = family.text_components
    assert family.asked == [
        (first, 2),
        (first, 1),
        (second, 2),
        (second, 1),
        (first, 2),
        (second, 2),
    ]
    assert [one["text"].tolist() for one in found] == [
        [[1, 10], [2, 20]], [[3, 30]], [[4, 40], [1, 10]],
    ]  # fmt: skip


def test_prompts_are_read_once_and_each_alone():
    family, lender = Two(), Lent()
    prompts = Prompts(family, lender, dtype=torch.float32, changing=False)
    prompts.read(["a", "bb", "a"])
    assert lender.events == ["text_encoder", "text_encoder_2", "clear"]
    assert [count for _, count in family.asked] == [1] * 4
    assert prompts.of("bb")["text"].tolist() == [[2, 20]]
    prompts.read(["a"])
    assert len(lender.events) == 3
    assert prompts.of("ccc")["text"].tolist() == [[3, 30]]
    assert lender.events[3:] == ["text_encoder", "text_encoder_2", "clear"]


def test_prompts_of_encoders_that_change_are_read_whenever_they_are_asked_for():
    family, lender = Two(), Lent()
    prompts = Prompts(family, lender, dtype=torch.float32, changing=True)
    prompts.read(["a"])
    assert not family.asked
    for _ in range(2):
        assert prompts.of("a")["text"].tolist() == [[1, 10]]
    assert lender.events == ["text_encoder", "text_encoder_2"] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("configs", "component", "shape"),
    [
        (FLUX, "text_encoder_2", (16, 512)),
        (FLUX, "text_encoder_2", (16, 256)),
        (FLUX, "text_encoder_2", (1, 512)),
        (FLUX, "text_encoder", (16, 77)),
        (SD21, "text_encoder", (16, 77)),
        (SDXL, "text_encoder_2", (16, 77)),
        (SDXL, "text_encoder_2", (16, 3, 77)),
    ],
)
def test_what_reading_takes_is_no_less_than_what_its_operations_hold(
    configs: Any, component: str, shape: tuple[int, ...]
):
    base = Configured(configs)
    t5 = "d_model" in configs[component]
    model: Any = empty_t5(base, component) if t5 else empty_clip(base, component)
    ids = torch.empty(shape, dtype=torch.int64, device="meta").view(-1, shape[-1])
    with torch.no_grad(), PeakTracker() as tracker:
        tracker.begin()
        said = model(input_ids=ids, **({} if t5 else {"output_hidden_states": True}))
    del said
    foreseen = reading_bytes(configs[component], shape, 4)
    assert 0.6 * foreseen < tracker.peak_bytes <= foreseen
