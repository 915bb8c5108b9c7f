"""A few of the fuzzer's cases, the same each time; `make fuzz` runs as many as one likes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import fuzzing

CASES = range(24)


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> fuzzing.Fuzzer:
    home = tmp_path_factory.mktemp("unbroken")
    fuzzing.build(home)
    return fuzzing.Fuzzer(home, tmp_path_factory.mktemp("broken"), "tests")


def test_broken_checkpoints_are_refused_or_right(
    fuzzer: fuzzing.Fuzzer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # where the code of a checkpoint would leave its trace
    ended = [fuzzer.run(number) for number in CASES]
    wrong = [one for one in ended if one[1] not in ("refused", "right", "planned")]
    assert wrong == []
    assert {end for _, end in ended} >= {"refused", "right"}
