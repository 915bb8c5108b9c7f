"""The small transformer that ships with the package, for demos, tests and first steps offline."""

from __future__ import annotations

from pathlib import Path


def embedded_model_path() -> Path:
    """The folder of the embedded model: a Hugging Face checkpoint of a two-layer GPT-2.

    It has real induction heads and a tokenizer of some 230 words; its README.md tells how it was
    trained. The folder may be handed to anything that loads a local checkpoint.
    """
    return Path(__file__).with_name("embedded")
