"""Every kind of adapter that a file may hold, told by its tensors, and what each does to a weight.

Written from the papers and from what LyCORIS' reader does with each word, and independent of
`raylora.networks`, which trains some of them: where both agree, a file means what was trained.
All results are float64.

| kind | change of W |
| --- | --- |
| lora | s·up·down; with lora_mid M (Tucker) s·M ×₁ up ×₂ down |
| loha | s·(w1_a w1_b) ∘ (w2_a w2_b), with Tucker cores t1, t2 likewise |
| lokr | s·w1 ⊗ w2, each whole or a product; s = 1 where both are whole |
| glora | s·(W a1 a2 + b1 b2) |
| full, norm | diff and diff_b, w_norm and b_norm |
| ia3 | rows of W (on_input: columns) times 1 + weight |
| oft, boft | Rᵀ W, R block-diagonal of Cayley's (I + Q)(I - Q)⁻¹; boft: a product of butterflies |

s = alpha / rank. With `dora_scale` m, lora, loha and lokr give m·V/‖V‖ for V = W + change, by rows,
or by columns where m has as many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["lora", "loha", "lokr", "oft", "boft", "glora", "ia3", "full", "norm"]
Tensors = Mapping[str, Tensor]
Change = dict[str, Tensor]
"""What is added to "weight" and, where there is one, to "bias"."""

DOWN, UP, MID = "lora_down.weight", "lora_up.weight", "lora_mid.weight"
ALPHA, DORA = "alpha", "dora_scale"


@dataclass(frozen=True)
class Form:
    """One kind of adapter.

    Attributes:
        needs: words that are always there; `either` has pairs of which one is, whole or in parts.
        may: words that there may be.
        rank: of the tensors; None where the kind has none.
        fault: what is wrong with shapes, or None.
    """

    needs: tuple[str, ...]
    may: tuple[str, ...]
    rank: Callable[[Tensors], int | None]
    fault: Callable[[Tensors], str | None]
    either: tuple[tuple[str, tuple[str, str]], ...] = ()


def kind_of(tensors: Tensors) -> Kind | None:
    """Which kind a module's words are those of; None where they are nobody's."""
    for word, kind in _TOLD_BY:
        if word in tensors:
            return "boft" if kind == "oft" and tensors[word].dim() == 4 else kind
    return None


def rank_of(tensors: Tensors) -> int | None:
    """Width of the bottleneck; None where a kind has none, as full changes."""
    kind = kind_of(tensors)
    return None if kind is None else FORMS[kind].rank(tensors)


def scale_of(tensors: Tensors) -> float:
    """alpha / rank, 1 where there is no alpha or it is 0, as every reader takes it."""
    rank = rank_of(tensors)
    alpha = float(tensors[ALPHA]) if ALPHA in tensors else 0.0
    return alpha / rank if rank and alpha else 1.0


def fault(tensors: Tensors) -> str | None:
    """Why a module cannot be used, as the end of a sentence that begins with its name."""
    kind = kind_of(tensors)
    if kind is None:
        return f"has only {', '.join(sorted(tensors))}, which are no adapter."
    form = FORMS[kind]
    for word in form.needs:
        if word not in tensors:
            return f"has no {word}: half of it is missing."
    for whole, (first, second) in form.either:
        if whole not in tensors and not (first in tensors and second in tensors):
            return f"has no {whole}, nor both of {first} and {second}: half of it is missing."
    known = {*form.needs, *form.may, *(w for one, two in form.either for w in (one, *two))}
    if more := sorted(set(tensors) - known):
        return f"has {more[0]}, which does not belong to {kind}."
    if ALPHA in tensors and tensors[ALPHA].numel() != 1:
        return f"has an alpha of shape {tuple(tensors[ALPHA].shape)}; it is one number."
    if any(0 in tensor.shape for tensor in tensors.values()):
        return "has an empty tensor."
    return form.fault(tensors)


def is_additive(tensors: Tensors) -> bool:
    """Whether the change does not depend on the weight that it is for."""
    return DORA not in tensors and kind_of(tensors) in ("lora", "loha", "lokr", "full", "norm")


def merged(tensors: Tensors, held: Tensors) -> dict[str, Tensor]:
    """The layer's weight with the adapter in it, and its bias where that changes or is scaled.

    Args:
        held: "weight" of the layer, and "bias" where it has one.
    """
    weight = held["weight"].double()
    added = change(tensors, weight)
    found = {"weight": weight + added["weight"].reshape(weight.shape)}
    if "bias" in added:
        bias = held.get("bias")
        base = torch.zeros_like(added["bias"]) if bias is None else bias.double()
        found["bias"] = base + added["bias"]
    return found


def change(tensors: Tensors, weight: Tensor | None = None) -> Change:
    """What an adapter adds to a layer at strength 1.

    Args:
        tensors: of one module, by kohya's words.
        weight: of the layer, float64; may be left out for kinds that are additive.
    """
    held = {word: tensor.double() for word, tensor in tensors.items() if word != ALPHA}
    kind = kind_of(tensors)
    assert kind is not None
    if kind == "full":
        return {"weight": held["diff"]} | ({"bias": held["diff_b"]} if "diff_b" in held else {})
    if kind == "norm":
        return {"weight": held["w_norm"]} | ({"bias": held["b_norm"]} if "b_norm" in held else {})
    scale = scale_of(tensors)
    if kind in _ADDED:
        added = scale * _ADDED[kind](held)
        if DORA not in held:
            return {"weight": added}
        assert weight is not None
        return {"weight": decomposed(weight + added.reshape(weight.shape), held[DORA]) - weight}
    assert weight is not None
    if kind == "glora":
        return {"weight": scale * _glora(held, weight)}
    if kind == "ia3":
        rows = held["weight"].flatten()
        on_input = bool(held["on_input"])
        shape = [1] * weight.dim()
        shape[1 if on_input else 0] = len(rows)
        return {"weight": weight * rows.reshape(shape)}
    alpha = float(tensors[ALPHA]) if ALPHA in tensors else 0.0
    turned = (_boft if kind == "boft" else _oft)(held["oft_blocks"], weight, alpha)
    if "rescale" in held:
        turned = turned * held["rescale"].reshape(-1, *[1] * (weight.dim() - 1))
    return {"weight": turned - weight}


def decomposed(changed: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA: the changed weight with the norm of each row, or of each input, that is stored.

    Source: Liu et al. 2024, arXiv 2402.09353.
    """
    by_rows = magnitude.numel() == changed.shape[0] and not _is_by_columns(magnitude, changed)
    axes = [axis for axis in range(changed.dim()) if axis != (0 if by_rows else 1)]
    norms = torch.linalg.vector_norm(changed, dim=axes, keepdim=True)
    scaled: Tensor = changed * (magnitude.reshape(norms.shape) / norms)
    return scaled


