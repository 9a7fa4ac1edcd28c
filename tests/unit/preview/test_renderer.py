"""One preview: its starting noise belongs to (seed, prompt number) alone."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raylora.base.seeds import draw_normal
from raylora.preview.options import PictureSettings, PreviewOptions, Usual
from raylora.preview.renderer import draw_preview, png_bytes

FAMILY: Any = SimpleNamespace(latent_channels=4, pixels_per_latent=8)
PROCESS: Any = object()
USUAL = Usual(steps=9, guidance=4.5, sampler="euler", width=32, height=64)


class Records:
    """In a renderer's place: remembers what it was given, and how strong the adapter was."""

    def __init__(self, adapter: Any = None) -> None:
        self.given: list[dict[str, Any]] = []
        self.strengths: list[float] = []
        self.adapter = adapter

    def render(self, prompt: str, **given: Any) -> np.ndarray:
        self.given.append({"prompt": prompt, **given})
        if self.adapter:
            self.strengths.append(self.adapter.strength)
        if prompt == "too large":
            raise torch.OutOfMemoryError("the card is full")
        return np.zeros((1, 1, 3), np.uint8)


def settings(prompt: str = "a cat", *, number: int = 0, **words: Any) -> PictureSettings:
    prompts = ("another",) * number + (prompt,)
    return PreviewOptions(prompts=prompts, **words).with_usual(USUAL).pictures()[number]


def drawn(prompt: str = "a cat", *, number: int = 0, **words: Any) -> dict[str, Any]:
    records = Records()
    given = settings(prompt, number=number, **words)
    draw_preview(records, FAMILY, given, process=PROCESS)
    return records.given[0]


def test_the_renderer_is_told_the_options():
    given = drawn(
        number=2, width=96, height=64, steps=7, guidance=2.5, negative="red", sampler="heun"
    )
    assert given.pop("latents").shape == given.pop("noise")(1).shape == (1, 4, 8, 12)
    assert given.pop("process") is PROCESS
    assert given == {
        "prompt": "a cat",
        "negative": "red",
        "steps": 7,
        "guidance": 2.5,
        "sampler": "heun",
        "embedded_guidance": None,
    }


def test_what_a_job_leaves_open_is_the_familys_usual():
    given = drawn()
    assert given["latents"].shape == (1, 4, 8, 4)
    assert [given[word] for word in ("steps", "guidance", "sampler")] == [9, 4.5, "euler"]
    dev = USUAL._replace(embedded_guidance=3.5)
    for said, expected in ((None, 3.5), (2.0, 2.0)):
        (picture,) = (
            PreviewOptions(prompts=("a",), embedded_guidance=said).with_usual(dev).pictures()
        )
        records = Records()
        draw_preview(records, FAMILY, picture, process=PROCESS)
        assert records.given[0]["embedded_guidance"] == expected


def test_noise_follows_seed_and_number_and_nothing_else():
    small = {"width": 64, "height": 64}
    first = drawn(seed=3, number=1, **small)["latents"]
    same = drawn("a dog", seed=3, steps=50, sampler="euler_a", number=1, **small)["latents"]
    assert torch.equal(first, same)
    assert not torch.equal(first, drawn(seed=4, number=1, **small)["latents"])
    assert not torch.equal(first, drawn(seed=3, number=2, **small)["latents"])
    training = draw_normal((4, 8, 8), seed=3, step=0, sample=1, purpose="noise")
    assert not torch.equal(first[0], torch.from_numpy(training))


def test_what_a_sampler_adds_is_of_the_same_seed_and_number_and_never_twice_the_same():
    small = {"width": 64, "height": 64}
    given = drawn(seed=3, number=1, **small)
    draws = [given["latents"], *(given["noise"](k) for k in (1, 2))]
    assert not any(torch.equal(draws[i], draws[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    again = drawn("a dog", seed=3, number=1, **small)["noise"]
    assert torch.equal(draws[2], again(2))
    assert not torch.equal(draws[2], drawn(seed=3, number=2, **small)["noise"](2))


def test_the_adapter_has_the_pictures_strength_only_while_it_is_drawn():
    adapter: Any = SimpleNamespace(strength=0.9)
    records = Records(adapter)
    for strength in (0.5, 0.0, -1.0):
        given = settings(strengths=[strength])
        draw_preview(records, FAMILY, given, process=PROCESS, adapter=adapter)
        assert adapter.strength == 0.9
    assert records.strengths == [0.5, 0.0, -1.0]


def test_an_error_does_not_leave_the_adapter_at_the_pictures_strength():
    adapter: Any = SimpleNamespace(strength=0.9)
    given = settings("too large", strengths=[0.5])
    with pytest.raises(torch.OutOfMemoryError):
        draw_preview(Records(adapter), FAMILY, given, process=PROCESS, adapter=adapter)
    assert adapter.strength == 0.9


def test_a_png_holds_the_same_pixels():
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png_bytes(picture)))), picture)
