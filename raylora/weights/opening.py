"""Which source a job's words for a base mean."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from raylora.base.errors import WeightsError
from raylora.base.fetch import is_remote, local_path
from raylora.weights.folder import FolderSource, open_place
from raylora.weights.hub import HubRepository
from raylora.weights.recognise import FAMILIES
from raylora.weights.short_names import SHORT_NAMES, show_terms
from raylora.weights.single_file import ComponentFile, open_checkpoint
from raylora.weights.source import Source, refuse_pickle

_UNET = ("unet", "vae", "text_encoder")
_MODELS = {
    "sd15": _UNET,
    "sd2": _UNET,
    "sdxl": (*_UNET, "text_encoder_2"),
    "sd3": ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"),
    "flux1": ("transformer", "vae", "text_encoder", "text_encoder_2"),
}
_OPTIONAL = ("text_encoder_3",)
"""SD 3 draws without its T5."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_parts(kind: str, parts: Mapping[str, str]) -> None:
    """WeightsError where `family.parts` names what the family has not."""
    known = (*_MODELS[kind], *_tokenizers(kind), "scheduler", "config")
    for name in parts:
        if name not in known:
            raise WeightsError(
                f"family.parts.{name} is no part of {kind}, which has {', '.join(known)}."
            )


def _tokenizers(kind: str) -> list[str]:
    encoders = [name for name in _MODELS[kind] if name.startswith("text_encoder")]
    return [name.replace("text_encoder", "tokenizer") for name in encoders]


def open_main(url: str, *, kind: str, config: str | None) -> Source:
    """What `family.weights` means; `config` is `family.parts.config`."""
    word = "family.weights"
    refuse_pickle(url, word)
    if is_file(url):
        configs = None if config is None else open_source(config, word="family.parts.config")
        return open_checkpoint(url, kind=kind, configs=configs)
    known = SHORT_NAMES.get(url)
    if known is not None and known.kind != kind and not local_path(url).is_dir():
        raise WeightsError(
            f"family.weights: {url} is a base of {FAMILIES[known.kind]}; set family.kind: "
            f"{known.kind}."
        )
    if config is not None:
        raise WeightsError(
            f"family.parts.config is for a single .safetensors checkpoint, and {url} brings its "
            "own configs. Leave it out."
        )
    return open_source(url, word=word)


def open_part(component: str, url: str, main: Source) -> Source:
    """What `family.vae` or one of `family.parts` means."""
    word = "family.vae" if component == "vae" else f"family.parts.{component}"
    refuse_pickle(url, word)
    if is_file(url):
        return ComponentFile(url, component, word=word, configs=main)
    return open_source(url, word=word, own=component)


def is_file(url: str) -> bool:
    """Whether it means one checkpoint's file rather than a folder."""
    return url.endswith(".safetensors") and not local_path(url).is_dir()


def open_source(url: str, *, word: str, own: str | None = None) -> Source:
    """A folder, local or not, or a repository of the model hub.

    Raises:
        WeightsError: it is none of these.
    """
    if is_remote(url) or local_path(url).is_dir():
        return FolderSource(open_place(url, word=word), word=word, own=own)
    known = SHORT_NAMES.get(url)
    if known is not None:
        show_terms(url)
        place = HubRepository(known.repository, word=word)
        return FolderSource(place, word=word, own=own, license_id=known.license)
    if _HUB_ID.fullmatch(url):
        return FolderSource(HubRepository(url, word=word), word=word, own=own)
    raise WeightsError(
        f"{word}: {local_path(url)} is not there. Give a folder in diffusers layout or a "
        ".safetensors file, local or s3://bucket/prefix; a model hub's id (owner/name); or one of "
        f"{', '.join(SHORT_NAMES)}."
    )


def check_whole(kind: str, main: Source, parts: Mapping[str, Source]) -> None:
    """WeightsError where a component is nowhere."""
    missing = [
        name
        for name in (*_MODELS[kind], "scheduler")
        if name not in _OPTIONAL and not parts.get(name, main).has(name)
    ]
    if missing:
        if not parts:
            _refuse_others_folder(kind, main, missing)
        words = ["family.vae" if name == "vae" else f"family.parts.{name}" for name in missing]
        raise WeightsError(
            f"{main.name} has no {' and no '.join(missing)}. Set {' and '.join(words)}: a folder "
            "or a .safetensors file, local or s3://, or a model hub's id; or choose the family "
            "that fits the weights."
        )


def _refuse_others_folder(kind: str, main: Source, missing: Sequence[str]) -> None:
    """WeightsError where the source is whole for another family, or has no model at all."""
    held = {name for models in _MODELS.values() for name in models if main.has(name)}
    if not held:
        raise WeightsError(
            f"family.weights: {main.name} is no folder in diffusers layout, since it has no "
            f"{' and no '.join(missing)} in it. Give the folder that has them."
        )
    others = [
        other
        for other, models in _MODELS.items()
        if other != kind and held - set(_OPTIONAL) == set(models) - set(_OPTIONAL)
    ]
    if others:
        raise WeightsError(
            f"family.weights: {main.name} has {', '.join(sorted(held))} and no "
            f"{' and no '.join(missing)}, as {' and '.join(FAMILIES[one] for one in others)} have. "
            f"Set family.kind: {' or '.join(others)}."
        )
