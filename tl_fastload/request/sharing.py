"""`mesh=` and `parallel=`: which processes share a model, and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from tl_fastload.errors import ArgumentError
from tl_fastload.ground import compat
from tl_fastload.ground.memory_orders import STOCK
from tl_fastload.request.options import DEFAULT_LAYOUT, Options

FULLY, TENSOR = "fsdp", "tp"
_KINDS = (FULLY, TENSOR)
_MAKE = (
    'Make it in each process: torch.distributed.device_mesh.init_device_mesh("cuda", '
    "(n_processes,)), under torchrun."
)


def check_sharing(options: Options, arguments: Mapping[str, Any]) -> None:
    """Raise ArgumentError for a mesh that cannot be used, or what contradicts it."""
    mesh, parallel = options.mesh, options.parallel
    if mesh is None and parallel is None:
        return
    if parallel not in _KINDS:
        raise ArgumentError(f"parallel={parallel!r} is none of {', '.join(map(repr, _KINDS))}.")
    if mesh is None:
        raise ArgumentError(f"parallel={parallel!r} needs mesh=, a DeviceMesh. {_MAKE}")
    why_not = compat.why_no_shards()
    if why_not is not None:
        raise ArgumentError(f"mesh= {why_not}")
    _check_mesh(mesh, arguments)
    if options.quantize is not None:
        raise ArgumentError(
            "mesh= shares dense weights only: quantized bytes cannot be cut yet. Leave quantize= "
            "out, or quantize without mesh=, in each process."
        )
    if not options.assigns:
        raise ArgumentError('mesh= needs strategy="auto": parts take the place of parameters.')
    if parallel == FULLY and options.layout is not DEFAULT_LAYOUT and options.layout != STOCK:
        raise ArgumentError(
            f'parallel="fsdp" keeps parameters row-major, as FSDP2 wants them: layout="stock". '
            f"layout={options.layout!r} contradicts that; leave it out."
        )


def _check_mesh(mesh: Any, arguments: Mapping[str, Any]) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise ArgumentError(
            f"mesh={mesh!r}: there is no process group. Start with torchrun, and call "
            "torch.distributed.init_process_group first."
        )
    if not isinstance(mesh, dist.device_mesh.DeviceMesh):
        raise ArgumentError(f"mesh={mesh!r} is no DeviceMesh. {_MAKE}")
    if mesh.ndim != 1:
        raise ArgumentError(
            f"mesh= has {mesh.ndim} dimensions ({tuple(mesh.shape)}), a model is shared over one: "
            "pass one of them, mesh[name]."
        )
    if mesh.get_coordinate() is None:
        raise ArgumentError("mesh= does not have this process in it: call in those it has, alone.")
    device = arguments["device"]
    if device is not None and torch.device(device).type != mesh.device_type:
        raise ArgumentError(
            f"device={device!r} contradicts mesh=, whose parts lie on {mesh.device_type}: leave it "
            "out."
        )
    if arguments["n_devices"] != 1 or not arguments["move_to_device"]:
        raise ArgumentError("mesh= says where parts lie: leave n_devices= and move_to_device= out.")
