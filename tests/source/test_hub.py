"""Hub names against a server of our own, and with nobody there."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from tests.support.fake_hub import (
    COMMIT,
    CONFIG,
    OTHER_COMMIT,
    SHARDED,
    SINGLE,
    FakeHub,
    Repo,
    fill_cache,
    point_at,
    resolve,
)
from tl_fastload.errors import CheckpointError, LeanLoadError, UnknownModelError
from tl_fastload.hooked.official_names import resolve_model
from tl_fastload.source import hub
from tl_fastload.source.checkpoint import open_weights
from tl_fastload.source.hub import HubOptions


@pytest.fixture
def server(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub({"org/name": Repo(SINGLE), "org/shards": Repo(SHARDED)}) as fake:
        point_at(monkeypatch, fake.url)
        yield fake


@pytest.fixture
def unreachable(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody answers, and nobody waits for it: what is slept adds up to no more than a moment."""
    with FakeHub({}) as fake:
        url = fake.url
    point_at(monkeypatch, url)  # nobody listens there any more
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    yield
    assert sum(slept) < 5


def refusal(name: str, kind: type[LeanLoadError] = UnknownModelError, **arguments: Any) -> str:
    with pytest.raises(kind) as caught:
        resolve(name, **arguments)
    return str(caught.value)


# ------------------------------------------------------------------- a server


def test_only_what_is_needed_is_downloaded(cache: Path, server: FakeHub) -> None:
    files = {**SHARDED, "README.md": b"x", "pytorch_model.bin": b"x", "model.gguf": b"x"}
    server.repos["org/name"] = Repo(files)
    location = resolve_model("org/name", cache_dir=cache)
    assert server.downloads() == ["config.json"]
    checkpoint = open_weights(location)
    assert sorted(server.downloads()) == sorted(SHARDED)
    assert checkpoint.entries.keys() == {"a", "b"}
    assert checkpoint.commit == COMMIT


def test_shards_are_downloaded_side_by_side_and_the_commit_is_asked_for_once(
    cache: Path, server: FakeHub
) -> None:
    shards = {f"s-{n}.safetensors": save({f"w{n}": torch.ones(2)}) for n in range(6)}
    homes = {f"w{n}": f"s-{n}.safetensors" for n in range(6)}
    index = json.dumps({"weight_map": homes}).encode()
    files = {"config.json": CONFIG, "model.safetensors.index.json": index, **shards}
    server.repos["org/six"] = Repo(files)
    server.together = threading.Barrier(2, timeout=10)
    assert resolve("org/six", cache_dir=cache).entries.keys() == homes.keys()
    assert not server.together.broken
    asked = [line for line in server.requests if "api/models/" in line]
    assert asked[0] == "GET api/models/org/six"
    assert len(asked) == 2  # huggingface_hub asks for the sizes of what it downloads together
    assert sorted(server.downloads()) == sorted(files)
    assert len([line for line in server.requests if "/resolve/" in line]) == 2 * len(files)
    server.requests.clear()
    resolve("org/six", cache_dir=cache, force_download=True)
    assert sorted(server.downloads()) == sorted(files)


def test_only_shards_that_are_not_cached_are_downloaded(cache: Path, server: FakeHub) -> None:
    fill_cache(cache, "org/shards", {k: v for k, v in SHARDED.items() if k != "s-2.safetensors"})
    assert resolve("org/shards", cache_dir=cache).entries.keys() == {"a", "b"}
    assert server.downloads() == ["s-2.safetensors"]


def test_a_cached_model_costs_one_request(cache: Path, server: FakeHub) -> None:
    first = resolve("org/shards", cache_dir=cache)
    server.requests.clear()
    second = resolve("org/shards", cache_dir=cache)
    assert second.files == first.files
    assert server.requests == ["GET api/models/org/shards"]
    server.requests.clear()
    resolve("org/shards", cache_dir=cache, revision=COMMIT)
    assert server.requests == []


