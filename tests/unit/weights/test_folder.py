from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import originals
import pytest
import torch
from bases import random_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

from raylora.base import fetch
from raylora.base.errors import WeightsError
from raylora.base.storage import open_storage
from raylora.weights import content
from raylora.weights.base import open_base
from raylora.weights.folder import read_license


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYLORA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy that a test may change."""
    copied: Path = shutil.copytree(random_folder("sd15"), tmp_path / "base")
    return copied


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], one) for name, one in expected.items())


def in_two(file: Path, variant: str = "") -> None:
    """Write a weights file in two shards with an index, in its place."""
    weights = load_file(file)
    stem = file.name.removesuffix(".safetensors")
    index = {}
    for i, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), start=1):
        name = f"{stem}{variant}-{i:05d}-of-00002.safetensors"
        save_file({one: weights[one] for one in names}, file.with_name(name))
        index.update(dict.fromkeys(names, name))
    place = file.with_name(f"{stem}.safetensors.index{variant}.json")
    place.write_text(json.dumps({"weight_map": index}))
    file.unlink()


@pytest.mark.parametrize("variant", ["", ".fp16"])
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_shards_are_read_by_their_index(component: str, variant: str, folder: Path):
    whole = open_base(str(random_folder("sd15")), kind="sd15")
    in_two(next((folder / component).glob("*.safetensors")), variant)
    base = open_base(str(folder), kind="sd15")
    same(base.weights(component), whole.weights(component))
    assert base.content_hash(component) == whole.content_hash(component)
    assert base.fingerprint(component) != whole.fingerprint(component)
    assert re.fullmatch("[0-9a-f]{16}", base.fingerprint(component))


def test_a_missing_shard_is_told(folder: Path):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    in_two(file)
    (folder / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"names diffusion_pytorch_model-00002-of-00002\.\w+, "):
        open_base(str(folder), kind="sd15").weights("unet")


def test_half_precision_is_read_where_there_is_no_other(folder: Path):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    full = load_file(file)
    save_file(
        {name: one.half() for name, one in full.items()},
        file.with_name("diffusion_pytorch_model.fp16.safetensors"),
    )
    same(open_base(str(folder), kind="sd15").weights("unet"), full)
    file.unlink()
    half = open_base(str(folder), kind="sd15").weights("unet")
    assert {one.dtype for one in half.values()} == {torch.float16}


@pytest.mark.parametrize("name", ["model.safetensors", "diffusion_pytorch_model.safetensors"])
def test_either_stem_names_weights(name: str, folder: Path):
    file = next((folder / "vae").glob("*.safetensors"))
    file.rename(file.with_name(name))
    assert "quant_conv.weight" in open_base(str(folder), kind="sd15").weights("vae")


def test_a_vae_comes_from_its_own_folder_or_from_a_whole_base(folder: Path):
    other = random_folder("sdxl")
    expected = originals.component(other, "vae")
    for place in (other / "vae", other):
        base = open_base(str(folder), kind="sd15", parts={"vae": str(place)})
        same(base.weights("vae"), expected)
        assert base.config("vae")["scaling_factor"] == 0.13025


def test_pickles_are_refused_with_the_way_to_convert(folder: Path):
    for url in ("old.ckpt", "s3://bucket/old.pt", "x.bin", "x.pth"):
        with pytest.raises(WeightsError, match=f"family.weights: {url} is a pickle, .*save_file"):
            open_base(url, kind="sd15")
    with pytest.raises(WeightsError, match=r"family\.vae: vae\.pt is a pickle"):
        open_base(str(folder), kind="sd15", parts={"vae": "vae.pt"})
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(WeightsError, match=r"as pickles only \(unet/diffusion_pytorch_model\.bin"):
        open_base(str(folder), kind="sd15").weights("unet")


@pytest.mark.slow
def test_the_way_to_convert_works(tmp_path: Path):
    weights = originals.checkpoint("sd15", random_folder("sd15"))
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "old.ckpt")
    with pytest.raises(WeightsError) as raised:
        open_base("old.ckpt", kind="sd15")
    program = re.search(r'python -c "(.*)" old.ckpt converted.safetensors', str(raised.value))
    assert program is not None
    subprocess.run(
        [sys.executable, "-c", program[1], "old.ckpt", "converted.safetensors"],
        cwd=tmp_path,
        check=True,
    )
    same(load_file(tmp_path / "converted.safetensors"), weights)


def test_what_is_missing_is_told_at_once(folder: Path):
    shutil.rmtree(folder / "vae")
    with pytest.raises(WeightsError, match=r"base has no vae\. Set family\.vae: a folder"):
        open_base(str(folder), kind="sd15")
    (folder / "scheduler" / "scheduler_config.json").write_text("{")
    base = open_base(str(folder), kind="sd15", parts={"vae": str(random_folder("sd15"))})
    with pytest.raises(WeightsError, match=r"scheduler_config\.json is not JSON"):
        base.config("scheduler")
    shutil.rmtree(folder / "tokenizer")
    base = open_base(str(folder), kind="sd15", parts={"vae": str(random_folder("sd15"))})
    with pytest.raises(WeightsError, match=r"set family\.parts\.tokenizer to a folder"):
        base.tokenizer("tokenizer")


def test_parts_that_mean_nothing_are_refused(folder: Path):
    with pytest.raises(WeightsError, match=r"family\.parts\.text_encoder_2 is no part of sd15"):
        open_base(str(folder), kind="sd15", parts={"text_encoder_2": "x"})
    with pytest.raises(WeightsError, match=r"family\.parts\.config is for a single"):
        open_base(str(folder), kind="sd15", parts={"config": str(folder)})
    with pytest.raises(WeightsError, match=r"family\.weights: .*/nowhere is not there.* sdxl,"):
        open_base("./nowhere", kind="sd15")
    with pytest.raises(WeightsError, match=r"sdxl is a base of SDXL; set family.kind: sdxl"):
        open_base("sdxl", kind="sd15")


def test_a_readme_tells_the_licence(folder: Path):
    assert open_base(str(folder), kind="sd15").license is None
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: own-1.0\n---\n# It\n")
    assert open_base(str(folder), kind="sd15").license == "own-1.0"


def test_the_hash_of_content_follows_weights_and_config(folder: Path):
    first = open_base(str(folder), kind="sd15").content_hash("vae")
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_diffusers_version": "9"}))
    assert open_base(str(folder), kind="sd15").content_hash("vae") == first
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 2.0}))
    second = open_base(str(folder), kind="sd15").content_hash("vae")
    assert second != first
    file = next((folder / "vae").glob("*.safetensors"))
    weights = load_file(file)
    weights["quant_conv.bias"][0] += 1
    save_file(weights, file)
    assert open_base(str(folder), kind="sd15").content_hash("vae") != second


def test_large_files_are_hashed_once_as_long_as_they_are_unchanged(
    folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(content, "_REMEMBERED_BYTES", 1)
    first = open_base(str(folder), kind="sd15").content_hash("vae")
    (kept,) = (home / "hashes").iterdir()
    assert kept.read_text() == first
    kept.write_text("remembered")
    assert open_base(str(folder), kind="sd15").content_hash("vae") == "remembered"
    file = next((folder / "vae").glob("*.safetensors"))
    save_file(load_file(file), file)
    assert open_base(str(folder), kind="sd15").content_hash("vae") == first


def test_the_hash_of_a_tokenizer_follows_its_files(folder: Path):
    first = open_base(str(folder), kind="sd15").tokenizer_hash("tokenizer")
    (folder / "tokenizer" / ".hidden").write_text("x")
    assert open_base(str(folder), kind="sd15").tokenizer_hash("tokenizer") == first
    (folder / "tokenizer" / "added.json").write_text("{}")
    assert open_base(str(folder), kind="sd15").tokenizer_hash("tokenizer") != first


def upload(folder: Path, url: str) -> None:
    storage = open_storage(url)
    for file in folder.rglob("*"):
        if file.is_file():
            storage.write(str(file.relative_to(folder)), file.read_bytes())


@pytest.mark.slow
def test_a_folder_in_storage_is_fetched_once_and_as_far_as_it_is_needed(
    folder: Path, s3_url: str, home: Path, fault_proxy
):
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"old")
    upload(folder, s3_url)
    base = open_base(s3_url, kind="sd15")
    base.config("unet")
    assert not list(home.rglob("*.safetensors"))
    same(base.weights("unet"), originals.component(folder, "unet"))
    assert [file.name for file in home.rglob("*.safetensors")] == [
        "diffusion_pytorch_model.safetensors"
    ]
    assert not list(home.rglob("*.bin"))
    assert base.name == s3_url.rpartition("/")[2]
    assert base.tokenizer("tokenizer")("a cat").input_ids
    fault_proxy.reset_counts()
    again = open_base(s3_url, kind="sd15")
    same(again.weights("unet"), originals.component(folder, "unet"))
    assert fault_proxy.count("GET") == 0


@pytest.mark.slow
def test_a_file_in_storage_is_fetched_once_in_pieces(
    tmp_path: Path, s3_url: str, fault_proxy, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fetch, "_PIECE_BYTES", 2**20)
    weights = originals.checkpoint("sd15", random_folder("sd15"))
    path = Path(originals.save(weights, tmp_path / "made.safetensors"))
    open_storage(s3_url).write("bases/made.safetensors", path.read_bytes())
    url = f"{s3_url}/bases/made.safetensors"
    config = {"config": str(random_folder("sd15"))}
    fault_proxy.reset_counts()
    base = open_base(url, kind="sd15", parts=config)
    same(base.weights("unet"), originals.component(random_folder("sd15"), "unet"))
    assert fault_proxy.count("GET") == -(-path.stat().st_size // 2**20)
    fault_proxy.reset_counts()
    open_base(url, kind="sd15", parts=config).weights("vae")
    assert fault_proxy.count("GET") == 0
    assert (base.name, list(fetch.cache_home().rglob("*.partial"))) == ("made", [])
    with pytest.raises(WeightsError, match=r"family\.weights: there is no object s3://.*/none\."):
        open_base(f"{s3_url}/none.safetensors", kind="sd15")
    with pytest.raises(WeightsError, match=r"family\.weights: nothing is under s3://.*/none\."):
        open_base(f"{s3_url}/none", kind="sd15")


@pytest.mark.parametrize(
    ("readme", "license"),
    [
        (
            "---\nlicense: creativeml-openrail-m\ntags:\n- art\n---\n# A base\n",
            "creativeml-openrail-m",
        ),
        ("---\nlicense:\n- mit\n- cc0-1.0\n---\n", "mit, cc0-1.0"),
        ("---\nlicense: other\nlicense_name: their-own\n---\n", "their-own"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\ntags: [a]\n---\nlicense: mit\n", ""),
        ("# A base\nlicense: mit\n", ""),
        ("---\nlicense: mit\n", ""),
        ("# A base\n---\nlicense: mit\n---\n", ""),
        ("---\n[: broken\n---\n", ""),
        ("---\njust text\n---\n", ""),
    ],
)
def test_a_bases_licence_is_what_its_page_names(readme: str, license: str):
    assert read_license(readme) == (license or None)


@pytest.mark.parametrize(
    ("kind", "base", "sentence"),
    [
        ("sdxl", "sd15", "and no text_encoder_2, as .*1.x and .*2.x have. Set .* sd15 or sd2"),
        ("flux1", "sd15", "no transformer and no text_encoder_2, as .* Set .* sd15 or sd2"),
        ("sd2", "flux1", "and no unet, as .* Set family.kind: sd3 or flux1"),
    ],
)
def test_a_folder_that_is_whole_for_another_family_is_sent_there(
    kind: str, base: str, sentence: str
):
    with pytest.raises(WeightsError, match=sentence):
        open_base(str(random_folder(base)), kind=kind)


def test_a_folder_without_any_model_is_not_asked_for_parts(tmp_path: Path):
    with pytest.raises(WeightsError, match=r"is no folder in diffusers layout, since it has no un"):
        open_base(str(tmp_path), kind="sd15")
