"""Base weights: where they are found, in which form, and how they reach a model."""
