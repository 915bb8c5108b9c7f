"""Tensors of `.bin`, `.pt` and `.pth` files: mapped where the format allows, no code ever run."""

from __future__ import annotations

import os
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tl_fastload.errors import CheckpointError
from tl_fastload.ground import compat
from tl_fastload.source.file_states import FileState, changed, state_of, unreadable
from tl_fastload.source.json_files import open_regular
from tl_fastload.source.safetensors import (
    AGAIN,
    LFS_PREFIX,
    check_weight_file,
    lfs_pointer,
)
from tl_fastload.source.torch_records import check_records, inflated_bytes

# Under these keys trainers put the state dict when they save other things beside it.
NESTING_KEYS = ("state_dict", "model_state_dict", "module", "model")
_ALLOWED: list[Callable[..., Any]] = []
_REFUSED = re.compile(r"(?:GLOBAL|[Uu]nsupported class) ([\w.]+)")


def allow(function: Callable[..., Any]) -> None:
    """Let the files that are read here name a function of ours, which makes what we have saved."""
    if function not in _ALLOWED:
        _ALLOWED.append(function)


@dataclass(frozen=True)
class TorchContents:
    """What torch files hold.

    Attributes:
        tensors: by name; views of the mapped file where it was mapped, so never write into them.
        notes: what was done beyond plain reading, one sentence each.
        states: what each file was when it was read.
    """

    tensors: dict[str, torch.Tensor]
    notes: tuple[str, ...]
    states: Mapping[Path, FileState] = field(default_factory=dict)


def read_torch_files(paths: tuple[Path, ...], *, mmap: bool = True) -> TorchContents:
    """Read all `paths` as one state dict.

    Args:
        paths: the files; their tensor names must not collide.
        mmap: map the files where torch and their format allow it; otherwise they are read whole.

    Raises:
        CheckpointError: a file cannot be read, is corrupt, needs code to be run, holds no state
            dict, or holds a name that another one has too.
    """
    tensors: dict[str, torch.Tensor] = {}
    home: dict[str, Path] = {}
    notes: list[str] = []
    states: dict[Path, FileState] = {}
    for path in paths:
        found, file_notes, states[path] = _read_torch_file(path, mmap=mmap)
        notes += file_notes
        for name in found.keys() & home.keys():
            raise CheckpointError(duplicate_message(name, home[name], path))
        tensors.update(found)
        home.update(dict.fromkeys(found, path))
    return TorchContents(tensors, tuple(notes), states)


def whole_bytes(paths: tuple[Path, ...], *, mmap: bool) -> int:
    """Bytes of the files that `read_torch_files` reads into memory instead of mapping them."""
    can_map = mmap and compat.can_map_torch_files()
    return sum(_whole_bytes(path) for path in paths if not (can_map and _mappable(path)[0]))


def _whole_bytes(path: Path) -> int:
    """Bytes of a file once it is in memory: more than it has, if it is compressed."""
    try:
        with path.open("rb") as file:
            return max(path.stat().st_size, inflated_bytes(file) if _is_zip(path) else 0)
    except OSError as error:
        raise unreadable(path, error) from error


def duplicate_message(name: str, first: Path, second: Path) -> str:
    """The message for a tensor name that two shards hold."""
    return (
        f"Tensor {name!r} is in two files: {first} and {second}. The shards come from different "
        "checkpoints; download them again into an empty folder."
    )


def _read_torch_file(
    path: Path, *, mmap: bool
) -> tuple[dict[str, torch.Tensor], list[str], FileState]:
    check_weight_file(path)
    before = state_of(path)
    mappable, why_not = _mappable(path)
    notes = []
    use_mmap = mmap and mappable and compat.can_map_torch_files()
    if mmap and not mappable:
        notes.append(f"{path.name} was read into memory, not mapped: {why_not}")
    loaded = _load(path, {"mmap": True} if use_mmap else {})
    state, key = unnested(loaded)
    if key is not None:
        notes.append(f"{path.name}: the weights were found under the key {key!r}")
    tensors = {
        name: value.detach()
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise CheckpointError(
            f"{path} holds no tensors by name (it is a {type(loaded).__name__}). Save the model's "
            "`state_dict()`, best as safetensors."
        )
    _check_dense(path, tensors)
    if state_of(path) != before:
        raise changed(path)
    return tensors, notes, before


def _mappable(path: Path) -> tuple[bool, str]:
    """Whether the file's tensors lie in it as they are, and if not, why not."""
    check_weight_file(path)
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            if file.read(len(LFS_PREFIX)) == LFS_PREFIX:
                raise lfs_pointer(path)
            if not _is_zip(path):
                return False, "it is in torch's format from before version 1.6"
            return check_records(path, file), "it is a compressed archive"
    except OSError as error:
        raise unreadable(path, error) from error


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except (ValueError, struct.error):  # a directory that cannot be one
        return False
    except zipfile.BadZipFile:  # one of a kind that nobody reads: what is wrong is said later
        return True


def _load(path: Path, arguments: dict[str, Any]) -> Any:
    try:
        return compat.load_torch_file(path, _ALLOWED, **arguments)
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception as error:  # a corrupt pickle can raise anything at all
        raise CheckpointError(_why_not_loaded(path, error)) from error


def _why_not_loaded(path: Path, error: Exception) -> str:
    text = str(error)
    refused = _REFUSED.search(text)
    if refused or "TorchScript" in text:
        what = f"the object {refused.group(1)}" if refused else "a TorchScript program"
        return (
            f"{path} holds {what}, which only code from the file could rebuild, and such code is "
            "never run. If you trust the file, load it yourself, and save its bare `state_dict()` "
            "as safetensors."
        )
    first_line = (text.strip().splitlines() or [""])[0][:200]
    return (
        f"{path} is corrupt or no torch checkpoint ({type(error).__name__}: {first_line}). "
        f"{AGAIN}, or check that `torch.save` wrote it."
    )


def unnested(loaded: Any) -> tuple[Mapping[Any, Any], str | None]:
    """The state dict in what a trainer saved, and the key it was found under, if any."""
    if not isinstance(loaded, Mapping):
        return {}, None
    for key in NESTING_KEYS:
        inner = loaded.get(key)
        if isinstance(inner, Mapping) and any(isinstance(v, torch.Tensor) for v in inner.values()):
            return inner, key
    return loaded, None


def _check_dense(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise CheckpointError(
                f"{path}: tensor {name!r} is sparse, quantized or without data. Save it as an "
                "ordinary dense tensor."
            )
