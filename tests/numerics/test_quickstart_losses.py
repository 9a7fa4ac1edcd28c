"""The quickstart's first losses are those that were recorded, so that no change moves them unseen.

python tests/numerics/test_quickstart_losses.py > tests/golden/quickstart_losses.json
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "quickstart_losses.json"
STEPS = 8


def losses(store: str) -> dict[str, list[float]]:
    """Training losses of the first steps, held-out losses before and after them."""
    import torch

    from raylora.assemble import open_store
    from raylora.job import load_job, with_overrides
    from raylora.local import train
    from raylora.training.report import read_metrics

    torch.set_num_threads(1)
    job = with_overrides(
        load_job(ROOT / "jobs" / "quickstart.yaml"),
        {
            "store": store,
            "family.weights": str(ROOT / "jobs/quickstart/tiny-sd"),
            "data.folder": str(ROOT / "jobs/quickstart/demo-data/train"),
            "validation.folder": str(ROOT / "jobs/quickstart/demo-data/holdout"),
            "training.steps": STEPS,
            "preview.prompts": [],
        },
    )
    train(job, prove=False)
    rows = read_metrics(open_store(job))
    return {
        "training": [row["loss"] for row in rows if "loss" in row],
        "validation": [row["validation"] for row in rows if "validation" in row],
    }


@pytest.mark.slow
def test_the_first_losses_of_the_quickstart_are_the_recorded_ones(tmp_path: Path):
    recorded = json.loads(GOLDEN.read_text())
    found = losses(str(tmp_path))
    assert len(recorded["training"]) == STEPS
    assert len(recorded["validation"]) == 2
    # Other CPU kinds sum in another order; what is drawn is the same everywhere.
    for word, values in recorded.items():
        assert found[word] == pytest.approx(values, rel=1e-4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        json.dump(losses(folder), sys.stdout, indent=1)
