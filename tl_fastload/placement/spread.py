"""A model over several devices: where each of its parts lies, and where it runs.

A part is a block, or a module beside the blocks (an embedding, the last norm); it is never split.
Parts on "cpu" and "disk" run on the first other device, if there is one: their tensors are
streamed there while they run (`tl_fastload.placement.streaming`), and stay at home, mapped from a
file where they can be.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tl_fastload.errors import ArgumentError
from tl_fastload.ground.words import listed

# Biases and norms that no file has are in memory in any case.
_SMALL_BYTES = 1 << 20
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Spread:
    """Parts over devices.

    Attributes:
        homes: part -> where its parameters and buffers lie.
        runs: part -> where it computes.
        disk: the parts whose parameters have to be mapped from a file.
    """

    homes: dict[str, torch.device]
    runs: dict[str, torch.device]
    disk: frozenset[str] = frozenset()

    def part_of(self, name: str) -> str | None:
        """The part that a parameter or a buffer belongs to; None for names of no part."""
        path = name.split(".")
        above = (".".join(path[:depth]) for depth in range(len(path), 0, -1))
        return next((part for part in above if part in self.homes), None)

    def home_of(self, name: str) -> torch.device:
        """Where a parameter or a buffer lies."""
        part = self.part_of(name)
        return CPU if part is None else self.homes[part]

    @property
    def begins_on(self) -> torch.device:
        """Where the first block runs."""
        blocks = [device for part, device in self.runs.items() if "." in part]
        return [*blocks, *self.runs.values()][0]

    @property
    def streamed(self) -> list[str]:
        """The parts that run elsewhere than they lie."""
        return [part for part, home in self.homes.items() if self.runs[part] != home]

    def streaming_bytes(self, size_of: Mapping[str, int]) -> dict[torch.device, int]:
        """What streaming takes on each device: the largest part that comes there, and the next.

        Args:
            size_of: bytes of each parameter and buffer.
        """
        sizes = dict.fromkeys(self.streamed, 0)
        for name, size in size_of.items():
            part = self.part_of(name)
            if part in sizes:
                sizes[part] += size
        needed: dict[torch.device, int] = {}
        for part, size in sizes.items():
            device = self.runs[part]
            needed[device] = max(needed.get(device, 0), 2 * size)
        return needed

    def require_mapped(self, held_bytes: Mapping[str, int]) -> None:
        """Raise ArgumentError if large parameters of a part on "disk" are in memory.

        Args:
            held_bytes: of the parameters that are not mapped.
        """
        held = {name: n for name, n in held_bytes.items() if self.part_of(name) in self.disk}
        most = max(held.values(), default=0)
        found = [name for name, size in held.items() if size * 8 > most]
        if most > _SMALL_BYTES:
            raise ArgumentError(
                f'device_map= puts {listed(sorted(self.disk), 3)} on "disk": their weights have to '
                f"be mapped from a file as they lie in it, and {listed(found, 3)} cannot be. "
                "Processed weights are mapped from a processed copy: save one (save_lean, on a "
                "machine that holds the model, or cache=), and load that; unprocessed ones in the "
                'checkpoint\'s own dtype (mmap=True maps fused matrices, too). Or map to "cpu".'
            )

    def describe(self) -> str:
        """Which parts are where, in a line."""
        at: dict[str, list[str]] = {}
        for part, home in self.homes.items():
            place = "disk" if part in self.disk else str(home)
            moves = "" if self.runs[part] == home else f" (streamed to {self.runs[part]})"
            at.setdefault(place + moves, []).append(part)
        places = "; ".join(f"{place}: {_runs_of(found)}" for place, found in at.items())
        return f"Device map: {places}."


def parts_of(model: nn.Module) -> list[str]:
    """The parts of a model that have parameters or buffers, in order."""
    found = []
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            found += [f"{name}.{index}" for index in range(len(child))]
        elif any(True for _ in (*child.parameters(), *child.buffers())):
            found.append(name)
    return found


def spread(
    model: nn.Module,
    device_map: Any,
    max_memory: Mapping[Any, Any] | None,
    check: Callable[[torch.device], None],
    quantized_bytes: Callable[[], Mapping[str, int]],
) -> Spread:
    """Find where the parts of a model go.

    Args:
        model: the model, on the meta device or with memory that is not filled yet.
        device_map: a mapping of names of modules to devices, or the name of a map that accelerate
            makes.
        max_memory: for the latter: device -> bytes, or a text such as "20GiB".
        check: raises ArgumentError for a device that cannot be used here.
        quantized_bytes: tells the size of the parameters that will be quantized.

    Raises:
        ArgumentError: an unknown or missing module, one inside a block, or an unknown device.
    """
    parts = parts_of(model)
    if isinstance(device_map, str):
        device_map = _inferred(model, parts, device_map, max_memory, quantized_bytes())
    _check_names(model, device_map, parts)
    homes: dict[str, torch.device] = {}
    disk = set()
    missing = []
    for part in parts:
        keys = [key for key in device_map if _covers(key, part)]
        if not keys:
            missing.append(part)
            continue
        given = device_map[max(keys, key=len)]
        if given == "disk":
            disk.add(part)
        homes[part] = _device(part, given)
    if missing:
        raise ArgumentError(
            f"device_map= says nothing of {listed(missing, 5)}. Name every module, or all of the "
            'rest as "": {"": "cpu", "blocks.0": 0}.'
        )
    for device in dict.fromkeys(homes.values()):
        check(device)
    main = next((device for device in homes.values() if device.type != "cpu"), CPU)
    runs = {part: main if home == CPU else home for part, home in homes.items()}
    return Spread(homes, runs, frozenset(disk))


def _covers(key: str, part: str) -> bool:
    return key in ("", part) or part.startswith(f"{key}.")


def _check_names(model: nn.Module, device_map: Mapping[Any, Any], parts: list[str]) -> None:
    modules = {name for name, _ in model.named_modules()}
    for key in device_map:
        if not isinstance(key, str) or key not in modules:
            close = difflib.get_close_matches(str(key), parts, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ArgumentError(
                f"device_map= names {key!r}, which is no module of this model.{hint} Its parts are "
                f"{_runs_of(parts)}."
            )
        inside = next((part for part in parts if key.startswith(f"{part}.")), None)
        if inside is not None:
            raise ArgumentError(
                f"device_map= splits {inside}: {key!r} lies inside of it. A part stays whole on "
                f"one device; map {inside!r}."
            )


def _device(part: str, given: Any) -> torch.device:
    if given == "disk":
        return CPU
    if isinstance(given, int) and not isinstance(given, bool):
        return torch.device("cuda", given)
    try:
        found = torch.device(given)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(
            f"device_map= puts {part} on {given!r}, which is no device: pass a number of a CUDA "
            'device, a name such as "cuda:0" or "cpu", or "disk".'
        ) from error
    if found.type == "meta":
        raise ArgumentError(
            f"device_map= puts {part} on the meta device, which holds no values. For an outline, "
            "see tl_fastload.plan."
        )
    return torch.device("cuda", 0) if found == torch.device("cuda") else found


def _inferred(
    model: nn.Module,
    parts: list[str],
    kind: str,
    max_memory: Mapping[Any, Any] | None,
    quantized_bytes: Mapping[str, int],
) -> dict[str, Any]:
    """accelerate's map, with parts that are not split."""
    from accelerate.utils import (  # type: ignore[import-untyped]
        CustomDtype,
        get_balanced_memory,
        infer_auto_device_map,
    )

    dtypes = {
        name: CustomDtype.INT4 if 3 * size < 2 * model.get_parameter(name).numel() else torch.int8
        for name, size in quantized_bytes.items()
    }
    settings: Any = {
        "no_split_module_classes": sorted({type(model.get_submodule(p)).__name__ for p in parts}),
        "special_dtypes": dtypes,
    }
    limits: Any = None if max_memory is None else dict(max_memory)
    try:
        if kind != "sequential":
            limits = get_balanced_memory(model, max_memory=limits, **settings)
        found: dict[str, Any] = infer_auto_device_map(model, max_memory=limits, **settings)
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ArgumentError(f"max_memory={max_memory!r} is of no use: {error}") from error
    return found


def _runs_of(parts: list[str]) -> str:
    """Names, those that are numbered one after the other as "blocks.0-11"."""
    return ", ".join(_joined(parts))


def _joined(parts: list[str]) -> Iterator[str]:
    start = 0
    for at in range(1, len(parts) + 1):
        if at < len(parts) and _is_next(parts[at - 1], parts[at]):
            continue
        last = parts[at - 1].rpartition(".")[2]
        yield parts[start] if at - start == 1 else f"{parts[start]}-{last}"
        start = at


def _is_next(before: str, name: str) -> bool:
    stem, _, number = before.rpartition(".")
    return number.isdigit() and name == f"{stem}.{int(number) + 1}"
