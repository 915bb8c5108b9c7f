"""A transformers model that carries unmerged LoRA adapters of peft: its plain base, and the
adapters as if they came from disk.

Reading such a model's `weight` attributes gives the base weights: its adapters would be lost
without a word.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

from tl_fastload.errors import AdapterError
from tl_fastload.huggingface.lora.adapter import Adapter, check_config, sort_tensors
from tl_fastload.huggingface.lora.merge import Weights, merge
from tl_fastload.recipes.nodes import MemorySource
from tl_fastload.recipes.promise import Promise

# Where peft's wrappers keep the module that they stand for.
_INSIDE = ("base_layer", "token_adapter", "original_module")


def adapters_of(hf_model: Any) -> tuple[Any, list[Adapter]]:
    """The base model of a model with adapters, and its active adapters; the model itself and none
    for others.

    Args:
        hf_model: a transformers model, or a `peft.PeftModel`; not changed.

    Raises:
        AdapterError: adapters that are no LoRA, or merged already.
    """
    if "peft" not in sys.modules or not isinstance(hf_model, nn.Module):
        return hf_model, []
    from peft import PeftModel

    base = hf_model.get_base_model() if isinstance(hf_model, PeftModel) else hf_model
    layers = {name: m for name, m in base.named_modules() if _holds_adapter(m)}
    if not layers and base is hf_model:
        return hf_model, []
    configs = getattr(hf_model, "peft_config", {})
    other = [str(getattr(c, "peft_type", c)) for c in configs.values() if not _is_lora(c)]
    if other or not layers:
        raise AdapterError(
            f"hf_model carries an adapter of the kind {', '.join(other) or 'without layers'}, "
            "which is not merged here. Pass hf_model=peft_model.merge_and_unload() if it can merge."
        )
    if any(getattr(layer, "merged", False) for layer in layers.values()):
        raise AdapterError(
            "hf_model has adapters that are merged into its weights but still in place. Pass "
            "hf_model=peft_model.merge_and_unload(), or call unmerge_adapter() first."
        )
    return base, [_adapter(hf_model, name, layers) for name in _active(layers)]


def merge_into_model(adapters: Sequence[Adapter], root: Any) -> None:
    """Take the modules that peft put around its own out of the tree of a model in memory, and
    merge adapters into it.

    Args:
        adapters: those that the model carries, and others; may be none.
        root: of `tl_fastload.huggingface.tree.tree_from_model`; changed.
    """
    if isinstance(root, nn.Module) and "peft" in sys.modules:
        _unwrap(root)
    if not adapters:
        return
    if not isinstance(root, nn.Module):
        raise AdapterError(
            f"adapter= needs a transformers model as hf_model, not a {type(root).__name__}."
        )
    merge(adapters, Weights(root))


def _unwrap(root: Any) -> None:
    """Put the modules that peft wraps in place of its wrappers."""
    for name, child in list(root._modules.items()):
        plain = child
        while _holds_adapter(plain):
            inside = plain._modules
            plain = next((inside[part] for part in _INSIDE if part in inside), None)
        if plain is not None:
            root._modules[name] = plain
            _unwrap(plain)


def _holds_adapter(module: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import other

    wrapper = getattr(other, "AuxiliaryTrainingWrapper", other.ModulesToSaveWrapper)
    return isinstance(module, (BaseTunerLayer, wrapper))


def _is_lora(config: Any) -> bool:
    kind = getattr(config, "peft_type", None)
    return getattr(kind, "value", kind) == "LORA"


def _active(layers: dict[str, Any]) -> list[str]:
    names: dict[str, None] = {}
    for layer in layers.values():
        if getattr(layer, "disable_adapters", False):
            continue
        active = getattr(layer, "active_adapters", ())
        names.update(dict.fromkeys([active] if isinstance(active, str) else active))
    return list(names)


def _adapter(hf_model: Any, name: str, layers: dict[str, Any]) -> Adapter:
    from peft import get_peft_model_state_dict

    label, config = f"{name!r} of hf_model", hf_model.peft_config[name]
    check_config(config, label, {}, is_live=True)
    adapter = Adapter(label, config)
    tensors = get_peft_model_state_dict(hf_model, adapter_name=name, save_embedding_layers=False)
    promises = {
        key: Promise.of(MemorySource(tensor, key), tensor.device) for key, tensor in tensors.items()
    }
    sort_tensors(adapter, promises)
    for module, layer in layers.items():
        scaling = getattr(layer, "scaling", {}).get(name)
        if scaling is not None:  # may have been set since
            adapter.scalings[module] = float(scaling)
    return adapter
