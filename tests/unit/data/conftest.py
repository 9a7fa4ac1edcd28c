"""Where the tests of raylora/data keep their caches."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def cache_url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/cache"


@pytest.fixture(autouse=True)
def _own_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLORA_LOCAL_CACHE", str(tmp_path / "local"))
