"""The exceptions of tl_fastload: one family, so that `except LeanLoadError` catches them all."""

from __future__ import annotations

import errno
import sys
import warnings
from pathlib import Path

from tl_fastload.printable import printable

_NO_MEMORY = ("DefaultCPUAllocator", "Cannot allocate memory", "out of memory")
_PACKAGE = str(Path(__file__).parent)


class LeanLoadError(Exception):
    """Base of every error that tl_fastload raises on purpose."""

    def __str__(self) -> str:
        return printable(super().__str__())  # names of files and tensors are anybody's


class ArgumentError(LeanLoadError, ValueError):
    """An argument is wrong, or two arguments contradict each other."""


class UnknownModelError(LeanLoadError, ValueError, OSError):
    """A model name, folder or revision that cannot be had; says what was tried.

    Also an OSError, which is what transformers raises then.
    """


class UnsupportedArchitectureError(LeanLoadError, NotImplementedError):
    """A model that `HookedTransformer` cannot represent; names what can be."""


class CheckpointError(LeanLoadError):
    """A checkpoint file is missing, truncated, corrupt or unsafe."""


class MissingFileError(CheckpointError, OSError):
    """A file that a repository on the hub or its cache does not have; an OSError in transformers,
    too.
    """


class MissingWeightsError(CheckpointError):
    """Weights are missing, unexpected or of the wrong shape; lists all of them."""


class HalfWrittenError(CheckpointError):
    """A model that a step in place has left half-written; says what makes it whole again."""


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


class ReplacedFunctionError(LeanLoadError):
    """Something else stands where a function of TransformerLens should; says what, and where."""


class QuantizationError(LeanLoadError):
    """Quantized weights that cannot be read, made or multiplied by; says which and why."""


class MissingPackageError(LeanLoadError, ImportError):
    """A package of one of the extras is not installed; says how to install it."""


class SaveError(LeanLoadError):
    """A model that cannot be saved, or not there; nothing half-written is left."""


class InternalError(LeanLoadError, RuntimeError):
    """A fault of tl_fastload itself, and not of a file or an argument; carries its cause."""


class NumbersWarning(UserWarning):
    """The model computes other numbers than its reference, transformers or TransformerLens' own
    loader; says where and why.
    """


def warn_numbers(message: str) -> str:
    """Warn that numbers differ from transformers', at the line that called this package.

    Returns the message, for the notes of a report.
    """
    level, frame = 1, sys._getframe()
    # TransformerLens' own functions run between ours.
    while frame.f_back is not None and _is_ours(frame.f_code.co_filename):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, NumbersWarning, stacklevel=level)
    return message


def _is_ours(filename: str) -> bool:
    return filename.startswith(_PACKAGE) or "transformer_lens" in Path(filename).parts


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, the system's, or torch's for the host or a device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    is_torchs = isinstance(error, RuntimeError) and not isinstance(error, RecursionError)
    return is_torchs and any(text in str(error) for text in _NO_MEMORY)
