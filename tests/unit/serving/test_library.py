"""What a store has to show, without a run and without a base: its files are written by hand."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from adapters import SD15, file_bytes, raw_bytes
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from raylora.adapt.attach import Adapter
from raylora.adapt.deltas import delta
from raylora.adapt.from_file import adapter_on
from raylora.adapt.lora_file import ALPHA, DOWN, UP, AdapterModule
from raylora.base.errors import MissingObject, WeightsError
from raylora.base.site import Site
from raylora.base.storage import Storage, open_storage
from raylora.serving.library import Library, Recent
from raylora.training.checkpoint import State, write_checkpoint

BLOCK = "unet.mid_block.attentions.0"
SITES = [
    Site(f"{BLOCK}.proj_in", "conv", 6, 4),
    Site(f"{BLOCK}.transformer_blocks.0.attn1.to_q", "linear", 4, 5),
    Site(f"{BLOCK}.transformer_blocks.0.attn1.to_out.0", "linear", 5, 4),
    Site("unet.mid_block.resnets.0.conv1", "conv", 3, 5, (3, 3), (1, 1), (1, 1)),
    Site("unet.down_blocks.0.downsamplers.0.conv", "conv", 3, 3, (3, 3), (2, 2), (1, 1)),
    Site("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "linear", 4, 4),
]
RANKS = (2, 3, 1, 2, 3, 1)
ALPHAS = (1.0, 6.0, 0.5, 4.0, 1.5, 2.0)


def modules(seed: int = 0) -> list[AdapterModule]:
    """One for each site, each of its own rank and alpha."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for site, rank, alpha in zip(SITES, RANKS, ALPHAS, strict=True):
        conv = site.kind == "conv"
        kernel = site.kernel if conv else ()
        down = torch.randn(rank, site.inputs, *kernel, generator=generator)
        up = torch.randn(site.outputs, rank, *((1, 1) if conv else ()), generator=generator)
        made.append(AdapterModule(site.name, {DOWN: down, UP: up, ALPHA: torch.tensor(alpha)}))
    return made


def file(seed: int = 0, *, dtype: torch.dtype = torch.float32) -> bytes:
    return raw_bytes(modules(seed), dtype=dtype)


def on_sites(data: bytes, sites: list[Site] = SITES) -> Adapter:
    return adapter_on(sites, SD15, data, dtype=torch.float32, device=torch.device("cpu"))


def add_run(store: Storage, run: str, steps: tuple[int, ...]) -> None:
    place = store.within(f"runs/{run}")
    place.write("job.yaml", yaml.safe_dump({"name": run}).encode())
    place.write("samples/000000/000.png", b"not a run")
    for step in steps:
        write_checkpoint(place, State(step, {"values": torch.zeros(1)}, {}), file(step))


@pytest.fixture
def store(tmp_path) -> Storage:
    store = open_storage(str(tmp_path))
    add_run(store, "cats", (10, 20, 100))
    add_run(store, "dogs", ())
    return store


def test_runs_and_complete_checkpoints_are_listed(storage):
    add_run(storage, "cats", (10, 100))
    add_run(storage, "dogs", ())
    storage.write("runs/half/checkpoints/000010/manifest.json", b"{}")
    storage.write("runs/cats/checkpoints/000200/adapter.safetensors", b"no manifest yet")
    library = Library(storage)
    assert library.runs() == ["cats", "dogs"]
    assert [checkpoint.name for checkpoint in library.checkpoints("cats")] == [
        "cats/10",
        "cats/100",
    ]
    assert library.checkpoints("dogs") == []
    assert library.job("dogs") == {"name": "dogs"}


def test_a_run_alone_means_its_newest_checkpoint(store):
    library = Library(store)
    assert library.find("cats").name == "cats/100"
    assert library.find("cats/20").step == library.find("cats/000020").step == 20
    assert library.find("cats/20").hash != library.find("cats/10").hash
    add = State(200, {"values": torch.zeros(1)}, {})
    write_checkpoint(store.within("runs/cats"), add, file(200))
    assert library.find("cats").name == "cats/200"


