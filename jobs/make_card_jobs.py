"""Write jobs/<family>_<size>gb.yaml: one ready job for each model family and size of graphics card.

    python jobs/make_card_jobs.py

What a file says of its card is what the planner chooses for it. A test compares the files with what
this program makes, and gives each to `raylora check`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from raylora.base.units import GIB
from raylora.forecast import Length, cards_of, planned, precision_words, setting_words
from raylora.job import job_from
from raylora.memory.cards import HOST_GIB

HERE = Path(__file__).parent
SIZES = (8, 12, 16, 24, 48, 80)
PLANNED_FOR = {
    8: "RTX3070",
    12: "RTX3060-12G",
    16: "RTX4080",
    24: "RTX4090",
    48: "A6000",
    80: "A100-80G",
}
"""The card of each size that a file's first lines speak of."""


@dataclass(frozen=True)
class Card:
    """What one family trains with on one size of card.

    Attributes:
        rank, alpha: of the adapter.
        resolution: side of the square that images have the area of.
        images: a step, over all workers.
        optimizer: its lines.
    """

    rank: int
    alpha: float
    resolution: int
    images: int
    optimizer: str


@dataclass(frozen=True)
class Base:
    """What all jobs of a family share.

    Attributes:
        title: how people call it.
        weights: the short name of the base.
        family, extra: further lines of the family's section, and sections of their own.
        note: what else to know, lines of it.
    """

    title: str
    weights: str
    cards: tuple[Card, ...]
    family: str = ""
    extra: str = ""
    note: tuple[str, ...] = ()


ADAMW8 = """\
  name: AdamW8bit                # adamw with its state in a quarter of the memory
  learning_rate: 1.0e-4
"""
PLUS = "  lora_plus_ratio: 16            # LoRA+: the half that starts at zero moves faster\n"
ADAFACTOR = """\
  name: Adafactor                # keeps rows and columns of its state in place of all of it
  learning_rate: 1.0e-4
  args: {relative_step: false, scale_parameter: false, warmup_init: false}
  max_grad_norm: 0               # Adafactor cuts its steps itself
"""
MIN_SNR = """
loss:
  weight:
    name: min_snr                # nearly clean samples stop dominating
    gamma: 5
"""

BASES = {
    "sd15": Base(
        "Stable Diffusion 1.5",
        "sd15",
        (
            Card(16, 8, 512, 4, ADAMW8),
            Card(32, 16, 512, 4, ADAMW8 + PLUS),
            Card(32, 16, 512, 4, ADAMW8 + PLUS),
            Card(32, 16, 512, 8, ADAMW8 + PLUS),
            Card(64, 32, 512, 16, ADAMW8 + PLUS),
            Card(64, 32, 512, 32, ADAMW8 + PLUS),
        ),
        extra=MIN_SNR,
    ),
    "sd2": Base(
        "Stable Diffusion 2.1",
        "sd21",
        (
            Card(16, 8, 768, 4, ADAMW8),
            Card(32, 16, 768, 4, ADAMW8 + PLUS),
            Card(32, 16, 768, 4, ADAMW8 + PLUS),
            Card(32, 16, 768, 8, ADAMW8 + PLUS),
            Card(64, 32, 768, 16, ADAMW8 + PLUS),
            Card(64, 32, 768, 16, ADAMW8 + PLUS),
        ),
        extra=MIN_SNR
        + """
noise:
  zero_terminal_snr: true        # it predicts v, so that the last timestep may be pure noise
""",
    ),
    "sdxl": Base(
        "SDXL 1.0",
        "sdxl",
        (
            Card(8, 4, 1024, 4, ADAFACTOR),
            Card(32, 16, 1024, 4, ADAFACTOR + PLUS),
            Card(64, 32, 1024, 4, ADAFACTOR + PLUS),
            Card(128, 64, 1024, 4, ADAFACTOR + PLUS),
            Card(128, 64, 1024, 8, ADAFACTOR + PLUS),
            Card(128, 64, 1024, 16, ADAFACTOR + PLUS),
        ),
        extra=MIN_SNR,
    ),
    "sd3": Base(
        "Stable Diffusion 3.5 medium",
        "sd3.5-medium",
        (
            Card(8, 8, 768, 4, ADAFACTOR),
            Card(16, 16, 1024, 4, ADAMW8),
            Card(32, 32, 1024, 4, ADAMW8 + PLUS),
            Card(64, 64, 1024, 4, ADAMW8 + PLUS),
            Card(64, 64, 1024, 8, ADAMW8 + PLUS),
            Card(128, 128, 1024, 16, ADAMW8 + PLUS),
        ),
        note=("For 3.5 large set family.weights: sd3.5-large.",),
    ),
    "flux1": Base(
        "FLUX.1-dev",
        "flux-dev",
        (
            Card(4, 4, 512, 4, ADAMW8),
            Card(8, 8, 512, 4, ADAMW8),
            Card(16, 16, 512, 4, ADAMW8),
            Card(16, 16, 1024, 4, ADAMW8),
            Card(128, 128, 1024, 4, ADAMW8 + PLUS),
            Card(128, 128, 1024, 4, ADAMW8 + PLUS),
        ),
    ),
}


