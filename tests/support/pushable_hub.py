"""A hub of our own that repositories can be pushed to, by commits of huggingface_hub's."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tests.support.fake_hub import FakeHub, Repo, forbid_network, point_at


@contextlib.contextmanager
def pushable_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[PushableHub]:
    """An empty hub whose token is at hand; what is fetched from it stays in `tmp_path`."""
    forbid_network(monkeypatch)
    monkeypatch.setenv("HF_TOKEN", "secret")
    for name in ("HF_ASSETS_CACHE", "HF_HUB_CACHE"):
        monkeypatch.setattr(constants, name, str(tmp_path / name))
    with PushableHub({}) as fake:
        point_at(monkeypatch, fake.url)
        yield fake


@dataclass
class PushableHub(FakeHub):
    """`made` says of each repository that was created whether it is private; `commits` are the
    messages. Whoever has no `token` may not push."""

    token: str = "secret"
    made: dict[str, Any] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    def receive(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0].strip("/")
        self.requests.append(f"POST {path}")
        body = handler.rfile.read(int(handler.headers["Content-Length"] or 0))
        if path == "api/validate-yaml":
            return self._json(handler, {"warnings": [], "errors": []})
        if handler.headers.get("authorization") != f"Bearer {self.token}":
            return self._send(handler, 401)
        if path == "api/repos/create":
            return self._create(handler, json.loads(body))
        name, kind, revision = path.removeprefix("api/models/").rpartition("/")
        name, _, kind = name.rpartition("/")
        repo = self.repos[name]
        if kind == "branch":
            repo.revisions = (*repo.revisions, revision)
            return self._json(handler, {})
        if kind == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._json(handler, {"files": files})
        assert kind == "commit"
        return self._commit(handler, name, repo, body)

    def _create(self, handler: BaseHTTPRequestHandler, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if name in self.repos:
            return self._json(handler, {"url": f"{self.url}/{name}", "id": name}, 409)
        self.made[name] = wanted.get("private", wanted.get("visibility"))
        self.repos[name] = Repo({})
        return self._json(handler, {"url": f"{self.url}/{name}", "id": name})

    def _commit(self, handler: BaseHTTPRequestHandler, name: str, repo: Repo, body: bytes) -> None:
        files = dict(repo.files)
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                assert value["parentCommit"] == repo.commit
                self.commits.append(value["summary"])
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                del files[value["path"]]
        repo.files, repo.commit = files, hashlib.sha1(body).hexdigest()
        url = f"{self.url}/{name}/commit/{repo.commit}"
        self._json(handler, {"commitUrl": url, "commitOid": repo.commit})

    def _json(self, handler: BaseHTTPRequestHandler, values: Any, status: int = 200) -> None:
        self._send(handler, status, json.dumps(values).encode(), kind="application/json")
