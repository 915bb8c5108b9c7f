"""The lines of docs/migration.md run as a notebook of either class, and give the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tl_fastload.faces import installed
from tl_fastload.ground.compat import can_assign

PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text(encoding="utf-8")
_ROW = re.compile(r"^\| `(.+?)` \| (.+) \|$", re.MULTILINE)


def lines(road: str) -> list[str]:
    """The lines of one column, from top to bottom."""
    found = []
    for left, right in _ROW.findall(PAGE):
        own = re.match(r"`(.+?)`", right)
        assert own or right == "the same", right
        found.append(left if road == "hooked" or own is None else own[1])
    return found


def results(road: str) -> list[Any]:
    """What each line gives; None for a statement."""
    (setup,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"__name__": "notebook"}
    exec(setup, names)
    found = []
    for line in lines(road):
        try:
            code = compile(line, line, "eval")
        except SyntaxError:
            exec(compile(line, line, "exec"), names)
            found.append(None)
        else:
            found.append(eval(code, names))
    return found


@pytest.mark.parity
def test_both_columns_run_and_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {road: results(road) for road in installed()}
    assert all(len(found) > 50 for found in given.values())
    told = {road: dict(zip(lines(road), found, strict=True)) for road, found in given.items()}
    for found in told.values():
        assert found["again.load_report.mapped_bytes > 0"] is can_assign()
        assert found["model(tokens, stop_at_layer=1)"].shape == (1, 6, 128)
    if len(given) < 2:
        return
    for line, one, other in zip(lines("bridge"), given["hooked"], given["bridge"], strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(other, one, atol=1e-4, rtol=0, msg=line)
        elif isinstance(one, (int, str, list, tuple, bool)):
            assert other == one, line
