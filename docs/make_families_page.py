"""Write docs/families.md: what each model family supports, and where guides are wrong.

    python docs/make_families_page.py

Numbers of layers are counted on the models of true size, which are built without memory for their
weights. A test compares the page with what this program makes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

from raylora.adapt.export_options import ExportOptions, naming_problems
from raylora.adapt.keys import Naming
from raylora.adapt.recognise import FAMILIES
from raylora.base.layers import chosen_sites
from raylora.base.lookup import plugins
from raylora.base.site import Site
from raylora.diffusion.process import Flow
from raylora.diffusion.samplers import Sampler, sampler_names
from raylora.families import Family, get_family
from raylora.networks import get_network
from raylora.weights.short_names import SHORT_NAMES
from raylora.weights.weightless import true_size

PAGE = Path(__file__).parent / "families.md"

INTRODUCTION = """\
# Model families

Made from the code by `docs/make_families_page.py`; change it there, not here.

`family.kind` names the family and `family.weights` the base: a folder in diffusers layout, one
.safetensors checkpoint with its makers' names, either of them local or `s3://`, a model hub's
`owner/name`, or one of the short names below. What comes from afar is fetched once, into
`~/.cache/raylora` (or `$RAYLORA_HOME`). Gated repositories want a token: set `HF_TOKEN`.
Checkpoints that hold the denoiser alone, as FLUX.1's do, take the rest from `family.vae` and
`family.parts`, by diffusers' names: `text_encoder` is CLIP-L (SD 2.x: OpenCLIP-H); `text_encoder_2`
is OpenCLIP-bigG in SDXL and SD 3, and T5 in FLUX.1; `text_encoder_3` is SD 3's T5. No single file
has tokenizers, so they are fetched from the usual base's repository, which is gated for SD 3 and
FLUX.1, unless `family.parts` names folders for `tokenizer`, `tokenizer_2`, ..., or one for
`config`: a folder in diffusers layout with the configs and tokenizers of a base.
Pickles (.ckpt, .pt, .bin) are refused, since reading one runs what is in it.

