"""Versions of torch, transformers and TransformerLens, and what each allows."""

from __future__ import annotations

from importlib import import_module, metadata

from packaging.version import Version


def _version(distribution: str) -> Version:
    return Version(metadata.version(distribution))


TORCH = _version("torch")
TRANSFORMERS = _version("transformers")
TRANSFORMER_LENS = _version("transformer_lens")

ASSIGN_NEEDS_TORCH = Version("2.1")
HOOKED_TRANSFORMER_GONE_IN = Version("4.0.dev0")


def can_assign() -> bool:
    """Whether this torch has `load_state_dict(..., assign=True)`."""
    return Version(TORCH.base_version) >= ASSIGN_NEEDS_TORCH


def can_map_torch_files() -> bool:
    """Whether `torch.load` takes `mmap=True` (torch 2.1 and newer)."""
    return Version(TORCH.base_version) >= Version("2.1")


# transformers 5 renames and merges checkpoint tensors by a table; version 4 had plain names.
HAS_WEIGHT_CONVERSIONS = TRANSFORMERS.major >= 5

# The field of a configuration that holds the model's dtype.
CONFIG_DTYPE_NAME = "dtype" if Version("4.56") <= TRANSFORMERS else "torch_dtype"


def default_device() -> str:
    """The device on which TransformerLens puts a model if none is asked for."""
    home = "utilities" if TRANSFORMER_LENS.major >= 3 else "utils"
    return str(import_module(f"transformer_lens.{home}").get_device())


def require_hooked_transformer() -> None:
    """Raise ImportError on a TransformerLens that has no HookedTransformer any more."""
    if TRANSFORMER_LENS >= HOOKED_TRANSFORMER_GONE_IN:
        raise ImportError(
            f"TransformerLens {TRANSFORMER_LENS} has no HookedTransformer, which tl_fastload loads "
            'into: pip install "transformer-lens>=2.16.1,<4".'
        )
