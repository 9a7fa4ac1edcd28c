"""The mathematics of diffusion: torch only, no models, no files."""
