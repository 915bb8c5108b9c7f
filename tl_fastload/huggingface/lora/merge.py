"""LoRA adapters merged into the promises of a model: recorded like any other step of a weight's
recipe, so that it is computed in place, one matrix at a time, while the weight streams in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from tl_fastload.errors import QuantizationError
from tl_fastload.ground.wrappers import WRAPPER_PARTS
from tl_fastload.huggingface.lora.adapter import Adapter, LowRank, is_in, raise_for
from tl_fastload.huggingface.lora.complete import discrepancies
from tl_fastload.huggingface.lora.update import (
    fits_experts,
    is_flipped,
    merged,
    merged_experts,
    misfits,
    resized_hint,
)
from tl_fastload.huggingface.tree import put
from tl_fastload.quantized import QuantizedTensor
from tl_fastload.quantized.content import Content
from tl_fastload.quantized.recipes import QuantizedSource, reads_quantized
from tl_fastload.recipes.evaluate import evaluate
from tl_fastload.recipes.nodes import MemorySource, SourceView
from tl_fastload.recipes.promise import Promise

# What multimodal models call their parts since transformers 4.52, and called them before.
_RENAMED = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head", "lm_head"),
)
Merge = Callable[[Any], Any]
"""Merges an update into a dense matrix [out, in]."""


class Weights:
    """The promises of a module tree by dotted names; tied names change together.

    Args:
        root: a transformers model of promises, or a `tl_fastload.huggingface.tree.Branch`.
        tied: groups of names that the model ties.

    Attributes:
        by_name: the promises as they are now.
        originals: weights as they were before the first low-rank update.
        trained: names of weights that an adapter replaced -> its label.
    """

    def __init__(self, root: Any, tied: Iterable[list[str]] = ()) -> None:
        self.root = root
        self.by_name: dict[str, Promise] = dict(_named(root))
        self.originals: dict[str, Promise] = {}
        self.trained: dict[str, str] = {}
        self._prefix = f"{getattr(root, 'base_model_prefix', '')}."
        self._tied = {name: group for group in tied for name in group}

    def module(self, weight: str) -> Any:
        """The module that a weight belongs to; None where only names are known."""
        if not isinstance(self.root, torch.nn.Module):
            return None
        module = self.root.get_submodule(weight.rpartition(".")[0])
        return None if type(module) is torch.nn.Module else module

    def find(self, name: str) -> str | None:
        """The tree's name of an adapter's: as it is, or with or without the base model's
        prefix.
        """
        candidates = (name, self._prefix + name, name.removeprefix(self._prefix))
        return next((found for found in candidates if found in self.by_name), None)

    def find_module(self, module: str) -> str | None:
        """The tree's name of a module that an adapter calls otherwise: wrappers put their parts
        into names, and transformers has renamed modules since. None if it is found without, or
        not at all.
        """
        if self._knows(module):
            return None
        bare = ".".join(part for part in module.split(".") if part not in WRAPPER_PARTS)
        for old, new in (("", ""), *_RENAMED):
            found = new + bare.removeprefix(old) if bare.startswith(old) else bare
            if found != module and self._knows(found):
                return found
        return None

    def _knows(self, module: str) -> bool:
        return (
            self.find(module) is not None
            or self.find(f"{module}.weight") is not None
            or bool(self.experts(_unwrapped(module)))
        )

    def experts(self, module: str) -> dict[str, Promise]:
        """Stacked matrices [experts, ., .] that a module holds itself, by the tree's names."""
        return {
            name: promise
            for name, promise in self.by_name.items()
            if name.rpartition(".")[0] in (module, self._prefix + module) and promise.dim() == 3
        }

    def change(self, name: str, promise: Any) -> None:
        """Put a promise in place of a weight and of all that are tied to it."""
        old = self.by_name[name]
        group = self._tied.get(name, ())
        for other, now in list(self.by_name.items()):
            if now is old or (other in group and _equal(old, now)):
                self.put(other, promise)

    def put(self, name: str, promise: Any) -> None:
        """Put a promise in place of one weight, whatever is tied to it."""
        self.by_name[name] = promise
        put(self.root, name, promise)


