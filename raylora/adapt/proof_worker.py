"""The far side of the proof of export: reads a saved LoRA as other programs do and compares.

`python -m raylora.adapt.proof_worker` answers requests on standard input until that closes, so it
ends with its parent however the parent ends. A request is two frames, the file and what was
trained; an answer is one frame of JSON. A frame is 8 bytes of length, then that many bytes.

What diffusers reads is compared as diffusers reads it; the rest by the formulas of `kinds`, which
are not those of training.
"""

from __future__ import annotations

import json
import math
import os
import select
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raylora.adapt import kinds
from raylora.adapt.deltas import LowRank, at_scale, delta_distance, delta_norm
from raylora.adapt.diffusers_reader import (
    diffusers_reads,
    leaves_out,
    read_with_diffusers,
)
from raylora.adapt.lora_file import AdapterFile, AdapterModule, read_adapter
from raylora.adapt.onto import Names, onto, weight_shape
from raylora.adapt.rounding import low_rank_bound, merged_bound
from raylora.adapt.safetensors_format import open_source, read_header, read_tensors
from raylora.adapt.trained import Trained
from raylora.base.errors import ExportError, WeightsError
from raylora.base.lookup import some_of
from raylora.base.seeds import draw_normal
from raylora.base.site import Place, Site

_NAMED = 5  # faults of one kind that a message names


@dataclass(frozen=True)
class Comparison:
    """What another reader found against what was trained.

    Attributes:
        modules: compared.
        worst: largest ‖change read - change trained‖ / ‖change trained‖ of a module.
        worst_module: where that is; "" where no module differs at all.
        problems: one sentence each; () when the file is what was trained.
        by_diffusers: how many of the modules diffusers read.
    """

    modules: int
    worst: float
    worst_module: str
    problems: tuple[str, ...]
    by_diffusers: int = 0


@dataclass(frozen=True)
class _Found:
    """One module against what was trained.

    Attributes:
        error: relative to the change that was trained.
        fits: whether the file's rounding explains it.
    """

    error: float
    fits: bool


def compare_file(data: bytes, trained: Trained, names: Names) -> Comparison:
    """Hold every module of a file against what was trained."""
    with tempfile.TemporaryDirectory(prefix="raylora-proof-") as folder:
        path = Path(folder) / "adapter.safetensors"
        path.write_bytes(data)
        try:
            file = read_adapter(data)
            held, left = onto(file, trained.sites, names.place)
            reading = None
            if diffusers_reads(file, names.kind):
                reading = read_with_diffusers(path, names, file)
        except (ExportError, WeightsError) as error:
            return Comparison(0, math.inf, "", (str(error),))
    read = dict(held)
    taken: set[str] = set()
    if reading is not None:
        kept = _dropped(file, trained.sites, names)
        taken = set(reading.modules)
        read = {name: module for name, module in held.items() if name in kept}
        read |= {name: reading.module(name) for name in reading.modules}
        left = []  # diffusers' own names tell below what was never trained
    found = compare(read, trained, stored=held, dtype=file.dtype)
    problems = [*found.problems, *(reading.problems if reading else ())]
    if unknown := [name for name in left if _changes(file.modules[name])]:
        problems.append(f"in the file but never trained: {some_of(unknown, _NAMED)}")
    return Comparison(
        found.modules,
        found.worst,
        found.worst_module,
        tuple(problems),
        by_diffusers=len(taken & {site.name for site in trained.sites}),
    )


def compare(
    read: Mapping[str, AdapterModule],
    trained: Trained,
    *,
    stored: Mapping[str, AdapterModule],
    dtype: torch.dtype,
) -> Comparison:
    """Hold modules by the names of sites against what was trained there.

    Args:
        stored: the same as the file holds them, whose scales say how its numbers were rounded.
        dtype: of the file's numbers.
    """
    sites = {site.name: site for site in trained.sites}
    problems = []
    missing = [name for name in sorted(set(sites) - set(read)) if _moves(sites[name], trained)]
    if missing:
        problems.append(f"missing from the file: {some_of(missing, _NAMED)}")
    # A module that adds nothing may be there only so that diffusers sees the others.
    if extra := [name for name in sorted(set(read) - set(sites)) if _changes(read[name])]:
        problems.append(f"in the file but never trained: {some_of(extra, _NAMED)}")
    both = sorted(set(read) & set(sites))
    found = {
        name: _compare_one(
            read[name], stored.get(name, read[name]), trained, sites[name], number, dtype
        )
        for number, name in enumerate(both)
    }
    wrong = sorted((n for n in both if not found[n].fits), key=lambda name: -found[name].error)
    if wrong:
        told = [f"{name} by {found[name].error:.1%}" for name in wrong]
        problems.append(f"ΔW differs: {some_of(told, _NAMED)}")
    worst = max(both, key=lambda name: found[name].error, default="")
    error = found[worst].error if worst else 0.0
    return Comparison(len(both), error, worst if error else "", tuple(problems))


def _dropped(file: AdapterFile, sites: list[Site], names: Names) -> set[str]:
    """The sites of the modules that diffusers' reader leaves out, as it is known to."""
    out = {name: file.modules[name] for name in file.modules if leaves_out(name, names.kind)}
    if not out:
        return set()
    part = AdapterFile(
        out, file.metadata, file.dtype, file.size_bytes, file.model_hash, file.spelling
    )
    return set(onto(part, sites, names.place)[0])


