"""The LoRA file: safetensors under kohya's names, which every program that takes LoRAs reads.

Per layer `<name>.lora_down.weight` (R, I[, kh, kw]), `<name>.lora_up.weight` (O, R[, 1, 1]) and
`<name>.alpha`; the layer gains ΔW = alpha / R · up · down. Or under diffusers' own names, where
`<name>.lora_A.weight` is down, `<name>.lora_B.weight` is up, and ΔW = up · down.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from raylora.adapt import safetensors_format as container
from raylora.adapt.deltas import LowRank, at_scale
from raylora.adapt.deltas import delta as low_rank_delta
from raylora.adapt.keys import (
    Half,
    Naming,
    is_peft_key,
    kohya_name,
    module_name,
    peft_key,
    split_peft_key,
)
from raylora.base.errors import ExportError, WeightsError

DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha"
MODELSPEC_HASH = "modelspec.hash_sha256"

_KEY = re.compile(r"(lora_(?:unet|te\d?)_\w+)\.(.+)", re.ASCII)
_PARTS = (DOWN, UP, ALPHA)
# Where diffusers' save_lora_weights puts peft's settings, as JSON.
_PEFT_SETTINGS = "lora_adapter_metadata"
_HALVES: dict[Half, str] = {"down": DOWN, "up": UP}
# What sd-webui-additional-networks hashed of a file; its own choice of window.
_LEGACY_START, _LEGACY_BYTES = 0x100000, 0x10000


@dataclass(frozen=True)
class AdapterModule:
    """One layer's share of an adapter.

    Attributes:
        name: raylora's name of the layer, or the file's (`lora_unet_…`) when it was read from one.
        tensors: "lora_down.weight", "lora_up.weight" and "alpha" (no dimensions), as in the file.
    """

    name: str
    tensors: dict[str, Tensor]

    @property
    def rank(self) -> int:
        """Width of the bottleneck."""
        return int(self.tensors[DOWN].shape[0])

    @property
    def alpha(self) -> float:
        """The file's alpha; its rank where it has none, as all readers take it."""
        return float(self.tensors[ALPHA]) if ALPHA in self.tensors else float(self.rank)

    @property
    def low_rank(self) -> LowRank:
        """(down, up, alpha / rank)."""
        return self.tensors[DOWN], self.tensors[UP], self.alpha / self.rank


@dataclass(frozen=True)
class AdapterFile:
    """A LoRA file that was read and found whole.

    Attributes:
        modules: by the name that kohya's files use, whichever naming this one has, sorted.
        metadata: all of the header's words, ss_*, modelspec.* and raylora.* among them.
        dtype: of the weights; the widest where they are mixed.
        size_bytes: of the whole file.
        model_hash: sha256 of the tensors' bytes, which `sshs_model_hash` should say too.
        naming: whose names the file itself uses.
    """

    modules: dict[str, AdapterModule]
    metadata: dict[str, str]
    dtype: torch.dtype
    size_bytes: int
    model_hash: str
    naming: Naming

    def rank(self, name: str) -> int:
        """Rank of one module."""
        return self.modules[name].rank

    def alpha(self, name: str) -> float:
        """Alpha of one module."""
        return self.modules[name].alpha

    def delta(self, name: str) -> Tensor:
        """What the file adds to one layer's weight, float64, (O, I) or (O, I, kh, kw)."""
        return low_rank_delta(*self.modules[name].low_rank)

    @property
    def hash_checks(self) -> dict[str, bool | None]:
        """For each hash of the weights: does the header's fit the bytes? None where it has none."""
        claims = {"sshs_model_hash": self.model_hash, MODELSPEC_HASH: f"0x{self.model_hash}"}
        return {
            word: self.metadata[word].lower() == value if word in self.metadata else None
            for word, value in claims.items()
        }


