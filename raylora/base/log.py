"""Logging set-up: one line an event on standard error, never `print`."""

from __future__ import annotations

import logging
import os
import sys


def get_logger(name: str) -> logging.Logger:
    """The logger of one part of raylora; the name is the first word of its lines."""
    return logging.getLogger(f"raylora.{name}")


def start_logging(level: int = logging.INFO) -> None:
    """Send raylora's lines to standard error, once per process, and quieten libraries.

    Libraries read these words when they are imported, so this comes before them. They would
    otherwise tell a person of image processors that nobody uses, and draw bars between our lines.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # It warns at its import that kernels for 4-bit layers are absent, which nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    root = logging.getLogger("raylora")
    if root.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Short())
    root.addHandler(handler)
    root.setLevel(level)
    root.propagate = False


class _Short(logging.Formatter):
    """`step   120/2000 ...`: the part's name padded to six, a level only when it is not INFO."""

    def format(self, record: logging.LogRecord) -> str:
        part = record.name.rpartition(".")[2]
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return f"{part:<6} {level}{record.getMessage()}"
