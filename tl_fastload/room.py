"""Whether what a load needs is there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from tl_fastload.available import available_bytes
from tl_fastload.display import format_bytes
from tl_fastload.errors import NotEnoughMemory

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
