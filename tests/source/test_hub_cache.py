"""Hub names without a network: all must come from the cache, or say what is missing there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from tests.support.fake_hub import (
    COMMIT,
    CONFIG,
    OTHER_COMMIT,
    SHARDED,
    SHARDS,
    SINGLE,
    fill_cache,
    resolve,
)
from tl_fastload.errors import ArgumentError, CheckpointError, LeanLoadError, UnknownModelError
from tl_fastload.hooked.official_names import resolve_model
from tl_fastload.source import hub
from tl_fastload.source.checkpoint import open_weights
from tl_fastload.source.hub import HubOptions


def refusal(name: str, kind: type[LeanLoadError] = UnknownModelError, **arguments: Any) -> str:
    with pytest.raises(kind) as caught:
        resolve(name, **arguments)
    return str(caught.value)


@pytest.mark.parametrize("files", [SINGLE, SHARDED], ids=["single", "sharded"])
@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "local_files_only"])
def test_a_cached_model_needs_no_network(
    cache: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], how: str
) -> None:
    snapshot = fill_cache(cache, "org/name", files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "HF_HUB_OFFLINE")
    checkpoint = resolve("org/name", cache_dir=cache, local_files_only=how == "local_files_only")
    assert checkpoint.folder.samefile(snapshot)
    assert checkpoint.label == "org/name@main"
    assert checkpoint.commit == COMMIT
    assert any(COMMIT in note for note in checkpoint.notes)
    assert checkpoint.entries.keys() == {"a", "b"}


@pytest.mark.parametrize("name", ["gpt2", "gpt2-small", "GPT2-Small"])
def test_an_alias_is_found_under_its_official_name(cache: Path, name: str) -> None:
    fill_cache(cache, "gpt2", SINGLE)
    assert resolve(name, cache_dir=cache).label == "gpt2@main"


def test_revisions(cache: Path) -> None:
    fill_cache(cache, "org/name", SINGLE)
    fill_cache(cache, "org/name", SHARDED, commit=OTHER_COMMIT, refs=("step100",))
    step = resolve("org/name", cache_dir=cache, revision="step100")
    assert (step.label, step.commit, len(step.files)) == ("org/name@step100", OTHER_COMMIT, 2)
    by_commit = resolve("org/name", cache_dir=cache, revision=OTHER_COMMIT)
    assert by_commit.files == step.files
    message = refusal("org/name", cache_dir=cache, revision="step200")
    assert "revision step200" in message
    assert COMMIT in message
    assert OTHER_COMMIT in message


@pytest.mark.parametrize("revision", ["..", "../..", ".", "refs", "/etc"])
def test_a_revision_does_not_lead_out_of_the_snapshots(cache: Path, revision: str) -> None:
    fill_cache(cache, "org/name", SINGLE)
    assert hub.cached_snapshot("org/name", HubOptions(revision, cache)) is None


def test_a_subfolder(cache: Path) -> None:
    files = {f"inner/deep/{name}": content for name, content in SHARDED.items()}
    fill_cache(cache, "org/name", files)
    checkpoint = resolve("org/name", cache_dir=cache, subfolder="inner/deep")
    assert checkpoint.commit == COMMIT
    assert checkpoint.folder.name == "deep"
    assert checkpoint.entries.keys() == {"a", "b"}
    assert "inner" in refusal("org/name", CheckpointError, cache_dir=cache, subfolder="inner")


def test_toy_models_with_a_final_pth(cache: Path, tmp_path: Path) -> None:
    torch.save({"embed.W_E": torch.ones(2)}, tmp_path / "x")
    weights = (tmp_path / "x").read_bytes()
    torch.save({"embed.W_E": torch.zeros(2)}, tmp_path / "x")
    early = (tmp_path / "x").read_bytes()
    files = {
        "config.json": CONFIG,
        "model_final.pth": weights,
        "checkpoints/model_100.pth": early,
    }
    repo = "NeelNanda/SoLU_1L512W_C4_Code"
    fill_cache(cache, repo, files)
    final = resolve("solu-1l", cache_dir=cache)
    assert final.files[0].name == "model_final.pth"
    assert final.load_tensors().tensors["embed.W_E"].sum() == 2
    assert hub.list_files(repo, HubOptions(cache_dir=cache)).files == sorted(files)
    named = resolve("solu-1l", cache_dir=cache, weights_file="checkpoints/model_100.pth")
    assert named.load_tensors().tensors["embed.W_E"].sum() == 0


def test_an_unknown_name_says_what_was_tried(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal("gpt2-smal", cache_dir=cache)
    assert "Cannot find the model 'gpt2-smal'" in message
    assert f"no folder {tmp_path / 'gpt2-smal'}" in message
    assert "nearest: gpt2-small" in message
    assert f"not in the cache {cache}" in message
    assert "HF_HUB_OFFLINE is set" in message
    assert "Unset it" in message
    by_alias = refusal("gpt2-small", cache_dir=cache, local_files_only=True)
    assert "TransformerLens' name for gpt2" in by_alias
    assert "local_files_only=True" in by_alias
    assert "nearest" not in by_alias


@pytest.mark.parametrize("name", ["a/b/c", "a b", "-x", "org/" + "x" * 200, "x" * 5000, "a\0b"])
def test_a_name_that_no_hub_can_have(cache: Path, name: str) -> None:
    message = refusal(name, cache_dir=cache)
    assert "'organisation/name'" in message
    assert name in message or repr(name)[1:-1] in message


def test_models_that_the_hub_does_not_host(cache: Path) -> None:
    assert "'llama-7b-hf', but its weights are not on the hub" in refusal("llama-7b-hf")
    assert "hf_model=" in refusal("llama-7b-hf")


def test_weights_that_are_not_cached(cache: Path) -> None:
    fill_cache(cache, "org/name", {"config.json": CONFIG})
    message = refusal("org/name", CheckpointError, cache_dir=cache)
    assert "org/name@main holds no weights" in message
    assert "Only the cache was searched" in message


def test_all_shards_that_are_not_cached_are_named(cache: Path) -> None:
    files = {name: content for name, content in SHARDED.items() if name not in SHARDS}
    snapshot = fill_cache(cache, "org/name", files)
    (snapshot.parent.parent / "blobs" / "abc.incomplete").write_bytes(b"x")
    message = refusal("org/name", CheckpointError, cache_dir=cache)
    assert "lacks 2 of the 2 weight files" in message
    assert "s-1.safetensors, s-2.safetensors" in message
    assert "a download that was cut off lies in" in message


def test_a_link_whose_blob_is_gone_is_not_cached(cache: Path) -> None:
    snapshot = fill_cache(cache, "org/name", SHARDED)
    (snapshot / "s-2.safetensors").resolve().unlink()
    message = refusal("org/name", CheckpointError, cache_dir=cache)
    assert "lacks 1 of the 2 weight files that its index names: s-2.safetensors" in message


def test_a_token_is_not_shown(cache: Path) -> None:
    fill_cache(cache, "org/name", SINGLE)
    options = HubOptions(cache_dir=cache, token="hf_secret")
    location = resolve_model("org/name", cache_dir=cache, token="hf_secret")
    assert "hf_secret" not in repr(options) + repr(location) + repr(open_weights(location))


def test_contradicting_options(cache: Path) -> None:
    fill_cache(cache, "org/name", SINGLE)
    for arguments in ({}, {"local_files_only": True}):
        message = refusal(
            "org/name", ArgumentError, cache_dir=cache, force_download=True, **arguments
        )
        assert "force_download=True" in message
