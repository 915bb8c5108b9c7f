"""The checkpoint that a configuration describes where no weights are: enough for a plan."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
import transformers

from tl_fastload.errors import CheckpointError
from tl_fastload.ground.compat import item_bytes
from tl_fastload.ground.hf_configs import declared_dtype
from tl_fastload.huggingface.empty import empty_model
from tl_fastload.source.checkpoint import Checkpoint
from tl_fastload.source.location import Location
from tl_fastload.source.safetensors import TensorEntry


def sketch(location: Location, architecture: str, hf_config: Any, *, quantized: bool) -> Checkpoint:
    """What transformers would save of such a model, as one safetensors file in the dtype that the
    configuration names (float32 without one). The entries must not be read.

    Args:
        location: where `config.json` lies.
        architecture: name of the transformers class, such as "LlamaForCausalLM".
        hf_config: the configuration.
        quantized: whether it says that the weights are.

    Raises:
        CheckpointError: the configuration alone does not say which tensors there would be.
    """
    model_class = getattr(transformers, architecture, None)
    if model_class is None or quantized:
        why = "they are quantized" if quantized else f"transformers has no class {architecture}"
        raise CheckpointError(
            f"{location.label} has a configuration and no weights, and which tensors there would "
            f"be it does not say: {why}. Download the weights, or plan the unquantized model."
        )
    dtype = declared_dtype(hf_config) or torch.float32
    path, end = location.folder / "model.safetensors", 0
    entries: dict[str, TensorEntry] = {}
    for name, like in empty_model(model_class, hf_config, torch.float32).named_parameters():
        size = like.numel() * item_bytes(dtype)
        entries[name] = TensorEntry(name, dtype, tuple(like.shape), path, end, size)
        end += size
    note = (
        "There are no weights, only a configuration: planned is what transformers would save of "
        f"it, in {str(dtype).removeprefix('torch.')}."
    )
    return Checkpoint(
        folder=location.folder,
        label=location.label,
        files=(path,),
        entries=MappingProxyType(entries),
        commit=location.commit,
        notes=(*location.notes, note),
        weight_bytes=end,
        missing_bytes=0 if location.repo is None else end,
    )
