"""Where a model comes from: a folder, the hub, the caller's `hf_model`, or a `.pth` toy model.

An origin answers what TransformerLens' own loading functions ask: it is the
`tl_fastload.hooked.stock.Answers`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tl_fastload.errors import ArgumentError, CheckpointError, UnsupportedArchitectureError
from tl_fastload.ground.wrappers import without_wrappers
from tl_fastload.hooked.architectures import architecture_of
from tl_fastload.hooked.config import config_dict, load_hf_config
from tl_fastload.hooked.observer import Observer
from tl_fastload.hooked.official_names import official_name, resolve_model
from tl_fastload.hooked.stock import is_toy_name, stock_name_for
from tl_fastload.hooked.tokenizer import fetch_tokenizer
from tl_fastload.hooked.toy import outline_of_toy
from tl_fastload.huggingface import config, tree
from tl_fastload.huggingface.dequantize import (
    dequantized_here,
    load_dequantized,
    outline_dequantized,
)
from tl_fastload.huggingface.keys import Ledger
from tl_fastload.huggingface.lora.adapter import Adapter, open_adapters
from tl_fastload.huggingface.lora.base_model import compare_bases
from tl_fastload.huggingface.lora.live import adapters_of, merge_into_model
from tl_fastload.huggingface.lora.merge import Weights, merge, merge_into_files, requantized
from tl_fastload.quantized.assemble import spec_of_layers
from tl_fastload.quantized.formats import descriptions, of_checkpoint
from tl_fastload.quantized.spec import Spec, as_dtype
from tl_fastload.recipes.promise import Promise
from tl_fastload.report.available import check_room
from tl_fastload.request.keywords import Keywords, override, sort_keywords
from tl_fastload.request.options import Options
from tl_fastload.source.checkpoint import (
    Checkpoint,
    Location,
    names_at_hand,
    open_weights,
)
from tl_fastload.source.hub import repo_files
from tl_fastload.source.links import check_all_links
from tl_fastload.source.location import is_directory
from tl_fastload.source.reader import FileMaps, FileReader
from tl_fastload.source.remote import open_headers


@dataclass
class Origin:
    """A model on disk, on the hub or in memory.

    Attributes:
        label: for the report.
        stock_name: the name that TransformerLens' functions see.
        official: TransformerLens' official name, or None.
        is_toy: a `.pth` model in TransformerLens' own naming.
        hf_config: the Hugging Face configuration; None for toy models.
        hf_model: the caller's model, or None.
        location: folder or repository; None with `hf_model` alone.
        keywords: how to reach the files.
        reader: reads the files.
        options: strategy, mapping, quantization.
        spec: how the weights are quantized already, if they are.
        dequantized: how those were that become ordinary weights while they are read.
        notes: for the report.
        ledger: what of the checkpoint fitted nowhere; filled by `tree`.
        root: the module tree of promises; filled by `tree`.
        checkpoint: the opened weight files; filled by `tree`.
        n_layers: layers of the whole model, once its configuration is known.
        adapters: what is merged into the weights.
        is_recording: whether TransformerLens' converter or processing runs on the tree just now.
        stock_ledger: counts what stock would need; None unless that is wanted.
        commit: of the hub repository that the weights come from; None for anything else.
    """

    label: str
    stock_name: str
    official: str | None
    is_toy: bool
    hf_config: Any
    hf_model: Any
    location: Location | None
    keywords: Keywords
    reader: FileReader
    options: Options
    spec: Spec | None = None
    dequantized: Spec | None = None
    notes: list[str] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    root: Any = None
    checkpoint: Checkpoint | None = None
    n_layers: int | None = None
    adapters: list[Adapter] = field(default_factory=list)
    is_recording: bool = False
    stock_ledger: Observer | None = None
    commit: str | None = None

    def hf_config_dict(self) -> dict[str, Any]:
        if self.hf_model is None:
            return {}
        values: dict[str, Any] = self.hf_config.to_dict()
        values.pop("quantization_config", None)
        return values

    def config_dict(self, **kwargs: Any) -> dict[str, Any]:
        fields, notes = config_dict(
            self.hf_config,
            official_name=self.official,
            tokenizer_name=self._tokenizer_name(),
            trust_remote_code=self.keywords.trust_remote_code,
        )
        self.notes.extend(notes)
        self.n_layers = fields["n_layers"]
        return fields

    def check_config(self, cfg: Any) -> None:
        """Raise ArgumentError if more layers are asked for than the model has."""
        if self.n_layers is not None and cfg.n_layers > self.n_layers:
            raise ArgumentError(
                f"first_n_layers={cfg.n_layers}, but {self.label} has {self.n_layers} layers."
            )

    def _tokenizer_name(self) -> str | None:
        if self.location is None:
            return self.official
        if self.location.repo is None:
            return str(self.location.folder) if has_tokenizer(self.location) else None
        return self.official or self.location.repo

    def tokenizer_folder(self) -> Path | None:
        """Where the tokenizer's files lie beside the weights, if they do.

        Raises:
            LeanLoadError: they cannot be had from the hub.
        """
        location = self.location
        if location is None or has_tokenizer(location):
            return None if location is None else location.folder
        if location.repo is None or self.is_toy:  # whose configuration names another repository
            return None
        return fetch_tokenizer(location, code=self.keywords.trust_remote_code)

    def tree(self, revision: str | None, dtype: Any) -> Any:
        self.is_recording = True
        self.root = self._tree(revision, dtype)
        if self.adapters:
            self.notes.extend(self._compare_bases())
        if self.stock_ledger is not None:
            self.stock_ledger.hold(self.root.parameters(), caller_holds=self.hf_model is not None)
        return self.root

    def _tree(self, revision: str | None, dtype: Any) -> Any:
        if self.hf_model is not None:
            is_outline = self.options.only_plan and self.options.dequantize
            root = tree.tree_from_model(self.hf_model, dtype, is_outline=is_outline)
            merge_into_model(self.adapters, root)
            return root
        checkpoint = self._open(revision)
        if checkpoint.is_outline:
            architecture = architecture_of(self.hf_config)
            promises = tree.outline_promises(architecture, self.hf_config, checkpoint)
        else:
            promises = self._promises(checkpoint)
        root, self.ledger = self._grow(promises, dtype)
        if self.adapters:
            weights = Weights(root, self.ledger.tied)
            if merge_into_files(self.adapters, weights, promises, dtype):
                root, self.ledger = self._grow(promises, dtype)
                weights = Weights(root, self.ledger.tied)
            merge(self.adapters, weights, requantized)
        self.notes.extend(self.ledger.notes)
        return root

    def _compare_bases(self) -> list[str]:
        own_name = getattr(self.hf_config, "_name_or_path", None)
        sure: list[Any] = [own_name]
        if self.location is not None:
            folder, repo = self.location.folder, self.location.repo
            sure = [folder] if repo is None else [repo, self.official]
        names = [str(name) for name in sure if name]
        aliases = [self.label, self.official, own_name]
        return compare_bases(self.adapters, names, aliases, check=self.options.check_base)

    def _grow(self, promises: dict[str, Promise], dtype: torch.dtype) -> tuple[Any, Ledger]:
        architecture = architecture_of(self.hf_config)
        return tree.tree_from_checkpoint(
            promises,
            self.hf_config,
            architecture,
            dtype,
            self.spec or self.dequantized,
            dense=self.dequantized is not None,
        )

    def missing(self) -> list[str]:
        """Names of the module tree's weights that the checkpoint does not have."""
        return tree.missing_names(self.root)

    def _open(self, revision: str | None) -> Checkpoint:
        location = self.location
        if location is None:
            raise ArgumentError(f"{self.label}: there is no checkpoint to read, pass hf_model.")
        if revision is not None and location.repo is not None:
            hub = {**self.keywords.hub, "revision": revision}
            location = resolve_model(location.repo, **hub)
            self.label, self.commit = location.label, location.commit
        if self.options.only_plan:
            files = {**self.keywords.files, "needs_values": descriptions()}
            self.checkpoint = open_headers(location, **files)
        else:
            self.checkpoint = open_weights(location, **self.keywords.files)
        self.notes.extend(self.checkpoint.notes)
        self._prepare(self.checkpoint)
        return self.checkpoint

    def _prepare(self, checkpoint: Checkpoint) -> None:
        """Decide what is mapped, and refuse what would be read into memory and cannot be held."""
        self.reader.maps = FileMaps(self.reader.files) if self.options.may_map(checkpoint) else None
        if self.options.check_memory and not self.options.only_plan:
            whole = checkpoint.read_whole_bytes(mmap=self.reader.maps is not None)
            check_room({torch.device("cpu"): whole}, self.label)

    def _promises(self, checkpoint: Checkpoint) -> dict[str, Promise]:
        # A plan looks at the names and shapes in a torch file, which mapping gives it.
        mmap = self.reader.maps is not None or self.options.only_plan
        promises, notes = tree.checkpoint_promises(checkpoint, self.reader, mmap)
        self.notes.extend(notes)
        return promises

    def outline(self, cfg: Any) -> dict[str, Promise] | None:
        if not (self.is_toy and self.options.only_plan and self.location is not None):
            return None
        wanted = f"{cfg.checkpoint_value}.pth" if cfg.from_checkpoint else "final.pth"
        found = [name for name in repo_names(self.location) if name.endswith(wanted)]
        if not found:
            return None
        self.checkpoint = open_headers(self.location, weights_file=found[0])
        return outline_of_toy(cfg) if self.checkpoint.is_outline else None

    def list_repo_files(self, *args: Any, **kwargs: Any) -> list[str]:
        return repo_names(self._place())

    def download_file_from_hf(self, repo: str, file_name: str, **kwargs: Any) -> Any:
        location = self._place()
        if file_name == "config.json":
            fields = config.read_config_json(location.folder)
            self.n_layers = fields["n_layers"]
            return fields
        self.checkpoint = open_weights(location, weights_file=file_name)
        self._prepare(self.checkpoint)
        promises = self._promises(self.checkpoint)
        renaming = without_wrappers(promises)
        self.notes.extend(renaming.notes)
        promises = renaming.apply(promises)
        if self.stock_ledger is not None:
            self.stock_ledger.hold(promises.values(), caller_holds=False)
        return promises

    def _place(self) -> Location:
        if self.location is None:
            raise ArgumentError(f"{self.label} is not a hub name or a folder.")
        return self.location


