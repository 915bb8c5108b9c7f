"""Files of a hub repository, through huggingface_hub: downloaded, or from its cache."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelInfo, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    SafetensorsFileMetadata,
    validate_repo_id,
)

from tl_fastload.errors import (
    ArgumentError,
    CheckpointError,
    LeanLoadError,
    MissingFileError,
    UnknownModelError,
)

# huggingface_hub 0.x speaks through requests, 1.x and newer through httpx; either one's errors
# share a base with HfHubHTTPError, whose bases therefore cover "could not reach the hub" too.
HUB_FAILURES: tuple[type[Exception], ...] = (OSError, ValueError, *HfHubHTTPError.__bases__)

# What the hub's answers mean; the first that fits counts (a gated repository is "not found" too).
_MEANINGS: tuple[tuple[type[Exception], type[LeanLoadError], str], ...] = (
    (
        HFValidationError,
        UnknownModelError,
        "{repo!r} is no valid hub name ({error}). Write 'name' or 'organisation/name'.",
    ),
    (
        LocalTokenNotFoundError,
        UnknownModelError,
        "{repo}: token=True was passed, but no token is stored. Log in (`hf auth login`) or set "
        "HF_TOKEN.",
    ),
    (
        GatedRepoError,
        UnknownModelError,
        "{repo} on the hub is gated, and this token has no access. Ask for it at {url}, then log "
        "in (`hf auth login`) or pass token=.",
    ),
    (
        RepositoryNotFoundError,
        UnknownModelError,
        "The hub has no model {repo!r} that this token may see. Check the spelling; if it is "
        "private, log in (`hf auth login`) or pass token=.",
    ),
    (
        RevisionNotFoundError,
        UnknownModelError,
        "{repo} on the hub has no revision {revision!r}. Pass a branch, a tag or a full commit "
        "hash from {url}/commits/main.",
    ),
    (
        EntryNotFoundError,
        MissingFileError,
        "{repo} (revision {revision}) has no file {file!r} on the hub. Pass another revision, or a "
        "repository that holds the model in Hugging Face's format.",
    ),
    (
        HfHubHTTPError,
        UnknownModelError,
        "The hub refused {file} of {repo} (revision {revision}): {error}. Check the token "
        "(`hf auth whoami`), or try again later.",
    ),
)


@dataclass(frozen=True)
class HubOptions:
    """How to reach the hub, as for `huggingface_hub.hf_hub_download`.

    Attributes:
        revision: branch, tag or commit on the hub.
        cache_dir: the hub's cache folder, if not the usual one.
        token: for the hub; None takes HF_TOKEN or the stored login.
        local_files_only: never use the network.
        force_download: download even what is cached.
    """

    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = field(default=None, repr=False)
    local_files_only: bool = False
    force_download: bool = False

    @property
    def offline(self) -> bool:
        """Whether the network must not be used."""
        return bool(self.local_files_only or constants.HF_HUB_OFFLINE)

    @property
    def download(self) -> dict[str, Any]:
        """The arguments of huggingface_hub's functions that download."""
        names = ("revision", "cache_dir", "token", "force_download")
        return {name: getattr(self, name) for name in names}

    @property
    def revision_name(self) -> str:
        return self.revision or constants.DEFAULT_REVISION


@dataclass(frozen=True)
class Listing:
    """Names of a repository's files, relative and with forward slashes.

    Attributes:
        files: the names.
        complete: False when only the cached ones could be seen.
        commit: the commit that has them; None when the hub did not say.
    """

    files: list[str]
    complete: bool
    commit: str | None = None


