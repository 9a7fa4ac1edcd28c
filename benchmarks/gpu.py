"""Seconds and memory of a training step on one GPU, bases of true size with random weights.

    python benchmarks/gpu.py [--cases 'sdxl@1024*'] [--minutes 8] [--results FILE] [--list]

Needs torch, transformers, safetensors, peft, diffusers, numpy and pydantic: no Ray, no download, no
images. Each case is the product's own step: its models, adapter, loss and optimizer, through its
own plan of where weights lie. Beside what was measured stands what `raylora plan` predicts for the
same card and setting. Every case is written down when it is done, so a run that is cut off, or one
of few minutes, goes on where it was: give the same --results.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import results
import torch
from random_base import RandomBase

from raylora.data.steps import SampleRef
from raylora.families import Family, get_family
from raylora.fit import Fit
from raylora.job import Job, job_from
from raylora.measure import asked_of_job, need_of_job, planning_family
from raylora.memory.candidates import library_bytes
from raylora.memory.card import Card
from raylora.memory.peaks import bytes_of, hold
from raylora.memory.probe import probe
from raylora.memory.seconds import training_seconds
from raylora.memory.setting import BaseKind, Precision, Setting
from raylora.parts_of_job import make_parts
from raylora.training.fitting import Fitting
from raylora.training.memory import DeviceMemory
from raylora.training.parts import Parts
from raylora.training.reduce import Alone
from raylora.training.shares import Shares
from raylora.training.step import train_step

GIB = 2**30
MOST_STEPS, LEAST_STEPS, ENOUGH_SECONDS = 20, 4, 2.0
MODELS = {
    "sd15": ("sd15", "sd15"),
    "sdxl": ("sdxl", "sdxl"),
    "sd3": ("sd3", "sd3-medium"),
    "flux": ("flux1", "flux-dev"),
}
"""Word of a case -> (family.kind, the usual base's short name)."""
TERAFLOPS = {
    "sd15@512": 1.72,
    "sdxl@1024": 14.2,
    "sd3@1024": 20.7,
    "flux@512": 44.7,
    "flux@1024": 163.9,
}
"""Of a LoRA step without anything computed again: forward, backward to the activations, gradients
of a rank 16 adapter; two for a multiply-add. The numerator of the utilisation."""
TEXT = {
    "sd15": {"text": (77, 768)},
    "sdxl": {"text": (77, 2048), "pooled": (1280,)},
    "sd3": {"text": (333, 4096), "pooled": (2048,)},
    "flux": {"text": (512, 4096), "pooled": (768,)},
}
"""What is cached of a caption: tokens and width."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    model: str
    side: int
    base: BaseKind
    setting: Setting
    graphs: bool = False

    @property
    def name(self) -> str:
        """`sdxl@1024 int8 all streamed 50 % b1`."""
        setting = self.setting
        words = [f"{self.model}@{self.side}", self.base, setting.checkpointing]
        words += [f"streamed {setting.streamed:.0%}"] if setting.streamed else []
        words += ["offload"] if setting.offload else []
        words += ["graphs"] if self.graphs else []
        return " ".join([*words, f"b{setting.micro_batch}"])


def cases() -> Iterator[Case]:
    """In the order in which they are run: what shares a base lies together."""
    none, every = Setting(), Setting("all")
    for model, sides in (
        ("sd15", (512,)),
        ("sdxl", (1024,)),
        ("sd3", (1024,)),
        ("flux", (512, 1024)),
    ):
        for side in sides:
            for setting in (none, every):
                yield Case(model, side, "full", setting, graphs=True)
                yield Case(model, side, "full", setting)
            yield Case(model, side, "full", Setting("alternate"), graphs=True)
            yield Case(model, side, "full", Setting("mlp"), graphs=True)
            for share in (0.5, 0.9, 1.0):
                yield Case(model, side, "full", every.but(streamed=share), graphs=True)
            yield Case(model, side, "full", every.but(streamed=1.0))
            yield Case(model, side, "full", every.but(streamed=1.0, offload=True))
            if model in ("sd15", "sdxl"):
                yield Case(model, side, "full", none.but(micro_batch=8), graphs=True)
        for base in ("int8", "fp8", "nf4"):
            for side in sides:
                yield Case(model, side, base, every, graphs=True)
                if model != "flux":
                    yield Case(model, side, base, none, graphs=True)
            yield Case(model, sides[0], base, every.but(streamed=0.9), graphs=True)


class _Loader:
    """Gives every step the same random samples, where the product's gives cached ones."""

    def __init__(self, family: Family, case: Case) -> None:
        side = case.side // family.pixels_per_latent
        draw = np.random.default_rng(0)
        one = {
            "latents": draw.standard_normal((family.latent_channels, side, side), np.float32),
            "weight": np.ones((), np.float32),
        }
        for word, shape in TEXT[case.model].items():
            one[word] = draw.standard_normal(shape).astype(np.float32)
        if family.wants_geometry:
            one["geometry"] = np.array(
                [case.side, case.side, 0, 0, case.side, case.side], np.float32
            )
        images = case.setting.micro_batch
        bucket = (case.side, case.side)
        self._samples = [
            SampleRef(row=i, repeat=0, number=i + 1, bucket=bucket) for i in range(images)
        ]
        self._tensors = [one] * images

    def take(self, step: int) -> tuple[list[SampleRef], list[Any], int]:
        return self._samples, self._tensors, len(self._samples)


def job_of(case: Case) -> Job:
    """Rank 16 on the usual layers, AdamW, bf16."""
    kind, word = MODELS[case.model]
    return job_from(
        {
            "name": "gpu",
            "family": {"kind": kind, "weights": word},
            "network": {"kind": "lora", "rank": 16, "alpha": 16},
            "optimizer": {"name": "adamw", "learning_rate": 1e-4},
            "data": {"folder": "none", "resolution": case.side},
            "training": {
                "steps": 1000,
                "images_per_step": case.setting.micro_batch,
                "precision": "bf16",
                "seed": 0,
            },
            "memory": {"base": case.base, "cuda_graphs": case.graphs},
        }
    )


class Bench:
    """Keeps the models of the last case, where the next one has the same."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory = DeviceMemory(device)
        self._bases: dict[str, RandomBase] = {}
        self._held: tuple[tuple[str, str], Family, Parts, Fitting] | None = None

    def run(self, case: Case, card: Card) -> dict[str, Any]:
        """Measured and predicted."""
        began = time.perf_counter()
        family, parts = self._parts(case)
        parts.graphs.possible = case.graphs
        parts.fitting.apply(case.setting)
        parts.loader = _Loader(family, case)  # type: ignore[assignment]
        torch.cuda.synchronize()
        made = time.perf_counter() - began
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for step in range(4 if parts.graphs.on else 2):
            loss = train_step(parts, step).loss
        torch.cuda.synchronize()
        times: list[float] = []
        while len(times) < MOST_STEPS and (len(times) < LEAST_STEPS or sum(times) < ENOUGH_SECONDS):
            began = time.perf_counter()
            train_step(parts, len(times))
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        seconds = sorted(times)[len(times) // 2]
        images = case.setting.micro_batch
        flops = TERAFLOPS.get(f"{case.model}@{case.side}", 0.0) * 1e12 * images
        return {
            "case": case.name,
            "seconds": round(seconds, 4),
            "fastest": round(min(times), 4),
            "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
            "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
            "host_peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1),
            "teraflops": round(flops / seconds / 1e12, 1),
            "graphed": bool(parts.graphs.on),
            "finite": bool(torch.isfinite(loss)),
            "made_seconds": round(made, 1),
            **predicted(case, card, graphed=bool(parts.graphs.on)),
        }

    def _parts(self, case: Case) -> tuple[Family, Parts]:
        key = (case.model, case.base)
        if self._held is None or self._held[0] != key:
            self._drop()
            self._held = (key, *self._make(case))
        return self._held[1], self._held[2]

    def _make(self, case: Case) -> tuple[Family, Parts, Fitting]:
        kind, word = MODELS[case.model]
        job = job_of(replace(case, graphs=True))
        if word not in self._bases:
            self._bases.clear()
            self._bases[word] = RandomBase(word, self.device)
        base = self._bases[word]
        family = get_family(kind)[0](base, job.family)
        if not base.shapes:
            denoiser, _ = family.skeletons()
            base.shapes[family.component] = {
                name: held.shape for name, held in denoiser.state_dict().items()
            }
        fit = Fit(Precision("bf16", base=case.base), case.setting)
        loader: Any = _Loader(family, case)
        fleet: Any = (Alone(), Shares(1))
        parts = make_parts(
            *(job, family, loader, *fleet, 1000, self.device, fit, self.memory), share_host=False
        )
        return family, parts, parts.fitting

    def _drop(self) -> None:
        if self._held is not None:
            self._held[2].graphs.drop()
        self._held = None
        gc.collect()
        torch.cuda.empty_cache()


def predicted(case: Case, card: Card, *, graphed: bool) -> dict[str, float]:
    """What a plan would say of the same, without its reserve."""
    job = job_of(case)
    need = need_of_job(job, planning_family(job), (case.side, case.side))
    precision = Precision("bf16", base=case.base)
    asked = asked_of_job(job)
    held = hold(need.denoiser, precision, case.setting.streamed)
    peak = bytes_of(need, asked.carried(precision), held, case.setting).train
    seconds = training_seconds(need, precision, case.setting, card, recorded=graphed)
    return {
        "predicted_peak_gib": round((peak + library_bytes(card)) / GIB, 3),
        "predicted_seconds": round(seconds, 4),
        "launches": need.steps[case.setting.checkpointing].work.launches,
    }


def main() -> None:
    """Measure what is missing in the results, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default="*", help="glob over the cases' names; several by |")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no case after so many")
    parser.add_argument("--results", type=Path, help="JSON to go on from and to write")
    parser.add_argument("--list", action="store_true", help="print the cases' names")
    parser.add_argument(
        "--predict", action="store_true", help="reckon the predictions of --results anew, no GPU"
    )
    options = parser.parse_args()
    chosen = [
        case
        for case in cases()
        if any(fnmatch.fnmatchcase(case.name, glob) for glob in options.cases.split("|"))
    ]
    if options.list:
        print("\n".join(case.name for case in chosen))
        return
    if options.predict:
        _predict_again(options.results)
        return
    began = time.monotonic()
    device = torch.device("cuda", 0)
    card = probe(device, options=job_of(chosen[0]).memory)
    path = options.results or results.FOLDER / f"gpu-{_slug(card.name)}.json"
    result = _read(path) or {"machine": {**results.machine(), "gpu": card.plain()}, "rows": []}
    done = {row["case"] for row in result["rows"]}
    bench = Bench(device)
    for case in chosen:
        if case.name in done:
            continue
        if time.monotonic() - began > 60 * options.minutes:
            print("out of minutes; the same command goes on", file=sys.stderr)
            break
        row = _row(bench, case, card)
        print(json.dumps(row), flush=True)
        result["rows"].append(row)
        _write(path, result)


