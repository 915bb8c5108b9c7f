"""Run by tests/shards/test_bridge.py in several processes, as under torchrun.

Every process checks the same, so that a difference in one of them fails the test.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support.several import (
    CountingReader,
    check_close,
    check_equal,
    check_resuming,
    check_uses,
    message_of,
)
from tl_fastload import LeanTransformerBridge, load_weights_, save_lean
from tl_fastload.ground.sizes import bytes_of
from tl_fastload.source.reader import FileReader

LOADS = {
    "processed": LeanTransformerBridge.from_pretrained_lean,
    "raw": LeanTransformerBridge.boot_transformers_lean,
}


def check_one(load: Callable[..., Any], name: Path, mesh: Any, most: float) -> Any:
    """A bridge in parts is the bridge of one process; returns it and that one."""
    # Products over memory that begins anywhere, as mapped memory does, round otherwise.
    reference = load(name, device="cpu", mmap=False)
    file_bytes = sum(file.stat().st_size for file in name.rglob("*.safetensors"))
    with CountingReader() as counted:
        model = load(name, mesh=mesh, parallel="fsdp", mmap=False)
    assert counted.total() <= most * file_bytes, (name, counted.total() / file_bytes)
    held_bytes = sum(map(bytes_of, reference.parameters()))
    own_bytes = sum(bytes_of(parameter.to_local()) for parameter in model.parameters())
    assert own_bytes <= 0.51 * held_bytes
    assert model.load_report.parameter_bytes == own_bytes
    check_equal(model, reference)
    check_uses(model, reference, "blocks.1.hook_out")
    return model, reference


def check_refused(model: Any, name: Path, mesh: Any) -> None:
    """What works on a bridge's own values says so, and changes nothing."""
    before = [(p.to_local().data_ptr(), p._version) for p in model.parameters()]
    given = LOADS["raw"](name, device="cpu").original_model.state_dict()
    for action in (
        model.enable_compatibility_mode,
        model.process_weights_,
        lambda: load_weights_(model, given),
        lambda: save_lean(model, name / "refused"),
        lambda: model.to_layout_("forward"),
    ):
        assert "DTensor" in message_of(action)
    assert before == [(p.to_local().data_ptr(), p._version) for p in model.parameters()]
    read = FileReader.read
    FileReader.read = None  # type: ignore[assignment,method-assign]  # nothing is read
    shared = {"mesh": mesh, "parallel": "fsdp"}
    for load in LOADS.values():
        assert "needs mesh=" in message_of(partial(load, name, parallel="fsdp"))
    in_memory = {"load_weights": False}, {"hf_model": torch.nn.Linear(1, 1)}
    for arguments in in_memory:
        assert "mesh=" in message_of(partial(LOADS["raw"], name, **arguments, **shared))
    assert "quantize=" in message_of(partial(LOADS["processed"], name, quantize="nf4", **shared))
    FileReader.read = read  # type: ignore[method-assign]


def check_tensors(load: Callable[..., Any], name: Path, mesh: Any) -> None:
    """Half of the heads and columns in each process, compared where next to nothing is rounded."""
    exact = {"dtype": torch.float64, "mmap": False}
    reference = load(name, device="cpu", **exact)
    model = load(name, mesh=mesh, parallel="tp", **exact)
    check_equal(model, reference)
    shared = [p for p in model.blocks.parameters() if hasattr(p, "full_tensor")]
    assert sum(map(torch.numel, shared)) >= 0.7 * sum(map(torch.numel, model.blocks.parameters()))
    hooks = ("attn.hook_z", "attn.hook_pattern", "mlp.hook_post")
    check_close(model, reference, 1e-10, hooks)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for case, most in (("gpt2", 1.1), ("llama", 1.05)):
        for kind, load in LOADS.items():
            model, reference = check_one(load, folder / case, mesh, most)
            copy = folder / f"{case}-{kind}"
            if dist.get_rank() == 0:
                save_lean(reference, copy)
            dist.barrier()
            check_tensors(load, folder / case, mesh)
            from_copy, _ = check_one(load, copy, mesh, 1.01)
            mapped = load(copy, mesh=mesh, parallel="fsdp")
            assert mapped.load_report.mapped_bytes > 0
            check_equal(mapped, reference)
        check_equal(load(copy, mesh=mesh, parallel="tp"), reference)
        check_refused(model, folder / case, mesh)
        again = partial(load, copy, mesh=mesh, parallel="fsdp")
        check_resuming(from_copy, again, folder / "states", lambda m: m.original_model)
    experts = partial(load, folder / "mixtral", mesh=mesh, parallel="tp")
    assert "mlp.gate.weight is of neither" in message_of(experts)
    dist.destroy_process_group()
