"""Write docs/memory.md: how a job is made to fit, and which card runs what.

    python docs/make_memory_page.py

Every number that is called predicted comes from the planner and its table of true sizes; measured
ones are read from `benchmarks/results/gpu-*.json`, where such files are. A test compares the page
with what this program makes.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from raylora.base.units import GIB
from raylora.forecast import Length, cards_of, planned, precision_words, setting_words
from raylora.job import Job, job_from
from raylora.measure import need_of_job, planning_family
from raylora.memory.card import Card
from raylora.memory.cards import HOST_GIB, KNOWN, PCIE_GBS
from raylora.memory.prices import priced, read_prices
from raylora.weights.short_names import SHORT_NAMES

PAGE = Path(__file__).parent / "memory.md"
RESULTS = PAGE.parents[1] / "benchmarks" / "results"

BASES = {
    "sd15": "Stable Diffusion 1.5",
    "sd21": "Stable Diffusion 2.1",
    "sdxl": "SDXL 1.0",
    "sd3.5-medium": "Stable Diffusion 3.5 medium",
    "flux-dev": "FLUX.1-dev",
}
SIZES = (512, 1024)
CARDS = (
    *("RTX3070", "RTX3060-12G", "RTX4070", "RTX4080", "RTX4090", "A6000"),
    *("T4", "V100-16G", "V100-32G", "A100-40G", "A100-80G", "H100"),
)
RANK = 16

INTRODUCTION = """\
# Memory: how a job is made to fit, and which card runs what

Made from the planner by `docs/make_memory_page.py`; change it there, not here.

A job does not say how it fits a card. Each worker looks at its own card when the run begins, takes
the fastest set of strategies with which everything fits, and says so. `raylora plan` tells the same
beforehand, for cards that need not be there:

```
raylora plan jobs/sdxl_12gb.yaml --gpu RTX3060-12G
raylora plan jobs/flux1_24gb.yaml --gpu RTX3060-12G,RTX4090,2xA100-80G
raylora plan jobs/flux1_24gb.yaml --gpu RTX3060-12G,RTX4090,A6000 --each
```

Cards of one list are one fleet: one precision, and a part of every step for each. With `--each`
every card is planned by itself. `--host-gib` says how much host memory is free beside each card,
`--prices` brings your own prices, `--json` prints all of it as one document, and
`raylora.plan(job, gpus)` returns that document in Python. Without `--gpu` the kinds that
`fleet.workers` names are taken, else this machine's own cards. `--measure` takes two real steps on
this machine and shows them beside what was predicted.

