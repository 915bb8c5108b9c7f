"""Texts, sizes and (label, text) rows as they are printed and shown in notebooks."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

# What a terminal obeys instead of showing it (escapes, C1, a carriage return), what turns the
# reading direction round, and halves of pairs, which cannot be written at all.
_NOT_SHOWN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_bytes(size_bytes: float) -> str:
    """A size in binary units, such as "1.52 GiB"."""
    size = float(size_bytes)
    for unit in _UNITS:
        if abs(size) < 1024 or unit == _UNITS[-1]:
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"


def printable(text: str) -> str:
    """A text with its control characters written out: names in checkpoints are anybody's, and a
    terminal must not obey them. Tabs and line ends stay.
    """
    return _NOT_SHOWN.sub(_written_out, text)


def _written_out(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def one_line(text: str) -> str:
    """`printable` without line ends, which would begin a row of their own."""
    return printable(text).replace("\n", "\\n")


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
