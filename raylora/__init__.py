"""raylora trains, sweeps and previews LoRAs for image diffusion models on any fleet of GPUs.

The small public surface: `load_job`, `train`, `plan`, `read_adapter`, `write_adapter`. All else may
move.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from raylora.base.version import VERSION

__version__ = VERSION
__all__ = ["__version__", "load_job", "plan", "read_adapter", "train", "write_adapter"]

if TYPE_CHECKING:
    from raylora.adapt.lora_file import read_adapter, write_adapter
    from raylora.forecast import plan
    from raylora.job import load_job
    from raylora.local import train

_HOMES = {
    "load_job": "raylora.job",
    "plan": "raylora.forecast",
    "train": "raylora.local",
    "read_adapter": "raylora.adapt.lora_file",
    "write_adapter": "raylora.adapt.lora_file",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import raylora` alone loads no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'raylora' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
