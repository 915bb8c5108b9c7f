"""A pretrained model in Hugging Face's terms: where it lies, its configuration, its weights as a
module tree of promises. No road is known here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tl_fastload.errors import ArgumentError, CheckpointError, UnsupportedArchitectureError
from tl_fastload.ground.paths import is_directory
from tl_fastload.huggingface import tree
from tl_fastload.huggingface.config import Supported, architecture_of, read_config, read_config_json
from tl_fastload.huggingface.dequantize import (
    dequantized_here,
    load_dequantized,
    outline_dequantized,
)
from tl_fastload.huggingface.gguf import from_gguf, read_gguf_config
from tl_fastload.huggingface.gguf_tokenizer import has_gguf_tokenizer, write_gguf_tokenizer
from tl_fastload.huggingface.keys import Ledger
from tl_fastload.huggingface.lora.adapter import Adapter, locate_adapter, open_adapters
from tl_fastload.huggingface.lora.base_model import compare_bases
from tl_fastload.huggingface.lora.live import adapters_of, merge_into_model
from tl_fastload.huggingface.lora.merge import Weights, merge, merge_into_files
from tl_fastload.huggingface.sketch import sketch
from tl_fastload.huggingface.tokenizer import fetch_tokenizer, has_tokenizer
from tl_fastload.quantized.assemble import is_quantized, spec_of_layers
from tl_fastload.quantized.formats import descriptions, of_checkpoint
from tl_fastload.quantized.spec import Spec
from tl_fastload.recipes.promise import Promise
from tl_fastload.report.available import check_room
from tl_fastload.request.adapters import Requests
from tl_fastload.request.keywords import Keywords, override
from tl_fastload.request.options import Options
from tl_fastload.source.aliases import NO_ALIASES, Aliases
from tl_fastload.source.checkpoint import Checkpoint, open_weights
from tl_fastload.source.choose import is_bare
from tl_fastload.source.gguf import GgufHeader
from tl_fastload.source.hub import HubOptions, list_files
from tl_fastload.source.links import check_all_links
from tl_fastload.source.location import Location, fetch, file_names
from tl_fastload.source.location import locate as locate_files
from tl_fastload.source.reader import FileMaps, FileReader
from tl_fastload.source.remote import open_headers


@dataclass(frozen=True)
class Located:
    """Where a model and the adapters for it lie: found once for each call.

    Attributes:
        name: as the caller wrote it.
        official: what it is called on the hub by the library that has aliases; None without one.
        location: folder or repository; None for a model in memory whose name is no folder.
        adapters: where each adapter lies.
    """

    name: str | Path
    official: str | None
    location: Location | None
    adapters: tuple[Location, ...] = ()


def locate(
    name: Any, *, in_memory: bool, adapters: Requests, hub: Mapping[str, Any], aliases: Aliases
) -> Located:
    """Find a model and its adapters; of those on the hub, only their configurations are fetched.

    Args:
        name: of the model: one that `aliases` has, a hub name, or a folder.
        in_memory: whether the weights are those of a model in memory.
        adapters: which ones.
        hub: keyword arguments that say how to reach it.
        aliases: names beside those on the hub.

    Raises:
        UnknownModelError, CheckpointError, ArgumentError: something cannot be found.
    """
    if not isinstance(name, (str, Path)):
        raise ArgumentError(
            f"model_name={name!r} is a {type(name).__name__}: pass a name or a folder."
        )
    is_folder = isinstance(name, Path) or is_directory(Path(name))
    location = None
    if not in_memory:
        location = _files_at(name, hub, aliases)
    elif is_directory(Path(name)):
        location = _files_at(name, {}, aliases)
    return Located(
        name,
        None if is_folder else aliases.official(str(name)),  # a folder wins, as in transformers
        location,
        tuple(locate_adapter(one, dict(hub)) for one, _ in adapters),
    )


def _files_at(name: str | Path, hub: Mapping[str, Any], aliases: Aliases = NO_ALIASES) -> Location:
    options = {key: value for key, value in hub.items() if key not in ("subfolder", "gguf_file")}
    place = hub.get("subfolder", ""), aliases, hub.get("gguf_file")
    return locate_files(name, HubOptions(**options), *place)


@dataclass
class Pretrained:
    """A pretrained model, known and not read.

    Attributes:
        label: for messages and the report.
        config: transformers' configuration; None for a model in a library's own format.
        supported: which model classes can be loaded.
        reader: reads the files.
        options: strategy, mapping, dequantizing, adapters.
        keywords: how to reach the files, and whether code of the checkpoint may run.
        official: as in `Located`.
        location: as in `Located`.
        commit: of the hub repository that the weights come from; None for anything else.
        name: what the caller called it, or its repository.
        raw: the fields of `config.json`; None for a model in memory.
        hf_model: transformers' model in memory, or None.
        spec: how the weights are quantized already, if they are.
        dequantized: how those were that become ordinary weights while they are read.
        adapters: what is merged into the weights.
        headers_only: whether weight files are to be known by their headers alone.
        promises: the weights, where they are at hand already: name -> promise.
        notes: for the report.
        ledger: what of the checkpoint fitted nowhere; filled by `tree`.
        root: the module tree of promises; made by `tree`.
        checkpoint: the opened weight files.
        is_recording: whether some road's code runs on the tree just now.
        model_class: transformers' class, if a road takes another one than the architecture's.
        gguf: of a GGUF file, its header; None for anything else.
    """

    label: str
    config: Any
    supported: Supported
    reader: FileReader
    options: Options
    keywords: Keywords = field(default_factory=Keywords)
    official: str | None = None
    location: Location | None = None
    commit: str | None = None
    name: str = ""
    raw: Mapping[str, Any] | None = None
    hf_model: Any = None
    spec: Spec | None = None
    dequantized: Spec | None = None
    adapters: Sequence[Adapter] = ()
    headers_only: bool = False
    promises: Mapping[str, Promise] | None = None
    notes: list[str] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    root: Any = None
    checkpoint: Checkpoint | None = None
    is_recording: bool = False
    model_class: Any = None
    gguf: GgufHeader | None = None

    @classmethod
    def of_weights(
        cls,
        label: str,
        promises: Mapping[str, Promise],
        config: Any,
        supported: Supported,
        reader: FileReader,
    ) -> Pretrained:
        """Weights under the names of their files, for a configuration that is known."""
        spec = of_checkpoint(config, label) if is_quantized(promises) else None
        options = Options(strategy="copy")
        return cls(label, config, supported, reader, options, spec=spec, promises=promises)

    @property
    def architecture(self) -> str:
        """The name of transformers' class."""
        return architecture_of(self.config, self.supported)

    def tree(self, dtype: torch.dtype, revision: str | None = None) -> Any:
        """transformers' module tree with a promise for each weight, adapters merged.

        Args:
            dtype: what transformers would load the model in.
            revision: another one than was asked for, of a model on the hub.

        Raises:
            LeanLoadError: there are no such weights, or they cannot be what they must be.
        """
        self.is_recording = True
        if self.hf_model is not None:
            is_outline = self.headers_only and self.options.dequantize
            self.root = tree.tree_from_model(self.hf_model, dtype, is_outline=is_outline)
            merge_into_model(self.adapters, self.root)
        else:
            self.root = self._tree_of_files(dtype, revision)
        if self.adapters:
            self.notes.extend(self._compare_bases())
        return self.root

    def _tree_of_files(self, dtype: torch.dtype, revision: str | None) -> Any:
        promises = dict(self._promises(revision, dtype) if self.promises is None else self.promises)
        root = self._grow(promises, dtype)
        if self.adapters:
            weights = Weights(root, self.ledger.tied)
            if merge_into_files(self.adapters, weights, promises, dtype):
                root = self._grow(promises, dtype)
                weights = Weights(root, self.ledger.tied)
            merge(self.adapters, weights)
        self.notes.extend(self.ledger.notes)
        return root

    def _promises(self, revision: str | None, dtype: torch.dtype) -> dict[str, Promise]:
        checkpoint = self.open(revision=revision)
        if checkpoint.is_outline:
            return tree.outline_promises(self.architecture, self.config, checkpoint)
        promises = self.promises_of(checkpoint)
        if self.gguf is None:
            return promises
        spec = self.spec or self.dequantized
        return from_gguf(promises, self.gguf, self.config, spec, dtype, dense=self.spec is None)

    def _grow(self, promises: Mapping[str, Promise], dtype: torch.dtype) -> Any:
        root, self.ledger = tree.tree_from_checkpoint(
            promises,
            self.config,
            self.architecture,
            dtype,
            None if self.gguf is not None else self.spec or self.dequantized,
            self.model_class,
            dense=self.dequantized is not None,
        )
        return root

    def _compare_bases(self) -> list[str]:
        own_name = getattr(self.config, "_name_or_path", None)
        sure: list[Any] = [own_name]
        if self.location is not None:
            folder, repo = self.location.folder, self.location.repo
            sure = [folder] if repo is None else [repo, self.official]
        names = [str(name) for name in sure if name]
        aliases = [self.label, self.official, own_name]
        return compare_bases(self.adapters, names, aliases, check=self.options.check_base)

    def missing(self) -> list[str]:
        """Names of the module tree's weights that the checkpoint does not have."""
        return tree.missing_names(self.root)

    def place(self) -> Location:
        """Where it lies.

        Raises:
            ArgumentError: it is in memory only.
        """
        if self.location is None:
            raise ArgumentError(f"{self.label}: there is no checkpoint to read, pass hf_model.")
        return self.location

    def open(self, *, revision: str | None = None, weights_file: str | None = None) -> Checkpoint:
        """The weight files, opened; which of their contents are mapped is decided.

        Args:
            revision: another one than was asked for, of a model on the hub.
            weights_file: this file and no other.

        Raises:
            LeanLoadError: they cannot be had, or what would be read into memory does not fit.
        """
        location = self.place()
        if revision is not None and location.repo is not None:
            location = _files_at(location.repo, {**self.keywords.hub, "revision": revision})
            self.label, self.commit = location.label, location.commit
        files = {"weights_file": weights_file} if weights_file else dict(self.keywords.files)
        if self.headers_only:
            try:
                checkpoint = open_headers(location, needs_values=descriptions(), **files)
            except CheckpointError:
                if files or not is_bare(file_names(location).files):
                    raise
                is_quantized = self.spec is not None
                checkpoint = sketch(
                    location, self.architecture, self.config, quantized=is_quantized
                )
        else:
            checkpoint = open_weights(location, **files)
        self.checkpoint = checkpoint
        if weights_file is None:
            self.notes.extend(checkpoint.notes)
        may_map = self.options.may_map(checkpoint)
        self.reader.maps = FileMaps(self.reader.files) if may_map else None
        if self.options.check_memory and not self.headers_only:
            whole = checkpoint.read_whole_bytes(mmap=may_map)
            check_room({torch.device("cpu"): whole}, self.label)
        return checkpoint

    def promises_of(self, checkpoint: Checkpoint) -> dict[str, Promise]:
        """A promise for every tensor of opened files, under the files' names."""
        # A plan looks at the names and shapes in a torch file, which mapping gives it.
        mmap = self.reader.maps is not None or self.headers_only
        promises, notes = checkpoint.promises(self.reader, mmap=mmap)
        self.notes.extend(notes)
        return promises

    def file_names(self) -> list[str]:
        """Names of all files where it lies, those in folders included."""
        location = self.place()
        if location.repo is not None:
            return (location.listing or list_files(location.repo, location.options)).files
        paths = (path for path in location.folder.rglob("*") if path.is_file())
        return sorted(path.relative_to(location.folder).as_posix() for path in paths)

    def tokenizer_name(self) -> str | None:
        """What its tokenizer is called: a folder or a hub name; None for a model without one."""
        if self.location is None:
            return self.official
        if self.gguf is not None:
            name = self.location.repo or self.location.label
            return name if has_gguf_tokenizer(self.gguf) else None
        if self.location.repo is None:
            return str(self.location.folder) if has_tokenizer(self.location.folder) else None
        return self.official or self.location.repo

    @contextmanager
    def tokenizer_folder(self) -> Iterator[Path | None]:
        """Where the tokenizer's files lie beside the weights, if they do; that of a GGUF file is
        written into a folder for the moment.

        Raises:
            Exception: anything at all, as tokenizers do; LeanLoadError where the files cannot be
                had from the hub.
        """
        location = self.location
        if location is not None and location.gguf_file is not None:
            with tempfile.TemporaryDirectory(prefix="tl_fastload-") as folder:
                write_gguf_tokenizer(fetch(location, location.gguf_file), Path(folder))
                yield Path(folder)
        elif location is None or has_tokenizer(location.folder):
            yield None if location is None else location.folder
        elif location.repo is None or self.config is None:  # which names another repository itself
            yield None
        else:
            yield fetch_tokenizer(location, code=self.keywords.trust_remote_code)


