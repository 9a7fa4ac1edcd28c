"""Every network against peft and lycoris: outputs, gradients, merged weights, and files read there.

Both are written by others from the same papers. lycoris' modules are made by its own loader from
what we export, so a file means there what was trained here.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from adapters import fresh_adapter
from torch import Tensor, nn
from torch.testing import assert_close

from raylora.adapt.attach import Adapter, Attachment
from raylora.base.site import Site
from raylora.components.sites import site_of
from raylora.networks import Network, NetworkOptions, get_network

pytestmark = pytest.mark.slow

ROUNDING = 1e-11  # float64 in another order


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


class Layers(nn.Module):
    """One of each kind of layer that models have, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        double = {"dtype": torch.float64}
        self.conv1 = nn.Conv2d(4, 6, 3, padding=1, **double)
        self.sampler = nn.Conv2d(6, 6, 3, stride=2, padding=1, **double)
        self.shortcut = nn.Conv2d(6, 8, 1, **double)
        self.group = nn.GroupNorm(2, 8, **double)
        self.proj = nn.Linear(8, 12, bias=False, **double)
        self.layer = nn.LayerNorm(12, **double)
        self.out = nn.Linear(12, 12, **double)
        with torch.no_grad():
            for number, weight in enumerate(self.parameters()):
                weight.copy_(normal(number, *weight.shape))
        self.requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = torch.tanh(self.sampler(torch.tanh(self.conv1(pixels))))
        hidden = torch.tanh(self.group(self.shortcut(hidden)))
        tokens: Tensor = self.out(torch.tanh(self.layer(self.proj(hidden.flatten(2).mT))))
        return tokens


NAMES = [name for name, _ in Layers().named_children()]


def options_of(kind: str, **given: Any) -> NetworkOptions:
    return get_network(kind).options(**given)


class Ours:
    """A trained adapter on every layer that its network is for, and what it did."""

    def __init__(self, options: NetworkOptions) -> None:
        network = get_network(options.kind)
        model = Layers()
        sites = [site_of(f"toy.{name}", model.get_submodule(name)) for name in NAMES]
        self.network: Network = network
        self.sites: list[Site] = [
            site for site in sites if site and network.fits(options, site) is None
        ]
        self.adapter: Adapter = fresh_adapter(
            network,
            options,
            self.sites,
            seed=1,
            dtype=torch.float64,
            device=torch.device("cpu"),
            models={"toy": model},
        )
        with torch.no_grad():
            self.adapter.values += 0.3 * normal(9, *self.adapter.values.shape)
        Attachment(model, "toy", self.adapter)
        self.found = run(model)

    @property
    def names(self) -> list[str]:
        return [site.name.removeprefix("toy.") for site in self.sites]

    def held(self, name: str) -> dict[str, Tensor]:
        return self.adapter.parameters[f"toy.{name}"]

    def trained(self, name: str) -> dict[str, Tensor]:
        return {word: leaf for word, leaf in self.held(name).items() if leaf.requires_grad}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What the file has of a layer."""
        return self.adapter.modules()[f"toy.{name}"]

    def merged(self, name: str) -> dict[str, Tensor]:
        layer = Layers().get_submodule(name)
        frozen = {word: weight.detach() for word, weight in layer.named_parameters()}
        scale = self.adapter.scales[f"toy.{name}"]
        site = next(one for one in self.sites if one.name == f"toy.{name}")
        return self.network.merged(self.held(name), site, scale, frozen)

    def is_trained_as(
        self, name: str, theirs: dict[str, Tensor | None], *, but: Collection[str] = ()
    ) -> None:
        """Every gradient is that of the other's parameter of that word."""
        trained = self.trained(name)
        assert trained.keys() == theirs.keys()
        for word, leaf in trained.items():
            if word in but:
                continue
            assert leaf.grad is not None
            gradient = theirs[word]
            assert gradient is not None
            expected = gradient.reshape(leaf.shape)
            assert expected.abs().max() > 1e-6, word
            assert_close(leaf.grad, expected, rtol=1e-10, atol=ROUNDING)


def run(model: nn.Module) -> tuple[Tensor, Tensor]:
    """(output, gradient of the input); gradients of weights are left where they belong."""
    pixels = normal(20, 2, 4, 6, 6).requires_grad_()
    output = model(pixels)
    (output * normal(21, *output.shape)).sum().backward()
    assert pixels.grad is not None
    return output.detach(), pixels.grad


def same(theirs: Any, ours: Tensor) -> None:
    theirs.data.copy_(ours.detach().reshape(theirs.shape))


