"""The JSON beside the weights of a processed copy: what is written, and how it is read and checked.

A copy is a folder with `tl_fastload.json`, safetensors files and perhaps a tokenizer's folder. The
safetensors headers say where bytes lie; the JSON says what they mean: which parameter, in which
shape and strides, quantized how, processed how, from where, by which versions.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from tl_fastload.copies.schema import REMEDY, check_configuration, check_manifest
from tl_fastload.errors import CheckpointError, SaveError
from tl_fastload.ground import compat
from tl_fastload.ground.compat import __version__
from tl_fastload.ground.geometry import is_unbroken
from tl_fastload.ground.memory_orders import FORWARD, check_layout
from tl_fastload.quantized import formats
from tl_fastload.quantized.spec import Spec, as_dtype
from tl_fastload.source.choose import stays_inside
from tl_fastload.source.file_states import state_of, unreadable
from tl_fastload.source.json_files import read_object
from tl_fastload.source.links import check_link
from tl_fastload.source.safetensors import TensorEntry, header_text, parse_header

MANIFEST = "tl_fastload.json"
FORMAT_VERSION = 1
MODEL_KEY = "tl_fastload_model"
"""Where the metadata of a weight file has the checksum of the model that it belongs to."""
_OF_THE_MODEL = (
    *("model_class", "configuration", "optional", "flags", "quantization", "not_quantized"),
    *("parameters", "buffers", "layout", "hf_config"),
)


@dataclass(frozen=True)
class View:
    """How a parameter or a buffer is made of stored tensors.

    Attributes:
        tensors: field of the quantized bytes -> key of the stored tensor; "" for a plain tensor.
        shape: logical shape.
        strides: in elements.
        requires_grad: of a parameter.
        offset: of a quantized view, in elements of the matrix.
        dtype: what a quantized view computes in; None for a plain tensor.
        quantized: the plain values of a quantized content; None for a plain tensor.
    """

    tensors: dict[str, str]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    requires_grad: bool = False
    offset: int = 0
    dtype: torch.dtype | None = None
    quantized: dict[str, Any] | None = None


@dataclass(frozen=True)
class Manifest:
    """All that is known of a copy but its bytes.

    Attributes:
        copy_id: drawn anew by each save; its files carry it.
        source: where the model was loaded from; None if it was not loaded.
        revision: the hub commit of the source.
        flags: the processing steps that were asked for.
        quantization: how its matrices are quantized; None for a model without.
        not_quantized: matrices of a quantized model that are dense -> why.
        model_class: name of the class that was saved.
        configuration: the fields of the HookedTransformerConfig.
        optional: names of fields that another TransformerLens may lack: those that had their
            default value, and those that its class does not declare.
        tokenizer: "folder", "files" (SHA-256 of each), "is_fast" and "padding_side" of the saved
            tokenizer; None without.
        parameters: name -> how it is made.
        buffers: name -> how it is made.
        adapters: the adapters that were merged, one line each.
        hf_config: Hugging Face's configuration of the source; None where there was none.
        checksums: key of a stored tensor -> SHA-256 of its bytes.
        files: name of a weight file -> its size "bytes", and "header", the SHA-256 of its header.
        versions: of the libraries that wrote it.
        layout: memory order of the parameters; in the JSON where it is not "forward".
        built: what the road needs beside tensors to build the model, its name under "road"; None
            for a HookedTransformer.
        read_checksum: `model_checksum` of the JSON that this was read from; None for a new copy.
    """

    copy_id: str
    source: str | None
    revision: str | None
    flags: dict[str, bool]
    quantization: Spec | None
    not_quantized: dict[str, str]
    model_class: str
    configuration: dict[str, Any]
    optional: list[str]
    tokenizer: dict[str, Any] | None
    parameters: dict[str, View]
    buffers: dict[str, View]
    adapters: list[str] = field(default_factory=list)
    hf_config: dict[str, Any] | None = None
    checksums: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: versions())
    layout: str = FORWARD
    built: dict[str, Any] | None = None
    read_checksum: str | None = field(default=None, compare=False)

    @property
    def road(self) -> str:
        """TransformerLens' class whose model it is."""
        return "HookedTransformer" if self.built is None else str(self.built["road"])

    @property
    def as_saved(self) -> str | None:
        """How it is quantized, for reports."""
        return None if self.quantization is None else f"{self.quantization.kind}, as saved"

    @property
    def payload(self) -> list[str]:
        """Names of the files and folders that belong to the copy, beside the JSON."""
        return [*self.files, *([self.tokenizer["folder"]] if self.tokenizer else [])]

    def dumps(self) -> str:
        """The text of the JSON file, with a checksum of itself."""
        body = self._body()
        return json.dumps({**body, "checksum": _checksum(body)}, indent=1, default=_dtype_named)

    def model_checksum(self) -> str:
        """SHA-256 of what says which model the bytes are; the weight files carry it."""
        return _model_checksum(self._body())

    def _body(self) -> dict[str, Any]:
        values = asdict(self)
        del values["read_checksum"]
        if self.layout == FORWARD:  # earlier versions, which know no other, read such copies
            del values["layout"]
        if self.built is None:  # likewise
            del values["built"]
        return {"format_version": FORMAT_VERSION, **values}


