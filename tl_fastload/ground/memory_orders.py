"""The names of the memory orders that a model's parameters can have."""

from __future__ import annotations

from tl_fastload.errors import ArgumentError

FORWARD, STOCK = "forward", "stock"
LAYOUTS = (FORWARD, STOCK)


def check_layout(value: object) -> None:
    """Raise ArgumentError for what is no memory order."""
    if not isinstance(value, str) or value not in LAYOUTS:
        raise ArgumentError(f"layout={value!r} is none of {', '.join(LAYOUTS)}.")
