"""CPU seconds of a training step, one thread a process, contestants taking turns.

    python benchmarks/step.py [--example train_text_to_image_lora.py] [--rounds 15] [--json]

Contestants: raylora without Ray, a bare loop over the same cached tensors and layers, raylora
through Ray with one worker, all on 192 layers; with --example also diffusers' example script and
raylora on the 128 layers that it trains. The script is diffusers', examples/text_to_image, and
needs `pip install datasets torchvision`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import results
from base import encoding_share, make_base, make_pictures
from contestants import TURN, job_of
from turns import ENVIRONMENT, Contestant, take_turns

from raylora.check import check_job
from raylora.local import cache_here

PICTURES = 32


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--example", help="path of train_text_to_image_lora.py")
    parser.add_argument("--rounds", type=int, default=15, help=f"turns of {TURN} steps each")
    parser.add_argument("--without-ray", action="store_true")
    parser.add_argument("--note", default="", help="a sentence for the results")
    parser.add_argument("--json", action="store_true", help="print the JSON, not the table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="step-") as name:
        folder = Path(name)
        make_base(folder / "base")
        make_pictures(folder / "pictures", PICTURES, (256, 256))
        cache_here(check_job(job_of(folder, "attention_mlp", 1, "warm")))
        first_step = _first_step_seconds(folder)
        share = encoding_share(folder / "base", 256)
        contestants = _contestants(folder, options)
        take_turns(contestants, options.rounds, folder)
    result = {
        **_result(contestants, options),
        "first_step_seconds": first_step,
        "encoding_share": round(share, 2),
    }
    path = results.write("step", result, _text(result))
    print(json.dumps(result, indent=1) if options.json else _text(result))
    print(f"written: {path}", file=sys.stderr)


def _first_step_seconds(folder: Path) -> float:
    """CPU seconds of a new process until its first step is done, without the proof's process."""
    script = str(Path(__file__).with_name("contestants.py"))
    return float(
        subprocess.run(
            [sys.executable, script, "first", str(folder), "attention_mlp", "1", "first", ""],
            env={**os.environ, **ENVIRONMENT},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()[0]
    )


def _contestants(folder: Path, options: argparse.Namespace) -> list[Contestant]:
    steps = str(TURN * (options.rounds + 1))  # the first turn warms up

    def one(name: str, way: str, layers: str, *more: str) -> Contestant:
        script = str(Path(__file__).with_name("contestants.py"))
        return Contestant(name, [script, way, str(folder), layers, steps, *more])

    found = [one("local", "local", "attention_mlp"), one("bare", "bare", "attention_mlp")]
    if not options.without_ray:
        found.append(one("ray", "ray", "attention_mlp"))
    if options.example:
        script = str(Path(options.example).resolve())
        found.append(one("local-128", "local", "attention"))
        found.append(one("example-128", "example", "attention", script))
    return found


def _result(contestants: list[Contestant], options: argparse.Namespace) -> dict[str, Any]:
    seconds = {one.name: [s / TURN for s in one.process_seconds] for one in contestants}
    trees = {one.name: [s / TURN for s in one.tree_seconds] for one in contestants}
    pairs = [("local", "bare", 1.05), ("ray", "local", 1.05), ("local-128", "example-128", 0.65)]
    ratios = {
        f"{one} / {other}": {
            **results.quartiles([a / b for a, b in zip(seconds[one], seconds[other], strict=True)]),
            "at_most": limit,
        }
        for one, other, limit in pairs
        if one in seconds and other in seconds
    }
    return {
        "machine": results.machine(),
        "note": options.note,
        "rounds": options.rounds,
        "steps_a_turn": TURN,
        "cpu_seconds_a_step": {name: results.quartiles(s) for name, s in seconds.items()},
        "whole_tree_mean": {name: round(statistics.mean(s), 4) for name, s in trees.items()},
        "ratios": ratios,
    }


_SAID = {
    "local": "raylora --local, 192 layers",
    "bare": "bare loop, same tensors and layers, 192 layers",
    "ray": "raylora through Ray, one worker: the worker's process, 192 layers",
    "local-128": "raylora --local, 128 layers",
    "example-128": "diffusers' train_text_to_image_lora.py, 128 layers",
}


def _text(result: dict[str, Any]) -> str:
    lines = [
        "# CPU seconds of a training step",
        "",
        "UNet of SD 1.5's layout, 8.6 M parameters, random weights; 256 px, batch 1, rank 8, fp32,",
        f"one thread a process. {result['rounds']} rounds of {result['steps_a_turn']} steps, taken",
        "in turns; medians of the rounds, quartiles in brackets. Made by `benchmarks/step.py`.",
        "",
        f"Encoding a picture and its caption costs {result['encoding_share']} of the UNet's",
        "forward (SD 1.5: 1.41 at 512 px). The example does it at every step; raylora did it once,",
        "before (`cache.py`).",
        "",
        "`raylora train --local` had its first step done after "
        f"{result['first_step_seconds']:.1f} CPU s of its process,",
        "the cache being there (at most 8).",
        "",
        results.machine_line(result["machine"]),
        *([result["note"]] if result["note"] else []),
        "",
        "| contestant | CPU s a step | with all its processes |",
        "|---|---|---|",
    ]
    for name, numbers in result["cpu_seconds_a_step"].items():
        tree = result["whole_tree_mean"][name]
        lines.append(f"| {_SAID[name]} | {_numbers(numbers)} | {tree:.3f} |")
    lines += ["", "| ratio, round by round | median | at most |", "|---|---|---|"]
    for name, numbers in result["ratios"].items():
        lines.append(f"| {name} | {_numbers(numbers)} | {numbers['at_most']} |")
    return "\n".join([*lines, ""])


def _numbers(numbers: dict[str, float]) -> str:
    return f"{numbers['median']:.3f} ({numbers['low']:.3f}–{numbers['high']:.3f})"


if __name__ == "__main__":
    main()
