"""What each network costs beside LoRA, and beside the same method of peft and of lycoris.

    python benchmarks/networks.py [--rounds 15] [--note TEXT] [--json]

On two pieces of SD 1.5 in true size, with random weights: a transformer block (320 wide, 1024
tokens) and a 3x3 convolution (320 channels, 32 x 32). Of each network: how many numbers it trains,
how many bytes it keeps for the backward pass, and how long forward and backward take. Wants
`pip install raylora[test]`, which brings lycoris.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, NamedTuple, get_args

import results
import torch
from torch import Tensor, nn

from raylora.adapt.attach import Adapter, Attachment, first_weights, weights_in
from raylora.adapt.dropout import Dropout
from raylora.base.lookup import plugins
from raylora.components.sites import site_of
from raylora.networks import get_network

RANK = 16
SAME = 1e-4
"""How far the outputs of two programs may be apart, beside what the adapter adds: 32 bits, sums of
up to 2880 numbers, and ΔW as a difference of two weights in lycoris."""


class Block(nn.Module):
    """A transformer block of the UNet's first stage, with its text."""

    def __init__(self) -> None:
        from diffusers.models.attention import BasicTransformerBlock

        super().__init__()
        self.block = BasicTransformerBlock(320, 8, 40, cross_attention_dim=768)

    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        """(1, T, 320) and (1, 77, 768) to (1, T, 320)."""
        found: Tensor = self.block(tokens, encoder_hidden_states=text)
        return found


