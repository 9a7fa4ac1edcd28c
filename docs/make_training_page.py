"""Write docs/training.md: every option of training with its formula, source and other names.

    python docs/make_training_page.py

A test compares the page with what this program makes. What it says of an option is written beside
the option (`known_as`); what is written here is what belongs to no option alone: the table of
random draws, and how training differs from sd-scripts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, get_args

from make_jobs_page import Schema, allowed_values, as_yaml, sections_in, wrapped

from raylora.base.seeds import Purpose
from raylora.job import Job

PAGE = Path(__file__).parent / "training.md"

SECTIONS = (
    *("family", "network", "optimizer", "schedule", "loss", "noise", "timesteps", "training"),
    *("ema", "validation", "preview", "memory", "export", "log"),
)

INTRODUCTION = """\
# Training: every option, formula and draw

Made from the texts beside the code by `docs/make_training_page.py`; change them there, not here.

For each option: what it may be, what it is where a job says nothing, what it does, its formula and
source, and what sd-scripts and people's guides call it. Images and captions are in
[data.md](data.md), all other options in [jobs.md](jobs.md).

- [By the names of sd-scripts](#by-the-names-of-sd-scripts)
- [The options](#the-options)
- [Every draw](#every-draw)
- [How it differs from sd-scripts](#how-it-differs-from-sd-scripts)
"""

UNDER_OTHER_NAMES = """\
Where the name is the same but the meaning is not quite, the option's entry says so. `--n` to `--am`
are flags of a prompt in a `--sample_prompts` file.
"""

SAID_HERE = {
    "family.max_tokens": "--max_token_length",
    "family.weights": "--pretrained_model_name_or_path",
    "family.weighted_captions": "--weighted_captions",
    "memory.encode_batch": "--vae_batch_size",
    "memory.max_micro_batch": "--train_batch_size",
    "training.max_timestep": "--max_timestep",
    "training.min_timestep": "--min_timestep",
}
"""sd-scripts' names of options whose own file does not give one."""


class Draw(NamedTuple):
    """One purpose of random numbers.

    Attributes:
        of: what one draw belongs to.
        key: what the numbers are a function of.
        formula: what is made of them, in plain characters.
    """

    of: str
    what: str
    formula: str
    key: str
    source: str = ""


_SHOWING = "`training.seed`, global step, sample"
DRAWS: dict[Purpose, Draw] = {
    "initial weights": Draw(
        "layer, once",
        "first weights of the adapter",
        "down = U(-1, 1) / sqrt(numbers in); up = 0",
        "`training.seed`, layer's name",
        "He et al. 2015, arXiv 1502.01852, with a = sqrt(5) as in sd-scripts",
    ),
    "noise": Draw(
        "sample and step",
        "the noise of the latents",
        "N(0, 1), of the latents' shape",
        _SHOWING,
        "Ho et al. 2020, arXiv 2006.11239",
    ),
    "timestep": Draw(
        "sample and step",
        "how noisy the latents are made",
        "by `timesteps.draw`; where that is uniform, each of min_timestep ... max_timestep - 1 as "
        "often",
        _SHOWING,
        "Ho et al. 2020, arXiv 2006.11239",
    ),
    "noise offset": Draw(
        "sample and step",
        "`noise.offset`: one number a channel",
        "noise + offset N(0, 1)",
        _SHOWING,
        "Guttenberg 2023",
    ),
    "noise offset strength": Draw(
        "sample and step", "`noise.offset_random`", "U(0, 1) offset in offset's place", _SHOWING
    ),
    "noise pyramid": Draw(
        "sample and step",
        "`noise.multires_iterations`: the ratios, then the fields",
        "r = U(2, 4) each; N(0, 1) at size / r^i",
        _SHOWING,
        "Whitaker 2023",
    ),
    "input noise": Draw(
        "sample and step",
        "`noise.input_perturbation`",
        "noisy latents of noise + gamma N(0, 1)",
        _SHOWING,
        "Ning et al. 2023, arXiv 2301.11706",
    ),
    "input noise strength": Draw(
        "sample and step",
        "`noise.input_perturbation_random`",
        "U(0, 1) gamma in gamma's place",
        _SHOWING,
    ),
    "dropout": Draw(
        "sample and step",
        "`network.dropout`, `rank_dropout`, `module_dropout`: six words of 32 bits, from which "
        "each layer's mask is hashed where it is needed; two more for DyLoRA's slice of each "
        "layer",
        "kept where hash(words, layer, place) >= p 2^32",
        _SHOWING,
        "Srivastava et al. 2014; hash: Wellons, lowbias32",
    ),
    "caption dropout": Draw(
        "sample and step",
        "whether a showing is trained without its caption",
        "dropped where U(0, 1) < caption_dropout_rate",
        _SHOWING,
        "Ho & Salimans 2022, arXiv 2207.12598",
    ),
    "encoder dropout": Draw(
        "sample and step",
        "`family.clip_l_dropout`, `clip_g_dropout`, `t5_dropout`: which encoders of a showing are "
        "silent",
        "silent where U(0, 1) < its share, each encoder by itself",
        _SHOWING,
    ),
    "variant": Draw(
        "image",
        "`data.flip_aug` with a cache: which variant is mirrored first",
        "even or odd, each as likely; they alternate",
        "`data.variant_seed`, image",
    ),
    "picture": Draw(
        "variant of an image; sample and step where pictures are not cached",
        "how a picture is cut and coloured; not cached: mirrored too",
        "U(0, 1), seven times, each with a place of its own",
        "`data.variant_seed`, variant, image; or " + _SHOWING,
    ),
    "caption": Draw(
        "variant of an image; sample and step where captions are not cached",
        "wildcards, order of tags, tags left out",
        "each choice as likely; a tag goes where U(0, 1) < caption_tag_dropout_rate",
        "`data.variant_seed`, variant, image; or " + _SHOWING,
    ),
    "picture turn": Draw(
        "image, once in as many showings as there are variants",
        "in which order cached pictures are shown",
        "a random order of the variants; each comes once before any comes again",
        "`training.seed`, round, image",
    ),
    "caption turn": Draw(
        "image, once in as many showings as there are variants",
        "in which order cached captions are shown",
        "as above",
        "`training.seed`, round, image",
    ),
    "order": Draw(
        "epoch",
        "which images make up a step, and the order of steps",
        "a random order within each bucket, and one of the steps",
        "`data.order_seed`, epoch, bucket",
    ),
    "validation": Draw(
        "held-out image and timestep",
        "the noise of the held-out loss, the same at every measurement of every run",
        "N(0, 1), of the latents' shape",
        "0, timestep, image",
    ),
    "ruler": Draw(
        "run, once",
        "`validation.training_images`: which ones",
        "the first of a random order",
        "0",
    ),
    "preview": Draw(
        "prompt",
        "starting noise, and what euler_a and dpm_2_a add",
        "N(0, 1), of the latents' shape",
        "`preview.seed`, count within the picture (0 is the start), prompt's place in the list",
    ),
}
UNLISTED: tuple[Purpose, ...] = ("test",)
"""Purposes of the test suite."""

ABOUT_DRAWS = """\
Every number is a pure function of its key (numpy's Philox, a counter-based generator; Salmon et al.
2011): the same on any machine, for any worker, in any micro-batch and after any resume. Nothing is
drawn for a batch, a micro-batch or a worker. Switching one thing on changes no other thing's
numbers, since each purpose has a stream of its own. *Sample* is one showing of an image: a hash of
its path below the data folder, of which repeat it is, and of its set.
"""

AFTER_DRAWS = """\
Two things are chosen without a generator: `data.validation_split` holds out the images whose hashes
under `data.validation_seed` are lowest, and `training.seed: null` takes a seed from the operating
system once, which then stands in the run's job.
"""

DIFFERENCES: tuple[str, ...] = (
    "**Steps.** A step is global: `training.images_per_step` images, whatever the number of GPUs. "
    "Gradients are summed over all of them, divided once and clipped once. There each process "
    "draws its own batch, and the number of processes divides the steps.",
    "**Draws.** Every draw belongs to a sample or to a global step, so another fleet, another "
    "micro-batch or a resume draws the same. There random strengths (`noise.offset_random`, "
    "`noise.input_perturbation_random`), the pyramid's ratios and module dropout are drawn once a "
    "batch, and every process has the same generator.",
    "**Dropout.** Masks belong to (seed, step, sample, layer); `network.module_dropout` leaves a "
    "layer out for a sample and not for a whole batch. Ranks and numbers as there.",
    "**Norm cap.** `network.max_norm` acts once after each global step; there after every "
    "micro-batch.",
    "**Noise and SNR.** SNR is taken after the zero-terminal rescale, there before it. Where it is "
    "0, weights have their limits (min-SNR 1 for epsilon, 0 for v), never NaN; debiased and "
    "`loss.v_pred_like` have none for epsilon and are refused. `noise.zero_terminal_snr` is "
    "refused for bases that predict epsilon. An offset and the pyramid exclude each other, since "
    "the pyramid's division would shrink the offset. `min_snr` and `debiased` are one choice.",
    "**Output preservation.** Only for regularisation images, and in mixed batches each sample has "
    "its own target; for SD 1.x a mixed batch is an error there.",
    "**Start from a file.** `network.initial` keeps exactly the file's effect: where the job's "
    "alpha is another, `up` is rescaled. There the file's alpha is lost without a word. A file "
    "with layers that the job does not train is refused.",
    "**Optimizers.** 8-bit states cover each group as a whole; there a tensor below 4,096 numbers "
    "stays in 32 bits. A part or block with rate 0 gets no adapter at all. LoRA+, block rates and "
    "unlike rates are refused with optimizers that know one rate, which crash there in the first "
    "step. `sgd_nesterov8bit` is plain momentum, as bitsandbytes does it. Names of arguments are "
    "checked against the class.",
    "**Schedules.** They are functions of the global step. `constant` may warm up. A word that a "
    "schedule does not use is refused.",
    "**Text encoder.** It can stop after a share of the run (`optimizer.text_encoder_stop`); from "
    "then on it takes no part in the gradient's length either.",
    "**Precision.** In fp16 a step that overflows is done again with half the scale; there it is "
    "skipped. A gradient that is not finite stops the run, or skips the step where "
    "`training.on_nan` says so; there it trains on.",
    "**Held-out loss.** Measured at fixed timesteps and noise over all workers, by timestep too, "
    "with the average where one is kept. There it is the first process's own. Keeping the best "
    "checkpoint, ending early and the warning of overfitting have no counterpart there.",
    "**Files.** Where alphas differ within a model, the file has one alpha and the difference is "
    "in the weights, since diffusers would apply another strength. Every file is read back before "
    "it counts as saved.",
    "**Previews.** Noise follows (seed, prompt) and is the same in every round; there a prompt "
    "without `--d` starts from other noise each time. Schedulers take the base's own config, so "
    "`clip_sample` is not forced on, `pndm` goes without Runge-Kutta warm-up steps, and steps are "
    "spaced as the base says. Under `noise.zero_terminal_snr` pictures start from pure noise; "
    "there the plain schedule is sampled. A size that the base cannot draw is an error and not "
    "rounded, and so is a flag that is not known or means nothing for the base (`--g` but for "
    "FLUX.1-dev, `--cn`, `--ctr`, `--rcfg`, `--fs`). Where nothing is said, sampler, steps and "
    "guidance are those of the family.",
    "**Timesteps.** SD 3 and FLUX draw any number from 0 to 1000 and not whole ones. FLUX honours "
    "`training.min_timestep` and `max_timestep`, which are ignored there. What goes by a "
    "signal-to-noise ratio is refused for flow models, where it is ignored there. Only the raw "
    "prediction exists; SD 3's comparison of pictures is `loss.weight.name: x0` and off. "
    "`sigma_sqrt` takes sigma as at least 0.001, so that no sample outweighs a run.",
    "**Layers.** Globs over diffusers' names in place of regular expressions; `optimizer.rates` "
    "are factors, so that schedule, block rates and LoRA+ act besides. `network.ranks` add none. "
    "Lists of another length than the base has blocks are refused. In FLUX and SD 3, q, k and v "
    "have an adapter each, and files join them with the alpha that every reader needs.",
    "**Networks.** A DyLoRA slice belongs to (seed, step, sample, layer) and not to the whole "
    "batch. `rank` of OFT is a block's size, there the number of blocks; its files hold blocks "
    "within their limit, so that readers which limit otherwise apply what was trained. PiSSA "
    "leaves the base alone: the file is an ordinary LoRA of twice the rank. Strength is linear in "
    "the change for every network.",
    "**SDXL.** `family.clip_skip` is 2 and nothing else, since the base was trained so; there "
    "another value is warned of. SD 2's projections are saved as matrices, which diffusers reads, "
    "and not as 1x1 convolutions, which it refuses there.",
)
"""What trains, measures or draws otherwise than sd-scripts, and why; one paragraph each."""

FLAG = re.compile(r"--(?:network|optimizer|lr_scheduler)_args \w+|--\w+")


class Entry(NamedTuple):
    """One option.

    Attributes:
        kind: of the section, where other kinds lack the option or mean something else by it.
    """

    path: str
    field: Schema
    needed: bool
    kind: str = ""


def training_page() -> str:
    """The whole page."""
    schema = Job.model_json_schema()
    known = schema["$defs"]
    by_section = {
        word: list(_entries(word, schema["properties"][word], known))
        for word in SECTIONS
        if word in schema["properties"]
    }
    entries = [entry for held in by_section.values() for entry in held]
    lines = [INTRODUCTION, "## By the names of sd-scripts", "", UNDER_OTHER_NAMES]
    lines += [*_name_table(entries), "", "## The options", ""]
    for word, held in by_section.items():
        field = schema["properties"][word]
        text = field.get("description") or sections_in(field, known)[0]["description"]
        lines += [f"### {word}", "", *wrapped(text), ""]
        for entry in held:
            lines += [*_option(entry, known), ""]
    lines += ["## Every draw", "", ABOUT_DRAWS, *_draw_table(), "", AFTER_DRAWS]
    lines += ["## How it differs from sd-scripts", ""]
    for difference in DIFFERENCES:
        first, *more = wrapped(difference, indent="  ", first="- ")
        lines += [first, *more]
    return "\n".join([*lines, ""])


def known_names(entry: Entry) -> dict[str, str]:
    """What is said of an option beside its text."""
    said: dict[str, str] = dict(entry.field.get("known_as", {}))
    if entry.path in SAID_HERE:
        assert "sd_scripts" not in said, f"{entry.path} names sd-scripts' option itself now"
        said["sd_scripts"] = SAID_HERE[entry.path]
    return said


def _entries(place: str, field: Schema, known: dict[str, Schema]) -> Iterator[Entry]:
    """The options of a section and of those within it; what several kinds share comes once.

    Where kinds say different things of a word, it comes once for each thing that is said.
    """
    found = sorted(sections_in(field, known), key=_usual_first)
    words = dict.fromkeys(word for section in found for word in section["properties"])
    for word in words:
        having = [section for section in found if word in section["properties"]]
        meanings: dict[str, list[Schema]] = {}
        for section in having:
            text = section["properties"][word].get("description", "")
            meanings.setdefault(text, []).append(section)
        for sections in meanings.values():
            inner = sections[0]["properties"][word]
            path, within = f"{place}.{word}", sections_in(inner, known)
            if not ("$ref" in inner and within):
                needed = word in sections[0].get("required", [])
                kinds = sorted(_kind(section) for section in sections)
                everywhere = len(sections) == len(found) or word == "kind"
                yield Entry(path, inner, needed, "" if everywhere else ", ".join(kinds))
            if within:
                yield from _entries(f"{path}.N" if _is_list(inner) else path, inner, known)


def _kind(section: Schema) -> str:
    return str(section["properties"].get("kind", {}).get("const", ""))


def _usual_first(section: Schema) -> tuple[bool, int]:
    return _kind(section) not in ("", "lora", "sd15"), len(section["properties"])


def _kinds(section: str, known: dict[str, Schema]) -> list[str]:
    found = sections_in(Job.model_json_schema()["properties"][section], known)
    return sorted(str(one["properties"]["kind"]["const"]) for one in found)


def _is_list(field: Schema) -> bool:
    return any(one.get("type") == "array" for one in [field, *field.get("anyOf", [])])


def _option(entry: Entry, known: dict[str, Schema]) -> Iterator[str]:
    field, path = entry.field, entry.path
    values = allowed_values(field, known)
    if path.endswith(".kind"):
        values = " or ".join(f"`{kind}`" for kind in _kinds(path.removesuffix(".kind"), known))
    default = f"default `{as_yaml(field['default'])}`" if "default" in field else ""
    if field.get("type") == "object":
        default = "default `{}`"
    if entry.needed:
        default = "must be given"
    of_kind = f" (kind {entry.kind})" if entry.kind else ""
    yield from (f"#### {path}{of_kind}", "")
    yield from wrapped(f"{values[:1].upper()}{values[1:]}; {default or 'default `null`'}.")
    yield ""
    text = field.get("description", "")
    if not text and "const" in field:
        text = "Which kind: each is a file of that name."
    assert text, f"{path} has no text: write one under the field"
    yield from wrapped(text)
    said = known_names(entry)
    if not said:
        return
    yield ""
    titles = {"formula": "Formula", "source": "Source", "sd_scripts": "sd-scripts"}
    for word, title in {**titles, "guides": "Guides"}.items():
        if word in said:
            shown = _coded(said[word]) if word in ("formula", "sd_scripts") else said[word]
            yield from wrapped(f"- {title}: {shown}", indent="  ")


def _coded(text: str) -> str:
    """Formulas and flags as they are typed: Markdown would take signs out of them."""
    return f"`{text}`" if "--" not in text else FLAG.sub(r"`\g<0>`", text)


def _name_table(entries: list[Entry]) -> list[str]:
    """sd-scripts' names in order, each with our options."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        for flag in dict.fromkeys(FLAG.findall(known_names(entry).get("sd_scripts", ""))):
            found.setdefault(flag, []).append(entry)
    rows = [
        f"| `{flag}` | {', '.join(_link(entry) for entry in found[flag])} |"
        for flag in sorted(found, key=str.lower)
    ]
    return ["| sd-scripts | raylora |", "|---|---|", *rows]


def _link(entry: Entry) -> str:
    heading = entry.path + (f" (kind {entry.kind})" if entry.kind else "")
    anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
    return f"[{entry.path}](#{anchor})"


def _draw_table() -> list[str]:
    missing = set(get_args(Purpose)) - set(DRAWS) - set(UNLISTED)
    assert not missing, f"write a row of DRAWS for each of {sorted(missing)}"
    rows = [
        f"| {name} | {draw.what} | {draw.of} | {draw.formula} | {draw.key} | {draw.source} |"
        for name, draw in DRAWS.items()
    ]
    return [
        "| draw | what | for each | formula | from | source |",
        "|---|---|---|---|---|---|",
        *rows,
    ]


if __name__ == "__main__":
    PAGE.write_text(training_page(), encoding="utf-8")
