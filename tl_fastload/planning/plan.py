"""What a load will take, as it is told: on paper, in a notebook, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tl_fastload.ground.boundary import spelt
from tl_fastload.ground.memory_orders import FORWARD
from tl_fastload.ground.role import Role
from tl_fastload.ground.words import against, format_bytes, html_table, text_table

KINDS = ("embedding", "attention", "MLP", "norms and other", "quantized", "buffers")


def kind_of(role: Role) -> str:
    """Which of `KINDS` a parameter that is not quantized belongs to."""
    return role.part if role.part in KINDS else "norms and other"


@dataclass(frozen=True)
class Room:
    """What a load needs on one device at a time, and what that has; in bytes.

    Attributes:
        device: such as "cpu".
        needed_bytes: the most that is held at a time; mapped file pages need none.
        available_bytes: None where that is unknown.
    """

    device: str
    needed_bytes: int
    available_bytes: int | None

    @property
    def fits(self) -> bool:
        return self.available_bytes is None or self.needed_bytes <= self.available_bytes

    def __str__(self) -> str:
        if self.available_bytes is None:
            return f"{format_bytes(self.needed_bytes)} on {self.device}"
        free = format_bytes(self.available_bytes)
        return f"{format_bytes(self.needed_bytes)} of {free} on {self.device}"


@dataclass(frozen=True)
class Choice:
    """Arguments with which a model fits.

    Attributes:
        arguments: to pass to `from_pretrained_lean` instead of what was asked for.
        peak_host_bytes: as in `LoadPlan`.
        peak_device_bytes: as in `LoadPlan`.
        needed_bytes: the most that is held on the fullest device at a time, mapped pages left out.
        mapped_bytes: as in `LoadPlan`.
        streamed_bytes: as in `LoadPlan`.
    """

    arguments: dict[str, Any]
    peak_host_bytes: int
    peak_device_bytes: int | None
    needed_bytes: int
    mapped_bytes: int = 0
    streamed_bytes: int = 0

    def __str__(self) -> str:
        passed = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        mapped = f", {format_bytes(self.mapped_bytes)} mapped" if self.mapped_bytes else ""
        copied = format_bytes(self.streamed_bytes)
        streamed = f", each forward pass copies {copied}" if self.streamed_bytes else ""
        return f"{passed} (needs {format_bytes(self.needed_bytes)}{mapped}{streamed})"


@dataclass(frozen=True)
class LoadPlan:
    """What `from_pretrained_lean` will take, known before it reads weights. Sizes are in bytes.

    Peaks are above what the process holds when the call begins.

    Attributes:
        source: folder, hub name with revision, or "hf_model".
        dtype: dtype of the parameters.
        device: where the parameters go.
        strategy: "assign" or "copy".
        quantization: kind of the quantized weights; None for a model without.
        parameter_bytes: what the loaded model consists of, by kind (`KINDS`); buffers included.
        mapped_bytes: the part of it that is mapped from files instead of held in memory.
        peak_host_bytes: highest resident host memory, file pages included.
        peak_anonymous_bytes: the part of it that is no page of a file: what must be free.
        peak_device_bytes: highest memory on one CUDA device; None without.
        stock_peak_host_bytes: `peak_host_bytes` of TransformerLens' own loader; None where it
            cannot load this.
        stock_peak_anonymous_bytes: the same of `peak_anonymous_bytes`.
        stock_peak_device_bytes: the same of `peak_device_bytes`.
        stock_note: what stock's figures are about, if not about this load.
        disk_bytes: what has to be downloaded, and what the entry of `cache=` will take.
        cache_bytes: the second of these.
        layout: memory order of the parameters, "forward" or "stock".
        available_disk_bytes: what is free where these go, on the fuller disk if there are two;
            None if nothing goes anywhere.
        rooms: need and room on the host and on each device.
        streamed_bytes: of the parts that lie on the host and are copied to a device each time that
            they run.
        seconds: how long planning took, without `advice`.
        notes: anything else worth knowing, in sentences.
        advise: finds `advice`; None for a plan that fits.
    """

    source: str
    dtype: torch.dtype
    device: str
    strategy: str
    quantization: str | None
    parameter_bytes: dict[str, int]
    mapped_bytes: int
    peak_host_bytes: int
    peak_anonymous_bytes: int
    peak_device_bytes: int | None
    stock_peak_host_bytes: int | None
    stock_peak_anonymous_bytes: int | None
    stock_peak_device_bytes: int | None
    stock_note: str | None
    disk_bytes: int
    available_disk_bytes: int | None
    rooms: tuple[Room, ...]
    streamed_bytes: int = 0
    cache_bytes: int = 0
    layout: str = FORWARD
    seconds: float = 0.0
    notes: tuple[str, ...] = field(default=())
    advise: Callable[[], tuple[Choice, ...]] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def advice(self) -> tuple[Choice, ...]:
        """The nearest choices that fit, if this one does not; found when they are first asked
        for.
        """
        return () if self.advise is None else self.advise()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "advice": self.advice, "advise": None}

    @property
    def total_bytes(self) -> int:
        """The whole model: all kinds of `parameter_bytes`."""
        return sum(self.parameter_bytes.values())

    @property
    def available_host_bytes(self) -> int | None:
        """Host memory that can still be had, in this container."""
        return next((room.available_bytes for room in self.rooms if room.device == "cpu"), None)

    @property
    def available_device_bytes(self) -> int | None:
        """Memory that can still be had on the fullest of the devices; None without a device."""
        found = [room.available_bytes for room in self.rooms if room.device != "cpu"]
        return min((free for free in found if free is not None), default=None)

    @property
    def fits_memory(self) -> bool:
        """Whether every device has the memory that is needed."""
        return all(room.fits for room in self.rooms)

    @property
    def fits(self) -> bool:
        """Whether there is memory for the load, and disk space for what it downloads. (A cache
        entry that finds no room is left out, and the load goes on.)
        """
        free, needed = self.available_disk_bytes, self.disk_bytes - self.cache_bytes
        return self.fits_memory and (free is None or needed <= free)

    def rows(self) -> list[tuple[str, str]]:
        """The plan as (label, text) pairs, in reading order."""
        rows = [
            ("source", self.source),
            ("fits", f"{'yes' if self.fits else 'NO'}: {'; '.join(map(str, self.rooms))}"),
            *(("" if n else "instead", str(choice)) for n, choice in enumerate(self.advice)),
            ("dtype, device", f"{str(self.dtype).removeprefix('torch.')}, {self.device}"),
            ("strategy", self.strategy),
        ]
        if self.quantization is not None:
            rows.append(("quantization", self.quantization))
        if self.layout != FORWARD:
            rows.append(("layout", self.layout))
        rows.append(("model", format_bytes(self.total_bytes)))
        rows += [
            (f"  {kind}", f"{format_bytes(size)} ({size / max(self.total_bytes, 1):.0%})")
            for kind, size in self.parameter_bytes.items()
            if size
        ]
        rows.append(("of these mapped", format_bytes(self.mapped_bytes)))
        if self.streamed_bytes:
            rows.append(("copied in each pass", format_bytes(self.streamed_bytes)))
        rows += [
            (label, self._compared(lean, stock))
            for label, lean, stock in (
                ("peak host memory", self.peak_host_bytes, self.stock_peak_host_bytes),
                (
                    "peak anonymous memory",
                    self.peak_anonymous_bytes,
                    self.stock_peak_anonymous_bytes,
                ),
                ("peak device memory", self.peak_device_bytes, self.stock_peak_device_bytes),
            )
            if lean is not None
        ]
        if self.stock_note is not None:
            rows.append(("stock", self.stock_note))
        if self.disk_bytes:
            free = self.available_disk_bytes
            room = "" if free is None else f", {format_bytes(free)} free"
            entry = f" ({format_bytes(self.cache_bytes)} for the cache)" if self.cache_bytes else ""
            rows.append(("disk", f"{format_bytes(self.disk_bytes)}{entry}{room}"))
        rows.append(("planned in", f"{self.seconds:.2f} s"))
        return rows + [("note", note) for note in self.notes]

    def _compared(self, lean: int | None, stock: int | None) -> str:
        text = self._times(lean or 0)
        return text if stock is None else f"{text}; stock {self._times(stock)}"

    def _times(self, size: int) -> str:
        return against(size, self.total_bytes)

    def __str__(self) -> str:
        return text_table("LoadPlan", self.rows())

    def _repr_html_(self) -> str:
        colour = "green" if self.fits else "crimson"
        verdict = "fits" if self.fits else "does not fit"
        return html_table(f"LoadPlan: <b style='color:{colour}'>{verdict}</b>", self.rows())

    @spelt
    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the predicted peaks, lean and stock, against what is available. Needs matplotlib.

        Args:
            path: a file to write as well; its ending says the format, such as ".png" or ".pdf".

        Returns:
            A `matplotlib.figure.Figure`, which notebooks show.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        from tl_fastload.report.pictures.plan import plot_plan

        return plot_plan(self, path)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: dtype as text, tuples as lists, and what properties say."""
        values = {
            **{item.name: getattr(self, item.name) for item in fields(self)},
            "parameter_bytes": dict(self.parameter_bytes),
            "dtype": str(self.dtype).removeprefix("torch."),
            "rooms": [asdict(room) for room in self.rooms],
            "advice": [{**asdict(choice), "text": str(choice)} for choice in self.advice],
            "notes": list(self.notes),
        }
        del values["advise"]
        for name in ("total_bytes", "available_host_bytes", "available_device_bytes", "fits"):
            values[name] = getattr(self, name)
        return values
