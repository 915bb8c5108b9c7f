"""What of this machine matters for loading, as data; tries what it can instead of guessing."""

from __future__ import annotations

import os
import platform
import re
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from tl_fastload.cache import default_folder
from tl_fastload.errors import MissingPackageError
from tl_fastload.faces import installed, lean_class
from tl_fastload.ground import compat
from tl_fastload.ground.words import format_bytes, text_table
from tl_fastload.quantized import formats
from tl_fastload.quantized.formats.base import Format
from tl_fastload.report.available import available_bytes
from tl_fastload.request.options import Options, file_system_kind, is_on_network

_NEEDED = (
    "torch",
    "transformers",
    "transformer_lens",
    "safetensors",
    "huggingface_hub",
    "bitsandbytes",
    "rich",
    "typer",
)
_EXTRAS = {"peft": "adapter=", "lightning": "tl_fastload.lightning", "matplotlib": "pictures"}
"""What only that needs which is named beside it."""
_LITTLE_DISK_BYTES = 10 << 30


@dataclass(frozen=True)
class Kernel:
    """Whether a kind of quantized weights gives right products; `problem` is None where it does."""

    device: str
    kind: str
    problem: str | None

    def row(self) -> tuple[str, str]:
        state = "works" if self.problem is None else f"does NOT work: {self.problem}"
        return f"{self.kind} on {self.device}", state


@dataclass(frozen=True)
class Device:
    """A device that can hold a model; sizes in bytes."""

    name: str
    description: str
    total_bytes: int
    available_bytes: int | None

    def row(self) -> tuple[str, str]:
        free = "unknown" if self.available_bytes is None else format_bytes(self.available_bytes)
        room = f"{free} of {format_bytes(self.total_bytes)} available"
        return self.name, f"{self.description}; {room}"


@dataclass(frozen=True)
class CacheFolder:
    """A folder that weights are mapped from.

    Attributes:
        name: what it holds, and in parentheses the environment variable that moves it.
        folder: where it lies; it need not exist yet.
        file_system: its kind, such as "ext4"; "" if unknown.
        is_mapped: whether `mmap="auto"` maps files there, which it does on local disks.
        free_bytes: of the disk.
    """

    name: str
    folder: str
    file_system: str
    is_mapped: bool
    free_bytes: int

    def row(self) -> tuple[str, str]:
        place = f"{self.folder} on {self.file_system or 'an unknown file system'}"
        way = "mapped" if self.is_mapped else "read, not mapped"
        return self.name, f"{place}, {way}; {format_bytes(self.free_bytes)} free"


@dataclass(frozen=True)
class Diagnosis:
    """All facts, and what to do about them.

    Attributes:
        versions: package -> version, or None where it is not installed.
        roads: TransformerLens' classes that models can be loaded into, the default first.
        machine: system, processor, cores and memory.
        strategy: which strategy `strategy="auto"` is, and why.
        devices: the CPU first.
        kernels: every kind on every device.
        caches: of downloads, and of processed copies.
        fixes: what to change, one sentence each; empty when all is well.
    """

    versions: dict[str, str | None]
    roads: tuple[str, ...]
    machine: dict[str, Any]
    strategy: str
    devices: tuple[Device, ...]
    kernels: tuple[Kernel, ...]
    caches: tuple[CacheFolder, ...]
    fixes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return text_table("Diagnosis", self.rows())

    def rows(self) -> list[tuple[str, str]]:
        """The facts as (label, text) pairs, in reading order."""
        machine = {name: str(value) for name, value in self.machine.items()}
        del machine["memory_bytes"]  # the CPU's row has it
        return [
            *((name, version or _not_installed(name)) for name, version in self.versions.items()),
            ("loads into", ", ".join(self.roads) or "nothing: see below"),
            ("strategy", self.strategy),
            *machine.items(),
            *(device.row() for device in self.devices),
            *(kernel.row() for kernel in self.kernels),
            *(cache.row() for cache in self.caches),
        ]


def diagnose() -> Diagnosis:
    """Find all facts; takes a few seconds, since kernels are run."""
    options, devices = Options(), _devices()
    there, road_fixes = roads()
    kernels = tuple(
        Kernel(device.name, kind, _try_kernel(device.name, kind))
        for device in devices
        for format in formats.FORMATS
        for kind in format.kinds
    )
    caches = _caches()
    return Diagnosis(
        versions=versions(),
        roads=there,
        machine=machine(),
        strategy=f"{'assign' if options.assigns else 'copy'} ({options.reason()})",
        devices=devices,
        kernels=kernels,
        caches=caches,
        fixes=(
            *_fixes_for_torch(),
            *road_fixes,
            *_fixes_for_kernels(kernels),
            *_fixes_for_caches(caches),
            *_fixes_for_memory(devices[0]),
        ),
    )


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that take part."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("tl_fastload", *_NEEDED, *_EXTRAS):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def roads() -> tuple[tuple[str, ...], list[str]]:
    """TransformerLens' classes that models can be loaded into, as --road names them; and what to
    do about one that cannot be imported.
    """
    there, fixes = [], []
    for road in installed():
        try:
            there.append(f"{lean_class(road).__name__.removeprefix('Lean')} (--road {road})")
        except MissingPackageError as error:
            fixes.append(str(error))
    if not installed():
        fixes.append('TransformerLens is not installed: pip install "transformer-lens>=2.8,<5".')
    return tuple(there), list(dict.fromkeys(fixes))


