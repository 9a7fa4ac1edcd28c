"""The job tree: every mistake at once, overrides, fingerprints, and the files of the repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from small import QUICKSTART, ROOT

from raylora.base.errors import JobError
from raylora.base.lookup import plugins
from raylora.job import Job, job_from, load_job, with_overrides
from raylora.sweep import load_sweep

JOB_FILES = sorted((ROOT / "jobs").glob("*.yaml"))
BARE = {
    "name": "bare",
    "family": {"kind": "sd15", "weights": "base"},
    "data": {"folder": "images"},
    "training": {"steps": 1},
}


def tree_with(changes: dict[str, Any]) -> dict[str, Any]:
    """The quickstart's tree with dotted paths set."""
    tree = yaml.safe_load(QUICKSTART.read_text())
    for path, value in changes.items():
        *sections, word = path.split(".")
        section = tree
        for name in sections:
            section = section.setdefault(name, {})
        section[word] = value
    return tree


def problems_with(changes: dict[str, Any]) -> list[str]:
    with pytest.raises(JobError) as caught:
        job_from(tree_with(changes))
    return caught.value.problems


def written(folder: Path, tree: Any) -> Path:
    path = folder / "job.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


def test_every_mistake_is_told_at_once_each_in_a_sentence():
    found = problems_with(
        {
            "nmae": "x",
            "network.kind": "lorra",
            "network.rnak": 8,
            "optimizer.learning_rate": "fast",
            "training.steps": 2.5,
            "fleet.workers": 0,
            "preview.prompts": "one",
        }
    )
    assert len(found) == 6
    assert all(problem.endswith((".", "?")) and "\n" not in problem for problem in found)
    with pytest.raises(JobError) as caught:
        job_from(tree_with({"nmae": 1, "network.rnak": 8}))
    assert str(caught.value) == "\n".join(caught.value.problems)


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("trianing", {}, "trianing: no such option. Did you mean 'training'?"),
        ("training.setps", 1, "training.setps: no such option. Did you mean 'steps'?"),
        ("loss.weight.gama", 1, "loss.weight.gama: no such option. Did you mean 'gamma'?"),
        ("network.conv_rank", 3, "network.conv_rank: no option of this kind; it is one of kind 'l"),
        ("network.kind", "lorra", "network.kind is 'lorra': input should be 'dora', 'dylora', "),
        ("family.kind", "sd51", "family.kind is 'sd51': input should be 'flux1', 'sd15', 'sd2', "),
        ("loss.name", "l3", "loss.name is 'l3': input should be 'l2', 'l1', 'huber' or "),
        ("network", None, "network is null: input should be a section of options."),
        ("log.wandb", True, "log.wandb is true: input should be a section of options."),
        ("optimizer.args", None, "optimizer.args is null: input should be names with values"),
        ("name", "a/b", "name: 'a/b' must be letters, digits"),
        ("name", "../x", "name: '../x' must be letters, digits"),
        ("name", 12, "name is 12: input should be a valid string."),
        (
            "training.epochs",
            3,
            "training: give exactly one of training.steps and training.epochs.",
        ),
        (
            "training.steps",
            None,
            "training: give exactly one of training.steps and training.epochs.",
        ),
        (
            "training.max_timestep",
            0,
            "training.max_timestep is 0: input should be greater than or equal to 1.",
        ),
        (
            "training",
            {"steps": 1, "min_timestep": 500, "max_timestep": 400},
            "training.max_timestep 400 must be above min_timestep 500.",
        ),
        (
            "validation.timesteps",
            [],
            "validation.timesteps is []: list should have at least 1 item after validation, not 0.",
        ),
    ],
)
def test_a_mistake_is_told_with_its_place(path: str, value: Any, sentence: str):
    (problem,) = problems_with({path: value})
    assert problem.startswith(sentence)


