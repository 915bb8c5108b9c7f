"""Writes a model's parameters as they are in memory, one at a time, into a processed copy."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from tl_fastload.copies.folders import (
    is_planted,
    move_into_place,
    new_owner,
    only_mine_to_write,
    working_folder,
)
from tl_fastload.copies.manifest import (
    MANIFEST,
    MODEL_KEY,
    Manifest,
    View,
    configuration_fields,
    is_copy,
    read_manifest,
)
from tl_fastload.copies.verify import tokenizer_digests
from tl_fastload.errors import LeanLoadError, SaveError
from tl_fastload.ground.boundary import guarded
from tl_fastload.ground.geometry import copied, same_layout, strides_of_order
from tl_fastload.ground.mark import require_whole
from tl_fastload.ground.memory_orders import FORWARD
from tl_fastload.ground.own_defaults import own_defaults
from tl_fastload.ground.paths import expanded_to_write
from tl_fastload.ground.sizes import bytes_of
from tl_fastload.ground.words import format_bytes
from tl_fastload.ground.wrappers import plain_name, unwrapped
from tl_fastload.placement.values_here import require_values
from tl_fastload.quantized import QuantizedTensor
from tl_fastload.report.progress import Progress, ProgressOption
from tl_fastload.request.argument_types import checked
from tl_fastload.request.steps import STEPS
from tl_fastload.roads.known import road_of
from tl_fastload.source.safetensors import DTYPES, header_of

MAX_SHARD_BYTES = 4 << 30
ALIGNMENT_BYTES = 64
_PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class _Stored:
    """One tensor that goes to a file: `make` gives it, in the order of its bytes."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    make: Callable[[], torch.Tensor]


@dataclass
class _Plan:
    """Everything that will be written, found before the first byte is."""

    model: Any
    stored: list[_Stored] = field(default_factory=list)
    parameters: dict[str, View] = field(default_factory=dict)
    buffers: dict[str, View] = field(default_factory=dict)

    @property
    def order(self) -> str:
        """The memory order in which the parameters are written."""
        return str(getattr(self.model, "_layout", FORWARD))

    def add_parameters(self) -> None:
        seen: dict[int, View] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            # A parameter under a second name is the same one when the copy is loaded, too.
            view = seen.get(id(parameter))
            if view is None:
                view = seen[id(parameter)] = self._view(name, parameter)
            self.parameters[plain_name(name)] = view

    def add_buffers(self) -> None:
        same: dict[tuple[Any, ...], View] = {}
        cfg: Any = self.model.cfg
        is_dynamic = getattr(cfg, "use_dynamic_ntk_rope", False)
        for name, buffer in self.model.named_buffers(remove_duplicate=False):
            if is_dynamic and road_of(self.model).role(name).what == "rotary table":
                continue  # depend on the longest prompt so far; computed anew when needed
            _check_dtype(name, buffer)
            flat = buffer.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest = hashlib.sha256(memoryview(flat.numpy())).hexdigest()
            key = (buffer.dtype, buffer.shape, digest)
            if key not in same:  # every layer has the same tables
                same[key] = self._plain(name, buffer, tuple(buffer.contiguous().stride()))
            self.buffers[plain_name(name)] = same[key]

    def _view(self, name: str, parameter: torch.Tensor) -> View:
        if not isinstance(parameter, QuantizedTensor):
            _check_dtype(name, parameter)
            module = self.model.get_submodule(name.rpartition(".")[0])
            strides = road_of(self.model).strides_in(self.order, module, name, parameter.shape)
            return self._plain(name, parameter, strides)
        tensors, quantized = parameter.content.parts()
        keys = {}
        for part, tensor in tensors.items():
            keys[part] = f"{name}.{part}"
            # A column may have a row's strides, and torch calls it contiguous.
            strides = strides_of_order(tensor.shape, range(tensor.dim()))
            self._plain(keys[part], tensor, strides)
        return View(
            tensors=keys,
            shape=tuple(parameter.shape),
            strides=tuple(parameter.stride()),
            offset=int(parameter.storage_offset()),
            dtype=parameter.dtype,
            quantized=quantized,
        )

    def _plain(self, key: str, tensor: torch.Tensor, strides: tuple[int, ...]) -> View:
        order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
        same = same_layout(tensor.shape, tuple(tensor.stride()), strides)

        def make() -> torch.Tensor:
            with torch.no_grad():
                value = tensor.detach()
                value = value if same else copied(value, strides, value.dtype)
                return value.permute(order).reshape(-1)

        shape = tuple(tensor.shape[dim] for dim in order)
        nbytes = bytes_of(tensor)
        self.stored.append(_Stored(key, tensor.dtype, shape, nbytes, make))
        return View({"": key}, tuple(tensor.shape), strides, requires_grad=tensor.requires_grad)