def _predict_again(path: Path) -> None:
    """The predicted columns of results, after a change of the planner."""
    result = _read(path)
    assert result is not None, f"there is no {path}"
    card, by_name = Card.from_plain(result["machine"]["gpu"]), {one.name: one for one in cases()}
    for row in result["rows"]:
        if "problem" not in row:
            row |= predicted(by_name[row["case"]], card, graphed=row["graphed"])
    _write(path, result)


def _row(bench: Bench, case: Case, card: Card) -> dict[str, Any]:
    """What does not run is a row too."""
    try:
        return bench.run(case, card)
    except (RuntimeError, ImportError) as error:
        said = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    bench._drop()
    return {"case": case.name, "problem": said}


def _read(path: Path) -> dict[str, Any] | None:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found or None


def _write(path: Path, result: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(part, path)
    path.with_suffix(".md").write_text(text_of(result))


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")


def text_of(result: Mapping[str, Any]) -> str:
    """The table for people."""
    card, versions = result["machine"]["gpu"], result["machine"]["versions"]
    peak = card["half_tflops"]
    lines = [
        "# A training step on a GPU",
        "",
        "Bases of true size with random weights, LoRA of rank 16 on the usual layers, AdamW, bf16,",
        "captions and latents cached; `b1` is one image together. Median seconds of a step, and",
        "the most memory that torch had allocated. Predicted: what `raylora plan` reckons with for",
        "the same card and setting. Utilisation: floating-point operations of a LoRA step without",
        "what is computed again, over the time and the card's dense 16-bit peak. Made by",
        "`benchmarks/gpu.py`.",
        "",
        f"{card['name']}, {card['total_bytes'] / GIB:.1f} GiB; copies {card['to_device_gbs']:.0f} "
        f"GB/s to it and {card['to_host_gbs']:.0f} back, measured; peak {peak:.0f} TFLOP/s. "
        f"torch {versions['torch']}, {result['machine']['date']}.",
        "",
        "| case | s a step | predicted | peak GiB | predicted | apart | utilisation | host GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes: dict[str, list[str]] = {}
    for row in result["rows"]:
        if "problem" in row:
            lines.append(f"| {row['case']} | {row['problem']} | | | | | | |")
            continue
        apart = row["predicted_peak_gib"] / row["peak_gib"] - 1
        used = f"{row['teraflops'] / peak:.0%}" if row["teraflops"] else ""
        seconds = f"{row['seconds']:.3f}"
        note = row.get("note") or ("" if row["finite"] else "its loss was not finite")
        if note:
            seconds, used = "", ""
            notes.setdefault(note, []).append(row["case"])
        lines.append(
            f"| {row['case']} | {seconds} | {row['predicted_seconds']:.3f} "
            f"| {row['peak_gib']:.2f} | {row['predicted_peak_gib']:.2f} | {apart:+.1%} | {used} "
            f"| {row['host_peak_gib']:.0f} |"
        )
    said = [f"- {', '.join(which)}: {note}." for note, which in notes.items()]
    return "\n".join([*lines, "", *(["Seconds that are left out:", "", *said, ""] if said else [])])


if __name__ == "__main__":
    main()
