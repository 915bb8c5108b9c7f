"""From the tensor names of a checkpoint to the names of a transformers model.

The rules are transformers' own: version 5 has a table of renamings and conversions (per-expert
matrices are merged, for instance), which is run on promises; version 4 only adds or strips the
base model's prefix.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tl_fastload.ground import compat
from tl_fastload.ground.own_defaults import looking_only
from tl_fastload.ground.wrappers import Renaming, without_prefixes
from tl_fastload.recipes.promise import Promise

# Tables that old checkpoints carry and no model reads: causal masks and rotary frequencies.
_NOT_WEIGHTS = re.compile(
    r"(\.attn\.(masked_)?bias|\.attention\.(masked_)?bias|masked_bias|rotary_emb\.(inv_freq|cos_cached|sin_cached)"
    r"|rotary_pos_emb\.inv_freq|position_ids)$"
)
_LAYER = re.compile(r"(?:^|\.)(?:h|layers|blocks)\.(\d+)\.")


@dataclass
class Ledger:
    """What a checkpoint has and a model does not, and the other way round.

    Attributes:
        unexpected: checkpoint names that no part of the model takes.
        misshapen: model name -> (shape in the file, shape that the configuration asks for).
        integers: model name -> dtype, where a weight should be.
        incomplete: model name of a merged weight -> why its parts could not be merged.
        tied: groups of model names that are one weight.
        notes: what was done to the checkpoint's names, for the report.
    """

    unexpected: list[str] = field(default_factory=list)
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    integers: dict[str, torch.dtype] = field(default_factory=dict)
    incomplete: dict[str, str] = field(default_factory=dict)
    tied: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether all weights that the checkpoint has can be the model's."""
        return not (self.unexpected or self.misshapen or self.integers or self.incomplete)

    def note(self, renaming: Renaming) -> None:
        """Take the notes of a renaming, or why there was none."""
        self.notes.extend(renaming.notes)
        if renaming.ambiguous is not None:
            self.notes.append(f"No prefix was taken off the weights' keys: {renaming.ambiguous}.")


def rename_to_model(
    model: Any, promises: Mapping[str, Promise], dtype: torch.dtype
) -> tuple[dict[str, Promise], Ledger]:
    """Rename, cast and convert promises as transformers would on loading.

    Args:
        model: a transformers model on the meta device.
        promises: by checkpoint name.
        dtype: the dtype that the model is loaded in.

    Returns:
        Promises by model name, and the ledger of what is tied and of what fitted nowhere.
    """
    wanted: dict[str, Any] = model.state_dict(keep_vars=True)
    plan = _dtype_plan(model, dtype)

    def cast(name: str, promise: Promise) -> Any:
        if not promise.is_floating_point():
            return promise
        planned = plan.get(name)
        return promise.to(planned or wanted[name].dtype)

    groups = tied_groups(model)
    tied = {name for group in groups for name in group}
    renaming = without_prefixes(promises, lambda name: name if name in wanted else None, groups)
    bare = renaming.apply(promises)
    if bare.keys() <= wanted.keys() and wanted.keys() - bare.keys() <= tied:
        # Every name is the model's own: transformers' table, slow to build, has nothing to say.
        ledger = Ledger(notes=list(renaming.notes), tied=groups)
        return {name: cast(name, promise) for name, promise in bare.items()}, ledger
    rules = (
        _rules_of_table(model, wanted)
        if compat.HAS_WEIGHT_CONVERSIONS
        else _rules_of_prefix(model, wanted)
    )
    return _rename(model, promises, wanted, cast, groups, rules)


@dataclass(frozen=True)
class _Rules:
    """How transformers renames and converts the tensors of a checkpoint.

    Attributes:
        renamed: name -> the model's name, and the pattern of the conversion that it is a part of.
        converters: pattern -> the conversion.
        order: the key of the order in which parts are collected.
    """

    renamed: Callable[[str], tuple[str, str | None]]
    converters: Mapping[str, Any] = field(default_factory=dict)
    order: Callable[[str], Any] = str


