"""LoRA adapters on disk or on the hub: found, their configuration read with peft's own classes, and
their tensors sorted by what they do. Only headers are read here.

peft is imported when an adapter is asked for, not before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tl_fastload.errors import (
    AdapterError,
    ArgumentError,
    CheckpointError,
    MissingPackageError,
    UnknownModelError,
)
from tl_fastload.ground.paths import exists, expanded, is_directory
from tl_fastload.ground.wrappers import WRAPPER_PARTS
from tl_fastload.huggingface.lora.patterns import matches
from tl_fastload.recipes.promise import Promise
from tl_fastload.request.adapters import Requests
from tl_fastload.source import schemas
from tl_fastload.source.checkpoint import open_weights
from tl_fastload.source.choose import stays_inside
from tl_fastload.source.hub import HubOptions
from tl_fastload.source.json_files import read_object
from tl_fastload.source.links import check_link
from tl_fastload.source.location import Location, file_names, in_repo
from tl_fastload.source.reader import FileReader

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

# Fields of LoraConfig that the merge follows, or that only concern training.
_FOLLOWED = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha"),
    *("lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save", "lora_bias"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern"),
    *("alpha_pattern", "megatron_config", "megatron_core", "trainable_token_indices"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_dora"),
    *("velora_config", "qalora_group_size", "runtime_config", "target_parameters"),
    "ensure_weight_tying",  # judged by what was trained
}
# Ways to initialise that subtract something from the base weights, unlike the others.
_CHANGES_BASE = re.compile(r"(pissa.*|olora|corda|loftq|lora_ga)$", re.IGNORECASE)
_MARKS = frozenset("*+?{}()[]|\\^$")  # of regular expressions, but for the dot
# `torch.compile` and parallel wrappers, around peft's model or inside it, put their parts in front.
_WRAPPERS = rf"(?:(?:{'|'.join(WRAPPER_PARTS)})\.)*"
_PREFIX = re.compile(rf"^{_WRAPPERS}base_model\.{_WRAPPERS}model\.")
_LOW_RANK = re.compile(
    r"^(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(?:\.[^.]+)??(?:\.(?P<leaf>weight|bias))?$"
)
_TOKENS = re.compile(r"^(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?$")
_WRAPPER = re.compile(r"\.(?:base_layer|modules_to_save)(?:\.default)?(?=\.[^.]+$)")


@dataclass
class LowRank:
    """The low-rank update of one module.

    Attributes:
        module: dotted name of the module, as in the adapter.
        is_embedding: whether `a` is [rank, tokens] and `b` [width, rank], for an embedding.
        a: [rank, in].
        b: [out, rank].
        bias: [out], added (scaled) to the module's bias; or None.
        magnitude: [out], the lengths of DoRA; or None.
    """

    module: str
    is_embedding: bool = False
    a: Promise | None = None
    b: Promise | None = None
    bias: Promise | None = None
    magnitude: Promise | None = None


@dataclass
class Adapter:
    """A LoRA adapter, known but not read.

    Attributes:
        label: for messages and the report.
        config: peft's `LoraConfig`.
        weight: what the low-rank updates are multiplied by.
        low_rank: module -> its update.
        replaced: parameter -> the tensor that takes its place (`modules_to_save`, biases).
        tokens: module of an embedding -> new rows of `config.trainable_token_indices`.
        scalings: module -> scaling, where it is not the configuration's.
        former: module -> what the adapter calls it, where that is another name than the model's.
        size: how many low-rank updates it has.
    """

    label: str
    config: Any
    weight: float = 1.0
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    replaced: dict[str, Promise] = field(default_factory=dict)
    tokens: dict[str, Promise] = field(default_factory=dict)
    scalings: dict[str, float] = field(default_factory=dict)
    former: dict[str, str] = field(default_factory=dict)
    size: int = 0

    def scaling(self, module: str) -> float:
        """What the product of a module's factors is multiplied by, as in peft's `update_layer`."""
        if module in self.scalings:
            return self.weight * self.scalings[module]
        alpha = self._by_pattern(self.config.alpha_pattern, module, self.config.lora_alpha)
        rank = self.rank(module)
        return self.weight * float(alpha / (math.sqrt(rank) if self.config.use_rslora else rank))

    def rank(self, module: str) -> int:
        """The rank that the configuration gives a module."""
        return int(self._by_pattern(self.config.rank_pattern, module, self.config.r))

    def _by_pattern(self, patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
        """The value for a module by the model's name of it, or by the adapter's."""
        former = _by_pattern(patterns, self._key(self.former.get(module, module)), default)
        return _by_pattern(patterns, self._key(module), former)

    def rename(self, module: str, found: str) -> None:
        """Give what belongs to a module the model's name of it.

        Raises:
            AdapterError: something else has that name.
        """
        tables: tuple[dict[str, Any], ...] = (self.low_rank, self.tokens, self.replaced)
        for table in tables:
            if found in table and module in table:
                raise_for(self, [f"twice: {module} and {found} are the same module"])
            if module in table:
                table[found] = table.pop(module)
        if found in self.low_rank:
            self.low_rank[found].module = found
        if module in self.scalings:
            self.scalings[found] = self.scalings.pop(module)
        self.former[found] = module

    def _key(self, module: str) -> str:
        """What patterns are matched with: the module, or the parameter that is targeted itself."""
        parameter = f"{module}.weight"
        targets = getattr(self.config, "target_parameters", None) or ()
        return parameter if any(ends_with(parameter, target) for target in targets) else module

    def describe(self) -> str:
        """One line for the report."""
        weight = "" if self.weight == 1 else f" times {self.weight:g}"
        kind = "DoRA" if getattr(self.config, "use_dora", False) else "LoRA"
        parts = [f"{kind} of {self.size} matrices"] if self.size else []
        if self.replaced:
            parts.append(f"{len(self.replaced)} tensors replaced")
        if self.tokens:
            parts.append("token embeddings replaced")
        return f"{self.label}{weight} ({', '.join(parts)})"


def ends_with(path: str, end: str) -> bool:
    """Whether the last parts of a dotted path are these."""
    return path == end or path.endswith("." + end)


def is_in(name: str, module: str) -> bool:
    """Whether a weight belongs to a module that is named by the end of its path."""
    return f".{module}." in f".{name}"


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that fits a module's name: peft's `get_pattern_key`."""
    for pattern, value in (patterns or {}).items():
        if matches(rf"(.*\.)?({pattern})$", module, whole=False):
            return value
    return default


