"""Who is measured by step.py: each function trains the same small LoRA in its own way.

    python contestants.py WAY FOLDER LAYERS STEPS [EXAMPLE] NAME GATE

is how step.py starts them. Every way says at the gate what a turn of `TURN` steps used.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from turns import Gate, cpu_seconds

from raylora.assemble import claim, make_run
from raylora.check import Checked, check_job
from raylora.job import Job, job_from
from raylora.local import cache_here, train
from raylora.training.reduce import Alone

TURN = 5
"""Steps a turn."""


def job_of(folder: Path, layers: str, steps: int, name: str) -> Job:
    """Rank 8 on every layer of `layers`, one picture of 256 px a step."""
    return job_from(
        {
            "name": name,
            "store": str(folder / "store"),
            "family": {"kind": "sd15", "weights": str(folder / "base")},
            "network": {"kind": "lora", "rank": 8, "layers": layers},
            "data": {
                "folder": str(folder / "pictures"),
                "resolution": 256,
                "enable_bucket": False,
                "cache": str(folder / "caches"),
            },
            "training": {"steps": steps, "images_per_step": 1, "seed": 1},
            "fleet": {"workers": 1, "cpus_only": True},
            "log": {"every_steps": TURN},
        }
    )


def local(job: Job, gate: Gate) -> None:
    """raylora in one process."""
    train(job, sinks=[gate.sink], prove=False)


def first(job: Job, gate: Gate) -> None:
    """raylora's command from its start to its first step; prints the CPU seconds of that."""
    from raylora.cli import run
    from raylora.training import loop

    step = loop.train_step

    def timed(*given: Any, **more: Any) -> Any:
        result = step(*given, **more)
        print(cpu_seconds())
        return result

    loop.train_step = timed  # type: ignore[assignment]
    file = Path(job.store).parent / "first.yaml"
    file.write_text(job.model_dump_json())
    run(["train", str(file), "--local"])


def on_ray(job: Job, gate: Gate) -> None:
    """raylora through Ray Train with one worker; the gate is in the worker."""
    from raylora.on_ray.resources import connect

    connect(job.fleet)
    from raylora.on_ray import train as road

    class GatedProgress(road.Progress):
        @property
        def sender(self) -> Any:
            return GatedSender(super().sender, gate)

    road.Progress = GatedProgress  # type: ignore[misc]
    road.train_on_ray(check_job(job))


class GatedSender:
    """A worker's way to the driver, and to the gate afterwards."""

    def __init__(self, sender: Any, gate: Gate) -> None:
        self.sender, self.gate = sender, gate

    @property
    def put(self) -> GatedSender:
        """`sender.put.remote(row)` is what the worker calls."""
        return self

    def remote(self, row: dict[str, Any]) -> None:
        """Send the row as usual, then wait for the next turn."""
        self.sender.put.remote(row)
        self.gate.sink(row)


def bare(job: Job, gate: Gate) -> None:
    """A loop over the same cached tensors and the same layers, and nothing else."""
    checked = check_job(job)
    parts, tensors = _parts(checked)
    optimizer = torch.optim.AdamW([parts.adapter.values], lr=1e-4)
    assert job.training.steps is not None
    for step in range(job.training.steps):
        held = tensors[step % len(tensors)]
        latents, text = held["latents"], held["text"]
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, parts.process.steps, (1,))
        noisy = parts.process.noisy(latents, noise, timesteps)
        prediction = parts.predict(parts.denoiser, noisy, timesteps, {"text": text})
        loss = torch.nn.functional.mse_loss(prediction, noise)
        loss.backward()
        optimizer.step()
        parts.adapter.gradients.zero_()
        if (step + 1) % TURN == 0:
            gate.wait()


def _parts(checked: Checked) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    datasets = cache_here(checked)
    storage, _ = claim(checked.job, extend=False)
    device = torch.device("cpu")
    run = make_run(checked.job, checked.family, datasets, storage, Alone(), device, prove=False)
    rows = datasets.training.fetch(datasets.training.rows)
    tensors = [
        {name: torch.from_numpy(array.copy())[None] for name, array in row.items()} for row in rows
    ]
    return run.parts, tensors


def example(job: Job, gate: Gate, script: str) -> None:
    """diffusers' train_text_to_image_lora.py, which encodes each picture and caption again."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    done = 0

    def after_step(*_: Any) -> None:
        nonlocal done
        done += 1
        if done % TURN == 0:
            gate.wait()

    register_optimizer_step_post_hook(after_step)
    arguments = {
        "pretrained_model_name_or_path": job.family.weights,
        "train_data_dir": job.data.folder,
        "resolution": 256,
        "train_batch_size": 1,
        "rank": 8,
        "max_train_steps": job.training.steps,
        "checkpointing_steps": 10**6,
        "seed": 1,
        "output_dir": f"{job.store}/{job.name}",
    }
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{job.store}/datasets"}
    sys.argv = [script, *(f"--{name}={value}" for name, value in arguments.items())]
    runpy.run_path(script, run_name="__main__")


def main(arguments: Sequence[str]) -> None:
    """Play one contestant."""
    way, folder, layers, steps, *rest, name, address = arguments
    gate = Gate(name, address)
    job = job_of(Path(folder), layers, int(steps), f"{name}-{os.getpid()}")
    ways = {"first": first, "local": local, "ray": on_ray, "bare": bare, "example": example}
    ways[way](job, gate, *rest)


if __name__ == "__main__":
    import contestants  # Ray's workers know this module by its name, not as __main__

    contestants.main(sys.argv[1:])
