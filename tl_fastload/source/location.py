"""Where a model lives, a folder or a hub repository, and how its files are had from there."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tl_fastload.errors import (
    ArgumentError,
    CheckpointError,
    MissingFileError,
    UnknownModelError,
)
from tl_fastload.ground.paths import exists, expanded
from tl_fastload.source import hub
from tl_fastload.source.aliases import NO_ALIASES, Aliases
from tl_fastload.source.choose import stays_inside
from tl_fastload.source.file_states import unreadable
from tl_fastload.source.gguf import SUFFIX, first_of_splits
from tl_fastload.source.hub import HubOptions, Listing
from tl_fastload.source.links import check_link

CONFIG = "config.json"
_LOOKS_LIKE_PATH = re.compile(r"[./~\\]|[A-Za-z]:|.*[\\]|.*/$")


@dataclass(frozen=True)
class Location:
    """A model whose `config.json` is at hand, or one in GGUF files, which have what it says.

    Attributes:
        folder: the local folder, or the one in the hub cache, with `config.json` or the files.
        label: for messages and reports: the folder, or "organisation/name@revision".
        repo: the hub repository; None for a local folder.
        commit: the repository's commit; None for a local folder.
        subfolder: where in the repository `folder` lies.
        options: how to reach the hub; pinned to `commit`, so that all files are of one state.
        notes: what the reader of a report should know, one sentence each.
        listing: what the hub said that the commit has; None if it was not asked.
        gguf_file: name of the GGUF file, or of one of several that belong together; None for a
            model in Hugging Face's format.
    """

    folder: Path
    label: str
    repo: str | None = None
    commit: str | None = None
    subfolder: str = ""
    options: HubOptions = field(default=HubOptions(), repr=False)
    notes: tuple[str, ...] = ()
    listing: Listing | None = field(default=None, repr=False, compare=False)
    gguf_file: str | None = None


def locate(
    name: str | os.PathLike[str],
    options: HubOptions,
    subfolder: str = "",
    aliases: Aliases = NO_ALIASES,
    gguf_file: str | None = None,
) -> Location:
    """Find a model and have its `config.json`, and nothing else; of a GGUF file, have nothing yet.

    Args:
        name: a folder, a GGUF file, a name or alias that `aliases` has, or a hub name. What is here
            wins.
        options: how to reach the hub.
        subfolder: where in the folder or repository the model lies.
        aliases: names beside those on the hub.
        gguf_file: which GGUF file of the folder or repository it is.

    Raises:
        UnknownModelError: there is no such model; says what was tried and what has a similar name.
        CheckpointError: the model has no `config.json`.
        ArgumentError: `name` is neither a string nor a path, or `subfolder` leaves the model.
    """
    subfolder = subfolder.rstrip("/")
    text = os.fspath(name) if isinstance(name, os.PathLike) else name
    if not isinstance(text, str) or not text:
        raise ArgumentError(
            f"The model name is {name!r}. Pass a folder, a TransformerLens name or a hub name."
        )
    if not stays_inside(subfolder):
        raise ArgumentError(f"subfolder={subfolder!r} leaves the model. Pass a folder inside it.")
    if gguf_file is not None and not (stays_inside(gguf_file) and gguf_file.endswith(SUFFIX)):
        raise ArgumentError(
            f"gguf_file={gguf_file!r} is no path inside the model's folder that ends with {SUFFIX}."
        )
    path = expanded(text)
    if exists(path):
        if not path.is_dir():
            return _one_file(path, options, subfolder or gguf_file)
        check_link(path, subfolder)
        if not (path / subfolder).is_dir():
            raise UnknownModelError(f"{path} has no folder {subfolder!r}.")
        return _local(text, path / subfolder, options, aliases, gguf_file)
    if not isinstance(name, str) or _LOOKS_LIKE_PATH.match(text):
        raise UnknownModelError(
            f"There is no folder {path.absolute()}. Check the path; a hub name is written "
            "'name' or 'organisation/name'."
        )
    return _on_hub(text, options, subfolder, aliases, gguf_file)


def file_names(location: Location) -> Listing:
    """List what can be had from a location's folder; a hub repository is asked for its list.

    Raises:
        CheckpointError: the folder cannot be read.
        UnknownModelError: the repository can neither be asked nor is it cached.
    """
    if location.repo is None:
        try:
            return Listing(sorted(path.name for path in location.folder.iterdir()), complete=True)
        except OSError as error:
            raise unreadable(location.folder, error) from error
    listing = location.listing or hub.list_files(location.repo, location.options)
    return Listing(_below(listing.files, location.subfolder), listing.complete)


def names_at_hand(location: Location) -> list[str]:
    """List what a location's folder holds already."""
    if location.repo is None:
        return file_names(location).files
    return _below(hub.cached_files(location.repo, location.options), location.subfolder)


