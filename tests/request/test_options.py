"""Strategy, mapping and the other arguments: what is chosen, why, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from transformer_lens.HookedTransformer import DTYPE_FROM_STRING

from tests.support.comparison import changed, lean_model, values
from tl_fastload import cache, load_weights_, plan, save_lean, verify_copy
from tl_fastload.errors import ArgumentError, StrategyError
from tl_fastload.ground import compat
from tl_fastload.request import options
from tl_fastload.request.argument_types import DTYPES_BY_NAME
from tl_fastload.request.options import Options, is_on_network


@pytest.fixture
def old_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "TORCH", Version("2.0.1"))


def test_auto_assigns_where_torch_can() -> None:
    chosen = Options()
    chosen.check()
    assert chosen.assigns
    assert str(compat.TORCH) in chosen.reason()


def test_auto_copies_on_an_older_torch(old_torch: None) -> None:
    chosen = Options()
    chosen.check()
    assert not chosen.assigns
    assert "2.0.1" in chosen.reason()
    assert "2.1" in chosen.reason()


def test_copy_can_be_asked_for_on_any_torch() -> None:
    chosen = Options(strategy="copy")
    chosen.check()
    assert not chosen.assigns
    assert chosen.reason() == "as asked for"


def test_assign_on_an_older_torch(old_torch: None) -> None:
    with pytest.raises(StrategyError, match=r"2\.1.*2\.0\.1.*auto"):
        Options(strategy="assign").check()


@pytest.mark.parametrize("strategy", ["", "Assign", None, 1, ["copy"]])
def test_strategies_that_are_none(strategy: Any) -> None:
    with pytest.raises(ArgumentError, match="strategy="):
        Options(strategy=strategy).check()


@pytest.mark.parametrize("mmap", ["", "yes", "True", None, 2, ["auto"]])
def test_mappings_that_are_none(mmap: Any) -> None:
    with pytest.raises(ArgumentError, match="mmap="):
        Options(mmap=mmap).check()


@pytest.mark.parametrize("mmap", [0, 1])
def test_a_number_means_what_it_says_or_is_refused(mmap: Any, tmp_path: Path) -> None:
    chosen = Options(mmap=mmap)
    try:
        chosen.check()
    except ArgumentError:
        return
    assert chosen.may_map(checkpoint_in(tmp_path)) is bool(mmap)


def checkpoint_in(folder: Path) -> Any:
    return SimpleNamespace(folder=folder)


def partitions(**kinds: str) -> list[Any]:
    return [SimpleNamespace(mountpoint=path, fstype=kind) for path, kind in kinds.items()]


def test_when_weights_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = checkpoint_in(tmp_path)
    monkeypatch.setattr(options, "is_on_network", lambda folder: False)
    assert Options().may_map(checkpoint)
    assert not Options(mmap=False).may_map(checkpoint)
    assert not Options(strategy="copy").may_map(checkpoint)
    assert not Options().may_map(None)
    monkeypatch.setattr(options, "is_on_network", lambda folder: True)
    assert not Options().may_map(checkpoint)
    assert Options(mmap=True).may_map(checkpoint)


@pytest.mark.parametrize(
    ("kind", "network"),
    [
        ("nfs4", True),
        ("cifs", True),
        ("fuse.sshfs", True),
        ("9p", True),
        ("NFS", True),
        ("ext4", False),
        ("tmpfs", False),
        ("overlay", False),
    ],
)
def test_the_innermost_mount_decides(
    kind: str, network: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "share"
    (inner / "model").mkdir(parents=True)
    (tmp_path / "share2").mkdir()
    other = "ext4" if network else "nfs"
    mounts = partitions(**{"/": other, str(inner): kind, str(inner / "mod"): other})
    monkeypatch.setattr(options.psutil, "disk_partitions", lambda all: mounts)
    assert is_on_network(inner / "model") is network
    assert is_on_network(tmp_path / "share2") is not network  # a name is no parent


def test_a_link_to_a_share_is_on_the_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share = tmp_path / "share"
    share.mkdir()
    (tmp_path / "link").symlink_to(share)
    mounts = partitions(**{"/": "ext4", str(share): "nfs"})
    monkeypatch.setattr(options.psutil, "disk_partitions", lambda all: mounts)
    assert is_on_network(tmp_path / "link")
    assert not is_on_network(tmp_path)


EVERYWHERE = {"": "cpu"}
WRONG: tuple[dict[str, Any], ...] = (
    *({"dtype": value} for value in ("floaty", "int8", torch.int32, torch.complex64, None, 32)),
    *({"dtype": value} for value in (["float32"], torch.ones(2))),
    *({"torch_dtype": value} for value in ("floaty", "auto", ["float16"], torch.int8)),
    *({"strategy": value} for value in ("fast", None, ["copy"], np.ones(2))),
    *({"mmap": value} for value in ("yes", None, 2, np.ones(2))),
    {"progress": "loud"},
    *({"first_n_layers": value} for value in (-1, 1.5, "2", True, 3, 99, torch.ones(2))),
    *({"n_ctx": value} for value in (0, -5, 2.5, "many", [4])),
    *({"n_devices": value} for value in (0, 2, None, "1", 1.0)),
    *({"device": value} for value in ("tpu", "meta", [], 1.5)),
    *({"default_padding_side": value} for value in ("up", 1, np.ones(2))),
    *({"default_prepend_bos": value} for value in ("maybe", torch.ones(3), 2)),
    *({"tokenizer": value} for value in ("gpt2", 5, Path("gpt2"), [])),
    *({"fold_ln": value} for value in ("gemma", "False", None, torch.ones(3), 2, [])),
    *({"move_to_device": value} for value in ("cpu", None)),
    *({name: "no"} for name in ("center_unembed", "refactor_factored_attn_matrices")),
    *({name: "no"} for name in ("verify", "dequantize", "requantize", "check_memory")),
    *({name: 5} for name in ("revision", "subfolder", "variant", "token", "cache_dir", "cache")),
    *({name: "no"} for name in ("local_files_only", "trust_remote_code", "use_safetensors")),
    *({"quantize": value} for value in (4, True, ["nf4"], transformers.BitsAndBytesConfig)),
    {"adapter": 5},
    {"hf_model": "gpt2"},
    {"fold_lnn": True},
    *({"device_map": value} for value in ("many", 0, {}, ["cpu"], {"": "cpu", 0: "cpu"})),
    *({"device_map": {"": value}} for value in ("abacus", "meta", None, True, 1.5, 99)),
    *({"device_map": {**EVERYWHERE, name: "cpu"}} for name in ("blocks.9", "blocks.0.attn")),
    {"device_map": {"blocks": "cpu"}},
    *({"device_map": EVERYWHERE, **other} for other in ({"device": "cpu"}, {"n_devices": 2})),
    {"device_map": EVERYWHERE, "move_to_device": False},
    *({"max_memory": value} for value in ({"cpu": "1GB"}, "1GB", 5)),
    {"device_map": EVERYWHERE, "max_memory": {"cpu": "1GB"}},
    *({"device_map": "auto", "max_memory": value} for value in ({"cpu": "much"}, {"tpu": 1})),
    *({"checkpoint_index": value} for value in (1, "last", 1.0)),
    {"checkpoint_value": 1000},
    {"checkpoint_label": "main"},
    {"checkpoint_value": 1, "checkpoint_label": 1},
    {"checkpoint_index": 1, "checkpoint_value": 1000},
    {"checkpoint_index": 1, "revision": "main"},
    {"torch_dtype": torch.float16, "dtype": torch.bfloat16},
)


def test_arguments(zoo: Any, no_reading: None) -> None:
    """Each is an error that names it, before weights are read; of a plan, too."""
    folder, short = zoo("gpt2"), []
    for arguments in WRONG:
        for load in (lean_model, plan):
            try:
                load(folder, **arguments)
                short.append(f"{arguments} is accepted by {load.__name__}")
            except ArgumentError as error:
                if not any(name in str(error) for name in arguments):
                    short.append(f"{arguments}: {error}")
    assert short == []
    for name in (5, None, b"gpt2", ["gpt2"], ""):
        for load in (lean_model, plan):
            with pytest.raises(ArgumentError, match=r"model.name"):
                load(name)


def test_arguments_that_say_the_same(zoo: Any) -> None:
    """None is the default, numbers of numpy are numbers, names of dtypes are dtypes."""
    folder = zoo("gpt2")
    expected = values(lean_model(folder, dtype="float16", fold_ln=False, first_n_layers=1))
    none = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "torch_dtype")
    for same in (
        dict.fromkeys((*none, "trust_remote_code", "force_download", "variant"), None),
        {"torch_dtype": "float16", "dtype": "float32"},
        {"torch_dtype": torch.float16, "fold_ln": np.bool_(False), "first_n_layers": np.int64(1)},
        {"fold_ln": 0, "first_n_layers": 1, "torch_dtype": "fp16"},
    ):
        given = {"dtype": "float16", "fold_ln": False, "first_n_layers": 1, **same}
        if "torch_dtype" in same and same["torch_dtype"] is not None:
            given["dtype"] = same.get("dtype", "float32")
        model = lean_model(folder, **given)
        assert changed(expected, model) == []
        assert model.cfg.dtype == torch.float16
        assert type(model.cfg.n_layers) is int


def test_arguments_of_the_other_functions(zoo: Any, tmp_path: Path) -> None:
    model = lean_model(zoo("gpt2"))
    before = values(model)
    for name, call in {
        "fold_ln": lambda: model.process_weights_(fold_ln="no"),
        "center_unembed": lambda: model.load_and_process_state_dict({}, center_unembed="no"),
        "state_dict": lambda: model.load_and_process_state_dict("weights"),
        "strict": lambda: load_weights_(model, before, strict="no"),
        "processing": lambda: load_weights_(model, before, processing=["fold_ln"]),
        "center_writing": lambda: load_weights_(
            model, before, processing={"center_writing_weights": "no"}
        ),
        "folder": lambda: save_lean(model, 5),
        "max_shard_bytes": lambda: save_lean(model, tmp_path / "copy", max_shard_bytes="5GB"),
        "progress": lambda: save_lean(model, tmp_path / "copy", progress="loud"),
        "folder=": lambda: verify_copy(None),
        "folder=5": lambda: cache.entries(5),
        "max_bytes": lambda: cache.prune(tmp_path, max_bytes="all"),
        "unused_days": lambda: cache.prune(tmp_path, unused_days=float("nan")),
    }.items():
        with pytest.raises(ArgumentError, match=name):
            call()
    assert changed(before, model) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
def test_cuda_without_cuda(device: Any, zoo: Any, no_reading: None) -> None:
    with pytest.raises(ArgumentError, match=r"device.*CUDA"):
        lean_model(zoo("gpt2"), device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("case_id", ["gpt2", "llama-gqa"])  # TransformerLens makes zeros there
def test_cuda_that_does_not_answer(
    case_id: str, zoo: Any, no_reading: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ArgumentError, match=r"device='cuda' cannot hold weights here: .*CUDA"):
        lean_model(zoo(case_id), device="cuda")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has it")
def test_a_device_that_this_machine_lacks(zoo: Any, no_reading: None) -> None:
    with pytest.raises(ArgumentError, match="mps"):
        lean_model(zoo("gpt2"), device="mps")


def test_assigning_on_an_old_torch(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tl_fastload.ground.compat.can_assign", lambda: False)
    with pytest.raises(StrategyError, match=r'assign.*strategy="auto"'):
        lean_model(zoo("gpt2"), strategy="assign")
    assert lean_model(zoo("gpt2")).load_report.strategy == "copy"


def test_names_of_dtypes_are_those_of_transformer_lens() -> None:
    assert list(DTYPES_BY_NAME.items()) == list(DTYPE_FROM_STRING.items())
