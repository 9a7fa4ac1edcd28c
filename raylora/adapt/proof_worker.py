"""The far side of the proof of export: reads a saved LoRA as diffusers does and compares.

`python -m raylora.adapt.proof_worker` answers requests on standard input until that closes, so it
ends with its parent however the parent ends. A request is two frames, the file and what was
trained; an answer is one frame of JSON. A frame is 8 bytes of length, then that many bytes.
"""

from __future__ import annotations

import json
import math
import os
import select
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raylora.adapt.deltas import LowRank, at_scale, delta_distance, delta_norm
from raylora.adapt.keys import split_peft_key
from raylora.adapt.safetensors_format import open_source, read_header, read_tensors
from raylora.base.errors import ExportError
from raylora.base.lookup import some_of

_NAMED = 5  # faults of one kind that a message names


@dataclass(frozen=True)
class Comparison:
    """What an independent reader found against what was trained.

    Attributes:
        modules: compared.
        worst: largest ‖ΔW read - ΔW trained‖ / ‖ΔW trained‖ of a module.
        worst_module: where that is; "" where no module differs at all.
        problems: one sentence each; () when the file is what was trained.
    """

    modules: int
    worst: float
    worst_module: str
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Reading:
    """A LoRA file as diffusers' own reader gives it, by raylora's names.

    Attributes:
        modules: (down, up, alpha / rank), alpha as the file says and other programs apply it.
        loaded_scales: alpha / rank as diffusers' `load_lora_weights` applies it.
    """

    modules: dict[str, LowRank]
    loaded_scales: dict[str, float]

    @property
    def problems(self) -> list[str]:
        """Where diffusers would not apply what the file says: one sentence, or none."""
        wrong = [
            f"{name} ({self.loaded_scales[name]:g} for {scale:g})"
            for name, (_, _, scale) in sorted(self.modules.items())
            if not math.isclose(self.loaded_scales[name], scale, rel_tol=1e-6)
        ]
        if not wrong:
            return []
        return [
            "alpha differs between modules, and diffusers would apply another alpha / rank than "
            f"the file says: {some_of(wrong, _NAMED)}"
        ]


def read_with_diffusers(path: Path) -> Reading:
    """Every module of a LoRA file, read by diffusers.

    Raises:
        ExportError: diffusers refuses the file.
    """
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    try:
        state, network_alphas, settings = StableDiffusionLoraLoaderMixin.lora_state_dict(
            str(path), use_safetensors=True, local_files_only=True, return_lora_metadata=True
        )
        halves: dict[str, dict[str, Tensor]] = {}
        for key, tensor in _as_peft(state).items():
            name, half = split_peft_key(key)
            halves.setdefault(name, {})[half] = tensor
        loaded = _loaded_scales(halves, network_alphas or {}, settings)
        alphas = _file_alphas(network_alphas or {})
        meant = {name: alphas[name] / len(halves[name]["down"]) for name in alphas}
        if settings is not None:
            meant = loaded
        modules = {
            name: (held["down"], held["up"], meant.get(name, 1.0)) for name, held in halves.items()
        }
        return Reading(modules, loaded)
    # The reader raises whatever its first surprised line raises; all of it means the same here.
    except Exception as error:
        said = " ".join(str(error).split())
        raise ExportError(
            f"diffusers cannot read the file ({type(error).__name__}: {said})"
        ) from error


def compare(read: Mapping[str, LowRank], trained: Mapping[str, LowRank]) -> Comparison:
    """Hold every module that was read against what was trained."""
    problems = []
    if missing := sorted(set(trained) - set(read)):
        problems.append(f"missing from the file: {some_of(missing, _NAMED)}")
    # A module that adds nothing may be there only so that diffusers sees the others.
    more = sorted(set(read) - set(trained))
    if extra := [name for name in more if delta_norm([read[name]])]:
        problems.append(f"in the file but never trained: {some_of(extra, _NAMED)}")
    errors: dict[str, float] = {}
    wrong: list[str] = []
    both = sorted(set(read) & set(trained))
    for name in both:
        if not _same_shape(read[name], trained[name]):
            wrong.append(name)
            errors[name] = math.inf
            continue
        distance, norm = delta_distance(read[name], trained[name]), delta_norm([trained[name]])
        errors[name] = distance / norm if norm else (math.inf if distance else 0.0)
        # The file may have another alpha, and its halves are rounded as they are there.
        scale = read[name][2]
        stored = at_scale(trained[name], scale) if scale else trained[name]
        # "not <=", so that NaN is a fault too.
        if not distance <= rounding_bound(stored, read[name][0].dtype):
            wrong.append(name)
    wrong.sort(key=lambda name: -errors[name])
    if wrong:
        problems.append(
            f"ΔW differs: {some_of([f'{n} by {errors[n]:.1%}' for n in wrong], _NAMED)}"
        )
    worst = max(both, key=lambda name: errors[name], default="")
    return Comparison(
        modules=len(both),
        worst=errors.get(worst, 0.0),
        worst_module=worst if errors.get(worst) else "",
        problems=tuple(problems),
    )


