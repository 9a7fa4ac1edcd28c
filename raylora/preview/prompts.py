"""Prompts in sd-scripts' form: flags behind a text, and files of prompts.

The flags and the keys are those of `--sample_prompts` there, so a file draws here as it did there.
Ours on purpose: what cannot be read is an error, where sd-scripts passes over it.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from typing import Any

from raylora.base.errors import OptionError, UserError
from raylora.base.lookup import did_you_mean
from raylora.base.storage import open_storage

_FLAG = re.compile(r"\s--(?=[A-Za-z])")
_FLAGS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "n": ("negative", str, "a text"),
    "w": ("width", int, "a whole number"),
    "h": ("height", int, "a whole number"),
    "d": ("seed", int, "a whole number"),
    "s": ("steps", int, "a whole number"),
    "l": ("guidance", float, "a number"),
    "g": ("embedded_guidance", float, "a number"),
    "ss": ("sampler", str, "a sampler"),
    "am": ("strength", float, "one number"),
}
_NOT_HERE = {
    "cn": "the picture that a ControlNet follows, and a LoRA is drawn without one",
    "i": "a picture to edit, which no base here takes",
    "ctr": "where Lumina stops its guidance",
    "rcfg": "how Lumina rescales its guidance",
    "fs": "the shift of a flow model's timesteps, which is the base's own here",
}
_KEYS = {
    "prompt": "prompt",
    "negative_prompt": "negative",
    "width": "width",
    "height": "height",
    "seed": "seed",
    "sample_steps": "steps",
    "scale": "guidance",
    "guidance_scale": "embedded_guidance",
    "sample_sampler": "sampler",
}
_KEYS_NOT_HERE = {
    "controlnet_image": "cn",
    "image": "i",
    "cfg_trunc_ratio": "ctr",
    "renorm_cfg": "rcfg",
    "flow_shift": "fs",
}
_STRENGTHS = "additional_network_multiplier"


def read_prompt(text: str) -> dict[str, Any]:
    """The words that a text with sd-scripts' flags gives: `a cat --n dog --w 768 --d 7`.

    Only `--` before a letter, after a space, begins a flag.

    Returns:
        `prompt` and what the flags set, as a section of `preview.prompts` names them.

    Raises:
        OptionError: a flag that is not known, means nothing for this base, or has no value.
    """
    prompt, *flags = _FLAG.split(f" {text}")
    words: dict[str, Any] = {"prompt": prompt.strip()}
    for flag in flags:
        name, _, value = flag.partition(" ")
        word, held = _flag(name.lower(), value.strip())
        if word in words:
            raise OptionError(f"--{name.lower()} is given twice. Take one out.")
        words[word] = held
    if flags and not words["prompt"]:
        raise OptionError(f"begins with a flag (--{flags[0]}). Write the prompt before the flags.")
    return words


def _flag(name: str, value: str) -> tuple[str, Any]:
    if name in _NOT_HERE:
        raise OptionError(f"--{name} is {_NOT_HERE[name]}. Take it out.")
    if name not in _FLAGS:
        raise OptionError(
            f"--{name} is no flag.{did_you_mean(name, _FLAGS)} A text that shall hold it goes into "
            "a section: {prompt: ...}."
        )
    word, kind, said = _FLAGS[name]
    if not value:
        raise OptionError(f"--{name} has no value: give {said}.")
    try:
        return word, kind(value)
    except ValueError:
        raise OptionError(f"--{name} is {value!r}: give {said}.") from None


def read_prompts_file(url: str) -> list[str | dict[str, Any]]:
    """The entries of a file of prompts, as `preview.prompts` holds them.

    Args:
        url: a path, file:// or s3://, ending in .txt (a prompt a line, `#` begins a line that is
            none), .toml (`[prompt]` with `[[prompt.subset]]`) or .json (a list).

    Raises:
        OptionError: it is no such file; the message names the entry.
        StorageError: it cannot be read.
    """
    read = {".txt": _lines, ".toml": _toml, ".json": _json}
    ending = url[url.rfind(".") :].lower()
    if ending not in read:
        raise OptionError(f"{url}: a file of prompts ends in .txt, .toml or .json.")
    name = url.rpartition("/")[2]
    try:
        text = open_storage(url.removesuffix(name) or ".").read(name).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise OptionError(f"{url} is not a text file in UTF-8. Save it as one.") from None
    try:
        found = read[ending](text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise OptionError(f"{url} is not {ending[1:].upper()}: {error}.") from None
    except UserError as error:
        raise OptionError(f"{url}: {error}") from None
    if not found:
        raise OptionError(f"{url} holds no prompts. Write one, or leave the option out.")
    return found


def _lines(text: str) -> list[str | dict[str, Any]]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def _toml(text: str) -> list[str | dict[str, Any]]:
    tree = tomllib.loads(text)
    common = tree.get("prompt")
    subsets = common.get("subset") if isinstance(common, dict) else None
    if not isinstance(common, dict) or not isinstance(subsets, list):
        raise OptionError("needs a table [prompt] and a [[prompt.subset]] for each picture.")
    others = [word for word in tree if word != "prompt"]
    if others:
        raise OptionError(f"[{others[0]}] is no table of prompts. All stands within [prompt].")
    shared = {key: value for key, value in common.items() if key != "subset"}
    return [
        _entry({**shared, **subset} if isinstance(subset, dict) else subset, number)
        for number, subset in enumerate(subsets)
    ]


def _json(text: str) -> list[str | dict[str, Any]]:
    entries = json.loads(text)
    if not isinstance(entries, list):
        raise OptionError("needs a list: a text or an object for each picture.")
    return [
        entry if isinstance(entry, str) else _entry(entry, number)
        for number, entry in enumerate(entries)
    ]


def _entry(given: Any, number: int) -> dict[str, Any]:
    """One prompt in raylora's words."""
    if not isinstance(given, Mapping) or not isinstance(given.get("prompt"), str):
        raise OptionError(f"prompt {number} is {given!r:.60}: it needs a `prompt`, a text.")
    words: dict[str, Any] = {}
    for key, value in given.items():
        if key in _KEYS_NOT_HERE:
            why = _NOT_HERE[_KEYS_NOT_HERE[key]]
            raise OptionError(f"prompt {number}: {key} is {why}. Take it out.")
        if key == _STRENGTHS:
            one = isinstance(value, list) and len(value) == 1
            words["strength"] = value[0] if one else value
        elif key in _KEYS:
            words[_KEYS[key]] = value
        else:
            raise OptionError(f"prompt {number}: {key} is no key.{did_you_mean(key, _KEYS)}")
    return words
