"""Run by test_distributed.py, once for each process: `python distributed_lens.py RANK FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from tests.support.several import message_of
from tl_fastload import LeanHookedTransformer, load_weights_, save_lean
from tl_fastload.embedded_model import embedded_model_path
from tl_fastload.lightning.fingerprint import fingerprint, parameters_of
from tl_fastload.lightning.record import record_of

TOKENS = torch.arange(5, 13)[None]


class Probe(nn.Module):
    """A head on a lens."""

    def __init__(self, lens: Any) -> None:
        super().__init__()
        torch.manual_seed(dist.get_rank())  # DistributedDataParallel makes them equal
        self.lens = lens
        self.head = nn.Linear(lens.cfg.d_model, 1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.lens(tokens, stop_at_layer=-1)).square().mean()


def load(**arguments: Any) -> Any:
    return LeanHookedTransformer.from_pretrained_no_processing_lean(
        embedded_model_path(), device="cpu", progress=False, **arguments
    )


def data_parallel(quantize: str | None) -> None:
    """With what does not train left out, as the documentation says."""
    lens = load(quantize=quantize, mmap=True)
    if quantize is not None:
        told = message_of(lambda: DistributedDataParallel(Probe(lens)))
        assert "_set_params_and_buffers_to_ignore_for_model" in told, told
    probe = Probe(lens.requires_grad_(False))
    frozen = [name for name, p in probe.named_parameters() if not p.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(probe, frozen)
    before = [(p._version, id(p)) for p in lens.parameters()]
    parallel = DistributedDataParallel(probe)
    optimizer = torch.optim.SGD(probe.head.parameters(), lr=0.1)
    parallel(TOKENS + dist.get_rank()).backward()
    optimizer.step()
    assert before == [(p._version, id(p)) for p in lens.parameters()]
    heads = [torch.empty_like(probe.head.weight) for _ in range(2)]
    dist.all_gather(heads, probe.head.weight.detach())
    assert torch.equal(*heads)


def check_refused(model: Any, given: dict[str, Any], folder: Path, *words: str) -> None:
    before = [(p._version, id(p)) for p in model.parameters()]
    for road in (
        model.process_weights_,
        lambda: model.load_and_process_state_dict(given),
        lambda: load_weights_(model, given, strict=False),
        lambda: save_lean(model, folder / "copy"),
    ):
        told = message_of(road)
        assert all(word in told for word in words), told
    assert before == [(p._version, id(p)) for p in model.parameters()]


def sharded(folder: Path) -> None:
    """A part of each weight is in each process."""
    whole, parts = load(), load()
    given = {name: p.detach().clone() for name, p in whole.named_parameters()}
    mesh = dist.init_device_mesh("cpu", (2,))
    for module in parts.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                local = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
                module._parameters[name] = nn.Parameter(local)
    check_refused(parts, given, folder, "embed.W_E", "DTensor", "full_tensor")
    assert torch.equal(*(fingerprint(parameters_of(lens))["values"] for lens in (whole, parts)))
    record_of({"lens": parts})
    told = message_of(lambda: whole.load_and_process_state_dict(parts.state_dict()))
    assert "embed.W_E of the state dict is one process's part" in told, told
    whole.blocks[0].mlp = FullyShardedDataParallel(
        whole.blocks[0].mlp, device_id=torch.device("cpu")
    )
    check_refused(whole, given, folder, "blocks.0.mlp", "FSDP")


def main(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for quantize in (None, "8bit", "nf4"):
        data_parallel(quantize)
    sharded(folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
