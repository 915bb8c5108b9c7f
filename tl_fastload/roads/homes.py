"""Where each parameter of a call's model goes: as `device_map=` says, or where its road puts it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from tl_fastload.ground.sizes import bytes_of
from tl_fastload.placement.spread import Spread, spread
from tl_fastload.report.available import available_bytes
from tl_fastload.request.contradictions import check_usable
from tl_fastload.roads.road import Request


def homes(
    request: Request, model: Any, quantized_bytes: Callable[[], Mapping[str, int]]
) -> tuple[Callable[[str], torch.device], Spread | None]:
    """The device of each parameter and buffer by its name, and the parts of a model with a device
    map; its configuration learns where it begins to run.

    Args:
        request: the call.
        model: its model, without values.
        quantized_bytes: tells the sizes of the parameters that are, or will be, quantized.

    Raises:
        ArgumentError: a device map that does not fit the model or this machine.
    """
    options = request.options
    device_map, max_memory = options.device_map, options.max_memory
    n_devices = request.arguments["n_devices"]
    if device_map is None and n_devices > 1 and request.road.counts_devices:
        devices = [torch.device("cuda", index) for index in range(n_devices)]
        device_map = "balanced"
        max_memory = {device.index: available_bytes(device) for device in devices}
    if device_map is None:
        return request.road.device_map(model, request.arguments["move_to_device"]), None

    def check(device: torch.device) -> None:
        check_usable(device, f"device_map= names {device}, which")

    def sizes() -> Mapping[str, int]:
        tensors = (*model.named_parameters(), *model.named_buffers())
        return {**{name: bytes_of(tensor) for name, tensor in tensors}, **quantized_bytes()}

    parts = request.road.parts(model)
    found = spread(parts, device_map, max_memory, check, sizes)
    model.cfg.device = str(found.begins_on)
    if request.road.counts_devices:
        model.cfg.n_devices = len(found.devices)
    return found.home_of, found
