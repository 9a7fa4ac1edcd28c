"""Options of previews, and the pictures that they ask for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from raylora.base.errors import OptionError, UserError
from raylora.base.options import Options, explain, known_as
from raylora.diffusion.process import AnyProcess
from raylora.diffusion.samplers import Sampler, sampler_problems
from raylora.families import Family, FamilyOptions
from raylora.preview.prompts import read_prompt, read_prompts_file

DEFAULT_PREVIEW_STEPS = 250
MAX_STEPS = 1000
Strength = Annotated[float, Field(ge=-10, le=10)]


@dataclass(frozen=True, slots=True)
class PictureSettings:
    """All that makes a picture but the models; equal settings draw equal pictures.

    Attributes:
        stream: which noise of `seed`; a job's prompt i, from 0, has stream i.
        strength: what the adapter is multiplied by.
        embedded_guidance: the number that the base is told; None where it is told none.
        label: for people: the prompt, and on a line of its own what sets the picture apart.
    """

    prompt: str
    negative: str
    seed: int
    stream: int
    width: int
    height: int
    steps: int
    guidance: float
    sampler: Sampler
    strength: float = 1.0
    embedded_guidance: float | None = None
    label: str = field(default="", compare=False)


class Usual(NamedTuple):
    """What previews of a base are where the job does not say."""

    steps: int
    guidance: float
    sampler: Sampler
    width: int
    height: int
    embedded_guidance: float | None = None
    """None: the base is told none."""


def usual_of(family: Family, options: FamilyOptions) -> Usual:
    """What is usual for a base."""
    side = options.native_resolution
    return Usual(
        family.usual_steps,
        family.usual_guidance,
        family.usual_sampler,
        side,
        side,
        family.usual_embedded_guidance,
    )


_EMBEDDED = known_as(
    source="Meng et al. 2022, arXiv 2210.03142",
    sd_scripts="--g of a prompt, guidance_scale",
    guides="distilled guidance, FLUX guidance",
)


class PromptOptions(Options):
    """A picture with words of its own; what is null is the section's."""

    prompt: str = Field(json_schema_extra=known_as(sd_scripts="prompt of a sample_prompts file"))
    """What to draw; taken as it stands, flags and all."""
    negative: str | None = Field(
        None, json_schema_extra=known_as(sd_scripts="--n, negative_prompt", guides="neg")
    )
    """What the picture should not show."""
    seed: int | None = Field(None, ge=0, lt=2**63, json_schema_extra=known_as(sd_scripts="--d"))
    """Starting noise. Prompts of one seed start from different noise all the same."""
    width: int | None = Field(None, ge=16, json_schema_extra=known_as(sd_scripts="--w"))
    """Pixels."""
    height: int | None = Field(None, ge=16, json_schema_extra=known_as(sd_scripts="--h"))
    """Pixels."""
    steps: int | None = Field(
        None, ge=1, le=MAX_STEPS, json_schema_extra=known_as(sd_scripts="--s, sample_steps")
    )
    """Denoising steps."""
    guidance: float | None = Field(
        None, ge=0, json_schema_extra=known_as(sd_scripts="--l, scale", guides="CFG scale")
    )
    """Classifier-free guidance; 1 is none."""
    embedded_guidance: float | None = Field(None, ge=0, json_schema_extra=_EMBEDDED)
    """The guidance that FLUX.1-dev is told as a number."""
    sampler: Sampler | None = Field(
        None, json_schema_extra=known_as(sd_scripts="--ss, sample_sampler")
    )
    """How the picture is taken out of noise."""
    strength: Strength | None = Field(
        None, json_schema_extra=known_as(sd_scripts="--am", guides="LoRA weight")
    )
    """Draw it once, with this much of the adapter, in place of the section's `strengths`."""


def _checked_prompt(given: Any) -> Any:
    """One branch's mistakes instead of every branch's."""
    if isinstance(given, str | PromptOptions):
        return given
    if not isinstance(given, Mapping):
        raise ValueError(f"{given!r:.60} is no prompt: give a text, or a section with `prompt`.")
    try:
        return PromptOptions.model_validate(dict(given))
    except ValidationError as error:
        raise ValueError(" ".join(explain(error, PromptOptions))) from None


Prompt = Annotated[str | PromptOptions, BeforeValidator(_checked_prompt)]


