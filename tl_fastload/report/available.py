"""Memory that can still be had: of this machine, of this container, of a CUDA device.

A container's limit is that of its memory cgroup and of every cgroup around it. The kernel's
description: https://docs.kernel.org/admin-guide/cgroup-v2.html (files `memory.max`,
`memory.current`, `memory.stat`) and https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
(`memory.limit_in_bytes`, `memory.usage_in_bytes`, `memory.stat`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil
import torch
from torch import nn

from tl_fastload.errors import LeanLoadError, NotEnoughMemory, is_out_of_memory
from tl_fastload.ground import compat
from tl_fastload.ground.words import format_bytes


@dataclass(frozen=True)
class _Version:
    """The names of one version's files, and of what the kernel drops when memory is needed."""

    file_system: str
    limit: str
    usage: str
    reclaimable: tuple[str, ...]


_V2 = _Version("cgroup2", "memory.max", "memory.current", ("inactive_file", "active_file"))
_V1 = _Version(
    "cgroup",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),  # of this cgroup and those in it, as usage is
)


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be allocated on a device, or None where that is unknown."""
    if device.type == "cpu":
        return available_host_bytes()
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    # Some of these functions of torch's take no "cuda" for the current device.
    index = torch.cuda.current_device() if device.index is None else device.index
    # What torch's allocator holds free is at hand as well.
    allocated = torch.cuda.memory_allocated(index)
    free, total = torch.cuda.mem_get_info(index)
    left = free + torch.cuda.memory_reserved(index) - allocated
    # torch.cuda.set_per_process_memory_fraction.
    return int(min(left, total * compat.cuda_memory_fraction(index) - allocated))


def available_host_bytes(root: Path = Path("/")) -> int:
    """Memory that this process can still allocate, in bytes.

    The least of what the system and each memory cgroup around this process have left. Page cache
    counts as available, since it gives way; swap does not.

    Args:
        root: where `proc` and `sys` lie.
    """
    left = [int(psutil.virtual_memory().available)]
    for version, folder in _cgroups(root):
        limit, usage = _number(folder / version.limit), _number(folder / version.usage)
        if limit is not None and usage is not None:
            left.append(max(limit - usage, 0) + _reclaimable_bytes(version, folder))
    return min(left)


def _cgroups(root: Path) -> Iterator[tuple[_Version, Path]]:
    """The folders of the memory cgroups of this process, innermost first."""
    mounts = list(_mounts(root))
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            version = _V2
        elif "memory" in controllers.split(","):
            version = _V1
        else:
            continue
        for mounted, shown, point in mounts:
            if mounted is version:
                yield from ((version, folder) for folder in _upwards(point, shown, path))


def _upwards(point: Path, shown: str, path: str) -> Iterator[Path]:
    """The folders from a cgroup up to the one that is mounted.

    Args:
        point: where the hierarchy is mounted.
        shown: the cgroup that is to be seen there: not "/" in a container without a namespace.
        path: the process's cgroup.
    """
    inside = PurePosixPath(path)
    if ".." in inside.parts or not inside.is_relative_to(shown):
        inside = PurePosixPath(shown)  # of somebody else's hierarchy: only the mount is ours
    relative = inside.relative_to(shown)
    for part in (relative, *relative.parents):
        yield point / part


def _mounts(root: Path) -> Iterator[tuple[_Version, str, Path]]:
    """Version, mounted cgroup and place of each hierarchy that may have a memory controller."""
    found = False
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or not kind:
            continue
        version = next((v for v in (_V2, _V1) if v.file_system == kind[0]), None)
        if version is None or (version is _V1 and "memory" not in kind[-1].split(",")):
            continue
        found = True
        yield version, fields[3], root / fields[4].lstrip("/")
    if not found:
        yield _V2, "/", root / "sys/fs/cgroup"
        yield _V1, "/", root / "sys/fs/cgroup/memory"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _reclaimable_bytes(version: _Version, folder: Path) -> int:
    """File pages of a cgroup that the kernel drops when memory is needed."""
    fields = dict(line.split()[:2] for line in _lines(folder / "memory.stat") if " " in line)
    return sum(int(fields.get(name, 0)) for name in version.reclaimable)


# Sixteen float32 copies of everything at once: far more than any recipe holds.
_MOST_BYTES_PER_ELEMENT = 64


def is_ample(elements: int, devices: Iterable[torch.device]) -> bool:
    """Whether there is so much room that what a load needs does not have to be found out.

    Args:
        elements: of all parameters and buffers that are placed.
        devices: that they may lie on.
    """
    free = (available_bytes(device) for device in {torch.device("cpu"), *devices})
    return all(size is None or elements * _MOST_BYTES_PER_ELEMENT <= size for size in free)


def check_room(needed_bytes: Mapping[torch.device, int], label: str) -> None:
    """Raise NotEnoughMemory if a load cannot have what it needs.

    Args:
        needed_bytes: the most that is allocated on each device at a time.
        label: the model, for the message.
    """
    for device, needed in needed_bytes.items():
        free = available_bytes(device)
        if free is not None and needed > free:
            raise NotEnoughMemory(
                f"Loading {label} takes {format_bytes(needed)} on {device}, where "
                f"{format_bytes(free)} are available. No weights were read."
            )


@contextmanager
def let_go_on_error(model: nn.Module, label: str) -> Iterator[None]:
    """While a new model is filled: if that fails, what was placed goes at once, and not only when
    the exception does, whose traceback holds the model.

    Args:
        model: nobody else's yet.
        label: the model, for the message.

    Raises:
        NotEnoughMemory: instead of what torch raises when it has no memory.
    """
    try:
        yield
    except BaseException as error:
        _empty(model)
        if isinstance(error, LeanLoadError) or not is_out_of_memory(error):
            raise
        said = str(error).strip().partition("\n")[0]
        error.__traceback__ = None  # its frames hold the tensors that were in work
        raise NotEnoughMemory(
            f"Loading {label} ran out of memory ({said}). Nothing was loaded; what had been placed "
            "is free again."
        ) from None


def _empty(model: nn.Module) -> None:
    """Put parameters without memory in the place of a model's."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
