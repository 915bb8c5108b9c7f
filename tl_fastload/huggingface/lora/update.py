"""One weight with one low-rank update: the recorded arithmetic, and which shapes fit.

The operations, and the order of their casts, are those of peft's `merge_and_unload`: factors in
float32, `W + (B @ A) * scaling`, then back to the dtype of W. DoRA (https://arxiv.org/abs/2402.09353)
then scales each output of the sum to a learned length.
"""

from __future__ import annotations

from typing import Any

import torch

from tl_fastload.huggingface.keys import is_conv1d
from tl_fastload.huggingface.lora.adapter import Adapter, LowRank
from tl_fastload.recipes.promise import Promise


def merged(
    weight: Any,
    part: LowRank,
    adapter: Adapter,
    is_transposed: bool = False,
    original: Promise | None = None,
) -> Any:
    """The promise of a weight with a low-rank update merged into it.

    Args:
        weight: [out, in]; [in, out] if `is_transposed`; [tokens, width] of an embedding.
        part: the update.
        adapter: what it belongs to.
        is_transposed: whether the weight is a `Conv1D`'s.
        original: the weight before any adapter, from which DoRA takes its lengths.
    """
    # peft keeps factors of 16 bits in float32 (`autocast_adapter_dtype`).
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    a, b = factors(part, dtype)
    flipped = is_transposed or part.is_embedding
    product = b @ a
    delta = (product.t() if flipped else product) * adapter.scaling(part.module)
    if part.magnitude is not None:
        return _dora(weight, delta, part.magnitude.to(dtype), flipped, original)
    if part.is_embedding or adapter.config.init_lora_weights == "mica":
        return weight + delta.to(weight.dtype)
    return (weight.to(dtype) + delta).to(weight.dtype)


def factors(part: LowRank, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The factors A and B of an update that `sort_tensors` has found complete."""
    if part.a is None or part.b is None:
        raise TypeError(f"{part.module} has one factor only")
    return part.a.to(dtype), part.b.to(dtype)


def _dora(weight: Any, delta: Any, magnitude: Any, flipped: bool, original: Any) -> Any:
    """peft's `DoraLinearVariant`: each output of the sum gets the length that was learned."""
    total = weight.to(delta.dtype) + delta
    measured = total
    if original is not None and original is not weight:
        measured = original.to(delta.dtype) + delta
    lengths = torch.linalg.norm(measured.t() if flipped else measured, dim=1)
    factor = magnitude / lengths
    return (total * factor.view((1, -1) if flipped else (-1, 1))).to(weight.dtype)


def merged_experts(stack: Any, part: LowRank, adapter: Adapter, is_transposed: bool) -> Any:
    """The promise of stacked matrices with an update merged into each: peft's `ParamWrapper`.

    Args:
        stack: [experts, out, in]; [experts, in, out] if `is_transposed`.
        part: the update; A is [experts * rank, in], B [out, rank * experts], expert innermost.
        adapter: what it belongs to.
        is_transposed: which way round the matrices are.
    """
    a, b = factors(part)
    count, rank = stack.shape[0], adapter.rank(part.module)
    # Expert by expert, so that a recipe of one expert needs nothing of the others.
    parts = a.reshape(count, rank, -1), b.reshape(-1, rank, count)
    changed = []
    for expert in range(count):
        product = parts[1][:, :, expert] @ parts[0][expert]
        delta = (product.t() if is_transposed else product) * adapter.scaling(part.module)
        changed.append(stack[expert] + delta.to(stack.dtype))
    return torch.stack(changed)


def fits_experts(stack: Promise, part: LowRank, adapter: Adapter, is_transposed: bool) -> bool:
    """Whether an update has the shapes that belong to stacked matrices."""
    a, b = factors(part)
    count, first, second = stack.shape
    outputs, inputs = (second, first) if is_transposed else (first, second)
    rank = adapter.rank(part.module) * count
    return (tuple(a.shape), tuple(b.shape)) == ((rank, inputs), (outputs, rank))


def is_flipped(part: LowRank, shape: tuple[int, ...], module: Any, adapter: Adapter) -> bool:
    """Whether a weight is [in, out]: by its module, else by its shape, else as configured.

    Args:
        part: the update.
        shape: of the weight.
        module: the weight's module, or None where there is none.
        adapter: what the update belongs to.
    """
    if part.is_embedding:
        return False
    if module is not None:
        return _is_conv1d(module)
    a, b = factors(part)
    plain, flipped = (b.shape[0], a.shape[1]), (a.shape[1], b.shape[0])
    return bool(adapter.config.fan_in_fan_out) if plain == flipped else shape == flipped


def resized_hint(shape: tuple[int, ...], own: tuple[int, ...]) -> str:
    """What to do about a matrix that has another number of rows alone, as the embedding of a model
    has whose vocabulary was resized for the adapter; "" for any other.
    """
    if len(shape) != 2 or len(own) != 2 or shape[0] == own[0] or shape[1] != own[1]:
        return ""
    return (
        ". If the vocabulary was resized for the adapter, resize the base model likewise "
        "(resize_token_embeddings), merge with peft, and pass "
        "hf_model=peft_model.merge_and_unload()"
    )


def misfits(
    part: LowRank, shape: tuple[int, ...], adapter: Adapter, module: Any = None
) -> list[str]:
    """What is wrong with an update for a weight of some shape.

    Args:
        part, shape, adapter, module: as for `is_flipped`.
    """
    a, b = factors(part)
    rank = adapter.rank(part.module)
    if a.dim() != 2 or b.dim() != 2 or (a.shape[0], b.shape[1]) != (rank, rank):
        return [
            f"rank: the factors of {part.module} are {tuple(b.shape)} and {tuple(a.shape)}, the "
            f"configuration gives it rank {rank}"
        ]
    product = (b.shape[0], a.shape[1])
    if part.is_embedding or (module is not None and _is_conv1d(module)):
        fits = {product[::-1]}
    else:
        fits = {product} if module is not None else {product, product[::-1]}
    problems = []
    if shape not in fits:
        problems.append(
            f"misshapen: the update of {part.module} is {product}, its weight is {shape}"
            + resized_hint(product[::-1] if part.is_embedding else product, shape)
        )
    return problems + _wrong_magnitude(part, product, adapter)


def _wrong_magnitude(part: LowRank, product: tuple[int, int], adapter: Adapter) -> list[str]:
    name = f"{part.module}.lora_magnitude_vector"
    if part.magnitude is None:
        return [f"missing: {name}"] if adapter.config.use_dora else []
    if not adapter.config.use_dora:
        return [f"unexpected: {name}, without use_dora"]
    shape = tuple(part.magnitude.shape)
    return [] if shape == product[:1] else [f"misshapen: {name} is {shape}, not {product[:1]}"]


def _is_conv1d(module: Any) -> bool:
    # transformers turns a Conv1D into a linear layer when it quantizes, and notes what it was.
    return is_conv1d(type(module)) or is_conv1d(getattr(module, "source_cls", None))
