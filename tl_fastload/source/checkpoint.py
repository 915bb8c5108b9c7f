"""From a model's name or folder to the table of its tensors, reading headers only."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from tl_fastload.errors import ArgumentError, CheckpointError
from tl_fastload.recipes.nodes import MemorySource, Source
from tl_fastload.recipes.promise import Promise
from tl_fastload.source.choose import (
    Choice,
    choose,
    no_weights_message,
    read_index,
    standard_names,
    stays_inside,
)
from tl_fastload.source.file_states import FileState, state_of
from tl_fastload.source.gguf import joined_entries, read_gguf, shard_names
from tl_fastload.source.location import (
    Location,
    fetch,
    fetch_shards,
    file_names,
    names_at_hand,
    unfinished_downloads,
)
from tl_fastload.source.reader import FileReader, FileSource
from tl_fastload.source.safetensors import TensorEntry, read_header
from tl_fastload.source.torch_files import (
    TorchContents,
    duplicate_message,
    read_torch_files,
    whole_bytes,
)

_NAMED_AT_MOST = 20


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a model, known but not read.

    Attributes:
        folder: the local folder, or the one in the hub cache, that holds `config.json`.
        label: for messages and reports: the folder, or "organisation/name@revision".
        files: the weight files.
        entries: where each tensor lies, for safetensors and GGUF; empty for torch files.
        commit: the hub repository's commit; None for a local folder.
        notes: what the reader of a report should know, one sentence each.
        indexed: the tensor names that an index of torch files promises; else empty.
        weight_bytes: size of the weight files.
        missing_bytes: of these, what is not on this machine yet; 0 unless only headers are wanted.
        is_outline: torch files that have not been looked into (`tl_fastload.source.remote`).
        states: what the index was when it was read.
    """

    folder: Path
    label: str
    files: tuple[Path, ...]
    entries: Mapping[str, TensorEntry]
    commit: str | None = None
    notes: tuple[str, ...] = ()
    indexed: Collection[str] = field(default=frozenset(), repr=False)
    weight_bytes: int = 0
    missing_bytes: int = 0
    is_outline: bool = False
    states: Mapping[Path, FileState] = field(default_factory=dict, repr=False)

    def read_whole_bytes(self, *, mmap: bool) -> int:
        """Bytes of torch files that `load_tensors` would read into memory instead of mapping."""
        if self.entries or self.missing_bytes:
            return 0 if self.entries or mmap else self.weight_bytes
        return whole_bytes(self.files, mmap=mmap)

    def load_tensors(self, *, mmap: bool = True) -> TorchContents:
        """Read torch files (`.bin`, `.pth`, `.pt`); empty for safetensors.

        Nothing is kept here: the tensors live as long as the caller holds them.

        Args:
            mmap: map the files where torch and their format allow it, so that only names, dtypes
                and shapes are read now.

        Raises:
            CheckpointError: a file is corrupt, or would run code, or lacks what the index promises.
        """
        if self.entries:
            return TorchContents({}, ())
        contents = read_torch_files(self.files, mmap=mmap)
        absent = sorted(set(self.indexed) - contents.tensors.keys())
        if absent:
            raise CheckpointError(_absent_message(self.label, absent))
        return contents

    def sources(
        self, reader: FileReader, *, mmap: bool = True
    ) -> tuple[dict[str, Source], list[str]]:
        """Where each tensor's values are, by its name in the files, and notes for the report.

        Args:
            reader: reads the files later, and watches them from now on.
            mmap: map torch files where that is possible.

        Raises:
            CheckpointError: as `load_tensors`, or a file is another one than it was.
        """
        table: dict[str, Source] = {n: FileSource(e, reader) for n, e in self.entries.items()}
        contents = self.load_tensors(mmap=mmap)
        reader.files.hold({**self.states, **contents.states})
        table.update({name: MemorySource(t, name) for name, t in contents.tensors.items()})
        return table, list(contents.notes)

    def promises(
        self, reader: FileReader, *, mmap: bool = True
    ) -> tuple[dict[str, Promise], list[str]]:
        """`sources`, as promises."""
        table, notes = self.sources(reader, mmap=mmap)
        return {name: Promise.of(source) for name, source in table.items()}, notes


