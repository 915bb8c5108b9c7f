"""The command line on both roads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import flat, run
from tl_fastload import faces
from tl_fastload.cli import options
from tl_fastload.cli.bench import loads
from tl_fastload.cli.bench import run as bench_run
from tl_fastload.errors import ArgumentError, MissingPackageError
from tl_fastload.ground import compat

pytestmark = pytest.mark.skipif(not compat.has_bridge(), reason="no TransformerBridge")


def test_the_roads_are_those_that_there_are() -> None:
    assert options.ROADS == faces.ROADS
    assert set(faces.installed()) <= set(faces.ROADS)
    written = flat(run("plan", "x", "--road", "cars", code=2).output)
    assert "'cars' is none of hooked, bridge" in written


def test_a_bridge_from_plan_to_copy(bridge_zoo_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = bridge_zoo_folder("gpt2")
    arguments = ["--road", "bridge", "--device", "cpu"]
    planned = json.loads(run("plan", folder, *arguments, "--json", "-").stdout)
    assert "TransformerBridge" in planned["stock_note"]
    done = run("load", folder, *arguments, "--prompt", "w5 w9", "--json", "-")
    loaded = json.loads(done.stdout)
    assert loaded["report"]["processing"]["fold_ln"] == "done"
    assert len(loaded["predictions"]) == 5
    copy = tmp_path / "copy"
    run("save", folder, copy, *arguments)
    # The copy says which road it is of.
    again = json.loads(run("load", copy, "--prompt", "w5 w9", "--json", "-").stdout)
    assert again["report"]["reason"] == "a processed copy"
    assert again["predictions"] == loaded["predictions"]
    assert "A processed copy" in run("plan", copy).stdout


def test_bench_loads_bridges(
    bridge_zoo_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a HookedTransformer, whose names for models are its own."""
    asked: list[Any] = []
    monkeypatch.setattr(bench_run, "run", lambda *given: asked.append(given) or {})
    folder = bridge_zoo_folder("gpt2")
    run("bench", folder, "--road", "bridge", "--json", "-")
    subject, contenders = asked[0][:2]
    assert subject.folder == folder.resolve()
    assert [contender.name for contender in contenders] == [
        "stock float32 bridge",
        "lean float32 bridge",
    ]


@pytest.mark.parametrize(("option", "value"), [("--strategy", "copy"), ("--quantize", "nf4")])
def test_bench_refuses_what_booting_has_not(
    option: str, value: str, bridge_zoo_folder: Callable[..., Path], no_reading: None
) -> None:
    folder = bridge_zoo_folder("gpt2")
    given = ("bench", folder, "--road", "bridge", "--no-processing", option, value)
    written = flat(run(*given, code=2).output)
    assert f"Invalid value for '{option}': a bridge that is not processed is booted" in written
    contender = {"loader": "lean", "dtype": "float32", "processed": False, "road": "bridge"}
    load, _ = loads.prepare(contender | {option[2:]: value}, str(folder), "", str(folder))
    with pytest.raises(ArgumentError, match=f"{option[2:]}="):
        load()


def test_doctor_tells_the_roads() -> None:
    assert "TransformerBridge (--road bridge)" in flat(run("doctor").output)


def test_a_road_that_is_lacking_names_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "has_bridge", lambda: False)
    monkeypatch.setattr(compat, "has_hooked_transformer", lambda: False)
    with pytest.raises(MissingPackageError, match="LeanHookedTransformer"):
        compat.require_bridge()
    with pytest.raises(MissingPackageError, match="LeanTransformerBridge"):
        compat.require_hooked_transformer()
    assert faces.installed() == ()
