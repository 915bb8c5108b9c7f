"""Processed copies and processes: killed saves, caches filled at once, memory that is shared."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.forks import in_fork
from tests.support.store_programs import run_programs
from tl_fastload.copies import folders
from tl_fastload.copies.folders import new_owner, remove_abandoned

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, /proc")


@pytest.fixture(scope="module", params=["few", pytest.param("many", marks=pytest.mark.slow)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `store_programs` saw, all of it in one process: the imports take longest."""
    few = request.param == "few"
    numbers = {"killed": 25 if few else 250, "together": 2 if few else 20, "shared": 3}
    folder = tmp_path_factory.mktemp("programs")
    return {**in_fork(lambda: run_programs(folder, numbers)), "few": few}


@pytest.mark.parametrize("how", ["clock", "step"])
def test_a_save_that_is_killed(found: Any, how: str) -> None:
    """At random moments, and in front of random steps of the file system."""
    killed = found["killed"][how]
    assert killed["kills"] == (25 if found["few"] else 250)  # none of which had finished
    assert killed["absent"] + killed["old"] + killed["new"] == killed["kills"]
    assert killed["files"] == ["tl_fastload.json", "tokenizer", "weights"]
    assert killed["around"] == ["copy", "timed"]  # what was left was removed
    seen = ["absent", "old", "left"]
    if how == "step":
        seen.append("new")  # between the rename and the end lies no time to speak of
    if how == "step" or not found["few"]:
        assert min(killed[key] for key in seen) > 0


def test_processes_that_fill_one_entry_at_once(found: Any) -> None:
    assert found["together"]["said"] == [[[0, 0, 0], 1, "hit"]] * (2 if found["few"] else 20)


def test_processes_share_one_copy(found: Any) -> None:
    assert found["shared"]["one"] > 60_000_000
    assert found["shared"]["several"] <= 1.2 * found["shared"]["one"]


def test_whose_leftovers_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / f".copy.tl_fastload-{new_owner()}"
    machine, _, token = new_owner().split("-")
    dead = tmp_path / f".copy.tl_fastload-{machine}-999999999-{token}"
    other = tmp_path / f".other.tl_fastload-{machine}-999999999-{token}"
    afar = tmp_path / f".copy.tl_fastload-00000000-1-{token}"
    for path in (mine, dead, other, afar, tmp_path / ".copy.tl_fastload-notes"):
        path.mkdir()
    remove_abandoned(tmp_path, "copy")
    assert not dead.exists()
    assert all(path.exists() for path in (mine, other, afar))
    monkeypatch.setattr(folders, "_FORGOTTEN_SECONDS", -1)
    remove_abandoned(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [mine.name, ".copy.tl_fastload-notes"]
    )
