"""The text of an image: read, chosen and drawn; counted as sd-scripts counts it."""

from __future__ import annotations

import json
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from raylora.base.errors import DataError
from raylora.base.seeds import draw_generator, uniforms
from raylora.data.captions import (
    CaptionWords,
    caption_lines,
    caption_of,
    draw_caption,
    has_warmup,
    is_drawn,
    is_dropped,
    read_caption,
    warmup_share,
)

GOLDEN: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parents[2] / "golden" / "captions.json").read_text(encoding="utf-8")
)
# Words of textual inversion, swapped into a caption. It is not a feature here, on purpose.
LEFT_OUT = [case for case in GOLDEN["deterministic"] if "replacements" in case]
DETERMINISTIC = [case for case in GOLDEN["deterministic"] if "replacements" not in case]

TAG = st.text("abc ():.1\\é本", min_size=1, max_size=4).map(str.strip).filter(bool)
TAGS = st.lists(TAG, min_size=1, max_size=6)
SEED = st.integers(0, 2**32 - 1)


def generator(number: int = 0) -> np.random.Generator:
    return draw_generator(0, 0, number, "test")


def words(**given: Any) -> CaptionWords:
    return CaptionWords.model_validate(given)


def drawn(caption: str, seed: int = 0, *, warmup: float = 1.0, **given: Any) -> str:
    return draw_caption(caption, words(**given), generator(seed), warmup=warmup)


# Reading


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"  a cat, sitting \nsecond line", "  a cat, sitting \nsecond line"),
        (b"windows\r\nlines\r\n", "windows\nlines\n"),
        (b"old mac\rlines", "old mac\nlines"),
        (b"\xef\xbb\xbfmarked", "marked"),
        ("日本語, タグ".encode(), "日本語, タグ"),
        ("no\u2028break".encode(), "no\u2028break"),
    ],
)
def test_a_caption_file_is_read_whole(data: bytes, text: str):
    assert read_caption(data) == text


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf", b" \r\n\t\n"])
def test_a_blank_caption_file_is_refused(data: bytes):
    with pytest.raises(DataError, match="is empty"):
        read_caption(data)


def test_a_caption_file_that_is_not_utf_8_is_refused():
    with pytest.raises(DataError, match=r"not UTF-8 \(byte 3\)"):
        read_caption("caf\u00e9".encode("latin-1"))


@pytest.mark.parametrize(
    ("text", "first", "every"),
    [
        ("  a cat \n\n  a dog\n", "a cat", "a cat\na dog"),
        ("one line", "one line", "one line"),
        ("\nfirst is blank", "", "first is blank"),
        ("no\u2028break", "no\u2028break", "no\u2028break"),
    ],
)
def test_the_first_line_is_taken_and_with_wildcards_all_but_blank_ones(
    text: str, first: str, every: str
):
    assert caption_lines(text, words()) == first
    assert caption_lines(text, words(enable_wildcard=True)) == every


def test_the_file_goes_before_the_concept_then_class_tokens_then_the_default():
    both = words(class_tokens="class", default_caption="default")
    assert caption_of("written", "concept", both) == "written"
    assert caption_of("", "concept", both) == ""
    assert caption_of(None, "concept", both) == "concept"
    assert caption_of(None, None, both) == "class"
    assert caption_of(None, None, words(default_caption="default")) == "default"
    assert caption_of(None, None, words()) is None


def test_an_extension_without_a_dot_is_refused():
    with pytest.raises(ValidationError, match=r"'txt' does not begin with a dot. Write '\.txt'"):
        words(caption_extensions=[".caption", "txt"])


# As sd-scripts


@pytest.mark.parametrize("case", DETERMINISTIC, ids=lambda case: str(DETERMINISTIC.index(case)))
def test_a_caption_is_what_sd_scripts_makes_of_it(case: dict[str, Any]):
    given = words(**case["subset"])
    warmup = warmup_share(given, case.get("step", 0), case.get("max_train_steps", 1))
    caption = draw_caption(case["caption"], given, generator(), warmup=warmup)
    if is_dropped(given, 0.5, case.get("epoch", 1)):
        caption = ""
    assert caption == case["out"]


def test_only_replacements_are_left_out_of_the_comparison():
    assert len(DETERMINISTIC) == 83
    assert [case["replacements"] for case in LEFT_OUT] == [{"": "whole"}, {"a": "b", "b": "c"}]


