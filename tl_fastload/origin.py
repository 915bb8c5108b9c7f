"""Where a model comes from: a folder, the hub, the caller's `hf_model`, or a `.pth` toy model.

An origin answers what TransformerLens' own loading functions ask (`tl_fastload.stock.Answers`).
"""

from __future__ import annotations

import copy
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tl_fastload import config, tree
from tl_fastload.checkpoint import Checkpoint, Location, names_at_hand, open_weights, resolve_config
from tl_fastload.errors import ArgumentError, CheckpointError
from tl_fastload.hub import repo_files
from tl_fastload.keys import Ledger
from tl_fastload.names import official_name
from tl_fastload.reader import FileReader
from tl_fastload.stock import is_toy_name, stock_name_for

_HUB_KEYWORDS = (
    "revision",
    "cache_dir",
    "token",
    "local_files_only",
    "force_download",
    "subfolder",
)
_FILE_KEYWORDS = ("variant", "use_safetensors")
# Ways of loading that transformers has and that change nothing here: weights are streamed anyway.
_WITHOUT_EFFECT = ("low_cpu_mem_usage", "attn_implementation", "proxies", "resume_download")


@dataclass
class Keywords:
    """The keyword arguments for Hugging Face, sorted by who takes them.

    Attributes:
        hub: how to find the files.
        files: which of the weight files to take.
        overrides: fields of the Hugging Face configuration to set.
        trust_remote_code: whether code of the checkpoint may run.
    """

    hub: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False


def sort_keywords(keywords: dict[str, Any]) -> Keywords:
    """Sort the keyword arguments that `from_pretrained` would hand to Hugging Face.

    Raises:
        ArgumentError: for one that contradicts how weights are loaded here.
    """
    found = Keywords()
    for name, value in keywords.items():
        if name == "use_auth_token":
            found.hub["token"] = value
        elif name in _HUB_KEYWORDS:
            found.hub[name] = value
        elif name in _FILE_KEYWORDS:
            found.files[name] = value
        elif name == "trust_remote_code":
            found.trust_remote_code = bool(value)
        elif name in ("device_map", "max_memory"):
            raise ArgumentError(
                f"{name}= is transformers' way to spread a model; here use device= and n_devices=."
            )
        elif name not in _WITHOUT_EFFECT:
            found.overrides[name] = value
    return found


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
        notes: for the report.
        ledger: what of the checkpoint fitted nowhere; filled by `tree`.
        root: the module tree of promises; filled by `tree`.
        checkpoint: the opened weight files; filled by `tree`.
        n_layers: layers of the whole model, once its configuration is known.
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
    notes: list[str] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    root: Any = None
    checkpoint: Checkpoint | None = None
    n_layers: int | None = None

    def hf_config_dict(self) -> dict[str, Any]:
        if self.hf_model is None:
            return {}
        values: dict[str, Any] = self.hf_config.to_dict()
        values.pop("quantization_config", None)
        return values

    def config_dict(self, **kwargs: Any) -> dict[str, Any]:
        fields, notes = config.config_dict(
            self.hf_config,
            official_name=self.official,
            tokenizer_name=self._tokenizer_name(),
            trust_remote_code=self.keywords.trust_remote_code,
        )
        self.notes.extend(notes)
        self.n_layers = fields["n_layers"]
        return fields

    def _tokenizer_name(self) -> str | None:
        if self.location is None:
            return self.official
        if self.location.repo is None:
            return str(self.location.folder) if has_tokenizer(self.location) else None
        return self.official or self.location.repo

    def tree(self, revision: str | None, dtype: Any) -> Any:
        if self.hf_model is not None:
            self.root = tree.tree_from_model(self.hf_model)
            return self.root
        checkpoint = self._open(revision)
        promises, notes = tree.checkpoint_promises(checkpoint, self.reader)
        self.notes.extend(notes)
        architecture = config.architecture_of(self.hf_config)
        self.root, self.ledger = tree.tree_from_checkpoint(
            promises, self.hf_config, architecture, dtype
        )
        return self.root

    def _open(self, revision: str | None) -> Checkpoint:
        location = self.location
        if location is None:
            raise ArgumentError(f"{self.label}: there is no checkpoint to read, pass hf_model.")
        if revision is not None and location.repo is not None:
            hub = {**self.keywords.hub, "revision": revision}
            location = resolve_config(location.repo, **hub)
            self.label = location.label
        self.checkpoint = open_weights(location, **self.keywords.files)
        self.notes.extend(self.checkpoint.notes)
        return self.checkpoint

    def list_repo_files(self, *args: Any, **kwargs: Any) -> list[str]:
        location = self._place()
        if location.repo is None:
            return sorted(
                path.relative_to(location.folder).as_posix()
                for path in location.folder.rglob("*")
                if path.is_file()
            )
        return repo_files(location.repo, location.options)

    def download_file_from_hf(self, repo: str, file_name: str, **kwargs: Any) -> Any:
        location = self._place()
        if file_name == "config.json":
            fields = json.loads((location.folder / file_name).read_text(encoding="utf-8"))
            self.n_layers = fields["n_layers"]
            return fields
        self.checkpoint = open_weights(location, weights_file=file_name)
        promises, notes = tree.checkpoint_promises(self.checkpoint, self.reader)
        self.notes.extend(notes)
        return promises

    def _place(self) -> Location:
        if self.location is None:
            raise ArgumentError(f"{self.label} is not a hub name or a folder.")
        return self.location


