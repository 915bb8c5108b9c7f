"""A few values of each parameter, and whether two such samples are of the same weights.

Weights that were processed on another device, or under another version of a library, differ by
rounding. So values are kept and compared, not hashed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tl_fastload.ground.wrappers import plain_name
from tl_fastload.quantized import QuantizedTensor

_VALUES_EACH = 16
_TOLERANCE = 1e-4  # of a value, or of the root mean square of its parameter
# Rounding to bfloat16 or to bytes turns a difference in the last bit into a large one, but rarely.
_OUTLIERS_IN_ONE = 8  # one in so many values of a parameter
_OUTLIERS_IN_ALL = 100


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Take 16 values of each tensor, or all of a smaller one.

    Args:
        tensors: name -> tensor; a quantized one counts as the tensors that it holds.

    Returns:
        Plain values that `torch.load(weights_only=True)` reads: "shapes" and "dtypes" by name, and
        "values", float32 [all values, one tensor after the other].
    """
    shapes, dtypes, values = {}, {}, []
    for name, tensor in _pieces(tensors):
        shapes[name] = list(tensor.shape)
        dtypes[name] = str(tensor.dtype).removeprefix("torch.")
        values.append(_sample(tensor))
    joined = torch.cat(values) if values else torch.empty(0, dtype=torch.float32, device="cpu")
    return {"shapes": shapes, "dtypes": dtypes, "values": joined}


def parameters_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """What to take a module's fingerprint of: its parameters, under the names that they have when
    nothing in it is compiled; a shared one counts under each.
    """
    named = module.named_parameters(remove_duplicate=False)
    return {plain_name(name): parameter for name, parameter in named}


def differing(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """Names of the parameters in which two fingerprints differ by more than rounding."""
    theirs, ours = _by_name(saved), _by_name(present)
    names = list(dict.fromkeys([*theirs, *ours]))
    typical = _root_mean_square(present["values"])
    different, doubtful, outliers, total = [], [], 0, 0
    for name in names:
        if name not in theirs or name not in ours or theirs[name][2] != ours[name][2]:
            different.append(name)
            continue
        count = _outliers(theirs[name], ours[name], typical)
        size = ours[name][0].numel()
        outliers, total = outliers + count, total + size
        if count > size // _OUTLIERS_IN_ONE:
            different.append(name)
        elif count:
            doubtful.append(name)
    return different if outliers * _OUTLIERS_IN_ALL <= total else [*different, *doubtful]


def changed_values(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    """Names of the tensors of one module that changed between two fingerprints: any other value,
    and more than rounding where the dtype is another.
    """
    theirs, ours = _by_name(before), _by_name(after)
    typical = _root_mean_square(after["values"])
    found = set()
    for name in theirs.keys() | ours.keys():
        one, other = theirs.get(name), ours.get(name)
        if one is None or other is None or one[2] != other[2]:
            is_same = False
        elif one[1] == other[1]:
            is_same = torch.allclose(one[0], other[0], rtol=0, atol=0, equal_nan=True)
        else:
            is_same = _outliers(one, other, typical) <= other[0].numel() // _OUTLIERS_IN_ONE
        if not is_same:
            found.add(name.partition(":")[0])
    return found


_Sample = tuple[torch.Tensor, torch.dtype, Sequence[int]]


def _by_name(found: Mapping[str, Any]) -> dict[str, _Sample]:
    samples: dict[str, _Sample] = {}
    start = 0
    values = found["values"].cpu()
    for name, shape in found["shapes"].items():
        size = min(_VALUES_EACH, torch.Size(shape).numel())
        dtype = getattr(torch, found["dtypes"][name])
        samples[name] = (values[start : start + size], dtype, list(shape))
        start += size
    return samples


def _outliers(saved: _Sample, present: _Sample, typical: float) -> int:
    """How many values differ, seen in the coarser of the two dtypes."""
    coarser = max((saved[1], present[1]), key=_step)
    theirs, ours = (sample[0].to(coarser).double() for sample in (saved, present))
    # What should be zero is rounding noise, whose size depends on the other parameters.
    nothing = _TOLERANCE * max(_root_mean_square(ours), typical * 1e-3)
    same = torch.isclose(theirs, ours, rtol=_TOLERANCE, atol=nothing, equal_nan=True)
    return int((~same).sum())


def _root_mean_square(values: torch.Tensor) -> float:
    finite = values[values.isfinite()].double()
    return float(finite.square().mean().sqrt()) if finite.numel() else 0.0


def _step(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _pieces(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors.items():
        if isinstance(tensor, QuantizedTensor):
            for inner in tensor.__tensor_flatten__()[0]:
                yield f"{name}:{inner}", getattr(tensor, inner)
        else:
            yield name, tensor


@torch.no_grad()
def _sample(tensor: torch.Tensor) -> torch.Tensor:
    size = tensor.numel()
    if tensor.dim() == 0 or size == 0:
        return tensor.detach().reshape(size).float().cpu()
    flat = torch.tensor(_places(size), device=tensor.device)
    # Flattening would copy a tensor whose strides are those of a transposed matrix.
    index: list[torch.Tensor] = []
    for length in reversed(tensor.shape):
        index.insert(0, flat % length)
        flat = flat // length
    if hasattr(tensor, "full_tensor"):
        return _of_parts(tensor, index)
    return tensor.detach()[tuple(index)].float().cpu()


def _of_parts(tensor: Any, index: list[torch.Tensor]) -> torch.Tensor:
    """Values of a DTensor, from the processes that have them; all of them call."""
    from torch.distributed.tensor import DTensor, Partial, Replicate
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, local = tensor.device_mesh, tensor.to_local()
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
    inside = [flat - first for flat, first in zip(index, offset, strict=True)]
    is_here = torch.ones(len(index[0]), dtype=torch.bool, device=local.device)
    for flat, length in zip(inside, local.shape, strict=True):
        is_here &= (flat >= 0) & (flat < length)
    values = torch.zeros(len(is_here), dtype=torch.float32, device=local.device)
    values[is_here] = local[tuple(flat[is_here] for flat in inside)].float()
    placements = [Replicate() if p.is_replicate() else Partial() for p in tensor.placements]
    gathered = DTensor.from_local(values, mesh, placements, run_check=False).full_tensor()
    return gathered.cpu()


def _places(size: int) -> list[int]:
    """Where values are taken: multiples of the golden ratio modulo 1, which no width divides."""
    if size <= _VALUES_EACH:
        return list(range(size))
    return [(i * 2654435769 % 2**32) * size >> 32 for i in range(1, _VALUES_EACH + 1)]