Ready jobs for each family and size of card are in [jobs](../jobs): `jobs/<family>_<size>gb.yaml`.
`jobs/smoke/<family>.yaml` runs the whole road on a tiny random base in under two minutes on two CPU
cores. No family but sd15 has trained a real base yet. Steps of sd15, sdxl, sd3 and flux1 in true
size ran on one GPU, with random weights and no images ([what was
measured](memory.md#measured-on-gpus)); all else here was proven on tiny bases, and on true sizes
without weights.
"""


TEXTS = """\
**Stable Diffusion 2.x.** The text encoder has 23 layers: OpenCLIP-H up to the last but one, with
its final norm. What is predicted comes from the base's scheduler config; `noise.prediction` sets it
for single checkpoints that do not say. `rescale_betas_zero_snr` there, or
`noise.zero_terminal_snr`, trains the last timestep on pure noise.

**SDXL** reads the layer before the last of both encoders, without the final norm. So the first
encoder's last layer moves nothing, and its modules in a LoRA file stay zero;
`raylora inspect` counts them. Captions over 75
tokens are read in chunks, and the pooled text is the first chunk's. Weights in captions change the
hidden states, not the pooled text. Each picture is told its size as it was found, its true crop and
its bucket's size, in float32: in bfloat16, 1000 and 1001 would be one number. Previews ask for an
uncut picture of the size that is drawn.

**SD 3 and FLUX.1.** SD 3 medium, 3.5 medium and 3.5 large, and FLUX.1-dev and -schnell, are told
apart by the transformer's config; no option says it. SD 3 may come without T5: its part of the text
is then zeros, as many as `family.t5_max_tokens`, and `mask_t5` and `t5_dropout` are refused.
FLUX.1-dev is told guidance 1 in training
(`family.guidance`) and 3.5 in previews (`preview.embedded_guidance`); schnell is told none and
draws in 4 steps. Timesteps and guidance reach FLUX in float32: diffusers rounds them to bfloat16
first, where timesteps near 900 lie 4 apart. T5 is trained only where `network.text_encoders` names
it.

**Distilled bases** (FLUX.1-schnell, turbo models) forget in training how to draw in a few steps.
`family.training_adapter` names a LoRA that undoes the distillation: it is on while training and
measuring, and off in previews and for people.
"""


class Wrong(NamedTuple):
    """A statement that does not hold.

    Attributes:
        said: the statement.
        by: who says so.
        fact: what is so.
        ours: what raylora does, as the end of a sentence.
    """

    said: str
    by: str
    fact: str
    ours: str


WRONG = (
    Wrong(
        "`--fused_backward_pass` and `--fused_optimizer_groups` bring SDXL LoRA from 24 to 10 GB",
        "guides",
        "sd-scripts' LoRA programs read the first and never use it, and do not know the second. "
        "The figures belong to full fine-tuning: all gradients of a LoRA of rank 16 are 0.16 GiB.",
        "has both for LoRA (`memory.fused_backward`, `memory.fused_groups`), from rank 64 on; "
        "`memory.checkpointing` and `memory.streaming` are what saves memory here (memory.md)",
    ),
    Wrong(
        "SDXL's `block_dims` has 25 values",
        "guides",
        "25 is SD 1.x and 2.x (12 + 1 + 12). SDXL has 23 (1 + 9 + 3 + 9 + 1).",
        "counts them by family, and refuses another length with the right one",
    ),
    Wrong(
        "`linear` and `linear_alpha` in a kohya configuration",
        "guides",
        "They are another trainer's words, and sd-scripts swallows unknown network arguments "
        "without a word.",
        "calls them `network.rank` and `network.alpha`, and refuses words it does not know",
    ),
    Wrong(
        "alpha may not be larger than the rank; the usual alpha is the rank",
        "guides",
        "Any alpha is legal; where none is given sd-scripts takes 1, which at rank 32 is a "
        "thirty-second of the strength.",
        "takes alpha = rank where none is given, and any other that is given",
    ),
    Wrong(
        "LoRA+ for every training",
        "guides",
        "Optimizers that keep one rate (Prodigy, D-Adaptation) crash with it at the first step.",
        "refuses it for those when the job is read",
    ),
    Wrong(
        "Stop training the text encoder at some percent",
        "guides",
        "sd-scripts' LoRA program has no such option.",
        "has `optimizer.text_encoder_stop`, a share of the run",
    ),
    Wrong(
        "FLUX.1 LoRA needs another program",
        "guides",
        "sd-scripts trains it.",
        "trains it as `family.kind: flux1`",
    ),
    Wrong(
        "FLUX.1: `--model_prediction_type sigma_scaled`, the default",
        "sd-scripts",
        "It compares an estimate of the picture with noise - picture, which are unlike things; "
        "only `raw` fits its target.",
        "predicts `raw` and has no other",
    ),
    Wrong(
        "FLUX.1: `--guidance_scale 3.5`, the default in training",
        "sd-scripts",
        "Its own documentation advises 1.0.",
        "takes `family.guidance: 1.0` unless the job says otherwise",
    ),
    Wrong(
        "FLUX.1 and SD 3: noise offset, multiresolution noise, min-SNR, debiased estimation",
        "sd-scripts",
        "They are accepted and do nothing there.",
        "refuses them with the reason",
    ),
    Wrong(
        "FLUX.1: `--min_timestep`, `--max_timestep`",
        "sd-scripts",
        "They are accepted and do nothing, so that its validation, which sets them, measures at "
        "random timesteps.",
        "draws within them, and measures held-out images at fixed timesteps",
    ),
    Wrong(
        "FLUX.1 and SD 3: a LoRA with q, k and v apart (`split_qkv`)",
        "sd-scripts",
        "It is saved as one module of three times the rank with the alpha of one, so that programs "
        "that read it apply a third of what was trained; a quarter for single blocks' `linear1`.",
        "multiplies alpha by the number of parts, and has a reader it did not write compare "
        "each module of every file it saves",
    ),
    Wrong(
        "SDXL: where the crop begins",
        "sd-scripts",
        "It tells the model an offset along the other axis than the one that is cropped, and never "
        "that of a random crop.",
        "tells the true crop of the picture as it is shown, flipped or not",
    ),
    Wrong(
        "SDXL: `max_bucket_reso` is 1024 where none is given",
        "sd-scripts",
        "Wide and tall pictures then lose area: 256 x 1024.",
        "takes twice the resolution",
    ),
    Wrong(
        "Layers are found by the names of the library's classes",
        "sd-scripts",
        "When one was renamed, text-encoder LoRAs shrank to a third without a word.",
        "counts the layers that each base's config means, and refuses to train fewer",
    ),
    Wrong(
        "`--network_weights` continues a file",
        "sd-scripts",
        "The file's alpha replaces the number, not the strength it trains with.",
        "honours the file's alpha: the change of weight is exactly the file's",
    ),
    Wrong(
        "alpha in a bfloat16 file",
        "sd-scripts",
        "It is rounded to eight bits as the weights are.",
        "keeps it in float32",
    ),
    Wrong(
        "`False` switches an option off (`enable_conv`, `enable_all_linear` of OFT)",
        "sd-scripts",
        "Any text but an empty one switches it on; others need exactly `True`.",
        "has YAML's true and false",
    ),
    Wrong(
        "min-SNR with zero-terminal SNR",
        "sd-scripts",
        "The weights are of the schedule before it is rescaled.",
        "takes them from the schedule that is trained",
    ),
    Wrong(
        "Output preservation on SD 1.x and 2.x",
        "sd-scripts",
        "A batch in which only some images ask for it ends in an error of shapes.",
        "asks the base for those images alone",
    ),
)


def families_page() -> str:
    """The whole page."""
    lines = [INTRODUCTION, "## The usual bases", "", *_short_names()]
    lines += ["", "## What each family is", "", *_families()]
    lines += ["", TEXTS, "## Layers", "", *_layers()]
    lines += ["", "## Files", "", *_files()]
    lines += ["", "## Where guides and sd-scripts are wrong", "", *_wrong(), ""]
    return "\n".join(lines)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _short_names() -> Iterator[str]:
    rows = []
    for word, known in SHORT_NAMES.items():
        gate = "yes" if known.gated else "no"
        rows.append((f"`{word}`", known.kind, known.repository, known.license, gate))
    yield from _table(("`family.weights`", "`family.kind`", "repository", "licence", "gated"), rows)


def _opened(word: str) -> Family:
    """A base of true size, without weights."""
    kind = SHORT_NAMES[word].kind
    family, options = get_family(kind)
    return family(true_size(word), options(kind=kind, weights=word))


def _families() -> Iterator[str]:
    rows: list[tuple[str, ...]] = []
    for kind in plugins("raylora.families"):
        word = next(name for name, known in SHORT_NAMES.items() if known.kind == kind)
        family, options = _opened(word), get_family(kind)[1]
        flow = isinstance(family.process, Flow)
        predicts = "velocity of a flow" if flow else family.process.prediction
        own = sorted(set(options.model_fields) - _COMMON)
        rows.append(
            (
                f"`{kind}`",
                FAMILIES[kind],
                f"{options.native_resolution} px",
                ", ".join(family.text_components),
                predicts if flow else f"{predicts} (by the base's scheduler)",
                _samplers(family),
                ", ".join(f"`{name}`" for name in own),
            )
        )
    head = ("kind", "family", "native size", "text encoders", "predicts", "samplers", "own options")
    yield from _table(head, rows)


def _samplers(family: Family) -> str:
    able = sampler_names(family.process)
    return "all" if len(able) == len(get_args(Sampler)) else ", ".join(able)


_COMMON = {"kind", "weights", "vae", "parts", "loras", "training_adapter"}


def _layers() -> Iterator[str]:
    yield "How many layers each preset of `network.layers` chooses in a denoiser, and in how many"
    yield "modules kohya's files keep the usual choice (FLUX.1 and SD 3 join q, k and v there)."
    yield ""
    presets = ("usual", "attention", "attention_mlp", "all_linear", "all")
    rows = []
    for word in SHORT_NAMES:
        family = _opened(word)
        denoiser, encoders = family.skeletons()
        counts = [str(len(_chosen(family, family.sites(denoiser), one))) for one in presets]
        usual = _chosen(family, family.sites(denoiser), "usual")
        modules = {family.place(site.name).kohya for site in usual}
        text = family.text_sites(encoders)
        texts = [
            str(sum(s.component == one and s.kind == "linear" for s in text))
            for one in family.text_components
        ]
        rows.append((f"`{word}`", *counts, str(len(modules)), " + ".join(texts)))
    head = ("base", *(f"`{one}`" for one in presets), "kohya modules", "text encoders")
    yield from _table(head, rows)


def _chosen(family: Family, sites: list[Site], preset: str) -> list[Site]:
    options: Any = get_network("lora").options(layers=preset)
    found = chosen_sites(
        options, sites, convolutions=False, blocks=family.blocks, ends=family.block_ends
    )
    return [site for site in found if site.kind != "norm"]


def _files() -> Iterator[str]:
    yield "Which names (`export.naming`) a network's file can have, by family. Every file is read"
    yield "back before it is published: by diffusers where it has a reader for such files, else by"
    yield "formulas of LyCORIS' files that share no code with the networks."
    yield ""
    kinds = plugins("raylora.families")
    rows = []
    for network in plugins("raylora.networks"):
        options: Any = get_network(network).options()
        cells = []
        for kind in kinds:
            able = [
                naming
                for naming in get_args(Naming)
                if not list(naming_problems(ExportOptions(naming=naming), options, kind))
            ]
            cells.append(", ".join(able))
        rows.append((f"`{network}`", *cells))
    yield from _table(("`network.kind`", *kinds), rows)
    yield ""
    yield "As initial weights, for merging and for pictures raylora reads the files of kohya,"
    yield "diffusers, peft, ComfyUI, OneTrainer and LyCORIS, by whichever names; a file for another"
    yield "family is refused by that family's name."


def _wrong() -> Iterator[str]:
    rows = [(one.said, one.by, one.fact, f"raylora {one.ours}.") for one in WRONG]
    yield from _table(("said", "by", "what is so", "what raylora does"), rows)


def main() -> None:
    """Write the page."""
    PAGE.write_text(families_page())


if __name__ == "__main__":
    main()