def _compare_one(
    module: AdapterModule,
    stored: AdapterModule,
    trained: Trained,
    site: Site,
    number: int,
    dtype: torch.dtype,
) -> _Found:
    wanted = trained.low_rank(site)
    if wanted is None or not module.is_low_rank:
        return _compare_merged(module, site, trained, number)
    # The file may have another alpha, and its halves are rounded as they are there.
    scale = stored.low_rank[2]
    rounded = at_scale(wanted, scale) if scale else wanted
    return _compare_low_rank(module.low_rank, wanted, low_rank_bound(rounded, dtype))


def _compare_low_rank(read: LowRank, wanted: LowRank, bound: float) -> _Found:
    if read[0].shape[1:] != wanted[0].shape[1:] or read[1].shape[0] != wanted[1].shape[0]:
        return _Found(math.inf, fits=False)
    distance, norm = delta_distance(read, wanted), delta_norm([wanted])
    return _Found(_relative(distance, norm), fits=distance <= bound)  # NaN does not


def _compare_merged(module: AdapterModule, site: Site, trained: Trained, number: int) -> _Found:
    """Both in a random weight of the layer's shape."""
    shape = weight_shape(site)
    drawn = draw_normal(shape, seed=0, step=0, sample=number, purpose="validation")
    weight = torch.from_numpy(drawn).double() / math.sqrt(site.inputs)
    held = {"weight": weight, "bias": weight.reshape(len(weight), -1)[:, 0].clone()}
    if site.kind == "norm":
        held["bias"] = weight.flip(0)
    wanted = trained.merged(site, dict(held))
    try:
        read = kinds.merged(module.tensors, held)
    except (RuntimeError, ValueError):  # shapes that do not go together
        return _Found(math.inf, fits=False)
    pairs = [
        (read.get(word, held[word]), wanted.get(word, held[word]), held[word]) for word in held
    ]
    distance = math.hypot(*(float((one - two).norm()) for one, two, _ in pairs))
    norm = math.hypot(*(float((two - base).norm()) for _, two, base in pairs))
    bound = merged_bound(module, weight)
    if "bias" in read:
        bound *= 2  # a difference of biases is rounded as the weight's is, and is no longer
    return _Found(_relative(distance, norm), fits=distance <= bound)


def _relative(distance: float, norm: float) -> float:
    return distance / norm if norm else (math.inf if distance else 0.0)


def _moves(site: Site, trained: Trained) -> bool:
    """Whether training moved a layer at all: what changes nothing need not be in a file."""
    wanted = trained.low_rank(site)
    return wanted is None or delta_norm([wanted]) != 0


def _changes(module: AdapterModule) -> bool:
    return not module.is_low_rank or delta_norm([module.low_rank]) != 0


def unpacked(blob: bytes) -> tuple[Trained, Names]:
    """What `proof.packed` packed."""
    stream, size, called = open_source(blob)
    header = read_header(stream, size, called)
    tensors = read_tensors(stream, header)
    about = json.loads(header.metadata["about"])
    sites = [_site(words) for words in about["sites"]]
    places = {
        site.name: Place(**{**words, "rows": tuple(words["rows"]) if words["rows"] else None})
        for site, words in zip(sites, about["places"], strict=True)
    }
    parameters: dict[str, dict[str, Tensor]] = {site.name: {} for site in sites}
    for key, tensor in tensors.items():
        number, _, word = key.partition("|")
        parameters[sites[int(number)].name][word] = tensor
    scales = dict(zip(parameters, about["scales"], strict=True))
    trained = Trained(about["network"], sites, parameters, scales)
    return trained, Names(about["family"], lambda name: places[name], about["config"])


def _site(words: dict[str, Any]) -> Site:
    pairs = {word: tuple(words[word]) for word in ("kernel", "stride", "padding")}
    return Site(**{**words, **pairs})


def _answer(data: bytes, expected: bytes) -> dict[str, Any]:
    trained, names = unpacked(expected)
    return asdict(compare_file(data, trained, names))


def _read_frame(source: int, parent: int) -> bytes | None:
    """One frame; None when standard input has closed or the parent is gone."""
    head = _read_exactly(source, 8, parent)
    return None if head is None else _read_exactly(source, int.from_bytes(head, "little"), parent)


def _read_exactly(source: int, count: int, parent: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        # A process forked off the parent may hold the pipe open after the parent's death.
        while not select.select([source], [], [], 1.0)[0]:
            if os.getppid() != parent:
                return None
        piece = os.read(source, min(count - len(data), 1 << 20))
        if not piece:
            return None
        data += piece
    return bytes(data)


def _serve(source: int, sink: int, parent: int) -> None:
    import diffusers.loaders  # noqa: F401  (6-10 s with peft, once, while training goes on)

    torch.set_num_threads(1)
    while (data := _read_frame(source, parent)) is not None:
        expected = _read_frame(source, parent)
        if expected is None:
            return
        text = json.dumps(_answer(data, expected)).encode()
        os.write(sink, len(text).to_bytes(8, "little") + text)


def main() -> None:
    """Serve on the pipes this process was started with; the argument is the parent's process id."""
    parent = int(sys.argv[1])  # not os.getppid(): the parent may have died during the imports
    source, sink = os.dup(0), os.dup(1)
    # Libraries print; what they print must not reach the pipe of answers.
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    _serve(source, sink, parent)


if __name__ == "__main__":
    main()
