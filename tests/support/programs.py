"""Random programs of tensor operations: the same steps run on promises and on real tensors.

A program is a list of steps `(operation, a, b, c)`. The numbers choose operands and parameters by
remainder, so that every list is a program; a step that does not fit its operands changes nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import einops
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from tl_fastload.recipes.nodes import MemorySource
from tl_fastload.recipes.promise import Promise
from tl_fastload.source.reader import FileReader, FileSource
from tl_fastload.source.safetensors import read_header

Step = tuple[str, int, int, int]
Tensors = list[torch.Tensor]
CPU = torch.device("cpu")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SCALARS = (2, 0.5, -1.75, 0.1, 3.0)
MOST_ELEMENTS = 1 << 14


def _split(x: torch.Tensor, dim: int, b: int) -> Any:
    return x.split(1 + b % max(x.shape[dim], 1), dim)


def _chunk(x: torch.Tensor, dim: int, b: int) -> Any:
    return x.chunk(1 + b % 3, dim)


def _tensor_split(x: torch.Tensor, dim: int, b: int) -> Any:
    return x.tensor_split([b % (x.shape[dim] + 1)], dim)


def _unbind(x: torch.Tensor, dim: int, b: int) -> Any:
    return x.unbind(dim)


def _part(cut: Callable[..., Any]) -> Callable[..., Any]:
    def operation(x: torch.Tensor, y: torch.Tensor, b: int, c: int) -> Any:
        parts = cut(x, c % x.dim(), b)
        return parts[b % len(parts)] if parts else None

    return operation


def _slice(x: torch.Tensor, y: torch.Tensor, b: int, c: int) -> Any:
    start, step = b % x.shape[c % x.dim()], 1 + (b // 7) % 3
    index = [slice(None)] * x.dim()
    index[c % x.dim()] = slice(start, None if b % 2 else -1, step)
    return x[tuple(index)]


def _view(x: torch.Tensor, y: torch.Tensor, b: int, c: int) -> Any:
    size = x.shape[c % x.dim()]
    factors = [n for n in range(1, size + 1) if size % n == 0]
    if not factors:
        return None
    factor = factors[b % len(factors)]
    return x.reshape(*x.shape[: c % x.dim()], factor, size // factor, *x.shape[c % x.dim() + 1 :])


def _expand(x: torch.Tensor, y: torch.Tensor, b: int, c: int) -> Any:
    return x.unsqueeze(0).expand(1 + b % 3, *x.shape)


def _rearrange(x: torch.Tensor, y: torch.Tensor, b: int, c: int) -> Any:
    patterns = {
        1: ("a -> a 1",),
        2: ("a b -> b a", "a b -> (a b)", "a b -> a 1 b", "a b -> b 1 a"),
        3: ("a b c -> b (a c)", "a b c -> c a b", "a b c -> (c a) b", "a b c -> a c b"),
    }
    choices = patterns.get(x.dim())
    return einops.rearrange(x, choices[b % len(choices)]) if choices else None


def _einops_mean(x: torch.Tensor, y: torch.Tensor, b: int, c: int) -> Any:
    patterns = {1: "a -> 1", 2: "a b -> 1 b", 3: "a b c -> a 1 c"}
    if x.dim() not in patterns or not x.numel():
        return None
    return einops.reduce(x * 1, patterns[x.dim()], "mean")


def _binary(function: Callable[..., Any]) -> Callable[..., Any]:
    def operation(x: torch.Tensor, y: torch.Tensor, b: int, c: int) -> Any:
        if torch.Size(torch.broadcast_shapes(x.shape, y.shape)).numel() > MOST_ELEMENTS:
            return None
        return function(x, y)

    return operation


def _join(function: Callable[..., Any]) -> Callable[..., Any]:
    def operation(x: torch.Tensor, y: torch.Tensor, b: int, c: int) -> Any:
        parts = [x, y, x] if b % 2 else [y, x]
        return function(parts, dim=c % x.dim())

    return operation


def _join_and_pick(x: torch.Tensor, y: torch.Tensor, b: int, c: int) -> Any:
    dim = c % x.dim()
    if b % 2:
        return torch.stack([x, y], dim).select(dim, (b // 2) % 2)
    first = x.shape[dim]
    joined = torch.cat([x, y], dim)
    return joined.narrow(dim, 0, first) if c % 3 else joined.narrow(dim, first, y.shape[dim])


def _scalar(x: torch.Tensor, y: torch.Tensor, b: int, c: int) -> Any:
    number = SCALARS[b % len(SCALARS)]
    return (x * number, x + number, x - number, x / number, number - x, number * x)[c % 6]


def _constant(x: torch.Tensor, y: torch.Tensor, b: int, c: int) -> Any:
    return (
        torch.zeros_like(x),
        torch.ones_like(x),
        x + torch.zeros(x.shape[-1], dtype=x.dtype),
        x * torch.full((1,), 1.5, dtype=DTYPES[c % 4]),
        torch.zeros(x.shape[0]),
        x + torch.tensor(0.25),
    )[b % 6]


# Reductions work on a fresh result: their rounding depends on strides, see the test of its own.
OPERATIONS: dict[str, Callable[..., Any]] = {
    "permute": lambda x, y, b, c: x.permute(*[(i + b) % x.dim() for i in range(x.dim())]),
    "transpose": lambda x, y, b, c: x.transpose(b % x.dim(), c % x.dim()),
    "flatten": lambda x, y, b, c: x.flatten(),
    "unsqueeze": lambda x, y, b, c: x.unsqueeze(b % (x.dim() + 1)) if x.dim() < 4 else None,
    "squeeze": lambda x, y, b, c: x.squeeze(),
    "select": lambda x, y, b, c: x.select(c % x.dim(), b % x.shape[c % x.dim()]),
    "negative": lambda x, y, b, c: x[-1],
    "slice": _slice,
    "view": _view,
    "expand": _expand,
    "split": _part(_split),
    "chunk": _part(_chunk),
    "tensor_split": _part(_tensor_split),
    "unbind": _part(_unbind),
    "rearrange": _rearrange,
    "clone": lambda x, y, b, c: x.clone(),
    "contiguous": lambda x, y, b, c: x.contiguous(),
    "detach": lambda x, y, b, c: x.detach(),
    "cast": lambda x, y, b, c: x.to(DTYPES[b % 4]),
    "cast back": lambda x, y, b, c: x.to(DTYPES[b % 4]).to(x.dtype),
    "add": _binary(torch.add),
    "subtract": _binary(torch.sub),
    "multiply": _binary(torch.mul),
    "divide": _binary(torch.div),
    "add scaled": _binary(lambda x, y: torch.add(x, y, alpha=2)),
    "scalar": _scalar,
    "mean": lambda x, y, b, c: (x * 1).mean(c % x.dim(), keepdim=bool(b % 2)),
    "sum": lambda x, y, b, c: (x * 1).sum(c % x.dim(), keepdim=bool(b % 2)),
    "center": lambda x, y, b, c: (x * 1) - (x * 1).mean(-1, keepdim=True),
    "einops mean": _einops_mean,
    "cat": _join(torch.cat),
    "stack": _join(torch.stack),
    "join and pick": _join_and_pick,
    "constant": _constant,
    "gather rows": lambda x, y, b, c: x[torch.tensor([b % x.shape[0], c % x.shape[0]])],
}

_NUMBERS = st.integers(0, 40)
# Mostly the latest results, so that operations follow each other.
_OPERANDS = st.sampled_from([0, 0, 0, 0, 1, 1, 2, 3, 5, 8])
STEPS = st.lists(
    st.tuples(st.sampled_from(sorted(OPERATIONS)), _OPERANDS, _OPERANDS, _NUMBERS),
    min_size=1,
    max_size=16,
)


def run(program: Sequence[Step], sources: Sequence[torch.Tensor]) -> Tensors:
    """Every result of a program, in the order of its steps; the sources are not among them."""
    pool: Tensors = list(sources)
    for operation, a, b, c in program:
        x, y = pool[-1 - a % len(pool)], pool[-1 - b % len(pool)]
        if x.dim() == 0 or 0 in x.shape:
            continue
        try:
            result = OPERATIONS[operation](x, y, b, c)
        except (RuntimeError, IndexError, TypeError, ValueError):
            _must_fail_on_real_tensors(operation, x, y, b, c)
            continue
        if result is not None and result.numel() <= MOST_ELEMENTS and result.dim() <= 4:
            pool.append(result)
    return pool[len(sources) :]


def _must_fail_on_real_tensors(operation: str, x: Any, y: Any, b: int, c: int) -> None:
    """Let an error through that promises raise and real tensors of this form do not."""

    def real(tensor: torch.Tensor) -> torch.Tensor:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        return fake.fill_(1)

    try:
        OPERATIONS[operation](real(x), real(y), b, c)
    except (RuntimeError, IndexError, TypeError, ValueError):
        return
    raise AssertionError(f"{operation}({x!r}, {y!r}, {b}, {c}) fails on promises only")


def random_sources(seed: int, dtypes: Sequence[torch.dtype], shapes: Any) -> Tensors:
    """Random tensors with a NaN and an infinity among them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(shape, generator=generator).to(dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    tensors[-1].view(-1)[0] = float("nan")
    tensors[-1].view(-1)[-1] = float("inf")
    return tensors


def in_memory(tensors: Tensors) -> list[Promise]:
    return [Promise.of(MemorySource(tensor)) for tensor in tensors]


def in_file(tensors: Tensors, path: Path, reader: FileReader) -> list[Promise]:
    """Write tensors to a safetensors file and promise them."""
    save_file({str(i): tensor for i, tensor in enumerate(tensors)}, path)
    entries = read_header(path)
    return [Promise.of(FileSource(entries[str(i)], reader)) for i in range(len(tensors))]


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal in shape, dtype and bits, but for the payload of NaNs."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    one, other = actual.masked_fill(nan, 0), expected.masked_fill(nan, 0)
    assert torch.equal(one, other)
    assert torch.equal(one.signbit(), other.signbit())


class AllocatedBytes(TorchDispatchMode):
    """Sums the storages of the tensors alive that operations inside made; keeps the peak.

    known: tensors whose memory does not count.
    """

    def __init__(self, known: Sequence[torch.Tensor] = ()) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._alive: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, torch.Tensor) and result.device.type == "cpu":
                self._alive.append(weakref.ref(result))
        self.peak_bytes = max(self.peak_bytes, self.alive_bytes())
        return results

    def alive_bytes(self) -> int:
        sizes = {}
        tensors = [reference() for reference in self._alive]
        self._alive = [r for r, t in zip(self._alive, tensors, strict=True) if t is not None]
        for tensor in tensors:
            if tensor is not None and not isinstance(tensor, Promise):
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
        return sum(size for pointer, size in sizes.items() if pointer not in self._known)
