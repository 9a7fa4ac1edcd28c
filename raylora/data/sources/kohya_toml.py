"""sd-scripts' data set files, TOML or JSON, as sets of a job.

The keys, the tables where each may stand, the order in which tables are asked and the values of
what nobody gives are those of `library/config_util.py` there, so a file trains here as it did
there. Ours on purpose: all mistakes at once, each with its place, and an error where sd-scripts
leaves a subset out (one that comes twice, or has less than one repeat).
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from raylora.base.errors import JobError
from raylora.base.log import get_logger
from raylora.base.lookup import did_you_mean
from raylora.base.storage import open_storage

log = get_logger("data")


class _Takes(NamedTuple):
    """A kind of value: how a person is told of it, and whether a value is of it."""

    said: str
    holds: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_whole(value)


def _is_pair(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(of, value))


def _is_range(value: Any) -> bool:
    try:
        return _is_pair(_as_range(value), _is_number)
    except ValueError:
        return False


def _as_range(value: Any) -> Any:
    """Two numbers also of sd-scripts' other form, the "0.5,2.0" of its command line."""
    return [float(part) for part in value.split(",")] if isinstance(value, str) else value


_FLAG = _Takes("true or false", lambda value: isinstance(value, bool))
_TEXT = _Takes("a text in quotes", lambda value: isinstance(value, str))
_TABLE = _Takes("a table", lambda value: isinstance(value, dict))
_WHOLE = _Takes("a whole number", _is_whole)
_COUNT = _Takes("a whole number from 1 on", lambda value: _is_whole(value) and value >= 1)
_NUMBER = _Takes("a number", _is_number)
_SIZE = _Takes(
    "a whole number or [width, height]",
    lambda value: _is_whole(value) or _is_pair(value, _is_whole),
)
_RANGE = _Takes('[lowest, highest] or "lowest,highest"', _is_range)

_GENERAL, _DATASETS, _SUBSETS = "[general]", "[[datasets]]", "[[datasets.subsets]]"
_ANYWHERE = (_GENERAL, _DATASETS, _SUBSETS)
_NOT_OF_A_SUBSET = (_GENERAL, _DATASETS)
_ONLY_OF_A_SUBSET = (_SUBSETS,)


class _Key(NamedTuple):
    """What a key takes, and the tables where sd-scripts lets it stand."""

    takes: _Takes
    tables: tuple[str, ...] = _ANYWHERE


_KEYS = {
    "batch_size": _Key(_WHOLE, _NOT_OF_A_SUBSET),
    "resolution": _Key(_SIZE, _NOT_OF_A_SUBSET),
    "enable_bucket": _Key(_FLAG, _NOT_OF_A_SUBSET),
    "bucket_no_upscale": _Key(_FLAG, _NOT_OF_A_SUBSET),
    "min_bucket_reso": _Key(_WHOLE, _NOT_OF_A_SUBSET),
    "max_bucket_reso": _Key(_WHOLE, _NOT_OF_A_SUBSET),
    "bucket_reso_steps": _Key(_WHOLE, _NOT_OF_A_SUBSET),
    "validation_split": _Key(_NUMBER, _NOT_OF_A_SUBSET),
    "validation_seed": _Key(_WHOLE, _NOT_OF_A_SUBSET),
    "network_multiplier": _Key(_NUMBER, _NOT_OF_A_SUBSET),
    "resize_interpolation": _Key(_TEXT),
    "num_repeats": _Key(_COUNT),
    "shuffle_caption": _Key(_FLAG),
    "color_aug": _Key(_FLAG),
    "flip_aug": _Key(_FLAG),
    "random_crop": _Key(_FLAG),
    "face_crop_aug_range": _Key(_RANGE),
    "enable_wildcard": _Key(_FLAG),
    "caption_separator": _Key(_TEXT),
    "keep_tokens": _Key(_WHOLE),
    "keep_tokens_separator": _Key(_TEXT),
    "secondary_separator": _Key(_TEXT),
    "caption_prefix": _Key(_TEXT),
    "caption_suffix": _Key(_TEXT),
    "token_warmup_min": _Key(_WHOLE),
    "token_warmup_step": _Key(_NUMBER),
    "caption_dropout_rate": _Key(_NUMBER),
    "caption_dropout_every_n_epochs": _Key(_WHOLE),
    "caption_tag_dropout_rate": _Key(_NUMBER),
    "custom_attributes": _Key(_TABLE),
    "caption_extension": _Key(_TEXT),
    "class_tokens": _Key(_TEXT),
    "cache_info": _Key(_FLAG),
    "image_dir": _Key(_TEXT, _ONLY_OF_A_SUBSET),
    "is_reg": _Key(_FLAG, _ONLY_OF_A_SUBSET),
    "alpha_mask": _Key(_FLAG, _ONLY_OF_A_SUBSET),
    "metadata_file": _Key(_TEXT, _ONLY_OF_A_SUBSET),
    "conditioning_data_dir": _Key(_TEXT, _ONLY_OF_A_SUBSET),
}
# What sd-scripts refuses in a data set of each kind; in [general] it is passed over there.
_NOT_BESIDE: dict[str, tuple[str, ...]] = {
    "conditioning_data_dir": ("class_tokens", "is_reg", "alpha_mask", "metadata_file"),
    "metadata_file": ("class_tokens", "caption_extension", "cache_info", "is_reg"),
    "image_dir": (),
}
_WORDS = {
    "image_dir": "folder",
    "metadata_file": "manifest",
    "conditioning_data_dir": "mask_folder",
    "num_repeats": "repeats",
    "caption_extension": "caption_extensions",
}
# An empty text means none to sd-scripts, where it still hides the text of an outer table.
_NONE_IF_EMPTY = (
    "keep_tokens_separator",
    "secondary_separator",
    "caption_prefix",
    "caption_suffix",
)
# key: the value that asks for nothing (batch_size has none), what to say of any other
_UNUSED: dict[str, tuple[Any, str]] = {
    "batch_size": (None, "a step holds training.images_per_step images"),
    "network_multiplier": (1, "sd-scripts does not use it either"),
    "cache_info": (False, "the cache remembers sizes and captions by itself"),
}
# The only one of `custom_attributes` that sd-scripts reads.
_PRESERVATION = "diff_output_preservation"
# The defaults of sd-scripts that are not raylora's.
_DEFAULTS = {"repeats": 1, "enable_bucket": False}
_BUCKET_DEFAULTS = {"min_bucket_reso": 256, "max_bucket_reso": 1024, "bucket_reso_steps": 64}