def open_adapters(
    requests: Requests, locations: Sequence[Location], reader: FileReader
) -> list[Adapter]:
    """Read the configurations and headers of adapters.

    Args:
        requests: from `read_adapter_argument`.
        locations: where each of them lies, from `locate_adapter`.
        reader: reads the weights later.

    Raises:
        MissingPackageError: peft is not installed.
        CheckpointError: an adapter cannot be had.
        AdapterError: it is of another kind, or does something that cannot be merged.
    """
    adapters = []
    for (_, weight), location in zip(requests, locations, strict=True):
        reader.files.see(location.folder / CONFIG)
        config = read_config(location.folder, location.label)
        adapter = Adapter(location.label, config, weight)
        sort_tensors(adapter, _tensors(location, reader))
        adapters.append(adapter)
    return adapters


def import_peft() -> Any:
    """peft, or a MissingPackageError that says how to get it."""
    try:
        import peft
    except ImportError as error:
        raise MissingPackageError(
            f"adapter= reads adapters with peft, which cannot be imported ({error}). Install it: "
            'pip install "peft>=0.11"'
        ) from error
    return peft


def locate_adapter(name: str, keywords: dict[str, Any]) -> Location:
    """Find an adapter's folder; of one on the hub, its configuration is fetched and its commit is
    resolved.

    Args:
        name: a folder; or "organisation/name", perhaps with "/subfolder" and "@revision".
        keywords: how to reach the hub, as for the model; its revision and subfolder are not the
            adapter's.

    Raises:
        UnknownModelError, CheckpointError: it cannot be had, or is none.
    """
    folder = expanded(name)
    if is_directory(folder):
        if not (folder / CONFIG).is_file():
            raise CheckpointError(
                f"{folder} has no {CONFIG}: it holds no adapter. Pass the folder that peft's "
                "save_pretrained wrote."
            )
        check_link(folder, CONFIG)
        return Location(folder, str(folder))
    repo, _, revision = name.partition("@")
    parts = repo.split("/")
    is_path = folder.is_absolute() or parts[0] in (".", "..", "") or name.startswith("~")
    if is_path or exists(folder):
        raise UnknownModelError(
            f"There is no folder {folder.absolute()}. Check the path; an adapter on the hub is "
            "written 'organisation/name', 'organisation/name/subfolder' or "
            "'organisation/name@revision'."
        )
    keywords = {k: v for k, v in keywords.items() if k not in ("revision", "subfolder")}
    options = HubOptions(revision=revision or None, **keywords)
    repo, subfolder = "/".join(parts[:2]), "/".join(parts[2:])
    if not stays_inside(subfolder):
        raise ArgumentError(f"The adapter {name!r} leaves its repository. Pass a folder inside it.")
    try:
        location = in_repo(repo, subfolder, CONFIG, options)
    except (UnknownModelError, CheckpointError) as error:
        message = f"Cannot find the adapter {name!r}. There is no folder {folder.absolute()}. "
        raise type(error)(message + str(error)) from error
    label = f"{repo}{f'/{subfolder}' if subfolder else ''}@{options.revision_name}"
    return replace(location, label=label)