def test_what_is_missing_is_told():
    with pytest.raises(JobError) as caught:
        job_from({"name": "x"})
    assert [p.split(":")[0] for p in caught.value.problems] == ["family", "data", "training"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "must hold sections such as family, data and training"),
        ("- one", "must hold sections such as family"),
        ("a: [", "is not YAML: while parsing"),
    ],
)
def test_a_file_that_is_no_job_is_told(tmp_path: Path, text: str, sentence: str):
    with pytest.raises(JobError, match=sentence):
        load_job(written(tmp_path, text))


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path):
    with pytest.raises(JobError, match=r"cannot be read \(No such file or directory\)"):
        load_job(tmp_path / "absent.yaml")
    (tmp_path / "picture.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(JobError, match="not a text file in UTF-8"):
        load_job(tmp_path / "picture.yaml")


def test_overrides_replace_what_the_file_says(tmp_path: Path):
    job = load_job(
        written(tmp_path, BARE),
        [
            "network.rank=8",
            "optimizer.learning_rate=1e-3",
            "training.steps=null",
            "training.epochs=2.5",
            "loss.weight.name=min_snr",
            "preview.prompts=[a cat, 'a dog, black']",
            "fleet.workers=[{gpu: A100, count: 2}]",
            "name=other",
            "data.folder=s3://bucket/a=b",
        ],
    )
    assert job.network.rank == 8
    assert job.optimizer.learning_rate == 1e-3
    assert (job.training.steps, job.training.epochs) == (None, 2.5)
    assert job.loss.weight.name == "min_snr"
    assert job.preview.prompts == ("a cat", "a dog, black")
    assert job.fleet.count == 2
    assert job.name == "other"
    assert job.data.folder == "s3://bucket/a=b"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("network.rank", "--set network.rank: write it as section.option=value."),
        ("=3", "--set =3: write it as section.option=value."),
        (".rank=3", "write it as section.option=value."),
        ("network..rank=3", "write it as section.option=value."),
        ("training.steps=[", "--set training.steps=[: the value is not YAML."),
        ("name.x=3", "name.x: name is a value, not a section."),
        ("training.setps=3", "training.setps: no such option. Did you mean 'steps'?"),
        ("nowhere.steps=3", "nowhere: no such option. Allowed: data, ema, export,"),
    ],
)
def test_a_wrong_override_is_told(tmp_path: Path, override: str, sentence: str):
    with pytest.raises(JobError) as caught:
        load_job(written(tmp_path, BARE), [override])
    (problem,) = caught.value.problems
    assert sentence in problem


def test_overrides_of_a_job_are_those_of_its_file(tmp_path: Path):
    job = job_from(BARE)
    changed = with_overrides(job, {"network.rank": 4, "training.seed": 3})
    assert changed == load_job(written(tmp_path, BARE), ["network.rank=4", "training.seed=3"])
    assert job == job_from(BARE), "the job itself was changed"
    with pytest.raises(JobError, match=r"network\.rank is 0"):
        with_overrides(job, {"network.rank": 0})


def test_a_job_survives_json_and_yaml():
    job = job_from(tree_with({}))
    assert job_from(json.loads(json.dumps(job.plain()))) == job
    assert job_from(yaml.safe_load(yaml.safe_dump(job.plain()))) == job


def test_the_fingerprint_names_the_content():
    job = job_from(BARE)
    assert len(job.fingerprint()) == 16
    shuffled = dict(reversed(BARE.items()))
    spelled_out = {**BARE, "training": {"steps": 1, "seed": 0}}
    assert job_from(shuffled).fingerprint() == job.fingerprint()
    assert job_from(spelled_out).fingerprint() == job.fingerprint()
    assert with_overrides(job, {"training.seed": 1}).fingerprint() != job.fingerprint()


def test_places_of_run_and_cache():
    job = job_from({**BARE, "store": "s3://bucket/runs/"})
    assert job.run_folder == "runs/bare"
    assert job.cache_url == "s3://bucket/runs/caches"
    assert with_overrides(job, {"data.cache": "s3://caches/cats"}).cache_url == "s3://caches/cats"


