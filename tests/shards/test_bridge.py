"""Bridges that several processes share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import zoo
from tests.support.torchrun import run_program, save_two

pytestmark = pytest.mark.parity


def test_two_processes_share_a_bridge(tmp_path: Path) -> None:
    save_two(tmp_path)
    zoo.build("qwen3", tmp_path / "qwen3")
    run_program(2, "shared_bridge", tmp_path)
