"""The safetensors container, written with one byte order and read with one sentence per fault.

The library writes metadata in the random order of a hash table, so the same adapter would give two
files; and it says `InvalidHeaderLength` where a person needs to hear what the file is instead.
Tensor bytes lie exactly where the library puts them, so hashes of them agree with other programs.

Layout: 8 bytes header length (little-endian), JSON header padded with spaces to a multiple of 8,
then the tensors' bytes, by dtype (widest first), then by name. https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from raylora.base.errors import WeightsError
from raylora.base.units import mib

# In the library's own order, by which it sorts: the last comes first in the file.
_DTYPES = {
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
_WORDS = {dtype: word for word, dtype in _DTYPES.items()}
_ORDER = {word: place for place, word in enumerate(_DTYPES)}
_MAX_HEADER_BYTES = 100_000_000  # the library's limit

_OTHER_FORMATS = (
    (b"PK\x03\x04", "is a pickle (.ckpt, .pt or .bin), which can run code when it is opened"),
    (b"\x80", "is a pickle (.ckpt, .pt or .bin), which can run code when it is opened"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the weights: run `git lfs pull`"),
    (b"<", "is a web page: the download went wrong"),
    (b"GGUF", "is a GGUF file"),
)


@dataclass(frozen=True)
class Entry:
    """One tensor as the header declares it; `start` and `end` count from the first tensor byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header: entries tile the tensor bytes without gap or overlap."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    body_start: int


def lay_out(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Where each tensor's bytes go, in the library's order."""
    words = {name: _WORDS[tensor.dtype] for name, tensor in tensors.items()}
    entries, start = {}, 0
    for name in sorted(tensors, key=lambda name: (-_ORDER[words[name]], name)):
        end = start + tensors[name].numel() * tensors[name].element_size()
        entries[name] = Entry(words[name], tuple(tensors[name].shape), start, end)
        start = end
    return entries


def header_bytes(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """Length and header; metadata sorted by key, so that equal content gives equal bytes."""
    rows: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for name, entry in entries.items():
        rows[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.end],
        }
    # "replace": a folder name that is not UTF-8 must not keep a finished LoRA from being saved.
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def body_bytes(tensors: Mapping[str, Tensor], entries: Mapping[str, Entry]) -> bytes:
    """The tensors' bytes, in the order of `entries`, little-endian."""
    return b"".join(_raw(tensors[name]) for name in entries)


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A whole file; the same tensors and metadata give the same bytes on every machine."""
    entries = lay_out(tensors)
    return header_bytes(entries, metadata) + body_bytes(tensors, entries)


def _raw(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # .tobytes() is native order; every machine raylora runs on is little-endian.
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def open_source(source: str | Path | bytes) -> tuple[BinaryIO, int, str]:
    """A readable stream, its size and what to call it in messages.

    Raises:
        WeightsError: there is no such file, or it cannot be opened.
    """
    if isinstance(source, bytes):
        return io.BytesIO(source), len(source), "the file"
    path = Path(source)
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise WeightsError(f"{path} {what}. Name a .safetensors file.")
    try:
        return path.open("rb"), path.stat().st_size, str(path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be opened: {error.strerror}.") from error


def read_header(stream: BinaryIO, size: int, called: str) -> Header:
    """Read and check length, JSON, dtypes, shapes and offsets before any tensor is touched.

    Raises:
        WeightsError: one sentence saying what is wrong.
    """
    start = stream.read(64)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:9] != b"{" or length > _MAX_HEADER_BYTES:
        raise WeightsError(f"{called} {_what_else(start, length, size)}")
    if length > size - 8:
        raise WeightsError(
            f"{called} is cut short: its header has {length} bytes and the file {size} in all. "
            "Download or copy it again."
        )
    stream.seek(8)
    rows = _json_rows(stream.read(length), called)
    metadata = rows.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise WeightsError(f"{called} is damaged: its metadata is not text by name.")
    entries = {name: _entry(name, row, called) for name, row in rows.items()}
    _check_tiling(entries, size - 8 - length, called)
    return Header(entries, metadata, 8 + length)


def read_tensors(stream: BinaryIO, header: Header) -> dict[str, Tensor]:
    """All tensors of a checked header, each with memory of its own."""
    tensors = {}
    for name, entry in header.entries.items():
        stream.seek(header.body_start + entry.start)
        raw = bytearray(stream.read(entry.end - entry.start))
        dtype = _DTYPES[entry.dtype]
        flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        tensors[name] = flat.reshape(entry.shape)
    return tensors


def _what_else(start: bytes, length: int, size: int) -> str:
    for magic, words in _OTHER_FORMATS:
        if start.startswith(magic):
            return f"{words}. raylora reads safetensors only."
    if size == 0:
        return "is empty. Download or copy it again."
    if start[8:9] == b"{":
        return f"is damaged: it claims a header of {length} bytes and has {size} in all."
    return "is not a safetensors file. raylora reads safetensors only."


def _json_rows(text: bytes, called: str) -> dict[str, Any]:
    def refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise WeightsError(f"{called} is damaged: its header names {twice!r} twice.")
        return dict(pairs)

    try:
        rows = json.loads(text.decode(), object_pairs_hook=refuse_twice)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{called} is damaged: its header is not JSON.") from error
    if not isinstance(rows, dict):
        raise WeightsError(f"{called} is damaged: its header is not a table of tensors.")
    return rows


def _entry(name: str, row: Any, called: str) -> Entry:
    match row:
        case {"dtype": str(word), "shape": list(shape), "data_offsets": [int(start), int(end)]}:
            pass
        case _:
            raise WeightsError(f"{called} is damaged: the header's row of {name!r} is malformed.")
    if word not in _DTYPES:
        raise WeightsError(
            f"{called}: {name} holds {word}, which no LoRA has. Known: {', '.join(_DTYPES)}."
        )
    if not all(isinstance(edge, int) and edge >= 0 for edge in shape):
        raise WeightsError(f"{called} is damaged: the shape of {name!r} is {shape}.")
    if end - start != math.prod(shape) * _DTYPES[word].itemsize:
        raise WeightsError(
            f"{called} is damaged: {name!r} is {word} {shape} and has {end - start} bytes."
        )
    return Entry(word, tuple(shape), start, end)


def _check_tiling(entries: Mapping[str, Entry], body_size: int, called: str) -> None:
    expected = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != expected:
            what = "overlaps the tensor before it" if entry.start < expected else "leaves a hole"
            raise WeightsError(f"{called} is damaged: {name!r} {what}.")
        expected = entry.end
    if expected > body_size:
        raise WeightsError(
            f"{called} is cut short: {mib(expected - body_size)} of its tensors are missing. "
            "Download or copy it again."
        )
    if expected < body_size:
        raise WeightsError(
            f"{called} is damaged: {body_size - expected} bytes after its tensors belong to none."
        )