def read_config(folder: Path, label: str) -> Any:
    """peft's `LoraConfig` of an adapter.

    Raises:
        MissingPackageError: peft is not installed.
        AdapterError: it is no LoRA, or has fields that change the result in an unknown way.
    """
    path = folder / CONFIG
    remedy = "Save the adapter again with peft's save_pretrained."
    stored = read_object(path, remedy, kind=AdapterError)
    kind = stored.get("peft_type")
    if not isinstance(kind, str):
        raise AdapterError(f"{path} is no adapter configuration: it has no peft_type. {remedy}")
    if kind != "LORA":
        raise AdapterError(
            f"{label} is an adapter of the kind {kind}, which is not merged here: only LORA is. "
            "Load it with peft, and pass hf_model=peft_model.merge_and_unload() if it can merge."
        )
    schemas.check(stored, schemas.ADAPTER, str(path), remedy, kind=AdapterError)
    _check_names(stored, path)
    peft = import_peft()
    try:
        # Fields of newer versions are judged below; peft would warn of them.
        known = {one.name for one in fields(peft.LoraConfig) if one.init} - {"runtime_config"}
        config = peft.LoraConfig(**{name: stored[name] for name in stored if name in known})
    except Exception as error:  # peft's classes raise anything for values they do not expect
        raise AdapterError(
            f"peft {peft.__version__} cannot read {path}: {error}. The adapter was saved by peft "
            f"{stored.get('peft_version', 'of an unknown version')}: install that one or a newer."
        ) from error
    check_config(config, label, stored)
    return config


def _check_names(stored: Mapping[str, Any], path: Path) -> None:
    """Refuse expressions where peft expects names, but puts them into expressions of its own."""
    for name in ("modules_to_save", "layers_pattern"):
        value = stored.get(name) or ()
        strange = [
            one for one in ([value] if isinstance(value, str) else value) if not _is_name(one)
        ]
        if strange:
            raise AdapterError(
                f"{path}: {name} has {strange[0][:80]!r}, which is no module's name. Correct it."
            )


def _is_name(text: str) -> bool:
    return len(text) < 1000 and not set(text) & _MARKS


def check_config(
    config: Any, label: str, stored: Mapping[str, Any], *, is_live: bool = False
) -> None:
    """Raise AdapterError for a LoRA that is more than low-rank products added to weights.

    Args:
        config: peft's `LoraConfig`.
        label: the adapter, for messages.
        stored: the fields as they are in the file.
        is_live: whether the base weights are those of a model that holds the adapter.
    """
    unknown = sorted(
        name
        for name in {*stored, *vars(config)} - _FOLLOWED
        if stored.get(name) or getattr(config, name, None)
    )
    if unknown:
        raise AdapterError(
            f"{label} sets {', '.join(unknown)}, which may change what the model computes and "
            "cannot be merged here. If peft can merge it, pass "
            "hf_model=peft_model.merge_and_unload()."
        )
    initial = config.init_lora_weights
    if not is_live and isinstance(initial, str) and _CHANGES_BASE.match(initial):
        raise AdapterError(
            f"{label} has init_lora_weights={initial!r}: it belongs to base weights from which "
            "that initialisation was subtracted. Save it as an ordinary LoRA, with peft's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...), or pass "
            "hf_model=peft_model.merge_and_unload()."
        )


