"""The container: the library's layout to the byte, and one sentence for every fault."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.testing import assert_close

from raylora.adapt import safetensors_format as container
from raylora.base.errors import WeightsError

TENSORS = {
    "b.half": torch.arange(6, dtype=torch.float16).reshape(2, 3),
    "a.alpha": torch.tensor(2.0),
    "c.brain": torch.full((3,), 0.1, dtype=torch.bfloat16),
    "d.double": torch.full((2, 2), 0.1, dtype=torch.float64),
    "a.empty": torch.empty(0, 4),
    "e.eight": torch.ones(5).to(torch.float8_e4m3fn),
    "f.flag": torch.tensor(1),
    "g.count": torch.arange(3, dtype=torch.int32),
}
WORDS = {"ss_z": "last", "ss_a": 'é "quoted" \\ \n\t\x01\x7f/', "raylora.job": "{}"}


def read(data: bytes) -> dict[str, Tensor]:
    stream, size, called = container.open_source(data)
    return container.read_tensors(stream, container.read_header(stream, size, called))


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def raw(rows: Any, body: bytes = b"", *, length: int | None = None) -> bytes:
    text = rows if isinstance(rows, bytes) else json.dumps(rows).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def row(start: int, end: int, shape: Any = (1,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_bytes_lie_where_the_library_puts_them() -> None:
    ours, library = container.pack(TENSORS, WORDS), save(TENSORS, WORDS)
    assert len(ours) == len(library)
    (our_rows, our_body), (rows, body) = parts(ours), parts(library)
    assert our_rows == rows
    assert [name for name in our_rows if name != "__metadata__"] == [
        name for name in rows if name != "__metadata__"
    ]
    assert our_body == body


def test_the_library_reads_ours_and_we_read_the_librarys() -> None:
    for found in (load(container.pack(TENSORS, WORDS)), read(save(TENSORS, WORDS))):
        assert set(found) == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert found[name].dtype == tensor.dtype
            assert_close(found[name].float(), tensor.float(), rtol=0, atol=0)


def test_the_same_content_gives_the_same_bytes_in_whatever_order_it_comes() -> None:
    backwards = dict(reversed(TENSORS.items()))
    words = dict(reversed(WORDS.items()))
    assert container.pack(backwards, words) == container.pack(TENSORS, WORDS)


def test_a_strided_tensor_is_written_in_its_own_order() -> None:
    square = torch.arange(6.0).reshape(2, 3)
    assert container.pack({"a": square.T}, {}) == container.pack({"a": square.T.contiguous()}, {})


def test_words_that_are_not_utf8_do_not_stop_a_save() -> None:
    data = container.pack({"a": torch.ones(1)}, {"folder": "caf\udce9"})
    assert load(data)["a"] == 1
    assert parts(data)[0]["__metadata__"] == {"folder": "caf?"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"abc", "is not a safetensors file"),
        (b"\x08\0\0\0\0\0\0\0", "is not a safetensors file"),
        (b"PK\x03\x04" + bytes(100), "is a pickle .*can run code"),
        (b"\x80\x02}q\x00(X\x05" + bytes(100), "is a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"GGUF" + bytes(60), "is a GGUF file"),
        (raw(b"{}", length=2**63), "claims a header of 9223372036854775808 bytes and has 10"),
        (raw(b"{}", length=1000), "is cut short: its header has 1000 bytes and the file 10"),
        (raw(b"{not json"), "header is not JSON"),
        (raw(b'{"a":' + b"[" * 100_000), "header is not JSON"),
        (raw(b"{\xff\xfe}"), "header is not JSON"),
        (raw(b'{"a":1,"a":2}'), "names 'a' twice"),
        (raw({"__metadata__": {"a": 1}}), "metadata is not text by name"),
        (raw({"__metadata__": ["a"]}), "metadata is not text by name"),
        (raw({"a": [1]}), "row of 'a' is malformed"),
        (raw({"a": row(0, 4, dtype="U16")}, bytes(4)), "a holds U16, which no LoRA has"),
        (raw({"a": row(0, 4, (-1,))}, bytes(4)), "the shape of 'a' is"),
        (raw({"a": row(0, 4, (2**40, 2**40))}, bytes(4)), "and has 4 bytes"),
        (raw({"a": row(4, 0)}, bytes(4)), "and has -4 bytes"),
        (raw({"a": row(0, 4), "b": row(2, 6)}, bytes(6)), "'b' overlaps the tensor before it"),
        (raw({"a": row(0, 4), "b": row(0, 4)}, bytes(4)), "overlaps the tensor before it"),
        (raw({"a": row(-4, 0)}, bytes(4)), "'a' overlaps"),
        (raw({"a": row(0, 4), "b": row(8, 12)}, bytes(12)), "'b' leaves a hole"),
        (raw({"a": row(0, 4)}, bytes(3)), "is cut short: 0.0 MiB of its tensors are missing"),
        (raw({"a": row(0, 4)}, bytes(9)), "5 bytes after its tensors belong to none"),
    ],
)
def test_a_broken_file_is_refused_in_one_sentence(data: bytes, message: str) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        read(data)
    assert "\n" not in str(caught.value)
    with pytest.raises(safetensors.SafetensorError):  # the library agrees that it is broken
        load(data)


def test_every_truncation_is_refused() -> None:
    data = container.pack(TENSORS, WORDS)
    for length in range(len(data)):
        with pytest.raises(WeightsError):
            read(data[:length])


def test_a_header_length_that_looks_like_a_pickle_is_still_read() -> None:
    # 0x0280 bytes of header begin with the two bytes of a pickle of protocol 2.
    empty = {"a": row(0, 4), "__metadata__": {"fill": ""}}
    fill = 0x280 - len(json.dumps(empty))
    data = raw({**empty, "__metadata__": {"fill": "x" * fill}}, bytes(4))
    assert data.startswith(b"\x80\x02")
    assert read(data)["a"] == 0


def test_a_missing_file_and_a_folder_are_named(tmp_path: Any) -> None:
    with pytest.raises(WeightsError, match=r"absent\.safetensors does not exist"):
        container.open_source(tmp_path / "absent.safetensors")
    with pytest.raises(WeightsError, match="is a folder"):
        container.open_source(tmp_path)


def test_a_header_is_checked_before_any_tensor_is_read() -> None:
    data = container.pack({"a": torch.ones(1000)}, {})
    stream = io.BytesIO(data)
    header = container.read_header(stream, len(data), "it")
    assert stream.tell() == header.body_start
