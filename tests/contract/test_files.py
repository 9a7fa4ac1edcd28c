"""LoRA files of every family, found by listing: written, proven, read back, and other programs'."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import as_trained, file_bytes, random_module
from bases import open_tiny, random_folder
from torch import Tensor, nn
from torch.testing import assert_close

from raylora.adapt import kinds
from raylora.adapt.attach import Adapter, weights_in
from raylora.adapt.deltas import delta
from raylora.adapt.export_options import ExportOptions, naming_problems
from raylora.adapt.initial import weights_of
from raylora.adapt.keys import Naming
from raylora.adapt.layout import laid_out
from raylora.adapt.lora_file import AdapterModule, adapter_bytes, read_adapter
from raylora.adapt.merge import fitted
from raylora.adapt.onto import Names, all_sites, names_of, onto, weight_shape
from raylora.adapt.parameters import network_of
from raylora.adapt.predictions import verify_predictions
from raylora.adapt.proof_worker import compare_file
from raylora.adapt.recognise import FAMILIES, families_of, refuse_others
from raylora.adapt.trained import trained
from raylora.base.errors import WeightsError
from raylora.base.lookup import plugins
from raylora.base.site import Site
from raylora.families import Family
from raylora.networks import NetworkOptions, get_network

FAMILY_KINDS = plugins("raylora.families")
CPU = torch.device("cpu")
NETWORKS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora"},
    "pissa": {"kind": "lora", "start": "pissa"},
    "locon": {"kind": "locon", "conv_rank": 2},
    "tucker": {"kind": "locon", "tucker": True},
    "dylora": {"kind": "dylora"},
    "dora": {"kind": "dora"},
    "dora by inputs": {"kind": "dora", "axis": "input"},
    "loha": {"kind": "loha", "tucker": True},
    "lokr": {"kind": "lokr", "tucker": True},
    "oft": {"kind": "oft", "rescale": True},
    "boft": {"kind": "lycoris", "algo": "boft"},
    "glora": {"kind": "lycoris", "algo": "glora"},
    "ia3": {"kind": "lycoris", "algo": "ia3", "rank": None},
    "full": {"kind": "lycoris", "algo": "full", "rank": None},
    "norms": {"kind": "lycoris", "algo": "norms", "rank": None},
}


@cache
def base(kind: str) -> tuple[Family, list[Site], Names]:
    family = open_tiny(kind, random_folder(kind))
    return family, all_sites(family), names_of(family)


@cache
def models(kind: str) -> dict[str, nn.Module]:
    family = base(kind)[0]
    denoiser = family.load_denoiser(dtype=torch.float32, device=CPU)
    encoders = family.load_text_encoders(dtype=torch.float32, device=CPU)
    return {family.component: denoiser, **encoders}


def namings(kind: str) -> list[Naming]:
    return ["kohya", "diffusers"] if kind in ("sd15", "sd2") else ["kohya", "diffusers", "comfyui"]


def every_layer(kind: str, *, alphas: tuple[float, ...] = (2.0,)) -> list[AdapterModule]:
    """A low-rank module on each layer that is no norm, of other ranks and alphas in turn."""
    sites = [site for site in base(kind)[1] if site.kind != "norm"]
    return [
        random_module(
            site.name,
            weight_shape(site),
            rank=2 + number % 3,
            alpha=alphas[number % len(alphas)],
            seed=number,
        )
        for number, site in enumerate(sites)
    ]


def moved_adapter(kind: str, options: NetworkOptions, *, size: float = 0.1) -> Adapter:
    """A network on every layer that it fits, with parameters moved from where they begin."""
    network = get_network(options.kind)
    sites = [site for site in base(kind)[1] if network.fits(options, site) is None]
    numbers = np.random.default_rng(0)
    weight_of, initial = weights_in(models(kind)), {}
    for site in sites:
        first = network.initial(
            options, site, lambda shape: numbers.uniform(-1, 1, shape), weight_of(site)
        )
        kept = network.constants(options, site)
        initial[site.name] = {
            word: array if word in kept else array + size * numbers.standard_normal(array.shape)
            for word, array in first.items()
        }
    scales = {site.name: options.scale_at(site) for site in sites}
    constants = {site.name: network.constants(options, site) for site in sites}
    return Adapter(
        network, sites, initial, scales, dtype=torch.float32, device=CPU, constants=constants
    )


def options_of(called: str) -> NetworkOptions:
    given = {"rank": 4, **NETWORKS[called]}
    given = {word: value for word, value in given.items() if value is not None}
    return get_network(given["kind"]).options(**given)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILY_KINDS)
def test_a_file_of_every_naming_is_read_back_layer_by_layer(kind: str) -> None:
    _, sites, names = base(kind)
    modules = every_layer(kind, alphas=(2.0, 2.0, 0.7, 5.0))
    for naming in namings(kind):
        file = read_adapter(file_bytes(modules, names=names, naming=naming))
        assert kind in families_of(file)
        found, left = onto(file, sites, names.place)
        assert left == []
        assert set(found) == {module.name for module in modules}
        for module in modules:
            wanted = delta(*module.low_rank)
            limit = 3e-7 * float(wanted.abs().max())  # two roundings to float32
            assert_close(delta(*found[module.name].low_rank), wanted, rtol=0, atol=limit)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILY_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_rank_files_of_every_naming_are_proven(kind: str, dtype: torch.dtype) -> None:
    _, _, names = base(kind)
    modules = every_layer(kind, alphas=(2.0, 2.0, 0.7, 5.0))
    read = {}
    for naming in namings(kind):
        data = file_bytes(modules, names=names, naming=naming, dtype=dtype)
        found = compare_file(data, as_trained(modules), names)
        assert found.problems == ()
        assert found.modules == len(modules)
        assert found.worst <= 2.2 * torch.finfo(dtype).eps
        read[naming] = found.by_diffusers
    assert read["diffusers"] == len(modules)
    assert (read["kohya"] > 0) == (kind != "sd3")
    assert (read["kohya"] == len(modules)) == (kind in ("sd15", "sd2", "sdxl"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdxl", "flux1"])
@pytest.mark.parametrize("called", NETWORKS)
def test_every_networks_file_is_proven_and_begins_a_run_again(kind: str, called: str) -> None:
    _, sites, names = base(kind)
    options = options_of(called)
    adapter = moved_adapter(kind, options)
    modules = [AdapterModule(name, tensors) for name, tensors in adapter.modules().items()]
    for naming in namings(kind):
        export = ExportOptions(naming=naming)
        if list(naming_problems(export, options, kind)):
            continue
        data = adapter_bytes(laid_out(modules, names, naming), {}, dtype=torch.float16)
        found = compare_file(data, trained(adapter), names)
        assert found.problems == ()
        assert found.modules == len(adapter.sites)
        assert found.worst < 2e-2
    # And in float32 it comes back as the parameters that it was made of.
    data = adapter_bytes(laid_out(modules, names, "kohya"), {}, dtype=torch.float32)
    held = fitted(read_adapter(data), sites, names)
    (network,) = {network_of(module) for module in held.values()}
    again = weights_of(held, sites)
    for site in adapter.sites:
        exact = {word: torch.from_numpy(array) for word, array in again.weights[site.name].items()}
        weight = torch.ones(weight_shape(site), dtype=torch.float64)
        frozen = {"weight": weight, "bias": torch.ones(len(weight), dtype=torch.float64)}
        wanted = trained(adapter).merged(site, dict(frozen))
        scale = again.scales[site.name]
        merged = get_network(network).merged(exact, site, scale, dict(frozen))
        for word in frozen:
            assert_close(merged[word], wanted[word], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdxl", "flux1"])
def test_a_file_that_holds_something_else_is_found_out_whatever_its_kind(kind: str) -> None:
    _, _, names = base(kind)
    for called in ("lora", "dora", "loha", "lokr", "oft", "boft", "glora", "ia3", "full", "norms"):
        adapter = moved_adapter(kind, options_of(called))
        modules = [AdapterModule(name, tensors) for name, tensors in adapter.modules().items()]
        first = modules[0]
        word = next(word for word, held in first.tensors.items() if held.numel() > 1)
        off = AdapterModule(first.name, {**first.tensors, word: first.tensors[word] * 1.05})
        data = adapter_bytes(laid_out([off, *modules[1:]], names, "kohya"), {}, dtype=torch.float16)
        problems = compare_file(data, trained(adapter), names).problems
        assert len(problems) == 1, called
        assert f"ΔW differs: {first.name} by " in problems[0]
        fewer = adapter_bytes(laid_out(modules[1:], names, "kohya"), {}, dtype=torch.float16)
        (missing,) = compare_file(fewer, trained(adapter), names).problems
        assert missing == f"missing from the file: {first.name}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILY_KINDS)
def test_whole_predictions_agree_by_two_roads(kind: str, tmp_path: Path) -> None:
    family, _, names = base(kind)
    # T5, which diffusers loads nothing into, apart: then the other road is raylora's own.
    plain = [module for module in every_layer(kind) if "encoder.block" not in module.name]
    inner = [module for module in plain if _in_blocks(module.name)]
    path = tmp_path / "a.safetensors"
    for naming, modules, reader in (
        ("diffusers", plain, "diffusers"),
        ("kohya", inner, "raylora" if kind == "sd3" else "diffusers"),
        ("kohya", every_layer(kind), "raylora" if kind in ("sd3", "flux1") else "diffusers"),
    ):
        path.write_bytes(file_bytes(modules, names=names, naming=naming))
        report = verify_predictions(path, family)
        assert report.reader == reader
        assert report.modules == len(modules)
        assert report.difference <= 2e-6
        assert report.effect > 1e-3


def _in_blocks(name: str) -> bool:
    return not name.startswith("transformer.") or "transformer_blocks" in name


@pytest.mark.slow
@pytest.mark.parametrize("called", ["dora", "loha", "oft", "norms"])
def test_whole_predictions_of_other_networks_agree_too(called: str, tmp_path: Path) -> None:
    family, _, names = base("sdxl")
    adapter = moved_adapter("sdxl", options_of(called), size=0.02)
    modules = [AdapterModule(name, tensors) for name, tensors in adapter.modules().items()]
    path = tmp_path / "a.safetensors"
    path.write_bytes(adapter_bytes(laid_out(modules, names, "kohya"), {}, dtype=torch.float32))
    report = verify_predictions(path, family)
    assert report.reader == "raylora"
    assert report.difference <= 1e-5
    assert report.effect > 1e-3


TARGETS = {
    "sdxl": ["to_q", "to_out.0", "proj_in", "conv1"],
    "sd3": ["to_q", "add_k_proj", "to_add_out", "norm1.linear"],
    "flux1": ["to_q", "add_v_proj", "proj_mlp", "proj_out"],
}


def with_peft(model: nn.Module, targets: list[str], **more: Any) -> dict[str, Tensor]:
    """A random peft adapter on a model; its ΔW by the layer's path."""
    from peft import LoraConfig

    model.add_adapter(  # type: ignore[operator]
        LoraConfig(r=3, lora_alpha=5, target_modules=targets, alpha_pattern={"to_q": 2}, **more)
    )
    generator = torch.Generator().manual_seed(0)
    changes = {}
    for path, layer in model.named_modules():
        held: Any = layer
        if not hasattr(layer, "lora_A") or not held.lora_A:
            continue
        halves = []
        for half in (held.lora_A["default"].weight, held.lora_B["default"].weight):
            half.data = torch.randn(half.shape, generator=generator) * 0.1
            halves.append(half.detach())
        changes[path] = delta(*halves, held.scaling["default"])
    return changes


