"""Which family a LoRA file is for, told by its names and its sizes.

Names tell most. Where two families share them, the width of what cross-attention reads tells SD 1.x
(768), 2.x (1024) and SDXL (2048) apart, and the transformer's own width SD 3 and FLUX. Sizes that
are nobody's, as of small test models, tell nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from raylora.adapt.lora_file import DOWN, AdapterFile, AdapterModule
from raylora.base.errors import WeightsError

FAMILIES = {
    "sd15": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "SDXL",
    "sd3": "Stable Diffusion 3",
    "flux1": "FLUX.1",
}
"""`family.kind` -> what people call it."""
_READ = {768: "sd15", 1024: "sd2", 2048: "sdxl"}  # widths of what cross-attention reads
_WIDE = {1536: "sd3", 2432: "sd3", 3072: "flux1"}  # of the transformer

# Names of a file with dots for underscores, so that every spelling looks alike.
_OTHERS = (
    (r"double.stream.modulation|single.stream.modulation|to.qkv.mlp.proj", "FLUX.2"),
    (r"distilled.guidance.layer", "Chroma"),
    (r"joint.transformer.blocks|joint.transformer.layers", "AuraFlow"),
    (r"txt.mlp.net|img.mod.1\b|img.mlp.net", "Qwen-Image"),
    (r"blocks.\d+.(self|cross).attn.[qkvo]\b", "Wan"),
    (r"caption.projection|adaln.single", "PixArt or LTX-Video"),
    (r"context.refiner|noise.refiner|cap.embedder", "Lumina or Z-Image"),
    (r"double.stream.blocks|single.stream.blocks", "HiDream"),
    (r"token.refiner", "HunyuanVideo"),
    (r"\bprior\b|lora.prior", "Stable Cascade"),
)


def families_of(file: AdapterFile) -> frozenset[str]:
    """The families, of `FAMILIES`, that a file may be for; several where nothing tells them apart.

    Raises:
        WeightsError: it is for a model that raylora does not train, which is named.
    """
    names = {name: _plain(name) for name in file.modules}
    spelled = "\n".join(names.values())
    for pattern, called in _OTHERS:
        if re.search(pattern, spelled):
            raise WeightsError(f"the LoRA is for {called}, which raylora does not train.")
    found = frozenset(FAMILIES)
    if re.search(r"joint.blocks", spelled):
        return frozenset({"sd3"})
    if re.search(r"double.blocks|single.blocks|single.transformer.blocks", spelled):
        return frozenset({"flux1"})
    if re.search(r"input.blocks|middle.block|output.blocks|label.emb", spelled):
        return frozenset({"sdxl"})
    if re.search(r"down.blocks|mid.block|up.blocks", spelled):
        found = _unet_families(file.modules, names, spelled)
    elif re.search(r"transformer.blocks|^(lora.)?transformer\.", spelled, re.MULTILINE):
        found = _transformer_families(file.modules, names)
    if re.search(r"^lora.te1|^lora.te2|^text.encoder.2", spelled, re.MULTILINE):
        found &= {"sdxl", "sd3", "flux1"}
    elif re.search(r"^lora.te\.", spelled, re.MULTILINE):
        found &= _clip_families(file.modules, names)
    return found


def refuse_others(file: AdapterFile, kind: str) -> None:
    """Refuse a file that is for another family than a job's base.

    Args:
        kind: `family.kind` of the base.

    Raises:
        WeightsError: it is, and is named.
    """
    found = families_of(file)
    if found and kind not in found:
        called = " or ".join(FAMILIES[one] for one in FAMILIES if one in found)
        raise WeightsError(
            f"the LoRA is for {called}, and the base is {FAMILIES.get(kind, kind)}. Choose a LoRA "
            "for this base, or the base that it is for."
        )


def _plain(name: str) -> str:
    return name.replace("_", ".")


def _unet_families(
    modules: Mapping[str, AdapterModule], names: Mapping[str, str], spelled: str
) -> frozenset[str]:
    """SD 1.x, 2.x or SDXL in diffusers' names: by what is read, or by depth."""
    for name, plain in names.items():
        if re.search(r"attn2.to.[kv]$", plain):
            wide = _inputs(modules[name])
            if wide in _READ:
                return frozenset({_READ[wide]})
    if re.search(r"attentions.\d+.transformer.blocks.[1-9]|add.embedding", spelled):
        return frozenset({"sdxl"})
    return frozenset({"sd15", "sd2", "sdxl"})


def _clip_families(
    modules: Mapping[str, AdapterModule], names: Mapping[str, str]
) -> frozenset[str]:
    """SD 1.x or 2.x by the width of the one text encoder."""
    for name, plain in names.items():
        if re.search(r"^lora.te\..*(self.attn.[qkv].proj|mlp.fc1)$", plain):
            wide = _inputs(modules[name])
            if wide in (768, 1024):
                return frozenset({_READ[wide]})
    return frozenset({"sd15", "sd2"})


def _transformer_families(
    modules: Mapping[str, AdapterModule], names: Mapping[str, str]
) -> frozenset[str]:
    """SD 3 or FLUX in diffusers' names, where the file has nothing of FLUX' single blocks."""
    for name, plain in names.items():
        if re.search(r"attn2?.(to.[qkv]|add.[qkv].proj)$", plain):
            wide = _inputs(modules[name])
            if wide in _WIDE:
                return frozenset({_WIDE[wide]})
    if any(".attn2." in plain for plain in names.values()):
        return frozenset({"sd3"})
    return frozenset({"sd3", "flux1"})


def _inputs(module: AdapterModule) -> int | None:
    return int(module.tensors[DOWN].shape[1]) if module.kind == "lora" else None