def in_peft(config: Any, names: list[str]) -> tuple[nn.Module, dict[str, Any]]:
    """(the layers under peft, the adapted ones by name)."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Layers(), config)  # type: ignore[arg-type]
    model.double()
    return model, {name: model.base_model.model.get_submodule(name) for name in names}


LARGE = ["conv1", "sampler"]
LINEAR_AND_CONV = ["conv1", "sampler", "shortcut", "proj", "out"]


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("locon", {"rank": 3, "alpha": 1.5, "conv_rank": 2, "conv_alpha": 5.0}),
        ("dora", {"rank": 3, "alpha": 1.5}),
        ("dora", {"rank": 3, "alpha": 1.5, "scaling": "sqrt_rank"}),
    ],
    ids=["locon", "dora", "dora-rslora"],
)
def test_low_rank_networks_are_pefts(kind: str, given: dict[str, Any]):
    from peft import LoraConfig

    ours = Ours(options_of(kind, **given))
    assert ours.names == LINEAR_AND_CONV
    config = LoraConfig(
        r=given["rank"],
        lora_alpha=given["alpha"],
        target_modules=ours.names,
        rank_pattern=dict.fromkeys(LARGE, given.get("conv_rank", given["rank"])),
        alpha_pattern=dict.fromkeys(LARGE, given.get("conv_alpha", given["alpha"])),
        use_dora=kind == "dora",
        use_rslora="scaling" in given,
    )
    model, layers = in_peft(config, ours.names)

    def parts(layer: Any) -> dict[str, Any]:
        found = {"down": layer.lora_A["default"].weight, "up": layer.lora_B["default"].weight}
        if kind == "dora":
            found["dora_scale"] = layer.lora_magnitude_vector["default"].weight
        return found

    for name, layer in layers.items():
        for word, part in parts(layer).items():
            same(part, ours.held(name)[word])
    assert_close(run(model), ours.found, rtol=0, atol=ROUNDING)
    for name, layer in layers.items():
        ours.is_trained_as(name, {word: part.grad for word, part in parts(layer).items()})


@pytest.mark.parametrize("tucker", [False, True])
def test_loha_is_pefts(tucker: bool):
    from peft import LoHaConfig

    ours = Ours(options_of("loha", rank=3, alpha=1.5, tucker=tucker))
    config = LoHaConfig(
        r=3,
        alpha=1.5,  # type: ignore[arg-type]
        target_modules=ours.names,
        use_effective_conv2d=tucker,
    )
    # Its hand-written gradient of Tucker's form takes the second factor's core for the first pair's
    # outer matrix and the other way round; lycoris' and autograd's are ours.
    wrong = {"hada_w1_a", "hada_w2_a"} if tucker else set()
    are_pefts_lycoris_layers(ours, config, wrong=wrong, wrong_at=LARGE)


@pytest.mark.parametrize(
    ("given", "theirs"),
    [
        ({}, {}),
        ({"factor": 2}, {"decompose_factor": 2}),
        ({"tucker": True}, {"use_effective_conv2d": True}),
        ({"decompose_both": True}, {"decompose_both": True}),
    ],
    ids=str,
)
def test_lokr_is_pefts(given: dict[str, Any], theirs: dict[str, Any]):
    from peft import LoKrConfig

    # peft scales whole blocks too, and readers of files do not: ranks of 1 leave none whole.
    ours = Ours(options_of("lokr", rank=1, alpha=1.5, **given))
    shapes = {word for name in ours.names for word in ours.held(name)}
    assert ("lokr_w1_a" in shapes) == ("decompose_both" in given)
    assert ("lokr_t2" in shapes) == ("tucker" in given)
    config = LoKrConfig(r=1, alpha=1.5, target_modules=ours.names, **theirs)  # type: ignore[arg-type]
    are_pefts_lycoris_layers(ours, config)


def are_pefts_lycoris_layers(
    ours: Ours, config: Any, *, wrong: Collection[str] = (), wrong_at: Sequence[str] = ()
) -> None:
    model, layers = in_peft(config, ours.names)

    def part(layer: Any, word: str) -> Any:
        return getattr(layer, word)["default"]

    for name, layer in layers.items():
        assert {word for word in layer.adapter_layer_names if len(getattr(layer, word))} == set(
            ours.held(name)
        )
        for word, leaf in ours.held(name).items():
            same(part(layer, word), leaf)
    assert_close(run(model), ours.found, rtol=0, atol=ROUNDING)
    for name, layer in layers.items():
        gradients = {word: part(layer, word).grad for word in ours.held(name)}
        ours.is_trained_as(name, gradients, but=wrong if name in wrong_at else ())


def test_rotations_are_pefts():
    """peft turns a layer's inputs, so of its OFT and BOFT the rotation alone can be ours."""
    from peft.tuners.boft.layer import BOFTLayer
    from peft.tuners.oft.layer import OFTRotationModule

    from raylora.networks.oft import turn

    blocks = 0.3 * normal(0, 4, 3, 3)
    skew, eye = blocks - blocks.mT, torch.eye(3, dtype=torch.float64)
    ours = eye + turn(blocks, 0.0)
    module = OFTRotationModule(4, 3, 3, 12, use_cayley_neumann=False).double()
    rows, columns = torch.triu_indices(3, 3, 1)
    # Its (I - Q)(I + Q)⁻¹ is ours of -Q.
    theirs = module._cayley_batch(-skew[:, rows, columns], 3, use_cayley_neumann=False)
    assert_close(ours, theirs, rtol=0, atol=ROUNDING)
    halves = BOFTLayer.cayley_batch(None, -2 * blocks)  # type: ignore[arg-type]
    assert_close(ours, halves, rtol=0, atol=ROUNDING)


