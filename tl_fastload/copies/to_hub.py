"""Pushes processed copies to the hub, with a model card that says what they are."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from tl_fastload.copies.manifest import MANIFEST, Manifest, is_copy, read_manifest
from tl_fastload.copies.write import MAX_SHARD_BYTES, write_copy
from tl_fastload.errors import ArgumentError, SaveError
from tl_fastload.ground.boundary import guarded
from tl_fastload.ground.paths import expanded
from tl_fastload.report.progress import ProgressOption
from tl_fastload.request.argument_types import checked
from tl_fastload.source.hub import HUB_FAILURES, HubOptions, explain
from tl_fastload.source.location import CONFIG

CARD = "README.md"
_BEGIN, _END = "<!-- tl_fastload: written by push_lean_to_hub -->", "<!-- /tl_fastload -->"
_SECTION = re.compile(f"{re.escape(_BEGIN)}.*{re.escape(_END)}", re.DOTALL)
_OF_A_COPY = re.compile(r"weights-[^/]*\.safetensors$|tokenizer-[^/]*/")
# The one step that a load does only when asked.
_NOT_USUAL = "refactor_factored_attn_matrices"


@guarded("while pushing", SaveError)
def push_lean_to_hub(
    model: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: ProgressOption = None,
) -> CommitInfo:
    """Push a model as it is in memory to the hub, from where `from_pretrained_lean(repo_id)` loads
    it: processed, quantized, edited.

    A processed copy is written to the system's temporary folder first, and removed afterwards.

    Args:
        model: as for `save_lean`.
        repo_id: "name" or "organisation/name"; made if there is none.
        private: whether a new repository is private; None for the owner's default.
        revision: the branch; None for the main one. A new one is made.
        token: for the hub; None takes HF_TOKEN or the stored login.
        commit_message: of the commit.
        create_pr: open a pull request instead of committing to the branch.
        max_shard_bytes: as for `save_lean`.
        progress: as for `save_lean`.

    Returns:
        The commit, whose `commit_url` shows it.

    Raises:
        SaveError: the model cannot be saved, the repository holds another model, or the hub does
            not take it. The repository is as it was: everything is one commit.
        ArgumentError: `repo_id` is no name of a repository, or another argument is of the wrong
            kind.
    """
    checked(max_shard_bytes=max_shard_bytes)
    _check_name(repo_id)
    with tempfile.TemporaryDirectory(prefix="tl_fastload-push-") as folder:
        copy = Path(folder) / "copy"
        write_copy(model, copy, max_shard_bytes=max_shard_bytes, progress=progress)
        return push_copy(
            copy,
            repo_id,
            private=private,
            revision=revision,
            token=token,
            commit_message=commit_message,
            create_pr=create_pr,
        )


@guarded("while pushing", SaveError)
def push_copy(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Push a processed copy that is on the disk already.

    Args:
        folder: that `save_lean` wrote.
        repo_id: as for `push_lean_to_hub`, which says what the others mean, too.
        private: of a new repository.
        revision: the branch.
        token: for the hub.
        commit_message: of the commit.
        create_pr: whether a pull request is opened.

    Raises:
        SaveError, ArgumentError: as `push_lean_to_hub`.
        CheckpointError: the copy is damaged.
    """
    checked(folder=folder)
    _check_name(repo_id)
    place = expanded(folder)
    if not is_copy(place):
        raise ArgumentError(f"{place} holds no processed copy. Write one with save_lean first.")
    manifest = read_manifest(place)
    api = HfApi(token=token, library_name="tl_fastload")
    try:
        # The hub may know the name better: it puts the user before a name without one.
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        parent = api.repo_info(repo_id, revision=revision).sha
        files = api.list_repo_files(repo_id, revision=parent)
        _check_files(files, repo_id)
        return api.create_commit(
            repo_id,
            [
                *_additions(place, manifest),
                *_deletions(files, manifest),
                _card(api, repo_id, parent, files, manifest),
            ],
            commit_message=commit_message or f"Push a processed copy of {_source(manifest)}",
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent,
        )
    except HUB_FAILURES as error:
        told = explain(repo_id, "", HubOptions(revision=revision, token=token), error)
        raise SaveError(f"Nothing was pushed to {repo_id}. {told}") from error