def test_what_was_downloaded_is_found_offline(
    cache: Path, server: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = resolve("org/shards", cache_dir=cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("org/shards", cache_dir=cache) == online


def test_a_push_between_config_and_weights_does_not_mix_commits(
    cache: Path, server: FakeHub
) -> None:
    location = resolve_model("org/name", cache_dir=cache)
    server.repos["org/name"] = Repo({"config.json": b"{}"}, commit=OTHER_COMMIT)
    with pytest.raises(LeanLoadError, match=COMMIT):
        open_weights(location)


def test_a_new_commit_is_seen(cache: Path, server: FakeHub) -> None:
    resolve("org/name", cache_dir=cache)
    server.repos["org/name"] = Repo(SHARDED, commit=OTHER_COMMIT)
    checkpoint = resolve("org/name", cache_dir=cache)
    assert checkpoint.commit == OTHER_COMMIT
    assert len(checkpoint.files) == 2


def test_safetensors_are_downloaded_though_torch_files_are_cached(
    cache: Path, server: FakeHub
) -> None:
    fill_cache(cache, "org/name", {"config.json": CONFIG, "pytorch_model.bin": b"x"})
    assert resolve("org/name", cache_dir=cache).entries.keys() == {"a", "b"}
    assert server.downloads() == ["model.safetensors"]


def test_force_download(cache: Path, server: FakeHub) -> None:
    resolve("org/name", cache_dir=cache)
    server.requests.clear()
    resolve("org/name", cache_dir=cache, force_download=True)
    assert sorted(server.downloads()) == ["config.json", "model.safetensors"]


def test_the_files_of_a_repository_online(cache: Path, server: FakeHub) -> None:
    assert hub.list_files("org/name", HubOptions(cache_dir=cache)).files == list(SINGLE)


@pytest.mark.parametrize("how", ["token", "HF_TOKEN"])
def test_a_private_repository_opens_with_its_token(
    cache: Path, server: FakeHub, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    server.repos["org/private"] = Repo(SINGLE, token="hf_secret")
    message = refusal("org/private", cache_dir=cache)
    assert "The hub has no model 'org/private' that this token may see" in message
    assert "token=" in message
    if how == "HF_TOKEN":
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
    token = "hf_secret" if how == "token" else None
    assert resolve("org/private", cache_dir=cache, token=token).entries.keys() == {"a", "b"}


def test_a_name_that_the_hub_does_not_have(cache: Path, server: FakeHub) -> None:
    message = refusal("EleutherAI/pythia-70n", cache_dir=cache)
    assert "The hub has no model 'EleutherAI/pythia-70n'" in message
    assert "nearest: EleutherAI/pythia-70m" in message
    assert "Check the spelling" in message


def test_a_gated_repository(cache: Path, server: FakeHub) -> None:
    server.repos["org/gated"] = Repo(SINGLE, error="GatedRepo")
    message = refusal("org/gated", cache_dir=cache)
    assert "org/gated on the hub is gated" in message
    assert f"{server.url}/org/gated" in message
    assert "hf auth login" in message


def test_a_revision_that_does_not_exist(cache: Path, server: FakeHub) -> None:
    message = refusal("org/name", cache_dir=cache, revision="step7")
    assert "no revision 'step7'" in message
    assert "commits/main" in message
    with pytest.raises(UnknownModelError, match="no revision 'step7'"):
        hub.list_files("org/name", HubOptions("step7", cache))


def test_a_repository_without_config_or_weights(cache: Path, server: FakeHub) -> None:
    server.repos["org/empty"] = Repo({"README.md": b"x"})
    message = refusal("org/empty", CheckpointError, cache_dir=cache)
    assert "org/empty (revision main) has no file 'config.json' on the hub" in message
    server.repos["org/gguf"] = Repo({"config.json": CONFIG, "m.gguf": b"x"})
    message = refusal("org/gguf", CheckpointError, cache_dir=cache)
    assert "org/gguf@main holds no weights" in message
    assert "pass gguf_file= with one of m.gguf" in message
    assert "Only the cache" not in message


def test_an_index_that_names_shards_the_repository_lacks(cache: Path, server: FakeHub) -> None:
    files = {name: content for name, content in SHARDED.items() if name != "s-2.safetensors"}
    server.repos["org/partial"] = Repo(files)
    message = refusal("org/partial", CheckpointError, cache_dir=cache)
    assert "lacks 1 of the 2 weight files that its index names: s-2.safetensors" in message
    assert "has no file 's-2.safetensors' on the hub" in message


def test_a_hub_that_is_down(cache: Path, server: FakeHub) -> None:
    server.status = 503
    message = refusal("org/name", cache_dir=cache)
    assert "503" in message
    assert "config.json of org/name" in message
    fill_cache(cache, "org/name", SINGLE)
    assert resolve("org/name", cache_dir=cache).entries.keys() == {"a", "b"}


def test_a_cache_that_cannot_be_written(cache: Path, server: FakeHub) -> None:
    cache.write_text("a file where the folder should be")
    message = refusal("org/name", LeanLoadError, cache_dir=cache)  # type: ignore[arg-type]
    assert str(cache) in message
    assert "cache_dir=" in message


# ------------------------------------------------------------------- nobody answers


@pytest.mark.usefixtures("unreachable")
def test_an_unreachable_hub_leaves_the_cache(cache: Path) -> None:
    fill_cache(cache, "org/name", SHARDED)
    assert resolve("org/name", cache_dir=cache).entries.keys() == {"a", "b"}
    assert hub.list_files("org/name", HubOptions(cache_dir=cache)).files == sorted(SHARDED)


@pytest.mark.usefixtures("unreachable")
def test_an_unreachable_hub_without_a_cache_is_said_at_once(cache: Path) -> None:
    message = refusal("org/name", cache_dir=cache)
    assert re.search(r"The hub cannot be reached \(Connect\w*Error", message)
    assert "Check the connection" in message
    assert f"not in the cache {cache}" in message
    with pytest.raises(UnknownModelError, match="cannot be reached"):
        hub.list_files("org/name", HubOptions(cache_dir=cache))


@pytest.mark.usefixtures("unreachable")
def test_an_unreachable_hub_with_part_of_the_model_cached(cache: Path) -> None:
    files = {name: content for name, content in SHARDED.items() if name != "s-1.safetensors"}
    fill_cache(cache, "org/name", files)
    message = refusal("org/name", CheckpointError, cache_dir=cache)
    assert "names: s-1.safetensors." in message
    assert "cannot be reached" in message
