"""Show what a LoRA file is and says about itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import click

from raylora.adapt import kinds
from raylora.adapt.deltas import delta_norm
from raylora.adapt.lora_file import AdapterFile, AdapterModule, read_adapter
from raylora.adapt.recognise import FAMILIES, families_of
from raylora.base.errors import WeightsError
from raylora.base.units import mib
from raylora.cli_options import json_option, lora_file_argument

_FAMILIES = {
    "sd_v1": "Stable Diffusion 1.x",
    "sd_v2": "Stable Diffusion 2.x",
    "sd_v2_v": "Stable Diffusion 2.x (v)",
    "sdxl_base_v1-0": "SDXL",
    "flux1": "FLUX.1",
    "sd3m": "Stable Diffusion 3",
    "sd3-medium": "Stable Diffusion 3 medium",
    "sd3-5-medium": "Stable Diffusion 3.5 medium",
    "sd3-5-large": "Stable Diffusion 3.5 large",
}
_HASH_WORDS = {True: "fits the weights", False: "DOES NOT FIT the weights", None: "not in the file"}


@click.command()
@lora_file_argument
@json_option
def command(file: Path, as_json: bool) -> dict[str, Any]:
    """Show what the LoRA FILE (a path or URL) is and says about itself.

    Family, rank, modules, training, whether its hashes fit its weights, and how much it changes.
    """
    adapter = read_adapter(file)
    facts = describe(file.name, adapter)
    if not as_json:
        for label, text in _rows(facts):
            click.echo(f"{label:<9} {text}")
    return facts


def describe(name: str, adapter: AdapterFile) -> dict[str, Any]:
    """Everything `inspect` knows of a file, as a JSON document."""
    words = adapter.metadata
    modules = adapter.modules
    norms = {name: norm for name, module in modules.items() if (norm := _norm(module)) is not None}
    return {
        "file": name,
        "size_bytes": adapter.size_bytes,
        "dtype": str(adapter.dtype).removeprefix("torch."),
        "family": words.get("ss_base_model_version"),
        "fits": _fits(adapter),
        "spelling": adapter.spelling,
        "networks": _counted_words(_network(module) for module in modules.values()),
        "architecture": words.get("modelspec.architecture"),
        "prediction_type": words.get("modelspec.prediction_type"),
        "base": words.get("ss_sd_model_name"),
        "modules": len(modules),
        "components": dict(Counter(_component(name) for name in modules)),
        "ranks": _counted(module.rank for module in modules.values() if module.rank),
        "alphas": _counted(module.alpha for module in modules.values() if module.rank),
        "steps": _number(words.get("ss_steps")),
        "max_steps": _number(words.get("ss_max_train_steps")),
        "epoch": _number(words.get("ss_epoch")),
        "images": _number(words.get("ss_num_train_images")),
        "images_per_step": _number(words.get("ss_total_batch_size")),
        "optimizer": words.get("ss_optimizer"),
        "learning_rate": _number(words.get("ss_learning_rate")),
        "title": words.get("modelspec.title"),
        "date": words.get("modelspec.date"),
        "author": words.get("modelspec.author"),
        "trigger": words.get("modelspec.trigger_phrase"),
        "comment": _said(words.get("ss_training_comment")),
        "raylora_version": words.get("raylora.version"),
        "hashes": {word: _HASH_WORDS[fits] for word, fits in adapter.hash_checks.items()},
        "norms": {
            "smallest": min(norms.values()),
            "median": median(norms.values()),
            "largest": max(norms.values()),
            "largest_module": max(norms, key=lambda name: norms[name]),
            "zero_modules": sum(norm == 0 for norm in norms.values()),
        }
        if norms
        else None,
        "metadata": words,
        "job": _job(words.get("raylora.job")),
    }


def _rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Label and text of each line; lines of which the file says nothing are left out."""
    yield "file", f"{facts['file']}, {mib(facts['size_bytes'])}, {facts['dtype']}"
    told = " or ".join(FAMILIES.get(kind, kind) for kind in facts["fits"])
    family = _FAMILIES.get(facts["family"], facts["family"] or f"{told} by its names")
    predicts = f", predicts {facts['prediction_type']}" if facts["prediction_type"] else ""
    yield "family", family + predicts
    if facts["base"]:
        yield "base", facts["base"]
    parts = ", ".join(f"{count} in {part}" for part, count in facts["components"].items())
    yield "modules", f"{facts['modules']} ({parts})"
    networks = _spread(facts["networks"])
    yield "network", f"{networks}, names as {facts['spelling']} has them"
    if facts["ranks"]:
        yield "rank", f"{_spread(facts['ranks'])}, alpha {_spread(facts['alphas'])}"
    if facts["steps"] is not None:
        yield "trained", _trained(facts)
    for label in ("optimizer", "title", "author", "date", "trigger", "comment"):
        if facts[label]:
            yield label, facts[label]
    for word, found in facts["hashes"].items():
        if found != _HASH_WORDS[None]:
            yield "hash", f"{word} {found}"
    norms = facts["norms"]
    if norms is None:  # what they change depends on the base
        return
    yield (
        "ΔW norms",
        (
            f"median {norms['median']:.3g}, smallest {norms['smallest']:.3g}, "
            f"largest {norms['largest']:.3g} ({norms['largest_module']})"
        ),
    )
    if norms["zero_modules"]:
        yield "", f"{norms['zero_modules']} of {facts['modules']} modules change nothing"


def _trained(facts: dict[str, Any]) -> str:
    asked = f" of {facts['max_steps']}" if facts["max_steps"] else ""
    text = f"{facts['steps']}{asked} steps"
    if facts["epoch"]:
        text += f", epoch {facts['epoch']}"
    if facts["images_per_step"]:
        text += f", {facts['images_per_step']} images a step"
    if facts["images"]:
        text += f", {facts['images']} images an epoch"
    if facts["learning_rate"]:
        text += f", learning rate {facts['learning_rate']:g}"
    return text


def _component(name: str) -> str:
    if name.startswith(("lora_te", "text_encoder")):
        return "text encoder"
    transformer = ("transformer.", "lora_transformer_")
    return "transformer" if name.startswith(transformer) or "joint_blocks" in name else "unet"


def _fits(adapter: AdapterFile) -> list[str]:
    """The families that names and sizes leave; none where they are another model's."""
    try:
        return sorted(families_of(adapter))
    except WeightsError:
        return []


def _network(module: AdapterModule) -> str:
    return f"{module.kind} with DoRA" if kinds.DORA in module.tensors else module.kind


def _norm(module: AdapterModule) -> float | None:
    """Of the change of weight; None where that depends on the weight."""
    if module.is_low_rank:
        return delta_norm([module.low_rank])
    if not kinds.is_additive(module.tensors):
        return None
    return float(kinds.change(module.tensors)["weight"].norm())


def _counted_words(words: Iterable[str]) -> dict[str, int]:
    return dict(Counter(words).most_common())


def _counted(values: Any) -> dict[str, int]:
    return {f"{value:g}": count for value, count in Counter(values).most_common()}


def _spread(counts: dict[str, int]) -> str:
    """'8', or '8 (60 modules), 4 (12 modules)'."""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({count} modules)" for value, count in counts.items())


def _number(text: str | None) -> float | int | None:
    """The number a header's word holds; None where it has none or says something else."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return int(number) if number.is_integer() else number


def _said(text: str | None) -> str | None:
    return None if text in (None, "", "None") else text


def _job(text: str | None) -> Any:
    try:
        return json.loads(text) if text else None
    except ValueError:
        return None
