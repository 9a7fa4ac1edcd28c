"""A file's fingerprint follows its bytes, not its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raylora.base.fingerprint import file_fingerprint

MIB = 2**20


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_copy_has_the_same_and_another_training_has_another(tmp_path: Path):
    weights = np.random.default_rng(0).bytes(40 * MIB)
    other = np.random.default_rng(1).bytes(40 * MIB)
    first = file_fingerprint(written(tmp_path / "a", weights))
    assert first == file_fingerprint(written(tmp_path / "b", weights))
    assert first != file_fingerprint(written(tmp_path / "c", other))


@pytest.mark.parametrize("size_bytes", [0, 1, 1000, 64 * 1024, 64 * 1024 + 1, 3 * MIB])
def test_of_a_small_file_every_byte_counts(tmp_path: Path, size_bytes: int):
    data = np.random.default_rng(0).bytes(size_bytes)
    first = file_fingerprint(written(tmp_path / "a", data))
    assert first != file_fingerprint(written(tmp_path / "b", data + b"\0"))
    for place in {0, size_bytes // 2, size_bytes - 1} if size_bytes else ():
        changed = bytearray(data)
        changed[place] ^= 1
        assert first != file_fingerprint(written(tmp_path / "b", bytes(changed)))
