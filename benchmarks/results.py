"""Where results go: benchmarks/results/<benchmark>-<machine>.json, and .md beside it for people."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
_PACKAGES = ("torch", "diffusers", "peft", "ray", "pyarrow")


def machine() -> dict[str, Any]:
    """What was measured on, in words."""
    name = platform.processor() or platform.machine()
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
        name = found.group(1).strip() if found else name
    except OSError:
        pass
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in _PACKAGES},
        "load_average": [round(number, 1) for number in os.getloadavg()],
        "date": datetime.date.today().isoformat(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def slug(facts: dict[str, Any]) -> str:
    """`amd-epyc-2-cores`, for file names."""
    words = re.sub(r"[^a-z0-9]+", "-", str(facts["processor"]).lower()).strip("-")
    return f"{words}-{facts['cores']}-cores"


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, to four digits."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def write(benchmark: str, result: dict[str, Any], text: str) -> Path:
    """Both files; the path of the .md."""
    FOLDER.mkdir(exist_ok=True)
    stem = FOLDER / f"{benchmark}-{slug(result['machine'])}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(text)
    return stem.with_suffix(".md")


def machine_line(facts: dict[str, Any]) -> str:
    """One line for the head of a table."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    load = " ".join(str(number) for number in facts["load_average"])
    return (
        f"{facts['processor']}, {facts['cores']} cores, Python {facts['python']}, {versions}; "
        f"load average {load} when it ended; {facts['date']}."
    )