def repo_names(location: Location) -> list[str]:
    """Names of all files of a location, those in its folders included."""
    if location.repo is not None:
        return repo_files(location.repo, location.options)
    return sorted(
        path.relative_to(location.folder).as_posix()
        for path in location.folder.rglob("*")
        if path.is_file()
    )


def find_origin(
    model_name: str | Path,
    hf_model: Any,
    keywords: dict[str, Any],
    reader: FileReader,
    options: Options,
    dtype: str | torch.dtype,
) -> Origin:
    """Find a model and read its configuration, no weights.

    Args:
        model_name: TransformerLens name or alias, hub name, or local folder.
        hf_model: the caller's transformers model, or None; its own configuration is used then.
        keywords: keyword arguments for Hugging Face.
        reader: reads the files later.
        options: strategy, mapping, quantization.
        dtype: what transformers dequantizes to, if it is asked to.

    Raises:
        UnknownModelError, CheckpointError, UnsupportedArchitectureError, ArgumentError,
        AdapterError.
    """
    if not isinstance(model_name, (str, Path)):
        raise ArgumentError(
            f"model_name={model_name!r} is a {type(model_name).__name__}: pass a name or a folder."
        )
    sorted_keywords = sort_keywords(keywords)
    is_folder = isinstance(model_name, Path) or is_directory(Path(model_name))
    # A folder wins over a name, as in transformers.
    official = None if is_folder else official_name(str(model_name))
    adapters = open_adapters(options.adapter, sorted_keywords.hub, reader)
    if hf_model is not None:
        origin = _from_model(model_name, official, hf_model, sorted_keywords, reader, options)
        origin.adapters += adapters
        return origin
    location = resolve_model(model_name, **sorted_keywords.hub)
    reader.files.see(location.folder / "config.json")
    is_toy = is_toy_name(official) or _is_toy_folder(location)
    stock_name = stock_name_for(official, location.repo or location.label)
    hf_config, spec, dequantized = None, None, None
    if is_toy and official is None:
        stock_name = _toy_name(location)
    if not is_toy:
        trust = sorted_keywords.trust_remote_code
        hf_config = load_hf_config(location.folder, trust_remote_code=trust)
        hf_config = override(hf_config, sorted_keywords.overrides)
        here = dequantized_here(hf_config, location.label) if options.dequantize else None
        if here is not None:
            hf_config, dequantized = here
        elif options.dequantize:
            check_all_links(location.folder)  # transformers reads what it likes
            load = outline_dequantized if options.only_plan else load_dequantized
            hf_model = load(location.folder, hf_config, as_dtype(dtype))
            hf_config = hf_model.config
        spec = of_checkpoint(hf_config, location.label)
    return Origin(
        label=location.label,
        stock_name=stock_name,
        official=official,
        is_toy=is_toy,
        hf_config=hf_config,
        hf_model=hf_model,
        location=location,
        keywords=sorted_keywords,
        reader=reader,
        options=options,
        spec=spec,
        dequantized=dequantized,
        commit=location.commit,
        adapters=adapters,
    )


