"""Options of the preview endpoint, and what one request for a picture may say."""

from __future__ import annotations

from pydantic import Field, ValidationError

from raylora.base.errors import OptionError
from raylora.base.options import Options, explain
from raylora.diffusion.process import AnyProcess
from raylora.diffusion.samplers import Sampler, sampler_problems
from raylora.preview.options import PictureSettings, PreviewOptions, Usual

TOKEN_VARIABLE = "RAYLORA_SERVE_TOKEN"
"""Environment variable of whoever starts the server, for a token of their own."""

_BODY = 'The body must be one JSON object, e.g. {"prompt": "a cat", "adapter": "my-run"}.'


class ServeOptions(Options):
    """Where the endpoint listens, what it runs on, and what it refuses."""

    host: str = "127.0.0.1"
    """Address to listen on. The traffic is plain HTTP: reach another machine's by an SSH tunnel."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    base: str | None = None
    """Run whose base draws requests without an adapter; null: the only base that the runs have."""
    replicas: int = Field(1, ge=1)
    """Copies of the base that draw at the same time, one GPU each where the cluster has GPUs."""
    cpus_only: bool = False
    """Draw on CPUs; each replica takes cpus_per_replica of them."""
    cpus_per_replica: float = Field(1, gt=0)
    """CPUs that Ray reserves for each replica."""
    max_queued: int = Field(16, ge=1)
    """Requests that may wait for a replica; the next one is told to come again (503)."""
    adapters_held: int = Field(8, ge=1)
    """Adapters that a replica keeps in memory."""
    max_steps: int = Field(100, ge=1)
    """Denoising steps that a request may ask for."""
    max_pixels: int = Field(1024 * 1024, ge=256)
    """Width times height that a request may ask for."""


class RenderRequest(Options):
    """One picture. What is null is as in the previews of the run."""

    prompt: str = Field(min_length=1, max_length=2000)
    """What to draw."""
    negative: str | None = Field(None, max_length=2000)
    """What the picture should not show."""
    adapter: str | None = Field(None, min_length=1, max_length=200)
    """"<run>" is its newest checkpoint, "<run>/<step>" that one; null is the base alone."""
    strength: float = Field(1.0, ge=-10, le=10)
    """Multiplies the adapter; 0 is the base alone."""
    seed: int | None = Field(None, ge=0, lt=2**63)
    """Starting noise."""
    stream: int = Field(0, ge=0, lt=2**63)
    """Which noise of that seed: training's preview of prompt i (from 0) uses stream i."""
    steps: int | None = Field(None, ge=1)
    """Denoising steps."""
    guidance: float | None = Field(None, ge=0, le=100)
    """Classifier-free guidance; 1 is none."""
    embedded_guidance: float | None = Field(None, ge=0, le=100)
    """The guidance that FLUX.1-dev is told as a number; other bases refuse it."""
    sampler: Sampler | None = None
    """How the picture is taken out of noise."""
    width: int | None = Field(None, ge=16)
    """Pixels."""
    height: int | None = Field(None, ge=16)
    """Pixels."""


def read_request(body: bytes) -> RenderRequest:
    """The request in a JSON body.

    Raises:
        OptionError: every mistake in it, in one line.
    """
    try:
        return RenderRequest.model_validate_json(body)
    except ValidationError as error:
        kinds = {detail["type"] for detail in error.errors(include_url=False)}
        if kinds & {"json_invalid", "model_type"}:
            raise OptionError(_BODY) from None
        raise OptionError(" ".join(explain(error, RenderRequest))) from None


def picture_settings(
    request: RenderRequest,
    previews: PreviewOptions,
    limits: ServeOptions,
    *,
    size_step: int,
    process: AnyProcess,
) -> PictureSettings:
    """How to draw the request.

    Args:
        previews: the run's, with the usual filled in, for whatever the request leaves open.
        size_step: sides must be multiples of it, since the base halves its latents.
        process: what the run trained.

    Raises:
        OptionError: too many steps or pixels, or what the base cannot draw.
    """
    words = ("negative", "seed", *Usual._fields)
    asked = {word: held for word in words if (held := getattr(request, word)) is not None}
    held = {word: getattr(previews, word) for word in words} | asked
    width, height, steps = held["width"], held["height"], held["steps"]
    if steps > limits.max_steps:
        raise OptionError(f"steps is {steps}; this server draws at most {limits.max_steps}.")
    if width * height > limits.max_pixels:
        raise OptionError(
            f"{width}x{height} is {width * height:,} pixels; this server draws at most "
            f"{limits.max_pixels:,}."
        )
    if width % size_step or height % size_step:
        raise OptionError(f"{width}x{height}: this base needs multiples of {size_step} pixels.")
    if request.negative and held["guidance"] <= 1:
        raise OptionError(
            f"negative: guidance {held['guidance']:g} does not look at it. Set guidance above 1, "
            "or leave it out."
        )
    if request.embedded_guidance is not None and previews.embedded_guidance is None:
        raise OptionError(
            f"embedded_guidance is {request.embedded_guidance:g}, and this base is told no "
            "guidance: FLUX.1-dev is. Write guidance, or leave it out."
        )
    for problem in sampler_problems([held["sampler"]], process):
        raise OptionError(f"sampler: {problem}")
    return PictureSettings(request.prompt, **held, stream=request.stream, strength=request.strength)