@pytest.mark.parametrize("path", JOB_FILES, ids=lambda path: path.stem)
def test_every_job_of_the_repository_loads(path: Path):
    assert load_job(path).name


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tune_spaces").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_space_of_the_repository_loads(path: Path):
    sweep = load_sweep(path)
    assert sweep.job
    job = load_job(ROOT / sweep.job)
    for trial in sweep.trials():
        with_overrides(job, {**sweep.every_trial, **trial})


def test_the_schema_in_the_repository_is_the_generated_one():
    held = json.loads((ROOT / "job.schema.json").read_text())
    assert held == Job.model_json_schema(), "run: raylora schema > job.schema.json"


def test_every_option_has_a_text_in_the_schema():
    schema = Job.model_json_schema()
    bare = [
        f"{section}.{name}"
        for section, held in {"Job": schema, **schema["$defs"]}.items()
        for name, field in held.get("properties", {}).items()
        if not (field.get("description") or "$ref" in field or name == "kind")
    ]
    assert not bare


@pytest.mark.parametrize("path", JOB_FILES, ids=lambda path: path.stem)
def test_every_job_of_the_repository_fits_the_schema(path: Path):
    schema = json.loads((ROOT / "job.schema.json").read_text())
    tree = yaml.safe_load(path.read_text())
    jsonschema.validate(tree, schema)
    with pytest.raises(jsonschema.ValidationError, match="'setps' was unexpected"):
        jsonschema.validate({**tree, "training": {"setps": 3}}, schema)


def test_a_held_out_folder_draws_nothing_whatever_was_asked_of_the_set_before():
    data = {"folder": "images", "flip_aug": True, "shuffle_caption": True, "repeats": 3}
    job = job_from(tree_with({"data": data, "validation.folder": "others"}))
    first = job.sets[0]
    assert first.draws_pictures
    assert first.draws_texts
    held_out = job.held_out_set
    assert held_out is not None
    assert (held_out.folder, held_out.repeats) == ("others", 1)
    assert not held_out.draws_pictures
    assert not held_out.draws_texts


def test_regularisation_images_alone_are_refused_when_the_job_is_read():
    reg = {"folder": "r", "is_reg": True, "group": 1}
    with pytest.raises(JobError, match="of group 1 have no other images to keep the balance"):
        job_from(tree_with({"data": {"sets": [{"folder": "a"}, reg]}}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"network.initial_ranks": True}, "takes the ranks of network.initial, which is not given"),
        (
            {"network.train": "text_encoder", "optimizer.text_encoder_stop": 0.5},
            "nothing but the text encoder is trained",
        ),
        (
            {"optimizer": {"name": "adamw_schedule_free"}, "ema.decay": 0.9},
            "ema.decay: adamw_schedule_free keeps an average of its own",
        ),
        (
            {"optimizer": {"name": "adamw_schedule_free"}, "network.max_norm": 1.0},
            "which a cap would not reach",
        ),
        ({"optimizer.text_encoder_rate": 1e-5}, "leaves the text_encoder out"),
        ({"network.train": "text_encoder", "optimizer.denoiser_rate": 1e-5}, "denoiser out"),
    ],
    ids=str,
)
def test_parts_that_do_not_go_together_are_refused(changes: dict[str, Any], sentence: str):
    constant = {"schedule": {"name": "constant"}} if "optimizer" in changes else {}
    (found,) = problems_with({**constant, **changes})
    assert sentence in found


