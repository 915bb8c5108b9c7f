"""Calls that spread a model over the devices that there are, within what these have left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tl_fastload.report.available import available_bytes
from tl_fastload.report.memory import cuda_is_in_use
from tl_fastload.request.contradictions import device_asked_for
from tl_fastload.roads.road import Request

# Of what is free; the rest is for copies of the parts that are streamed, and for working memory.
_SHARES = (0.95, 0.8, 0.6, 0.4)


def over_devices(request: Request) -> Iterator[tuple[dict[str, Any], Request]]:
    """Arguments for an automatic map, and the call with them: those that use most of the devices
    first. None where no CUDA device is asked for or used: nothing begins to use it here.
    """
    options, arguments = request.options, request.arguments
    wants = options.device_map is not None or device_asked_for(arguments).type == "cuda"
    if options.mesh is not None or not (wants or cuda_is_in_use()):
        return
    there = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    rooms = {index: available_bytes(torch.device("cuda", index)) for index in there}
    rooms |= {"cpu": available_bytes(torch.device("cpu"))} if rooms else {}  # type: ignore[dict-item]
    plain = {"device": None, "n_devices": 1, "move_to_device": True}
    dropped = {n: value for n, value in plain.items() if arguments[n] != value}
    for share in _SHARES if rooms else ():
        limits = {name: _text(share * (size or 0)) for name, size in rooms.items()}
        spread = {"device_map": "auto", "max_memory": limits}
        yield {**dropped, **spread}, request.changed(**dropped).with_options(**spread)


def _text(size_bytes: float) -> str:
    """A limit as one writes it, rounded down."""
    for unit, size in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size_bytes >= 10 << size:
            return f"{int(size_bytes) >> size}{unit}"
    return f"{int(size_bytes) >> 10}KiB"
