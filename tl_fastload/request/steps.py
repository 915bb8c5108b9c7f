"""The names of TransformerLens' processing steps, which are arguments of a load."""

from __future__ import annotations

STEPS = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)
