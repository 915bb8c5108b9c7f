"""Texts, sizes and (label, text) rows as they are printed and shown in notebooks."""

from __future__ import annotations

import difflib
import html
from collections.abc import Iterable, Sequence

from tl_fastload.printable import printable

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_bytes(size_bytes: float) -> str:
    """A size in binary units, such as "1.52 GiB"."""
    size = float(size_bytes)
    for unit in _UNITS:
        if abs(size) < 1024 or unit == _UNITS[-1]:
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"


_CLOSE_ENOUGH = 0.7  # for difflib, to which "adaptor" and "adapter" are 0.86 alike
_FIXED_BYTES = 22 << 20
"""What a load takes beside the weights: modules, tables, library code that runs the first time."""


def against(size_bytes: int, whole_bytes: int, of: str = "") -> str:
    """A peak beside what is loaded, such as "1.50 GiB (1.02x of the parameters)"; a model that is
    smaller than the fixed costs of a load is no measure.

    Args:
        size_bytes: the peak.
        whole_bytes: of what is loaded.
        of: what that is, as in " of the parameters".
    """
    if size_bytes > whole_bytes and whole_bytes < _FIXED_BYTES:
        return f"{format_bytes(size_bytes)} (mostly fixed costs)"
    return f"{format_bytes(size_bytes)} ({size_bytes / max(whole_bytes, 1):.2f}x{of})"


def one_line(text: str) -> str:
    """`printable` without line ends, which would begin a row of their own."""
    return printable(text).replace("\n", "\\n")


def listed(names: Sequence[str], most: int = 10) -> str:
    """The first names of a list, and how many there are beyond them."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a misspelt one most likely means; None where none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=_CLOSE_ENOUGH)
    return close[0] if close else None


def text_table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """A title, and a line for each row, its texts below one another."""
    rows = [(one_line(label), one_line(text)) for label, text in rows]
    width = max(len(label) for label, _ in rows)
    return "\n".join([title, *(f"  {label:<{width}}  {text}" for label, text in rows)])


def html_table(caption: str, rows: Sequence[tuple[str, str]]) -> str:
    """The same for a notebook; the caption is HTML already."""
    cells = "".join(
        f"<tr><th style='text-align:left;white-space:pre'>{html.escape(one_line(label))}</th>"
        f"<td style='text-align:left'>{html.escape(one_line(text))}</td></tr>"
        for label, text in rows
    )
    return f"<table><caption>{caption}</caption>{cells}</table>"
