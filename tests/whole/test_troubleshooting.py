"""The troubleshooting page quotes messages that the package really has."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

import tl_fastload

PACKAGE = Path(tl_fastload.__file__).parent
PAGE = PACKAGE.parent / "docs" / "troubleshooting.md"


def _quoted() -> list[str]:
    return re.findall(r"^### `(.+)`$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


@functools.cache
def _messages() -> list[str]:
    """Every text of the package, with "..." for what is filled in, and every name."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        descriptions = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        for node in ast.walk(tree):
            if id(node) in descriptions:
                continue  # docstrings are no messages
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "..." for v in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.ClassDef):
                found.append(node.name)
    return found


@pytest.mark.parametrize("quoted", _quoted())
def test_each_quoted_message_exists(quoted: str) -> None:
    assert any(quoted in message for message in _messages())


def test_there_are_entries() -> None:
    assert len(_quoted()) >= 15
