"""Strategy and mapping: what is chosen, and why."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
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