def versions() -> dict[str, str]:
    """Versions of what has a say in the numbers."""
    return {
        "tl_fastload": __version__,
        "torch": str(compat.TORCH),
        "transformers": str(compat.TRANSFORMERS),
        "transformer_lens": str(compat.TRANSFORMER_LENS),
    }


def is_copy(folder: Path) -> bool:
    """Whether a folder is a processed copy, whole or damaged."""
    try:
        return (folder / MANIFEST).is_file()
    except (OSError, ValueError):  # no path at all
        return False


def read_manifest(folder: Path) -> Manifest:
    """Read and check the JSON of a copy.

    Raises:
        CheckpointError: it cannot be read, was altered, or was written by a newer format.
    """
    path = folder / MANIFEST
    check_link(folder, MANIFEST)
    body = read_object(path, REMEDY, cannot_read=lambda error: unreadable(path, error))
    version = body.get("format_version")
    if not isinstance(version, int):
        raise CheckpointError(f"{path} does not describe a processed copy. {REMEDY}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this tl_fastload reads up to {FORMAT_VERSION}. "
            "Update tl_fastload, or save the copy again with this version."
        )
    checksum = body.pop("checksum", None)
    if checksum != _checksum(body):
        raise CheckpointError(f"{path} was altered: its checksum does not fit. {REMEDY}")
    try:
        return replace(_manifest(body, path), read_checksum=_model_checksum(body))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}). {REMEDY}"
        ) from error


def _manifest(body: dict[str, Any], path: Path) -> Manifest:
    values = _decode({name: value for name, value in body.items() if name != "format_version"})
    check_manifest(values, str(path))
    for part in ("parameters", "buffers"):
        values[part] = {name: _view(fields) for name, fields in values[part].items()}
    if values["quantization"] is not None:
        skip = tuple(values["quantization"].pop("skip"))
        values["quantization"] = formats.make_spec(**values["quantization"], skip=skip)
    manifest = Manifest(**values)
    check_layout(manifest.layout)
    outside = [name for name in manifest.payload if not stays_inside(name)]
    if outside:
        raise ValueError(f"{outside[0]!r} leads out of the folder")
    return manifest


def _view(fields: dict[str, Any]) -> View:
    fields |= {"shape": tuple(fields["shape"]), "strides": tuple(fields["strides"])}
    return View(**fields)


def stored_tensors(folder: Path, manifest: Manifest) -> dict[str, TensorEntry]:
    """Where the bytes of each stored tensor lie, from the headers of the weight files.

    Raises:
        CheckpointError: a file is missing, has another size, or belongs to another copy; or the
            tensors are not those that the JSON names.
    """
    entries: dict[str, TensorEntry] = {}
    for name, facts in manifest.files.items():
        path = folder / name
        check_link(folder, name)
        size = state_of(path).size_bytes
        if size != facts["bytes"]:
            raise CheckpointError(
                f"{path} has {size:,} bytes, {facts['bytes']:,} were written: it was cut off or "
                f"altered. {REMEDY}"
            )
        text, state = header_text(path)
        is_ours = hashlib.sha256(text).hexdigest() == facts["header"]
        if is_ours:
            found, metadata = parse_header(path, text, state)
            entries.update(found)
            # Copies of earlier versions do not say whose they are.
            is_ours = metadata.get(MODEL_KEY, manifest.read_checksum) == manifest.read_checksum
        if not is_ours:
            raise CheckpointError(
                f"{path} is not the file that {MANIFEST} was written with. {REMEDY}"
            )
    absent = manifest.checksums.keys() - entries.keys()
    if absent:
        raise CheckpointError(f"{folder} lacks the tensor {min(absent)!r}. {REMEDY}")
    return entries


