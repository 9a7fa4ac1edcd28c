"""Data set files of sd-scripts: keys, tables, order of look-up, defaults, mistakes, notices."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from raylora.base.errors import JobError, StorageError
from raylora.data.options import SetWords
from raylora.data.sources import kohya_toml
from raylora.data.sources.kohya_toml import read_kohya_sets

# key: the tables where sd-scripts takes it (general, data set, subset), a value, and what
# becomes of it here; None where nothing does.
EVERY_KEY: dict[str, tuple[str, Any, dict[str, Any] | None]] = {
    "batch_size": ("gd", 4, None),
    "resolution": ("gd", [512, 768], {"resolution": [512, 768]}),
    "enable_bucket": ("gd", True, {"enable_bucket": True}),
    "bucket_no_upscale": ("gd", True, {"bucket_no_upscale": True}),
    "min_bucket_reso": ("gd", 320, {"min_bucket_reso": 320}),
    "max_bucket_reso": ("gd", 1280, {"max_bucket_reso": 1280}),
    "bucket_reso_steps": ("gd", 32, {"bucket_reso_steps": 32}),
    "validation_split": ("gd", 0.1, {"validation_split": 0.1}),
    "validation_seed": ("gd", 7, {"validation_seed": 7}),
    "network_multiplier": ("gd", 0.5, None),
    "resize_interpolation": ("gds", "area", {"resize_interpolation": "area"}),
    "num_repeats": ("gds", 3, {"repeats": 3}),
    "shuffle_caption": ("gds", True, {"shuffle_caption": True}),
    "color_aug": ("gds", True, {"color_aug": True}),
    "flip_aug": ("gds", True, {"flip_aug": True}),
    "random_crop": ("gds", True, {"random_crop": True}),
    "enable_wildcard": ("gds", True, {"enable_wildcard": True}),
    "caption_separator": ("gds", "|", {"caption_separator": "|"}),
    "keep_tokens": ("gds", 2, {"keep_tokens": 2}),
    "keep_tokens_separator": ("gds", "|||", {"keep_tokens_separator": "|||"}),
    "secondary_separator": ("gds", ";;;", {"secondary_separator": ";;;"}),
    "caption_prefix": ("gds", "a photo,", {"caption_prefix": "a photo,"}),
    "caption_suffix": ("gds", "best", {"caption_suffix": "best"}),
    "face_crop_aug_range": ("gds", [1.0, 3.0], {"face_crop_aug_range": [1.0, 3.0]}),
    "token_warmup_min": ("gds", 2, {"token_warmup_min": 2}),
    "token_warmup_step": ("gds", 0.5, {"token_warmup_step": 0.5}),
    "caption_dropout_rate": ("gds", 0.1, {"caption_dropout_rate": 0.1}),
    "caption_dropout_every_n_epochs": ("gds", 2, {"caption_dropout_every_n_epochs": 2}),
    "caption_tag_dropout_rate": ("gds", 0.2, {"caption_tag_dropout_rate": 0.2}),
    "custom_attributes": ("gds", {"mood": "dark"}, None),
    "caption_extension": ("gds", ".txt", {"caption_extensions": [".txt"]}),
    "class_tokens": ("gds", "sks cat", {"class_tokens": "sks cat"}),
    "cache_info": ("gds", True, None),
    "is_reg": ("s", True, {"is_reg": True}),
    "alpha_mask": ("s", True, {"alpha_mask": True}),
    "metadata_file": ("s", "m.json", {"manifest": "m.json"}),
    "conditioning_data_dir": ("s", "masks", {"mask_folder": "masks"}),
}
TABLES = {"g": "general", "d": "datasets[0]", "s": "datasets[0].subsets[0]"}
PLAIN = {"folder": "a", "repeats": 1, "enable_bucket": False, "group": 0}


ONE_SET = '{"datasets": [{"subsets": [{"image_dir": "a"}]}]}'
NAMES = {"g": "general", "d": "dataset", "s": "subset"}  # of the arguments of `written`


def written(
    folder: Path,
    general: dict[str, Any] | None = None,
    dataset: dict[str, Any] | None = None,
    subset: dict[str, Any] | None = None,
) -> str:
    """A file of one subset, with these keys in its three tables."""
    inner = {"image_dir": "a", **(subset or {})}
    return saved(
        folder, {"general": general or {}, "datasets": [{**(dataset or {}), "subsets": [inner]}]}
    )


def saved(folder: Path, tree: Any, name: str = "sets.json") -> str:
    text = tree if isinstance(tree, str) else json.dumps(tree)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def problems_of(url: str) -> list[str]:
    """What is wrong with the file, without its name."""
    with pytest.raises(JobError) as caught:
        read_kohya_sets(url)
    assert all(problem.startswith(f"{url}: ") for problem in caught.value.problems)
    return [problem.removeprefix(f"{url}: ") for problem in caught.value.problems]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("key", EVERY_KEY)
def test_a_key_is_taken_where_sd_scripts_takes_it_and_refused_elsewhere(
    key: str, table: str, tmp_path: Path
):
    tables, value, becomes = EVERY_KEY[key]
    name = NAMES[table]
    url = written(tmp_path, **{name: {key: value}})
    if table not in tables:
        right = ["[general]", "[[datasets]]"] if tables == "gd" else ["[[datasets.subsets]]"]
        place = f"{TABLES[table]}.{key}: it may stand in {' or '.join(right)} only"
        assert problems_of(url) == [f"{place}. Move it there."]
        return
    [found] = read_kohya_sets(url)
    bucket = {"min_bucket_reso": 256, "max_bucket_reso": 1024, "bucket_reso_steps": 64}
    expected = PLAIN | (bucket if key == "enable_bucket" else {}) | (becomes or {})
    assert found == expected
    SetWords.model_validate(found)  # raises where a word or its type is not known


def wrong_values(value: Any) -> list[Any]:
    """Values that are of no kind which `value` is of; a whole number is a number too."""
    kinds: dict[type, tuple[type, ...]] = {float: (float, int), list: (list, int)}
    others = ("", 0.5, 3, True, None, [1], {})
    return [other for other in others if type(other) not in kinds.get(type(value), (type(value),))]


@pytest.mark.parametrize(
    ("key", "wrong"),
    [(key, wrong) for key, (_, value, _) in EVERY_KEY.items() for wrong in wrong_values(value)],
)
def test_a_value_of_another_kind_is_refused_with_what_is_allowed(
    key: str, wrong: Any, tmp_path: Path
):
    table = EVERY_KEY[key][0][-1]
    name = NAMES[table]
    [problem] = problems_of(written(tmp_path, **{name: {key: wrong}}))
    place = f"{TABLES[table]}.{key} is {json.dumps(wrong)}: it takes "
    assert problem.startswith(place)
    assert len(problem) > len(place) + 4


@pytest.mark.parametrize("wrong", [[512], [512, 512, 3], [512, "512"], 512.0])
def test_a_resolution_is_one_whole_number_or_two(wrong: Any, tmp_path: Path):
    [problem] = problems_of(written(tmp_path, {"resolution": wrong}))
    assert problem.endswith("it takes a whole number or [width, height].")


def test_the_inner_table_is_asked_first(tmp_path: Path):
    tables = [{"flip_aug": True, "keep_tokens": 1}, {"keep_tokens": 2}, {"keep_tokens": 3}]
    for asked in (1, 2, 3):
        [found] = read_kohya_sets(written(tmp_path, *tables[:asked]))
        assert (found["keep_tokens"], found["flip_aug"]) == (asked, True)


def test_false_and_nought_of_an_inner_table_count(tmp_path: Path):
    [found] = read_kohya_sets(
        written(
            tmp_path, {"flip_aug": True, "keep_tokens": 2}, {"keep_tokens": 0}, {"flip_aug": False}
        )
    )
    assert (found["flip_aug"], found["keep_tokens"]) == (False, 0)


def test_an_empty_text_hides_that_of_an_outer_table_and_means_none(tmp_path: Path):
    words = ("keep_tokens_separator", "secondary_separator", "caption_prefix", "caption_suffix")
    outer, inner = dict.fromkeys(words, "x"), dict.fromkeys(words, "")
    [found] = read_kohya_sets(written(tmp_path, outer, subset=inner))
    assert [found[word] for word in words] == [None] * 4


def test_defaults_are_those_of_sd_scripts_where_ours_differ(tmp_path: Path):
    assert read_kohya_sets(written(tmp_path)) == [PLAIN]
    [found] = read_kohya_sets(written(tmp_path, {"enable_bucket": True, "min_bucket_reso": 128}))
    sizes = {"min_bucket_reso": 128, "max_bucket_reso": 1024, "bucket_reso_steps": 64}
    assert found == {**PLAIN, **sizes, "enable_bucket": True}


def test_the_job_fills_what_the_file_leaves_open_and_no_more(tmp_path: Path):
    job = {"enable_bucket": True, "repeats": 5, "max_bucket_reso": 2048, "min_bucket_reso": None}
    [found] = read_kohya_sets(written(tmp_path), job)
    sizes = {"min_bucket_reso": 256, "bucket_reso_steps": 64}
    assert found == {"folder": "a", "group": 0, **sizes}
    [found] = read_kohya_sets(written(tmp_path, {"enable_bucket": False, "num_repeats": 2}), job)
    assert found == {**PLAIN, "repeats": 2}


def test_each_data_set_is_a_group_and_each_subset_a_set(tmp_path: Path):
    url = saved(
        tmp_path,
        """
        [[datasets]]
        resolution = 512
          [[datasets.subsets]]
          image_dir = "a"
          [[datasets.subsets]]
          image_dir = 's3://bucket/reg'
          is_reg = true
        [[datasets]]
        resolution = [768, 512]
          [[datasets.subsets]]
          image_dir = "a"  # the same images again in another size
        """,
        "sets.TOML",
    )
    found = [(one["folder"], one["group"], one["resolution"]) for one in read_kohya_sets(url)]
    assert found == [("a", 0, 512), ("s3://bucket/reg", 0, 512), ("a", 1, [768, 512])]


def test_a_metadata_file_needs_no_folder_and_passes_over_what_is_for_captions(tmp_path: Path):
    general = {"class_tokens": "cat", "caption_extension": ".txt", "flip_aug": True}
    subset = {"metadata_file": "meta.json"}
    tree = {"general": general, "datasets": [{"subsets": [subset]}]}
    [found] = read_kohya_sets(saved(tmp_path, tree))
    rest = {word: value for word, value in PLAIN.items() if word != "folder"}
    assert found == {**rest, "manifest": "meta.json", "flip_aug": True}


def test_a_set_with_masks_passes_over_general_class_tokens(tmp_path: Path):
    url = written(tmp_path, {"class_tokens": "cat"}, subset={"conditioning_data_dir": "masks"})
    assert read_kohya_sets(url) == [{**PLAIN, "mask_folder": "masks"}]


@pytest.mark.parametrize(
    ("kind", "refused"),
    [
        ("metadata_file", ["class_tokens", "caption_extension", "cache_info", "is_reg"]),
        ("conditioning_data_dir", ["class_tokens", "is_reg", "alpha_mask", "metadata_file"]),
    ],
)
def test_a_key_that_sd_scripts_refuses_in_a_set_of_this_kind_is_refused(
    kind: str, refused: list[str], tmp_path: Path
):
    for key in refused:
        [problem] = problems_of(written(tmp_path, subset={kind: "x", key: EVERY_KEY[key][1]}))
        assert problem.startswith(f"datasets[0].subsets[0].{key}: ")
        assert f"not take it in a data set with {kind}" in problem


def test_a_face_range_may_be_written_as_on_the_command_line(tmp_path: Path):
    [found] = read_kohya_sets(written(tmp_path, {"face_crop_aug_range": "1.5, 3"}))
    assert found["face_crop_aug_range"] == [1.5, 3.0]
    for wrong in ("1.5", "1.5,x", "1,2,3"):
        [problem] = problems_of(written(tmp_path, {"face_crop_aug_range": wrong}))
        assert problem.endswith('it takes [lowest, highest] or "lowest,highest".')


def test_every_mistake_is_named_at_once_with_its_place(tmp_path: Path):
    first = {"subsets": [{"image_dir": "a", "num_repeats": 0}, {"flip_aug": 1}], "subset": []}
    second = {"resolution": "512", "prior_loss_weight": 0.5, "subsets": [{"image_dir": "b"}]}
    tree = {"general": {"shufle_caption": True}, "resolution": 512, "datasets": [first, second]}
    assert problems_of(saved(tmp_path, tree)) == [
        "resolution: it may stand in [general] or [[datasets]] only. Move it there.",
        "general.shufle_caption: no such key. Did you mean 'shuffle_caption'?",
        "datasets[0].subset: no such key. Did you mean 'subsets'?",
        "datasets[0].subsets[0].num_repeats is 0: it takes a whole number from 1 on.",
        "datasets[0].subsets[1].flip_aug is 1: it takes true or false.",
        "datasets[0].subsets[1].image_dir: missing. Give the folder of the images.",
        'datasets[1].resolution is "512": it takes a whole number or [width, height].',
        "datasets[1].prior_loss_weight: no such key. It belongs to the whole job: write "
        "data.prior_loss_weight there.",
    ]


@pytest.mark.parametrize("key", ["metadata_file", "conditioning_data_dir"])
def test_subsets_of_two_kinds_in_one_data_set_are_refused(key: str, tmp_path: Path):
    subsets = [{"image_dir": "a", key: "x"}, {"image_dir": "b"}]
    [problem] = problems_of(saved(tmp_path, {"datasets": [{"subsets": subsets}]}))
    assert problem.startswith(f"datasets[0]: some of its subsets have {key} and some have not")
    apart = {"datasets": [{"subsets": [one]} for one in subsets]}
    assert len(read_kohya_sets(saved(tmp_path, apart))) == 2


def test_the_same_images_twice_in_a_data_set_are_refused_and_in_two_are_not(tmp_path: Path):
    subsets = [{"image_dir": "a"}, {"image_dir": "b"}, {"image_dir": "a/"}]
    [problem] = problems_of(saved(tmp_path, {"datasets": [{"subsets": subsets}]}))
    assert problem.startswith("datasets[0].subsets[2].image_dir is that of datasets[0].subsets[0]")
    apart = {"datasets": [{"subsets": [one]} for one in subsets]}
    assert [one["group"] for one in read_kohya_sets(saved(tmp_path, apart))] == [0, 1, 2]


def test_two_lists_of_the_same_folder_are_two_sets_and_one_list_twice_is_refused(tmp_path: Path):
    one, other = ({"image_dir": "a", "metadata_file": f"{name}.json"} for name in "xy")
    assert len(read_kohya_sets(saved(tmp_path, {"datasets": [{"subsets": [one, other]}]}))) == 2
    [problem] = problems_of(saved(tmp_path, {"datasets": [{"subsets": [one, one]}]}))
    assert problem.startswith("datasets[0].subsets[1].metadata_file is that of")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[general]\nflip_aug = yes\n", r"is not TOML: Invalid value \(at line 2, column 12\)"),
        ("", r"datasets: give one table or more, each begun with \[\[datasets\]\]"),
        ("[datasets]\nresolution = 512\n", r"datasets: give one table or more"),
        ("[[datasets]]\nresolution = 512\n", r"datasets\[0\].subsets: give one table or more"),
        ("general = 3\n[[datasets]]\n", r"general is 3: it takes a table, begun with \[general\]"),
    ],
)
def test_a_file_without_the_tables_it_needs_is_refused(text: str, problem: str, tmp_path: Path):
    with pytest.raises(JobError, match=rf"sets.toml:? {problem}"):
        read_kohya_sets(saved(tmp_path, text, "sets.toml"))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(StorageError, match=r"none.toml: there is no such file"):
        read_kohya_sets(str(tmp_path / "none.toml"))
    with pytest.raises(JobError, match=r"sets.yaml: a data set file ends in .toml or .json"):
        read_kohya_sets(saved(tmp_path, "", "sets.yaml"))
    with pytest.raises(JobError, match=r"sets.json is not JSON: .* line 1 column 2"):
        read_kohya_sets(saved(tmp_path, "{"))
    with pytest.raises(JobError, match=r"sets.json must hold an object"):
        read_kohya_sets(saved(tmp_path, "[]"))
    (tmp_path / "latin.toml").write_bytes('[general]\nclass_tokens = "café"'.encode("latin-1"))
    with pytest.raises(JobError, match=r"latin.toml is not a text file in UTF-8"):
        read_kohya_sets(str(tmp_path / "latin.toml"))


def test_a_mark_at_the_beginning_of_the_file_does_not_matter(tmp_path: Path):
    assert read_kohya_sets(saved(tmp_path, f"\ufeff{ONE_SET}")) == [PLAIN]


@pytest.mark.parametrize(
    ("url", "folder", "name"),
    [
        ("sets.json", ".", "sets.json"),
        ("a/b.toml", "a/", "b.toml"),
        ("/b.toml", "/", "b.toml"),
        ("file:///b.toml", "file:///", "b.toml"),
        ("s3://bucket/b.toml", "s3://bucket/", "b.toml"),
        ("s3://bucket/a/b.toml", "s3://bucket/a/", "b.toml"),
    ],
)
def test_the_file_may_lie_in_any_storage(
    url: str, folder: str, name: str, monkeypatch: pytest.MonkeyPatch
):
    in_toml = "datasets = [{subsets = [{image_dir = 'a'}]}]"

    class Place:
        def read(self, key: str) -> bytes:
            assert key == name
            return (ONE_SET if key.endswith("json") else in_toml).encode()

    opened: list[str] = []
    monkeypatch.setattr(kohya_toml, "open_storage", lambda place: opened.append(place) or Place())
    assert read_kohya_sets(url) == [PLAIN]
    assert opened == [folder]


def test_what_is_not_used_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    ignored = {"batch_size": 4, "network_multiplier": 0.5}
    subsets = [
        {"image_dir": name, "cache_info": True, "custom_attributes": {"x": 1}} for name in "ab"
    ]
    tree = {"general": ignored, "datasets": [{**ignored, "subsets": subsets}, {"subsets": subsets}]}
    url = saved(tmp_path, tree)
    with caplog.at_level(logging.WARNING, "raylora.data"):
        read_kohya_sets(url)
    assert [record.getMessage() for record in caplog.records] == [
        f"{url}: batch_size is not used: a step holds training.images_per_step images.",
        f"{url}: network_multiplier is not used: sd-scripts does not use it either.",
        f"{url}: cache_info is not used: the cache remembers sizes and captions by itself.",
        f"{url}: custom_attributes is not used, except diff_output_preservation: nothing reads the "
        "others.",
    ]


def test_values_that_ask_for_nothing_are_passed_over_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    general = {"network_multiplier": 1.0, "cache_info": False, "custom_attributes": {}}
    with caplog.at_level(logging.WARNING, "raylora.data"):
        read_kohya_sets(written(tmp_path, general))
    assert caplog.records == []


@pytest.mark.parametrize("table", TABLES)
def test_diff_output_preservation_is_a_word_of_a_set(
    table: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for asked in (True, False):
        given = {"custom_attributes": {"diff_output_preservation": asked}}
        with caplog.at_level(logging.WARNING, "raylora.data"):
            [found] = read_kohya_sets(written(tmp_path, **{NAMES[table]: given}))
        assert found == {**PLAIN, "output_preservation": asked}
    assert caplog.records == []


def test_an_inner_table_of_attributes_hides_the_outer_one(tmp_path: Path):
    outer = {"custom_attributes": {"diff_output_preservation": True}}
    for inner in ({}, {"mood": "dark"}):
        url = written(tmp_path, outer, subset={"custom_attributes": inner})
        assert read_kohya_sets(url) == [PLAIN]


@pytest.mark.parametrize("value", ["false", 1, None, {}])
def test_diff_output_preservation_is_true_or_false(value: Any, tmp_path: Path):
    # sd-scripts asks Python whether it is true, which "false" is
    asked = {"custom_attributes": {"diff_output_preservation": value}}
    [problem] = problems_of(written(tmp_path, subset=asked))
    place = "datasets[0].subsets[0].custom_attributes.diff_output_preservation"
    assert problem == f"{place} is {json.dumps(value)}: it takes true or false."