def adapter_bytes(
    modules: Iterable[AdapterModule],
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype,
    naming: Naming = "kohya",
) -> bytes:
    """The whole file of an adapter, the same bytes for the same input on every machine.

    Args:
        modules: with raylora's names; all three tensors each.
        metadata: as `adapter_metadata` gives it. The hashes are added here.
        dtype: of the weights in the file. alpha is always float32: bf16 would lose its digits.
        naming: diffusers' has no alpha, so alpha / rank becomes part of the weights there.

    Raises:
        ExportError: a module lacks a half or alpha, has shapes that do not fit, or holds NaN or
            infinity, also where only `dtype` cannot hold a number.
    """
    tensors: dict[str, Tensor] = {}
    for module in modules:
        if ALPHA not in module.tensors:
            raise ExportError(f"Not saved: {module.name} has no alpha.")
        stored = AdapterModule(kohya_name(module.name), _as_stored(module, dtype))
        if fault := _fault(stored):
            raise ExportError(f"Not saved: {fault}")
        if naming == "diffusers":
            tensors |= _peft_tensors(module, dtype)
        else:
            tensors |= {f"{stored.name}.{part}": held for part, held in stored.tensors.items()}
    if not tensors:
        raise ExportError("Not saved: the adapter has no modules.")
    entries = container.lay_out(tensors)
    body = container.body_bytes(tensors, entries)
    return container.header_bytes(entries, {**metadata, **_hashes(entries, metadata, body)}) + body


def write_adapter(
    path: str | Path,
    modules: Iterable[AdapterModule],
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype,
    naming: Naming = "kohya",
) -> None:
    """Write an adapter to a local file, whole or not at all; see `adapter_bytes`."""
    data = adapter_bytes(modules, metadata, dtype=dtype, naming=naming)
    target = Path(path)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def read_adapter(source: str | Path | bytes) -> AdapterFile:
    """Read and check a LoRA file of either naming; never runs what is in it.

    Raises:
        WeightsError: not a safetensors file, damaged, no LoRA, or a module that cannot be used.
    """
    stream, size, called = container.open_source(source)
    with stream:
        header = container.read_header(stream, size, called)
        naming = _find_naming(header, called)
        tensors = container.read_tensors(stream, header)
        stream.seek(header.body_start)
        model_hash = hashlib.sha256(stream.read()).hexdigest()
    if naming == "diffusers":
        tensors = _as_kohya(tensors, header.metadata, called)
    modules = _grouped(tensors)
    for module in modules.values():
        if fault := _fault(module):
            raise WeightsError(f"{called}: {fault}")
    return AdapterFile(
        modules=modules,
        metadata=header.metadata,
        dtype=max(
            (module.tensors[DOWN].dtype for module in modules.values()), key=lambda d: d.itemsize
        ),
        size_bytes=size,
        model_hash=model_hash,
        naming=naming,
    )


def _as_stored(module: AdapterModule, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        part: tensor.detach().to("cpu", torch.float32 if part == ALPHA else dtype).contiguous()
        for part, tensor in module.tensors.items()
    }


def _peft_tensors(module: AdapterModule, dtype: torch.dtype) -> dict[str, Tensor]:
    if not is_peft_key(peft_key(module.name, "down")):
        raise ExportError(
            f"Not saved: {module.name} is a name from a file of kohya's naming, from which the "
            "layer's own cannot be told. Keep that naming, or name the layers first."
        )
    down, up, _ = at_scale(module.low_rank, 1.0)
    folded = AdapterModule(module.name, {DOWN: down, UP: up})
    stored = AdapterModule(module.name, _as_stored(folded, dtype))
    if fault := _fault(stored):
        raise ExportError(f"Not saved: {fault}")
    return {peft_key(module.name, half): stored.tensors[part] for half, part in _HALVES.items()}


def _as_kohya(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], called: str
) -> dict[str, Tensor]:
    """The same tensors by kohya's keys, with the alpha that peft applies."""
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name, half = split_peft_key(key)
        component, _, path = name.partition(".")
        kohya = kohya_name(module_name(component, path))
        if f"{kohya}.{_HALVES[half]}" in renamed:
            raise WeightsError(f"{called}: {kohya} is there twice, by two names.")
        renamed[f"{kohya}.{_HALVES[half]}"] = tensor
        if half == "down" and tensor.dim():
            alpha = _peft_alpha(component, path, len(tensor), metadata, called)
            renamed[f"{kohya}.{ALPHA}"] = torch.tensor(alpha, dtype=torch.float32)
    return renamed


