"""Memory that can still be had: the machine's, and what containers leave of it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from tl_fastload.report import available
from tl_fastload.report.available import available_bytes, available_host_bytes

GIB = 1 << 30
HUGE = 9223372036854771712  # what version 1 says for "no limit"
V2_MOUNT = "30 23 0:26 {shown} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "33 24 0:29 {shown} /sys/fs/cgroup/memory rw shared:8 - cgroup cgroup rw,memory"
OTHER_MOUNT = "34 24 0:30 / /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu,cpuacct"


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 64 GiB available."""

    class Free:
        available = 64 * GIB

    monkeypatch.setattr(available.psutil, "virtual_memory", Free)


def system(root: Path, cgroup: str, mounts: str | None = None) -> Path:
    proc = root / "proc/self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(cgroup)
    if mounts is not None:
        (proc / "mountinfo").write_text(mounts + "\n")
    return root


def v2(folder: Path, limit: int | str, usage: int, cache: tuple[int, int] = (0, 0)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    (folder / "memory.swap.max").write_text("max\n")
    (folder / "memory.stat").write_text(
        f"anon 5\nfile 7\ninactive_file {cache[0]}\nactive_file {cache[1]}\n"
    )


def v1(folder: Path, limit: int, usage: int, cache: tuple[int, int] = (0, 0)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{usage}\n")
    (folder / "memory.memsw.limit_in_bytes").write_text(f"{2 * limit}\n")
    # The first two are of this cgroup alone; usage is of all below, too.
    (folder / "memory.stat").write_text(
        f"inactive_file 1\nactive_file 1\ntotal_inactive_file {cache[0]}\n"
        f"total_active_file {cache[1]}\n"
    )


def test_version_2_in_a_namespace(tmp_path: Path) -> None:
    root = system(tmp_path, "0::/\n", V2_MOUNT.format(shown="/"))
    v2(tmp_path / "sys/fs/cgroup", 8 * GIB, 3 * GIB, (GIB, GIB // 2))
    assert available_host_bytes(root) == 5 * GIB + GIB + GIB // 2


def test_the_tightest_of_nested_groups_counts(tmp_path: Path) -> None:
    root = system(tmp_path, "0::/kube/pod/one\n", V2_MOUNT.format(shown="/"))
    top = tmp_path / "sys/fs/cgroup"
    v2(top / "kube/pod/one", "max", GIB)
    v2(top / "kube/pod", 4 * GIB, 3 * GIB)
    v2(top / "kube", 32 * GIB, 9 * GIB)
    assert available_host_bytes(root) == GIB
    v2(top / "kube", 10 * GIB, 10 * GIB)
    assert available_host_bytes(root) == 0
    v2(top / "kube/pod/one", GIB, GIB, (GIB // 4, 0))
    v2(top / "kube", "max", 10 * GIB)
    assert available_host_bytes(root) == GIB // 4
    v2(top / "kube/other", 1, 1)  # somebody else's
    assert available_host_bytes(root) == GIB // 4


def test_version_1(tmp_path: Path) -> None:
    mounts = "\n".join([OTHER_MOUNT, V1_MOUNT.format(shown="/")])
    root = system(tmp_path, "9:cpu,cpuacct:/a\n8:memory:/a/b\n0::/c\n", mounts)
    top = tmp_path / "sys/fs/cgroup/memory"
    v1(top, HUGE, 20 * GIB)
    v1(top / "a", 6 * GIB, 5 * GIB, (GIB, 0))
    v1(top / "a/b", HUGE, GIB)
    assert available_host_bytes(root) == 2 * GIB


def test_a_container_that_sees_its_own_group_as_the_mount(tmp_path: Path) -> None:
    root = system(tmp_path, "8:memory:/docker/abc\n", V1_MOUNT.format(shown="/docker/abc"))
    v1(tmp_path / "sys/fs/cgroup/memory", 2 * GIB, GIB)
    assert available_host_bytes(root) == GIB


def test_a_group_outside_of_the_namespace(tmp_path: Path) -> None:
    root = system(tmp_path, "0::/../../other\n", V2_MOUNT.format(shown="/"))
    v2(tmp_path / "sys/fs/cgroup", 2 * GIB, GIB)
    assert available_host_bytes(root) == GIB


def test_both_versions_side_by_side(tmp_path: Path) -> None:
    hybrid = "42 24 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
    mounts = "\n".join([V1_MOUNT.format(shown="/"), hybrid])
    root = system(tmp_path, "8:memory:/\n0::/\n", mounts)
    v1(tmp_path / "sys/fs/cgroup/memory", 3 * GIB, GIB)
    (tmp_path / "sys/fs/cgroup/unified").mkdir()
    assert available_host_bytes(root) == 2 * GIB


def test_without_a_list_of_mounts_the_usual_places_count(tmp_path: Path) -> None:
    root = system(tmp_path, "0::/\n")
    v2(tmp_path / "sys/fs/cgroup", 2 * GIB, GIB)
    assert available_host_bytes(root) == GIB


@pytest.mark.parametrize("text", ["max", "", "nonsense"])
def test_no_limit(text: str, tmp_path: Path) -> None:
    root = system(tmp_path, "0::/\n", V2_MOUNT.format(shown="/"))
    v2(tmp_path / "sys/fs/cgroup", text, GIB)
    assert available_host_bytes(root) == 64 * GIB


def test_missing_files_bound_nothing(tmp_path: Path) -> None:
    assert available_host_bytes(tmp_path) == 64 * GIB
    root = system(tmp_path, "0::/a\nnonsense\n", V2_MOUNT.format(shown="/") + "\nnonsense")
    assert available_host_bytes(root) == 64 * GIB
    folder = tmp_path / "sys/fs/cgroup/a"
    v2(folder, 2 * GIB, GIB)
    (folder / "memory.stat").unlink()
    assert available_host_bytes(root) == GIB
    (folder / "memory.current").unlink()
    assert available_host_bytes(root) == 64 * GIB


def test_the_machine_bounds_every_container(tmp_path: Path) -> None:
    root = system(tmp_path, "0::/\n", V2_MOUNT.format(shown="/"))
    v2(tmp_path / "sys/fs/cgroup", 1000 * GIB, GIB)
    assert available_host_bytes(root) == 64 * GIB


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    free = available_bytes(torch.device("cpu"))
    assert free is not None
    assert 0 < free <= psutil.virtual_memory().total
    assert available_bytes(torch.device("meta")) is None


@pytest.mark.parametrize("device", ["cuda:1", "cuda"])  # torch takes the latter only at times
def test_what_torch_holds_free_on_a_device_is_available(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for name, value in (
        ("mem_get_info", (5 * GIB, 80 * GIB)),
        ("memory_reserved", 3 * GIB),
        ("memory_allocated", 2 * GIB),
        ("get_per_process_memory_fraction", 1.0),
    ):
        asked = {1: value, torch.device("cuda:1"): value}
        monkeypatch.setattr(torch.cuda, name, asked.__getitem__)
    assert available_bytes(torch.device(device)) == 6 * GIB
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.1)
    assert available_bytes(torch.device("cuda:1")) == 6 * GIB  # a tenth is 8, of which 2 are used
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 * GIB)
    assert available_bytes(torch.device("cuda:1")) == 5 * GIB