def open_weights(
    location: Location,
    *,
    weights_file: str | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
) -> Checkpoint:
    """Have the weight files of a located model, and check all headers before any data is read.

    Args:
        location: from `tl_fastload.source.location.locate`.
        weights_file: read this file of the folder or repository and no other, such as
            "checkpoints/model_1000.pth".
        variant: "fp16" for `model.fp16.safetensors`, and so on.
        use_safetensors: None prefers safetensors to torch files; True and False insist.

    Raises:
        CheckpointError: there are no weights, or files are missing, truncated, corrupt or unsafe.
        UnknownModelError: the hub does not let us have them.
        ArgumentError: `weights_file` is not inside the model's folder.
    """
    if location.gguf_file is not None:
        if weights_file or variant or use_safetensors:
            raise ArgumentError(
                f"{location.label} is a GGUF file: leave variant= and use_safetensors= out."
            )
        return _open_gguf(location, location.gguf_file)
    choice = choose_weights(location, weights_file, variant, use_safetensors)
    path = fetch(location, choice.name)
    files: tuple[Path, ...] = (path,)
    homes: dict[str, Path] = {}
    states: dict[Path, FileState] = {}
    if choice.is_index:
        states = {path: state_of(path)}
        weight_map = read_index(path)
        shards = fetch_shards(location, sorted(set(weight_map.values())))
        files = tuple(shards.values())
        homes = {name: shards[shard] for name, shard in weight_map.items()}
    entries: dict[str, TensorEntry] = {}
    if choice.is_safetensors:
        entries = read_headers(files)
        _check_homes(location.label, homes, entries)
    return Checkpoint(
        folder=location.folder,
        label=location.label,
        files=files,
        entries=MappingProxyType(entries),
        commit=location.commit,
        notes=location.notes if choice.note is None else (*location.notes, choice.note),
        indexed=frozenset() if choice.is_safetensors else frozenset(homes),
        weight_bytes=sum(state_of(path).size_bytes for path in files),
        states=states,
    )


def _open_gguf(location: Location, name: str) -> Checkpoint:
    """The GGUF files of a model."""
    names = shard_names(name, read_gguf(fetch(location, name)))
    files = tuple(fetch_shards(location, names).values())
    return Checkpoint(
        folder=location.folder,
        label=location.label,
        files=files,
        entries=MappingProxyType(joined_entries(files)),
        commit=location.commit,
        notes=location.notes,
        weight_bytes=sum(state_of(path).size_bytes for path in files),
    )


def choose_weights(
    location: Location,
    weights_file: str | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
) -> Choice:
    """The weight file or index that `open_weights` opens; its arguments mean the same."""
    if weights_file:
        if not stays_inside(weights_file):
            raise ArgumentError(
                f"weights_file={weights_file!r} is not inside the model's folder. Pass a path "
                "relative to it."
            )
        return Choice(weights_file, f"weights from {weights_file}, as asked")
    # What is cached as safetensors saves asking the hub.
    if use_safetensors is not False and not location.options.force_download:
        at_hand = choose(names_at_hand(location), variant=variant, use_safetensors=True)
        if at_hand is not None and at_hand.note is None:
            return at_hand
    found = file_names(location)
    choice = choose(found.files, variant=variant, use_safetensors=use_safetensors)
    if choice is not None:
        return choice
    names = found.files
    if location.repo is None:
        names = [*names, *unfinished_downloads(location.folder)]
    message = no_weights_message(location.label, names, standard_names(variant, use_safetensors))
    if not found.complete:
        message += " Only the cache was searched, as the hub was out of reach or not to be used."
    raise CheckpointError(message)


def read_headers(files: tuple[Path, ...]) -> dict[str, TensorEntry]:
    """The entries of several safetensors files, whose names must not collide."""
    entries: dict[str, TensorEntry] = {}
    for path in files:
        found = read_header(path)
        for name in found.keys() & entries.keys():
            raise CheckpointError(duplicate_message(name, entries[name].path, path))
        entries.update(found)
    if not entries:
        raise CheckpointError(
            f"{', '.join(map(str, files))} names no tensors. Save the model's weights there."
        )
    return entries


def _check_homes(label: str, homes: Mapping[str, Path], entries: Mapping[str, TensorEntry]) -> None:
    """Each tensor of the index must lie in the shard that the index names."""
    absent = [
        f"{name} ({path.name})"
        for name, path in homes.items()
        if name not in entries or entries[name].path != path
    ]
    if absent:
        raise CheckpointError(_absent_message(label, absent))


def _absent_message(label: str, absent: list[str]) -> str:
    listed = ", ".join(absent[:_NAMED_AT_MOST])
    more = f" and {len(absent) - _NAMED_AT_MOST} more" if len(absent) > _NAMED_AT_MOST else ""
    return (
        f"{label}: the index promises {len(absent)} tensors that their files do not hold: "
        f"{listed}{more}. Index and shards come from different checkpoints; download them again."
    )
