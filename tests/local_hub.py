"""A hub on this machine: the part of the hub's HTTP interface that is used to find and to download repositories.

    with local_hub.serve() as hub:
        hub.put("model", "owner/name", {"config.json": b"..."})        a commit on its main branch
        ... HF_ENDPOINT=hub.url

A fault is ``fault(method, path, headers) -> Reply | None``, asked before every answer.
"""

import contextlib
import hashlib
import http.server
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Reply:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # close the connection after that many bytes of the body
    wait: float = 0.0  # seconds before the answer


def refusal(status: int, code: str = "", message: str = "", **headers: str) -> Reply:
    """An answer as the hub gives it: the reason is in headers, which is all that an answer to HEAD has."""
    given = {"X-Error-Code": code, "X-Error-Message": message} if code or message else {}
    return Reply(status, json.dumps({"error": message}).encode(), {k: v for k, v in given.items() if v} | headers)


Fault = Callable[[str, str, dict[str, str]], Reply | None]


class Hub:
    def __init__(self, url: str) -> None:
        self.url = url
        self.commits: dict[
            tuple[str, str], dict[str, dict[str, bytes]]
        ] = {}  # repository -> commit -> file -> contents
        self.refs: dict[tuple[str, str], dict[str, str]] = {}  # repository -> branch or tag -> commit
        self.faults: list[Fault] = []
        self.asked: list[tuple[str, str]] = []  # method and path of every request

    def put(self, kind: str, name: str, files: dict[str, bytes], ref: str = "main") -> str:
        """A new commit of a repository, which ``ref`` names from now on."""
        digest = hashlib.sha1(usedforsecurity=False)
        for path, contents in sorted(files.items()):
            digest.update(path.encode() + contents)
        commit = digest.hexdigest()
        self.commits.setdefault((kind, name), {})[commit] = files
        self.refs.setdefault((kind, name), {})[ref] = commit
        return commit

    def put_model(self, name: str, folder: Path, ref: str = "main", **changed: bytes) -> str:
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        return self.put(
            "model", name, files | {key.replace("_json", ".json"): text for key, text in changed.items()}, ref
        )

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Reply:
        path = unquote(urlsplit(target).path)
        self.asked.append((method, path))
        for fault in self.faults:
            if (reply := fault(method, path, headers)) is not None:
                return reply
        api = re.fullmatch(r"/api/(model|dataset)s/([\w.-]+/[\w.-]+)(?:/(revision|tree|paths-info)/(.+))?", path)
        file = re.fullmatch(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/([0-9a-f]{40})/(.+)", path)
        if api:
            kind, name, what, rest = api.groups()
        elif file:
            kind, name, what, rest = "dataset" if file[1] else "model", file[2], "resolve", file[3]
        else:
            return Reply(200 if path == "/" else 404)
        repo = (kind, name)
        if repo not in self.commits:
            return refusal(401 if "authorization" not in headers else 404, "RepoNotFound", "Repository not found")
        revision = (rest or "main") if what != "tree" else rest.partition("/")[0]
        commit = self.refs[repo].get(revision, revision)
        if commit not in self.commits[repo]:
            return refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = self.commits[repo][commit]
        if what == "resolve":
            if (contents := files.get(file[4])) is None:
                return refusal(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit})
            return Reply(200, contents, {"X-Repo-Commit": commit, "ETag": f'"{_etag(contents)}"'})
        if what == "tree":
            folder = rest.partition("/")[2]
            inside = [path for path in files if not folder or path.startswith(f"{folder}/")]
            if folder and not inside:
                return refusal(404, "EntryNotFound", f"{folder} does not exist")
            return _json([_entry(path, files[path]) for path in inside])
        if what == "paths-info":
            form = parse_qs(body.decode())
            wanted = form.get("paths", []) if "=" in body.decode() else json.loads(body or b"{}").get("paths", [])
            return _json([_entry(path, files[path]) for path in wanted if path in files])
        return _json({"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files], "tags": []})


def _etag(contents: bytes) -> str:
    return hashlib.sha1(contents, usedforsecurity=False).hexdigest()


def _entry(path: str, contents: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(contents), "oid": _etag(contents)}


def _json(value) -> Reply:
    return Reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


@contextlib.contextmanager
def serve(tls: ssl.SSLContext | None = None):
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {key.lower(): value for key, value in self.headers.items()}
            reply = hub.answer(self.command, self.path, headers, body)
            time.sleep(reply.wait)
            content, extra = reply.body, {}
            if (part := re.fullmatch(r"bytes=(\d+)-", headers.get("range", ""))) and reply.status == 200:
                extra = {"Content-Range": f"bytes {part[1]}-{len(content) - 1}/{len(content)}"}
                content = content[int(part[1]) :]
            self.send_response(206 if extra else reply.status)
            for key, value in (reply.headers | extra | {"Content-Length": str(len(content))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: reply.cut])
                if reply.cut is not None:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)

        do_HEAD = do_POST = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        hub = Hub(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()
