"""The text of an image."""

from __future__ import annotations

import pytest
from datafolders import small_options

from raylora.base.errors import DataError
from raylora.base.storage import Entry
from raylora.data.captions import caption_of, read_caption
from raylora.data.source import Sample


def sample(concept: str | None = None) -> Sample:
    return Sample("3_cat/a.png", Entry("3_cat/a.png", 1, "t"), None, 3, concept)


@pytest.mark.parametrize(
    ("data", "caption"),
    [
        (b"  a cat, sitting \nsecond line", "a cat, sitting"),
        (b"one line", "one line"),
        (b"windows\r\nlines", "windows"),
        (b"\xef\xbb\xbfmarked", "marked"),
        ("日本語, タグ".encode(), "日本語, タグ"),
        ("no\u2028break".encode(), "no\u2028break"),
        (b"\nfirst line is blank", ""),
    ],
)
def test_a_caption_is_the_first_line_stripped(data: bytes, caption: str):
    assert read_caption(data) == caption


def test_an_unreadable_caption_says_why():
    with pytest.raises(DataError, match="is empty"):
        read_caption(b"")
    with pytest.raises(DataError, match=r"not UTF-8 \(byte 3\)"):
        read_caption("caf\u00e9".encode("latin-1"))


def test_the_file_goes_before_the_concept_and_that_before_the_default():
    options = small_options("x", default_caption="default")
    assert caption_of(sample("cat"), "written", options) == "written"
    assert caption_of(sample("cat"), None, options) == "cat"
    assert caption_of(sample(), None, options) == "default"
    assert caption_of(sample("cat"), "", options) == ""


def test_no_caption_at_all_is_an_error_with_the_remedies():
    with pytest.raises(
        DataError,
        match=r"3_cat/a.png: no caption .*looked for .txt and .caption.*data.default_caption",
    ):
        caption_of(sample(), None, small_options("x"))