def _is_by_columns(magnitude: Tensor, changed: Tensor) -> bool:
    """LyCORIS' other form, (1, I); peft has (O,) for linears and (1, O, 1, 1) for convolutions."""
    return magnitude.dim() >= 2 and magnitude.shape[0] == 1 and changed.shape[0] != 1


def _lora(held: Tensors) -> Tensor:
    down, up = held[DOWN], held[UP]
    if MID in held:
        return torch.einsum("ab...,oa,bi->oi...", held[MID], up.flatten(1), down.flatten(1))
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _loha(held: Tensors) -> Tensor:
    factors = []
    for number in ("1", "2"):
        first, second = held[f"hada_w{number}_a"], held[f"hada_w{number}_b"]
        core = held.get(f"hada_t{number}")
        factors.append(first @ second if core is None else _tucker(core, first, second))
    return factors[0] * factors[1]


def _lokr(held: Tensors) -> Tensor:
    small = held["lokr_w1"] if "lokr_w1" in held else held["lokr_w1_a"] @ held["lokr_w1_b"]
    if "lokr_w2" in held:
        large = held["lokr_w2"]
    elif "lokr_t2" in held:
        large = _tucker(held["lokr_t2"], held["lokr_w2_a"], held["lokr_w2_b"])
    else:
        large = held["lokr_w2_a"] @ held["lokr_w2_b"]
    if large.dim() > 2:
        small = small.reshape(*small.shape, *[1] * (large.dim() - 2))
    return torch.kron(small.contiguous(), large.contiguous())