def card_jobs() -> Iterator[tuple[str, str]]:
    """Name and text of every file."""
    for kind, base in BASES.items():
        for size, card in zip(SIZES, base.cards, strict=True):
            yield f"{kind}_{size}gb.yaml", job_text(kind, base, size, card)


def job_text(kind: str, base: Base, size: int, card: Card) -> str:
    """One job file."""
    name = f"{kind}_{size}gb.yaml"
    body = _body(kind, base, card)
    needs = ' Needs pip install "raylora[bnb]".' if "8bit" in card.optimizer else ""
    told = "".join(f"# {line}\n" for line in (*_planned_lines(body, size, card), *base.note))
    return f"""\
# A LoRA for {base.title} on a card of {size} GB. Fill in the lines marked with an arrow, then
#   raylora check jobs/{name}           finds every mistake, prints the steps arithmetic
#   raylora plan jobs/{name} --gpu {PLANNED_FOR[size]}   what it holds, how fast, at what price
#   raylora train jobs/{name} --local   trains on one GPU; the same command resumes
# What each option means: docs/training.md; how it is made to fit: docs/memory.md.{needs}
# Each of these files is read and checked by the tests; none was run on a GPU yet.
{told}{body}"""


def _planned_lines(body: str, size: int, card: Card) -> list[str]:
    """What the planner chooses for a card of this size, in comment lines."""
    job = job_from(yaml.safe_load(body))
    length = Length((card.resolution, card.resolution), None, None)
    name = PLANNED_FOR[size]
    made = planned(job, cards_of(job, name), length, {}, each=True)
    assert not made["problem"], made["problem"]
    worker = made["workers"][0]
    peak, usable = max(worker["peaks"].values()) / GIB, worker["usable_bytes"] / GIB
    said = (
        f"Predicted for {name} with {HOST_GIB:g} GiB of host memory free, not measured: "
        f"{precision_words(made['precision'])}; {setting_words(worker['setting'])}; "
        f"{worker['micro_batch']} at once; peak {peak:.1f} of {usable:.1f} GiB usable; "
        f"{worker['seconds_per_step']:.2g} s a step."
    )
    return textwrap.wrap(said, 96)


def _body(kind: str, base: Base, card: Card) -> str:
    """The file without its first lines."""
    return f"""\
name: my-style                   # <-- the run's folder and the file's name
store: results                   # <-- a folder, or s3://bucket/prefix

family:
  kind: {kind}
  weights: {base.weights:<22} # <-- or a folder, a .safetensors checkpoint, s3://…, owner/name
{base.family}
network:
  kind: lora
  rank: {card.rank}
  alpha: {card.alpha:g}

optimizer:
{card.optimizer}
schedule:
  name: cosine
  warmup_steps: 0.05             # below 1: a share of the run
{base.extra}
data:
  folder: images/my-style        # <-- pictures with a .txt caption beside each
  resolution: {card.resolution:<19}# the area; each image keeps about its own shape
  validation_split: 0.1          # one image in ten is held out and never trained on

training:
  epochs: 10
  images_per_step: {card.images:<14}# over all workers, however many there are
  seed: 1
  precision: bf16                # on GPUs older than Ampere (T4, V100): fp16
  save_every_epochs: 1
  keep_last: 3

validation:
  every_epochs: 1

preview:
  every_epochs: 1
  width: {card.resolution}
  height: {card.resolution}
  prompts:                       # <-- as your captions are written
    - my-style, a lighthouse by the sea

memory:                          # each worker takes what is fastest of what fits its card
  base: auto                     # or full, int8, fp8, nf4: one choice for the whole run
  checkpointing: auto
  streaming: auto

export:
  dtype: float16
"""


def main() -> None:
    """Write all of them."""
    for name, text in card_jobs():
        (HERE / name).write_text(text)


if __name__ == "__main__":
    main()