def rounding_bound(trained: LowRank, dtype: torch.dtype) -> float:
    """How far ΔW can move, in Frobenius norm, when a file rounds both halves to `dtype`.

    Rounding moves a number x by at most u·|x|, u half the spacing at 1 (2^-11 in float16, 2^-8 in
    bfloat16, 2^-24 in float32), or by half the smallest subnormal; so with δD, δU of that size
    ‖(U+δU)(D+δD) - UD‖ <= ‖U‖‖δD‖ + ‖δU‖‖D‖ + ‖δU‖‖δD‖. alpha is rounded to float32 besides, and
    this comparison itself to float64.
    """
    down, up, scale = trained
    unit, half_subnormal = torch.finfo(dtype).eps / 2, _half_subnormal(dtype)
    down_norm, up_norm = float(down.double().norm()), float(up.double().norm())
    down_moved = unit * down_norm + half_subnormal * math.sqrt(down.numel())
    up_moved = unit * up_norm + half_subnormal * math.sqrt(up.numel())
    halves = up_norm * down_moved + up_moved * down_norm + up_moved * down_moved
    alpha = 2.0**-24 * up_norm * down_norm
    float64 = 1e-14 * up_norm * down_norm  # some 50 roundings of QR, 2^-53 each
    return abs(scale) * (halves + alpha + float64)


def _half_subnormal(dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return float(info.smallest_normal) * float(info.eps) / 2


def _as_peft(state: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' two older spellings to its present one, with diffusers' own tables."""
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    unet = {key: value for key, value in state.items() if key.startswith("unet.")}
    text = {key: value for key, value in state.items() if not key.startswith("unet.")}
    if text:
        text = convert_state_dict_to_peft(convert_state_dict_to_diffusers(text))
    return {**convert_unet_state_dict_to_peft(unet), **text}


def _file_alphas(network_alphas: Mapping[str, float]) -> dict[str, float]:
    """Alpha of each module; the reader hangs it on the module or on its lower half, by kind."""
    keys = {key.removesuffix(".alpha"): alpha for key, alpha in network_alphas.items()}
    whole = {key: alpha for key, alpha in keys.items() if not key.endswith(".down.weight")}
    lower = {key: alpha for key, alpha in keys.items() if key.endswith(".down.weight")}
    return whole | {split_peft_key(key)[0]: alpha for key, alpha in _as_peft(lower).items()}


def _loaded_scales(
    halves: Mapping[str, Mapping[str, Tensor]],
    network_alphas: Mapping[str, float],
    settings: Mapping[str, Any] | None,
) -> dict[str, float]:
    """alpha / rank of each module as `load_lora_weights` will set it.

    That is not always what the file says: where alphas differ between modules, diffusers 0.42 hands
    peft patterns that no attention layer matches, and those get the alpha most modules have. So
    diffusers and peft are asked, not the file. `settings` are those that a file of diffusers' own
    naming may bring.
    """
    from diffusers.utils import get_peft_kwargs
    from peft.utils.other import get_pattern_key

    scales = {}
    for component in ("unet", "text_encoder"):
        # The text encoder's modules have no `text_model.` level in transformers 5.
        paths = {
            name: name.removeprefix(f"{component}.").removeprefix("text_model.")
            for name in halves
            if name.startswith(f"{component}.")
        }
        ranks = {
            f"{path}.lora_B.weight": halves[name]["up"].shape[1] for name, path in paths.items()
        }
        alphas = _of_component(network_alphas, component)
        if not paths:
            continue
        if settings is None:
            config = get_peft_kwargs(ranks, alphas, dict.fromkeys(ranks), component == "unet")
        else:
            config = {"alpha_pattern": {}, **_of_component(settings, component)}
        patterns = config["alpha_pattern"]
        for name, path in paths.items():
            alpha = patterns.get(get_pattern_key(list(patterns), path), config["lora_alpha"])
            scales[name] = alpha / ranks[f"{path}.lora_B.weight"]
    return scales


def _of_component(words: Mapping[str, Any], component: str) -> dict[str, Any]:
    start = f"{component}."
    return {word.removeprefix(start): words[word] for word in words if word.startswith(start)}


def _same_shape(first: LowRank, second: LowRank) -> bool:
    return first[0].shape[1:] == second[0].shape[1:] and first[1].shape[0] == second[1].shape[0]


def _trained(blob: bytes) -> dict[str, LowRank]:
    stream, size, called = open_source(blob)
    tensors = read_tensors(stream, read_header(stream, size, called))
    names = {key.rpartition("|")[0] for key in tensors}
    return {
        name: (tensors[f"{name}|down"], tensors[f"{name}|up"], float(tensors[f"{name}|scale"]))
        for name in names
    }


def _answer(file_bytes: bytes, expected: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="raylora-proof-") as folder:
        path = Path(folder) / "adapter.safetensors"
        path.write_bytes(file_bytes)
        try:
            reading = read_with_diffusers(path)
        except ExportError as error:
            return asdict(Comparison(0, math.inf, "", (str(error),)))
    found = compare(reading.modules, _trained(expected))
    return asdict(replace(found, problems=(*found.problems, *reading.problems)))


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
    while (file_bytes := _read_frame(source, parent)) is not None:
        expected = _read_frame(source, parent)
        if expected is None:
            return
        text = json.dumps(_answer(file_bytes, expected)).encode()
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