def hub_file(
    repo: str,
    filename: str,
    options: HubOptions = HubOptions(),
    listing: Listing | None = None,
) -> tuple[Path, Listing | None]:
    """Have one file: from the cache if it is current or the hub cannot be reached, else downloaded.

    Args:
        repo: "name" or "organisation/name".
        filename: relative to the repository's root, with forward slashes.
        options: how to reach the hub.
        listing: what the hub said of the repository at this revision, if it was asked already.

    Returns:
        The local path, and what the hub says of the repository; None if it was not asked, or did
        not answer.

    Raises:
        UnknownModelError: no such repository or revision, no access to it, or the hub cannot be
            reached and nothing of the repository is cached.
        CheckpointError: the repository has no such file, or it could not be downloaded.
        ArgumentError: `force_download` without a network.
    """
    if options.force_download and options.offline:
        raise ArgumentError(
            "force_download=True needs the network, but local_files_only or HF_HUB_OFFLINE forbids "
            "it. Drop one of them."
        )
    try:
        validate_repo_id(repo)
        held = None if options.force_download else cached_snapshot(repo, options)
        held = held if held is not None and (held / filename).is_file() else None
        is_settled = options.offline or (held is not None and held.name == options.revision)
        # Left alone, huggingface_hub would retry for half a minute before it takes what is cached.
        if listing is None and not is_settled:
            listing = _ask(repo, options, held)
        if held is not None and (listing is None or held.name == listing.commit):
            return held / filename, listing
        if not options.offline:
            return Path(hf_hub_download(repo, filename, **options.download)), listing
    except HUB_FAILURES as error:
        raise explain(repo, filename, options, error) from error
    raise _not_cached(repo, options, None, filename)


def hub_files(
    repo: str, filenames: Sequence[str], options: HubOptions, listing: Listing | None = None
) -> None:
    """Download those of several files that are not cached, eight at a time.

    What cannot be had stays away, and `hub_file` says why; its arguments mean the same.
    """
    folder = None if options.force_download else cached_snapshot(repo, options)
    missing = [name for name in filenames if folder is None or not (folder / name).is_file()]
    if options.offline or not missing:
        return
    with contextlib.suppress(*HUB_FAILURES):
        if listing is None:
            _ask(repo, options, None)
        patterns = [glob.escape(name) for name in missing]
        snapshot_download(repo, allow_patterns=patterns, **options.download)


def list_files(repo: str, options: HubOptions = HubOptions()) -> Listing:
    """List a repository's files; from its cached snapshot when the hub cannot be reached.

    Raises:
        UnknownModelError: as `hub_file`.
    """
    listing = None
    if not options.offline:
        try:
            listing = _ask(repo, options, cached_snapshot(repo, options))
        except HUB_FAILURES as error:
            raise explain(repo, "", options, error) from error
    return listing or Listing(cached_files(repo, options), complete=False)


def file_sizes(repo: str, options: HubOptions = HubOptions()) -> dict[str, int]:
    """The size in bytes of each file of a repository, in one request.

    Raises:
        UnknownModelError: as `hub_file`; the network is needed.
    """
    if options.offline:
        raise _not_cached(repo, options, None)
    try:
        info = _info(repo, options, files_metadata=True)
    except HUB_FAILURES as error:
        raise explain(repo, "", options, error) from error
    return {file.rfilename: file.size or 0 for file in info.siblings or ()}


def safetensors_header(
    repo: str, filename: str, options: HubOptions = HubOptions()
) -> SafetensorsFileMetadata:
    """The header of a safetensors file on the hub, by requests for that range of bytes.

    Raises:
        UnknownModelError: as `hub_file`; the network is needed.
        CheckpointError: the repository has no such file, or its header is corrupt.
    """
    try:
        return HfApi().parse_safetensors_file_metadata(
            repo, filename, revision=options.revision, token=options.token
        )
    except SafetensorsParsingError as error:
        raise CheckpointError(f"{filename} of {repo} has a corrupt header: {error}") from error
    except HUB_FAILURES as error:
        raise explain(repo, filename, options, error) from error