def _from_model(
    name: str | Path,
    official: str | None,
    hf_model: Any,
    keywords: Keywords,
    reader: FileReader,
    options: Options,
) -> Origin:
    if not hasattr(hf_model, "config"):
        raise ArgumentError(
            f"hf_model is a {type(hf_model).__name__} without a configuration. Pass a transformers "
            "model, such as AutoModelForCausalLM.from_pretrained(...) returns."
        )
    hf_model, adapters = adapters_of(hf_model)
    try:
        architecture_of(hf_model.config)
    except UnsupportedArchitectureError as error:
        raise UnsupportedArchitectureError(
            f"hf_model is a {type(hf_model).__name__}. {error}"
        ) from error
    return Origin(
        label="hf_model",
        stock_name=stock_name_for(official, str(name)),
        official=official,
        is_toy=False,
        hf_config=hf_model.config,
        hf_model=hf_model,
        location=resolve_model(name) if is_directory(Path(name)) else None,
        keywords=keywords,
        reader=reader,
        options=options,
        spec=of_checkpoint(hf_model.config, "hf_model") or spec_of_layers(hf_model),
        adapters=adapters,
    )


def has_tokenizer(location: Location) -> bool:
    """Whether a local folder holds a tokenizer's files."""
    names = (
        "tokenizer.json",
        "tokenizer.model",
        "vocab.json",
        "vocab.txt",
        "tokenizer_config.json",
    )
    return any((location.folder / name).is_file() for name in names)


def _is_toy_folder(location: Location) -> bool:
    return config.is_toy(config.read_config_json(location.folder))


def _toy_name(location: Location) -> str:
    """A name whose prefix sends TransformerLens to its toy branch; "_old" marks the early SoLU
    format.
    """
    values = config.read_config_json(location.folder)
    name = location.folder.name
    if "architecture" not in values and "_old" not in name and _has_old_names(location):
        name += "_old"
    return f"NeelNanda/{name}"


def _has_old_names(location: Location) -> bool:
    weights = [name for name in names_at_hand(location) if name.endswith("final.pth")]
    if not weights:
        raise CheckpointError(
            f"{location.label} has the configuration of a toy model but no file that ends in "
            "final.pth. Put the weights beside config.json."
        )
    contents = open_weights(location, weights_file=weights[0]).load_tensors()
    return any("norm" in name for name in contents.tensors)