def fetch(location: Location, name: str) -> Path:
    """Return the local path of a file of the location, downloading it if need be.

    Raises:
        CheckpointError: there is no such file, or it is a link that leads out of the folder.
    """
    if location.repo is None:
        path = location.folder / name
        if not path.exists() and not path.is_symlink():
            raise CheckpointError(f"{location.folder} has no file {name!r}. Check its name.")
    else:
        file = inside_repo(location, name)
        path, _ = hub.hub_file(location.repo, file, location.options, location.listing)
        if location.folder not in path.parents:
            raise CheckpointError(
                f"{location.label} has changed on the hub since it was looked up. Load it again, "
                "or pass revision= with a commit."
            )
    check_link(location.folder, name)
    return path


def fetch_shards(location: Location, names: Sequence[str]) -> dict[str, Path]:
    """Return the local path of each shard that an index names, downloading those that are missing.

    Raises:
        CheckpointError: some cannot be had (all of them are named), or one is a link that leads out
            of a local folder.
    """
    if location.repo is None:
        missing = [name for name in names if not (location.folder / name).exists()]
        if missing:
            raise CheckpointError(_missing_message(location, names, missing))
        for name in names:
            check_link(location.folder, name)
        return {name: location.folder / name for name in names}
    files = [inside_repo(location, name) for name in names]
    hub.hub_files(location.repo, files, location.options, location.listing)
    options = dataclasses.replace(location.options, force_download=False)  # has been done
    location = dataclasses.replace(location, options=options)
    paths = {}
    for name in names:
        try:
            paths[name] = fetch(location, name)
        except (CheckpointError, UnknownModelError) as error:
            at_hand = set(names_at_hand(location))
            missing = [other for other in names if other not in at_hand]
            message = _missing_message(location, names, missing)
            raise CheckpointError(f"{message} Fetching {name} failed: {error}") from error
    return paths


def unfinished_downloads(folder: Path) -> list[str]:
    """Names of the half-written files that a cut-off download left in a local folder."""
    # The second place is where huggingface_hub downloads to when it is given a local folder.
    places = (folder.glob("*.incomplete"), (folder / ".cache/huggingface").rglob("*.incomplete"))
    return sorted(path.name for place in places for path in place)


def _one_file(path: Path, options: HubOptions, beside: str | None) -> Location:
    """The model in a GGUF file."""
    if path.suffix != SUFFIX:
        raise UnknownModelError(f"{path} is a file. Pass its folder, where {CONFIG} lies too.")
    if beside:
        raise ArgumentError(
            f"{path} is a GGUF file already: leave subfolder= and gguf_file= ({beside!r}) out."
        )
    return _gguf_at(path.parent, path.name, options)


def _gguf_at(folder: Path, name: str, options: HubOptions, *notes: str) -> Location:
    check_link(folder, name)
    if options.revision:
        notes = (*notes, f"revision={options.revision!r} was ignored: {folder} is a folder")
    return Location(folder, str(folder / name), notes=notes, gguf_file=name)


def _local(
    name: str, folder: Path, options: HubOptions, aliases: Aliases, gguf_file: str | None
) -> Location:
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        raise unreadable(folder, error) from error
    if gguf_file is not None:
        if not (folder / gguf_file).exists():
            raise CheckpointError(_no_gguf_message(str(folder), gguf_file, names))
        return _gguf_at(folder, gguf_file, options)
    if CONFIG not in names:
        found = first_of_splits(names)
        if len(found) != 1:
            raise CheckpointError(_no_config_message(name, folder, names, aliases))
        return _gguf_at(folder, found[0], options, f"the only model there is {found[0]}")
    check_link(folder, CONFIG)
    ignored = f"revision={options.revision!r} was ignored: {folder} is a folder"
    return Location(folder, str(folder), notes=(ignored,) if options.revision else ())


def _no_gguf_message(label: str, name: str, names: Sequence[str]) -> str:
    found = first_of_splits(names)
    there = f"It has {', '.join(found[:10])}." if found else "It has no GGUF file at all."
    return f"{label} has no file {name!r}. {there}"


def _no_config_message(name: str, folder: Path, names: Sequence[str], aliases: Aliases) -> str:
    message = f"{folder} has no {CONFIG}. "
    inner = sorted(entry for entry in names if (folder / entry / CONFIG).is_file())
    official = aliases.official(name)
    if inner:
        return message + f"Pass one of the folders in it that have one: {', '.join(inner[:10])}."
    if official is not None:
        return message + (
            f"It hides the model {official} of the same name: rename the folder, or work in "
            "another one."
        )
    if any(entry.startswith("adapter_") for entry in names):
        return message + "It holds an adapter (LoRA): load its base model with adapter= this."
    if found := first_of_splits(names):
        return message + f"Pass gguf_file= with one of {', '.join(found[:10])}."
    return message + "Save the model there with `save_pretrained`, or copy its config.json into it."