def checked_geometry(view: View, entry: TensorEntry) -> torch.Tensor:
    """The meta tensor that selects a plain tensor's elements.

    Raises:
        CheckpointError: strides that leave the stored tensor, or miss a part of it.
    """
    view_elements = math.prod(view.shape)
    if not is_unbroken(view.shape, view.strides):
        raise CheckpointError(
            f"{entry.path}: strides {list(view.strides)} of shape {list(view.shape)} do not cover "
            f"tensor {entry.name!r}. {REMEDY}"
        )
    if view_elements != math.prod(entry.shape):
        raise CheckpointError(
            f"{entry.path}: tensor {entry.name!r} has not the {view_elements:,} elements "
            f"of shape {list(view.shape)}. {REMEDY}"
        )
    return torch.empty_strided(view.shape, view.strides, dtype=entry.dtype, device="meta")


def configuration_fields(cfg: Any, *, is_computed: bool) -> tuple[dict[str, Any], list[str]]:
    """The fields of a configuration, and which of them another TransformerLens may lack.

    Args:
        cfg: of the model.
        is_computed: whether it is computed anew when the copy is loaded; what its class does not
            declare and JSON cannot hold is left out then.

    Raises:
        SaveError: a field holds what JSON cannot.
    """
    declared = {item.name: item.default for item in fields(cfg)}
    values = {}
    for name, value in vars(cfg).items():
        try:
            values[name] = _plain(name, value)
        except SaveError:
            if not is_computed or name in declared:
                raise
    optional = [n for n in values if n not in declared or values[n] == declared[n]]
    return values, optional


def _plain(name: str, value: Any) -> Any:
    if name == "device":  # chosen when the copy is loaded
        return None
    if hasattr(value, "item") and not isinstance(value, torch.Tensor):
        value = value.item()  # numpy's numbers
    if isinstance(value, torch.dtype):
        return value
    value = list(value) if isinstance(value, tuple) else value
    try:
        if json.loads(json.dumps(value)) == value:
            return value
    except (TypeError, ValueError):
        pass
    raise SaveError(
        f"cfg.{name} is a {type(value).__name__}, which a copy cannot hold. Set it to a number, a "
        "text or a list before saving."
    )


def build_configuration(manifest: Manifest, declared: type, label: str) -> Any:
    """The configuration that was saved, field by field, as this TransformerLens has it.

    Args:
        manifest: of the copy.
        declared: the class of such configurations, a dataclass.
        label: the copy, for messages.

    Raises:
        CheckpointError: a field is in use that this TransformerLens does not have, or is not what
            it must be.
    """
    check_configuration(manifest.configuration, declared, f"{label}/{MANIFEST}")
    known = {item.name: item for item in fields(declared)}
    lost = sorted(manifest.configuration.keys() - known.keys() - set(manifest.optional))
    if lost:
        raise CheckpointError(
            f"{label} was saved by TransformerLens {manifest.versions['transformer_lens']} with "
            f"cfg.{lost[0]}={manifest.configuration[lost[0]]!r}, which TransformerLens "
            f"{compat.TRANSFORMER_LENS} does not have. Update it, or load the original."
        )
    # Not through __init__, which seeds random numbers and computes fields anew.
    cfg: Any = object.__new__(declared)
    for name, item in known.items():
        if item.default is not MISSING:
            setattr(cfg, name, item.default)
    for name, value in manifest.configuration.items():
        setattr(cfg, name, value)
    return cfg


def _dtype_named(value: Any) -> dict[str, str]:
    """What stands for a dtype in the JSON; there is nothing else that JSON does not have."""
    if not isinstance(value, torch.dtype):
        raise TypeError(f"{value!r} cannot be written as JSON")
    return {"torch.dtype": str(value).removeprefix("torch.")}


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"torch.dtype"}:
            return as_dtype(value["torch.dtype"])
        return {name: _decode(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_decode(inner) for inner in value]
    return value


def _model_checksum(body: Mapping[str, Any]) -> str:
    named = {name: body.get(name) for name in _OF_THE_MODEL}
    return _checksum({**named, **({"built": body["built"]} if "built" in body else {})})


def _checksum(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), default=_dtype_named)
    return hashlib.sha256(text.encode()).hexdigest()
