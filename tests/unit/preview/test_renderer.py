"""One preview: its starting noise belongs to (seed, prompt number) alone."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from raylora.base.seeds import draw_normal
from raylora.preview.options import PreviewOptions
from raylora.preview.renderer import draw_preview, png_bytes

FAMILY: Any = SimpleNamespace(latent_channels=4, pixels_per_latent=8)


class Records:
    def __init__(self) -> None:
        self.given: list[dict[str, Any]] = []

    def render(self, prompt: str, **given: Any) -> np.ndarray:
        self.given.append({"prompt": prompt, **given})
        return np.zeros((1, 1, 3), np.uint8)


def drawn(options: PreviewOptions, *, number: int = 0, prompt: str = "a cat") -> dict[str, Any]:
    records = Records()
    draw_preview(records, FAMILY, options, prompt, number=number)
    return records.given[0]


def test_the_renderer_is_told_the_options():
    options = PreviewOptions(width=96, height=64, steps=7, guidance=2.5, negative="red", seed=3)
    given = drawn(options, number=2)
    assert given.pop("latents").shape == (1, 4, 8, 12)
    assert given == {"prompt": "a cat", "negative": "red", "steps": 7, "guidance": 2.5}


def test_noise_follows_seed_and_number_and_nothing_else():
    small = {"width": 64, "height": 64}
    first = drawn(PreviewOptions(seed=3, **small), number=1)["latents"]
    same = drawn(PreviewOptions(seed=3, steps=50, **small), number=1, prompt="a dog")["latents"]
    assert torch.equal(first, same)
    assert not torch.equal(first, drawn(PreviewOptions(seed=4, **small), number=1)["latents"])
    assert not torch.equal(first, drawn(PreviewOptions(seed=3, **small), number=2)["latents"])
    training = draw_normal((4, 8, 8), seed=3, step=0, sample=1, purpose="noise")
    assert not torch.equal(first[0], torch.from_numpy(training))


def test_a_png_holds_the_same_pixels():
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png_bytes(picture)))), picture)
