"""Thin shells that run the trainer, the cache, sweeps and previews on a Ray cluster.

Only this folder imports ray. Everything here could be deleted and `raylora train --local` would
train the same LoRA.
"""