class PreviewOptions(Options):
    """Pictures of fixed prompts and seeds, along the run."""

    prompts: tuple[Prompt, ...] = Field(
        (), json_schema_extra=known_as(sd_scripts="--sample_prompts", guides="sample prompts")
    )
    """One picture each; none: no previews. A text may end in sd-scripts' flags, `a cat --n dog --w
    512 --h 768 --d 7 --l 7.5 --s 20 --ss euler_a`; a section has the same by name."""
    prompts_file: str | None = Field(
        None, json_schema_extra=known_as(sd_scripts="--sample_prompts")
    )
    """A file of prompts of sd-scripts, .txt, .toml or .json, local or s3://. It is read once: its
    prompts stand in the job's `prompts` from then on."""
    negative: str = Field("", json_schema_extra=known_as(sd_scripts="--n of a prompt"))
    """What the pictures should not show."""
    every_steps: int | None = Field(
        None, ge=1, json_schema_extra=known_as(sd_scripts="--sample_every_n_steps")
    )
    """Global steps between rounds, 250 where every_epochs is not given either; there is always one
    at the end."""
    every_epochs: int | None = Field(
        None, ge=1, json_schema_extra=known_as(sd_scripts="--sample_every_n_epochs")
    )
    """Epochs between rounds. Give this or every_steps."""
    at_start: bool = Field(True, json_schema_extra=known_as(sd_scripts="--sample_at_first (off)"))
    """A round at step 0 too: what the base draws without the adapter."""
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        json_schema_extra=known_as(
            formula="starting noise of prompt i: N(0, 1) of (seed, stream i)",
            sd_scripts="--d of a prompt (blank draws another each time there)",
        ),
    )
    """Starting noise: prompt i uses stream i of this seed at every round."""
    steps: int | None = Field(
        None,
        ge=1,
        le=MAX_STEPS,
        json_schema_extra=known_as(sd_scripts="--s of a prompt (30)"),
    )
    """Denoising steps. Null is the family's usual."""
    guidance: float | None = Field(
        None,
        ge=0,
        json_schema_extra=known_as(
            formula="p(negative) + guidance (p(prompt) - p(negative))",
            source="Ho & Salimans 2022, arXiv 2207.12598",
            sd_scripts="--l of a prompt (7.5)",
            guides="CFG scale",
        ),
    )
    """Classifier-free guidance; 1 is none. Null is the family's usual: none for FLUX."""
    embedded_guidance: float | None = Field(None, ge=0, json_schema_extra=_EMBEDDED)
    """The guidance that FLUX.1-dev is told as a number; null is its usual. Other bases are told
    none, and refuse it."""
    width: int | None = Field(
        None, ge=16, json_schema_extra=known_as(sd_scripts="--w of a prompt (512)")
    )
    """Pixels. Null is the side that the family was made for."""
    height: int | None = Field(
        None, ge=16, json_schema_extra=known_as(sd_scripts="--h of a prompt (512)")
    )
    """Pixels. Null is the side that the family was made for."""
    sampler: Sampler | None = Field(
        None,
        json_schema_extra=known_as(
            source="ddim: Song et al. 2020, arXiv 2010.02502; pndm: Liu et al. 2022, 2202.09778; "
            "euler, heun, lms, dpm_2: Karras et al. 2022, 2206.00364, and k-diffusion; dpmsolver: "
            "Lu et al. 2022, 2206.00927; dpmsolver++ and dpmsingle: Lu et al. 2022, 2211.01095",
            sd_scripts="--sample_sampler (ddim)",
        ),
    )
    """How pictures are taken out of noise, by diffusers' schedulers with the base's own config.
    euler_a and dpm_2_a add noise of their own, which follows the seed too; k_ before a name changes
    nothing. ddim, dpmsolver++ and euler_a are the usual choices; heun and dpm_2 ask the model twice
    a step. Flow models (SD 3, FLUX) take euler or heun. Null is the family's usual."""
    strengths: tuple[Strength, ...] = Field(
        (1.0,), min_length=1, json_schema_extra=known_as(sd_scripts="--am of a prompt")
    )
    """How much of the adapter; each prompt is drawn once for each of these. `[0.6, 1]` shows early
    whether a LoRA is too strong."""

    @model_validator(mode="before")
    @classmethod
    def _read_file(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("prompts_file") is None:
            return given
        if given.get("prompts"):
            raise ValueError("preview.prompts_file and preview.prompts: give one of them.")
        rest = {word: value for word, value in given.items() if word != "prompts_file"}
        try:
            return {**rest, "prompts": read_prompts_file(str(given["prompts_file"]))}
        except UserError as error:
            raise ValueError(f"preview.prompts_file: {error}") from error

    @model_validator(mode="before")
    @classmethod
    def _some_pace(cls, given: Any) -> Any:
        paces = ("every_steps", "every_epochs")
        if isinstance(given, Mapping) and all(given.get(word) is None for word in paces):
            return {**given, "every_steps": DEFAULT_PREVIEW_STEPS}
        return given

    @model_validator(mode="after")
    def _one_pace(self) -> Self:
        if self.every_steps is not None and self.every_epochs is not None:
            raise ValueError(
                f"preview.every_steps is {self.every_steps} and preview.every_epochs is "
                f"{self.every_epochs}: give one of them (the other is null)."
            )
        return self

    @model_validator(mode="after")
    def _can_be_drawn(self) -> Self:
        twice = sorted({held for held in self.strengths if self.strengths.count(held) > 1})
        if twice:
            raise ValueError(f"preview.strengths has {twice[0]:g} twice. Take one out.")
        for number, prompt in enumerate(self.prompts):
            try:
                own = _section_of(prompt)
            except OptionError as error:
                raise ValueError(f"preview.prompts.{number}: {error}") from error
            for problem in self._unheard(number, own):
                raise ValueError(problem)
        return self

    def with_usual(self, usual: Usual) -> Self:
        """The same with what is null filled in by what is usual for the base."""
        held = {name: given for name in Usual._fields if (given := getattr(self, name)) is not None}
        return self.model_copy(update=usual._asdict() | held)

    def pictures(self) -> tuple[PictureSettings, ...]:
        """Every picture of a round, in the order of their numbers: strengths within prompts.

        Without `with_usual` what is null stays so, which labels and prompts do not show.
        """
        found = []
        for stream, prompt in enumerate(self.prompts):
            own = _section_of(prompt)
            strengths = self.strengths if own.strength is None else (own.strength,)
            for strength in strengths:
                told = strength != 1 or len(strengths) > 1
                shown = f"strength {strength:g}" if told else ""
                found.append(self._picture(own, stream, strength, shown))
        return tuple(found)

    def problems(self, usual: Usual, *, size_step: int, process: AnyProcess) -> list[str]:
        """Pictures that a base cannot draw, one sentence each.

        Args:
            size_step: sides must be multiples of it.
            process: as it is trained (`trained_process`).
        """
        filled = self.with_usual(usual)
        found = []
        for number, prompt in enumerate(self.prompts):
            own = _section_of(prompt)
            mine = own.width is not None or own.height is not None
            place = f"preview.prompts.{number}" if mine else "preview.width and height"
            size = (own.width or filled.width or 0, own.height or filled.height or 0)
            if any(side % size_step for side in size):
                told = f"{place} {size[0]}x{size[1]}"
                found.append(f"{told}: this base needs multiples of {size_step}.")
            found += filled._unheard(number, own)
            if usual.embedded_guidance is None:
                found += self._told_in_vain(number, own)
            word = "preview.sampler"
            if own.sampler is not None:
                word = f"preview.prompts.{number}.sampler (--ss)"
            wrong = sampler_problems([own.sampler or self.sampler or usual.sampler], process)
            found += [f"{word}: {problem}" for problem in wrong]
        return list(dict.fromkeys(found))

    def _told_in_vain(self, number: int, own: PromptOptions) -> Iterator[str]:
        """A guidance as a number, for a base that is told none."""
        words = {
            f"preview.prompts.{number}.embedded_guidance (--g)": own.embedded_guidance,
            "preview.embedded_guidance": self.embedded_guidance,
        }
        for word, guidance in words.items():
            if guidance is not None:
                cfg = word.replace("embedded_", "").replace("--g", "--l")
                yield (
                    f"{word} is {guidance:g}, and this base is told no guidance: FLUX.1-dev is. "
                    f"Write {cfg} for classifier-free guidance, or leave it out."
                )

    def _unheard(self, number: int, own: PromptOptions) -> Iterator[str]:
        """A negative prompt that no guidance looks at, where the guidance is known."""
        guidance = self.guidance if own.guidance is None else own.guidance
        negative = self.negative if own.negative is None else own.negative
        if negative and guidance is not None and guidance <= 1:
            yield (
                f"preview.prompts.{number} has a negative prompt, and guidance {guidance:g} "
                "does not look at it. Set guidance above 1, or leave the negative prompt out."
            )

    def _picture(
        self, own: PromptOptions, stream: int, strength: float, shown: str
    ) -> PictureSettings:
        names = ("negative", "seed", *Usual._fields)
        given = {name: held for name in names if (held := getattr(own, name)) is not None}
        telling = ("seed", "steps", "guidance", "embedded_guidance", "sampler")
        told = [f"{name} {given[name]}" for name in telling if name in given]
        notes = ", ".join([*told, *([shown] if shown else [])])
        return PictureSettings(
            own.prompt,
            **{name: getattr(self, name) for name in names} | given,
            stream=stream,
            strength=strength,
            label=f"{own.prompt}\n{notes}" if notes else own.prompt,
        )


def _section_of(prompt: str | PromptOptions) -> PromptOptions:
    """A text with its flags read; OptionError says what is wrong with them."""
    if isinstance(prompt, PromptOptions):
        return prompt
    try:
        return PromptOptions.model_validate(read_prompt(prompt))
    except ValidationError as error:
        raise OptionError(" ".join(explain(error, PromptOptions))) from None
