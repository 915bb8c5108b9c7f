"""A text that a terminal shows and does not obey; imports nothing of the package."""

from __future__ import annotations

import re

# What a terminal obeys instead of showing it (escapes, C1, a carriage return), what turns the
# reading direction round, and halves of pairs, which cannot be written at all.
_NOT_SHOWN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


def printable(text: str) -> str:
    """A text with its control characters written out: names in checkpoints are anybody's, and a
    terminal must not obey them. Tabs and line ends stay.
    """
    return _NOT_SHOWN.sub(_written_out, text)


def _written_out(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
