"""A base model's components, wherever they lie: one object that families read them from."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from raylora.base.errors import WeightsError
from raylora.base.fetch import keep_text
from raylora.base.fingerprint import file_fingerprint
from raylora.weights.content import content_hash, folder_hash, remembered
from raylora.weights.opening import check_parts, check_whole, open_main, open_part
from raylora.weights.source import Source


class Base(ABC):
    """The components of one base model, by diffusers' names: "unet", "vae", "text_encoder", ...

    Attributes:
        name: what people call it: its folder's, file's or repository's name.
        license: the licence's id, where it is known.
    """

    name: str
    license: str | None

    @abstractmethod
    def has(self, component: str) -> bool:
        """Whether there is such a component; SD 3 may come without its T5."""

    @abstractmethod
    def config(self, component: str) -> dict[str, Any]:
        """As diffusers or transformers write it; "scheduler" has one too."""

    @abstractmethod
    def weights(self, component: str) -> dict[str, Tensor]:
        """By diffusers' or transformers' names, mapped from the files."""

    @abstractmethod
    def fingerprint(self, component: str) -> str:
        """Of the weights' files, from a small part of them."""

    @abstractmethod
    def content_hash(self, component: str) -> str:
        """sha256 over config and weights; the same for one model in a folder and in a file."""

    @abstractmethod
    def tokenizer(self, component: str) -> Any:
        """ "tokenizer", "tokenizer_2" or "tokenizer_3", of transformers."""

    @abstractmethod
    def tokenizer_hash(self, component: str) -> str:
        """sha256 over the tokenizer's files."""


def open_base(url: str, *, kind: str, parts: Mapping[str, str] = MappingProxyType({})) -> Base:
    """A base model for a family, its weights fetched to this machine when they are asked for.

    Args:
        url: a diffusers folder or one .safetensors checkpoint, local or s3://; a model hub's id
            "owner/name"; or the short name of a usual base.
        kind: the family, "sd15", "sd2", "sdxl", "sd3" or "flux1".
        parts: component -> another folder, file or hub's id for it alone. "config" is a diffusers
            folder whose configs and tokenizers stand in for those that a checkpoint has not.

    Raises:
        WeightsError: it is not there, not whole, of another family, or a pickle.
    """
    check_parts(kind, parts)
    main = open_main(url, kind=kind, config=parts.get("config"))
    opened = {
        component: open_part(component, place, main)
        for component, place in parts.items()
        if component != "config"
    }
    check_whole(kind, main, opened)
    return _Opened(main, opened)


class _Opened(Base):
    """A main source, and others for some components."""

    def __init__(self, main: Source, parts: Mapping[str, Source]) -> None:
        self._main = main
        self._parts = parts
        self.name = main.name
        self.license = main.license

    def has(self, component: str) -> bool:
        return self._of(component).has(component)

    def config(self, component: str) -> dict[str, Any]:
        return self._of(component).config(component)

    def weights(self, component: str) -> dict[str, Tensor]:
        return self._of(component).weights(component)

    def fingerprint(self, component: str) -> str:
        found = [file_fingerprint(file) for file in self._of(component).files(component)]
        return found[0] if len(found) == 1 else _digest(" ".join(found))

    def content_hash(self, component: str) -> str:
        source = self._of(component)
        config = source.config(component)
        place = remembered(source.files(component), component, config)
        if place is not None and place.exists():
            return place.read_text()
        made = content_hash(config, source.weights(component))
        if place is not None:
            keep_text(place, made)
        return made

    def tokenizer(self, component: str) -> Any:
        from transformers import AutoTokenizer

        folder = self._of(component).tokenizer(component)
        try:
            return AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise WeightsError(
                f"{self.name}: {folder} holds no tokenizer that transformers can read ({error}). "
                f"Set family.parts.{component} to a folder that does."
            ) from error

    def tokenizer_hash(self, component: str) -> str:
        return folder_hash(self._of(component).tokenizer(component))

    def _of(self, component: str) -> Source:
        return self._parts.get(component, self._main)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
