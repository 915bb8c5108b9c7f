"""Whether a LoRA adapter holds what its configuration names, and nothing besides: peft would load
what fits, and leave out the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from tl_fastload.huggingface.lora.adapter import Adapter, ends_with, import_peft, is_in
from tl_fastload.huggingface.lora.patterns import matches

# Modules whose weights may be tied, in the models that are loaded here.
_TIED = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")


def discrepancies(adapter: Adapter, by_name: Mapping[str, Any], done: Collection[str]) -> list[str]:
    """What the configuration names and the adapter lacks, and the other way round.

    Args:
        adapter: read, and merged.
        by_name: the model's weights, by the tree's names.
        done: the names of those that its updates were added to.
    """
    return [
        *_modules(adapter, by_name, done),
        *_parameters(adapter, by_name, done),
        *_saved(adapter, by_name),
        *_biases(adapter, by_name, done),
        *_tokens(adapter),
        *_tied(adapter),
    ]


def _modules(adapter: Adapter, by_name: Mapping[str, Any], done: Collection[str]) -> Iterator[str]:
    config = adapter.config
    parameters = getattr(config, "target_parameters", None)
    if config.target_modules is None and not parameters and adapter.low_rank:
        yield "target_modules: the configuration does not say what the adapter updates"
    if not config.target_modules or config.target_modules == "all-linear":
        return
    import_peft()
    from peft.tuners.tuners_utils import check_target_module_exists

    def is_target(module: str) -> bool:
        return bool(check_target_module_exists(_decided(config, module), module))

    for name, promise in by_name.items():
        module, _, leaf = name.rpartition(".")
        is_matrix = leaf == "weight" and promise.dim() == 2 and name not in done
        if is_matrix and is_target(module):
            yield f"missing: lora_A and lora_B of {module}, which target_modules names"
    if parameters:
        return  # names of stacks say nothing about modules
    for module in adapter.low_rank:
        names = (module, adapter.former.get(module, module))
        if not any(is_target(name) for name in names):
            yield f"an update of {module}, which the configuration does not target"


def _decided(config: Any, module: str) -> Any:
    """The configuration without regular expressions: what they say of a module is a name, or none.
    peft would match them in a time that nobody can bound.
    """
    changed = copy.copy(config)
    for name in ("target_modules", "exclude_modules"):
        pattern = getattr(config, name, None)
        if isinstance(pattern, str):
            setattr(changed, name, [module] if matches(pattern, module, whole=True) else [])
    return changed


def _parameters(
    adapter: Adapter, by_name: Mapping[str, Any], done: Collection[str]
) -> Iterator[str]:
    for target in getattr(adapter.config, "target_parameters", None) or ():
        for name in by_name:
            if ends_with(name, target) and name not in done:
                yield f"missing: lora_A and lora_B of {name}, which target_parameters names"


def _saved(adapter: Adapter, by_name: Mapping[str, Any]) -> Iterator[str]:
    for module in adapter.config.modules_to_save or ():
        is_there = any(is_in(name, module) for name in by_name)
        if is_there and not any(is_in(name, module) for name in adapter.replaced):
            yield f"missing: the weights of {module}, which modules_to_save names"


def _biases(adapter: Adapter, by_name: Mapping[str, Any], done: Collection[str]) -> Iterator[str]:
    kind = adapter.config.bias
    if kind == "none" or any(name.endswith("bias") for name in adapter.replaced):
        return
    updated = {name.rpartition(".")[0] for name in done}
    for name in by_name:
        module, _, leaf = name.rpartition(".")
        if leaf == "bias" and (kind == "all" or module in updated):
            yield f"missing: trained biases, such as {name}; the configuration has bias={kind!r}"
            return


def _tokens(adapter: Adapter) -> Iterator[str]:
    if getattr(adapter.config, "trainable_token_indices", None) and not adapter.tokens:
        yield "missing: the rows of trainable_token_indices"


def _tied(adapter: Adapter) -> Iterator[str]:
    """What `ensure_weight_tying` would give a second module as well; most adapters that set it
    train nothing that is tied.
    """
    if not getattr(adapter.config, "ensure_weight_tying", False):
        return
    weights = [name.rpartition(".")[0] for name in adapter.replaced if name.endswith("weight")]
    for module in dict.fromkeys([*adapter.low_rank, *weights, *adapter.tokens]):
        if module.rpartition(".")[2] in _TIED:
            yield (
                f"trained with ensure_weight_tying: {module}, whose change belongs to what it is "
                "tied to as well. peft can merge it: pass hf_model=peft_model.merge_and_unload()"
            )
