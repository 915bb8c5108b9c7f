"""Strategy, mapping and the other arguments: what is chosen, why, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comparison import lean_model
from packaging.version import Version

from tl_fastload import compat, options
from tl_fastload.errors import ArgumentError, StrategyError
from tl_fastload.options import Options, is_on_network


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


@pytest.mark.parametrize(
    "arguments",
    [
        {"dtype": "floaty"},
        {"dtype": "int8"},
        {"dtype": torch.int32},
        {"dtype": torch.complex64},
        {"dtype": None},
        {"torch_dtype": "floaty"},
        {"strategy": "fast"},
        {"strategy": None},
        {"mmap": "yes"},
        {"mmap": None},
        {"mmap": 2},
        {"progress": "loud"},
        {"first_n_layers": -1},
        {"first_n_layers": 1.5},
        {"first_n_layers": "2"},
        {"first_n_layers": 3},
        {"first_n_layers": 99},
        {"n_ctx": 0},
        {"n_ctx": -5},
        {"n_ctx": 2.5},
        {"n_ctx": "many"},
        {"n_devices": 0},
        {"n_devices": 2},
        {"n_devices": None},
        {"device": "tpu"},
        {"device": "meta"},
        {"device": []},
        {"default_padding_side": "up"},
        {"default_prepend_bos": "maybe"},
        {"tokenizer": "gpt2"},
        {"fold_lnn": True},
        {"device_map": "auto"},
        {"checkpoint_index": 1},
        {"checkpoint_value": 1000},
        {"checkpoint_value": 1, "checkpoint_label": 1},
        {"checkpoint_index": 1, "checkpoint_value": 1000},
        {"checkpoint_index": 1, "revision": "main"},
        {"torch_dtype": torch.float16, "dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_arguments(arguments: Any, zoo: Any, no_reading: None) -> None:
    with pytest.raises(ArgumentError) as caught:
        lean_model(zoo("gpt2"), **arguments)
    assert any(name in str(caught.value) for name in arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
def test_cuda_without_cuda(device: Any, zoo: Any, no_reading: None) -> None:
    with pytest.raises(ArgumentError, match=r"device.*CUDA"):
        lean_model(zoo("gpt2"), device=device)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has it")
def test_a_device_that_this_machine_lacks(zoo: Any, no_reading: None) -> None:
    with pytest.raises(ArgumentError, match="mps"):
        lean_model(zoo("gpt2"), device="mps")


def test_assigning_on_an_old_torch(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tl_fastload.compat.can_assign", lambda: False)
    with pytest.raises(StrategyError, match=r'assign.*strategy="auto"'):
        lean_model(zoo("gpt2"), strategy="assign")
    assert lean_model(zoo("gpt2")).load_report.strategy == "copy"