def read_kohya_sets(url: str, job: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The sets of a data set file of sd-scripts in raylora's words, so that nobody rewrites it.

    Args:
        url: a path, file:// or s3://, ending in .toml or .json.
        job: the words of the job's own `data:` section, unchecked. They fill what the file leaves
            open, as sd-scripts' command line does: its defaults are not put before them.

    Returns:
        One entry for each subset, in the file's order, with the words that the file gives, `group`
        (the number of its data set) and those defaults of sd-scripts that are not raylora's. Types
        have been looked at, ranges have not.

    Raises:
        JobError: everything that is wrong with the file, each with its place in it.
        StorageError: it cannot be read.
    """
    tree = _parsed(url)
    problems = [f"{url}: {problem}" for problem in _problems(tree)]
    if problems:
        raise JobError(problems)
    general = tree.get("general", {})
    for notice in _notices(general, tree["datasets"]):
        log.warning("%s: %s", url, notice)
    return [
        _set((general, dataset, subset), _kind(dataset["subsets"]), group, job or {})
        for group, dataset in enumerate(tree["datasets"])
        for subset in dataset["subsets"]
    ]


def _parsed(url: str) -> dict[str, Any]:
    name = url.rpartition("/")[2]
    ending = name.rpartition(".")[2].lower()
    if ending not in ("toml", "json"):
        raise JobError(f"{url}: a data set file ends in .toml or .json.")
    try:
        text = open_storage(url.removesuffix(name) or ".").read(name).decode("utf-8-sig")
        tree = tomllib.loads(text) if ending == "toml" else json.loads(text)
    except UnicodeDecodeError:
        raise JobError(f"{url} is not a text file in UTF-8. Save it as UTF-8.") from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise JobError(f"{url} is not {ending.upper()}: {error}.") from None
    if not isinstance(tree, dict):
        raise JobError(f"{url} must hold an object with general and datasets.")
    return tree


def _problems(tree: dict[str, Any]) -> Iterator[str]:
    general, datasets = tree.get("general", {}), tree.get("datasets")
    outside = {key: value for key, value in tree.items() if key not in ("general", "datasets")}
    yield from _key_problems(outside, "", "", ("general", "datasets"))
    if isinstance(general, dict):
        yield from _key_problems(general, "general.", _GENERAL, _keys_of(_GENERAL))
    else:
        yield f"general is {_shown(general)}: it takes a table, begun with {_GENERAL}."
    if not _are_tables(datasets):
        yield f"datasets: give one table or more, each begun with {_DATASETS}."
        return
    for number, dataset in enumerate(datasets):
        yield from _dataset_problems(dataset, f"datasets[{number}]")


def _dataset_problems(dataset: dict[str, Any], place: str) -> Iterator[str]:
    own = {key: value for key, value in dataset.items() if key != "subsets"}
    subsets = dataset.get("subsets")
    if not _are_tables(subsets):
        yield from _key_problems(own, f"{place}.", _DATASETS, (*_keys_of(_DATASETS), "subsets"))
        yield f"{place}.subsets: give one table or more, each begun with {_SUBSETS}."
        return
    kind = _kind(subsets)
    allowed = (*_keys_of(_DATASETS, kind), "subsets")
    yield from _key_problems(own, f"{place}.", _DATASETS, allowed, kind)
    for key in ("metadata_file", "conditioning_data_dir"):
        if 0 < sum(key in subset for subset in subsets) < len(subsets):
            yield (
                f"{place}: some of its subsets have {key} and some have not, which sd-scripts "
                f"refuses too. Give each kind a {_DATASETS} of its own."
            )
    for number, subset in enumerate(subsets):
        where = f"{place}.subsets[{number}]"
        yield from _key_problems(subset, f"{where}.", _SUBSETS, _keys_of(_SUBSETS, kind), kind)
        if "image_dir" not in subset and "metadata_file" not in subset:
            yield f"{where}.image_dir: missing. Give the folder of the images."
    yield from _repeated(
        subsets, place, "metadata_file" if kind == "metadata_file" else "image_dir"
    )


def _key_problems(
    table: dict[str, Any], place: str, name: str, allowed: Sequence[str], kind: str = "image_dir"
) -> Iterator[str]:
    for key, value in table.items():
        where, known = f"{place}{key}", _KEYS.get(key)
        if known is None:
            yield f"{where}: no such key.{_elsewhere(key) or did_you_mean(key, allowed)}"
        elif name not in known.tables:
            yield f"{where}: it may stand in {' or '.join(known.tables)} only. Move it there."
        elif key in _NOT_BESIDE[kind]:
            yield f"{where}: sd-scripts does not take it in a data set with {kind}. Take it out."
        elif not known.takes.holds(value):
            yield f"{where} is {_shown(value)}: it takes {known.takes.said}."
        elif key == "custom_attributes" and not _FLAG.holds(value.get(_PRESERVATION, False)):
            yield (
                f"{where}.{_PRESERVATION} is {_shown(value[_PRESERVATION])}: it takes {_FLAG.said}."
            )


def _elsewhere(key: str) -> str:
    if key == "prior_loss_weight":
        return " It belongs to the whole job: write data.prior_loss_weight there."
    return ""


def _repeated(subsets: Sequence[dict[str, Any]], place: str, key: str) -> Iterator[str]:
    """The same images twice in one data set; sd-scripts keeps the first and drops the others."""
    first: dict[str, int] = {}
    for number, subset in enumerate(subsets):
        value = subset.get(key)
        if not isinstance(value, str):
            continue
        before = first.setdefault(value.rstrip("/"), number)
        if before != number:
            yield (
                f"{place}.subsets[{number}].{key} is that of {place}.subsets[{before}], and "
                "sd-scripts would leave the second out. Remove one and set num_repeats, or give it "
                f"a {_DATASETS} of its own."
            )


def _kind(subsets: Sequence[dict[str, Any]]) -> str:
    """The key that tells what a data set is; masks are asked for first, as in sd-scripts."""
    for key in ("conditioning_data_dir", "metadata_file"):
        if all(key in subset for subset in subsets):
            return key
    return "image_dir"


def _keys_of(name: str, kind: str = "image_dir") -> tuple[str, ...]:
    return tuple(
        key for key, known in _KEYS.items() if name in known.tables and key not in _NOT_BESIDE[kind]
    )


def _are_tables(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _notices(general: dict[str, Any], datasets: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What the file asks for in vain, each once."""
    tables = [general, *datasets, *(subset for one in datasets for subset in one["subsets"])]
    for key, (nothing, reason) in _UNUSED.items():
        if any(key in table and table[key] != nothing for table in tables):
            yield f"{key} is not used: {reason}."
    if any(set(table.get("custom_attributes", {})) - {_PRESERVATION} for table in tables):
        yield f"custom_attributes is not used, except {_PRESERVATION}: nothing reads the others."


def _set(
    tables: Sequence[dict[str, Any]], kind: str, group: int, job: Mapping[str, Any]
) -> dict[str, Any]:
    # Inner tables come last and hide the outer ones.
    found = {key: value for table in tables for key, value in table.items()}
    passed_over = {"subsets", "custom_attributes", *_UNUSED, *_NOT_BESIDE[kind]}
    words = {
        _WORDS.get(key, key): _translated(key, value)
        for key, value in found.items()
        if key not in passed_over
    }
    if _PRESERVATION in found.get("custom_attributes", {}):
        words["output_preservation"] = found["custom_attributes"][_PRESERVATION]
    given = {word: value for word, value in job.items() if value is not None} | words
    defaults = _DEFAULTS | (_BUCKET_DEFAULTS if given.get("enable_bucket") else {})
    unsaid = {word: value for word, value in defaults.items() if word not in given}
    return {**words, **unsaid, "group": group}


def _translated(key: str, value: Any) -> Any:
    if key == "caption_extension":
        return [value]
    if key == "face_crop_aug_range":
        return _as_range(value)
    return None if key in _NONE_IF_EMPTY and not value else value
