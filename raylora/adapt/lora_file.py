"""The LoRA file: safetensors under the names and words of any program that writes one.

Per layer `<name>.lora_down.weight` (R, I[, kh, kw]), `<name>.lora_up.weight` (O, R[, 1, 1]) and
`<name>.alpha`, whose layer gains ΔW = alpha / R · up · down; or the words of another kind of
adapter (`kinds.FORMS`). In diffusers' words `<name>.lora_A.weight` is down, `<name>.lora_B.weight`
is up, and ΔW = up · down.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raylora.adapt import kinds
from raylora.adapt import safetensors_format as container
from raylora.adapt.deltas import LowRank
from raylora.adapt.keys import Spelling, spelling_of, split_key
from raylora.adapt.kinds import ALPHA as ALPHA
from raylora.adapt.kinds import DORA, Kind
from raylora.adapt.kinds import DOWN as DOWN
from raylora.adapt.kinds import UP as UP
from raylora.base.errors import ExportError, WeightsError

MODELSPEC_HASH = "modelspec.hash_sha256"

# Numbers near the size of the weight, not of its change, which half precision would swallow; and
# alpha, whose digits bfloat16 would lose.
_EXACT = (ALPHA, DORA, "lora_magnitude_vector", "rescale")
# Where diffusers' save_lora_weights puts peft's settings, as JSON.
_PEFT_SETTINGS = "lora_adapter_metadata"
_PEFT = "base_model.model"
# What sd-webui-additional-networks hashed of a file; its own choice of window.
_LEGACY_START, _LEGACY_BYTES = 0x100000, 0x10000


@dataclass(frozen=True)
class AdapterModule:
    """One module of an adapter: what it does to one layer, or to several that are joined.

    Attributes:
        name: as the file has it; or raylora's name of the layer (`Site.name`).
        tensors: by kohya's words, "lora_down.weight", "lora_up.weight", "alpha" (one number), ….
    """

    name: str
    tensors: dict[str, Tensor]

    @property
    def kind(self) -> Kind:
        """Which kind of adapter its tensors are those of."""
        kind = kinds.kind_of(self.tensors)
        assert kind is not None
        return kind

    @property
    def is_low_rank(self) -> bool:
        """Whether it is ΔW = alpha / R · up · down, and nothing else."""
        return DOWN in self.tensors and not {kinds.MID, DORA} & set(self.tensors)

    @property
    def is_empty(self) -> bool:
        """Whether it is of low rank and changes nothing, with both halves zero."""
        return self.is_low_rank and not (self.tensors[DOWN].any() or self.tensors[UP].any())

    @property
    def rank(self) -> int:
        """Width of the bottleneck; 0 where the kind has none."""
        return kinds.rank_of(self.tensors) or 0

    @property
    def alpha(self) -> float:
        """The file's alpha; its rank where it has none, as all readers take it."""
        return kinds.scale_of(self.tensors) * self.rank

    @property
    def low_rank(self) -> LowRank:
        """(down, up, alpha / rank)."""
        return self.tensors[DOWN], self.tensors[UP], kinds.scale_of(self.tensors)


@dataclass(frozen=True)
class AdapterFile:
    """A LoRA file that was read and found whole.

    Attributes:
        modules: by the file's own names, sorted.
        metadata: all of the header's words, ss_*, modelspec.* and raylora.* among them.
        dtype: of the weights; the widest where they are mixed.
        size_bytes: of the whole file.
        model_hash: sha256 of the tensors' bytes, which `sshs_model_hash` should say too.
        spelling: whose names the file has.
    """

    modules: dict[str, AdapterModule]
    metadata: dict[str, str]
    dtype: torch.dtype
    size_bytes: int
    model_hash: str
    spelling: Spelling

    def rank(self, name: str) -> int:
        """Rank of one module."""
        return self.modules[name].rank

    def alpha(self, name: str) -> float:
        """Alpha of one module."""
        return self.modules[name].alpha

    def delta(self, name: str) -> Tensor:
        """What the file adds to one module's weight, float64, (O, I) or (O, I, kh, kw).

        Only of kinds that add the same whatever the weight (`kinds.is_additive`).
        """
        return kinds.change(self.modules[name].tensors)["weight"]

    @property
    def kinds(self) -> set[Kind]:
        """The kinds of its modules."""
        return {module.kind for module in self.modules.values()}

    @property
    def hash_checks(self) -> dict[str, bool | None]:
        """For each hash of the weights: does the header's fit the bytes? None where it has none."""
        claims = {"sshs_model_hash": self.model_hash, MODELSPEC_HASH: f"0x{self.model_hash}"}
        return {
            word: self.metadata[word].lower() == value if word in self.metadata else None
            for word, value in claims.items()
        }


