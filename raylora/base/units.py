"""Numbers as people read them."""

from __future__ import annotations

GIB = 2**30


def gib(count: float) -> str:
    """Bytes as GiB with two digits, e.g. '1.25 GiB'."""
    return f"{count / GIB:.2f} GiB"


def kib(count: float) -> str:
    """Bytes as KiB with one digit, e.g. '231.0 KiB'."""
    return f"{count / 2**10:.1f} KiB"


def mib(count: float) -> str:
    """Bytes as MiB with one digit, e.g. '7.1 MiB'."""
    return f"{count / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds as '42 s', '3 min 05 s' or '2 h 10 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
