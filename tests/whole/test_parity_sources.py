"""The same model, wherever it comes from: folders, file formats, the hub's cache, revisions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import zoo as bed
from tests.support.comparison import NAMES, differences, lean_model, stock_model
from tests.support.zoo import CASES
from tl_fastload.errors import ArgumentError, UnknownModelError

pytestmark = pytest.mark.parity

# Each of these words, in a name, sends stock to another model's sizes or to an error.
TELLING_NAMES = ("llama-7b", "my-gemma-2-9b", "phi", "bert-large", "t5-small", "pythia-v0")

OFFICIAL = {
    "gpt2-small": "gpt2-hub",
    "EleutherAI/pythia-70m": "neox-hub",
    "gpt-neo-125M": "gpt-neo",
    "facebook/opt-125m": "opt",
    "gpt-j-6B": "gptj",
    "Llama-2-7b": "llama",
    "meta-llama/Meta-Llama-3-8B": "llama3-rope",
    "mistral-7b": "mistral",
    "mistralai/Mixtral-8x7B-v0.1": "mixtral",
    "bloom-560m": "bloom-hub",
    "qwen-1.8b": "qwen",
    "Qwen/Qwen2-0.5B": "qwen2",
    "Qwen/Qwen3-0.6B": "qwen3",
    "phi-2": "phi",
    "microsoft/Phi-3-mini-4k-instruct": "phi3",
    "gemma-2b": "gemma",
    "google/gemma-2-2b": "gemma2",
    "google/gemma-3-4b-it": "gemma3-vision",
    "allenai/OLMo-1B-hf": "olmo",
    "allenai/OLMo-2-0425-1B": "olmo2",
    "allenai/OLMoE-1B-7B-0924": "olmoe",
    "openai/gpt-oss-20b": "gpt-oss",
    "santacoder": "santacoder",
    "attn-only-2l": "attn-only",
    "solu-2l-pile": "solu-old",
    "othello-gpt": "othello",
}
"""Names and aliases that TransformerLens knows -> the tiny model that lies there in the tests."""


def official_name(name: str) -> str:
    from transformer_lens.loading_from_pretrained import get_official_model_name

    return str(get_official_model_name(name))


def assert_equal_to_folder(lean: Any, folder: Path, **arguments: Any) -> None:
    """Parity of a folder with stock is what test_parity proves; the rest follows from this."""
    apart = differences(lean_model(folder, **arguments), lean, cfg_apart=NAMES)
    assert apart == []


@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa"])
def test_folder_as_text_path_and_relative(
    case_id: str, zoo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = zoo(case_id)
    stock = stock_model(case_id, folder)
    monkeypatch.chdir(folder.parent)
    for source in (str(folder), folder, folder.name, f"./{folder.name}/", Path(folder.name)):
        lean = lean_model(source)
        apart = differences(stock, lean)
        assert apart == [], source
        assert folder.name in lean.load_report.source


@pytest.mark.parametrize("name", TELLING_NAMES)
@pytest.mark.parametrize("case_id", ["gpt2", "qwen2", "gemma2"])
def test_a_folders_name_means_nothing(
    case_id: str, name: str, zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = zoo(case_id)
    (tmp_path / name).symlink_to(folder, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    lean = lean_model(name)
    assert lean.cfg.model_name == name
    assert_equal_to_folder(lean, folder)


@pytest.mark.parametrize("files", [{"shards": True}, {"bin": True}, {"bin": True, "shards": True}])
@pytest.mark.parametrize(
    "case_id", ["gpt2", "gpt2-hub", "llama-gqa1-tied", "mixtral", "gemma3-vision", "santacoder"]
)
def test_file_formats(case_id: str, files: dict[str, bool], zoo: Any) -> None:
    folder = zoo(case_id, **files)
    suffix = ".bin" if files.get("bin") else ".safetensors"
    assert len(list(folder.glob(f"*{suffix}"))) == (3 if files.get("shards") else 1)
    for flags in ({}, {"fold_ln": False, "center_unembed": False, "dtype": torch.bfloat16}):
        assert_equal_to_folder(lean_model(folder, **flags), zoo(case_id), **flags)


@pytest.mark.parametrize("saved_in", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loaded_in", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa1-tied", "mixtral", "attn-only"])
def test_files_of_another_dtype(
    case_id: str, saved_in: torch.dtype, loaded_in: torch.dtype, zoo: Any
) -> None:
    folder = zoo(case_id, dtype=saved_in)
    for flags in ({}, {"fold_ln": False}):
        stock = stock_model(case_id, folder, dtype=loaded_in, **flags)
        apart = differences(stock, lean_model(folder, dtype=loaded_in, **flags))
        assert apart == []


@pytest.mark.parametrize(("name", "case_id"), OFFICIAL.items())
def test_names_that_transformer_lens_knows(
    name: str, case_id: str, zoo: Any, tmp_path: Path
) -> None:
    folder, official = zoo(case_id), official_name(name)
    bed.hub_cache(tmp_path, official, folder)
    lean = lean_model(name, cache_dir=tmp_path)
    # Stock runs Qwen's and SantaCoder's own code without asking; that field says so.
    apart = differences(lean_model(folder), lean, cfg_apart=(*NAMES, "trust_remote_code"))
    assert apart == []
    assert lean.cfg.model_name == official.rpartition("/")[2]
    assert lean.load_report.source == f"{official}@main"


@pytest.mark.parametrize("case_id", ["llama-gqa", "gpt2-hub", "qwen3"])
def test_a_name_that_transformer_lens_never_heard_of(
    case_id: str, zoo: Any, tmp_path: Path
) -> None:
    folder = zoo(case_id, tokenizer=True)
    repo = f"somebody/gemma-and-phi-{case_id}"
    bed.hub_cache(tmp_path, repo, folder)
    lean = lean_model(repo, cache_dir=tmp_path)
    assert_equal_to_folder(lean, folder)
    assert lean.cfg.tokenizer_name == repo
    assert lean.load_report.source == f"{repo}@main"


def test_revision(zoo: Any, tmp_path: Path) -> None:
    main, other = zoo("neox"), zoo("neox", layer_norm_eps=1e-3, dtype=torch.bfloat16)
    bed.hub_cache(tmp_path, "somebody/neox", main, {"main": None, "v2": other})
    assert_equal_to_folder(lean_model("somebody/neox", cache_dir=tmp_path), main)
    lean = lean_model("somebody/neox", cache_dir=tmp_path, revision="v2")
    assert_equal_to_folder(lean, other)
    assert lean.cfg.eps == 1e-3
    assert lean.load_report.source == "somebody/neox@v2"
    assert lean.load_report.revision == bed.hub_commit("somebody/neox@v2")
    assert lean_model(main).load_report.revision is None
    with pytest.raises(UnknownModelError, match="v3"):
        lean_model("somebody/neox", cache_dir=tmp_path, revision="v3")


STANFORD = ("stanford-crfm/alias-gpt2-small-x21", "gpt2-stanford", "checkpoint-{}", (10, 100))
PYTHIA = ("EleutherAI/pythia-70m", "neox", "step{}", (1, 1000))


@pytest.mark.parametrize("family", [STANFORD, PYTHIA], ids=["stanford", "pythia"])
def test_training_checkpoints_are_revisions(
    family: tuple[str, str, str, tuple[int, int]], zoo: Any, tmp_path: Path
) -> None:
    from transformer_lens.loading_from_pretrained import get_checkpoint_labels

    repo, case_id, revision, values = family
    folders = {value: _other_weights(zoo(case_id), tmp_path / str(value)) for value in values}
    revisions: dict[str, Path | None] = {
        revision.format(value): folder for value, folder in folders.items()
    }
    bed.hub_cache(tmp_path, repo, zoo(case_id), {"main": None, **revisions})
    labels, kind = get_checkpoint_labels(repo)
    for value, folder in folders.items():
        index = labels.index(value)
        for chosen in (
            {"checkpoint_index": index},
            {"checkpoint_value": value},
            {"checkpoint_label": value},
        ):
            lean = lean_model(repo, cache_dir=tmp_path, **chosen)
            assert lean.cfg.checkpoint_index == index
            assert lean.cfg.checkpoint_value == value
            assert lean.cfg.checkpoint_label_type == kind
            assert lean.cfg.from_checkpoint
            wanted = lean_model(folder)
            assert torch.equal(lean.unembed.W_U, wanted.unembed.W_U)
            assert torch.equal(lean.blocks[1].attn.W_Q, wanted.blocks[1].attn.W_Q)
            source = f"{repo}@{revision.format(value)}"
            assert lean.load_report.source == source
            assert lean.load_report.revision == bed.hub_commit(source)


def _other_weights(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    factor = float(target.name) / 1000 + 0.5
    tensors = {name: value * factor for name, value in bed.read_weights(source).items()}
    for path in target.glob("*.safetensors"):
        path.unlink()
    bed.write_weights(target, tensors)
    return target


@pytest.mark.parametrize("case_id", ["attn-only", "solu-old"])
def test_training_checkpoints_of_toy_models(case_id: str, zoo: Any, tmp_path: Path) -> None:
    folder, repo = zoo(case_id), CASES[case_id].repo
    bed.hub_cache(tmp_path, repo, folder)
    for chosen in ({"checkpoint_index": 1}, {"checkpoint_value": 4194304}):
        stock = stock_model(case_id, folder, **chosen)
        for source in (repo, str(folder)):
            lean = lean_model(source, cache_dir=tmp_path, **chosen)
            apart = differences(stock, lean)
            assert apart == []
        final = lean_model(folder)
        assert not torch.equal(lean.unembed.W_U, final.unembed.W_U)


@pytest.mark.parametrize(
    "chosen",
    [
        {"checkpoint_value": 10, "checkpoint_label": 10},
        {"checkpoint_index": 1, "revision": "main"},
        {"checkpoint_value": 11},
        {"checkpoint_index": 10**6},
    ],
    ids=str,
)
def test_checkpoints_that_make_no_sense(chosen: dict[str, Any], zoo: Any, tmp_path: Path) -> None:
    repo, case_id, *_ = STANFORD
    bed.hub_cache(tmp_path, repo, zoo(case_id))
    with pytest.raises(ArgumentError, match="checkpoint"):
        lean_model(repo, cache_dir=tmp_path, **chosen)


def test_checkpoints_of_a_model_that_has_none(zoo: Any) -> None:
    with pytest.raises(ArgumentError, match="checkpoint"):
        lean_model(zoo("llama-gqa"), checkpoint_index=1)


_OFFLINE = """
import json, sys, torch
import socket
def no_network(*args, **kwargs):
    raise AssertionError("the network was used")