def _tensors(location: Location, reader: FileReader) -> dict[str, Promise]:
    names = file_names(location).files
    found = next((name for name in WEIGHTS if name in names), None)
    if found is None:
        raise CheckpointError(
            f"{location.label} has neither {' nor '.join(WEIGHTS)}: the adapter's weights are "
            "missing. Save it again with peft's save_pretrained, or download it again."
        )
    promises, _ = open_weights(location, weights_file=found).promises(reader)
    return promises


def sort_tensors(adapter: Adapter, tensors: Mapping[str, Promise]) -> None:
    """Sort an adapter's tensors, by the names that peft gives them, into its fields.

    Raises:
        AdapterError: a factor stands alone, or a tensor is no number or no part of a LoRA.
    """
    problems = []
    for full_name, tensor in sorted(tensors.items()):
        name = _PREFIX.sub("", full_name)
        low_rank, tokens = _LOW_RANK.match(name), _TOKENS.match(name)
        if ".original_module." in name:
            continue  # with `bias="all"`, beside the trained copy that takes its place
        if not tensor.is_floating_point():
            problems.append(f"not weights: {full_name} holds {tensor.dtype}")
        elif low_rank is not None:
            module = low_rank["module"]
            part = adapter.low_rank.setdefault(module, LowRank(module))
            _add(part, low_rank["part"], low_rank["leaf"] or "weight", tensor)
        elif tokens is not None:
            adapter.tokens[tokens["module"]] = tensor
        elif ".lora_" in name:
            problems.append(f"unknown: {full_name}")
        else:
            adapter.replaced[_WRAPPER.sub("", name)] = tensor
    for part in adapter.low_rank.values():
        names = ("lora_embedding_A", "lora_embedding_B") if part.is_embedding else (
            "lora_A", "lora_B"
        )  # fmt: skip
        for leaf, factor in zip(names, (part.a, part.b), strict=True):
            if factor is None:
                problems.append(f"missing: {part.module}.{leaf}")
    problems += _bad_settings(adapter)
    adapter.size = len(adapter.low_rank)
    if not tensors:
        problems.append("missing: it has no tensors at all")
    raise_for(adapter, problems)


def _bad_settings(adapter: Adapter) -> list[str]:
    """Numbers and patterns of the configuration that mean nothing."""
    try:
        for field_name in ("target_modules", "exclude_modules"):
            pattern = getattr(adapter.config, field_name, None)
            matches(pattern if isinstance(pattern, str) else "", "", whole=True)
        for module in adapter.low_rank:
            adapter.scaling(module)
    except AdapterError as error:
        return [str(error)]
    except (TypeError, ValueError, ZeroDivisionError) as error:
        return [f"lora_alpha, r or their patterns are no numbers to scale by: {error}"]
    return []


def _add(part: LowRank, kind: str, leaf: str, tensor: Promise) -> None:
    part.is_embedding = part.is_embedding or kind.startswith("embedding")
    if kind == "magnitude_vector":
        part.magnitude = tensor
    elif leaf == "bias":
        part.bias = tensor
    elif kind.endswith("A"):
        part.a = tensor
    else:
        part.b = tensor


def raise_for(adapter: Adapter, problems: Sequence[str]) -> None:
    """Raise one AdapterError with all problems of an adapter, if there are any."""
    if problems:
        base = base_of(adapter)
        raise AdapterError(
            f"The adapter {adapter.label} cannot be merged:\n  "
            + "\n  ".join(problems)
            + "\nNothing was loaded. Check that the adapter is complete, and that it was trained "
            f"on this model{f' (it names {base} as its base)' if base else ''}."
        )


def base_of(adapter: Adapter) -> str | None:
    """The name or folder of the model that an adapter was trained on, if it says so."""
    base = getattr(adapter.config, "base_model_name_or_path", None)
    return str(base) if base else None
