"""What `adapter=` says: which adapters, with which weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tl_fastload.errors import ArgumentError

Requests = tuple[tuple[str, float], ...]
"""Adapters (folders or hub names) with their weights."""


def read_adapter_argument(asked: Any) -> Requests:
    """Read `adapter=`: names with weights.

    Args:
        asked: None; a folder or hub name; or a sequence of these, each alone or with a weight.

    Raises:
        ArgumentError: for anything else.
    """
    if asked is None:
        return ()
    several = not isinstance(asked, (str, Path))
    items = list(asked) if several and isinstance(asked, Sequence) else [asked]
    if several and len(items) == 2 and _is_name(items[0]) and _is_number(items[1]):
        items = [tuple(items)]
    requests = []
    for item in items:
        pair = tuple(item) if isinstance(item, (tuple, list)) else (item, 1.0)
        if len(pair) != 2 or not _is_name(pair[0]) or not _is_number(pair[1]):
            raise ArgumentError(
                f"adapter={asked!r}: {item!r} is neither the folder or hub name of an adapter nor "
                'such a name with a weight, as in adapter=[("first", 0.5), ("second", 0.5)].'
            )
        requests.append((str(pair[0]), float(pair[1])))
    if not requests:
        raise ArgumentError(f"adapter={asked!r} names no adapter. Leave it out to merge none.")
    return tuple(requests)


def _is_name(value: Any) -> bool:
    return isinstance(value, (str, Path)) and bool(str(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