@pytest.mark.parametrize(
    ("adapter", "sentence"),
    [
        ("cat", "adapter 'cat': no such run. Near: cats."),
        ("zebra", "adapter 'zebra': no such run. There are: cats, dogs."),
        ("cats/21", "adapter 'cats/21': the run has no such checkpoint. Near: "),
        ("cats/", "the run has no such checkpoint."),
        ("cats/²", "the run has no such checkpoint."),
        ("cats/10/20", "the run has no such checkpoint."),
        ("dogs", "adapter 'dogs': the run has no checkpoint yet."),
        ("../cats", "no such run."),
        ("", "no such run."),
    ],
)
def test_an_unknown_adapter_names_near_ones(store, adapter, sentence):
    with pytest.raises(MissingObject) as caught:
        Library(store).find(adapter)
    assert sentence in str(caught.value)


def test_a_file_that_changed_after_it_was_saved_is_refused(store):
    library = Library(store)
    checkpoint = library.find("cats/10")
    place = {"sites": SITES, "names": SD15, "dtype": torch.float32, "device": torch.device("cpu")}
    library.load(checkpoint, **place)
    store.write("runs/cats/checkpoints/000010/adapter.safetensors", file(99))
    with pytest.raises(WeightsError, match=r"cats/10: .* not what its manifest says"):
        library.load(checkpoint, **place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_files_own_ranks_and_alphas_are_applied(dtype):
    adapter = on_sites(file(dtype=dtype))
    for site, module, rank, alpha in zip(SITES, modules(), RANKS, ALPHAS, strict=True):
        stored = [module.tensors[part].to(dtype) for part in (DOWN, UP)]
        weight = delta(*stored, alpha / rank).float()
        if site.kind == "conv":
            x = torch.randn(2, site.inputs, 6, 6, generator=torch.Generator().manual_seed(1))
            expected = conv2d(x, weight, stride=site.stride, padding=site.padding)
        else:
            x = torch.eye(site.inputs)
            expected = linear(x, weight)
        # float32 sums of at most 27 times 3 products of numbers of size 1
        given = adapted(adapter, site, x, torch.zeros_like(expected))
        torch.testing.assert_close(given, expected, rtol=0, atol=2e-5)


def adapted(adapter: Adapter, site: Site, x: Tensor, base: Tensor) -> Tensor:
    """What the adapter adds at a site to what the base gives."""
    return adapter.adapted(site, nn.Identity(), x, base)


def test_a_file_of_diffusers_naming_is_served_too():
    data = file_bytes(modules(), dtype=torch.float64, naming="diffusers")
    ours, theirs = on_sites(file(dtype=torch.float64)), on_sites(data)
    assert [site.name for site in theirs.sites] == [site.name for site in SITES]
    for site in SITES:
        for adapter in (ours, theirs):
            assert adapter.parameters[site.name]["down"].dim() == (4 if site.kernel[0] > 1 else 2)
        (down, up), scale = ours.parameters[site.name].values(), ours.scales[site.name]
        halves = theirs.parameters[site.name].values()
        assert theirs.scales[site.name] == 1.0
        wanted = delta(down.detach(), up.detach(), scale)
        found = delta(*(half.detach() for half in halves), 1.0)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_layers_that_a_file_leaves_out_stay_bare():
    data = file_bytes(modules()[:1])
    assert list(on_sites(data).parameters) == [SITES[0].name]


def test_a_lora_for_another_base_is_refused():
    with pytest.raises(WeightsError, match=r"no such layer for 1 modules of the file: .*to_out_0"):
        on_sites(file(), SITES[:2] + SITES[3:])
    wider = [*SITES[:2], Site(SITES[2].name, "linear", 8, 8), *SITES[3:]]
    with pytest.raises(WeightsError, match="a weight of 4 x 5, the base's of 8 x 8"):
        on_sites(file(), wider)


def test_a_manifest_names_the_file_by_its_hash(store):
    manifest = json.loads(store.read("runs/cats/checkpoints/000010/manifest.json"))
    expected = manifest["objects"]["adapter.safetensors"]["sha256"]
    assert Library(store).find("cats/10").hash == expected


def test_recent_holds_no_more_than_its_limit_and_drops_the_one_unused_longest():
    recent: Recent[str] = Recent(2)
    made: list[str] = []

    def get(key: str) -> str:
        return recent.get(key, lambda: made.append(key) or key.upper())

    for key in "abacab":
        assert get(key) == key.upper()
    assert made == ["a", "b", "c", "b"]


def test_what_could_not_be_made_is_not_held():
    recent: Recent[int] = Recent(1)
    with pytest.raises(ZeroDivisionError):
        recent.get("a", lambda: 1 // 0)
    assert recent.get("a", lambda: 7) == 7