- [How a plan is made](#how-a-plan-is-made)
- [The strategies](#the-strategies)
- [The guides' ladder](#the-guides-ladder)
- [Measured on GPUs](#measured-on-gpus)
- [Which card runs what](#which-card-runs-what)
- [The cards](#the-cards)
"""

HOW = """\
## How a plan is made

1. **What a step needs.** The real training step runs on models of true size whose tensors have
   shapes and no memory, and every storage is followed from its birth to its death: the most that
   lives at once is the step's peak. That needs the base's configs, no weights and no GPU. The usual
   bases at the usual sizes are in a table that comes with raylora; others take some seconds, once.
   The rank, the optimizer and the number of images enter by arithmetic.
2. **What a card has.** On the machine: memory that is free (a monitor takes its part), host memory,
   and copies and products, which are timed for about half a second. By name: the figures
   [below](#the-cards). `memory.reserve_gib` stays free, for what no prediction knows.
3. **Precision first, for all.** How the base is held (in full, int8, fp8, nf4) and in how many bits
   the optimizer keeps its states changes what is learned, so it is one choice for the whole run and
   every worker. The best with which every worker fits is taken. `memory.max_slowdown` says how many
   times slower it may be than the next.
4. **Then the fastest setting, for each.** Within that precision every worker takes what is fastest
   of what fits in all phases: encoding, training, validating, saving, previews. None of these
   strategies changes what is learned; at most they add or round in another order, as the table
   below says. Cards of one fleet may differ in all of them.
5. **Then it is measured.** Before the first step the gradients of two steps at the largest bucket
   are computed and dropped, the peak is compared with the prediction, and the setting is corrected,
   up or down. What it comes to is kept in `<store>/plans/` for the next run of this shape. When
   memory runs out in spite of it, the worker steps down one such strategy, does the step again, and
   goes on; never to a lower precision ([what happens when](operations.md#when-memory-runs-out)).

Seconds are predicted from what is computed, what is moved and how often work is started, each by
the card's figures, and are off by more than bytes are: see [what was measured](#measured-on-gpus).
Dollars come from `raylora/memory/prices.yaml`: list prices of RunPod with their dates, to be
edited. Where no dated price was found the cost is not known.
"""


class Strategy(NamedTuple):
    """One thing that a worker may do to fit.

    Attributes:
        options: of the job that fix it.
        does: what happens.
        costs: what it takes.
        numbers: whether what is computed stays the same.
    """

    title: str
    options: tuple[str, ...]
    does: str
    costs: str
    numbers: str


SAME = "the same"
STRATEGIES = (
    Strategy(
        "compute again",
        ("memory.checkpointing",),
        "Blocks keep their input alone, and are computed again for their gradients: all of them, "
        "every second, or only their feed-forward parts.",
        "up to one more forward pass: half as long again, since a LoRA's step is two",
        SAME,
    ),
    Strategy(
        "stream",
        ("memory.streaming",),
        "A share of the denoiser's blocks lies in host memory, packed; two places on the device "
        "take turns while the next block comes. Nothing is copied back. One copy serves all cards "
        "of a machine.",
        "nothing where copies hide behind products, else their time",
        SAME,
    ),
    Strategy(
        "offload inputs",
        ("memory.offload_inputs",),
        "What blocks that are computed again were given waits in host memory.",
        "copies, mostly hidden",
        SAME,
    ),
    Strategy(
        "fewer at once",
        ("memory.max_micro_batch",),
        "The images of a step go through a few at a time, and their gradients are added.",
        "starting work more often",
        "the same but for rounding; with `training.sums: exact` the same",
    ),
    Strategy(
        "states on the host",
        ("memory.host_states",),
        "The optimizer's states lie and move in host memory. `auto` does so only where nothing "
        "else fits.",
        "copies of gradients and adapter",
        "the same but for rounding",
    ),
    Strategy(
        "fused backward",
        ("memory.fused_backward", "memory.fused_groups"),
        "A layer's adapter, or that of a group of layers, moves as soon as its gradient is there, "
        "and the gradient is dropped. One worker, one micro-batch, no clipping. Only where the job "
        "asks for it.",
        "a snapshot of the adapter",
        SAME,
    ),
    Strategy(
        "base in fewer bits",
        ("memory.base",),
        "The frozen linears are held in 8 bits (int8, fp8) or 4 (nf4), and brought back for each "
        "product.",
        "bringing back",
        "others, a little",
    ),
    Strategy(
        "states in 8 bits",
        ("memory.states",),
        "adamw and lion keep their states in 8 bits a number.",
        "little",
        "others, a little",
    ),
    Strategy(
        "encode first",
        ("data.cache",),
        "Captions and pictures are encoded before training, one encoder at a time, which then "
        "leaves.",
        "nothing",
        SAME,
    ),
    Strategy(
        "tiles",
        ("memory.vae_tiling",),
        "Previews are decoded in tiles.",
        "little",
        "of pictures alone",
    ),
    Strategy(
        "replay",
        ("memory.cuda_graphs",),
        "A micro-batch's work is recorded once a bucket and started as one from then on. Needs "
        "cached captions, no dropout and nothing offloaded.",
        "nothing: steps are faster where the card waits to be told what to do",
        "the same but for rounding, where a library chooses other kernels for a recording",
    ),
    Strategy(
        "kernel",
        ("memory.attention",),
        "Which of torch's kernels computes attention. Only where the job asks for it.",
        "-",
        "the same but for rounding",
    ),
    Strategy(
        "compile",
        ("memory.compile",),
        "The blocks are compiled, one graph a bucket. Only where the job asks for it.",
        "a minute or more at the start",
        "the same but for rounding",
    ),
)


class Rung(NamedTuple):
    """A row of the guides' ladder.

    Attributes:
        title: what it is called.
        precision: of the arithmetic.
        memory: the section of the job.
    """

    title: str
    precision: str
    memory: dict[str, Any]


_PLAIN: dict[str, Any] = {
    "base": "full",
    "states": "full",
    "checkpointing": "none",
    "streaming": 0,
    "offload_inputs": False,
    "host_states": False,
    "max_micro_batch": 1,
}
_FUSED = {**_PLAIN, "fused_backward": True}
_AGAIN = {**_PLAIN, "checkpointing": "all"}
_LEAST = {**_AGAIN, "streaming": 1, "offload_inputs": True}
LADDER = (
    Rung("standard, fp32", "fp32", _PLAIN),
    Rung("fused backward, fp32", "fp32", _FUSED),
    Rung("standard, bf16", "bf16", _PLAIN),
    Rung("fused backward + bf16", "bf16", _FUSED),
    Rung("optimizer groups (8) + bf16", "bf16", {**_PLAIN, "fused_groups": 8}),
    Rung("bf16, all blocks computed again", "bf16", _AGAIN),
    Rung("quantised, int8, computed again", "bf16", {**_AGAIN, "base": "int8"}),
    Rung("quantised, nf4, computed again", "bf16", {**_AGAIN, "base": "nf4"}),
    Rung("bf16, 90 % streamed", "bf16", {**_AGAIN, "streaming": 0.9}),
    Rung("bf16, all streamed, inputs offloaded", "bf16", _LEAST),
    Rung("int8, all streamed, inputs offloaded", "bf16", {**_LEAST, "base": "int8"}),
)
LADDER_BASES = (("sd15", 512), ("sdxl", 1024), ("flux-dev", 512), ("flux-dev", 1024))

GUIDES = """\
Guides promise that SDXL LoRA falls from about 24 GB to 17 by `--fused_backward_pass`, to 10 with
bfloat16, and further by `--fused_optimizer_groups`. Those figures are of **full fine-tuning** of
the UNet, where gradients are as large as the model: they were measured in the pull request that
brought fusing to `sdxl_train.py` (kohya-ss/sd-scripts #1259). sd-scripts' LoRA programs read
`--fused_backward_pass` and never use it, and do not know `--fused_optimizer_groups`. All gradients
of a LoRA of rank 16 are a few hundred MB at most, so there is little to free. What a LoRA's memory
goes to is the frozen base and the activations, and those are what computing again, streaming and
fewer bits take away: the later rows of this table.
"""

SAVES = """\
### What fused backward saves with a LoRA

raylora's own `memory.fused_backward` drops each gradient as soon as its layer has moved. It can
save at most the gradients, 4 bytes a trained number, and less where the step is fullest early in
the backward pass. So it is for ranks of 64 and more:
"""


def memory_page() -> str:
    """The whole page."""
    lines = [INTRODUCTION, HOW, *_strategies(), "", *_ladder()]
    lines += ["", *_saves(), "", *_measured(), *_runs(), "", *_cards(), ""]
    return "\n".join(lines)


def _job(
    word: str,
    side: int,
    *,
    precision: str = "bf16",
    rank: int = RANK,
    memory: Mapping[str, Any] | None = None,
) -> Job:
    """One image a step, as others measure it."""
    fused = bool(memory) and ("fused_backward" in memory or "fused_groups" in memory)
    return job_from(
        {
            "name": "plan",
            "family": {"kind": SHORT_NAMES[word].kind, "weights": word},
            "network": {"kind": "lora", "rank": rank},
            "optimizer": {"name": "adamw", **({"max_grad_norm": 0} if fused else {})},
            "data": {"folder": "images", "resolution": side},
            "training": {"steps": 1000, "images_per_step": 1, "precision": precision},
            "memory": dict(memory or {}),
        }
    )


def _plan(job: Job, card: Card, side: int) -> dict[str, Any]:
    prices = read_prices()
    length = Length((side, side), job.training.steps, None)
    return planned(job, priced([card], prices), length, prices, each=True)


def _text(paragraph: str) -> str:
    return textwrap.fill(paragraph, 100, break_on_hyphens=False, break_long_words=False)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _strategies() -> Iterator[str]:
    yield "## The strategies"
    yield ""
    rows = [
        (one.title, ", ".join(f"`{name}`" for name in one.options), *one[2:]) for one in STRATEGIES
    ]
    yield from _table(("strategy", "option", "what it does", "costs", "numbers"), rows)
    yield ""
    yield "`auto` leaves a strategy to the planner; a word fixes it on every worker."


def _ladder() -> Iterator[str]:
    """Peaks on a card that is large enough for each of them."""
    yield "## The guides' ladder"
    yield ""
    yield GUIDES
    yield _text(
        f"Predicted GiB of a training step, not measured: LoRA of rank {RANK} on the usual layers, "
        "AdamW in 32 bits, one image, latents and captions cached; without what driver and kernels "
        "take for themselves. With fusing the planner counts no gradients at all, so those rows "
        "are the least that fusing could come to."
    )
    yield ""
    endless = Card("endless", 2000 * GIB, None, 2000 * GIB, (9, 0), 989, 67, 3350, 50, 50)
    rows = []
    for rung in LADDER:
        cells = []
        for word, side in LADDER_BASES:
            job = _job(word, side, precision=rung.precision, memory=rung.memory)
            made = _plan(job, endless, side)
            assert not made["problem"], made["problem"]
            cells.append(f"{made['workers'][0]['peaks']['train'] / GIB:.2f}")
        rows.append((rung.title, *cells))
    yield from _table(("setting", *(f"{BASES[w]}, {side} px" for w, side in LADDER_BASES)), rows)


def _saves() -> Iterator[str]:
    yield SAVES
    rows = []
    for rank in (16, 64, 128):
        cells = []
        for word in ("sd15", "sdxl", "flux-dev"):
            job = _job(word, 512, rank=rank)
            numbers = need_of_job(job, planning_family(job), (512, 512)).adapter_numbers
            cells.append(f"{numbers / 1e6:.1f} M, {4 * numbers / GIB:.2f} GiB")
        rows.append((str(rank), *cells))
    head = ("rank", *(f"{BASES[word]}" for word in ("sd15", "sdxl", "flux-dev")))
    yield from _table(head, rows)
    yield ""
    yield "Trained numbers, and their gradients in float32: the most that fusing can save."


def _measured() -> Iterator[str]:
    """What was measured on GPUs, where a file of results is."""
    files = sorted(RESULTS.glob("gpu-*.json"))
    if files:
        yield "## Measured on GPUs"
        yield ""
    for file in files:
        held = json.loads(file.read_text())
        card = held["machine"]["gpu"]["name"]
        yield f"### {card}"
        yield ""
        yield _text(
            f"By `benchmarks/gpu.py` on {held['machine']['date']}, with random weights of true "
            "size: the median of a step's seconds, and the most that torch had allocated; beside "
            "each what the planner says of it. All of it is in "
            f"[{file.stem}](../benchmarks/results/{file.stem}.md). A case names the base and its "
            "size, how the base is held, what is computed again, the share that is streamed, "
            "whether the steps were replayed as CUDA graphs, and the images together (`b1` is one)."
        )
        yield ""
        yield _text(_apart(held["rows"]))
        yield ""
        rows = [_measured_row(row) for row in held["rows"]]
        yield from _table(("case", "s/step", "predicted", "peak GiB", "predicted"), rows)
        yield ""
        for why, cases in _left_out(held["rows"]).items():
            yield _text(f"Seconds left out, of {', '.join(cases)}: {why}.")
            yield ""


def _why_left_out(row: Mapping[str, Any]) -> str:
    """Why a row's seconds are not to be trusted; empty: they are."""
    return str(row.get("note", "")) or ("" if row["finite"] else "its loss was not finite")


def _left_out(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in rows:
        if "problem" not in row and (why := _why_left_out(row)):
            found.setdefault(why, []).append(row["case"])
    return found


def _apart(rows: Sequence[Mapping[str, Any]]) -> str:
    """How far predictions lie from what was measured, at most."""
    good = [row for row in rows if "problem" not in row]
    timed = [row for row in good if not _why_left_out(row)]

    def most(of: Sequence[Mapping[str, Any]], word: str) -> str:
        off = max(abs(row[f"predicted_{word}"] / row[word] - 1) for row in of)
        return f"{off:.0%}".replace("%", " %")

    said = [f"Predicted peaks are off by {most(good, 'peak_gib')} at most"]
    for graphed, title in ((True, "replayed"), (False, "not replayed")):
        if of := [row for row in timed if row["graphed"] is graphed]:
            said.append(f"seconds of steps that are {title} by {most(of, 'seconds')}")
    return (
        ", ".join(said) + ". What the planner takes a card to reach of its figures was fitted to "
        "such steps; that other cards reach the same shares is assumed."
    )


def _measured_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    if "problem" in row:
        return (row["case"], row["problem"], "", "", "")
    return (
        row["case"],
        "" if _why_left_out(row) else f"{row['seconds']:.3f}",
        f"{row['predicted_seconds']:.3f}",
        f"{row['peak_gib']:.2f}",
        f"{row['predicted_peak_gib']:.2f}",
    )


def _runs() -> Iterator[str]:
    yield "## Which card runs what"
    yield ""
    yield _text(
        f"What the planner chooses for a LoRA of rank {RANK}, AdamW, one image a step, with "
        f"{HOST_GIB:g} GiB of host memory free beside the card. **All of it is predicted, none of "
        "it measured.** Peak and usable are GiB of device memory in the fullest phase of a run; "
        "cards without bfloat16 are planned with `training.precision: fp16`. $ is for 1,000 steps "
        "at the prices of `raylora/memory/prices.yaml`."
    )
    yield ""
    yield _text(_with_less_host_memory())
    for word, title in BASES.items():
        for side in SIZES:
            yield ""
            yield f"### {title} at {side} px"
            yield ""
            rows = [_run_row(word, side, name) for name in CARDS]
            yield from _table(("card", "setting", "peak", "usable", "s/step", "$"), rows)


def _with_less_host_memory() -> str:
    """Which of these do not fit with half as much of it."""
    half = HOST_GIB / 2
    found = []
    for word, title in BASES.items():
        cards = []
        for name in CARDS:
            jobs = ((_job(word, side), side) for side in SIZES)
            plans = (_plan(job, cards_of(job, name, host_gib=half)[0], side) for job, side in jobs)
            if any(made["problem"] for made in plans):
                cards.append(name)
        if cards:
            found.append(f"{title} on {', '.join(cards)}")
    assert found, "say so instead"
    return (
        f"With {half:g} GiB of host memory free these do not fit: {'; '.join(found)}. T5 is "
        "streamed there while captions are encoded, and has no room to come from."
    )


def _run_row(word: str, side: int, name: str) -> tuple[str, ...]:
    job = _job(word, side)
    made = _plan(job, cards_of(job, name)[0], side)
    if made["problem"]:
        return (name, f"does not fit: {made['problem']}", "", "", "", "")
    worker = made["workers"][0]
    cost = worker["dollars_per_1000_steps"]
    return (
        name,
        f"{precision_words(made['precision'])}; {setting_words(worker['setting'])}",
        f"{max(worker['peaks'].values()) / GIB:.1f}",
        f"{worker['usable_bytes'] / GIB:.1f}",
        f"{worker['seconds_per_step']:.2f}",
        "not known" if cost is None else f"{cost:.3f}",
    )


def _cards() -> Iterator[str]:
    yield "## The cards"
    yield ""
    copies = ", ".join(f"{gbs:g} GB/s for generation {gen}" for gen, gbs in PCIE_GBS.items())
    yield _text(
        "What is known of a card by its name. Products are dense, in 16 bits with float32 sums: "
        "GeForce cards do half of the figure that their data sheets print. Copies are assumed by "
        f"PCIe's generation: {copies}. A card that is listed with another size of memory is "
        "written `NAME-<GiB>G`, as in `RTX4090-48G`. What torch and Ray call a card is understood "
        "too."
    )
    yield ""
    prices = read_prices()
    rows = []
    for name, known in KNOWN.items():
        price = prices[name]
        cost = "not known" if price.dollars is None else f"{price.dollars:.2f} ({price.said})"
        rows.append(
            (
                f"`{name}`",
                f"{known.mib / 1024:.1f}",
                "yes" if known.capability >= (8, 0) else "no: fp16",
                f"{known.half_tflops:g}",
                f"{known.float_tflops:g}",
                f"{known.bandwidth_gbs:g}",
                str(known.pcie),
                known.source,
                cost,
            )
        )
    yield from _table(
        (
            *("`--gpu`", "GiB", "bf16", "TFLOP/s, 16 bits", "float32", "GB/s", "PCIe"),
            *("figures from", "$ an hour"),
        ),
        rows,
    )


def main() -> None:
    """Write the page."""
    PAGE.write_text(memory_page())


if __name__ == "__main__":
    main()