def find(
    located: Located,
    options: Options,
    keywords: Keywords,
    supported: Supported,
    reader: FileReader,
    *,
    dtype: torch.dtype,
    hf_model: Any = None,
    headers_only: bool = False,
) -> Pretrained:
    """Read the configuration of a model that was located; no weights.

    Args:
        located: where it lies.
        options: strategy, mapping, dequantizing, adapters.
        keywords: for Hugging Face.
        supported: which model classes can be loaded.
        reader: reads the files later.
        dtype: what transformers dequantizes to, if it is asked to.
        hf_model: the caller's transformers model; its own configuration is used then.
        headers_only: whether weight files are to be known by their headers alone.

    Raises:
        CheckpointError, UnsupportedArchitectureError, ArgumentError, AdapterError.
    """
    adapters = open_adapters(options.adapter, located.adapters, reader)
    found = Pretrained(
        "hf_model",
        None,
        supported,
        reader,
        options,
        keywords,
        located.official,
        located.location,
        name=str(located.name),
        adapters=adapters,
        headers_only=headers_only,
    )
    if hf_model is not None:
        _take_model(found, hf_model)
        return found
    location = found.place()
    found.label, found.commit = location.label, location.commit
    found.name = location.repo or location.label
    trust = keywords.trust_remote_code
    if location.gguf_file is not None:
        found.gguf, found.raw = read_gguf_config(location, supported, reader, headers_only)
    else:
        reader.files.see(location.folder / "config.json")
        found.raw = read_config_json(location.folder)
        if supported.own_format(located.official, found.raw):
            return found
    config = read_config(
        location.folder,
        supported,
        trust_remote_code=trust,
        raw=found.raw,
        file=location.gguf_file or "config.json",
    )
    found.config = override(config, keywords)
    here = dequantized_here(found.config, location.label) if options.dequantize else None
    if here is not None:
        found.config, found.dequantized = here
    elif options.dequantize:
        check_all_links(location.folder)  # transformers reads what it likes
        load = outline_dequantized if headers_only else load_dequantized
        found.hf_model = load(location.folder, found.config, dtype)
        found.config = found.hf_model.config
    found.spec = of_checkpoint(found.config, location.label)
    return found


def _take_model(found: Pretrained, hf_model: Any) -> None:
    """Let the weights be those of a model in memory."""
    if not hasattr(hf_model, "config"):
        raise ArgumentError(
            f"hf_model is a {type(hf_model).__name__} without a configuration. Pass a transformers "
            "model, such as AutoModelForCausalLM.from_pretrained(...) returns."
        )
    found.hf_model, adapters = adapters_of(hf_model)
    found.config = found.hf_model.config
    found.adapters = [*adapters, *found.adapters]
    try:
        architecture_of(found.config, found.supported)
    except UnsupportedArchitectureError as error:
        raise UnsupportedArchitectureError(
            f"hf_model is a {type(found.hf_model).__name__}. {error}"
        ) from error
    found.spec = of_checkpoint(found.config, "hf_model") or spec_of_layers(found.hf_model)