def _tucker(core: Tensor, outputs_RO: Tensor, inputs_RI: Tensor) -> Tensor:
    return torch.einsum("ab...,ao,bi->oi...", core, outputs_RO, inputs_RI)


def _glora(held: Tensors, weight: Tensor) -> Tensor:
    a1, a2, b1, b2 = (held[f"{word}.weight"] for word in ("a1", "a2", "b1", "b2"))
    through = torch.einsum("oi...,ir,rj->oj...", weight, a1.flatten(1), a2.flatten(1))
    if "bm.weight" in held:
        own = torch.einsum("ab...,oa,bi->oi...", held["bm.weight"], b1.flatten(1), b2.flatten(1))
    else:
        own = b1.flatten(1) @ b2.flatten(1)
    return through + own.reshape(weight.shape)


def _rotations(blocks: Tensor, constraint: float) -> Tensor:
    """Cayley's orthogonal matrix of each block's skew-symmetric part, which the constraint caps."""
    skew = blocks - blocks.mT
    norm = float(skew.norm())
    if 0 < constraint < norm:
        skew = skew * (constraint / norm)
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype)
    rotations: Tensor = torch.linalg.solve(eye - skew, eye + skew, left=False)
    return rotations


def _oft(blocks_NBB: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Source: Qiu et al. 2023, arXiv 2306.07280."""
    rotations = _rotations(blocks_NBB, alpha * weight.shape[0])
    rows = weight.reshape(*blocks_NBB.shape[:2], -1)
    return (rotations.mT @ rows).reshape(weight.shape)


def _boft(blocks_MNBB: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Stage i turns rows that are 2^i half blocks apart; Liu et al. 2023, arXiv 2311.06243."""
    stages = _rotations(blocks_MNBB, alpha * weight.shape[0])
    half = blocks_MNBB.shape[-1] // 2
    rows = weight.flatten(1)
    for i, rotation_NBB in enumerate(stages):
        order = torch.arange(len(rows)).reshape(-1, 2, 2**i * half).mT.flatten()
        turned = (rotation_NBB @ rows[order].reshape(*rotation_NBB.shape[:2], -1)).flatten(0, 1)
        rows = torch.empty_like(turned)
        rows[order] = turned
    return rows.reshape(weight.shape)


_ADDED: dict[str, Callable[[Tensors], Tensor]] = {"lora": _lora, "loha": _loha, "lokr": _lokr}
_TOLD_BY: tuple[tuple[str, Kind], ...] = (
    (DOWN, "lora"),
    (UP, "lora"),
    ("hada_w1_a", "loha"),
    ("hada_w1_b", "loha"),
    ("hada_w2_a", "loha"),
    ("lokr_w1", "lokr"),
    ("lokr_w1_a", "lokr"),
    ("lokr_w2", "lokr"),
    ("lokr_w2_a", "lokr"),
    ("oft_blocks", "oft"),
    ("a1.weight", "glora"),
    ("b1.weight", "glora"),
    ("on_input", "ia3"),
    ("diff", "full"),
    ("w_norm", "norm"),
)


def _shapes(tensors: Tensors, *words: str) -> str:
    told = ", ".join(f"{word} {tuple(tensors[word].shape)}" for word in words if word in tensors)
    return f"has shapes that do not fit: {told}."


def _lora_fault(tensors: Tensors) -> str | None:
    down, up = tensors[DOWN].shape, tensors[UP].shape
    wrong = _shapes(tensors, DOWN, UP, MID)
    if len(down) not in (2, 4) or len(up) != len(down) or tuple(up[2:]) not in ((), (1, 1)):
        return wrong
    if MID in tensors:
        mid = tensors[MID].shape
        fits = len(mid) == 4 and mid[0] == up[1] and mid[1] == down[0] and tuple(down[2:]) == (1, 1)
        return None if fits else wrong
    return None if down[0] == up[1] else wrong


def _loha_fault(tensors: Tensors) -> str | None:
    words = [f"hada_w{number}_{half}" for number in "12" for half in "ab"]
    wrong = _shapes(tensors, *words, "hada_t1", "hada_t2")
    if any(tensors[word].dim() != 2 for word in words):
        return wrong
    for number in "12":
        first, second = (tensors[f"hada_w{number}_{half}"].shape for half in "ab")
        core = tensors.get(f"hada_t{number}")
        inner = (first[1], second[0]) if core is None else (first[0], second[0])
        wanted = inner[:1] * 2 if core is None else tuple(core.shape[:2])
        if inner != wanted:
            return wrong
    if ("hada_t1" in tensors) != ("hada_t2" in tensors):
        return wrong
    same = tensors["hada_w1_b"].shape[1] == tensors["hada_w2_b"].shape[1]
    return None if same else wrong


def _lokr_fault(tensors: Tensors) -> str | None:
    wrong = _shapes(tensors, *sorted(word for word in tensors if word.startswith("lokr_")))
    for number in "12":
        if f"lokr_w{number}" in tensors:
            continue
        first, second = (tensors[f"lokr_w{number}_{half}"] for half in "ab")
        if first.dim() != 2 or second.dim() != 2:
            return wrong
        core = tensors.get("lokr_t2") if number == "2" else None
        inner = first.shape[1] if core is None else first.shape[0]
        if core is not None and tuple(core.shape[:2]) != (inner, second.shape[0]):
            return wrong
        if inner != second.shape[0]:
            return wrong
    return None


def _oft_fault(tensors: Tensors) -> str | None:
    blocks = tensors["oft_blocks"].shape
    if len(blocks) not in (3, 4) or blocks[-1] != blocks[-2]:
        return _shapes(tensors, "oft_blocks")
    return None


def _glora_fault(tensors: Tensors) -> str | None:
    a1, a2, b1, b2 = (tensors[f"{word}.weight"].shape for word in ("a1", "a2", "b1", "b2"))
    fits = a1[0] == a2[1] == b2[1] and a1[1] == a2[0] and b1[1] == b2[0]
    words = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
    return None if fits else _shapes(tensors, *words)


def _vector_fault(*words: str) -> Callable[[Tensors], str | None]:
    def check(tensors: Tensors) -> str | None:
        wrong = any(tensors[word].numel() != max(tensors[word].shape, default=0) for word in words)
        return _shapes(tensors, *words) if wrong else None

    return check


def _lokr_rank(tensors: Tensors) -> int | None:
    for word in ("lokr_w1_b", "lokr_w2_b"):
        if word in tensors:
            return int(tensors[word].shape[0])
    return None


FORMS: dict[Kind, Form] = {
    "lora": Form(
        needs=(DOWN, UP),
        may=(MID, ALPHA, DORA),
        rank=lambda held: int(held[DOWN].shape[0]) if held[DOWN].dim() else None,
        fault=_lora_fault,
    ),
    "loha": Form(
        needs=("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        may=("hada_t1", "hada_t2", ALPHA, DORA),
        rank=lambda held: int(held["hada_w1_b"].shape[0]),
        fault=_loha_fault,
    ),
    "lokr": Form(
        needs=(),
        may=("lokr_t2", ALPHA, DORA),
        either=(
            ("lokr_w1", ("lokr_w1_a", "lokr_w1_b")),
            ("lokr_w2", ("lokr_w2_a", "lokr_w2_b")),
        ),
        rank=_lokr_rank,
        fault=_lokr_fault,
    ),
    "oft": Form(("oft_blocks",), ("rescale", ALPHA), lambda held: None, _oft_fault),
    "boft": Form(("oft_blocks",), ("rescale", ALPHA), lambda held: None, _oft_fault),
    "glora": Form(
        needs=("a1.weight", "a2.weight", "b1.weight", "b2.weight"),
        may=("bm.weight", ALPHA),
        rank=lambda held: int(held["a2.weight"].shape[0]),
        fault=_glora_fault,
    ),
    "ia3": Form(("weight", "on_input"), (ALPHA,), lambda held: None, _vector_fault("weight")),
    "full": Form(("diff",), ("diff_b", ALPHA), lambda held: None, lambda held: None),
    "norm": Form(("w_norm",), ("b_norm", ALPHA), lambda held: None, _vector_fault("w_norm")),
}
"""What each kind has to hold."""