def cached_files(repo: str, options: HubOptions) -> list[str]:
    """Names of the files that the cache holds whole at this revision.

    Raises:
        UnknownModelError: nothing is cached.
    """
    folder = cached_snapshot(repo, options)
    if folder is None:
        raise _not_cached(repo, options, None)
    # A link whose blob is gone is no file: is_file follows links.
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def cached_snapshot(repo: str, options: HubOptions) -> Path | None:
    """The snapshot folder of this revision in the cache, or None."""
    store = _repo_folder(repo, options)
    snapshots = store / "snapshots"
    reference = store / "refs" / options.revision_name
    try:
        commit = reference.read_text().strip() if reference.is_file() else options.revision_name
        folder = snapshots / commit
        # A revision such as ".." must not lead out of the snapshots.
        is_one = folder.is_dir() and folder.parent == snapshots and commit != ".."
    except (OSError, ValueError):  # too long or too odd to be a path
        return None
    return folder if is_one else None


def snapshot_folder(repo: str, commit: str, options: HubOptions) -> Path:
    """Where the cache has, or will have, the files of a commit."""
    return _repo_folder(repo, options) / "snapshots" / commit


def _repo_folder(repo: str, options: HubOptions) -> Path:
    cache = Path(options.cache_dir or constants.HF_HUB_CACHE).expanduser()
    return cache / "--".join(["models", *repo.split("/")])


def _ask(repo: str, options: HubOptions, held: Path | None) -> Listing | None:
    """What the hub says of a repository; None if it does not, and what is `held` must do."""
    try:
        info = _info(repo, options)
    except HUB_FAILURES as error:
        if held is None or isinstance(error, RevisionNotFoundError):
            raise
        return None
    return Listing([file.rfilename for file in info.siblings or ()], True, info.sha)


def _info(repo: str, options: HubOptions, files_metadata: bool = False) -> ModelInfo:
    """The commit and the files of a repository, in one request that does not retry."""
    return HfApi().model_info(
        repo,
        revision=options.revision,
        token=options.token,
        timeout=constants.DEFAULT_ETAG_TIMEOUT,
        files_metadata=files_metadata,
    )


def explain(repo: str, filename: str, options: HubOptions, error: Exception) -> LeanLoadError:
    """The error of our family that says what the hub's failure means and what to do."""
    for kind, ours, meaning in _MEANINGS:
        if isinstance(error, kind) and not isinstance(error, LocalEntryNotFoundError):
            fields = {
                "repo": repo,
                "file": filename or "the list of files",
                "revision": options.revision_name,
                "url": f"{constants.ENDPOINT}/{repo}",
                "error": " ".join(str(error).split()),
            }
            return ours(meaning.format(**fields))
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return CheckpointError(
            f"Cannot store {filename} of {repo}: {error}. Free space or give permission there, or "
            "pass another cache_dir=."
        )
    return _not_cached(repo, options, error, filename)


def _not_cached(
    repo: str, options: HubOptions, error: Exception | None, filename: str = ""
) -> LeanLoadError:
    """The error for a file that is not in the cache while the hub is out of reach."""
    store = _repo_folder(repo, options)
    if options.local_files_only:
        why, remedy = "local_files_only=True", "Drop it"
    elif options.offline:
        why, remedy = "HF_HUB_OFFLINE is set", "Unset it"
    else:
        cause = getattr(error, "__cause__", None) or error
        why = f"The hub cannot be reached ({type(cause).__name__}: {str(cause)[:200]})"
        remedy = "Check the connection"
    commits = _names(store / "snapshots")
    parts = [
        f"{why}, and {filename or 'the model'} of {repo} (revision {options.revision_name}) is not "
        f"in the cache {store.parent}"
    ]
    if any(name.endswith(".incomplete") for name in _names(store / "blobs")):
        parts.append(f"a download that was cut off lies in {store / 'blobs'}")
    if commits and cached_snapshot(repo, options) is None:
        parts.append(f"cached are the revisions {', '.join(commits)}")
    message = f"{'; '.join(parts)}. {remedy}, or pass the cache_dir= or local folder that has it."
    known = filename and cached_snapshot(repo, options) is not None
    return MissingFileError(message) if known else UnknownModelError(message)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    except (OSError, ValueError):  # too long or too odd to be a path
        return []
