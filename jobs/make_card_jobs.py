"""Write jobs/<family>_<size>gb.yaml: one ready job for each model family and size of graphics card.

    python jobs/make_card_jobs.py

A test compares the files with what this program makes, and gives each to `raylora check`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SIZES = (8, 12, 16, 24, 48, 80)
LEAST_BESIDES = 2.8
"""GiB beside the frozen weights: what a step of rank 16 with recomputed activations is predicted to
take for FLUX.1 at 1024 pixels."""


@dataclass(frozen=True)
class Card:
    """What one family trains with on one size of card.

    Attributes:
        rank, alpha: of the adapter.
        resolution: side of the square that images have the area of.
        images: a step, over all workers.
        micro: at once on a card.
        again: activations are computed a second time instead of kept.
        optimizer: its lines.
    """

    rank: int
    alpha: float
    resolution: int
    images: int
    micro: int
    again: bool
    optimizer: str


@dataclass(frozen=True)
class Base:
    """What all jobs of a family share.

    Attributes:
        title: how people call it.
        weights: the short name of the base.
        family, extra: further lines of the family's section, and sections of their own.
        need_gib: what the frozen weights take in bfloat16.
        note: what to know of the smaller cards.
    """

    title: str
    weights: str
    need_gib: float
    cards: tuple[Card, ...]
    family: str = ""
    extra: str = ""
    note: str = ""


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
        1.6,
        (
            Card(16, 8, 512, 4, 2, True, ADAMW8),
            Card(32, 16, 512, 4, 4, True, ADAMW8 + PLUS),
            Card(32, 16, 512, 4, 4, False, ADAMW8 + PLUS),
            Card(32, 16, 512, 8, 8, False, ADAMW8 + PLUS),
            Card(64, 32, 512, 16, 16, False, ADAMW8 + PLUS),
            Card(64, 32, 512, 32, 32, False, ADAMW8 + PLUS),
        ),
        extra=MIN_SNR,
    ),
    "sd2": Base(
        "Stable Diffusion 2.1",
        "sd21",
        1.6,
        (
            Card(16, 8, 768, 4, 1, True, ADAMW8),
            Card(32, 16, 768, 4, 2, True, ADAMW8 + PLUS),
            Card(32, 16, 768, 4, 4, True, ADAMW8 + PLUS),
            Card(32, 16, 768, 8, 4, False, ADAMW8 + PLUS),
            Card(64, 32, 768, 16, 8, False, ADAMW8 + PLUS),
            Card(64, 32, 768, 16, 16, False, ADAMW8 + PLUS),
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
        4.8,
        (
            Card(8, 4, 1024, 4, 1, True, ADAFACTOR),
            Card(32, 16, 1024, 4, 1, True, ADAFACTOR + PLUS),
            Card(64, 32, 1024, 4, 2, True, ADAFACTOR + PLUS),
            Card(128, 64, 1024, 4, 4, True, ADAFACTOR + PLUS),
            Card(128, 64, 1024, 8, 4, False, ADAFACTOR + PLUS),
            Card(128, 64, 1024, 16, 8, False, ADAFACTOR + PLUS),
        ),
        extra=MIN_SNR,
    ),
    "sd3": Base(
        "Stable Diffusion 3.5 medium",
        "sd3.5-medium",
        4.7,
        (
            Card(8, 8, 768, 4, 1, True, ADAFACTOR),
            Card(16, 16, 1024, 4, 1, True, ADAMW8),
            Card(32, 32, 1024, 4, 2, True, ADAMW8 + PLUS),
            Card(64, 64, 1024, 4, 4, True, ADAMW8 + PLUS),
            Card(64, 64, 1024, 8, 8, True, ADAMW8 + PLUS),
            Card(128, 128, 1024, 16, 8, False, ADAMW8 + PLUS),
        ),
        note="For 3.5 large set family.weights: sd3.5-large, whose weights take 15 GiB.",
    ),
    "flux1": Base(
        "FLUX.1-dev",
        "flux-dev",
        22.2,
        (
            Card(4, 4, 512, 4, 1, True, ADAMW8),
            Card(8, 8, 512, 4, 1, True, ADAMW8),
            Card(16, 16, 512, 4, 1, True, ADAMW8),
            Card(16, 16, 1024, 4, 1, True, ADAMW8),
            Card(128, 128, 1024, 4, 1, True, ADAMW8 + PLUS),
            Card(128, 128, 1024, 4, 4, True, ADAMW8 + PLUS),
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
    notes = [base.note] if base.note else []
    if base.need_gib + LEAST_BESIDES > size:
        notes += [
            f"The frozen weights take {base.need_gib:g} GiB in bfloat16, and this version keeps",
            f"all of them on the card: on {size} GB it does not fit yet.",
        ]
    told = "".join(f"# {line}\n" for line in notes)
    needs = ' Needs pip install "raylora[bnb]".' if "8bit" in card.optimizer else ""
    return f"""\
# A LoRA for {base.title} on a card of {size} GB. Fill in the lines marked with an arrow, then
#   raylora check jobs/{name}           finds every mistake, prints the steps arithmetic
#   raylora train jobs/{name} --local   trains on one GPU; the same command resumes
# What each option means: docs/training.md.{needs}
# Each of these files is read and checked by the tests; none was run on a GPU yet.
{told}name: my-style                   # <-- the run's folder and the file's name
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

memory:
  gradient_checkpointing: {str(card.again).lower():<7}# less memory, more time, the same numbers
  max_micro_batch: {card.micro:<14}# images at once; out of memory halves it and goes on

export:
  dtype: float16
"""


def main() -> None:
    """Write all of them."""
    for name, text in card_jobs():
        (HERE / name).write_text(text)


if __name__ == "__main__":
    main()