@pytest.fixture
def in_double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """lycoris makes its parameters in the default dtype and casts some numbers to 32 bits."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def read_by_lycoris(tensors: dict[str, Tensor], name: str, layer: nn.Module) -> Any:
    """The module that lycoris' own loader makes of a file's tensors."""
    from lycoris.modules import get_module, make_module

    state = {f"{name}.{word}": tensor for word, tensor in tensors.items()}
    kind, found = get_module(state, name)
    assert kind is not None
    return make_module(kind, found, name, layer)


def made_for_lycoris(
    kind: str, tensors: dict[str, Tensor], name: str, layer: nn.Module, **given: Any
) -> Any:
    """A module of lycoris with the options given, which then loads the tensors."""
    import lycoris.modules as theirs

    module = getattr(theirs, kind)(name, layer, 1.0, **given)
    missing, unexpected = module.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"scalar"}
    return module


WORDS = {
    "down": "lora_down.weight",
    "up": "lora_up.weight",
    "mid": "lora_mid.weight",
    "diff": "weight",
    "diff_b": "bias",
    "of_inputs": "weight",
    "of_outputs": "weight",
    **{word: f"{word}.weight" for word in ("a1", "a2", "b1", "b2")},
}
"""Our words of parameters -> lycoris', where they are others."""


def are_lycoris_modules(ours: Ours, modules: dict[str, Any], model: nn.Module) -> None:
    for name, module in modules.items():
        model.get_submodule(name).forward = module.forward
    assert_close(run(model), ours.found, rtol=0, atol=ROUNDING)
    for name, module in modules.items():
        gradients = {
            word: module.get_parameter(WORDS.get(word, word)).grad for word in ours.trained(name)
        }
        ours.is_trained_as(name, gradients)


def is_merged_as(ours: Ours, name: str, module: Any) -> None:
    found = ours.merged(name)
    with torch.no_grad():
        if module.name in ("loha", "kron"):
            # Its get_merged_weight multiplies with alpha / rank twice, and its forward once.
            weight, bias = module.org_weight + module.get_weight(module.shape), None
        else:
            weight, bias = module.get_merged_weight(1)
    assert_close(found["weight"], weight.view(found["weight"].shape), rtol=0, atol=ROUNDING)
    if bias is not None:
        assert_close(found["bias"], bias, rtol=0, atol=ROUNDING)


READ = [
    ("locon", {"rank": 3, "alpha": 1.5, "conv_rank": 2, "conv_alpha": 5.0}),
    ("locon", {"rank": 3, "alpha": 1.5, "tucker": True}),
    ("dora", {"rank": 3, "alpha": 1.5, "norm_gradient": True}),
    ("loha", {"rank": 3, "alpha": 1.5}),
    ("loha", {"rank": 3, "alpha": 1.5, "tucker": True}),
    ("lokr", {"rank": 1, "alpha": 1.5}),
    ("lokr", {"rank": 1, "alpha": 1.5, "factor": 2}),
    ("lokr", {"full_matrix": True}),
    ("oft", {"rank": 3}),
    ("oft", {"rank": 3, "rescale": True}),
    ("lycoris", {"algo": "boft", "rank": 6}),
    ("lycoris", {"algo": "boft", "rank": 6, "rescale": True}),
    ("lycoris", {"algo": "glora", "rank": 3, "alpha": 1.5}),
    ("lycoris", {"algo": "full"}),
    ("lycoris", {"algo": "norms"}),
]


