"""Run by tests/shards/test_whole.py in several processes, as under torchrun.

Every process checks the same, so that a difference in one of them fails the test.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.support.counting import AllocatedBytes
from tests.support.several import (
    TOKENS,
    CountingReader,
    check_close,
    check_equal,
    check_resuming,
    check_uses,
    message_of,
)
from tl_fastload import (
    LeanHookedTransformer,
    NumbersWarning,
    load_weights_,
    save_lean,
)
from tl_fastload.ground.sizes import bytes_of
from tl_fastload.lightning import FrozenSubmodulesMixin
from tl_fastload.lightning.fingerprint import fingerprint, parameters_of
from tl_fastload.loading import load as loading
from tl_fastload.memory_map import memory_map
from tl_fastload.report.memory import stored_parts


@contextmanager
def placing_under(mode: AllocatedBytes) -> Iterator[None]:
    """The empty model, whose memory nobody touches, is made before."""
    place = loading.place

    def counted(*args: Any) -> Any:
        with mode:
            return place(*args)

    loading.place = counted
    try:
        yield
    finally:
        loading.place = place


def load(name: Path, mesh: Any = None, parallel: str | None = None, **arguments: Any) -> Any:
    device = "cpu" if mesh is None else None
    return LeanHookedTransformer.from_pretrained_lean(
        name, device=device, mesh=mesh, parallel=parallel, progress=False, **arguments
    )


def check_refused(model: Any, given: dict[str, torch.Tensor], folder: Path) -> None:
    """What works on a model's own values says so, and changes nothing."""
    before = [(p.to_local().data_ptr(), p._version) for p in model.parameters()]
    for action in (
        model.process_weights_,
        lambda: model.load_and_process_state_dict(given),
        lambda: load_weights_(model, given),
        lambda: save_lean(model, folder / "refused"),
        lambda: model.to_layout_("forward"),
    ):
        assert "DTensor" in message_of(action)
    for action in (lambda: pickle.dumps(model), lambda: copy.deepcopy(model)):
        try:
            action()
        except (pickle.PicklingError, AssertionError):
            continue
        raise AssertionError("copied a part of a model")
    assert before == [(p.to_local().data_ptr(), p._version) for p in model.parameters()]
    states = {part.state for part in memory_map(model)}
    assert states <= {"dense", "mapped"}, states


def check_arguments(mesh: Any, name: Path) -> None:
    two_dimensional = dist.init_device_mesh("cpu", (1, mesh.size()))
    for arguments, word in (
        ({"mesh": mesh, "parallel": "ddp"}, "'ddp'"),
        ({"mesh": mesh}, "parallel=None"),
        ({"parallel": "fsdp"}, "needs mesh="),
        ({"mesh": "cpu", "parallel": "fsdp"}, "no DeviceMesh"),
        ({"mesh": two_dimensional, "parallel": "fsdp"}, "2 dimensions"),
        ({"mesh": mesh, "parallel": "fsdp", "quantize": "nf4"}, "quantize="),
        ({"mesh": mesh, "parallel": "fsdp", "layout": "forward"}, "layout="),
        ({"mesh": mesh, "parallel": "fsdp", "device_map": "auto"}, "device_map="),
        ({"mesh": mesh, "parallel": "fsdp", "strategy": "copy"}, "strategy="),
        ({"mesh": mesh, "parallel": "fsdp", "move_to_device": False}, "move_to_device="),
    ):
        told = message_of(lambda given=arguments: load(name, **given))
        assert word in told, told
    told = message_of(
        lambda: LeanHookedTransformer.plan(name, mesh=mesh, parallel="fsdp", device="cpu")
    )
    assert "one process" in told


def fully(folder: Path, mesh: Any) -> None:
    """Two processes: equal numbers, little read, little held."""
    for case, most in (("gpt2", 1.5), ("llama", 1.1)):
        name = folder / case
        file_bytes = sum(file.stat().st_size for file in name.glob("*.safetensors"))
        reference = load(name, layout="stock")
        held_bytes = sum(map(bytes_of, reference.parameters()))
        largest_bytes = max(map(bytes_of, reference.parameters()))
        allocated = AllocatedBytes()
        with CountingReader() as counted, placing_under(allocated):
            model = load(name, mesh, "fsdp", mmap=False)
        assert counted.total() <= most * file_bytes, (case, counted.total() / file_bytes)
        own_bytes = sum(bytes_of(parameter.to_local()) for parameter in model.parameters())
        assert own_bytes <= 0.51 * held_bytes
        assert model.load_report.parameter_bytes == own_bytes
        assert allocated.peak <= 1.1 * (own_bytes + largest_bytes), allocated.peak / own_bytes
        check_equal(model, reference)
        check_uses(model, reference, "blocks.1.attn.hook_z")
        assert torch.equal(model.W_Q.full_tensor(), reference.W_Q)
    given = {key: value.clone() for key, value in reference.state_dict().items()}
    check_refused(model, given, folder)
    if dist.get_rank() == 0:
        save_lean(reference, folder / "copy")
    dist.barrier()
    from_copy = load(folder / "copy", mesh, "fsdp")
    check_equal(from_copy, reference)
    assert from_copy.load_report.mapped_bytes > 0
    check_resuming(model, lambda: load(name, mesh, "fsdp"), folder / "states")
    check_arguments(mesh, name)


