"""What others may have a hand in: names, links, shared caches; and what fails at the very end."""

from __future__ import annotations

import json
import os
import shutil
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import zoo as bed
from tests.support.comparison import lean_model
from tests.support.fake_hub import SINGLE, fill_cache, forbid_network
from tests.support.folders import folder_with
from tl_fastload import (
    ArgumentError,
    CheckpointError,
    LeanLoadError,
    SaveError,
    UnknownModelError,
    plan,
    save_lean,
)
from tl_fastload.cli import console
from tl_fastload.cli.bench.synthetic import write_hub_layout
from tl_fastload.copies import folders as store_files
from tl_fastload.errors import MissingFileError
from tl_fastload.ground.words import html_table, text_table
from tl_fastload.hooked.official_names import resolve_model
from tl_fastload.huggingface.lora.adapter import locate_adapter
from tl_fastload.printable import printable

ESCAPE = "\x1b[31mred\x9b1m\r\u202e\udc80"
WRITTEN_OUT = r"\x1b[31mred\x9b1m\x0d\u202e\udc80"
needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="gives files to other users"
)


def test_control_characters_are_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable(f"a\tb\n{ESCAPE}é漢😀") == f"a\tb\n{WRITTEN_OUT}é漢😀"
    for kind in (LeanLoadError, UnknownModelError, MissingFileError, SaveError):
        assert str(kind(ESCAPE)) == WRITTEN_OUT
    rows = [("label", f"one{ESCAPE}\n  two")]
    assert text_table("T", rows) == f"T\n  label  one{WRITTEN_OUT}\\n  two"
    assert ESCAPE[0] not in html_table("T", [(ESCAPE, ESCAPE)])
    console.say(ESCAPE)
    console.show_error("Error", ESCAPE, ESCAPE)
    console.console().print(ESCAPE, markup=False)
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert WRITTEN_OUT[:10] in text
        assert not {*text} & {*ESCAPE[:1], "\x9b", "\r", "\u202e", "\udc80"}


def test_names_in_checkpoints(zoo: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(zoo("gpt2"), tmp_path / "\x1b[2J")
    report = str(lean_model(folder).load_report)
    planned = plan(folder, device="cpu")
    assert "\x1b" not in report + str(planned) + planned._repr_html_()
    assert r"\x1b[2J" in report
    tensors = load_file(folder / "model.safetensors")
    tensors["\x1b]0;title\x07.weight"] = torch.ones(1)
    save_file(
        {"\x1b[2J" + name: value for name, value in tensors.items()}, folder / "model.safetensors"
    )
    with pytest.raises(LeanLoadError) as caught:
        lean_model(folder)
    assert "\x1b" not in str(caught.value)


def test_what_cannot_be_had_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_network(monkeypatch)
    fill_cache(tmp_path, "org/model", {"README.md": b""})
    for name, keywords in (("org/none", {}), ("org/model", {"revision": "v9"}), ("./none", {})):
        with pytest.raises(OSError, match=r"none|v9") as caught:
            resolve_model(name, cache_dir=tmp_path, **keywords)
        assert isinstance(caught.value, UnknownModelError)
        assert isinstance(caught.value, ValueError)
    with pytest.raises(OSError, match=r"config\.json") as caught:
        resolve_model("org/model", cache_dir=tmp_path)
    assert isinstance(caught.value, CheckpointError)


def test_two_arguments_that_are_aliases() -> None:
    with pytest.raises(ArgumentError, match="aliases"):
        lean_model("gpt2", checkpoint_value=1, checkpoint_label=1)


def _moved_out(path: Path) -> None:
    outside = path.rename(path.parents[1] / f"outside-{path.name}")
    path.symlink_to(outside)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "index", "copy", "payload"])