socket.socket.connect = no_network
socket.create_connection = no_network
from tl_fastload import LeanHookedTransformer
found = {}
for name in sys.argv[1:]:
    model = LeanHookedTransformer.from_pretrained_lean(name, device="cpu", progress=False)
    found[name] = [model.unembed.W_U.double().norm().item(), model.cfg.n_layers]
    assert model.tokenizer is not None and model.to_tokens("w5").tolist() == [[0, 5]]
print(json.dumps(found))
"""


def test_offline(zoo: Any, tmp_path: Path) -> None:
    cases = {"gpt2": "gpt2-hub", "somebody/never-heard-of": "llama-gqa"}
    for repo, case_id in cases.items():
        bed.hub_cache(tmp_path, repo, zoo(case_id, tokenizer=True))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _OFFLINE, *cases],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for repo, case_id in cases.items():
        wanted = lean_model(zoo(case_id))
        norm = wanted.unembed.W_U.double().norm().item()
        assert found[repo] == [pytest.approx(norm, rel=1e-6), wanted.cfg.n_layers]


@pytest.mark.parametrize(
    "spoil",
    [lambda path: path.unlink(), lambda path: path.write_text("{")],
    ids=["no-config", "broken-config"],
)
def test_a_folder_without_a_readable_config(
    spoil: Callable[[Path], Any], zoo: Any, tmp_path: Path
) -> None:
    from tl_fastload.errors import LeanLoadError

    folder = Path(shutil.copytree(zoo("gpt2"), tmp_path / "copy"))
    spoil(folder / "config.json")
    with pytest.raises(LeanLoadError, match="config"):
        lean_model(folder)
