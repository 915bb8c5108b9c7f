"""What TransformerBridge is called, and where its parts stand, from version to version of
TransformerLens.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from tl_fastload.source.aliases import Aliases

_SOURCES = "transformer_lens.model_bridge.sources"

TOKENIZER_FUNCTIONS = ("configure_tokenizer", "setup_tokenizer")
"""What boot hands a tokenizer to before it is the bridge's: since version 4, and before."""


def bridge_class() -> Any:
    """TransformerLens' TransformerBridge."""
    return import_module("transformer_lens.model_bridge").TransformerBridge


def stock_boot() -> Any:
    """The function behind `TransformerBridge.boot_transformers`."""
    return import_module(f"{_SOURCES}.transformers").boot


def is_processed(bridge: Any) -> bool:
    """Whether `process_weights` has run on a bridge, or has begun to."""
    return bool(getattr(bridge, "_weights_processed", False))


def adapters() -> Mapping[str, Any]:
    """Names of transformers' classes -> TransformerLens' adapters for them."""
    factory = import_module("transformer_lens.factories.architecture_adapter_factory")
    found: Mapping[str, Any] = factory.SUPPORTED_ARCHITECTURES
    return found


def aliases() -> Aliases:
    """The names that TransformerLens has for models."""
    table = import_module("transformer_lens.supported_models").MODEL_ALIASES
    known = {name.lower(): official for official, names in table.items() for name in names}
    known.update({official.lower(): official for official in table})
    return Aliases(library="TransformerLens", known=known)
