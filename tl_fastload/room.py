"""Whether what a load needs is there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from tl_fastload.available import available_bytes
from tl_fastload.display import format_bytes
from tl_fastload.errors import LeanLoadError, NotEnoughMemory, is_out_of_memory

# Sixteen float32 copies of everything at once: far more than any recipe holds.
_MOST_BYTES_PER_ELEMENT = 64


def is_ample(elements: int, devices: Iterable[torch.device]) -> bool:
    """Whether there is so much room that what a load needs does not have to be found out.

    Args:
        elements: of all parameters and buffers that are placed.
        devices: that they may lie on.
    """
    free = (available_bytes(device) for device in {torch.device("cpu"), *devices})
    return all(size is None or elements * _MOST_BYTES_PER_ELEMENT <= size for size in free)


def check_room(needed_bytes: Mapping[torch.device, int], label: str) -> None:
    """Raise NotEnoughMemory if a load cannot have what it needs.

    Args:
        needed_bytes: the most that is allocated on each device at a time.
        label: the model, for the message.
    """
    for device, needed in needed_bytes.items():
        free = available_bytes(device)
        if free is not None and needed > free:
            raise NotEnoughMemory(
                f"Loading {label} takes {format_bytes(needed)} on {device}, where "
                f"{format_bytes(free)} are available. No weights were read."
            )


@contextmanager
def let_go_on_error(model: nn.Module, label: str) -> Iterator[None]:
    """While a new model is filled: if that fails, what was placed goes at once, and not only when
    the exception does, whose traceback holds the model.

    Args:
        model: nobody else's yet.
        label: the model, for the message.

    Raises:
        NotEnoughMemory: instead of what torch raises when it has no memory.
    """
    try:
        yield
    except BaseException as error:
        _empty(model)
        if isinstance(error, LeanLoadError) or not is_out_of_memory(error):
            raise
        said = str(error).strip().partition("\n")[0]
        error.__traceback__ = None  # its frames hold the tensors that were in work
        raise NotEnoughMemory(
            f"Loading {label} ran out of memory ({said}). Nothing was loaded; what had been placed "
            "is free again."
        ) from None


def _empty(model: nn.Module) -> None:
    """Put parameters without memory in the place of a model's."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
