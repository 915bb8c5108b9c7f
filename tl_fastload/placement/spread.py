"""A model over several devices: where each of its parts lies, and where it runs.

A part is a block, or a module beside the blocks (an embedding, the last norm); it is never split.
What belongs to no part, such as tables beside the blocks, lies where the first block runs. Parts on
"cpu" and "disk" run on the first other device, if there is one: their tensors are streamed there
while they run (`tl_fastload.placement.streaming`), and stay at home, mapped from a file where they
can be.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from tl_fastload.errors import ArgumentError
from tl_fastload.ground.words import listed

# Biases and norms that no file has are in memory in any case.
_SMALL_BYTES = 1 << 20
# Before a part's name in what accelerate is shown, which takes "embed" for a part of "unembed".
_MARK = "/"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Parts:
    """The parts of a model, in the order in which they run.

    Attributes:
        places: part -> what the names of its tensors begin with; a map may call it so, too.
        tied: parts that hold one memory, together.
        tables: modules beside them without parameters; a map may name them, and moves nothing.
        why_one_device: why all of them have to run on one device; None if they need not.
    """

    places: dict[str, str]
    tied: tuple[frozenset[str], ...] = ()
    tables: frozenset[str] = frozenset()
    why_one_device: str | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Parts:
        """Those of a model whose parts are its children, and the items of its lists."""
        found, tables = [], set()
        for name, child in model.named_children():
            if isinstance(child, nn.ModuleList):
                found += [f"{name}.{index}" for index in range(len(child))]
            elif any(True for _ in (*child.parameters(), *child.buffers())):
                found.append(name)
            else:
                tables.add(name)
        return cls({part: part for part in found}, tables=frozenset(tables))

    @cached_property
    def _owners(self) -> dict[str, str]:
        return {name: part for part, at in self.places.items() for name in (part, at)}

    def part_of(self, name: str) -> str | None:
        """The part that a parameter or a buffer belongs to; None for names of no part."""
        path = name.split(".")
        above = (".".join(path[:depth]) for depth in range(len(path), 0, -1))
        return next((self._owners[at] for at in above if at in self._owners), None)


@dataclass(frozen=True)
class Spread:
    """Parts over devices.

    Attributes:
        homes: part -> where its parameters and buffers lie.
        runs: part -> where it computes.
        disk: the parts whose parameters have to be mapped from a file.
        places: part -> what the names of its tensors begin with, if not with its name.
    """

    homes: dict[str, torch.device]
    runs: dict[str, torch.device]
    disk: frozenset[str] = frozenset()
    places: dict[str, str] = field(default_factory=dict)

    @cached_property
    def _parts(self) -> Parts:
        return Parts(self.places or {part: part for part in self.homes})

    def part_of(self, name: str) -> str | None:
        """As `Parts.part_of`."""
        return self._parts.part_of(name)

    def home_of(self, name: str) -> torch.device:
        """Where a parameter or a buffer lies."""
        part = self.part_of(name)
        return self.begins_on if part is None else self.homes[part]

    @property
    def devices(self) -> list[torch.device]:
        """On which parts lie or run."""
        return list(dict.fromkeys((*self.homes.values(), *self.runs.values())))

    @property
    def begins_on(self) -> torch.device:
        """Where the first block runs."""
        blocks = [device for part, device in self.runs.items() if "." in part]
        return [*blocks, *self.runs.values()][0]

    @property
    def streamed(self) -> list[str]:
        """The parts that run elsewhere than they lie."""
        return [part for part, home in self.homes.items() if self.runs[part] != home]

    def streamed_bytes(self, size_of: Mapping[str, int]) -> dict[str, int]:
        """What each part that is streamed takes: all of them are copied in each forward pass.

        Args:
            size_of: bytes of each parameter and buffer.
        """
        sizes = dict.fromkeys(self.streamed, 0)
        for name, size in size_of.items():
            part = self.part_of(name)
            if part in sizes:
                sizes[part] += size
        return sizes

    def streaming_bytes(self, size_of: Mapping[str, int]) -> dict[torch.device, int]:
        """What streaming takes on each device: the largest part that comes there, and the next.

        Args:
            size_of: bytes of each parameter and buffer.
        """
        needed: dict[torch.device, int] = {}
        for part, size in self.streamed_bytes(size_of).items():
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


def spread(
    parts: Parts,
    device_map: Any,
    max_memory: Mapping[Any, Any] | None,
    check: Callable[[torch.device], None],
    sizes: Callable[[], Mapping[str, int]],
) -> Spread:
    """Find where the parts of a model go.

    Args:
        parts: of the model.
        device_map: a mapping of names of modules to devices, or the name of a map that accelerate
            makes.
        max_memory: for the latter: device -> bytes, or a text such as "20GiB".
        check: raises ArgumentError for a device that cannot be used here.
        sizes: tells the bytes that each parameter and buffer will have.

    Raises:
        ArgumentError: an unknown or missing module, one inside a block, or an unknown device.
    """
    if isinstance(device_map, str):
        device_map = _inferred(parts, device_map, max_memory, sizes())
    covered = _covered(device_map, parts)
    homes: dict[str, torch.device] = {}
    disk = set()
    missing = []
    for part in parts.places:
        keys = [key for key, names in covered.items() if part in names]
        if not keys:
            missing.append(part)
            continue
        given = device_map[min(keys, key=lambda key: (len(covered[key]), -len(key)))]
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
    _check_together(parts, homes, runs)
    return Spread(homes, runs, frozenset(disk), parts.places)


def _check_together(
    parts: Parts, homes: Mapping[str, torch.device], runs: Mapping[str, torch.device]
) -> None:
    for tied in parts.tied:
        if len({homes[part] for part in tied}) > 1:
            found = ", ".join(f"{part} on {homes[part]}" for part in sorted(tied))
            raise ArgumentError(
                f"device_map= takes apart what is one memory in this model (tied weights): "
                f"{found}. Map these parts to one device."
            )
    if parts.why_one_device is not None and len(set(runs.values())) > 1:
        found = ", ".join(sorted({str(device) for device in runs.values()}))
        raise ArgumentError(
            f"device_map= lets parts run on {found}, and {parts.why_one_device}. Map all parts to "
            'one of them; those on "cpu" or "disk" run there, too.'
        )


def _covered(device_map: Mapping[Any, Any], parts: Parts) -> dict[str, list[str]]:
    """The parts that each name in a map means."""
    found = {}
    for key in device_map:
        both = parts.places.items()
        names = [part for part, at in both if key == "" or _is_within(key, part, at)]
        if not names and key not in parts.tables:
            inside = next((p for p, at in both if _is_within(p, key) or _is_within(at, key)), None)
            if inside is not None:
                raise ArgumentError(
                    f"device_map= splits {inside}: {key!r} lies inside of it. A part stays whole "
                    f"on one device; map {inside!r}."
                )
            known = [name for pair in both for name in pair]
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ArgumentError(
                f"device_map= names {key!r}, which is no module of this model.{hint} Its parts are "
                f"{_runs_of(list(parts.places))}."
            )
        found[key] = names
    return found


def _is_within(key: str, *names: Any) -> bool:
    """Whether any of these names is a key, or lies inside of it."""
    return any(name == key or str(name).startswith(f"{key}.") for name in names)


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
    parts: Parts, kind: str, max_memory: Mapping[Any, Any] | None, sizes: Mapping[str, int]
) -> dict[str, Any]:
    """accelerate's map of the parts, which are not split, by the bytes that they will have."""
    from accelerate.utils import (  # type: ignore[import-untyped]
        get_balanced_memory,
        infer_auto_device_map,
    )

    outline = _outline(parts, sizes)
    kinds = sorted({type(outline.get_submodule(_MARK + part)).__name__ for part in parts.places})
    limits: Any = None if max_memory is None else dict(max_memory)
    try:
        if kind != "sequential":
            limits = get_balanced_memory(outline, max_memory=limits, no_split_module_classes=kinds)
        found: dict[str, Any] = infer_auto_device_map(
            outline, max_memory=limits, no_split_module_classes=kinds
        )
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ArgumentError(f"max_memory={max_memory!r} is of no use: {error}") from error
    found = {key.removeprefix(_MARK): device for key, device in found.items()}
    covered = _covered(found, parts)
    by_part = {part: found[key] for key, names in covered.items() for part in names}
    for tied in parts.tied:  # which accelerate takes apart where they do not fit together
        first = next(part for part in parts.places if part in tied)
        by_part.update(dict.fromkeys(tied, by_part[first]))
    return by_part


def _outline(parts: Parts, sizes: Mapping[str, int]) -> nn.Module:
    """A module with the parts' names, marked, in which each has as many bytes as it will have."""
    bytes_in = dict.fromkeys(parts.places, 0)
    for name, size in sizes.items():
        part = parts.part_of(name)
        if part is not None:
            bytes_in[part] += size
    outline = nn.Module()
    # The bytes of what is tied are those of the part that has its name.
    together = [nn.Parameter(torch.empty(0, device="meta"), False) for _ in parts.tied]
    for part, size in bytes_in.items():
        stem, _, index = (_MARK + part).rpartition(".")
        kind: Any = type(stem or index, (nn.Module,), {})
        one = kind()
        one.bytes = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), False)
        for number, tied in enumerate(parts.tied):
            if part in tied:
                one.register_parameter(f"tied_{number}", together[number])
        if stem and stem not in dict(outline.named_children()):
            outline.add_module(stem, nn.Module())
        outline.get_submodule(stem).add_module(index, one)
    return outline


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
