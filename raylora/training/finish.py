"""What a finished run leaves for people: the file, a grid of samples, curves, a summary."""

from __future__ import annotations

import io
import json
from typing import Any

from PIL import Image

from raylora.base.segments import read_segments
from raylora.base.storage import Storage
from raylora.preview.options import PreviewOptions
from raylora.review.curves import draw_curves
from raylora.review.grid import draw_grid
from raylora.training.checkpoint import checkpoint_steps, read_facts
from raylora.training.report import read_metrics
from raylora.training.sample import sample_key


def finish_run(storage: Storage, *, name: str, preview: PreviewOptions) -> dict[str, Any]:
    """Write `<name>.safetensors`, `samples.png`, `curves.png` and, last, `result.json`.

    Where the best checkpoint was kept and is not the last, `<name>-best.safetensors` too.

    Returns:
        The content of result.json: steps, how it ended, files, first, last and lowest held-out
        loss.
    """
    steps = checkpoint_steps(storage)[-1]
    facts = read_facts(storage, steps)
    best = facts["judge"]["best"]
    files = {"adapter": f"{name}.safetensors"}
    adapter = _copy_adapter(storage, steps, files["adapter"])
    if best["step"] in facts["keep"] and best["step"] != steps:
        files["best"] = f"{name}-best.safetensors"
        _copy_adapter(storage, best["step"], files["best"])
    rows = read_metrics(storage)
    storage.write("curves.png", draw_curves(rows, title=name))
    files["curves"] = "curves.png"
    grid = _sample_grid(storage, name=name, preview=preview)
    if grid is not None:
        storage.write("samples.png", grid)
        files["samples"] = "samples.png"
    held_out = [row["validation"] for row in rows if "validation" in row]
    result = {
        "name": name,
        "steps": steps,
        "ended": _how_it_ended(storage, steps, best["step"]),
        "files": files,
        "adapter_bytes": len(adapter),
        "validation_first": held_out[0] if held_out else None,
        "validation_last": held_out[-1] if held_out else None,
        "validation_best": best["loss"],
        "best_step": best["step"],
    }
    storage.write("result.json", json.dumps(result, indent=1).encode())
    return result


def _copy_adapter(storage: Storage, step: int, name: str) -> bytes:
    """Give the LoRA file of a checkpoint a name that people look for."""
    adapter = storage.read(f"checkpoints/{step:06d}/adapter.safetensors")
    storage.write(name, adapter)
    return adapter


def _how_it_ended(storage: Storage, steps: int, best_step: int | None) -> str:
    early = any(
        event["event"] == "early stop" and event["step"] == steps
        for event in read_segments(storage, "events")
    )
    return f"early stop at step {steps}, best {best_step}" if early else "all steps"


def _sample_grid(storage: Storage, *, name: str, preview: PreviewOptions) -> bytes | None:
    wanted = preview.pictures()
    keys = {entry.key for entry in storage.entries("samples")}
    steps = sorted({int(key.split("/")[1]) for key in keys})
    numbers = range(len(wanted))
    steps = [step for step in steps if all(sample_key(step, n) in keys for n in numbers)]
    if not steps or not wanted:
        return None
    pictures = [
        [Image.open(io.BytesIO(storage.read(sample_key(step, n)))) for step in steps]
        for n in numbers
    ]
    grid = draw_grid(
        pictures,
        rows=[picture.label for picture in wanted],
        columns=["base, step 0" if step == 0 else f"step {step}" for step in steps],
        title=f"{name}: same prompts and seeds along the run",
    )
    held = io.BytesIO()
    grid.save(held, format="PNG", optimize=True)
    return held.getvalue()
