"""The Hugging Face module tree of a checkpoint, with a promise where each weight would be.

TransformerLens' converters walk the attributes of a Hugging Face model
(`model.layers[0].self_attn.q_proj.weight`). They get the real module tree, built without memory,
so that names, ties and conversions are transformers' own. Where transformers has no class (the
code lies in the checkpoint), a bare tree of the tensors' names serves as well, and nobody's code
is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn

from tl_fastload.errors import CheckpointError, UnsupportedArchitectureError
from tl_fastload.ground.hf_configs import declared_dtype
from tl_fastload.ground.wrappers import without_wrappers
from tl_fastload.huggingface.empty import empty_model
from tl_fastload.huggingface.keys import Ledger, is_conv1d, rename_to_model
from tl_fastload.quantized.assemble import (
    combine,
    promise_of_layer,
    refuse_undeclared,
    zero_biases,
)
from tl_fastload.quantized.recipes import is_stored_quantized, reads_quantized
from tl_fastload.quantized.spec import Spec
from tl_fastload.recipes.nodes import MemorySource, Source, SourceView
from tl_fastload.recipes.promise import Promise
from tl_fastload.source.checkpoint import Checkpoint


class MissingSource(Source):
    """Stands where the checkpoint has no tensor; an error only if some parameter needs it."""

    def lend(self, geometry: torch.Tensor) -> torch.Tensor | None:
        raise CheckpointError(f"the checkpoint has no weight {self.name}")

    def read_into(
        self, out: torch.Tensor, geometry: torch.Tensor, casts: tuple[torch.dtype, ...]
    ) -> None:
        self.lend(geometry)


class Branch:
    """A node of a tree made from dotted names: attributes for words, items for numbers."""

    def __init__(self, config: Any = None) -> None:
        self.config = config

    def __getitem__(self, index: int) -> Any:
        return self.__dict__[str(index)]

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor below this node with its dotted name."""
        for name, child in self.__dict__.items():
            if isinstance(child, Branch):
                yield from (
                    (f"{name}.{below}", tensor) for below, tensor in child.named_parameters()
                )
            elif isinstance(child, torch.Tensor):
                yield name, child

    def parameters(self) -> Iterator[torch.Tensor]:
        """Every tensor below this node."""
        return (tensor for _, tensor in self.named_parameters())

    def place(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor at a dotted name."""
        head, _, rest = name.partition(".")
        if not rest:
            self.__dict__[head] = tensor
            return
        self.__dict__.setdefault(head, Branch())
        self.__dict__[head].place(rest, tensor)


def outline_promises(
    architecture: str, hf_config: Any, checkpoint: Checkpoint
) -> dict[str, Promise]:
    """Promises for torch files that are not looked into: names and shapes are those of
    transformers' model, the dtype is what the configuration says, or what the size of the files
    does.

    Raises:
        UnsupportedArchitectureError: transformers has no code for the architecture.
    """
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise UnsupportedArchitectureError(
            f"{checkpoint.label} has torch files, whose headers cannot be read by themselves, and "
            f"transformers has no {architecture} to take their shapes from. Download it first."
        )
    model = empty_model(model_class, hf_config, torch.float32)
    weights = {id(tensor): (name, tensor) for name, tensor in model.named_parameters()}
    dtype = declared_dtype(hf_config)
    if dtype is None:
        size = checkpoint.weight_bytes / max(sum(t.numel() for _, t in weights.values()), 1)
        dtype = torch.float32 if size > 3 else torch.float16
    return {
        name: Promise.of(MemorySource(torch.empty(tensor.shape, dtype=dtype, device="meta"), name))
        for name, tensor in weights.values()
    }


def tree_from_checkpoint(
    promises: Mapping[str, Promise],
    hf_config: Any,
    architecture: str,
    dtype: torch.dtype,
    spec: Spec | None = None,
    model_class: Any = None,
    *,
    dense: bool = False,
) -> tuple[Any, Ledger]:
    """The module tree of a checkpoint.

    Args:
        promises: the checkpoint's tensors, by the names of its files.
        hf_config: the Hugging Face configuration; not changed.
        architecture: name of the transformers class, such as "LlamaForCausalLM".
        dtype: what stock would load the Hugging Face model in; each weight is cast to it first.
        spec: how the checkpoint is quantized, if it is.
        model_class: transformers' class, if it is not the one of that name.
        dense: make ordinary weights of quantized ones.

    Returns:
        The tree, and what did not fit: missing, unexpected and misshapen names.
    """
    if spec is None:
        refuse_undeclared(promises)
    else:
        promises = combine(promises, spec, dtype, dense=dense)
    model_class = model_class or getattr(transformers, architecture, None)
    if model_class is None:
        integers = {n: p.dtype for n, p in promises.items() if not p.is_floating_point()}
        weights = {n: t for n, t in integers.items() if not n.endswith(("bias", "mask"))}
        ledger = Ledger(integers=weights)
        renaming = without_wrappers(promises)
        ledger.note(renaming)
        return _bare_tree(renaming.apply(promises), hf_config, dtype), ledger
    model = empty_model(model_class, hf_config, dtype)
    ledger = fill_tree(model, promises, dtype)
    if spec is not None:
        _forget_zero_biases(ledger, promises)
    return model, ledger


def _forget_zero_biases(ledger: Ledger, promises: Mapping[str, Promise]) -> None:
    zeros = set(zero_biases(ledger.unexpected, promises))
    if zeros:
        ledger.unexpected = [name for name in ledger.unexpected if name not in zeros]
        ledger.notes.append(
            f"{len(zeros)} biases of quantized weights, which the model does not have, are zeros "
            "and were left out."
        )


def fill_tree(model: Any, promises: Mapping[str, Promise], dtype: torch.dtype) -> Ledger:
    """Put promises in place of a model's meta weights, under transformers' own renaming and tying
    rules.
    """
    found, ledger = rename_to_model(model, promises, dtype)
    first = {name: group[0] for group in ledger.tied for name in group}
    lacking: dict[str, Promise] = {}
    for group in ledger.tied:
        present = [name for name in group if name in found]
        for name in group:
            if present and name not in found:
                found[name] = found[present[0]]
    for name, like in list(model.state_dict(keep_vars=True).items()):
        promise: Any = found.get(name)
        if promise is not None and is_stored_quantized(promise.node):
            # transformers turns GPT-2's Conv1D into a linear layer when it quantizes.
            layer = model.get_submodule(name.rpartition(".")[0])
            if is_conv1d(type(layer)):
                # Ordinary ones lie as a Conv1D's, whose means would be rounded otherwise.
                is_bytes = reads_quantized(promise.node)
                promise = promise.t() if is_bytes else promise.t().contiguous()
        if promise is not None and like.is_floating_point() and not promise.is_floating_point():
            ledger.integers[name] = promise.dtype
        if promise is None:
            name_of_all = first.get(name, name)
            missing = Promise.of(MissingSource(name_of_all, like))
            promise = lacking.setdefault(name_of_all, missing)
        elif promise.shape != like.shape:
            ledger.misshapen[name] = (tuple(promise.shape), tuple(like.shape))
        put(model, name, promise)
    return ledger


def tree_from_model(hf_model: Any, dtype: torch.dtype, is_outline: bool = False) -> Any:
    """A shadow of the caller's model: the same modules in form, promises for weights, nothing
    shared that changes.

    Args:
        hf_model: the caller's model.
        dtype: what quantized weights compute in.
        is_outline: the model has no values, and needs none.
    """
    if not isinstance(hf_model, nn.Module):
        return hf_model
    for name, tensor in hf_model.named_parameters():
        if tensor.device.type == "meta" and not is_outline:
            raise CheckpointError(
                f"hf_model has no values for {name}: it is on the meta device (offloaded to disk, "
                "or never loaded). Load it without offloading, or pass the folder, not hf_model."
            )
    promises: dict[int, Promise] = {}
    return _shadow(hf_model, "", promises, dtype)


def _shadow(
    module: nn.Module, prefix: str, promises: dict[int, Promise], dtype: torch.dtype
) -> nn.Module:
    quantized: Any = promise_of_layer(module, f"{prefix}weight", dtype)
    if quantized is not None:
        # transformers turns GPT-2's Conv1D into a linear layer when it quantizes.
        quantized = quantized.t() if is_conv1d(getattr(module, "source_cls", None)) else quantized
        shadow = plain_layer(module, quantized.shape)
    else:
        shadow = object.__new__(type(module))
        shadow.__dict__ = dict(module.__dict__)
    # Scales are read already; compressed-tensors leaves them beside what it has decompressed.
    has_scales = quantized is not None or hasattr(module, "quantization_scheme")
    for kind in ("_parameters", "_buffers"):
        shadow.__dict__[kind] = {
            name: None if tensor is None else _promise_once(tensor, prefix + name, promises)
            for name, tensor in getattr(module, kind).items()
            if not has_scales or name == "bias" or (name == "weight" and quantized is None)
        }
    if quantized is not None:
        shadow.__dict__["_parameters"]["weight"] = _as_parameter(quantized)
    shadow.__dict__["_modules"] = {
        name: None if child is None else _shadow(child, f"{prefix}{name}.", promises, dtype)
        for name, child in module._modules.items()
    }
    return shadow


def plain_layer(module: nn.Module, shape: torch.Size) -> nn.Module:
    """The layer, without parameters, that a quantized one was made from: a linear one, or
    transformers' Conv1D.

    Args:
        module: the quantized layer.
        shape: of the plain layer's weight.
    """
    source: Any = getattr(module, "source_cls", None)
    made: Any = object.__new__(source if is_conv1d(source) else nn.Linear)
    nn.Module.__init__(made)
    first, second = ("nx", "nf") if is_conv1d(source) else ("out_features", "in_features")
    setattr(made, first, shape[0])
    setattr(made, second, shape[1])
    made.training = module.training
    plain: nn.Module = made
    return plain


def _promise_once(tensor: torch.Tensor, name: str, promises: dict[int, Promise]) -> Promise:
    if id(tensor) not in promises:
        # TransformerLens refuses weights on the meta device, where those of an outline lie.
        device = torch.device("cpu") if tensor.is_meta else tensor.device
        promises[id(tensor)] = _as_parameter(Promise.of(MemorySource(tensor, name), device))
        promises[id(tensor)].is_trained = tensor.requires_grad
    return promises[id(tensor)]


def missing_names(root: Any) -> list[str]:
    """Weights of a module tree that the checkpoint does not have."""
    if not hasattr(root, "named_parameters"):
        return []
    return sorted(
        name
        for name, promise in root.named_parameters()
        if isinstance(promise, Promise)
        and isinstance(promise.node, SourceView)
        and isinstance(promise.node.source, MissingSource)
    )


def _bare_tree(promises: Mapping[str, Promise], hf_config: Any, dtype: torch.dtype) -> Branch:
    tree = Branch(hf_config)
    for name, promise in promises.items():
        tree.place(name, promise.to(dtype) if promise.is_floating_point() else promise)
    is_tied = getattr(hf_config, "tie_word_embeddings", True)
    if is_tied and "lm_head.weight" not in promises and "transformer.wte.weight" in promises:
        tree.place("lm_head.weight", promises["transformer.wte.weight"].to(dtype))
    return tree


def put(tree: Any, name: str, promise: Promise) -> None:
    """Put a promise at the dotted name of a parameter or buffer of a module tree."""
    if isinstance(tree, Branch):
        tree.place(name, _as_parameter(promise))
        return
    parent_name, _, leaf = name.rpartition(".")
    parent = tree.get_submodule(parent_name)
    holder = parent._parameters if leaf in parent._parameters else parent._buffers
    # transformers lets whatever it loads be trained.
    promise.is_trained = leaf in parent._parameters and promise.is_floating_point()
    holder[leaf] = _as_parameter(promise)


def _as_parameter(promise: Promise) -> Promise:
    promise._is_param = True  # how nn.Parameter recognises tensor subclasses
    return promise
