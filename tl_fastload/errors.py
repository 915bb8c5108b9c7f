"""The exceptions of tl_fastload: one family, so that `except LeanLoadError` catches them all."""

from __future__ import annotations


class LeanLoadError(Exception):
    """Base of every error that tl_fastload raises on purpose."""


class ArgumentError(LeanLoadError, ValueError):
    """An argument is wrong, or two arguments contradict each other."""


class UnknownModelError(LeanLoadError, ValueError):
    """A model name or folder that cannot be found; says what was tried."""


class UnsupportedArchitectureError(LeanLoadError, NotImplementedError):
    """A model that `HookedTransformer` cannot represent; names what can be."""


class CheckpointError(LeanLoadError):
    """A checkpoint file is missing, truncated, corrupt or unsafe."""


class MissingWeightsError(CheckpointError):
    """Weights are missing, unexpected or of the wrong shape; lists all of them."""


class AdapterError(LeanLoadError):
    """An adapter (LoRA) that cannot be merged into the model; says which of its parts and why."""


class DifferentModelError(CheckpointError):
    """A checkpoint was trained beside another pretrained model than the one that stands here."""


class NotEnoughMemory(LeanLoadError, MemoryError):  # noqa: N818  # reads as what it is
    """The model cannot fit; raised before weights are read, with what would fit."""


class StrategyError(ArgumentError):
    """A loading strategy that this torch does not have."""


class RecordingError(LeanLoadError):
    """An operation that cannot be recorded on a promise; names the operation."""


class QuantizationError(LeanLoadError):
    """Quantized weights that cannot be read, made or multiplied by; says which and why."""


class MissingPackageError(LeanLoadError, ImportError):
    """A package of one of the extras is not installed; says how to install it."""


class SaveError(LeanLoadError):
    """A model that cannot be saved, or not there; nothing half-written is left."""


class InternalError(LeanLoadError, RuntimeError):
    """A fault of tl_fastload itself, and not of a file or an argument; carries its cause."""
