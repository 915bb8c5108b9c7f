"""Bridges that several processes share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.support import bridge_zoo, zoo
from tests.support.torchrun import run_program, save_two

pytestmark = pytest.mark.parity


def test_two_processes_share_a_bridge(tmp_path: Path) -> None:
    save_two(tmp_path)
    zoo.build("mixtral", tmp_path / "mixtral")
    run_program(2, "shared_bridge", tmp_path)


def share(cases: Iterable[str], folder: Path) -> None:
    run_program(2, "shared_zoo", folder, *(case for case in cases if case in bridge_zoo.CASES))


def test_heads_and_columns_are_shared(tmp_path: Path) -> None:
    share(("gemma2", "nanochat", "bloom", "gpt1"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_heads_and_columns_of_the_whole_zoo_are_shared(tmp_path: Path, part: int) -> None:
    share(list(bridge_zoo.CASES)[part::4], tmp_path)
