"""Whether what a load needs is there."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tl_fastload.available import available_bytes
from tl_fastload.display import format_bytes
from tl_fastload.errors import NotEnoughMemory


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