def _rules_of_table(model: Any, wanted: dict[str, Any]) -> _Rules:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    table = get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix

    def renamed(name: str) -> tuple[str, str | None]:
        target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = rename_source_key(name, [], [], prefix, wanted)
        return target, pattern

    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    return _Rules(renamed, by_pattern, dot_natural_key)


def _rules_of_prefix(model: Any, wanted: dict[str, Any]) -> _Rules:
    prefix = model.base_model_prefix + "."
    renames = getattr(model, "_checkpoint_conversion_mapping", None) or {}

    def renamed(name: str) -> tuple[str, str | None]:
        for pattern, replacement in renames.items():
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        candidates = (name, prefix + name, name.removeprefix(prefix))
        return next((c for c in candidates if c in wanted), name), None

    return _Rules(renamed)


def _rename(
    model: Any,
    promises: Mapping[str, Promise],
    wanted: dict[str, Any],
    cast: Any,
    groups: list[list[str]],
    rules: _Rules,
) -> tuple[dict[str, Promise], Ledger]:
    def fits(name: str) -> str | None:
        target, pattern = rules.renamed(name)
        # Parts of a merged weight have one target, and are known by their own names.
        return None if target not in wanted else target if pattern is None else name

    found: dict[str, Promise] = {}
    collected: dict[str, Any] = {}
    ledger = Ledger(tied=groups)
    renaming = without_prefixes(promises, fits, groups)
    ledger.note(renaming)
    promises = renaming.apply(promises)
    for name in sorted(promises, key=rules.order):
        target, pattern = rules.renamed(name)
        if target not in wanted:
            _note_unexpected(model, name, target, ledger)
        elif pattern is None:
            found[target] = cast(target, promises[name])
        else:
            converter = collected.setdefault(target, copy.deepcopy(rules.converters[pattern]))
            value = cast(target, promises[name])
            converter.add_tensor(target, name, pattern, lambda value=value: value)
    for target, converter in collected.items():
        try:
            converted = converter.convert(target, model=model, config=model.config)
        except (RuntimeError, IndexError, ValueError) as error:
            ledger.incomplete[target] = str(error).splitlines()[0]
            continue
        for name, value in converted.items():
            found[name] = value[0] if isinstance(value, list) else value
    return found, ledger


def _note_unexpected(model: Any, name: str, target: str, ledger: Ledger) -> None:
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
    if _NOT_WEIGHTS.search(name) or any(
        re.search(p, key) for p in patterns for key in (name, target)
    ):
        return
    ledger.unexpected.append(name)


def _dtype_plan(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Model names that transformers keeps in another dtype than the one asked for."""
    if not hasattr(model, "_get_dtype_plan"):
        return {}
    rules: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    if not rules:
        return {}
    from transformers.core_model_loading import build_glob_alternation

    pattern, by_group, _ = build_glob_alternation(list(rules))
    plan: dict[str, torch.dtype] = {}
    for name in model.state_dict():
        match = pattern.search(name)
        if match is not None and match.lastgroup is not None:
            plan[name] = rules[by_group[match.lastgroup]]
    return plan


def layer_of(name: str) -> int | None:
    """The number of the layer that a weight of a transformers model belongs to; None outside."""
    found = _LAYER.search(name)
    return None if found is None else int(found.group(1))


def is_conv1d(cls: Any) -> bool:
    """Whether a class is transformers' `Conv1D`, whose weight is [in, out]."""
    return getattr(cls, "__name__", "") == "Conv1D"


@looking_only
def tied_groups(model: Any) -> list[list[str]]:
    """Groups of names that are one parameter in this model."""
    groups: dict[Any, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # By memory: under accelerate's `init_empty_weights` each name has an object of its own.
        memory = parameter.untyped_storage()._cdata, parameter.storage_offset(), parameter.shape
        groups[memory].append(name)
    return [names for names in groups.values() if len(names) > 1]
