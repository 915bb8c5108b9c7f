"""Processed copies on the hub: found, described by their headers, fetched and verified once."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import huggingface_hub

from tl_fastload.copies.contents import Contents, open_copy
from tl_fastload.copies.manifest import MANIFEST, Manifest, read_manifest
from tl_fastload.copies.verify import verify_copy
from tl_fastload.errors import CheckpointError, MissingFileError
from tl_fastload.ground.paths import exists, expanded
from tl_fastload.request.keywords import Keywords
from tl_fastload.source.aliases import Aliases
from tl_fastload.source.file_states import state_of
from tl_fastload.source.hub import HubOptions
from tl_fastload.source.location import Location, fetch_shards, file_names, in_repo, names_at_hand
from tl_fastload.source.remote import remote_entries
from tl_fastload.source.safetensors import TensorEntry


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


def describe_copy(location: Location) -> Contents:
    """What a copy on the hub holds, by its JSON and headers alone.

    Raises:
        CheckpointError: it is damaged, or this version cannot read it.
    """
    manifest = read_manifest(location.folder)
    missing = set(manifest.files) - set(names_at_hand(location))
    if not missing:
        return open_copy(location.folder)
    entries: dict[str, TensorEntry] = {}
    for name in manifest.files:
        entries.update(remote_entries(location, name))
    absent = manifest.checksums.keys() - entries.keys()
    if absent:
        raise CheckpointError(
            f"{location.label} lacks the tensor {min(absent)!r} that its {MANIFEST} names. Ask "
            "whoever pushed it to push it again."
        )
    return Contents(manifest, entries, sum(manifest.files[name]["bytes"] for name in missing))


def fetch_copy(location: Location, manifest: Manifest) -> None:
    """Download the files of a copy, and compare every byte with its checksums the first time.

    That this was done, and the size and time of change of each file, is remembered among
    huggingface_hub's assets.

    Raises:
        CheckpointError: a file cannot be had, or is not what was saved. It stays unloaded.
    """
    names = list(manifest.files)
    if manifest.tokenizer is not None:
        prefix = manifest.tokenizer["folder"] + "/"
        names += [name for name in file_names(location).files if name.startswith(prefix)]
    paths = {MANIFEST: location.folder / MANIFEST, **fetch_shards(location, names)}
    states = {}
    for name, path in paths.items():
        state = state_of(path.resolve())
        states[name] = [state.size_bytes, state.changed_ns]
    assets = huggingface_hub.constants.HF_ASSETS_CACHE
    home = huggingface_hub.cached_assets_path(
        "tl_fastload", location.repo or "", location.commit or "", assets_dir=assets
    )
    record = home / f"{(location.subfolder or 'root').replace('/', '--')}.json"
    with contextlib.suppress(OSError, ValueError):  # none, or none of ours
        if json.loads(record.read_text()) == states:
            return
    verify_copy(location.folder)
    with contextlib.suppress(OSError):  # a disk without room: it is verified the next time, too
        record.write_text(json.dumps(states))
