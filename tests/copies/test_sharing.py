"""Processed copies on the hub: pushed with a card, planned by headers, verified once, mapped."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.commands import run
from tests.support.comparison import lean_model
from tests.support.fake_hub import Repo
from tests.support.pushable_hub import PushableHub, pushable_hub
from tl_fastload import plan, push_copy, push_lean_to_hub
from tl_fastload.embedded_model import embedded_model_path
from tl_fastload.errors import ArgumentError, CheckpointError, SaveError, UnknownModelError

TOKENS = torch.arange(5, 13)[None]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[PushableHub]:
    with pushable_hub(monkeypatch, tmp_path) as found:
        yield found


@pytest.mark.parametrize("quantize", [None, "8bit"])
def test_a_pushed_model_is_the_model(quantize: Any, hub: PushableHub) -> None:
    model = lean_model(embedded_model_path(), quantize=quantize)
    commit = model.push_lean_to_hub("me/processed", private=True)
    assert hub.made == {"me/processed": True} or hub.made == {"me/processed": "private"}
    assert commit.oid == hub.repos["me/processed"].commit
    again = lean_model("me/processed")
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert again.to_tokens("the cat").tolist() == model.to_tokens("the cat").tolist()
    assert again.load_report.mapped_bytes == again.load_report.parameter_bytes
    assert f"me/processed at commit {commit.oid}" in again.load_report.notes


def test_the_card_says_what_was_done_and_how_to_load(hub: PushableHub) -> None:
    model = lean_model(embedded_model_path(), fold_ln=False, dtype="bfloat16")
    push_lean_to_hub(model, "me/card")
    text = hub.repos["me/card"].files["README.md"].decode()
    assert "library_name: tl_fastload" in text
    for said in ("center_writing_weights", "bfloat16", "| quantization | none |", "transformers "):
        assert said in text
    assert str(embedded_model_path().parent) not in text  # where it lay here
    shown = re.search(r"from_pretrained_lean\('me/card', fold_ln=False\)", text)
    assert shown is not None
    assert lean_model("me/card", fold_ln=False).cfg.dtype == torch.bfloat16
    with pytest.raises(ArgumentError, match="fold_ln"):
        lean_model("me/card")


def test_a_card_that_is_there_keeps_its_words(hub: PushableHub) -> None:
    card = b"---\nlicense: mit\n---\nMy words.\n"
    hub.repos["me/mine"] = Repo({"README.md": card})
    for dtype in ("float32", "bfloat16"):
        push_lean_to_hub(lean_model(embedded_model_path(), dtype=dtype), "me/mine")
        text = hub.repos["me/mine"].files["README.md"].decode()
        assert "license: mit" in text
        assert text.count("My words.") == text.count("# A processed copy") == 1
        assert f"| dtype | {dtype} |" in text


def test_another_push_replaces_the_copy(hub: PushableHub) -> None:
    model = lean_model(embedded_model_path())
    first = push_lean_to_hub(model, "me/again")
    before = set(hub.repos["me/again"].files)
    with torch.no_grad():
        model.unembed.b_U += 1
    push_lean_to_hub(model, "me/again", commit_message="Raise b_U")
    assert hub.commits[1] == "Raise b_U"
    left = before & set(hub.repos["me/again"].files)
    assert left == {"README.md", "tl_fastload.json"}
    assert torch.equal(lean_model("me/again")(TOKENS), model(TOKENS))
    assert first.oid != hub.repos["me/again"].commit


def test_a_plan_fetches_headers_alone(hub: PushableHub, tmp_path: Path) -> None:
    model = lean_model(embedded_model_path())
    folder = model.save_lean(tmp_path / "copy")
    push_copy(folder, "me/planned")
    hub.sent_bytes.clear()
    found = plan("me/planned", device="cpu")
    local = plan(folder, device="cpu")
    assert found.parameter_bytes == local.parameter_bytes
    assert found.peak_anonymous_bytes == local.peak_anonymous_bytes
    weights = [name for name in hub.repos["me/planned"].files if name.endswith(".safetensors")]
    assert found.disk_bytes == sum(len(hub.repos["me/planned"].files[name]) for name in weights)
    assert all(hub.sent_bytes.get(name, 0) <= 100_001 for name in weights)
    lean_model("me/planned")
    again = plan("me/planned", device="cpu")
    assert again.disk_bytes == 0


def test_bytes_of_others_are_verified_before_they_are_mapped_for_the_first_time(
    hub: PushableHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_lean_to_hub(lean_model(embedded_model_path()), "me/checked")
    looks: list[Path] = []
    from tl_fastload.copies import from_hub

    verify = from_hub.verify_copy
    monkeypatch.setattr(
        from_hub, "verify_copy", lambda folder: (looks.append(folder), verify(folder))
    )
    for _ in range(2):
        lean_model("me/checked")
    assert len(looks) == 1
    assert any((tmp_path / "HF_ASSETS_CACHE").rglob("*.json"))

    name = next(n for n in hub.repos["me/checked"].files if n.endswith(".safetensors"))
    blob = next((tmp_path / "HF_HUB_CACHE").rglob(name)).resolve()
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.write_bytes(content)  # altered in the cache: another time of change
    with pytest.raises(CheckpointError, match="not those that were saved"):
        lean_model("me/checked")
    assert len(looks) == 2

    files = dict(hub.repos["me/checked"].files)
    hub.repos["me/broken"] = Repo({**files, name: bytes(content)})
    for _ in range(2):
        with pytest.raises(CheckpointError, match="not those that were saved"):
            lean_model("me/broken")


def test_names_that_lead_out_of_the_repository(hub: PushableHub, tmp_path: Path) -> None:
    push_lean_to_hub(lean_model(embedded_model_path()), "me/bad")
    files = dict(hub.repos["me/bad"].files)
    from tl_fastload.copies.manifest import read_manifest

    (tmp_path / "tl_fastload.json").write_bytes(files["tl_fastload.json"])
    manifest = read_manifest(tmp_path)
    name, facts = next(iter(manifest.files.items()))
    manifest.files["../" + name] = facts
    manifest.checksums["x"] = "0"
    hub.repos["me/bad"].files = {**files, "tl_fastload.json": manifest.dumps().encode()}
    for call in (lean_model, plan):
        with pytest.raises(CheckpointError, match=r"'\.\./weights-.* leads out of the folder"):
            call("me/bad")


def test_revisions_private_ones_and_what_contradicts(
    hub: PushableHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lean_model(embedded_model_path())
    push_lean_to_hub(model, "me/private", revision="half")
    assert "half" in hub.repos["me/private"].revisions
    hub.repos["me/private"].token = "secret"
    assert torch.equal(lean_model("me/private", revision="half")(TOKENS), model(TOKENS))
    sent = dict(hub.sent_bytes)
    hub.repos["me/other"] = Repo(hub.repos["me/private"].files, commit="1" * 40)
    with pytest.raises(ArgumentError, match="dtype"):
        lean_model("me/other", dtype="bfloat16")
    fetched = {name for name, size in hub.sent_bytes.items() if size != sent.get(name)}
    assert fetched == {"tl_fastload.json"}  # no gigabytes for a call that cannot be
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(UnknownModelError, match="token"):
        lean_model("me/private", cache_dir=tmp_path / "fresh")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline = lean_model("me/private", revision="half", local_files_only=True)
    assert torch.equal(offline(TOKENS), model(TOKENS))


def test_refusals_push_nothing(
    hub: PushableHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lean_model(embedded_model_path())
    hub.repos["me/full"] = Repo({"config.json": b"{}"})
    with pytest.raises(SaveError, match=r"me/full holds another model \(config.json\)"):
        push_lean_to_hub(model, "me/full")
    with pytest.raises(ArgumentError, match="repo_id='a/b/c'"):
        push_lean_to_hub(model, "a/b/c")
    with pytest.raises(ArgumentError, match="holds no processed copy"):
        push_copy(tmp_path, "me/none")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(SaveError, match="Nothing was pushed to me/denied"):
        push_lean_to_hub(model, "me/denied")
    assert hub.commits == []
    assert set(hub.repos) == {"me/full"}


def test_the_command_pushes(hub: PushableHub, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    done = run("save", embedded_model_path(), folder, "--push", "me/cli", "--private")
    assert "Pushed:" in done.stdout
    assert hub.made["me/cli"] in (True, "private")
    assert json.loads(hub.repos["me/cli"].files["tl_fastload.json"])["model_class"]
