"""Folders in diffusers layout: a subfolder with config and weights for each component."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from raylora.base.errors import WeightsError
from raylora.base.fetch import fetch, is_remote, local_path
from raylora.base.storage import open_storage
from raylora.weights.source import PICKLES, Place, Source, mapped_tensors, read_json

_STEMS = ("diffusion_pytorch_model", "model")
_VARIANTS = ("", ".fp16")
"""Full precision where both are there."""
_README = "README.md"
_CONFIGS = {"scheduler": "scheduler_config.json"}


class LocalFolder:
    """A folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name

    def names(self) -> frozenset[str]:
        """Of its files."""
        found = [*self.folder.glob("*"), *self.folder.glob("*/*")]
        return frozenset(str(one.relative_to(self.folder)) for one in found if one.is_file())

    def fetch(self, names: Iterable[str]) -> Path:
        """The folder itself."""
        return self.folder


class StorageFolder:
    """A prefix of a bucket; each file is fetched once, when it is asked for."""

    def __init__(self, url: str, *, word: str) -> None:
        self._storage = open_storage(url)
        self._entries = {
            entry.key: entry for entry in self._storage.entries() if entry.key.count("/") < 2
        }
        if not self._entries:
            raise WeightsError(f"{word}: nothing is under {url}. Check bucket and prefix.")
        self.name = url.rstrip("/").rpartition("/")[2]

    def names(self) -> frozenset[str]:
        """Of its objects."""
        return frozenset(self._entries)

    def fetch(self, names: Iterable[str]) -> Path:
        """Its place in this machine's cache."""
        return fetch(self._storage, [self._entries[name] for name in names])


def open_place(url: str, *, word: str) -> Place:
    """A folder by its path or URL.

    Raises:
        WeightsError: there is none.
    """
    if is_remote(url):
        return StorageFolder(url, word=word)
    return LocalFolder(local_path(url))


class FolderSource(Source):
    """Components in the subfolders of a place.

    Args:
        word: the option that names it, for errors.
        own: a component whose files may lie in the place itself, as a VAE's folder has them.
        license_id: where it is known without asking.
    """

    def __init__(
        self, place: Place, *, word: str, own: str | None = None, license_id: str | None = None
    ) -> None:
        self._place = place
        self._license = license_id
        self._word = word
        self._own = own
        self.name = place.name

    @property
    def license(self) -> str | None:  # type: ignore[override]
        """As it was given, or as the first lines of the README say."""
        if self._license is not None or _README not in self._names:
            return self._license
        readme = self._place.fetch([_README]) / _README
        return read_license(readme.read_text(errors="replace"))

    @cached_property
    def _names(self) -> frozenset[str]:
        return self._place.names()

    def has(self, component: str) -> bool:
        """Whether its config is here."""
        return self._config_name(component) in self._names

    def config(self, component: str) -> dict[str, Any]:
        """From config.json, a scheduler's from scheduler_config.json."""
        name = self._config_name(component)
        if name not in self._names:
            raise WeightsError(
                f"{self._word}: {self.name} has no {name}. It must be a folder in diffusers "
                "layout: unet or transformer, vae, text_encoder, tokenizer, scheduler, each with "
                "its files."
            )
        return read_json(self._place.fetch([name]) / name)

    def weights(self, component: str) -> dict[str, Tensor]:
        """Of one file or of all that an index names."""
        found: dict[str, Tensor] = {}
        for file in self.files(component):
            found.update(mapped_tensors(file))
        return found

    def files(self, component: str) -> list[Path]:
        """Fetched where they are elsewhere."""
        folder = self._folder(component)
        names = self._weights_names(folder)
        root = self._place.fetch(names)
        return [root / name for name in names]

    def tokenizer(self, component: str) -> Path:
        """The folder of that name."""
        folder = self._folder(component)
        names = [name for name in self._names if _is_in(name, folder)]
        if not any(name.endswith((".json", ".model", ".txt")) for name in names):
            raise WeightsError(
                f"{self._word}: {self.name} has no folder {component}. Add the base's own, or set "
                f"family.parts.{component} to a folder that has one."
            )
        return self._place.fetch(names) / folder

    def _config_name(self, component: str) -> str:
        return _join(self._folder(component), _CONFIGS.get(component, "config.json"))

    def _folder(self, component: str) -> str:
        inside = any(_is_in(name, component) for name in self._names)
        return "" if component == self._own and not inside else component

    def _weights_names(self, folder: str) -> list[str]:
        for name in _candidates(folder):
            if name not in self._names:
                continue
            if not name.endswith(".json"):
                return [name]
            return self._shards(folder, name)
        called = f"{self.name}/{folder}".rstrip("/")
        pickles = [one for one in self._names if _is_in(one, folder) and one.endswith(PICKLES)]
        if pickles:
            raise WeightsError(
                f"{self._word}: {called} has its weights as pickles only ({pickles[0]}), which can "
                "run any program when they are opened. Load it with diffusers and write it with "
                "save_pretrained(folder, safe_serialization=True), or look for a copy that has "
                ".safetensors."
            )
        raise WeightsError(
            f"{self._word}: {called} has no weights (looked for {_STEMS[0]}.safetensors and "
            f"{_STEMS[1]}.safetensors, in one file or with an index, full or .fp16). Fetch the "
            "folder again."
        )

    def _shards(self, folder: str, index: str) -> list[str]:
        held = read_json(self._place.fetch([index]) / index)
        files = sorted(set(held.get("weight_map", {}).values()))
        missing = [name for name in files if _join(folder, name) not in self._names]
        if missing or not files:
            raise WeightsError(
                f"{self._word}: {self.name}/{index} names {missing[0] if missing else 'no files'}"
                f"{', which is missing' if missing else ''}. Fetch the folder again."
            )
        return [_join(folder, name) for name in files]


def _candidates(folder: str) -> Iterator[str]:
    for variant in _VARIANTS:
        for stem in _STEMS:
            yield _join(folder, f"{stem}{variant}.safetensors")
            yield _join(folder, f"{stem}.safetensors.index{variant}.json")


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _is_in(name: str, folder: str) -> bool:
    return name.startswith(f"{folder}/") if folder else "/" not in name


def read_license(readme: str) -> str | None:
    """The licence that a model hub's README names before its text; None where there is none.

    Where it is "other", the name that stands beside it.
    """
    start, _, rest = readme.removeprefix("\ufeff").partition("---\n")
    front, end, _ = rest.partition("\n---")
    if start.strip() or not end:
        return None
    try:
        words = yaml.safe_load(front)
    except yaml.YAMLError:
        return None
    if not isinstance(words, dict):
        return None
    found = words.get("license")
    if found == "other":
        found = words.get("license_name", found)
    return ", ".join(map(str, found)) if isinstance(found, list) else str(found or "") or None