def test_links_out_of_a_folder(name: str, zoo: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(zoo("gpt2"), tmp_path / "model")
    if name == "index":
        keys = load_file(folder / "model.safetensors")
        index = {"weight_map": dict.fromkeys(keys, "one.safetensors")}
        (folder / "model.safetensors").rename(folder / "one.safetensors")
        name = "model.safetensors.index.json"
        (folder / name).write_text(json.dumps(index))
    elif name in ("copy", "payload"):
        lean_model(folder).save_lean(tmp_path / "copy")
        folder = tmp_path / "copy"
        name = "tl_fastload.json" if name == "copy" else next(folder.glob("*.safetensors")).name
    lean_model(folder)
    _moved_out(folder / name)
    for use in (lean_model, lambda place: plan(place, device="cpu")):
        with pytest.raises(CheckpointError, match="leads out of its folder"):
            use(folder)
    inside = folder / "inside"
    shutil.move(tmp_path / f"outside-{name}", inside)
    (folder / name).unlink()
    (folder / name).symlink_to("inside")
    lean_model(folder)


def test_links_of_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_network(monkeypatch)
    snapshot = fill_cache(tmp_path / "cache", "org/model", SINGLE)
    assert resolve_model("org/model", cache_dir=tmp_path / "cache").repo == "org/model"
    (snapshot / "config.json").unlink()
    (tmp_path / "outside.json").write_bytes(SINGLE["config.json"])
    (snapshot / "config.json").symlink_to(tmp_path / "outside.json")
    for name in ("org/model", str(snapshot)):
        with pytest.raises(CheckpointError, match="leads out of its folder"):
            resolve_model(name, cache_dir=tmp_path / "cache")
    folder = folder_with(tmp_path / "plain", {})
    write_hub_layout(folder, "org/other", tmp_path / "home")  # as benchmarks make it
    assert resolve_model("org/other", cache_dir=tmp_path / "home" / "hub").repo == "org/other"


def test_an_adapters_link_and_name(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert locate_adapter(str(tmp_path / "adapter"), {}).folder == tmp_path / "adapter"
    _moved_out(tmp_path / "adapter" / "adapter_config.json")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        locate_adapter(str(tmp_path / "adapter"), {})
    with pytest.raises(ArgumentError, match="leaves its repository"):
        locate_adapter("org/name/../../other", {})


@pytest.mark.parametrize("subfolder", ["..", "a/../..", "/absolute", "..\\other", "C:\\other"])
def test_a_subfolder_cannot_climb(subfolder: str, zoo: Any, tmp_path: Path) -> None:
    folder_with(tmp_path / "model", {})
    (tmp_path / "tl_fastload.json").write_text("{}")
    for use in (lean_model, lambda *args, **kwargs: plan(*args, device="cpu", **kwargs)):
        with pytest.raises(ArgumentError, match="leaves the model"):
            use(tmp_path / "model", subfolder=subfolder)


def test_a_subfolder_that_is_a_link(tmp_path: Path) -> None:
    folder_with(tmp_path / "model", {})
    folder_with(tmp_path / "other", {"tl_fastload.json": {}})
    (tmp_path / "model" / "sub").symlink_to(tmp_path / "other")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        lean_model(tmp_path / "model", subfolder="sub")


@pytest.fixture
def filled(zoo: Any, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A checkpoint, a cache with an entry of it, and that entry."""
    folder, home = Path(zoo("gpt2")), tmp_path / "cache"
    before = os.umask(0o000)  # the most that a process may let others do
    try:
        lean_model(folder, cache=home)
    finally:
        os.umask(before)
    (entry,) = home.iterdir()
    for path in (entry, *entry.rglob("*")):
        assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    assert lean_model(folder, cache=home).load_report.cache == f"hit: {entry}"
    return folder, home, entry


@pytest.mark.parametrize("where", ["folder", "json", "weights"])
def test_an_entry_that_others_may_write_to(where: str, filled: tuple[Path, Path, Path]) -> None:
    folder, home, entry = filled
    names = {"folder": ".", "json": "tl_fastload.json", "weights": "weights*"}
    path = entry if where == "folder" else next(entry.glob(names[where]))
    path.chmod(path.stat().st_mode | stat.S_IWOTH)
    with pytest.warns(UserWarning, match="others may write to"):
        model = lean_model(folder, cache=home)
    assert model.load_report.cache == f"filled: {entry}"  # anew, as it is ours
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert lean_model(folder, cache=home).load_report.cache == f"hit: {entry}"


@needs_root
def test_an_entry_of_another_user(filled: tuple[Path, Path, Path]) -> None:
    folder, home, entry = filled
    weights = next(entry.glob("weights*"))
    for path, kind in ((weights, "filled"), (entry, "not filled")):
        os.chown(path, 12345, -1)
        with pytest.warns(UserWarning, match="belongs to another user"):
            model = lean_model(folder, cache=home)
        assert model.load_report.cache.startswith(kind)
    content = {path.name: path.read_bytes() for path in entry.iterdir()}
    shutil.move(entry, home.parent / "theirs")
    entry.symlink_to(home.parent / "theirs")
    os.chown(entry, 12345, -1, follow_symlinks=False)
    with pytest.warns(UserWarning, match="belongs to another user"):
        assert lean_model(folder, cache=home).load_report.cache.startswith("not filled")
    assert {path.name: path.read_bytes() for path in entry.iterdir()} == content


def test_root_is_trusted(filled: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, home, entry = filled
    owner = entry.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    expected = "hit" if owner == 0 else "not filled"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert lean_model(folder, cache=home).load_report.cache.startswith(expected)


@needs_root
def test_nothing_is_written_through_a_planted_link(zoo: Any, tmp_path: Path) -> None:
    model = lean_model(zoo("gpt2"))
    (tmp_path / "victim").mkdir()
    link = tmp_path / "copy"
    link.symlink_to(tmp_path / "victim")
    os.chown(link, 12345, -1, follow_symlinks=False)
    with pytest.raises(SaveError, match="link that another user made"):
        save_lean(model, link)
    assert list((tmp_path / "victim").iterdir()) == []
    os.chown(link, os.geteuid(), -1, follow_symlinks=False)
    save_lean(model, link)  # one's own link is one's own will
    lean_model(link)


def test_files_of_the_command_line_are_not_written_through_links(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    (tmp_path / ".out.json.partial").symlink_to(victim)
    (tmp_path / "out.json").symlink_to(victim)
    console.write_json({"a": 1}, tmp_path / "out.json")
    assert victim.read_text() == "as it was"
    assert json.loads((tmp_path / "out.json").read_text()) == {"a": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".out.json.partial",
        "out.json",
        "victim",
    ]


def _fails(function: Callable[..., Any], when: Callable[[Path], bool]) -> Callable[..., Any]:
    def failing(path: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(path, (str, Path)) and when(Path(path)):
            raise FileNotFoundError(2, "gone", str(path))
        return function(path, *args, **kwargs)

    return failing


def test_a_save_that_is_there_raises_nothing(
    zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever cleaning up meets: files of another machine that vanish, a disk that cannot sync."""
    model, target = lean_model(zoo("gpt2")), tmp_path / "copy"
    save_lean(model, target)
    foreign = target / "weights-00000000-1-00000000-00001.safetensors"
    for name in ("lstat", "stat", "sync", "iterdir", "unlink"):
        foreign.write_bytes(b"")
        before = (target / "tl_fastload.json").read_bytes()
        with monkeypatch.context() as patch:
            if name == "sync":
                done: list[Path] = []
                real = store_files.sync

                def sync(path: Path, done: list[Path] = done, real: Any = real) -> None:
                    real(path)
                    done.append(path)
                    if path == tmp_path or done.count(target) > 1:
                        raise OSError(5, "no sync")

                patch.setattr(store_files, "sync", sync)
            elif name == "iterdir":
                times = [0]

                def iterdir(path: Path, real: Any = Path.iterdir, times: Any = times) -> Any:
                    times[0] += path == target
                    if path == target:
                        raise OSError(5, "no list")
                    return real(path)

                patch.setattr(Path, "iterdir", iterdir)
            else:
                patch.setattr(Path, name, _fails(getattr(Path, name), lambda p: p == foreign))
            save_lean(model, target)
        assert (target / "tl_fastload.json").read_bytes() != before
        lean_model(target)


def test_processing_in_place_leaves_other_buffers(zoo: Any) -> None:
    steps = dict.fromkeys(
        ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False
    )
    folder = zoo("gpt2")
    model = lean_model(folder, **steps)
    model.register_buffer("of_the_callers", torch.ones(2), persistent=False)
    buffer = model.of_the_callers
    model.process_weights_()
    assert model.of_the_callers is buffer
    x = bed.tokens("gpt2")
    with torch.no_grad():
        assert torch.allclose(model(x), lean_model(folder)(x), atol=1e-5)