def adapter_bytes(
    modules: Iterable[AdapterModule], metadata: Mapping[str, str], *, dtype: torch.dtype
) -> bytes:
    """The whole file of an adapter, the same bytes for the same input on every machine.

    Args:
        modules: with the names and words that the file is to have (`layout.laid_out`).
        metadata: as `adapter_metadata` gives it. The hashes are added here.
        dtype: of the weights in the file. alpha, DoRA's magnitude and OFT's rescale are float32
            always, whole numbers stay such.

    Raises:
        ExportError: a module lacks a part, has shapes that do not fit, or holds NaN or infinity,
            also where only `dtype` cannot hold a number.
    """
    tensors: dict[str, Tensor] = {}
    for module in modules:
        stored = {word: _as_stored(word, held, dtype) for word, held in module.tensors.items()}
        if fault := _fault(module.name, stored):
            raise ExportError(f"Not saved: {fault}")
        tensors |= {f"{module.name}.{word}": held for word, held in stored.items()}
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
) -> None:
    """Write an adapter to a local file, whole or not at all; see `adapter_bytes`."""
    data = adapter_bytes(modules, metadata, dtype=dtype)
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
    """Read and check a LoRA file of any spelling and kind; never runs what is in it.

    Raises:
        WeightsError: not a safetensors file, damaged, no LoRA, or a module that cannot be used.
    """
    stream, size, called = container.open_source(source)
    with stream:
        header = container.read_header(stream, size, called)
        places = _split_keys(header, called)
        tensors = container.read_tensors(stream, header)
        stream.seek(header.body_start)
        model_hash = hashlib.sha256(stream.read()).hexdigest()
    modules = _grouped(places, tensors, _peft_settings(header.metadata, source, called), called)
    for module in modules.values():
        if fault := _fault(module.name, module.tensors):
            raise WeightsError(f"{called}: {fault}")
    held = [tensor for module in modules.values() for tensor in module.tensors.values()]
    first = spelling_of(next(iter(modules)))
    assert first is not None
    return AdapterFile(
        modules=modules,
        metadata=header.metadata,
        dtype=_dtype_of(modules.values(), held),
        size_bytes=size,
        model_hash=model_hash,
        spelling=first,
    )


def _dtype_of(modules: Iterable[AdapterModule], held: list[Tensor]) -> torch.dtype:
    """The widest of those that `adapter_bytes` may choose; of all where it chooses none."""
    chosen = [
        tensor
        for module in modules
        for word, tensor in module.tensors.items()
        if word not in _EXACT and tensor.is_floating_point()
    ]
    return max((tensor.dtype for tensor in chosen or held), key=lambda dtype: dtype.itemsize)


def _as_stored(word: str, held: Tensor, dtype: torch.dtype) -> Tensor:
    if not held.is_floating_point():
        return held.detach().cpu().contiguous()
    wanted = torch.float32 if word in _EXACT else dtype
    return held.detach().to("cpu", wanted).contiguous()


def _split_keys(header: container.Header, called: str) -> dict[str, tuple[str, str]]:
    """(module, word) of each key; refuse what is no LoRA before reading gigabytes of it."""
    if not header.entries:
        raise WeightsError(f"{called} holds no tensors.")
    found = {key: split_key(key) for key in header.entries}
    unknown = [key for key, place in found.items() if place is None]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise WeightsError(
            f"{called}: {unknown[0]!r}{more} is no key of a LoRA, whose keys look like "
            f"lora_unet_….{DOWN}, .{UP} and .{ALPHA}, or unet.….lora_A.weight and .lora_B.weight."
        )
    return {key: place for key, place in found.items() if place is not None}