def machine() -> dict[str, Any]:
    """System, processor, cores and memory, without anything that names the machine."""
    has_affinity = hasattr(psutil.Process, "cpu_affinity")
    return {
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "processor": _processor(),
        "cores": len(psutil.Process().cpu_affinity()) if has_affinity else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def _devices() -> tuple[Device, ...]:
    found = [(torch.device("cpu"), _processor(), psutil.virtual_memory().total)]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append((torch.device("cuda", index), properties.name, properties.total_memory))
    return tuple(
        Device(str(device), description, total_bytes, available_bytes(device))
        for device, description, total_bytes in found
    )


def _try_kernel(device: str, kind: str) -> str | None:
    """Multiply by a small quantized matrix, and compare with what its values say."""
    try:
        stored = formats.of_kind(kind).sample(kind, torch.device(device))
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(4, stored.shape[1], generator=generator).to(device)
        product = stored.linear(x)
        expected = x @ stored.dense(torch.float32).T
    except Exception as error:  # whatever a broken installation raises
        return f"{type(error).__name__}: {error}".splitlines()[0]
    # int8 rounds activations; 4-bit kernels differ by the order of sums, or by bfloat16 scales.
    off = float((product.float() - expected).norm() / expected.norm())
    return None if off < 0.05 else f"products are off by {off:.0%}"


def _caches() -> tuple[CacheFolder, ...]:
    from huggingface_hub import constants

    folders = {
        "downloads (HF_HOME)": Path(constants.HF_HUB_CACHE),
        "processed copies (TL_FASTLOAD_CACHE)": default_folder(),
    }
    found = []
    for name, folder in folders.items():
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        is_mapped = Options().assigns and not is_on_network(folder)
        free_bytes = shutil.disk_usage(existing).free
        kind = file_system_kind(folder)
        found.append(CacheFolder(name, str(folder), kind, is_mapped, free_bytes))
    return tuple(found)


def _fixes_for_torch() -> list[str]:
    if compat.can_assign():
        return []
    return [
        f"torch {compat.TORCH} copies into the model instead of assigning, maps nothing and holds "
        f'no quantized weights: pip install "torch>={compat.ASSIGN_NEEDS_TORCH}".'
    ]


def _not_installed(name: str) -> str:
    return f"not installed; only for {_EXTRAS[name]}" if name in _EXTRAS else "not installed"


def _fixes_for_kernels(kernels: tuple[Kernel, ...]) -> list[str]:
    broken: dict[tuple[Format, str], list[str]] = {}
    for kernel in kernels:
        if kernel.problem is not None:
            key = (formats.of_kind(kernel.kind), kernel.problem)
            broken.setdefault(key, []).append(f"{kernel.kind} on {kernel.device}")
    return [
        f"{format.name} does not work for {', '.join(which)} ({problem}). Quantized models need "
        f"it: {format.remedy}, or load them with dequantize=True."
        for (format, problem), which in broken.items()
    ]


def _fixes_for_caches(caches: tuple[CacheFolder, ...]) -> list[str]:
    fixes = []
    for cache in caches:
        variable = cache.name.partition("(")[2].rstrip(")")
        if Options().assigns and not cache.is_mapped:
            fixes.append(
                f"{cache.folder} lies on a network file system ({cache.file_system}): weights are "
                f"read, not mapped. Set {variable} to a folder on a local disk."
            )
        if cache.free_bytes < _LITTLE_DISK_BYTES:
            fixes.append(
                f"The disk of {cache.folder} has {format_bytes(cache.free_bytes)} left: free some, "
                f"or set {variable} to a folder on another disk."
            )
    return list(dict.fromkeys(fixes))


def _fixes_for_memory(cpu: Device) -> list[str]:
    free, total = cpu.available_bytes, cpu.total_bytes
    if free is None or free > total / 4:
        return []
    return [
        f"Only {format_bytes(free)} of {format_bytes(total)} of memory are available: end what "
        "uses it, or raise the limit of this container."
    ]
