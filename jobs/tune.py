"""`raylora tune` for a cluster: ray job submit --working-dir . -- python jobs/tune.py SPACE ...

Takes the options of `raylora tune`. The copy of raylora beside this file is the one that runs.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raylora.cli import run
from raylora.on_ray.submitted import keep_results

if __name__ == "__main__":
    sys.exit(run(["tune", *keep_results(sys.argv[1:])]))