@pytest.mark.slow
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("settings", [True, False])
def test_files_that_diffusers_pipelines_save_are_read(
    kind: str, settings: bool, tmp_path: Path
) -> None:
    from peft import get_peft_model_state_dict

    family, sites, names = base(kind)
    pipeline = family.load_pipeline(dtype=torch.float32, device=CPU)
    component = family.component
    denoiser, text = getattr(pipeline, component), pipeline.text_encoder
    more = {} if settings else {"use_rslora": False}
    changes = {f"{component}.{path}": change for path, change in
               with_peft(denoiser, TARGETS[kind], **more).items()}  # fmt: skip
    level = "" if hasattr(text, "text_model") else "text_model."
    found = with_peft(text, ["q_proj", "out_proj"])
    changes |= {f"text_encoder.{level}{path}": change for path, change in found.items()}
    about: dict[str, Any] = {}
    if settings:
        about = {
            f"{component}_lora_adapter_metadata": denoiser.peft_config["default"].to_dict(),
            "text_encoder_lora_adapter_metadata": text.peft_config["default"].to_dict(),
        }
    pipeline.save_lora_weights(
        tmp_path,
        **{f"{component}_lora_layers": get_peft_model_state_dict(denoiser)},
        text_encoder_lora_layers=get_peft_model_state_dict(text),
        **about,
    )
    held = fitted(read_adapter(tmp_path / "pytorch_lora_weights.safetensors"), sites, names)
    assert set(held) == set(changes)
    for name, change in changes.items():
        if not settings:  # the file says nothing of alpha then, and every reader takes the rank
            change = change * 3 / (2 if name.endswith("to_q") else 5)
        # The sum of three products in float64, alpha in float32.
        assert_close(kinds.change(held[name].tensors)["weight"], change, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_files_that_peft_saves_are_read(dora: bool, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    family, sites, names = base("sdxl")
    denoiser = family.load_pipeline(dtype=torch.float32, device=CPU).unet
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["to_k", "conv2"], use_dora=dora)
    model: Any = get_peft_model(denoiser, config)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            drawn = torch.randn(weight.shape, generator=generator)
            weight.data = drawn.abs() + 0.5 if "magnitude" in name else 0.1 * drawn
    model.save_pretrained(tmp_path)
    held = fitted(read_adapter(tmp_path / "adapter_model.safetensors"), sites, names)
    before = {
        path: layer.base_layer.weight.detach().double()
        for path, layer in model.base_model.model.named_modules()
        if hasattr(layer, "base_layer")
    }
    assert set(held) == {f"unet.{path}" for path in before}
    merged = dict(model.merge_and_unload().named_modules())
    for path, weight in before.items():
        found = kinds.merged(held[f"unet.{path}"].tensors, {"weight": weight})["weight"]
        assert_close(found.float(), merged[path].weight.detach(), rtol=1e-5, atol=1e-6)


def test_a_file_as_sd_scripts_writes_it_with_qkv_trained_as_one_is_cut_by_rows() -> None:
    _, sites, names = base("flux1")
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    joined = random_module(name, (96, 32), rank=4, alpha=2.0)
    file = read_adapter(adapter_bytes([joined], {}, dtype=torch.float32))
    found = fitted(file, sites, names)
    assert len(found) == 3
    whole = delta(*joined.low_rank)
    for number, layer in enumerate("qkv"):
        part = found[f"transformer.transformer_blocks.0.attn.to_{layer}"]
        assert_close(delta(*part.low_rank), whole[32 * number : 32 * number + 32], rtol=0, atol=0)
    wider = random_module(name, (120, 32))
    file = read_adapter(adapter_bytes([wider], {}, dtype=torch.float32))
    with pytest.raises(WeightsError, match="has 120 outputs, the base's 96"):
        fitted(file, sites, names)
    halves = {
        f"hada_w{n}_{h}": torch.ones((96, 2) if h == "a" else (2, 32)) for n in "12" for h in "ab"
    }
    file = read_adapter(adapter_bytes([AdapterModule(name, halves)], {}, dtype=torch.float32))
    with pytest.raises(WeightsError, match="loha cannot be cut into parts"):
        fitted(file, sites, names)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILY_KINDS)
def test_a_file_for_another_family_is_refused_by_name(kind: str) -> None:
    names = base(kind)[2]
    for naming in namings(kind):
        file = read_adapter(file_bytes(every_layer(kind), names=names, naming=naming))
        for other in FAMILIES:
            if other in families_of(file):
                refuse_others(file, other)  # nothing in it tells the two apart
                continue
            with pytest.raises(WeightsError, match=r"the LoRA is for .*, and the base is ") as told:
                refuse_others(file, other)
            assert FAMILIES[kind] in str(told.value)
            assert FAMILIES[other] in str(told.value)
        if naming == "kohya":
            alike = {"sd15", "sd2"} if kind in ("sd15", "sd2") else {kind}
            assert families_of(file) == alike