@pytest.mark.parametrize(("kind", "given"), READ, ids=str)
@pytest.mark.usefixtures("in_double")
def test_a_file_is_in_lycoris_what_was_trained(kind: str, given: dict[str, Any]):
    ours = Ours(options_of(kind, **given))
    model = Layers()
    modules = {
        name: read_by_lycoris(ours.tensors(name), name, model.get_submodule(name))
        for name in ours.names
    }
    for name, module in modules.items():
        is_merged_as(ours, name, module)
    are_lycoris_modules(ours, modules, model)


BUILT = [
    # Its loader takes the size of w2_a for the rank of Tucker's form, and knows one axis of DoRA's
    # and no unbalanced blocks; it passes IA3Module one word too many.
    (
        "lokr",
        {"rank": 1, "alpha": 1.5, "tucker": True},
        "LokrModule",
        {"lora_dim": 1, "alpha": 1.5, "use_tucker": True},
    ),
    (
        "lokr",
        {"rank": 1, "alpha": 1.5, "unbalanced": True, "factor": 2},
        "LokrModule",
        {"lora_dim": 1, "alpha": 1.5, "unbalanced_factorization": True, "factor": 2},
    ),
    (
        "lokr",
        {"rank": 1, "alpha": 1.5, "decompose_both": True},
        "LokrModule",
        {"lora_dim": 1, "alpha": 1.5, "decompose_both": True},
    ),
    (
        "dora",
        {"rank": 3, "alpha": 1.5, "norm_gradient": True, "axis": "input"},
        "LoConModule",
        {"lora_dim": 3, "alpha": 1.5, "weight_decompose": True, "wd_on_out": False},
    ),
    ("lycoris", {"algo": "ia3"}, "IA3Module", {}),
    ("lycoris", {"algo": "ia3", "on_input": True}, "IA3Module", {"train_on_input": True}),
]


@pytest.mark.parametrize(("kind", "given", "name", "theirs"), BUILT, ids=str)
@pytest.mark.usefixtures("in_double")
def test_what_lycoris_trains_but_does_not_read_is_the_same(
    kind: str, given: dict[str, Any], name: str, theirs: dict[str, Any]
):
    ours = Ours(options_of(kind, **given))
    model = Layers()
    modules = {
        layer: made_for_lycoris(
            name, ours.tensors(layer), layer, model.get_submodule(layer), **theirs
        )
        for layer in ours.names
    }
    for layer, module in modules.items():
        is_merged_as(ours, layer, module)
    are_lycoris_modules(ours, modules, model)


@pytest.mark.parametrize(
    ("kind", "given", "name"),
    [("oft", {"rank": 3}, "DiagOFTModule"), ("lycoris", {"algo": "boft"}, "ButterflyOFTModule")],
    ids=["oft", "boft"],
)
@pytest.mark.usefixtures("in_double")
def test_a_limited_rotation_is_trained_as_in_lycoris(kind: str, given: dict[str, Any], name: str):
    alpha, rank = 0.02, given.get("rank", 6)
    ours = Ours(options_of(kind, **{**given, "rank": rank, "alpha": alpha}))
    model = Layers()
    modules = {}
    for layer in ours.names:
        blocks = ours.held(layer)["oft_blocks"].detach()
        sites = {site.name: site for site in ours.sites}
        assert (blocks - blocks.mT).norm() > 2 * alpha * sites[f"toy.{layer}"].outputs
        words = {"lora_dim": blocks.shape[-1], "constraint": alpha}
        held = {"oft_blocks": blocks, "alpha": torch.tensor(alpha)}
        modules[layer] = made_for_lycoris(name, held, layer, model.get_submodule(layer), **words)
        is_merged_as(ours, layer, modules[layer])
        # What is written has no limit left to apply.
        read = read_by_lycoris(ours.tensors(layer), layer, Layers().get_submodule(layer))
        is_merged_as(ours, layer, read)
    are_lycoris_modules(ours, modules, model)


def test_layers_are_split_as_in_lycoris():
    from lycoris.functional import factorization, power2factorization

    from raylora.networks.lokr import largest_divisor, two_factors
    from raylora.networks.lycoris import butterfly

    for size in range(1, 400):
        for factor in (-1, *range(1, 40)):
            assert two_factors(size, factor) == factorization(size, factor)
        for rank in range(2, 40):
            # OFT's blocks are read as factors, the smaller of which is the block's size.
            block = largest_divisor(size, rank)
            assert factorization(size, block) == (block, size // block)
            if rank * rank <= size:
                assert block == factorization(size, rank)[0]
            block, blocks = power2factorization(size, rank)
            stages = bin(blocks - 1).count("1") + 1
            assert butterfly(size, rank) == ((stages, blocks, block) if blocks else None)
