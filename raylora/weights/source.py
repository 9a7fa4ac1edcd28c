"""What configs, weights and tokenizers are read from: the contract of folders and of files."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from raylora.base.errors import WeightsError

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
"""Endings of files that may run a program of their maker's when they are opened."""
_CONVERT = (
    'python -c "import sys, torch; from safetensors.torch import save_file; '
    "held = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
    "held = held.get('state_dict', held); "
    "save_file({name: one.clone().contiguous() for name, one in held.items() "
    'if torch.is_tensor(one)}, sys.argv[2])"'
)


class Source(ABC):
    """A place that has one or more components.

    Attributes:
        name: what people call it.
        license: the licence's id, where it is known.
    """

    name: str
    license: str | None = None

    @abstractmethod
    def has(self, component: str) -> bool:
        """Whether the component's config and weights are here."""

    @abstractmethod
    def config(self, component: str) -> dict[str, Any]:
        """As diffusers or transformers write it. WeightsError where there is none."""

    @abstractmethod
    def weights(self, component: str) -> dict[str, Tensor]:
        """By diffusers' or transformers' names, mapped from the files. WeightsError without."""

    @abstractmethod
    def files(self, component: str) -> list[Path]:
        """The files that `weights` maps, on this machine."""

    @abstractmethod
    def tokenizer(self, component: str) -> Path:
        """A local folder that transformers reads a tokenizer from. WeightsError without."""


class Place(Protocol):
    """A folder of files, wherever it is.

    Attributes:
        name: what people call it.
    """

    name: str

    def names(self) -> frozenset[str]:
        """Of its files, relative, at most one folder deep."""

    def fetch(self, names: Iterable[str]) -> Path:
        """A local folder that has these of the files."""


def refuse_pickle(url: str, word: str) -> None:
    """WeightsError with the way to convert, where the file's name ends like a pickle's."""
    if url.endswith(PICKLES):
        raise WeightsError(
            f"{word}: {url} is a pickle, which can run any program when it is opened; raylora "
            "reads .safetensors alone. Look for the same weights as .safetensors, or convert them: "
            f"{_CONVERT} {url.rpartition('/')[2]} converted.safetensors"
        )
    if url.endswith(".gguf"):
        raise WeightsError(
            f"{word}: {url} holds weights that were quantised for drawing. Give the original "
            ".safetensors; raylora quantises it itself where that is asked for."
        )


def mapped_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file, mapped: their bytes are read when they are used.

    Raises:
        WeightsError: it is no whole .safetensors file, or its weights are scaled fp8.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise WeightsError(
            f"{path} is no whole .safetensors file ({error}). Fetch it again."
        ) from None
    if any(name.endswith((".scale_weight", "scaled_fp8")) for name in found):
        raise WeightsError(
            f"{path} holds scaled fp8 weights, which were made for drawing. Give the original in "
            "float16, bfloat16 or plain fp8."
        )
    return found


def file_metadata(path: Path) -> dict[str, str]:
    """What a .safetensors file's header says of itself."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def read_json(path: Path) -> dict[str, Any]:
    """A config's file. WeightsError where it is no JSON object."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON ({error}). Fetch the file again.") from None
    if not isinstance(found, dict):
        raise WeightsError(f"{path} is not a JSON object. Fetch the file again.")
    return found