def find_origin(
    model_name: str | Path, hf_model: Any, keywords: dict[str, Any], reader: FileReader
) -> Origin:
    """Find a model and read its configuration, no weights.

    Args:
        model_name: TransformerLens name or alias, hub name, or local folder.
        hf_model: the caller's transformers model, or None; its own configuration is used then.
        keywords: keyword arguments for Hugging Face.
        reader: reads the files later.

    Raises:
        UnknownModelError, CheckpointError, UnsupportedArchitectureError, ArgumentError.
    """
    sorted_keywords = sort_keywords(keywords)
    official = None if isinstance(model_name, Path) else official_name(str(model_name))
    if isinstance(model_name, str) and Path(model_name).is_dir():
        official = None  # a folder wins over a name, as in transformers
    if hf_model is not None:
        return _from_model(str(model_name), official, hf_model, sorted_keywords, reader)
    location = resolve_config(model_name, **sorted_keywords.hub)
    is_toy = is_toy_name(official) or _is_toy_folder(location)
    label = location.label
    stock_name = stock_name_for(official, label if location.repo is None else location.repo)
    if is_toy and official is None:
        stock_name = _toy_name(location)
    hf_config = None
    if not is_toy:
        trust = sorted_keywords.trust_remote_code
        hf_config = config.load_hf_config(location.folder, trust_remote_code=trust)
        hf_config = _override(hf_config, sorted_keywords.overrides)
    notes: list[str] = []
    return Origin(
        label,
        stock_name,
        official,
        is_toy,
        hf_config,
        None,
        location,
        sorted_keywords,
        reader,
        notes,
    )


def _from_model(
    name: str, official: str | None, hf_model: Any, keywords: Keywords, reader: FileReader
) -> Origin:
    if not hasattr(hf_model, "config"):
        raise ArgumentError(
            f"hf_model is a {type(hf_model).__name__} without a configuration. Pass a transformers "
            "model, such as AutoModelForCausalLM.from_pretrained(...) returns."
        )
    location: Location | None = None
    if Path(name).is_dir():
        location = resolve_config(name)
    stock_name = stock_name_for(official, name)
    hf_config = hf_model.config
    return Origin(
        "hf_model", stock_name, official, False, hf_config, hf_model, location, keywords, reader
    )


def _override(hf_config: Any, overrides: dict[str, Any]) -> Any:
    if not overrides:
        return hf_config
    changed = copy.deepcopy(hf_config)
    for name, value in overrides.items():
        if not hasattr(changed, name):
            known = list(changed.to_dict())
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ArgumentError(
                f"{name}= is neither an argument of from_pretrained nor a field of this model's "
                f"configuration.{hint}"
            )
        setattr(changed, name, value)
    return changed


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
    try:
        values = json.loads((location.folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "d_model" in values and "model_type" not in values


def _toy_name(location: Location) -> str:
    """A name whose prefix sends TransformerLens to its toy branch; "_old" marks the early SoLU
    format.
    """
    values = json.loads((location.folder / "config.json").read_text(encoding="utf-8"))
    name = location.folder.name
    if "architecture" not in values and _has_old_names(location):
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
