"""What TransformerBridge is called, and where its parts stand, from version to version of
TransformerLens.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from tl_fastload.ground import compat

_SOURCES = "transformer_lens.model_bridge.sources"

TOKENIZER_FUNCTIONS = ("configure_tokenizer", "setup_tokenizer")
"""What boot hands a tokenizer to before it is the bridge's: since version 4, and before."""


def bridge_class() -> Any:
    """TransformerLens' TransformerBridge."""
    return import_module("transformer_lens.model_bridge").TransformerBridge


def stock_boot() -> Any:
    """The function behind `TransformerBridge.boot_transformers`."""
    return import_module(f"{_SOURCES}.transformers").boot


def has_bridge() -> bool:
    """Whether this TransformerLens has a TransformerBridge that is known here."""
    return compat.TRANSFORMER_LENS.major >= 3 and find_spec(_SOURCES) is not None


def is_processed(bridge: Any) -> bool:
    """Whether `process_weights` has run on a bridge, or has begun to."""
    return bool(getattr(bridge, "_weights_processed", False))


def is_recording(bridge: Any) -> bool:
    """Whether a bridge is being loaded, so that its weights are promises still."""
    return "_lean_recording" in bridge.__dict__
