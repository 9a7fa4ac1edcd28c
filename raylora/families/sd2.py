"""Stable Diffusion 2.x: 1.x's UNet with linear projections, OpenCLIP-H text, often predicting v.

The base's text encoder ends before the last layer of OpenCLIP-H: of its 24 layers the checkpoints
in diffusers' layout hold 23, so that their last one, with the final norm, is what the UNet was
trained on.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from raylora.base.options import known_as
from raylora.components.clip import ClipTextOptions, check_clip_skip
from raylora.components.unet import check_stable_diffusion
from raylora.families import FamilyOptions
from raylora.families.sd15 import Sd15


class Sd2Options(ClipTextOptions, FamilyOptions):
    """Stable Diffusion 2.0 and 2.1, of 512 and of 768 pixels, and models of their layout."""

    layout: ClassVar[str] = "sd2"
    native_resolution: ClassVar[int] = 768
    bucket_step: ClassVar[int] = 64

    kind: Literal["sd2"] = "sd2"
    clip_skip: int = Field(1, ge=1, json_schema_extra=known_as(sd_scripts="--clip_skip"))
    """Which layer of the text encoder the text is taken from, counted from the last that the base
    has, which is 1: the last but one of OpenCLIP-H, that these models were trained with. Previews
    use the same."""


class Sd2(Sd15):
    """The same parts as 1.x."""

    kind: ClassVar[str] = "sd2"

    def _check(self) -> None:
        check_stable_diffusion(self.base, self._unet_config, linear=True)
        check_clip_skip(self.base, self._options.clip_skip)

    def _version(self, *, v: bool) -> dict[str, str]:
        return {
            "ss_base_model_version": "sd_v2_v" if v else "sd_v2",
            "ss_v2": "True",
            "ss_clip_skip": str(self._options.clip_skip),
            "modelspec.architecture": f"stable-diffusion-v2-{'768-v' if v else '512'}",
        }


family = Sd2
options = Sd2Options
