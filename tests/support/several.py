"""What models in several processes are checked for, of either of TransformerLens' classes.

Every process checks the same, so that a difference in one of them fails the test.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from tl_fastload import LeanLoadError
from tl_fastload.source.reader import FileReader

TOKENS = torch.arange(3, 14)[None]


def message_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except LeanLoadError as error:
        return str(error)
    raise AssertionError("no error")


class CountingReader:
    """Counts the bytes that are read of files, in all processes together."""

    def __init__(self) -> None:
        self._read = FileReader.read
        self._bytes = 0

    def __enter__(self) -> CountingReader:
        def read(reader: FileReader, path: Path, offset: int, out: torch.Tensor) -> None:
            self._bytes += out.numel()
            self._read(reader, path, offset, out)

        FileReader.read = read  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: Any) -> None:
        FileReader.read = self._read  # type: ignore[method-assign]

    def total(self) -> int:
        total = torch.tensor([self._bytes])
        dist.all_reduce(total)
        return int(total)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check_equal(model: Any, reference: Any) -> None:
    wanted = dict(reference.named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == wanted.keys()
    for name, parameter in found.items():
        assert torch.equal(whole(parameter.detach()), wanted[name]), name
        assert parameter.requires_grad == wanted[name].requires_grad, name


def zero_a_position(value: torch.Tensor, hook: Any) -> torch.Tensor:
    value[:, 1] = 0
    return value


def check_uses(model: Any, reference: Any, hook: str) -> None:
    """Forward, caches, hooks, gradients and generation, and nothing stays whole behind them."""
    found, cache = model.run_with_cache(TOKENS)
    wanted, known = reference.run_with_cache(TOKENS)
    assert torch.equal(found, wanted)
    assert all(torch.equal(cache[name], known[name]) for name in known)
    hooks = [(hook, zero_a_position)]
    found, wanted = (m.run_with_hooks(TOKENS, fwd_hooks=hooks) for m in (model, reference))
    assert torch.equal(found, wanted)
    for arguments in ({"return_type": "loss"}, {"stop_at_layer": 1}):
        for one in (model, reference):
            one.zero_grad()
            one(TOKENS, **arguments).square().mean().backward()
        known = dict(reference.named_parameters())
        for name, parameter in model.named_parameters():
            wanted = known[name].grad
            assert (parameter.grad is None) == (wanted is None), name
            assert wanted is None or torch.equal(whole(parameter.grad), wanted), name
    model.zero_grad()
    settings = {"max_new_tokens": 3, "do_sample": False, "verbose": False, "stop_at_eos": False}
    assert torch.equal(*(m.generate(TOKENS, **settings) for m in (model, reference)))
    assert all(hasattr(p, "full_tensor") for p in model.parameters())


IN_LAYERS = ("attn.hook_z", "attn.hook_pattern", "mlp.hook_post", "hook_attn_out")


def check_close(
    model: Any, reference: Any, atol: float = 1e-5, layers: tuple[str, ...] = IN_LAYERS
) -> None:
    """What tensor parallel layers give is whole, and hooks in them see and give whole tensors."""
    found, cache = model.run_with_cache(TOKENS)
    wanted, known = reference.run_with_cache(TOKENS)
    close = partial(torch.testing.assert_close, rtol=0, atol=atol)
    close(found, wanted)
    for name in known:
        close(cache[name], known[name])
    for hook in layers:
        hooks = [(f"blocks.1.{hook}", zero_a_position)]
        close(*(m.run_with_hooks(TOKENS, fwd_hooks=hooks) for m in (model, reference)))
    for one in (model, reference):
        one(TOKENS, return_type="loss").backward()
    grads = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        if grads[name] is not None:
            close(whole(parameter.grad), grads[name])
    settings = {"max_new_tokens": 3, "do_sample": False, "verbose": False, "stop_at_eos": False}
    for cached in (True, False):
        given = {**settings, "use_past_kv_cache": cached}
        assert torch.equal(*(m.generate(TOKENS, **given) for m in (model, reference)))


def check_resuming(
    model: Any, again: Callable[[], Any], folder: Path, module: Callable[[Any], Any] = lambda m: m
) -> None:
    """A run that is saved and resumed goes on as one that is not; of what never trained there is
    nothing to resume.
    """

    def step(lens: Any, optimizer: Any) -> None:
        lens(TOKENS, return_type="loss").backward()
        optimizer.step()
        optimizer.zero_grad()

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer)
    state = get_state_dict(module(model), optimizer)
    dcp.save({"model": state[0], "optimizer": state[1]}, checkpoint_id=folder)
    resumed = again()
    other = torch.optim.AdamW(resumed.parameters(), lr=1e-3)
    state = get_state_dict(module(resumed), other)
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    dcp.load({"model": state[0], "optimizer": state[1]}, checkpoint_id=folder, planner=planner)
    set_state_dict(module(resumed), other, model_state_dict=state[0], optim_state_dict=state[1])
    step(model, optimizer)
    step(resumed, other)
    for one, two in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one.to_local(), two.to_local())
