"""Options of previews."""

from __future__ import annotations

from pydantic import Field

from raylora.base.options import Options


class PreviewOptions(Options):
    """Pictures of fixed prompts and seeds, along the run."""

    prompts: tuple[str, ...] = ()
    """One picture each; none: no previews."""
    negative: str = ""
    """What the pictures should not show."""
    every_steps: int = Field(250, ge=1)
    """Global steps between rounds; there is always one at step 0 and at the end."""
    seed: int = Field(0, ge=0)
    """Starting noise: prompt i uses stream i of this seed at every round."""
    steps: int = Field(20, ge=1, le=1000)
    """Denoising steps."""
    guidance: float = Field(7.0, ge=0)
    """Classifier-free guidance; 1 is none."""
    width: int = Field(512, ge=16)
    """Pixels."""
    height: int = Field(512, ge=16)
    """Pixels."""
