"""The cache of processed copies: when it is hit, when it is not, and what keeps it in order."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.support import adapters
from tests.support import zoo as zoo_module
from tests.support.comparison import differences, lean_model
from tests.support.fake_hub import COMMIT, OTHER_COMMIT, fill_cache, forbid_network
from tl_fastload import LeanHookedTransformer, cache
from tl_fastload.copies import key
from tl_fastload.copies.manifest import MANIFEST
from tl_fastload.embedded_model import embedded_model_path
from tl_fastload.errors import ArgumentError
from tl_fastload.hooked.road import ROAD
from tl_fastload.loading.resolve import resolved
from tl_fastload.quantized.formats import read_quantization
from tl_fastload.request.adapters import read_adapter_argument
from tl_fastload.request.contradictions import CHECKPOINT_ARGUMENTS
from tl_fastload.request.keywords import Keywords
from tl_fastload.request.options import DEFAULT_DTYPE, Options
from tl_fastload.roads.road import Request


def embedded(home: Any, **arguments: Any) -> LeanHookedTransformer:
    return lean_model(embedded_model_path(), cache=home, **arguments)


def said(model: LeanHookedTransformer) -> str:
    return str(model.load_report.cache).split(":")[0]


@pytest.fixture
def source(zoo: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(zoo("gpt2", tokenizer=True), tmp_path / "source"))


@pytest.mark.parametrize(
    "arguments",
    [{}, {"dtype": "bfloat16", "fold_ln": False}, {"quantize": "8bit"}, {"first_n_layers": 1}],
    ids=str,
)
def test_the_second_load_is_mapped(arguments: dict[str, Any], tmp_path: Path) -> None:
    first, second = (embedded(tmp_path, **arguments) for _ in range(2))
    assert (said(first), said(second)) == ("filled", "hit")
    assert first.load_report.mapped_bytes == 0
    assert second.load_report.mapped_bytes == second.load_report.parameter_bytes
    assert differences(first, second) == []
    assert torch.equal(first(torch.arange(5)[None]), second(torch.arange(5)[None]))
    assert torch.equal(first.to_tokens("a cat"), second.to_tokens("a cat"))
    assert str(tmp_path) in str(second.load_report)


def test_everything_that_changes_the_numbers_is_another_entry(source: Path, tmp_path: Path) -> None:
    home = tmp_path / "cache"
    ways: list[dict[str, Any]] = [
        {},
        {"dtype": "bfloat16"},
        {"fold_ln": False},
        {"center_unembed": False},
        {"quantize": "8bit"},
        {"first_n_layers": 1},
        {"n_ctx": 9},
        {"layer_norm_epsilon": 0.25},
        {"default_prepend_bos": False},
        {"default_padding_side": "left"},
    ]
    for arguments in ways:
        assert said(lean_model(source, cache=home, **arguments)) == "filled"
    for arguments in ways:
        made = lean_model(source, cache=home, **arguments)
        assert said(made) == "hit"
        assert differences(lean_model(source, **arguments), made) == []
    # How a load goes makes no other entry.
    for arguments in ({"mmap": False}, {"torch_dtype": torch.float32}, {"strategy": "assign"}):
        assert said(lean_model(source, cache=home, **arguments)) == "hit"
    assert len(cache.entries(home)) == len(ways)


@pytest.mark.parametrize("change", ["weights", "times", "config", "moved", "tokenizer"])
def test_a_changed_source_is_not_found(change: str, source: Path, tmp_path: Path) -> None:
    home = tmp_path / "cache"
    lean_model(source, cache=home)
    weights = source / "model.safetensors"
    if change == "weights":  # the same size, and the same time of writing
        status = weights.stat()
        tensors = zoo_module.read_weights(source)
        name = next(iter(tensors))
        tensors = {k: v.clone() for k, v in tensors.items()}
        tensors[name] += 1
        weights.unlink()
        zoo_module.write_weights(source, tensors)
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "times":
        os.utime(weights, (1, 1))
    elif change == "moved":
        source = source.rename(tmp_path / "moved")
    else:
        path = source / {"config": "config.json", "tokenizer": "tokenizer.json"}[change]
        path.write_text(path.read_text() + "\n")
    again = lean_model(source, cache=home)
    assert said(again) == "filled"
    assert differences(lean_model(source), again) == []


def entry_name(source: Path, adapter: Any = None, keywords: Any = None, **options: Any) -> str:
    arguments = dict.fromkeys((*key._IN_THE_COPY, "device", "tokenizer"))
    arguments |= {"model_name": source, "dtype": DEFAULT_DTYPE, "move_to_device": True}
    asked = Options(adapter=read_adapter_argument(adapter), **options)
    arguments["n_devices"] = 1
    arguments |= {"hf_model": None, **dict.fromkeys(CHECKPOINT_ARGUMENTS)}
    hub = Keywords(hub=keywords or {})
    request = Request(LeanHookedTransformer, ROAD, asked, arguments, hub)
    return key.entry_name(resolved(request))


def test_a_toy_models_weights_deeper_down(zoo: Any, tmp_path: Path) -> None:
    source = Path(shutil.copytree(zoo("gelu"), tmp_path / zoo("gelu").name))
    weights = next(source.glob("*final.pth"))
    (source / "deeper").mkdir()
    weights = weights.rename(source / "deeper" / weights.name)
    before = entry_name(source)
    weights.write_bytes(weights.read_bytes() + b"0")
    assert entry_name(source) != before


def test_versions_and_options_are_in_the_name(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {
        entry_name(source),
        entry_name(source, quantize=read_quantization("nf4")),
        entry_name(source, quantize=read_quantization("fp4")),
        entry_name(source, requantize=True),
        entry_name(source, dequantize=True),
    }
    assert entry_name(source, check_memory=False) in names
    for module in ("tl_fastload", "transformer_lens", "torch", "transformers"):
        other = {**key.versions(), module: "0"}
        monkeypatch.setattr(key, "versions", lambda other=other: other)
        names.add(entry_name(source))
    monkeypatch.setattr(key, "FORMAT_VERSION", 99)
    names.add(entry_name(source))
    assert len(names) == 10


def test_adapters_are_known_by_their_files_and_weights(source: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    ways: list[Any] = [None, adapter, (adapter, 0.5), [adapter, other], [other, adapter]]
    names = [entry_name(source, way) for way in ways]
    assert [entry_name(source, way) for way in ways] == names
    (adapter / "adapter_config.json").write_text("{ }")
    names.append(entry_name(source, adapter))
    assert len(set(names)) == len(names)


def test_an_adapter_on_the_hub_is_known_by_its_commit(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_network(monkeypatch)
    files = {"adapter_config.json": b"{}", "last/adapter_config.json": b"{}"}
    fill_cache(tmp_path, "org/adapter", files, refs=("main", "v1"))
    fill_cache(tmp_path, "org/adapter", files, commit=OTHER_COMMIT, refs=("v2",))

    def name(adapter: str) -> str:
        return entry_name(source, adapter, {"cache_dir": tmp_path})

    before = name("org/adapter")
    assert before == name("org/adapter@v1") == name(f"org/adapter@{COMMIT}")
    assert len({before, name("org/adapter@v2"), name("org/adapter/last")}) == 3
    (tmp_path / "models--org--adapter" / "refs" / "main").write_text(OTHER_COMMIT)
    assert name("org/adapter") == name("org/adapter@v2") != before


def test_a_merged_model_is_kept(zoo: Any, tmp_path: Path) -> None:
    base, home = zoo("llama-gqa"), tmp_path / "cache"
    one, two = (
        adapters.for_case("llama-gqa", base, tmp_path / str(seed), seed=seed) for seed in (1, 2)
    )
    for adapter in (one, [(one, 0.5), (two, 0.5)]):
        merged = lean_model(base, adapter=adapter)
        for words in ("filled", "hit"):
            made = lean_model(base, adapter=adapter, cache=home)
            assert said(made) == words
            assert differences(merged, made) == []
            assert made.load_report.adapters == merged.load_report.adapters != ()
    assert said(lean_model(base, cache=home)) == "filled"
    folder = cache.entries(home)[-1].folder
    with pytest.raises(ArgumentError, match="adapter="):
        lean_model(folder, adapter=one)


def test_a_hub_name_is_known_by_its_commit(zoo: Any, tmp_path: Path) -> None:
    hub = zoo_module.hub_cache(
        tmp_path / "hub", "somebody/llama", zoo("llama-gqa"), {"main": None, "other": zoo("gpt2")}
    )
    home = tmp_path / "cache"

    def load(**arguments: Any) -> LeanHookedTransformer:
        return lean_model("somebody/llama", cache=home, cache_dir=hub, **arguments)

    assert [said(load()) for _ in range(2)] == ["filled", "hit"]
    assert said(load(revision="other")) == "filled"
    main = [entry for entry in cache.entries(home) if entry.source == "somebody/llama@main"]
    assert main[0].revision == load().load_report.revision is not None


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    usual = tmp_path / "tl_fastload"
    assert cache.folder_for(None) is None
    assert cache.folder_for(True) == usual
    for value, folder in [("1", usual), ("0", None), ("", None), ("/some/where", "/some/where")]:
        monkeypatch.setenv(cache.VARIABLE, value)
        assert cache.folder_for(None) == (None if folder is None else Path(folder))
        assert cache.folder_for(False) is None
    assert cache.folder_for(True) == Path("/some/where")
    assert cache.folder_for(tmp_path) == tmp_path
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "named"))
    assert said(embedded(None)) == "filled"
    assert len(cache.entries()) == 1
    for wrong in ("", 3):
        with pytest.raises(ArgumentError, match="cache="):
            embedded(wrong)


def test_listing_sizing_pruning_clearing(tmp_path: Path) -> None:
    for number, arguments in enumerate(({}, {"dtype": "bfloat16"}, {"quantize": "8bit"})):
        folder = Path(embedded(tmp_path, **arguments).load_report.cache.split(": ")[1])
        os.utime(folder / MANIFEST, (number * 1000, number * 1000))
    newest, middle, oldest = cache.entries(tmp_path)
    assert newest.quantization == "int8"
    assert middle.dtype == "bfloat16"
    assert oldest.processing[0] == "fold_ln"
    assert oldest.source == str(embedded_model_path())
    assert cache.size_bytes(tmp_path) == sum(e.size_bytes for e in (newest, middle, oldest))
    mapped = embedded(tmp_path)  # uses the oldest: now the newest
    assert cache.entries(tmp_path)[0].folder == oldest.folder
    assert cache.prune(tmp_path) == []
    assert cache.prune(tmp_path, unused_days=1) == [newest.folder, middle.folder] or not any(
        path.exists() for path in (newest.folder, middle.folder)
    )
    machine = cache_key_machine()
    (tmp_path / f".x.tl_fastload-{machine}-999999999-00000000").mkdir()
    (tmp_path / "notes.txt").touch()
    assert cache.clear(tmp_path) == [oldest.folder]
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert torch.isfinite(mapped(torch.arange(5)[None])).all()  # files live while they are mapped
    assert cache.entries(tmp_path / "nowhere") == []
    assert cache.size_bytes(tmp_path / "nowhere") == 0


def cache_key_machine() -> str:
    from tl_fastload.copies.folders import new_owner

    return new_owner().split("-")[0]


def test_a_damaged_entry_is_filled_again(tmp_path: Path) -> None:
    folder = Path(embedded(tmp_path).load_report.cache.split(": ")[1])
    (weights,) = folder.glob("*.safetensors")
    os.truncate(weights, 1000)
    assert cache.entries(tmp_path) == []
    again = embedded(tmp_path)
    assert said(again) == "filled"
    assert said(embedded(tmp_path)) == "hit"
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_cache_that_cannot_be_written_fails_no_load(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    model = embedded(tmp_path / "file")
    assert said(model) == "not filled"
    assert differences(lean_model(embedded_model_path()), model) == []


def test_what_cannot_be_known_again_is_not_kept(zoo: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    hf_model = AutoModelForCausalLM.from_pretrained(zoo("gpt2"))
    model = lean_model(zoo("gpt2"), hf_model=hf_model, cache=tmp_path)
    assert "hf_model=" in model.load_report.cache
    assert cache.entries(tmp_path) == []


def test_the_callers_tokenizer_does_not_stay(source: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(source, tmp_path / "elsewhere")
    home = tmp_path / "cache"
    for words in ("filled", "hit"):
        tokenizer = AutoTokenizer.from_pretrained(elsewhere)
        model = lean_model(source, cache=home, tokenizer=tokenizer)
        assert said(model) == words
        assert model.tokenizer.name_or_path == str(elsewhere)
    for words in ("filled", "hit"):
        model = lean_model(source, cache=home)
        assert said(model) == words
        assert model.tokenizer.name_or_path != str(elsewhere)
    assert len(cache.entries(home)) == 2