@pytest.mark.parametrize("train", ["text_encoder", "both"])
def test_captions_are_not_cached_where_their_encoder_is_trained(train: str):
    assert job_from(tree_with({})).data.cache_text
    for given in ({}, {"data.cache_text": True}):
        job = job_from(tree_with({"network.train": train, **given}))
        assert not job.data.cache_text
        assert job_from(job.plain()) == job


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"optimizer.learning_rate": 1e-4, "optimizer.denoiser_rate": 2e-4},
            "optimizer.learning_rate is 0.0001, and all that is trained has its own "
            "(denoiser_rate). Leave one of them out.",
        ),
        (
            {"optimizer.lora_plus_ratio": 16, "optimizer.lora_plus_denoiser_ratio": 8},
            "optimizer.lora_plus_ratio is 16, and all that is trained has its own "
            "(lora_plus_denoiser_ratio). Leave one of them out.",
        ),
        (
            {"network.kind": "locon", "network.train": "text_encoder"},
            "network.kind is locon, and the text encoder has no convolutions. Choose lora, which "
            "is the same there, or set network.train: both.",
        ),
        (
            {"network.initial": "old.safetensors", "network.initial_ranks": True},
            "network.rank is 8, and with network.initial_ranks it is the file's. Leave one of "
            "them out.",
        ),
        (
            {"network.initial_ranks": True, "network.rank": 16},
            "network.initial_ranks takes the ranks of network.initial, which is not given. Give "
            "it, or leave initial_ranks out.",
        ),
        (
            {"ema.place": "host"},
            "ema.place is host, and no average is kept. Give ema.decay, or leave it out.",
        ),
        (
            {"training.keep_last": 2, "training.save_every_steps": None},
            "training.keep_last is 2, and only the end is saved. Give training.save_every_steps "
            "or save_every_epochs, or leave it out.",
        ),
        (
            {"family.loras": [{"file": "a.safetensors", "strength": 0}]},
            "family.loras.0.strength is 0, which adds nothing. Leave the file out, or give it a "
            "strength.",
        ),
        (
            {"preview.negative": "blurry", "preview.guidance": 1},
            "preview.prompts.0 has a negative prompt, and guidance 1 does not look at it. Set "
            "guidance above 1, or leave the negative prompt out.",
        ),
        (
            {"preview.strengths": [100]},
            "preview.strengths.0 is 100: input should be less than or equal to 10.",
        ),
        (
            {"loss.huber_c": 0.2},
            "loss.huber_c is 0.2, which only huber and smooth_l1 use, and loss.name is l2. Write "
            "loss.name: huber, or leave huber_c out.",
        ),
        (
            {"optimizer.name": "prodigy", "optimizer.learning_rate": None}
            | {"optimizer.args": {"d_coef": "much"}},
            "optimizer.args.d_coef is 'much': give a number, as 1 is.",
        ),
        (
            {"optimizer.args": {"amsgrad": "banana"}},
            "optimizer.args.amsgrad is 'banana': give true or false.",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused_with_its_place_and_what_to_do(
    changes: dict[str, Any], told: str
):
    assert problems_with(changes) == [told]


@pytest.mark.parametrize(
    "changes",
    [
        {"network.train": "both", "optimizer.text_encoder_rate": 1e-5},
        {"ema.decay": 0.9, "network.max_norm": 1.0},
        {"optimizer.name": "adamw_schedule_free", "schedule": {"name": "constant"}},
    ],
    ids=str,
)
def test_parts_that_agree_are_left_alone(changes: dict[str, Any]):
    job_from(tree_with(changes))


def test_a_network_that_names_no_kind_is_lora():
    tree = tree_with({})
    tree["network"] = {"rank": 4}
    job = job_from(tree)
    assert (job.network.kind, job.network.rank) == ("lora", 4)


def test_the_schema_asks_for_the_familys_kind_as_a_job_does():
    sections = Job.model_json_schema()["$defs"]
    families = [one for name, one in sections.items() if "training_adapter" in one["properties"]]
    assert len(families) == len(plugins("raylora.families"))
    assert all("kind" in one["required"] for one in families)
    assert not any("default" in one["properties"]["kind"] for one in families)