def _named(root: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(root, torch.nn.Module):
        return root.named_parameters(remove_duplicate=False)
    found: Iterable[tuple[str, Any]] = root.named_parameters()
    return found


def _equal(one: Promise, other: Promise) -> bool:
    """Whether two weights of a checkpoint hold the same numbers, which transformers then ties."""
    if one.shape != other.shape:
        return False
    cpu = torch.device("cpu")
    return torch.equal(evaluate(one.node, cpu).tensor, evaluate(other.node, cpu).tensor)


def merge_into_files(
    adapters: Sequence[Adapter],
    weights: Weights,
    promises: MutableMapping[str, Promise],
    dtype: torch.dtype,
) -> bool:
    """Merge updates of modules that the tree does not have but the files name: experts that
    transformers stacks on loading, or names of another version. They leave the adapters.

    Args:
        adapters: what to merge.
        weights: the tree that the files have become.
        promises: by the names of the files; changed.
        dtype: what the model is loaded in, and therefore merged in.

    Returns:
        Whether anything was merged, so that the tree has to be made again.
    """
    found = False
    _use_names_of_tree(adapters, weights)
    for adapter in adapters:
        problems: list[str] = []
        for module, part in list(adapter.low_rank.items()):
            name = f"{module}.weight"
            if name not in promises or _target(module, weights) is not None:
                continue
            found = True
            del adapter.low_rank[module]
            weight: Any = promises[name]
            if not weight.is_floating_point():
                problems.append(f"quantized in the checkpoint: {name}")
                continue
            weight = weight.to(dtype)
            wrong = misfits(part, tuple(weight.shape), adapter)
            problems += wrong
            if not wrong:
                flipped = is_flipped(part, tuple(weight.shape), None, adapter)
                promises[name] = merged(weight, part, adapter, flipped)
        raise_for(adapter, problems)
    return found


def _use_names_of_tree(adapters: Sequence[Adapter], weights: Weights) -> None:
    for adapter in adapters:
        for module in [*adapter.low_rank, *adapter.tokens, *adapter.replaced]:
            found = weights.find_module(module)
            if found is not None:
                adapter.rename(module, found)


def _target(module: str, weights: Weights) -> str | None:
    """The tree's name of what an update belongs to; of a stack of experts, any."""
    name = weights.find(f"{module}.weight")
    return name or next(iter(weights.experts(_unwrapped(module))), None)


def _unwrapped(module: str) -> str:
    """The module behind the wrappers that peft puts around stacked experts."""
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    return module


def merge(adapters: Sequence[Adapter], weights: Weights) -> None:
    """Merge adapters into a tree, in order.

    Args:
        adapters: what to merge; every tensor of them must find its place.
        weights: the tree; changed.

    Raises:
        AdapterError: tensors that fit no module or have the wrong shape, modules that the
            configuration names and the adapter lacks, or two adapters that each replace a tensor.
    """
    _use_names_of_tree(adapters, weights)
    problems = [_replace(adapter, weights) for adapter in adapters]
    for adapter, found in zip(adapters, problems, strict=True):
        done: set[str] = set()
        for part in adapter.low_rank.values():
            name = weights.find(f"{part.module}.weight")
            if name is None:
                found += _merge_experts(adapter, part, weights, done)
            else:
                done.add(name)
                found += _merge_matrix(adapter, part, name, weights)
        found += _replace_tokens(adapter, weights, done)
        found += discrepancies(adapter, weights.by_name, done)
        raise_for(adapter, found)


def _merge_matrix(adapter: Adapter, part: LowRank, name: str, weights: Weights) -> list[str]:
    weight, module = weights.by_name[name], weights.module(name)
    shape = tuple(weight.shape)
    problems = misfits(part, shape, adapter, module)
    if name in weights.trained:
        problems.append(f"both replaced (by {weights.trained[name]}) and updated: {part.module}")
    if part.magnitude is not None and adapter.weight != 1:
        problems.append(f"DoRA has no weight but 1: {part.module} times {adapter.weight:g}")
    is_quantized = reads_quantized(weight.node)
    original = weights.originals.setdefault(name, weight)
    if is_quantized and part.magnitude is not None and original is not weight:
        problems.append(f"DoRA on a quantized matrix that is updated already: {part.module}")
    if problems:
        return problems
    if is_quantized:
        weights.change(name, requantized(weight, lambda dense: merged(dense, part, adapter)))
    else:
        flipped = is_flipped(part, shape, module, adapter)
        weights.change(name, merged(weight, part, adapter, flipped, original))
    return _merge_bias(adapter, part, name, weights) if part.bias is not None else []


def _merge_bias(adapter: Adapter, part: LowRank, name: str, weights: Weights) -> list[str]:
    """Add the bias of B (`lora_bias`) to the module's."""
    bias: Any = weights.by_name.get(f"{name.rpartition('.')[0]}.bias")
    added: Any = part.bias
    if bias is None or bias.shape != added.shape:
        return [f"lora_B of {part.module} has a bias, but the module has none of its shape"]
    dtype = torch.float64 if bias.dtype == torch.float64 else torch.float32
    total = bias.to(dtype) + added.to(dtype) * adapter.scaling(part.module)
    weights.change(f"{name.rpartition('.')[0]}.bias", total.to(bias.dtype))
    return []


def _merge_experts(adapter: Adapter, part: LowRank, weights: Weights, done: set[str]) -> list[str]:
    """Merge into stacked matrices (`target_parameters`). Which of a module's stacks is meant, only
    the shapes say: peft names them by the order in which it wrapped them.
    """
    stacks = weights.experts(_unwrapped(part.module))
    if not stacks:
        return [f"no such module in the model: {part.module}"]
    for name, stack in stacks.items():
        is_transposed = getattr(weights.module(name), "is_transposed", False)
        aimed = replace(part, module=name)  # patterns name the parameter, not the wrapper
        if part.module in adapter.scalings:
            adapter.scalings[name] = adapter.scalings[part.module]
        if name in done or not fits_experts(stack, aimed, adapter, is_transposed):
            continue
        if reads_quantized(stack.node):
            return [f"stacked experts that are quantized: {name}"]
        done.add(name)
        weights.change(name, merged_experts(stack, aimed, adapter, is_transposed))
        return []
    shapes = [tuple(p.shape) for p in (part.b, part.a) if p is not None]
    return [
        f"misshapen: the update of {part.module} is {shapes[0]} times {shapes[-1]}, which at rank "
        f"{adapter.rank(part.module)} fits none of "
        + ", ".join(f"{name} {tuple(stack.shape)}" for name, stack in stacks.items())
    ]


def _replace(adapter: Adapter, weights: Weights) -> list[str]:
    """Put an adapter's whole tensors in the place of the model's: what was trained
    (`modules_to_save`, biases), and base embeddings that peft stores beside their updates.
    """
    problems = []
    for stored, promise in adapter.replaced.items():
        name = weights.find(stored)
        if name is None:
            problems.append(f"no such tensor in the model: {stored}")
            continue
        old: Any = weights.by_name[name]
        is_saved = _is_saved(stored, adapter)
        is_trained = is_saved or stored.endswith("bias")
        if old.shape != promise.shape:
            problems.append(
                f"misshapen: {stored} is {tuple(promise.shape)}, the model's is {tuple(old.shape)}"
                + resized_hint(tuple(promise.shape), tuple(old.shape))
            )
        elif is_trained and adapter.weight != 1:
            problems.append(f"replaced, so with no weight but 1: {stored}")
        elif name in weights.trained:
            problems.append(f"replaced by {weights.trained[name]} already: {stored}")
        elif is_saved:  # peft trains a copy, so what is tied stays as it was
            weights.put(name, promise.to(old.dtype))
        else:
            weights.change(name, promise.to(old.dtype))
        if is_trained:
            weights.trained.setdefault(name, adapter.label)
    return problems


def _is_saved(name: str, adapter: Adapter) -> bool:
    return any(is_in(name, module) for module in adapter.config.modules_to_save or ())


def _replace_tokens(adapter: Adapter, weights: Weights, done: set[str]) -> list[str]:
    """Put trained rows into embeddings (`trainable_token_indices`)."""
    problems = []
    for module, rows in adapter.tokens.items():
        name = weights.find(f"{module}.weight")
        indices = _token_indices(adapter.config.trainable_token_indices, module)
        if name is None:
            problems.append(f"no such module in the model: {module}")
            continue
        old: Any = weights.by_name[name]
        if (len(indices), *old.shape[1:]) != tuple(rows.shape):
            problems.append(
                f"misshapen: the trained tokens of {module} are {tuple(rows.shape)}, not "
                f"{(len(indices), *old.shape[1:])}"
            )
        elif not all(0 <= index < old.shape[0] for index in indices):
            problems.append(f"trained tokens beyond the {old.shape[0]} of {module}: {indices}")
        elif name in done or name in weights.trained or adapter.weight != 1:
            problems.append(f"trained tokens and something else that changes {module}, or a weight")
        else:
            weights.trained[name] = adapter.label
            changed = torch.index_copy(
                old, 0, torch.tensor(indices, device="cpu"), rows.to(old.dtype)
            )
            weights.change(name, changed)
    return problems


def _token_indices(asked: Any, module: str) -> list[int]:
    if isinstance(asked, Mapping):
        found = (v for k, v in asked.items() if module == k or module.endswith("." + k))
        asked = next(found, None)
    return list(asked or ())


def requantized(weight: Promise, merge: Merge) -> Promise:
    """A promise of a quantized matrix with an update merged in.

    Raises:
        QuantizationError: the weight is pieced together of several quantized matrices, or is of a
            format that cannot quantize.
    """
    node = weight.node
    source = node.source if isinstance(node, SourceView) else None
    if not isinstance(source, QuantizedSource) or source.shape.numel() != weight.numel():
        raise QuantizationError(
            "an adapter updates a matrix that is pieced together of quantized ones, which "
            "cannot be quantized again. Pass dequantize=True, or merge into the unquantized model "
            "with quantize=."
        )
    # On the meta device it costs nothing, and says now what it would say after reading.
    outline = source.outline.requantize(torch.empty(source.shape, device="meta"))
    updated = QuantizedSource(
        lambda: _updated(source, merge), source.dtype, source.name, outline, source.home
    )
    made = Promise.of(updated, weight.device)
    return made if weight.stride() == made.stride() else made.t()  # type: ignore[return-value]


def _updated(source: QuantizedSource, merge: Merge) -> QuantizedTensor:
    old = source.matrix()
    source.release()  # the parts of a fused matrix hold the updated one
    stored = old.content.stored
    # Values as the format dequantizes them, then float32, in which peft adds.
    dense = QuantizedTensor(old.content, None, stored.default_dtype).dequantize().float()
    promise = Promise.of(MemorySource(dense, source.name), dense.device)
    made = stored.requantize(evaluate(merge(promise).node, dense.device).tensor)
    return QuantizedTensor(Content(made, old.content.compute_dtype), None, source.dtype)
