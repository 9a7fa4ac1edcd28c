"""Makes the table of what training steps need that comes with raylora.

    python benchmarks/footprints.py [NAME ...]

Each usual base, by its short name, at three sizes in two arithmetics: its own models, adapter, step
and loss are run on the meta device, without weights and without a GPU. Written to
raylora/memory/footprints/; run it anew when a model, a network or the step changes.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

from raylora.base.lookup import did_you_mean
from raylora.measure.on_meta import table_entry
from raylora.memory.table import table_text
from raylora.weights.short_names import SHORT_NAMES

FOLDER = Path(__file__).parents[1] / "raylora" / "memory" / "footprints"
SIDES = (512, 768, 1024)
PRECISIONS = ("bf16", "fp32")


def main() -> None:
    """Measure the bases that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    names = parser.parse_args().names or list(SHORT_NAMES)
    for name in names:
        if name not in SHORT_NAMES:
            sys.exit(f"{name!r} is no usual base.{did_you_mean(name, list(SHORT_NAMES))}")
    logging.disable(logging.WARNING)
    FOLDER.mkdir(exist_ok=True)
    for name in names:
        began = time.perf_counter()
        every = [(side, precision) for precision in PRECISIONS for side in SIDES]
        entries = [table_entry(name, (side, side), precision) for side, precision in every]
        text = table_text(name, entries)
        (FOLDER / f"{name}.json").write_text(text)
        seconds = time.perf_counter() - began
        print(f"{name:14} {len(entries)} entries  {len(text) / 1024:.0f} KiB  {seconds:.0f} s")


if __name__ == "__main__":
    main()