def _check_name(repo_id: Any) -> None:
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ArgumentError(
            f"repo_id={repo_id!r}: {error} Write 'name' or 'organisation/name'."
        ) from error


def _check_files(files: list[str], repo_id: str) -> None:
    if CONFIG in files:
        raise SaveError(
            f"{repo_id} holds another model ({CONFIG}), which a copy beside it would not be found "
            "behind. Nothing was pushed. Choose another repository."
        )


def _additions(folder: Path, manifest: Manifest) -> Iterator[CommitOperationAdd]:
    """The files of the copy, and nothing else that may lie in the folder."""
    for name in (*manifest.payload, MANIFEST):
        path = folder / name
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in inside:
            if file.is_file():
                yield CommitOperationAdd(file.relative_to(folder).as_posix(), file)


def _deletions(files: list[str], manifest: Manifest) -> Iterator[CommitOperationDelete]:
    """What an earlier copy left there; the names of a copy's files are its own."""
    for name in files:
        if _OF_A_COPY.match(name) and manifest.copy_id not in name:
            yield CommitOperationDelete(name)


def _card(
    api: HfApi, repo_id: str, commit: str | None, files: list[str], manifest: Manifest
) -> CommitOperationAdd:
    """The model card; of one that is there, all but the part that is ours stays."""
    text = "---\nlibrary_name: tl_fastload\n---\n"
    if CARD in files:
        text = Path(api.hf_hub_download(repo_id, CARD, revision=commit)).read_text("utf-8")
    card = ModelCard(text, ignore_metadata_errors=True)
    card.data["library_name"] = "tl_fastload"
    tags = card.data.get("tags") or []
    card.data["tags"] = sorted({*tags, "tl_fastload", "transformer-lens"})
    if manifest.revision is not None and card.data.get("base_model") is None:
        card.data["base_model"] = _source(manifest).partition("@")[0]
    section = _section(repo_id, manifest)
    kept, found = _SECTION.subn(lambda _: section, card.text)
    card.text = kept if found else f"{card.text.rstrip()}\n\n{section}\n".lstrip()
    return CommitOperationAdd(CARD, str(card).encode())


def _section(repo_id: str, manifest: Manifest) -> str:
    """What was done to the model, and how to load it."""
    cls = f"Lean{manifest.road}"
    done = [name for name, on in manifest.flags.items() if on]
    arguments = "".join(
        f", {step}={on}" for step, on in manifest.flags.items() if on != (step != _NOT_USUAL)
    )
    rows = {
        "source": _source(manifest),
        "revision": manifest.revision or "not on the hub",
        "processing": ", ".join(done) or "none",
        "dtype": str(manifest.configuration.get("dtype", "")).removeprefix("torch."),
        "quantization": "none" if manifest.quantization is None else manifest.quantization.kind,
        "adapters": "; ".join(manifest.adapters) or "none",
        "class": manifest.model_class,
        "written by": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"{_BEGIN}\n# A processed copy for TransformerLens\n\n"
        f"```python\nfrom tl_fastload import {cls}\n\n"
        f"model = {cls}.from_pretrained_lean({repo_id!r}{arguments})\n```\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        "The weights are stored as they are in memory: processed as the table says, in the order "
        "in which the forward pass reads them. They are not in Hugging Face's format.\n"
        f"{_END}"
    )


def _source(manifest: Manifest) -> str:
    source = manifest.source or manifest.model_class
    # Where it lay on the machine that wrote it is nobody's business.
    return Path(source).name if Path(source).is_absolute() else source