def tensor(folder: Path, mesh: Any) -> None:
    """Two processes with half of the heads and columns each."""
    for case in ("gpt2", "llama"):
        reference = load(folder / case)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model = load(folder / case, mesh, "tp")
        assert any(issubclass(one.category, NumbersWarning) for one in told)
        check_equal(model, reference)
        own, all_of_it = (
            sum(bytes_of(stored_parts(p)[0]) for p in one.blocks.parameters())
            for one in (model, reference)
        )
        assert own <= 0.52 * all_of_it
        check_close(model, reference)
    assert "DTensor" in message_of(model.process_weights_)
    check_equal(load(folder / "copy", mesh, "tp"), reference)
    assert "num_experts" in message_of(lambda: load(folder / "mixtral", mesh, "tp"))


def tensor_others(folder: Path, mesh: Any) -> None:
    """What other architectures do between heads: windows, soft caps, norms, parallel layers."""
    for case in ("gemma2", "gemma3", "gpt-neo", "neox"):
        # Nothing but rounding may differ, and in float64 there is next to none.
        exact = {"dtype": torch.float64}
        reference = load(folder / case, **exact)
        model = load(folder / case, mesh, "tp", **exact)
        check_equal(model, reference)
        is_part = [hasattr(p, "full_tensor") for p in model.blocks[1].attn.parameters()]
        assert any(is_part), case
        check_close(model, reference, 1e-10)


def awkward(folder: Path, mesh: Any) -> None:
    """Three processes: sizes that do not divide, nothing processed, one that fails."""
    for case in ("gpt2-odd", "llama-gqa1-tied", "mixtral", "apertus"):
        name = folder / case
        for on in (True, False):
            steps = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed"), on)
            steps["fold_value_biases"] = on
            reference = load(name, layout="stock", **steps)
            model = load(name, mesh, "fsdp", **steps)
            check_equal(model, reference)
            assert torch.equal(model(TOKENS), reference(TOKENS)), case
    rank = dist.get_rank()
    lacking = folder / ("nowhere" if rank == 1 else case)
    told = message_of(lambda: load(lacking, mesh, "fsdp"))
    assert "nowhere" in told, told
    assert rank == 1 or "Process 1 of 3" in told, told
    other = folder / ("mixtral" if rank == 2 else case)
    told = message_of(lambda: load(other, mesh, "fsdp"))
    assert "Processes 0 and 2 of 3" in told, told
    assert torch.equal(load(name, mesh, "fsdp")(TOKENS), load(name)(TOKENS))


class Probe(FrozenSubmodulesMixin, nn.Module):
    """A head on a lens, without Lightning."""

    frozen_submodules = ("lens",)

    def __init__(self, lens: Any) -> None:
        super().__init__()
        self.lens = lens
        self.head = nn.Linear(lens.cfg.d_model, 1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.lens(tokens, stop_at_layer=-1)).square().mean()


def pages_of(folder: Path) -> dict[str, int]:
    """Bytes of a folder's files that are mapped here: Rss, Pss (shared ones in parts), private."""
    found = dict.fromkeys(("Rss", "Pss", "Private_Dirty"), 0)
    is_ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, rest = line.partition(":")
        if "-" in key.split()[0]:
            is_ours = str(folder) in line
        elif is_ours and key in found:
            found[key] += int(rest.split()[0]) << 10
    return found


def beside(folder: Path, mesh: Any) -> None:
    """Data parallel training beside a lens that all processes map: its bytes are there once."""
    if dist.get_rank() == 0:
        save_lean(load(folder / "gpt2-odd"), folder / "copy")
    dist.barrier()
    probe = Probe(load(folder / "copy"))
    assert sum(float(parameter.sum()) for parameter in probe.lens.parameters())  # all pages here
    parallel = DistributedDataParallel(probe)
    optimizer = torch.optim.SGD(probe.head.parameters(), lr=0.1)
    parallel(TOKENS + dist.get_rank()).backward()
    optimizer.step()
    assert not any("lens" in name for name in parallel.state_dict())
    pages = pages_of(folder / "copy")
    file_bytes = sum(file.stat().st_size for file in (folder / "copy").glob("*.safetensors"))
    assert pages["Rss"] >= 0.9 * file_bytes
    assert pages["Private_Dirty"] == 0
    together = torch.tensor([pages["Pss"]])
    dist.all_reduce(together)
    assert together <= 1.1 * file_bytes, together / file_bytes
    lenses = (load(folder / "gpt2-odd", mesh, "fsdp"), load(folder / "gpt2-odd"))
    assert torch.equal(*(fingerprint(parameters_of(lens))["values"] for lens in lenses))


PARTS = {
    "fully": fully,
    "tensor": tensor,
    "tensor-others": tensor_others,
    "awkward": awkward,
    "beside": beside,
}


def main(folder: Path, parts: list[str]) -> None:
    assert "torchrun" in message_of(lambda: load(folder / "gpt2", "cpu", "fsdp"))
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for part in parts:
        PARTS[part](folder, mesh)
    dist.destroy_process_group()
