"""A hub of our own: its cache layout on disk, and a server that answers like huggingface.co."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from huggingface_hub import constants, file_download
from safetensors.torch import save

from tl_fastload.source.checkpoint import Checkpoint, open_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "fedcba9876543210fedcba9876543210fedcba98"

CONFIG = b'{"model_type": "gpt2"}'
WEIGHTS = save({"a": torch.ones(2), "b": torch.zeros(3)})
INDEX = json.dumps({"weight_map": {"a": "s-1.safetensors", "b": "s-2.safetensors"}}).encode()
SHARDS = {
    "s-1.safetensors": save({"a": torch.ones(2)}),
    "s-2.safetensors": save({"b": torch.zeros(3)}),
}
SINGLE = {"config.json": CONFIG, "model.safetensors": WEIGHTS}
SHARDED = {"config.json": CONFIG, "model.safetensors.index.json": INDEX, **SHARDS}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def resolve(name: str | Path, **options: Any) -> Checkpoint:
    """Find a model and its weights."""
    from tl_fastload.hooked.official_names import resolve_model  # TransformerLens 4 has no names

    choice = {"weights_file", "variant", "use_safetensors"} & options.keys()
    chosen = {option: options.pop(option) for option in choice}
    return open_weights(resolve_model(name, **options), **chosen)


def forbid_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have huggingface_hub work as under HF_HUB_OFFLINE=1, with no token around."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)


def point_at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Have huggingface_hub believe that the hub is at `url`, and reachable."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):  # versions differ in who holds it
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def fill_cache(
    cache: Path,
    repo: str,
    files: Mapping[str, bytes],
    *,
    commit: str = COMMIT,
    refs: tuple[str, ...] = ("main",),
) -> Path:
    """Write `files` as huggingface_hub would cache them; returns the snapshot folder."""
    store = cache / ("models--" + repo.replace("/", "--"))
    snapshot = store / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    (store / "blobs").mkdir(exist_ok=True)
    for name, content in files.items():
        blob = store / "blobs" / _digest(content)
        blob.write_bytes(content)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (2 + name.count("/"))) / "blobs" / blob.name)
    for ref in refs:
        (store / "refs").mkdir(exist_ok=True)
        (store / "refs" / ref).write_text(commit)
    return snapshot


@dataclass
class Repo:
    """One repository; `error` is the hub's X-Error-Code for every request for its files."""

    files: Mapping[str, bytes]
    commit: str = COMMIT
    revisions: tuple[str, ...] = ("main",)
    error: str | None = None
    token: str | None = None


@dataclass
class FakeHub:
    """Serves `repos`; `requests` are the "METHOD path" of all requests so far, `sent_bytes` what
    was sent of each file. At `together` the downloads of shards wait for each other."""

    repos: dict[str, Repo]
    requests: list[str] = field(default_factory=list)
    status: int | None = None
    sent_bytes: dict[str, int] = field(default_factory=dict)
    together: threading.Barrier | None = None

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_GET(self) -> None:
                hub.answer(self)

            def do_POST(self) -> None:
                hub.receive(self)

            def log_message(self, *args: object) -> None:
                """Keep the tests' output quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def downloads(self) -> list[str]:
        """The names of the files that were fetched whole."""
        found = [line for line in self.requests if line.startswith("GET") and "/resolve/" in line]
        return [line.rpartition("/resolve/")[2].partition("/")[2] for line in found]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(handler.path.partition("?")[0]).strip("/")
        self._blobs = "blobs" in handler.path.partition("?")[2]
        self.requests.append(f"{handler.command} {path}")
        if self.status is not None:
            return self._send(handler, self.status)
        if path.startswith("api/models/"):
            return self._answer_listing(handler, path[len("api/models/") :])
        return self._answer_file(handler, path)

    def receive(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer what would change something: it takes nothing."""
        self._send(handler, 405)

    def _answer_listing(self, handler: BaseHTTPRequestHandler, path: str) -> None:
        name, kind, revision = path.partition("/revision/")
        if not kind:
            name, kind, revision = path.partition("/tree/")
        repo = self.repos.get(name)
        if repo is None or not self._has_token(handler, repo):
            return self._send(handler, 404, error="RepoNotFound")
        if not self._has_revision(repo, revision or "main"):
            return self._send(handler, 404, error="RevisionNotFound")
        if kind == "/tree/":
            tree = [
                {"type": "file", "path": file, "size": len(content), "oid": _digest(content)}
                for file, content in repo.files.items()
            ]
            return self._send(handler, 200, json.dumps(tree).encode(), kind="application/json")
        siblings = [
            {"rfilename": file, "size": len(content)} if self._blobs else {"rfilename": file}
            for file, content in repo.files.items()
        ]
        body = {"id": name, "modelId": name, "sha": repo.commit, "siblings": siblings}
        return self._send(handler, 200, json.dumps(body).encode(), kind="application/json")

    def _answer_file(self, handler: BaseHTTPRequestHandler, path: str) -> None:
        name, _, rest = path.partition("/resolve/")
        revision, _, filename = rest.partition("/")
        repo = self.repos.get(name)
        if repo is None or not self._has_token(handler, repo):
            return self._send(handler, 401, error="RepoNotFound")
        if repo.error is not None:
            return self._send(handler, 403, error=repo.error)
        if not self._has_revision(repo, revision):
            return self._send(handler, 404, error="RevisionNotFound")
        if filename not in repo.files:
            return self._send(handler, 404, error="EntryNotFound", commit=repo.commit)
        content = repo.files[filename]
        asked = (handler.headers.get("range") or "").removeprefix("bytes=").partition("-")
        if handler.command == "GET" and asked[1]:
            part = content[int(asked[0]) : int(asked[2] or len(content)) + 1]
            self.sent_bytes[filename] = self.sent_bytes.get(filename, 0) + len(part)
            return self._send(handler, 206, part, commit=repo.commit)
        if handler.command == "GET":
            if self.together is not None and filename.startswith("s-"):
                with contextlib.suppress(threading.BrokenBarrierError):
                    self.together.wait()
            self.sent_bytes[filename] = self.sent_bytes.get(filename, 0) + len(content)
        return self._send(handler, 200, content, commit=repo.commit)

    @staticmethod
    def _has_token(handler: BaseHTTPRequestHandler, repo: Repo) -> bool:
        sent = handler.headers.get("authorization")
        return repo.token is None or sent == f"Bearer {repo.token}"

    @staticmethod
    def _has_revision(repo: Repo, revision: str) -> bool:
        return revision in (*repo.revisions, repo.commit)

    @staticmethod
    def _send(
        handler: BaseHTTPRequestHandler,
        status: int,
        body: bytes = b"",
        *,
        error: str | None = None,
        commit: str | None = None,
        kind: str = "application/octet-stream",
    ) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(body)))
        handler.send_header("ETag", f'"{_digest(body)}"')
        if error is not None:
            handler.send_header("X-Error-Code", error)
        if commit is not None:
            handler.send_header("X-Repo-Commit", commit)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)