def _on_hub(
    name: str, options: HubOptions, subfolder: str, aliases: Aliases, gguf_file: str | None
) -> Location:
    official = aliases.official(name)
    repo = official or name
    if repo in aliases.not_on_the_hub:
        raise UnknownModelError(
            f"{aliases.library} knows {name!r}, but its weights are not on the hub. Pass "
            "hf_model=, or a local folder in Hugging Face's format."
        )
    try:
        if gguf_file is not None:
            return _gguf_in_repo(repo, subfolder, gguf_file, options)
        return in_repo(repo, subfolder, CONFIG, options)
    except UnknownModelError as error:
        raise UnknownModelError(_unknown_message(name, aliases, error)) from error
    except MissingFileError as error:
        found = first_of_splits(_below(hub.list_files(repo, options).files, subfolder))
        if gguf_file is not None or not found:
            raise
        raise CheckpointError(
            f"{repo} has no {CONFIG}. Pass gguf_file= with one of {', '.join(found[:20])}."
        ) from error


def _gguf_in_repo(repo: str, subfolder: str, name: str, options: HubOptions) -> Location:
    """A GGUF file of a hub repository, which is not fetched yet. What is fetched later is asked for
    by the revision, so that the cache knows it by that, and must be of the commit.

    Raises:
        UnknownModelError, CheckpointError: there is no such repository or file.
    """
    listing = hub.list_files(repo, options)
    held = hub.cached_snapshot(repo, options) if listing.commit is None else None
    commit = listing.commit or (held.name if held is not None else options.revision_name)
    names = _below(listing.files, subfolder)
    label = f"{repo}@{options.revision_name}"
    if name not in names:
        raise CheckpointError(_no_gguf_message(label, name, names))
    return Location(
        hub.snapshot_folder(repo, commit, options) / subfolder,
        label=f"{label}/{name}",
        repo=repo,
        commit=commit,
        subfolder=subfolder,
        options=options,
        notes=(f"{repo} at commit {commit}",),
        listing=listing if listing.commit == commit else None,
        gguf_file=name,
    )


def in_repo(repo: str, subfolder: str, file: str, options: HubOptions) -> Location:
    """A folder of a hub repository, known by one file in it, which is fetched; all else that is
    fetched from there is of the same commit.

    Raises:
        UnknownModelError, CheckpointError: as `tl_fastload.source.hub.hub_file`.
    """
    path, listing = hub.hub_file(repo, f"{subfolder}/{file}" if subfolder else file, options)
    check_link(path.parent, file)
    commit = path.parents[len(Path(subfolder).parts)].name
    return Location(
        path.parent,
        label=f"{repo}@{options.revision_name}",
        repo=repo,
        commit=commit,
        subfolder=subfolder,
        options=dataclasses.replace(options, revision=commit),
        notes=(f"{repo} at commit {commit}",),
        listing=listing if listing is not None and listing.commit == commit else None,
    )


def _unknown_message(name: str, aliases: Aliases, error: Exception) -> str:
    official, library = aliases.official(name), aliases.library
    parts = [f"Cannot find the model {name!r}.", f"There is no folder {Path(name).absolute()}."]
    if official is None and aliases.known:
        nearest = ", ".join(aliases.nearest(name)) or "none"
        parts.append(f"{library} has no such name or alias (nearest: {nearest}).")
    elif official is not None and official != name:
        parts.append(f"It is {library}' name for {official}.")
    return " ".join([*parts, str(error)])


def _missing_message(location: Location, names: Sequence[str], missing: Sequence[str]) -> str:
    message = (
        f"{location.label} lacks {len(missing)} of the {len(names)} weight files that its index "
        f"names: {', '.join(missing)}."
    )
    unfinished = unfinished_downloads(location.folder) if location.repo is None else []
    if unfinished:
        message += f" A download was cut off ({', '.join(unfinished)})."
    return f"{message} Download them again into {location.folder}."


def inside_repo(location: Location, name: str) -> str:
    """A file's name from the root of the repository."""
    return f"{location.subfolder}/{name}" if location.subfolder else name


def _below(names: Sequence[str], subfolder: str) -> list[str]:
    prefix = f"{subfolder}/" if subfolder else ""
    return [name[len(prefix) :] for name in names if name.startswith(prefix)]
