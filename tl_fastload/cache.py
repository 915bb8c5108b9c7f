"""Processed copies kept by themselves: `from_pretrained_lean(name, cache=True)`.

An entry is a processed copy in a folder named by a hash of everything that has a say in the
numbers, so that nothing stale can be found. Entries appear whole, by renaming: two processes that
fill one at the same time both go on, and one copy stays.
"""

from __future__ import annotations

from tl_fastload.copies.cache import (
    VARIABLE,
    Entry,
    clear,
    default_folder,
    entries,
    folder_for,
    prune,
    size_bytes,
)

__all__ = [
    "VARIABLE",
    "Entry",
    "clear",
    "default_folder",
    "entries",
    "folder_for",
    "prune",
    "size_bytes",
]