@pytest.mark.parametrize("number", range(len(GOLDEN["outcome_counts"])))
def test_outcomes_are_drawn_as_often_as_sd_scripts_draws_them(number: int):
    case = GOLDEN["outcome_counts"][number]
    given, theirs = words(**case["subset"]), Counter(case["counts"])
    randoms = generator(number)
    ours = Counter(
        ""
        if is_dropped(given, float(uniforms(randoms, 1)[0]), 1)
        else draw_caption(case["caption"], given, randoms)
        for _ in range(case["n"])
    )
    assert set(ours) == set(theirs)
    distance = sum(
        (ours[text] - count) ** 2 / (ours[text] + count) for text, count in theirs.items()
    )
    assert distance < chi_square_quantile(len(theirs) - 1)


def chi_square_quantile(freedom: int, z: float = 3.09) -> float:
    """The value that chance exceeds once in 1,000 times (z = 3.09). Wilson and Hilferty 1931."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + z * math.sqrt(spread)) ** 3


def test_the_quantile_is_that_of_the_tables():
    assert chi_square_quantile(10) == pytest.approx(29.59, rel=0.01)
    assert chi_square_quantile(100) == pytest.approx(149.45, rel=0.001)


# Tags


@given(TAGS, st.integers(0, 7), SEED)
def test_kept_tags_stay_first_and_the_others_are_only_reordered(
    tags: list[str], keep: int, seed: int
):
    out = drawn(" ,".join(tags), seed, shuffle_caption=True, keep_tokens=keep).split(", ")
    assert out[:keep] == tags[:keep]
    assert Counter(out) == Counter(tags)


@given(TAGS, TAGS, TAGS, SEED)
def test_separators_hold_the_first_and_the_last_tags_and_keep_tokens_is_ignored(
    first: list[str], loose: list[str], last: list[str], seed: int
):
    caption = "|||".join(",".join([*part, " "]) for part in (first, loose, last))
    out = drawn(
        caption, seed, shuffle_caption=True, keep_tokens_separator="|||", keep_tokens=9
    ).split(", ")
    assert out[: len(first)] == first
    assert out[-len(last) :] == last
    assert Counter(out[len(first) : -len(last)]) == Counter(loose)


def test_the_tags_after_one_separator_are_shuffled_whatever_keep_tokens_says():
    options = {"shuffle_caption": True, "keep_tokens_separator": "|||", "keep_tokens": 9}
    outs = {drawn("a ||| b, c", seed, **options) for seed in range(20)}
    assert outs == {"a, b, c", "a, c, b"}


def test_empty_tags_are_left_out_only_beside_a_separator():
    options = {"shuffle_caption": True, "keep_tokens": 3, "keep_tokens_separator": "|||"}
    assert drawn("a, , b", **options) == "a, , b"
    assert drawn("a, , b |||", **options) == "a, b"


def test_a_separator_stays_in_a_caption_whose_tags_are_not_parted():
    assert drawn("a ||| b", keep_tokens_separator="|||") == "a ||| b"


@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_word_is_as_none(empty: str | None):
    given = ("keep_tokens_separator", "secondary_separator", "caption_prefix", "caption_suffix")
    assert drawn("a", shuffle_caption=True, **dict.fromkeys(given, empty)) == "a"


@given(TAGS, st.integers(0, 3), st.floats(0.01, 1), SEED)
def test_only_tags_that_may_move_are_left_out(tags: list[str], keep: int, rate: float, seed: int):
    out = drawn(", ".join(tags), seed, caption_tag_dropout_rate=rate, keep_tokens=keep)
    rest = iter([*tags, ""])  # "" is what splits out of an empty caption
    shown = out.split(", ")
    assert shown[: len(tags[:keep])] == tags[:keep]
    assert all(tag in rest for tag in shown)  # in the order they were written


def test_at_a_rate_of_one_only_kept_tags_are_left():
    options = {"caption_tag_dropout_rate": 1, "keep_tokens_separator": "|||"}
    assert drawn("a, b ||| c, d ||| e", **options) == "a, b, e"
    assert drawn("a, b", **options) == ""


@given(SEED)
def test_tags_joined_by_the_secondary_separator_move_as_one(seed: int):
    options = {"shuffle_caption": True, "secondary_separator": ";;;", "caption_separator": ", "}
    out = drawn("a;;;b, c, d;;;e;;;f", seed, **options)
    assert Counter(out.split(", ")) == Counter("abcdef")
    assert "a, b" in out
    assert "d, e, f" in out


def test_joined_tags_are_dropped_as_one():
    options = {"caption_tag_dropout_rate": 0.5, "secondary_separator": ";"}
    assert {drawn("a;b", seed, **options) for seed in range(20)} == {"a,b", ""}


@given(TAGS, SEED)
def test_tags_are_joined_by_a_comma_whatever_parts_them(tags: list[str], seed: int):
    out = drawn("/".join(tags), seed, shuffle_caption=True, caption_separator="/")
    assert Counter(out.split(", ")) == Counter(tags)


def test_spaces_that_part_tags_make_none_at_the_ends():
    assert (
        drawn(" a b ", caption_separator=" ", caption_tag_dropout_rate=1, keep_tokens=2) == "a, b"
    )


def test_tags_of_the_prefix_count_as_the_first_ones():
    options = {"shuffle_caption": True, "caption_prefix": "p,", "keep_tokens": 1}
    outs = {drawn("a, b", seed, **options) for seed in range(20)}
    assert outs == {"p, a, b", "p, b, a"}


def test_weights_are_text_like_any_other():
    caption = r"(cat:1.2), [dog], ((blue) sky:0.5), \(art\)"
    out = drawn(caption, 3, shuffle_caption=True, enable_wildcard=True)
    assert Counter(out.split(", ")) == Counter(caption.split(", "))


# Wildcards


@given(st.lists(st.text("ab, ", min_size=1, max_size=5), min_size=1, max_size=4), SEED)
def test_one_line_is_drawn_with_wildcards_and_the_first_taken_without(lines: list[str], seed: int):
    text = "\n".join(lines)
    assert drawn(text, seed, enable_wildcard=True) in lines
    assert drawn(text, seed) == lines[0]


def test_alternatives_are_drawn_alike_and_each_pair_of_braces_for_itself():
    randoms = generator()
    given = words(enable_wildcard=True)
    outs = Counter(draw_caption("{a|b|c} {d|e}", given, randoms) for _ in range(1200))
    assert set(outs) == {f"{one} {other}" for one in "abc" for other in "de"}
    distance = sum((count - 200) ** 2 / 200 for count in outs.values())
    assert distance < chi_square_quantile(5)


@pytest.mark.parametrize(
    ("written", "outcomes"),
    [
        ("{only}", {"only"}),
        ("{a|}", {"a", ""}),
        ("{{a|b}}", {"{a|b}"}),
        ("{{}}", {"{}"}),
        ("x {{ {a|b} }} y", {"x { a } y", "x { b } y"}),
        ("{a {{1}} |b}", {"a {1} ", "b"}),
        ("{a, b|c}, d", {"a, b, d", "c, d"}),
        # Not well formed: as sd-scripts leaves them.
        ("{}", {"{}"}),
        ("{a|b", {"{a|b"}),
        ("a|b}", {"a|b}"}),
        ("}a{", {"}a{"}),
        ("{a}}", {"{a}"}),
        ("{{a|b}", {"{a|b}"}),
        ("{a{b|c}", {"a{b", "c"}),
        ("{a|{b|c}}", {"{a|{b|c}"}),
        ("{{{a|b}}}", {"{a", "{b}"}),
        ("{a|b}{", {"a{", "b{"}),
    ],
)
def test_braces_are_read_as_sd_scripts_reads_them(written: str, outcomes: set[str]):
    assert {drawn(written, seed, enable_wildcard=True) for seed in range(30)} == outcomes


@given(st.text("{}|a, \n", max_size=30), SEED)
def test_any_braces_give_one_line_and_nothing_that_was_not_written(text: str, seed: int):
    out = drawn(text, seed, enable_wildcard=True)
    assert "\n" not in out
    assert any(not Counter(out) - Counter(line) for line in text.split("\n"))


@given(st.text("{}|a, ", max_size=30), SEED)
def test_braces_are_text_without_wildcards(text: str, seed: int):
    assert drawn(text, seed) == text


# Warm-up


@pytest.mark.parametrize(
    ("step", "total", "given", "share"),
    [
        (0, 100, {}, 1.0),
        (0, 100, {"token_warmup_step": 10}, 0.0),
        (5, 100, {"token_warmup_step": 10}, 0.5),
        (20, 100, {"token_warmup_step": 10}, 2.0),
        (5, 100, {"token_warmup_step": 0.1}, 0.5),
        (5, 1000, {"token_warmup_step": 0.1}, 0.05),
        (1, 2, {"token_warmup_step": 1}, 1.0),
        (0, 9, {"token_warmup_step": 0.1}, 1.0),  # less than one step is none
    ],
)
def test_a_warmup_below_one_is_a_share_of_the_run(
    step: int, total: int, given: dict[str, Any], share: float
):
    assert warmup_share(words(**given), step, total) == share


@given(st.integers(0, 120), st.integers(0, 9), st.integers(1, 100), st.floats(0, 3))
@example(count=100, least=0, steps=100, runs=0.29)  # 0.29 * 100 is below 29 in floats
@example(count=2, least=5, steps=10, runs=3.0)  # long over, with fewer tags than the least
def test_the_warmup_shows_the_first_tags_from_the_least_to_all(
    count: int, least: int, steps: int, runs: float
):
    step = round(runs * steps)
    given = words(token_warmup_step=steps, token_warmup_min=least, keep_tokens=1)
    tags = [str(number) for number in range(count + 1)]
    shown = math.floor(Fraction(step * (count - least), steps)) + least if step < steps else count
    out = draw_caption(",".join(tags), given, None, warmup=warmup_share(given, step, 0))
    assert out.split(", ") == tags[: 1 + shown]


def test_tags_are_held_back_before_they_are_shuffled():
    options = {"token_warmup_step": 10, "token_warmup_min": 2, "shuffle_caption": True}
    outs = {drawn("a, b, c, d", seed, warmup=0.0, **options) for seed in range(20)}
    assert outs == {"a, b", "b, a"}


# Dropping the whole


@given(st.floats(0, 1), st.floats(0, 1, exclude_max=True))
def test_a_showing_is_dropped_below_the_rate(rate: float, u: float):
    assert is_dropped(words(caption_dropout_rate=rate), u, 1) == (u < rate)


@given(st.integers(0, 5), st.integers(0, 20))
def test_every_nth_epoch_is_dropped(every: int, epoch: int):
    dropped = is_dropped(words(caption_dropout_every_n_epochs=every), 0.0, epoch)
    assert dropped == (every > 0 and epoch % every == 0)


# What is drawn at all


@pytest.mark.parametrize(
    ("given", "caption"),
    [
        ({"shuffle_caption": True}, "a, b, c"),
        ({"caption_tag_dropout_rate": 0.5}, "a, b, c"),
        ({"enable_wildcard": True}, "a\nb"),
        ({"enable_wildcard": True}, "{a|b}"),
    ],
)
def test_drawn_words_give_other_texts_from_draw_to_draw(given: dict[str, Any], caption: str):
    assert is_drawn(words(**given))
    assert not has_warmup(words(**given))
    assert len({drawn(caption, seed, **given) for seed in range(20)}) > 1


def test_a_warmup_counts_as_drawn():
    assert is_drawn(words(token_warmup_step=0.1))
    assert has_warmup(words(token_warmup_step=0.1))


FIXED = {
    "caption_prefix": "p",
    "caption_suffix": "s",
    "keep_tokens": 1,
    "keep_tokens_separator": "|||",
    "secondary_separator": ";",
    "caption_dropout_rate": 0.5,
    "caption_dropout_every_n_epochs": 2,
    "token_warmup_min": 0,
}


@given(st.text("a,|;{} \n", max_size=20), SEED, SEED)
def test_words_that_draw_nothing_give_one_text(caption: str, seed: int, other: int):
    assert not is_drawn(words(**FIXED))
    assert drawn(caption, seed, **FIXED) == drawn(caption, other, **FIXED)
    assert drawn(caption, seed, **FIXED) == draw_caption(caption, words(**FIXED), None)


def test_without_a_generator_nothing_is_drawn_and_the_rest_is_done():
    given = words(**FIXED, shuffle_caption=True, caption_tag_dropout_rate=1, enable_wildcard=True)
    caption = "{a|b} ||| c;d, e, f ||| g\nother"
    # The suffix follows the last line, as in sd-scripts.
    assert draw_caption(caption, given, None) == "p a, c,d, e, f, g"


def test_a_draw_is_the_same_for_ever():
    # Recorded here: a change of these would change the captions of every job.
    given = words(shuffle_caption=True, caption_tag_dropout_rate=0.3, enable_wildcard=True)
    randoms = generator()
    outs = [draw_caption("{a|b|c}, d, e, f\ng, h, i", given, randoms) for _ in range(4)]
    assert outs == ["f, d, e, a", "i, h, g", "h, i, g", "h, i"]