def _grouped(
    places: Mapping[str, tuple[str, str]],
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    called: str,
) -> dict[str, AdapterModule]:
    parts: dict[str, dict[str, Tensor]] = {}
    in_peft_words = set()
    for key, (name, word) in sorted(places.items(), key=lambda place: place[1]):
        held = parts.setdefault(name, {})
        if word in held:
            raise WeightsError(f"{called}: {name}.{word} is there twice, by two keys.")
        held[word] = tensors[key]
        if key != f"{name}.{word}":
            in_peft_words.add(name)
    for name in in_peft_words:
        _as_peft_means(name, parts[name], settings, called)
    return {name: AdapterModule(name, found) for name, found in parts.items()}


def _as_peft_means(
    name: str, held: dict[str, Tensor], settings: Mapping[str, Any], called: str
) -> None:
    """Give a module in diffusers' or peft's words the alpha that peft applies, and its magnitude
    kohya's shape."""
    down = held.get(DOWN)
    if down is not None and down.dim() and ALPHA not in held:
        alpha = _peft_alpha(name, len(down), settings, called)
        held[ALPHA] = torch.tensor(alpha, dtype=torch.float32)
    if down is not None and DORA in held:
        held[DORA] = held[DORA].reshape(-1, *[1] * (down.dim() - 1))


def _peft_settings(
    metadata: Mapping[str, str], source: str | Path | bytes, called: str
) -> dict[str, Any]:
    """peft's settings, by component where diffusers wrote them into the header.

    peft itself keeps them in a file beside the weights. Where there are none, every reader takes
    the halves as they are.
    """
    beside = None if isinstance(source, bytes) else Path(source).parent / "adapter_config.json"
    try:
        if _PEFT_SETTINGS in metadata:
            return dict(json.loads(metadata[_PEFT_SETTINGS]))
        if beside is not None and beside.is_file():
            settings = json.loads(beside.read_text())
            return {f"{_PEFT}.{word}": value for word, value in settings.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        where = f"{_PEFT_SETTINGS} in its header" if _PEFT_SETTINGS in metadata else str(beside)
        raise WeightsError(f"{called}: {where} is malformed.") from error
    return {}


def _peft_alpha(name: str, rank: int, settings: Mapping[str, Any], called: str) -> float:
    """The rank, unless there are settings of peft's that say something else."""
    in_peft = name.startswith(f"{_PEFT}.")
    component, _, path = (_PEFT, "", name) if in_peft else name.partition(".")
    own = {
        word.removeprefix(f"{component}."): value
        for word, value in settings.items()
        if word.startswith(f"{component}.")
    }
    try:
        alpha = float(own.get("lora_alpha", rank))
        for pattern, other in (own.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", path):
                alpha = float(other)
                break
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise WeightsError(f"{called}: peft's settings of {component} are malformed.") from error
    return alpha * math.sqrt(rank) if own.get("use_rslora") else alpha


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


def _fault(name: str, tensors: Mapping[str, Tensor]) -> str | None:
    """One sentence about what makes a module unusable, in whoever's words it is."""
    known = {word: split_key(f"{name}.{word}") for word in tensors}
    if strange := [word for word, place in known.items() if place is None]:
        return f"{name}.{strange[0]} is no key of any program's LoRA."
    in_kohyas = {place[1]: tensors[word] for word, place in known.items() if place is not None}
    if fault := kinds.fault(in_kohyas):
        return f"{name} {fault}"
    for word, tensor in tensors.items():
        if not tensor.to(torch.float32 if tensor.itemsize == 1 else tensor.dtype).isfinite().all():
            dtype = str(tensor.dtype).removeprefix("torch.")
            return f"{name}.{word} holds NaN or numbers beyond what {dtype} can hold."
    return None
