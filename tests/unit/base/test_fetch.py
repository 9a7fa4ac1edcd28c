from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faultproxy import FaultProxy

from raylora.base import fetch
from raylora.base.errors import WeightsError
from raylora.base.fetch import keep_text, local_file
from raylora.base.storage import Storage, open_storage


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYLORA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_local_ones_are_taken_as_they_are(tmp_path: Path, home: Path):
    file = tmp_path / "a file"
    file.write_bytes(b"here")
    assert local_file(str(file)) == file
    assert local_file(f"file://{file}") == file
    assert not home.exists()
    with pytest.raises(WeightsError, match=r"family\.weights: there is no file .*/none"):
        local_file(str(tmp_path / "none"))


@pytest.mark.slow
def test_a_changed_object_is_fetched_again_and_others_are_not(s3_url: str, fault_proxy: FaultProxy):
    storage = open_storage(s3_url)
    for name in ("unet/a", "b", "empty"):
        storage.write(name, b"" if name == "empty" else name.encode())
    folder = fetch.fetch(storage, storage.entries())
    assert (folder / "unet" / "a").read_bytes() == b"unet/a"
    assert (folder / "empty").read_bytes() == b""
    storage.write("b", b"B")
    fault_proxy.reset_counts()
    assert fetch.fetch(storage, storage.entries()) == folder
    assert (folder / "b").read_bytes() == b"B"
    assert fault_proxy.count("GET") == 1
    (folder / "b").write_bytes(b"cut short")
    fetch.fetch(storage, storage.entries())
    assert (folder / "b").read_bytes() == b"B"


@pytest.mark.slow
def test_of_many_who_ask_one_fetches(s3_url: str, fault_proxy: FaultProxy):
    open_storage(s3_url).write("large", bytes(3 * 2**20))
    fault_proxy.reset_counts()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(local_file, [f"{s3_url}/large"] * 4))
    assert {path.stat().st_size for path in found} == {3 * 2**20}
    assert fault_proxy.count("GET") == 1


def test_an_object_that_is_replaced_meanwhile_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fetch, "_PIECE_BYTES", 4)
    storage = open_storage(str(tmp_path / "store"))
    storage.write("model", b"12345678")
    entries = storage.entries()
    read_range = type(storage).read_range

    def replacing(self: Storage, key: str, start: int, length: int) -> bytes:
        data = read_range(self, key, start, length)
        self.write(key, b"abcdefgh")
        return data

    monkeypatch.setattr(type(storage), "read_range", replacing)
    with pytest.raises(WeightsError, match="model was replaced while it was fetched"):
        fetch.fetch(storage, entries)
    monkeypatch.undo()
    monkeypatch.setenv("RAYLORA_HOME", str(tmp_path / "home"))
    folder = fetch.fetch(storage, storage.entries())
    assert (folder / "model").read_bytes() == b"abcdefgh"


def test_a_small_file_is_kept_whole(tmp_path: Path):
    keep_text(tmp_path / "a" / "b", "first")
    keep_text(tmp_path / "a" / "b", "second")
    assert [(one.name, one.read_text()) for one in (tmp_path / "a").iterdir()] == [("b", "second")]
