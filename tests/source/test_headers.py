"""Plans for names on the hub: nothing but the configuration, the index and headers is fetched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import quantized_zoo as qz
from tests.support.fake_hub import FakeHub, Repo, forbid_network, point_at
from tl_fastload import plan
from tl_fastload.errors import CheckpointError, UnknownModelError
from tl_fastload.hooked.official_names import resolve_model
from tl_fastload.source.checkpoint import open_weights
from tl_fastload.source.remote import open_headers

LARGE: dict[str, Any] = {"vocab_size": 3000, "hidden_size": 192, "intermediate_size": 704}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    forbid_network(monkeypatch)
    with FakeHub({}) as fake:
        point_at(monkeypatch, fake.url)
        yield fake


@pytest.mark.parametrize("shards", [False, True])
def test_only_headers_are_fetched(shards: bool, zoo: Any, hub: FakeHub, tmp_path: Path) -> None:
    folder = zoo("llama-gqa", **LARGE, shards=shards)
    files = files_of(folder)
    hub.repos["org/name"] = Repo(files)
    found = plan("org/name", cache_dir=tmp_path, device="cpu")
    local = plan(folder, device="cpu")
    assert found.parameter_bytes == local.parameter_bytes
    assert found.mapped_bytes == local.mapped_bytes
    assert found.peak_anonymous_bytes == local.peak_anonymous_bytes
    assert found.stock_peak_anonymous_bytes == local.stock_peak_anonymous_bytes
    weights = {name: len(data) for name, data in files.items() if name.endswith(".safetensors")}
    assert found.disk_bytes == sum(weights.values())
    assert found.available_disk_bytes
    assert found.fits
    for name, size in weights.items():
        assert 0 < hub.sent_bytes[name] <= 100_001
        assert size > hub.sent_bytes[name]
    cached = {path.name for path in tmp_path.rglob("*") if path.is_symlink()}
    assert not any(name.endswith(".safetensors") for name in cached)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_packing_that_only_tensors_tell(kind: str, zoo: Any, hub: FakeHub, tmp_path: Path) -> None:
    hub.repos["org/name"] = Repo(files_of(qz.saved(qz.build(zoo, "llama-gqa"), kind)))
    with pytest.raises(CheckpointError, match="in tensors, not in headers"):
        plan("org/name", cache_dir=tmp_path, device="cpu")


def test_what_is_cached_is_not_counted(zoo: Any, hub: FakeHub, tmp_path: Path) -> None:
    folder = zoo("llama-gqa", **LARGE, shards=True)
    hub.repos["org/name"] = Repo(files_of(folder))
    location = resolve_model("org/name", cache_dir=tmp_path)
    whole = open_headers(location)
    first = min(path.name for path in whole.files)
    open_weights(location, weights_file=first)
    part = open_headers(location)
    assert part.missing_bytes == whole.missing_bytes - (folder / first).stat().st_size
    assert part.weight_bytes == whole.weight_bytes == whole.missing_bytes
    assert part.entries.keys() == whole.entries.keys()
    open_weights(location)
    assert open_headers(location).missing_bytes == 0
    assert plan("org/name", cache_dir=tmp_path, device="cpu").disk_bytes == 0


@pytest.mark.parametrize("case", ["gpt2", "llama-gqa"])
def test_torch_files_are_sized_and_not_fetched(
    case: str, zoo: Any, hub: FakeHub, tmp_path: Path
) -> None:
    folder = zoo(case, bin=True)
    hub.repos["org/name"] = Repo(files_of(folder))
    found, local = plan("org/name", cache_dir=tmp_path, device="cpu"), plan(folder, device="cpu")
    assert found.parameter_bytes == local.parameter_bytes
    assert found.disk_bytes == (folder / "pytorch_model.bin").stat().st_size
    assert "pytorch_model.bin" not in hub.sent_bytes


def test_a_toy_model_is_not_fetched(zoo: Any, hub: FakeHub, tmp_path: Path) -> None:
    folder = zoo("gelu")
    weights = next(folder.rglob("*.pth"))
    name = weights.name
    hub.repos["NeelNanda/GELU_1L512W_C4_Code"] = Repo(
        {
            "config.json": (folder / "config.json").read_bytes(),
            name: next(folder.rglob("*.pth")).read_bytes(),
        }
    )
    found = plan("gelu-1l", cache_dir=tmp_path, device="cpu")
    assert found.total_bytes > 0
    assert name not in hub.sent_bytes
    assert found.parameter_bytes == plan(folder, device="cpu").parameter_bytes


def test_without_a_network_the_configuration_says_what_it_can(
    zoo: Any, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["org/name"] = Repo(files_of(zoo("llama-gqa")))
    found = plan("org/name", cache_dir=tmp_path, device="cpu")
    forbid_network(monkeypatch)
    sketched = plan("org/name", cache_dir=tmp_path, device="cpu")
    assert sketched.parameter_bytes == found.parameter_bytes
    assert any("only a configuration" in note for note in sketched.notes)
    with pytest.raises(UnknownModelError):
        plan("org/other", cache_dir=tmp_path, device="cpu")


def test_a_corrupt_header(zoo: Any, hub: FakeHub, tmp_path: Path) -> None:
    files = files_of(zoo("llama-gqa"))
    files["model.safetensors"] = b"\xff" * 64
    hub.repos["org/name"] = Repo(files)
    with pytest.raises(CheckpointError, match="header"):
        plan("org/name", cache_dir=tmp_path, device="cpu")