def _check_dtype(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in DTYPES.values():
        raise SaveError(f"{name} is {tensor.dtype}, which a copy cannot hold. Convert it first.")


@guarded("while saving", SaveError)
def save_lean(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: ProgressOption = None,
) -> Path:
    """Write a model as it is in memory into a folder that `from_pretrained_lean` maps.

    Takes at most one parameter of extra memory. The folder appears when everything is on the disk;
    a copy that is there already is replaced in one step, also the one that this model is mapped
    from. A failure, or the end of the process, leaves what was there before.

    Args:
        model: a HookedTransformer or a TransformerBridge, also inside `torch.compile` or a parallel
            wrapper.
        folder: a new or empty folder, or an earlier copy.
        max_shard_bytes: size of a weight file, unless one parameter is larger.
        progress: None for a bar when somebody watches, True or False, or a function of a
            `tl_fastload.ProgressEvent`.

    Returns:
        The folder.

    Raises:
        SaveError: something of the model cannot be saved (values that are elsewhere: offloaded,
            sharded, on meta), the folder holds something else, or the disk is full or cannot be
            written to.
        HalfWrittenError: a step in place was interrupted in this model.
        ArgumentError: another argument that is of the wrong kind.
    """
    checked(folder=folder, max_shard_bytes=max_shard_bytes)
    write_copy(model, Path(folder), max_shard_bytes=max_shard_bytes, progress=progress)
    return Path(folder)


@own_defaults()
def write_copy(
    model: Any,
    folder: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: ProgressOption = False,
    tokenizer: bool = True,
    for_cache: bool = False,
) -> bool:
    """`save_lean`; returns whether the folder is this copy.

    Args:
        model: as for `save_lean`.
        folder: as for `save_lean`.
        max_shard_bytes: as for `save_lean`.
        progress: as for `save_lean`.
        tokenizer: whether the model's tokenizer is saved as well.
        for_cache: if another process has put a copy there meanwhile, leave that one; and let nobody
            else write to this one.
    """
    model = unwrapped(model)
    target = expanded_to_write(folder, SaveError).absolute()
    road = road_of(model, SaveError)
    require_whole(model, "save_lean")
    require_values(model, "save_lean", SaveError)
    check_target(target)
    plan = _Plan(road.stored(model))
    plan.add_parameters()
    plan.add_buffers()
    try:
        _check_room(target, sum(stored.nbytes for stored in plan.stored))
        with working_folder(target) as working:
            with Progress(progress, "saving") as shown:
                shown.start(sum(stored.nbytes for stored in plan.stored))
                manifest = _describe(model, plan, working if tokenizer else None)
                _write_shards(plan.stored, manifest, working, max(max_shard_bytes, 1), shown)
            with (working / MANIFEST).open("x", encoding="utf-8") as file:
                file.write(manifest.dumps())
            if for_cache:
                only_mine_to_write(working)
            return move_into_place(
                working, target, last=MANIFEST, old=lambda: _payload(target), keep=for_cache
            )
    except OSError as error:
        raise SaveError(
            f"{target} could not be written ({error.strerror or error}). What was there before is "
            "as it was. Free space or give permission, or choose another folder."
        ) from error


def check_target(target: Path) -> None:
    """Raise SaveError where a copy would hide something else."""
    if "\0" in str(target) or target == Path(target.anchor):
        raise SaveError(f"{str(target)!r} can be no copy's folder. Choose another name.")
    if is_planted(target):
        raise SaveError(
            f"{target} is a link that another user made, to {target.resolve()}. Nothing was "
            "written there. Choose another folder, or pass that one itself."
        )
    if target.exists() and not target.is_dir():
        raise SaveError(f"{target} is a file. Choose a folder.")
    if (target / "config.json").exists():
        raise SaveError(
            f"{target} holds another checkpoint (config.json), which a copy would hide. Choose a "
            "new folder."
        )


def _check_room(target: Path, needed_bytes: int) -> None:
    parent = next(path for path in target.parents if path.exists())
    free = shutil.disk_usage(parent).free
    if needed_bytes > free:
        raise SaveError(
            f"The copy takes {format_bytes(needed_bytes)}, {parent} has {format_bytes(free)} free. "
            "Nothing was written. Free space, or choose another disk."
        )


def _payload(target: Path) -> list[str]:
    """The files of the copy that is there."""
    try:
        return read_manifest(target).payload if is_copy(target) else []
    except LeanLoadError:  # a damaged copy is replaced like a whole one
        return []


def _describe(model: Any, plan: _Plan, tokenizer_home: Path | None) -> Manifest:
    report = getattr(model, "load_report", None)
    built = getattr(plan.model, "built", None)
    configuration, optional = configuration_fields(model.cfg, is_computed=built is not None)
    copy_id = new_owner()
    return Manifest(
        copy_id=copy_id,
        source=getattr(report, "source", None),
        revision=getattr(report, "revision", None),
        flags=_flags(model),
        quantization=getattr(model, "_quantization", None),
        not_quantized=dict(getattr(report, "not_quantized", {})),
        model_class=type(model).__name__,
        configuration=configuration,
        optional=optional,
        tokenizer=_save_tokenizer(model, tokenizer_home, copy_id),
        parameters=plan.parameters,
        buffers=plan.buffers,
        adapters=list(getattr(report, "adapters", ())),
        hf_config=_hf_config(plan.model),
        layout=plan.order,
        built=built,
    )


def _hf_config(model: Any) -> dict[str, Any] | None:
    config = getattr(model, "_hf_config", None)
    # Through its own JSON, which has texts for dtypes.
    return None if config is None else json.loads(config.to_json_string(use_diff=False))


def _flags(model: Any) -> dict[str, bool]:
    """The processing steps that were asked for; of a model that was not loaded lean, those that
    would change nothing.
    """
    record = getattr(model, "_processed", None)
    if record is not None:
        return {step: step in record[0] for step in STEPS}
    road = road_of(model)
    done = {step for step in STEPS if road.is_processed(model, {step: True})}
    done.discard("refactor_factored_attn_matrices")  # nobody can tell afterwards
    unfolded = road.why_skipped("fold_ln", model.cfg) is None and "fold_ln" not in done
    if unfolded or done == {"fold_value_biases"}:  # biases may be zero without processing
        done = set()
    return {step: step in done for step in STEPS}


def _save_tokenizer(model: Any, home: Path | None, copy_id: str) -> dict[str, Any] | None:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None or home is None:
        return None
    folder = f"tokenizer-{copy_id}"
    try:
        tokenizer.save_pretrained(home / folder)
    except OSError:
        raise
    except Exception as error:  # a full disk is one, too, for the code in Rust
        raise SaveError(
            f"The model's tokenizer could not be written ({type(error).__name__}: {error}). What "
            "was there before is as it was. Free space, or save without it: model.tokenizer = None."
        ) from error
    return {
        "folder": folder,
        "files": tokenizer_digests(home / folder),
        "name": str(getattr(tokenizer, "name_or_path", "")),
        "is_fast": bool(getattr(tokenizer, "is_fast", True)),
        "padding_side": tokenizer.padding_side,
    }


def _write_shards(
    stored: list[_Stored], manifest: Manifest, folder: Path, most_bytes: int, progress: Progress
) -> None:
    metadata = {"tl_fastload": manifest.copy_id, MODEL_KEY: manifest.model_checksum()}
    for number, shard in enumerate(_shards(stored, most_bytes), start=1):
        name = f"weights-{manifest.copy_id}-{number:05d}.safetensors"
        entries = {one.key: (one.dtype, one.shape) for one in shard}
        header = header_of(entries, metadata, ALIGNMENT_BYTES)
        with (folder / name).open("xb") as file:  # "x" follows no link
            file.write(header)
            for one in shard:
                manifest.checksums[one.key] = _write(file, one)
                file.write(bytes(-one.nbytes % ALIGNMENT_BYTES))
                progress.advance(one.key, one.nbytes)
            size = file.tell()
        digest = hashlib.sha256(header).hexdigest()
        manifest.files[name] = {"bytes": size, "header": digest}


def _shards(stored: list[_Stored], most_bytes: int) -> Iterator[list[_Stored]]:
    shard: list[_Stored] = []
    total = 0
    for one in stored:
        if shard and total + one.nbytes > most_bytes:
            yield shard
            shard, total = [], 0
        shard.append(one)
        total += one.nbytes
    yield shard


def _write(file: BinaryIO, stored: _Stored) -> str:
    """Write one tensor in pieces; its SHA-256."""
    digest = hashlib.sha256()
    flat = (
        stored.make().view(torch.uint8)
        if stored.nbytes
        else torch.empty(0, dtype=torch.uint8, device="cpu")
    )
    for start in range(0, stored.nbytes, _PIECE_BYTES):
        data = memoryview(flat[start : start + _PIECE_BYTES].cpu().numpy())  # type: ignore[arg-type]
        digest.update(data)
        file.write(data)
    return digest.hexdigest()
