"""Tensors of `.bin`, `.pt` and `.pth` files: mapped where the format allows, no code ever run."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tl_fastload import compat
from tl_fastload.errors import CheckpointError
from tl_fastload.quantized import rebuild
from tl_fastload.safetensors_header import (
    AGAIN,
    LFS_PREFIX,
    check_weight_file,
    lfs_pointer,
    unreadable,
)

# Under these keys trainers put the state dict when they save other things beside it.
NESTING_KEYS = ("state_dict", "model_state_dict", "module", "model")
_REFUSED = re.compile(r"(?:GLOBAL|[Uu]nsupported class) ([\w.]+)")


@dataclass(frozen=True)
class TorchContents:
    """What torch files hold.

    Attributes:
        tensors: by name; views of the mapped file where it was mapped, so never write into them.
        notes: what was done beyond plain reading, one sentence each.
    """

    tensors: dict[str, torch.Tensor]
    notes: tuple[str, ...]


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
    for path in paths:
        found, file_notes = _read_torch_file(path, mmap=mmap)
        notes += file_notes
        for name in found.keys() & home.keys():
            raise CheckpointError(duplicate_message(name, home[name], path))
        tensors.update(found)
        home.update(dict.fromkeys(found, path))
    return TorchContents(tensors, tuple(notes))


def whole_bytes(paths: tuple[Path, ...], *, mmap: bool) -> int:
    """Bytes of the files that `read_torch_files` reads into memory instead of mapping them."""
    can_map = mmap and compat.can_map_torch_files()
    return sum(path.stat().st_size for path in paths if not (can_map and _mappable(path)[0]))


def duplicate_message(name: str, first: Path, second: Path) -> str:
    """The message for a tensor name that two shards hold."""
    return (
        f"Tensor {name!r} is in two files: {first} and {second}. The shards come from different "
        "checkpoints; download them again into an empty folder."
    )


def _read_torch_file(path: Path, *, mmap: bool) -> tuple[dict[str, torch.Tensor], list[str]]:
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
    return tensors, notes


def _mappable(path: Path) -> tuple[bool, str]:
    """Whether the file's tensors lie in it as they are, and if not, why not."""
    check_weight_file(path)
    try:
        with path.open("rb") as file:
            if file.read(len(LFS_PREFIX)) == LFS_PREFIX:
                raise lfs_pointer(path)
        if not zipfile.is_zipfile(path):
            return False, "it is in torch's format from before version 1.6"
        with zipfile.ZipFile(path) as archive:
            stored = all(item.compress_type == zipfile.ZIP_STORED for item in archive.infolist())
    except OSError as error:
        raise unreadable(path, error) from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is a corrupt zip archive ({error}). {AGAIN}.") from error
    return stored, "it is a compressed archive"


def _load(path: Path, arguments: dict[str, Any]) -> Any:
    try:
        # Quantized tensors that we have saved are among what is loaded.
        return compat.load_torch_file(path, rebuild, **arguments)
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
