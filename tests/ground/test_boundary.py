"""What leaves the public functions: errors of the family, and the caller's own."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.comparison import lean_model
from tl_fastload import (
    CheckpointError,
    InternalError,
    LeanHookedTransformer,
    LeanLoadError,
    MissingPackageError,
    NotEnoughMemory,
    SaveError,
    cache,
    plan,
)
from tl_fastload.copies import write
from tl_fastload.ground import boundary
from tl_fastload.loading import load as session
from tl_fastload.request.options import Options
from tl_fastload.source import json_files

load = LeanHookedTransformer.from_pretrained_lean


class Strange(Exception):  # noqa: N818  # reads as what it is
    """An error that nobody foresees."""


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (OSError(errno.EMFILE, "Too many open files"), CheckpointError, "ulimit -n"),
        (OSError(errno.ENAMETOOLONG, "File name too long"), CheckpointError, "too long"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), NotEnoughMemory, "quantize="),
        (MemoryError(), NotEnoughMemory, "quantize="),
        (RuntimeError("DefaultCPUAllocator: not enough"), NotEnoughMemory, "quantize="),
        (RecursionError("maximum recursion depth"), CheckpointError, "nested too deeply"),
        (ImportError("no such", name="peft"), MissingPackageError, "Install peft"),
        (KeyError("x"), InternalError, "KeyError: 'x'.*fault of tl_fastload"),
    ],
)
def test_foreign_errors_are_translated_with_their_cause(
    zoo: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type, said: str
) -> None:
    # Raised in the middle of our own code: no frame of these tests lies inside of it.
    code = compile("def check(self):\n    raise self.error", session.__file__, "exec")
    scope: dict[str, Any] = {}
    exec(code, scope)
    monkeypatch.setattr(Options, "error", error, raising=False)
    monkeypatch.setattr(Options, "check", scope["check"])
    for function in (load, plan):
        with pytest.raises(kind, match=said) as caught:
            function(str(zoo("llama-gqa")), device="cpu")
        assert caught.value.__cause__ is error


def test_the_callers_own_errors_pass(zoo: Any) -> None:
    folder = str(zoo("llama-gqa"))

    def progress(_: Any) -> None:
        raise Strange

    class Broken(LeanHookedTransformer):
        def __init__(self, *_: Any, **__: Any) -> None:
            raise Strange

    with pytest.raises(Strange):
        load(folder, device="cpu", progress=progress)
    with pytest.raises(Strange):
        Broken.from_pretrained_lean(folder, device="cpu")
    with pytest.raises(TypeError, match="missing a required argument"):
        load()
    for error in (KeyboardInterrupt, SystemExit):

        def stop(_: Any, error: Any = error) -> None:
            raise error

        with pytest.raises(error):
            load(folder, device="cpu", progress=stop)


def test_panics_of_rust_are_errors() -> None:
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(InternalError, match="called `unwrap`"), boundary.boundary("while testing"):
        raise panic("called `unwrap` on nothing")


def test_a_save_says_that_it_is_one(
    zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(str(zoo("llama-gqa")), device="cpu")
    monkeypatch.setattr(write, "check_target", None)  # a fault of ours
    with pytest.raises(InternalError, match="while saving"):
        model.save_lean(tmp_path / "copy")
    assert issubclass(SaveError, LeanLoadError)


@pytest.fixture
def folder(zoo: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(zoo("llama-gqa"), tmp_path / "m"))


@contextlib.contextmanager
def changed(path: Path, **fields: Any) -> Iterator[None]:
    """A JSON file with other values, for a while."""
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), **fields}))
    yield
    path.write_text(before)


def test_one_reader_of_json(folder: Path, tmp_path: Path) -> None:
    path = folder / "config.json"
    for fields in (
        {"architectures": 7},
        {"model_type": ["x"]},
        {"hidden_size": -1},
        {"num_hidden_layers": 10**9},
        {"rms_norm_eps": float("nan")},
        {"max_position_embeddings": 2**63},
        {"quantization_config": "x"},
    ):
        (name,) = fields
        for function in (load, plan):
            refused = pytest.raises(CheckpointError, match=rf"config\.json.*({name}|NaN)")
            with changed(path, **fields), refused:
                function(str(folder), device="cpu")
    text = path.read_text()
    for content in ("[" * 100_000, '{"a":' * 2000 + "1" + "}" * 2000, text[:-1] + ', "z": NaN}'):
        path.write_text(content)
        with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
            load(str(folder), device="cpu")
    path.unlink()
    for make, said in (
        (os.mkfifo, r"no readable config\.json"),
        (lambda p: p.symlink_to("/dev/zero"), "leads out of its folder, to /dev/zero"),
        (Path.mkdir, r"no readable config\.json"),
    ):
        make(path)
        with pytest.raises(CheckpointError, match=said):
            load(str(folder), device="cpu")
        path.rmdir() if path.is_dir() else path.unlink()
    large = tmp_path / "large.json"
    large.touch()
    os.truncate(large, json_files.MAX_BYTES + 1)
    with pytest.raises(CheckpointError, match="at most"):
        json_files.read_object(large, "Mend it.")


@pytest.mark.parametrize(
    "name", ["", " ", "x" * 5000, "a\0b", "..", "~nobody-here", "a/b/c", "gpt2 ", "no-such-model"]
)
def test_plan_and_load_refuse_the_same_names(name: str) -> None:
    errors = []
    for function in (load, plan):
        with pytest.raises(LeanLoadError) as caught:
            function(name, device="cpu")
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]
    assert errors[0][0] is not InternalError


def test_a_broken_tokenizer_does_not_cost_the_weights(folder: Path, tmp_path: Path) -> None:
    wanted = lean_model(folder)
    for name, content in (
        ("tokenizer.json", '{"version": "1.0"}'),
        ("tokenizer.json", "["),
        ("tokenizer_config.json", '{"eos_token": 7}'),
        ("tokenizer_config.json", '{"tokenizer_class": [null]}'),
    ):
        (folder / name).write_text(content)
        if name == "tokenizer_config.json":
            (folder / "tokenizer.json").write_text("{}")
        with pytest.warns(UserWarning, match="No tokenizer could be loaded"):
            model = load(str(folder), device="cpu")
        assert model.tokenizer is None
        assert any("No tokenizer" in note for note in model.load_report.notes)
        assert torch.equal(model.W_E, wanted.W_E)
        (folder / name).unlink()


def test_a_bad_cache_entry_is_told_and_filled_again(zoo: Any, tmp_path: Path) -> None:
    home, folders = tmp_path / "cache", [str(zoo("llama-gqa")), str(zoo("gelu"))]
    for name in folders:
        load(name, device="cpu", cache=home)
    entries = cache.entries(home)
    assert len(entries) == 2
    for content in ("[" * 100_000, "{}", None):
        path = entries[0].folder / "tl_fastload.json"
        body = json.loads(path.read_text())
        text = content if content is not None else _resummed({**body, "parameters": {"x": 1}})
        path.write_text(text)
        assert [entry.folder for entry in cache.entries(home)] == [entries[1].folder]
        bad = next(name for name in folders if name == entries[0].source)
        plan(bad, device="cpu", cache=home)
        with pytest.warns(UserWarning, match="is filled again"):
            load(bad, device="cpu", cache=home)
        assert len(cache.entries(home)) == 2
    (entries[0].folder / "tl_fastload.json").write_text("[")
    assert cache.prune(home) == [entries[0].folder]


def _resummed(body: dict[str, Any]) -> str:
    from tl_fastload.copies.manifest import _checksum

    body.pop("checksum")
    return json.dumps({**body, "checksum": _checksum(body)})


def test_a_missing_peft_is_a_missing_package(
    zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackageError, match="pip install"):
        load(str(zoo("llama-gqa")), device="cpu", adapter=str(tmp_path))
