"""The tokenizer: the hub's name on it, nothing of the caller's lost, no code by a JSON's will."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens.utilities.tokenize_utils import get_tokenizer_with_bos
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.support import zoo as bed
from tests.support.comparison import lean_model
from tests.support.fake_hub import COMMIT, FakeHub, Repo, point_at
from tests.support.reference import stock_model
from tests.support.store_helpers import rewritten
from tl_fastload.cache import entries
from tl_fastload.copies.manifest import read_manifest
from tl_fastload.hooked.tokenizer import with_bos

TEXTS = ["w5 w7", "w9 w8 w3", ""]


@pytest.fixture(scope="module")
def folder(zoo: Any) -> Path:
    return Path(zoo("gpt2", tokenizer=True))


def test_the_hubs_name_wherever_the_files_lie(folder: Path, tmp_path: Path) -> None:
    home, cache = tmp_path / "gemma-and-phi", tmp_path / "gemma-cache"
    bed.hub_cache(home, "somebody/model", folder)
    loads: list[dict[str, Any]] = [{}, {"cache": cache}, {"cache": cache}]
    words = lean_model(folder).to_str_tokens("w5 w7")
    for options in loads:
        model = lean_model("somebody/model", cache_dir=home, **options)
        assert model.tokenizer.name_or_path == model.cfg.tokenizer_name == "somebody/model"
        assert model.tokenizer.init_kwargs["name_or_path"] == "somebody/model"
        assert model.to_str_tokens("w5 w7") == words == ["w0", "w5", "w7"]
    assert model.load_report.cache.startswith("hit")
    model.save_lean(tmp_path / "gemma-copy")
    copy = lean_model(tmp_path / "gemma-copy")
    assert copy.tokenizer.name_or_path == copy.cfg.tokenizer_name == "somebody/model"
    assert copy.to_str_tokens("w5 w7") == words
    assert lean_model(folder).tokenizer.name_or_path == str(folder)  # as stock has it


def test_it_is_fetched_of_the_models_own_commit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    bare = {name: files[name] for name in ("config.json", "model.safetensors")}
    repos = {"org/model": Repo({**files, "README.md": b""}), "org/bare": Repo(bare)}
    with FakeHub(repos) as server:
        point_at(monkeypatch, server.url)
        model = lean_model("org/model", cache_dir=tmp_path)
        assert model.tokenizer.name_or_path == "org/model"
        assert model.to_tokens("w5").tolist() == [[0, 5]]
        assert {"tokenizer.json", "tokenizer_config.json"} <= {*server.downloads()} <= {*files}
        home = tmp_path / "models--org--model" / "snapshots" / COMMIT
        assert (home / "tokenizer.json").is_file()
        # transformers would make an empty one of nothing.
        with pytest.warns(UserWarning, match="no files of a tokenizer"):
            assert lean_model("org/bare", cache_dir=tmp_path).tokenizer is None


def test_the_callers_tokenizer_is_kept(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "there")
    given = AutoTokenizer.from_pretrained(tmp_path / "there")
    plain = stock_model("gpt2", folder, tokenizer=AutoTokenizer.from_pretrained(folder))
    given.add_tokens(["NEW"])
    given.chat_template, given.padding_side = "{{ messages }}", "left"
    ids, side = given("w5 NEW")["input_ids"], len(given)
    shutil.rmtree(tmp_path / "there")
    with pytest.warns(UserWarning, match=r"(?s)ids up to 101.*rows for 101 only.*'NEW'"):
        model = lean_model(folder, tokenizer=given)
    assert model.to_tokens("w5 NEW").tolist() == [[0, *ids]]
    assert model.to_tokens("w5 NEW", prepend_bos=False).tolist() == [ids]
    kept = model.tokenizer
    assert (kept.chat_template, kept.padding_side, len(kept)) == ("{{ messages }}", "left", side)
    assert kept.name_or_path == str(tmp_path / "there")
    assert given("w5 NEW")["input_ids"] == ids  # the caller's own is as it was
    for prepend in (True, False):
        for text in TEXTS:
            wanted = plain.to_tokens(text, prepend_bos=prepend)
            assert torch.equal(model.to_tokens(text, prepend_bos=prepend), wanted), text
    assert model.cfg.tokenizer_prepends_bos == plain.cfg.tokenizer_prepends_bos


def test_a_tokenizer_without_files(folder: Path) -> None:
    read = AutoTokenizer.from_pretrained(folder)
    given = PreTrainedTokenizerFast(
        tokenizer_object=read.backend_tokenizer, bos_token="w0", eos_token="w1", pad_token="w1"
    )
    model = lean_model(folder, tokenizer=given)
    assert model.to_tokens("w5 w7").tolist() == [[0, 5, 7]]
    assert model.tokenizer.name_or_path == ""


def test_by_a_switch_and_by_files_it_is_the_same(folder: Path) -> None:
    """Tokenizers of earlier transformers, and slow ones, have no switch."""

    class Plain(PreTrainedTokenizerFast):
        add_bos_token = False

    cfg = lean_model(folder).cfg
    for kind in (PreTrainedTokenizerFast, Plain):
        given = kind.from_pretrained(folder)
        given.add_tokens(["NEW"])
        made = with_bos(given, cfg)
        assert made is not given
        assert with_bos(made, cfg) is made
        assert get_tokenizer_with_bos(made) is made
        assert made("w5 NEW")["input_ids"][-2:] == [5, len(given) - 1]


def evil(folder: Path, target: Path) -> tuple[Path, Path]:
    """A tokenizer whose JSON trusts its own code; and the file that the code would write."""
    canary = target.parent / "canary"
    shutil.copytree(folder, target)
    path = target / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    fields |= {"trust_remote_code": True, "add_bos_token": False}
    fields["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    path.write_text(json.dumps(fields))
    (target / "evil.py").write_text(
        f"open({str(canary)!r}, 'w')\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Evil(PreTrainedTokenizerFast): pass\n"
    )
    return target, canary


def test_a_tokenizers_json_runs_no_code(folder: Path, tmp_path: Path) -> None:
    place, canary = evil(folder, tmp_path / "evil")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether it can be read without its code or not
        model = lean_model(place)
    assert not canary.exists()
    if model.tokenizer is not None:
        assert not model.tokenizer.init_kwargs.get("trust_remote_code")
        assert model.to_tokens("w5").tolist() == [[0, 5]]


def test_a_copys_json_switches_nothing_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    lean_model(folder).save_lean(copy)
    manifest = read_manifest(copy)
    trusting = {**manifest.configuration, "trust_remote_code": True, "tokenizer_name": "evil/one"}
    rewritten(copy, configuration=trusting)
    assert lean_model(copy).cfg.trust_remote_code is False
    asked: list[Any] = []
    real = AutoTokenizer.from_pretrained

    def watched(name: Any, **keywords: Any) -> Any:
        asked.append((Path(name).is_absolute() and Path(name).is_dir(), keywords))
        return real(name, **keywords)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", watched)
    monkeypatch.chdir(tmp_path)
    assert lean_model("copy").tokenizer is not None
    # A folder that is not there would be a name on the hub.
    rewritten(copy, tokenizer={**manifest.tokenizer, "folder": "nothing", "files": {}})
    with pytest.warns(UserWarning, match="No tokenizer could be loaded"):
        assert lean_model("copy").tokenizer is None
    rewritten(copy, tokenizer=None)
    assert lean_model("copy").tokenizer is None
    assert [one for one, keywords in asked] == [True]
    assert asked[0][1]["trust_remote_code"] is False
    assert asked[0][1]["local_files_only"] is True


def test_links_of_tokenizers_out_of_their_folder(folder: Path, tmp_path: Path) -> None:
    place = shutil.copytree(folder, tmp_path / "model")
    outside = (place / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (place / "tokenizer.json").symlink_to(outside)
    with pytest.warns(UserWarning, match="leads out of its folder"):
        assert lean_model(place).tokenizer is None


def test_entries_of_the_cache_keep_the_name(folder: Path, tmp_path: Path) -> None:
    lean_model(folder, cache=tmp_path)
    (entry,) = entries(tmp_path)
    assert lean_model(entry.folder).tokenizer.name_or_path == str(folder)
