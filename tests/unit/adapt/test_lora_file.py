"""Writing and reading LoRA files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import SHAPES, file_bytes, kohya_name, random_adapter, random_module
from safetensors.torch import load, save
from torch import Tensor
from torch.testing import assert_close

from raylora.adapt.deltas import delta
from raylora.adapt.lora_file import (
    ALPHA,
    DOWN,
    UP,
    AdapterModule,
    adapter_bytes,
    read_adapter,
    write_adapter,
)
from raylora.adapt.safetensors_format import pack
from raylora.base.errors import ExportError, WeightsError


def named(rank: int = 4) -> list[AdapterModule]:
    """With the names that a file has."""
    return [
        AdapterModule(kohya_name(module.name), module.tensors)
        for module in random_adapter(rank=rank)
    ]


LAYER = "lora_unet_mid_block_attentions_0_proj_in"
WORDS = {"ss_steps": "3", "modelspec.title": "icons", "raylora.version": "0"}


def tensors_of(**changes: Tensor) -> dict[str, Tensor]:
    """A file of one linear layer, with some tensors exchanged; an empty tensor removes one."""
    held = {"down": torch.ones(2, 5), "up": torch.ones(3, 2), "alpha": torch.tensor(1.0), **changes}
    names = {"down": DOWN, "up": UP, "alpha": ALPHA}
    return {f"{LAYER}.{names[part]}": t for part, t in held.items() if t.numel()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_was_written_is_read_back_exactly(dtype: torch.dtype) -> None:
    modules = random_adapter()
    found = read_adapter(file_bytes(modules, WORDS, dtype=dtype))
    assert found.dtype == dtype
    assert set(found.modules) == {kohya_name(name) for name in SHAPES}
    assert found.metadata.items() >= WORDS.items()
    for module in modules:
        name = kohya_name(module.name)
        for part in (DOWN, UP):
            rounded = module.tensors[part].to(dtype)
            assert_close(found.modules[name].tensors[part], rounded, rtol=0, atol=0)
        assert found.rank(name) == 4
        assert found.alpha(name) == 2.0
        down, up = (module.tensors[part].to(dtype).double().flatten(1) for part in (DOWN, UP))
        dense = (0.5 * up @ down).reshape(SHAPES[module.name])
        assert_close(found.delta(name), dense, rtol=0, atol=1e-15)
        assert found.delta(name).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reading_and_writing_again_gives_the_same_bytes(dtype: torch.dtype) -> None:
    data = file_bytes(random_adapter(), WORDS, dtype=dtype)
    found = read_adapter(data)
    again = adapter_bytes(found.modules.values(), found.metadata, dtype=dtype)
    assert again == data


def test_the_order_of_modules_and_words_does_not_matter() -> None:
    modules = random_adapter()
    data = file_bytes(modules, WORDS, dtype=torch.float16)
    words = dict(reversed(WORDS.items()))
    assert file_bytes(modules[::-1], words, dtype=torch.float16) == data


def test_the_files_bytes_stay_what_they_were() -> None:
    module = AdapterModule(
        "unet.mid_block.attentions.0.proj_in",
        {DOWN: torch.ones(1, 2), UP: torch.full((2, 1), 0.5), ALPHA: torch.tensor(0.1)},
    )
    data = file_bytes([module], {"ss_steps": "1"}, dtype=torch.bfloat16)
    # Golden: another digest means that the same run now writes other bytes.
    assert hashlib.sha256(data).hexdigest()[:16] == "4381fc473e09ba80"


def test_alpha_keeps_its_digits_in_a_bfloat16_file() -> None:
    module = random_module("unet.mid_block.attentions.0.proj_in", (3, 5), alpha=0.7)
    found = load(file_bytes([module], dtype=torch.bfloat16))
    assert found[f"{LAYER}.{ALPHA}"].dtype == torch.float32
    assert found[f"{LAYER}.{ALPHA}"].shape == ()
    assert found[f"{LAYER}.{ALPHA}"] == torch.tensor(0.7)
    assert found[f"{LAYER}.{DOWN}"].dtype == torch.bfloat16


@pytest.mark.parametrize("kilobytes", [1, 1200, 2000])
def test_hashes_are_those_that_sd_scripts_computes(kilobytes: int) -> None:
    # Its recipe, with the library: save a copy with the ss_* words only, skip the header, digest;
    # and 64 KiB from 1 MiB on. 1,200 kB end inside that window.
    rank = max(1, kilobytes * 250 // 1024)
    module = random_module("unet.mid_block.attentions.0.proj_in", (512, 512), rank=rank)
    words = {**WORDS, "ss_tag_frequency": '{"a": 1}'}
    data = file_bytes([module], words)
    copy = save(load(data), {word: text for word, text in words.items() if word.startswith("ss_")})
    body = copy[8 + int.from_bytes(copy[:8], "little") :]
    found = read_adapter(data)
    assert found.metadata["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    legacy = hashlib.sha256(copy[0x100000:0x110000]).hexdigest()[:8]
    assert found.metadata["sshs_legacy_hash"] == legacy
    assert found.hash_checks == {"sshs_model_hash": True, "modelspec.hash_sha256": None}


def test_changed_weights_no_longer_fit_their_hash() -> None:
    data = bytearray(file_bytes(random_adapter(), WORDS))
    data[-1] ^= 1
    checks = read_adapter(bytes(data)).hash_checks
    assert checks == {"sshs_model_hash": False, "modelspec.hash_sha256": None}


@pytest.mark.parametrize("right", [True, False])
def test_a_hash_of_modelspec_that_another_program_wrote_is_checked(right: bool) -> None:
    plain = file_bytes(random_adapter(), WORDS)
    model_hash = read_adapter(plain).model_hash if right else "0" * 64
    words = {**WORDS, "modelspec.hash_sha256": f"0x{model_hash.upper()}"}
    data = file_bytes(random_adapter(), words)
    assert read_adapter(data).hash_checks["modelspec.hash_sha256"] is right


def test_a_file_without_words_has_no_hash_to_check() -> None:
    assert set(read_adapter(pack(tensors_of(), {})).hash_checks.values()) == {None}


def test_without_alpha_the_strength_is_one() -> None:
    found = read_adapter(pack(tensors_of(alpha=torch.empty(0)), {}))
    assert found.alpha(LAYER) == 2.0
    assert_close(found.delta(LAYER), torch.full((3, 5), 2.0).double(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (tensors_of(down=torch.empty(0)), f"{LAYER} has no {DOWN}: half of it is missing"),
        (tensors_of(up=torch.empty(0)), f"{LAYER} has no {UP}: half of it is missing"),
        (tensors_of(up=torch.ones(3, 4)), "shapes that do not fit"),
        (tensors_of(up=torch.ones(2, 3)), "shapes that do not fit"),
        (tensors_of(up=torch.ones(3, 2, 1, 1)), "shapes that do not fit"),
        (tensors_of(down=torch.ones(2)), "shapes that do not fit"),
        (
            tensors_of(down=torch.ones(2, 5, 3, 3), up=torch.ones(3, 2, 3, 3)),
            "shapes that do not fit",
        ),
        (tensors_of(alpha=torch.ones(2)), "it is one number"),
        (tensors_of(down=torch.full((2, 5), torch.nan)), "lora_down.weight holds NaN"),
        (tensors_of(up=torch.full((3, 2), -torch.inf)), "lora_up.weight holds NaN"),
        (tensors_of(alpha=torch.tensor(torch.nan)), "alpha holds NaN"),
        (
            {**tensors_of(), f"{LAYER}.dora_magnitude": torch.ones(3)},
            "dora_magnitude' is no key of a LoRA",
        ),
        ({**tensors_of(), f"{LAYER}.hada_w1_a": torch.ones(3)}, "does not belong to lora"),
        ({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, "lora_unet_x has no hada_w1_b: half of it"),
        ({"lora_unet_x.lokr_w1": torch.ones(2, 2)}, "has no lokr_w2, nor both of lokr_w2_a and"),
        ({"lora_unet_x.alpha": torch.ones(())}, "has only alpha, which are no adapter"),
        ({"unet.x.lora_A.weight": torch.ones(2, 2)}, rf"unet\.x has no {UP}: half of it"),
        ({"unet.x.lora_A.weight": torch.tensor(1.0)}, rf"unet\.x has no {UP}: half of it"),
        ({"vae.x.lora_A.weight": torch.ones(2, 2)}, "lora_A.weight' is no key of a LoRA"),
        ({"unet.lora_A.weight": torch.ones(2, 2)}, "lora_A.weight' is no key of a LoRA"),
        (
            {
                "unet.x.lora_A.weight": torch.ones(2, 2),
                "unet.x.lora.down.weight": torch.ones(2, 2),
            },
            rf"unet\.x\.{DOWN} is there twice, by two keys",
        ),
        ({f"model.{i}.weight": torch.ones(1) for i in range(9)}, "'model.0.weight' and 8 more"),
        ({}, "holds no tensors"),
    ],
)
def test_a_file_that_is_no_usable_lora_is_refused(
    tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(pack(tensors, {}))
    with pytest.raises(WeightsError, match=message) as caught:
        read_adapter(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_pickle_is_refused_by_its_content_whatever_its_name(tmp_path: Path) -> None:
    for name in ("model.ckpt", "model.safetensors"):
        torch.save(tensors_of(), tmp_path / name)
        with pytest.raises(WeightsError, match="is a pickle"):
            read_adapter(tmp_path / name)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            AdapterModule("lora_unet_a", {UP: torch.ones(3, 2), ALPHA: torch.tensor(1.0)}),
            "lora_unet_a has no lora_down.weight",
        ),
        (
            AdapterModule("vae.a", {DOWN: torch.ones(2, 5), UP: torch.ones(3, 2)}),
            r"vae\.a\.lora_down\.weight is no key of any program's LoRA",
        ),
        (
            AdapterModule(
                "lora_unet_a",
                {DOWN: torch.full((2, 5), 1e5), UP: torch.ones(3, 2), ALPHA: torch.tensor(1.0)},
            ),
            "beyond what float16 can hold",
        ),
    ],
)
def test_an_adapter_that_would_not_come_back_is_not_saved(
    module: AdapterModule, message: str
) -> None:
    with pytest.raises(ExportError, match=f"Not saved: .*{message}"):
        adapter_bytes([module], {}, dtype=torch.float16)


def test_an_adapter_without_modules_is_not_saved() -> None:
    with pytest.raises(ExportError, match="no modules"):
        adapter_bytes([], {}, dtype=torch.float32)


def test_a_write_that_fails_leaves_the_earlier_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    write_adapter(path, named(), WORDS, dtype=torch.float32)
    before = path.read_bytes()
    assert before == file_bytes(random_adapter(), WORDS)

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_adapter(path, named(rank=2), WORDS, dtype=torch.float32)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_diffusers_naming_holds_the_same_adapter_without_alphas(dtype: torch.dtype) -> None:
    # alpha / rank is 1/2, so nothing is rounded that is not rounded in kohya's naming.
    modules = random_adapter(rank=4, alpha=2.0)
    data = file_bytes(modules, WORDS, dtype=dtype, naming="diffusers")
    assert set(load(data)) == {
        f"{name}.lora_{half}.weight" for name in SHAPES for half in ("A", "B")
    }
    ours, theirs = read_adapter(file_bytes(modules, WORDS, dtype=dtype)), read_adapter(data)
    assert (ours.spelling, theirs.spelling) == ("kohya", "diffusers")
    assert theirs.dtype == dtype
    assert theirs.metadata.items() >= WORDS.items()
    for name in SHAPES:
        assert theirs.rank(name) == 4
        assert theirs.alpha(name) == 4.0
        # float16 has subnormals: halves below 6e-5 lose digits when they are halved
        assert_close(theirs.delta(name), ours.delta(kohya_name(name)), rtol=0, atol=1e-7)


def test_an_alpha_that_is_no_power_of_two_is_folded_in_to_rounding() -> None:
    name, shape = "unet.mid_block.resnets.0.conv1", (5, 4, 3, 3)
    for alpha in (0.7, 11.3):
        module = random_module(name, shape, rank=3, alpha=alpha)
        file = read_adapter(file_bytes([module], naming="diffusers"))
        wanted = delta(*module.low_rank)
        found = file.delta(name)
        assert found.shape == shape
        # Two halves rounded to 2^-24, and a sum of three products.
        assert_close(found, wanted, rtol=0, atol=2**-23 * 3 * float(wanted.abs().max()))


def test_numbers_of_the_weights_own_size_keep_their_digits_in_a_half_precision_file() -> None:
    tensors = {**random_module(LAYER, (3, 5)).tensors, "dora_scale": torch.full((3, 1), 1.0001)}
    found = read_adapter(adapter_bytes([AdapterModule(LAYER, tensors)], {}, dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.modules[LAYER].tensors["dora_scale"], tensors["dora_scale"])


def peft_file(settings: dict[str, Any], **more: Tensor) -> bytes:
    tensors = {
        f"unet.{layer}.lora_{half}.weight": torch.ones(2, 2)
        for layer in ("a.to_q", "a.to_k")
        for half in ("A", "B")
    }
    return pack({**tensors, **more}, {"lora_adapter_metadata": json.dumps(settings)})


def test_the_settings_that_diffusers_writes_into_its_files_are_honoured() -> None:
    settings = {"unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": {"a.to_k": 3}}
    found = read_adapter(peft_file(settings))
    assert found.alpha("unet.a.to_q") == 8.0
    assert found.alpha("unet.a.to_k") == 3.0
    assert read_adapter(peft_file({"text_encoder.lora_alpha": 8})).alpha("unet.a.to_q") == 2.0
    # rsLoRA divides by the root of the rank, 2 here; files say alpha / rank.
    root = read_adapter(peft_file({"unet.use_rslora": True, "unet.lora_alpha": 3}))
    assert root.alpha("unet.a.to_q") / 2 == pytest.approx(3 / 2**0.5)
    magnitude = {"unet.a.to_q.lora_magnitude_vector": torch.tensor([1.0, 2.0])}
    decomposed = read_adapter(peft_file({"unet.use_dora": True}, **magnitude))
    assert decomposed.modules["unet.a.to_q"].tensors["dora_scale"].tolist() == [[1.0], [2.0]]
    with pytest.raises(WeightsError, match=r"peft's settings of unet are malformed"):
        read_adapter(peft_file({"unet.lora_alpha": "much"}))


def test_peft_keeps_its_settings_in_a_file_beside(tmp_path: Path) -> None:
    tensors = {
        f"base_model.model.a.to_q.lora_{half}.weight": torch.ones(2, 2) for half in ("A", "B")
    }
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(pack(tensors, {}))
    name = "base_model.model.a.to_q"
    assert read_adapter(path).alpha(name) == 2.0
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 6, "alpha_pattern": null}')
    assert read_adapter(path).alpha(name) == 6.0
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"adapter_config\.json is malformed"):
        read_adapter(path)