class Convolution(nn.Module):
    """A convolution of a residual block in the UNet's second stage."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(320, 320, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """(1, 320, H, W) to the same."""
        found: Tensor = self.conv(pixels)
        return found


class Work(NamedTuple):
    """What all do: a frozen piece of a model, its inputs, and the steps of a turn.

    The first input wants a gradient, as where other adapted layers lie before it.
    """

    said: str
    make: Callable[[], nn.Module]
    inputs: tuple[tuple[int, ...], ...]
    steps: int

    def model(self) -> nn.Module:
        """The same frozen weights each time."""
        torch.manual_seed(0)
        return self.make().requires_grad_(False)


WORKS = {
    "block": Work("a transformer block, 320 wide", Block, ((1, 1024, 320), (1, 77, 768)), 1),
    "convolution": Work("a 3x3 convolution, 320 channels", Convolution, ((1, 320, 32, 32),), 3),
}


@dataclass(frozen=True)
class Case:
    """A network with options of it, and who else has it.

    Attributes:
        peft: (its config's class, its words for what is asked), by names of the layers.
        lycoris: the class that makes its module; "read" is its loader on what raylora writes.
        works: on which pieces.
        other: project -> why its module does not give the same numbers.
    """

    kind: str
    given: Mapping[str, Any] = field(default_factory=dict)
    peft: tuple[str, Mapping[str, Any]] | None = None
    lycoris: str | None = "read"
    works: tuple[str, ...] = ("block", "convolution")
    other: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """`lora`, `lokr factor=8`, `boft`."""
        words = {"lycoris": str(self.given.get("algo"))}
        given = [f"{w}={v}" for w, v in self.given.items() if w not in ("algo", "layers")]
        return " ".join([words.get(self.kind, self.kind), *given])


_RANKED = {"r": RANK, "alpha": RANK}
_CONVOLUTION = ("convolution",)
CASES = [
    Case("lora", {}, ("LoraConfig", {"r": RANK, "lora_alpha": RANK})),
    Case("lora", {"freeze_down": True}, lycoris=None),
    Case("locon", {}, lycoris=None),
    Case("locon", {"tucker": True}, works=_CONVOLUTION),
    Case(
        "dora",
        {},
        ("LoraConfig", {"r": RANK, "lora_alpha": RANK, "use_dora": True}),
        lycoris=None,
    ),
    Case("dora", {"norm_gradient": True}),
    Case("loha", {}, ("LoHaConfig", _RANKED)),
    Case(
        "loha",
        {"tucker": True},
        ("LoHaConfig", {**_RANKED, "use_effective_conv2d": True}),
        works=_CONVOLUTION,
    ),
    Case("lokr", {}, ("LoKrConfig", _RANKED)),
    Case("lokr", {"factor": 8}, ("LoKrConfig", {**_RANKED, "decompose_factor": 8})),
    Case(
        "oft",
        {},
        ("OFTConfig", {"oft_block_size": RANK, "use_cayley_neumann": False}),
        other={"peft": "turns inputs; a convolution's are kernel-sized patches"},
    ),
    Case(
        "dylora",
        {"unit": 4},
        lycoris="DyLoraModule",
        other={"lycoris": "draws one slice for a batch, and never the ranks above it"},
    ),
    Case(
        "lycoris",
        {"algo": "boft"},
        ("BOFTConfig", {"boft_block_size": RANK}),
        other={"peft": "turns inputs, and in one stage: more of them want its CUDA extension"},
    ),
    Case("lycoris", {"algo": "glora"}),
    Case(
        "lycoris",
        {"algo": "ia3"},
        ("IA3Config", {"feedforward_modules": []}),
        lycoris="IA3Module",
        other={"peft": "multiplies the bias too"},
    ),
    Case("lycoris", {"algo": "full"}),
    Case("lycoris", {"algo": "norms"}, works=("block",)),
]
"""Those of which another program has a module. Plug-ins that are not here are measured alone."""


def cases() -> Iterator[Case]:
    """Those, and every other network that is installed."""
    yield from CASES
    known = {(case.kind, case.given.get("algo")) for case in CASES}
    for kind in plugins("raylora.networks"):
        algo = get_network(kind).options.model_fields.get("algo")
        for one in [None] if algo is None else get_args(algo.annotation):
            if (kind, one) not in known:
                yield Case(kind, {} if one is None else {"algo": one}, lycoris=None)


@dataclass
class Contestant:
    """A model with an adapter, of one program; `project` is None for the frozen model alone.

    Attributes:
        case: the network's name.
        held: what lives as long as it does: weights, buffers and parameters.
        trained: those that have a gradient.
        clear: forgets the gradients, as the program's training loops do.
        around: what a training step has around the model.
    """

    case: str
    project: str | None
    model: nn.Module
    held: list[Tensor]
    trained: list[Tensor]
    clear: Callable[[], object]
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    seconds: list[float] = field(default_factory=list)

    def turn(self, work: Work, inputs: Sequence[Tensor], gradient: Tensor) -> float:
        """CPU seconds of a forward and a backward, over a turn."""
        began = time.process_time()
        for _ in range(work.steps):
            with self.around():
                self.model(*inputs).backward(gradient)
            self.clear()
            inputs[0].grad = None
        return (time.process_time() - began) / work.steps

    def kept(self, inputs: Sequence[Tensor]) -> int:
        """Bytes of what forward keeps for backward, each storage once."""
        ours = {tensor.untyped_storage().data_ptr() for tensor in self.held}
        storages: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in ours:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, self.around():
            output = self.model(*inputs)
        assert output.requires_grad  # the graph lives, so no address was used twice
        return sum(storages.values())


def frozen(work: Work) -> Contestant:
    """The model alone."""
    model = work.model()
    return Contestant("frozen", None, model, list(model.parameters()), [], lambda: None)


def ours(case: Case, work: Work) -> tuple[Contestant, Adapter]:
    """raylora's, as trained for a while: every number moved."""
    network, model = get_network(case.kind), work.model()
    # Without a word about the rank: it is 16, and some networks refuse one.
    options = network.options(**case.given)
    found = [site_of(f"unet.{name}", module) for name, module in model.named_modules()]
    sites = [one for one in found if one and network.fits(options, one) is None]
    initial = first_weights(network, options, sites, seed=0, weight_of=weights_in({"unet": model}))
    adapter = Adapter(
        network,
        sites,
        initial,
        {site.name: options.scale_at(site) for site in sites},
        dtype=torch.float32,
        device=torch.device("cpu"),
        constants={site.name: network.constants(options, site) for site in sites},
    )
    with torch.no_grad():
        adapter.values.add_(torch.randn(adapter.values.shape), alpha=0.02)
    Attachment(model, "unet", adapter)
    step = 0

    def around() -> AbstractContextManager[object]:
        nonlocal step
        step += 1
        return adapter.dropping(step, [0])

    if unit := network.unit(options):
        adapter.dropout = Dropout(options, seed=0, unit=unit)
    one = Contestant(
        case.name,
        "raylora",
        model,
        [*model.parameters(), adapter.values, adapter.constants],
        [adapter.values],
        adapter.gradients.zero_,
        around,
    )
    return one, adapter


_PEFT_WORDS = {
    "down": "lora_A.default.weight",
    "up": "lora_B.default.weight",
    "dora_scale": "lora_magnitude_vector.default.weight",
}


def in_peft(case: Case, work: Work, adapter: Adapter) -> Contestant:
    """peft's on the same layers, with the same numbers in it where it is the same function."""
    import peft

    assert case.peft is not None
    config, given = case.peft
    names = [site.name.removeprefix("unet.") for site in adapter.sites]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = peft.get_peft_model(
            work.model(),
            getattr(peft, config)(target_modules=names, **given),
        )
    for site, name in zip(adapter.sites, names, strict=True):
        layer = model.base_model.model.get_submodule(name)
        for word, leaf in adapter.parameters[site.name].items():
            if "peft" in case.other:
                continue
            there = (
                layer.ia3_l["default"]
                if word == "of_outputs"
                else layer.get_parameter(_PEFT_WORDS.get(word, f"{word}.default"))
            )
            number = leaf.detach() + (word == "of_outputs")
            there.data.copy_(number.reshape(there.shape))
    return _of_module(case, "peft", model, [model])


def in_lycoris(case: Case, work: Work, adapter: Adapter) -> Contestant:
    """lycoris' on the same layers, made of what raylora writes into a file."""
    import lycoris.modules as theirs

    model = work.model()
    modules = []
    tensors = adapter.modules()
    for site in adapter.sites:
        layer = model.get_submodule(site.name.removeprefix("unet."))
        held = tensors[site.name]
        if case.lycoris == "read":
            state = {f"layer.{word}": tensor for word, tensor in held.items()}
            kind, found = theirs.get_module(state, "layer")
            module = theirs.make_module(kind, found, "layer", layer)
        else:
            given = {"lora_dim": RANK, "alpha": RANK, "block_size": case.given.get("unit", 0)}
            module = getattr(theirs, str(case.lycoris))("layer", layer, 1.0, **given)
            module.load_state_dict(held, strict=False)
        module.apply_to()
        modules.append(module)
    return _of_module(case, "lycoris", model, [model, *modules])


def _of_module(
    case: Case, project: str, model: nn.Module, modules: Iterable[nn.Module]
) -> Contestant:
    held = [tensor for one in modules for tensor in (*one.parameters(), *one.buffers())]
    trained = [tensor for tensor in held if tensor.requires_grad]

    def clear() -> None:
        for parameter in trained:
            parameter.grad = None

    return Contestant(case.name, project, model, held, trained, clear)


def measure(name: str, rounds: int) -> dict[str, Any]:
    """One piece: everybody's numbers on it."""
    work = WORKS[name]
    everybody, said = [frozen(work)], {}
    torch.manual_seed(1)
    inputs = [torch.randn(shape) for shape in work.inputs]
    inputs[0].requires_grad_()
    base = everybody[0].model(*inputs).detach()
    for case in cases():
        if name not in case.works:
            continue
        one, adapter = ours(case, work)
        rivals = [in_peft(case, work, adapter)] if case.peft else []
        rivals += [in_lycoris(case, work, adapter)] if case.lycoris else []
        for rival in rivals:
            said[rival.case, rival.project] = case.other.get(str(rival.project))
            if said[rival.case, rival.project] is None:
                _gives_the_same(rival, one, base, inputs)
        everybody += [one, *rivals]
    gradient = torch.randn(base.shape)
    for number in range(rounds + 1):
        for one in everybody if number % 2 else reversed(everybody):
            seconds = one.turn(work, inputs, gradient)
            if number:  # the first warms up
                one.seconds.append(seconds)
        print(f"{name}: round {number} of {rounds}", file=sys.stderr)
    own = everybody[0].kept(inputs)
    return _table(everybody, [one.kept(inputs) - own for one in everybody], own, said)


def _gives_the_same(
    rival: Contestant, one: Contestant, base: Tensor, inputs: Sequence[Tensor]
) -> None:
    with torch.no_grad():
        mine, theirs = one.model(*inputs), rival.model(*inputs)
    apart = float((mine - theirs).norm() / (mine - base).norm())
    if not apart < SAME:
        raise SystemExit(f"{rival.project}'s {one.case} gives something else: {apart:.1e} apart")


def _table(
    everybody: Sequence[Contestant],
    kept: Sequence[int],
    own: int,
    said: Mapping[tuple[str, str | None], str | None],
) -> dict[str, Any]:
    """Rows of raylora's networks, each with its rivals; ratios are taken round by round."""
    lora = everybody[1]
    assert (lora.case, lora.project) == ("lora", "raylora")

    def ratio(one: Contestant, other: Contestant) -> dict[str, float]:
        return results.quartiles([a / b for a, b in zip(one.seconds, other.seconds, strict=True)])

    rows: dict[str, Any] = {}
    mine = None
    for one, bytes_kept in zip(everybody, kept, strict=True):
        facts = {
            "trained_numbers": sum(tensor.numel() for tensor in one.trained),
            "kept_bytes": bytes_kept,
            "cpu_seconds_a_step": results.quartiles(one.seconds),
        }
        if one.project in (None, "raylora"):
            mine = one
            rows[one.case] = {**facts, "seconds_by_lora": ratio(one, lora), "rivals": {}}
            continue
        assert mine is not None
        rows[one.case]["rivals"][one.project] = {
            **facts,
            "raylora_by_it": ratio(mine, one),
            "other": said[one.case, one.project],
        }
    return {"frozen_keeps_bytes": own, "networks": rows}


def _text(result: dict[str, Any]) -> str:
    lines = [
        "# What networks cost",
        "",
        f"Rank {RANK}, fp32, one thread, one process; {result['rounds']} rounds in which all take",
        "turns, forward and back; ratios are taken round by round. Medians, quartiles in brackets.",
        "kept: what forward keeps for backward beside what the frozen layers keep, each storage",
        "once. A rival has the same numbers in its parameters and gives the same output, unless a",
        "note says otherwise. Made by `benchmarks/networks.py`.",
        "",
        results.machine_line(result["machine"]),
        *([result["note"]] if result["note"] else []),
    ]
    for name, found in result["works"].items():
        lines += ["", f"## {WORKS[name].said[0].upper()}{WORKS[name].said[1:]}", ""]
        lines += list(_of_work(found))
    return "\n".join([*lines, ""])


def _of_work(found: dict[str, Any]) -> Iterator[str]:
    rows = found["networks"]
    frozen_row, lora = rows["frozen"], rows["lora"]
    yield (
        f"Frozen, it takes {_spread(frozen_row['cpu_seconds_a_step'])} CPU s and keeps "
        f"{_mib(found['frozen_keeps_bytes'])} MiB."
    )
    yield ""
    yield "| network | trained | kept, MiB | by LoRA's | CPU s a step | by LoRA's |"
    yield "|---|---|---|---|---|---|"
    for name, row in rows.items():
        if name != "frozen":
            yield (
                f"| {name} | {row['trained_numbers']:,} | {_mib(row['kept_bytes'])} "
                f"| {row['kept_bytes'] / lora['kept_bytes']:.2f} "
                f"| {row['cpu_seconds_a_step']['median']:.3f} "
                f"| {_spread(row['seconds_by_lora'])} |"
            )
    yield ""
    yield "| raylora beside | its numbers | it keeps, MiB | kept, raylora's by its | time |"
    yield "|---|---|---|---|---|"
    notes: list[str] = []
    for name, row in rows.items():
        for project, rival in row["rivals"].items():
            mark = ""
            if rival["other"]:
                mark = f" [{len(notes) + 1}]"
                notes.append(f"[{len(notes) + 1}] {project}'s {name} {rival['other']}.")
            share = f"{row['kept_bytes'] / rival['kept_bytes']:.2f}" if rival["kept_bytes"] else "-"
            yield (
                f"| {project}'s {name}{mark} | {rival['trained_numbers']:,} "
                f"| {_mib(rival['kept_bytes'])} | {share} | {_spread(rival['raylora_by_it'])} |"
            )
    for note in notes:
        yield ""
        yield note


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f}"


def _spread(numbers: dict[str, float]) -> str:
    return f"{numbers['median']:.3f} ({numbers['low']:.3f}–{numbers['high']:.3f})"


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of everybody")
    parser.add_argument("--note", default="", help="a sentence for the results")
    parser.add_argument("--json", action="store_true", help="print the JSON, not the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)  # lycoris' DyLoRA draws from it
    logging.getLogger("LyCORIS").setLevel(logging.WARNING)
    works = {name: measure(name, options.rounds) for name in WORKS}
    facts = results.machine()
    facts["versions"] = {
        package: version(package) for package in ("torch", "diffusers", "peft", "lycoris-lora")
    }
    result = {
        "machine": facts,
        "note": options.note,
        "rounds": options.rounds,
        "rank": RANK,
        "works": works,
    }
    path = results.write("networks", result, _text(result))
    print(json.dumps(result, indent=1) if options.json else _text(result))
    print(f"written: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
