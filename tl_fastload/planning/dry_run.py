"""A load as far as it goes without weights, and what the rest of it needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from tl_fastload.ground.own_defaults import looking_only, own_defaults
from tl_fastload.ground.role import RoleOf
from tl_fastload.ground.sizes import bytes_of
from tl_fastload.huggingface.pretrained import Pretrained
from tl_fastload.loading.checks import check_recipes
from tl_fastload.loading.load import placer_for, record
from tl_fastload.placement.placer import Placer
from tl_fastload.placement.rehearsal import Forecast, forecast
from tl_fastload.planning.plan import Room
from tl_fastload.planning.stock_memory import StockLedger
from tl_fastload.quantized.quantizer import Quantizer
from tl_fastload.report.available import available_bytes
from tl_fastload.report.progress import Progress
from tl_fastload.roads.road import Recording, Request
from tl_fastload.source.reader import FileReader

CPU = torch.device("cpu")
# What a load leaves beside tensors: modules, tables, the interpreter's heap. Between 8 and 16 MB
# for models of 22 to 24 layers (benchmarks/results).
OBJECTS_BYTES = 10 << 20
# Library code that loading runs for the first time: 10 to 14 MB there.
CODE_BYTES = 12 << 20
# The system brings in file pages around the one that is read: 64 KiB to 2 MiB, by kernel and
# file system. This is for the two ends of each mapped parameter.
_READ_AROUND_BYTES = 1 << 20
# transformers holds a quantized model and its dequantized copy for a while.
_DEQUANTIZING_COPIES = 2


@dataclass
class Draft:
    """A load as far as it goes without weights.

    Attributes:
        request: the call.
        recording: what it would place; the model is on the meta device.
        pretrained: where the weights would come from.
        placer: what would place the recipes.
        ledger: what stock would need, if it was asked for.
    """

    request: Request
    recording: Recording
    pretrained: Pretrained
    placer: Placer
    ledger: StockLedger | None

    @classmethod
    def of(cls, request: Request, ledger: StockLedger | None = None) -> Draft:
        """Record a load; reads the configuration and the headers, no weights.

        Args:
            request: the call, resolved.
            ledger: counts what stock would need.

        Raises:
            LeanLoadError: what the load itself would raise.
        """
        reader = FileReader()
        try:
            with torch.inference_mode(False), own_defaults():
                recording = record(request, reader, headers_only=True, observer=ledger)
                check_recipes(recording)
                pretrained = recording.pretrained
                assert pretrained is not None
                pretrained.root = None
                placer = placer_for(request, recording, Progress(False))
                reader.files.check_all()
        finally:
            reader.close()
        return cls(request, recording, pretrained, placer, ledger)

    @property
    def model(self) -> Any:
        """The model, on the meta device."""
        return self.recording.model

    @property
    def role(self) -> RoleOf:
        """What each parameter of the model is."""
        return self.request.road.role

    def forecast(self, quantizer: Quantizer | None = None, n_layers: int | None = None) -> Forecast:
        """What placing takes.

        Args:
            quantizer: another one than the load's own.
            n_layers: of the first layers only.
        """
        recipes = {n: r for n, r in self.recording.recipes.items() if self._is_within(n, n_layers)}
        placer = self.placer if quantizer is None else replace(self.placer, quantizer=quantizer)
        return forecast(placer, recipes)

    @looking_only
    def buffer_bytes(self, n_layers: int | None = None) -> dict[torch.device, int]:
        """Bytes of the buffers on each device."""
        sizes: dict[torch.device, int] = {}
        for name, buffer in self.model.named_buffers():
            if self._is_within(name, n_layers):
                device = self.placer.device_of(name)
                sizes[device] = sizes.get(device, 0) + bytes_of(buffer)
        return sizes

    def streamed_bytes(self, found: Forecast) -> int:
        """What each forward pass copies to where it runs."""
        if self.placer.spread is None:
            return 0
        sizes = {name: bytes_of(tensor) for name, tensor in self.placer.targets().items()}
        return sum(self.placer.spread.streamed_bytes({**sizes, **found.quantized_bytes}).values())

    def _is_within(self, name: str, n_layers: int | None) -> bool:
        """Whether a parameter is in the first layers, or in none."""
        layer = None if n_layers is None else self.role(name).layer
        return n_layers is None or layer is None or layer < n_layers


@dataclass(frozen=True)
class Needs:
    """The most that a load holds at a time, in bytes.

    Attributes:
        by_device: on each device, mapped file pages left out; the host is always there.
        resident_bytes: on the host, file pages included.
    """

    by_device: dict[torch.device, int]
    resident_bytes: int

    @classmethod
    def of(cls, draft: Draft, found: Forecast, n_layers: int | None = None) -> Needs:
        """What a load needs whose placing takes what was `found`."""
        buffers, peaks = draft.buffer_bytes(n_layers), found.peak_bytes
        devices = {device for device in (*peaks, *buffers) if device.type != "cpu"}
        # Buffers are made on the host, wherever they go.
        host = OBJECTS_BYTES + sum(buffers.values()) + peaks.get(CPU, 0) + found.scratch_bytes
        pages = CODE_BYTES + found.seen_bytes
        pages += _READ_AROUND_BYTES * found.seen_parameters
        if draft.request.options.dequantize and draft.pretrained.hf_model is not None:
            held = sum(map(bytes_of, draft.pretrained.hf_model.parameters()))
            host = max(host + held, OBJECTS_BYTES + _DEQUANTIZING_COPIES * held)
        checkpoint = draft.pretrained.checkpoint
        if checkpoint is not None and not checkpoint.entries:
            # Torch files are held until the end: in memory, or mapped.
            whole = checkpoint.read_whole_bytes(mmap=draft.placer.maps is not None)
            host += whole
            pages += checkpoint.weight_bytes - whole
        needed = {device: peaks.get(device, 0) + buffers.get(device, 0) for device in devices}
        for device, size in draft.placer.streaming_bytes(found.quantized_bytes).items():
            needed[device] = needed.get(device, 0) + size
        return cls({CPU: host, **needed}, host + pages)

    @property
    def peak_device_bytes(self) -> int | None:
        """The most on one device other than the host; None without one."""
        others = [size for device, size in self.by_device.items() if device.type != "cpu"]
        return max(others, default=None)

    def rooms(self) -> tuple[Room, ...]:
        """Need and room on each device."""
        return tuple(
            Room(str(device), size, available_bytes(device))
            for device, size in self.by_device.items()
        )
