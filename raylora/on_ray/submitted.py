"""For entry points of `ray job submit`: results must outlive the job's unpacked folder."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from raylora.base.log import get_logger, start_logging

log = get_logger("store")


def keep_results(arguments: Sequence[str], folder: Path | None = None) -> list[str]:
    """The command's arguments, with an absolute store where a relative one would be lost.

    Ray unpacks a submitted working directory on the cluster and deletes it later, with everything
    a job wrote below it. Outside such a folder nothing changes.

    Args:
        arguments: of `raylora train` or `raylora tune`.
        folder: where the command runs; None is the current folder.
    """
    folder = folder or Path.cwd()
    store = _store(arguments, folder)
    if not _unpacked_by_ray(folder) or "://" in store or Path(store).is_absolute():
        return list(arguments)
    home = Path(os.environ.get("RAYLORA_HOME") or "~/raylora-results").expanduser().absolute()
    kept = home / store
    start_logging()
    log.info("%r is inside this job's folder, which Ray deletes; results go to %s", store, kept)
    return [*arguments, "--set", f"store={kept}"]


def _unpacked_by_ray(folder: Path) -> bool:
    """Whether the folder is .../working_dir_files/_ray_pkg_<hash> or below it."""
    names = folder.parts
    return any(
        above == "working_dir_files" and name.startswith("_ray_pkg_")
        for above, name in pairwise(names)
    )


def _store(arguments: Sequence[str], folder: Path) -> str:
    """The store as the command will see it: the last --set, the file's, its job's, the default."""
    given, _ = _options().parse_known_args(list(arguments))
    stores: list[str] = [
        text.removeprefix("store=") for text in given.set if text.startswith("store=")
    ]
    if stores:
        return stores[-1]
    tree = _read(folder, given.file)
    job = _read(folder, given.job or tree.get("job"))
    return str(tree.get("store") or job.get("store") or "results")


def _options() -> argparse.ArgumentParser:
    """The few words of the command line that matter here; the command judges all of them."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("file", nargs="?")
    parser.add_argument("--job")
    parser.add_argument("--output")
    parser.add_argument("--apply")
    parser.add_argument("--set", action="append", default=[])
    return parser


def _read(folder: Path, file: Any) -> dict[str, Any]:
    """What the YAML file holds; {} when it cannot be read, which the command itself will say."""
    if not isinstance(file, str):
        return {}
    try:
        tree = yaml.safe_load((folder / file).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}
