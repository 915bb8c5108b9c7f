"""Every Python block of the README and the docs runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# The first block of the README loads from the hub: shown, checked for its names, not run here.
_NEEDS_HUB = 'from_pretrained_lean("gpt2")'


def _blocks() -> list[tuple[str, str]]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [
        (f"{page.name}:{number}", code)
        for page in pages
        for number, code in enumerate(_BLOCK.findall(page.read_text(encoding="utf-8")))
    ]


@pytest.mark.parametrize(("name", "code"), _blocks(), ids=[name for name, _ in _blocks()])
def test_a_block_runs(
    name: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    compiled = compile(code, name, "exec")
    if _NEEDS_HUB in code:
        exec(code.replace(_NEEDS_HUB, "from_pretrained_lean"), {})
        return
    exec(compiled, {"__name__": "docs"})


def test_there_are_blocks_to_run() -> None:
    assert len(_blocks()) >= 5