def _peft_alpha(
    component: str, path: str, rank: int, metadata: Mapping[str, str], called: str
) -> float:
    """The rank, unless the header has the settings that diffusers writes there and goes by.

    Their words are peft's, behind the component: `unet.lora_alpha`, `unet.alpha_pattern`, ….
    """
    try:
        settings = json.loads(metadata.get(_PEFT_SETTINGS, "{}"))
        own = {
            word.removeprefix(f"{component}."): value
            for word, value in settings.items()
            if word.startswith(f"{component}.")
        }
        if own.get("use_rslora") or own.get("use_dora"):
            raise WeightsError(f"{called} uses rsLoRA or DoRA, which raylora does not read.")
        for pattern, alpha in own.get("alpha_pattern", {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", path):
                return float(alpha)
        return float(own.get("lora_alpha", rank))
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise WeightsError(f"{called}: {_PEFT_SETTINGS} in its header is malformed.") from error


def _hashes(
    entries: Mapping[str, container.Entry], metadata: Mapping[str, str], body: bytes
) -> dict[str, str]:
    """The hashes under which other programs list a file.

    sd-scripts takes both over a copy that holds only the ss_* words: sha256 of everything behind
    the header, and 8 digits of the sha256 of 64 KiB from 1 MiB on.
    """
    model_hash = hashlib.sha256(body).hexdigest()
    training_words = {word: text for word, text in metadata.items() if word.startswith("ss_")}
    head = container.header_bytes(entries, training_words)
    start, end = _LEGACY_START, _LEGACY_START + _LEGACY_BYTES
    window = head[start:end] + body[max(0, start - len(head)) : max(0, end - len(head))]
    return {
        "sshs_model_hash": model_hash,
        "sshs_legacy_hash": hashlib.sha256(window).hexdigest()[:8],
    }


def _find_naming(header: container.Header, called: str) -> Naming:
    """Whose names the file uses; refuse what is no plain LoRA before reading gigabytes of it."""
    if not header.entries:
        raise WeightsError(f"{called} holds no tensors.")
    if all(is_peft_key(key) for key in header.entries):
        return "diffusers"
    unknown = [key for key in header.entries if not _is_lora_key(key)]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise WeightsError(
            f"{called}: {unknown[0]!r}{more} is no key of a plain LoRA, whose keys look like "
            f"lora_unet_….{DOWN}, .{UP} and .{ALPHA}, or unet.….lora_A.weight and .lora_B.weight."
        )
    return "kohya"


def _is_lora_key(key: str) -> bool:
    found = _KEY.fullmatch(key)
    return found is not None and found[2] in _PARTS


def _grouped(tensors: Mapping[str, Tensor]) -> dict[str, AdapterModule]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key in sorted(tensors):
        name, _, part = key.partition(".")
        parts.setdefault(name, {})[part] = tensors[key]
    return {name: AdapterModule(name, found) for name, found in parts.items()}


def _fault(module: AdapterModule) -> str | None:
    """One sentence about what makes a module unusable."""
    name, tensors = module.name, module.tensors
    missing = [part for part in (DOWN, UP) if part not in tensors]
    if missing:
        return f"{name} has no {missing[0]}: half of it is missing."
    down, up = tuple(tensors[DOWN].shape), tuple(tensors[UP].shape)
    linear = len(down) == 2 and len(up) == 2
    convolution = len(down) == 4 and len(up) == 4 and up[2:] == (1, 1)
    if not (linear or convolution) or down[0] != up[1] or 0 in down + up:
        return f"{name} has shapes that do not fit: {DOWN} {down}, {UP} {up}."
    if ALPHA in tensors and tensors[ALPHA].numel() != 1:
        return f"{name} has an alpha of shape {tuple(tensors[ALPHA].shape)}; it is one number."
    for part, tensor in tensors.items():
        if not tensor.to(torch.float32 if tensor.itemsize == 1 else tensor.dtype).isfinite().all():
            words = str(tensor.dtype).removeprefix("torch.")
            return f"{name}.{part} holds NaN or numbers beyond what {words} can hold."
    return None
