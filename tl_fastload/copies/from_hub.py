"""Processed copies on the hub: found, described by their headers, fetched and verified once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub

from tl_fastload.copies.manifest import MANIFEST, Manifest, read_manifest
from tl_fastload.copies.verify import open_copy, verify_copy
from tl_fastload.errors import CheckpointError, MissingFileError
from tl_fastload.ground.paths import exists, expanded
from tl_fastload.request.keywords import Keywords
from tl_fastload.source.aliases import Aliases
from tl_fastload.source.file_states import state_of
from tl_fastload.source.hub import HubOptions
from tl_fastload.source.location import Location, fetch_shards, file_names, in_repo, names_at_hand
from tl_fastload.source.remote import remote_entries
from tl_fastload.source.safetensors import TensorEntry


@dataclass(frozen=True)
class Description:
    """A copy on the hub without its weights.

    Attributes:
        manifest: its JSON.
        entries: the stored tensors; those of files that are not here must not be read.
        missing_bytes: what is not here yet.
    """

    manifest: Manifest
    entries: dict[str, TensorEntry]
    missing_bytes: int


def locate_copy(name: Any, keywords: Keywords, aliases: Aliases) -> Location | None:
    """The place of a processed copy that lies in a hub repository; None if there is none. Only its
    JSON is fetched.

    Args:
        name: of the repository, or an alias of it.
        keywords: how to reach it.
        aliases: names beside those on the hub.

    Raises:
        UnknownModelError: there is no such repository.
    """
    if not isinstance(name, str) or exists(expanded(name)):
        return None
    hub = dict(keywords.hub)
    subfolder = str(hub.pop("subfolder", "") or "").rstrip("/")
    try:
        return in_repo(aliases.official(name) or name, subfolder, MANIFEST, HubOptions(**hub))
    except MissingFileError:
        return None


def describe_copy(location: Location) -> Description:
    """What a copy on the hub holds, by its JSON and headers alone.

    Raises:
        CheckpointError: it is damaged, or this version cannot read it.
    """
    manifest = read_manifest(location.folder)
    missing = set(manifest.files) - set(names_at_hand(location))
    if not missing:
        return Description(*open_copy(location.folder), 0)
    entries: dict[str, TensorEntry] = {}
    for name in manifest.files:
        entries.update(remote_entries(location, name))
    absent = manifest.checksums.keys() - entries.keys()
    if absent:
        raise CheckpointError(
            f"{location.label} lacks the tensor {min(absent)!r} that its {MANIFEST} names. Ask "
            "whoever pushed it to push it again."
        )
    return Description(manifest, entries, sum(manifest.files[name]["bytes"] for name in missing))


def fetch_copy(location: Location, manifest: Manifest) -> None:
    """Download the files of a copy, and compare every byte with its checksums the first time.

    That this was done, and of which files, is remembered among huggingface_hub's assets.

    Raises:
        CheckpointError: a file cannot be had, or is not what was saved. It stays unloaded.
    """
    names = list(manifest.files)
    if manifest.tokenizer is not None:
        prefix = manifest.tokenizer["folder"] + "/"
        names += [name for name in file_names(location).files if name.startswith(prefix)]
    paths = fetch_shards(location, names)
    seen = _Seen.of(location, {MANIFEST: location.folder / MANIFEST, **paths})
    if not seen.is_recorded:
        verify_copy(location.folder)
        seen.record()


@dataclass(frozen=True)
class _Seen:
    """That the files of one commit were verified, as they are now.

    Attributes:
        file: the record of it.
        states: size and time of change of each file.
    """

    file: Path
    states: Mapping[str, list[int]]

    @classmethod
    def of(cls, location: Location, paths: Mapping[str, Path]) -> _Seen:
        place = [location.repo or "", location.commit or "", location.subfolder or "root"]
        home = huggingface_hub.cached_assets_path(
            "tl_fastload", place[0], place[1], assets_dir=huggingface_hub.constants.HF_ASSETS_CACHE
        )
        states = {}
        for name, path in paths.items():
            state = state_of(path.resolve())
            states[name] = [state.size_bytes, state.changed_ns]
        return cls(home / f"{place[2].replace('/', '--')}.json", states)

    @property
    def is_recorded(self) -> bool:
        try:
            return bool(json.loads(self.file.read_text()) == self.states)
        except (OSError, ValueError):  # none, or none of ours
            return False

    def record(self) -> None:
        try:
            self.file.write_text(json.dumps(self.states))
        except OSError:
            return  # a disk without room: the copy is verified the next time as well
