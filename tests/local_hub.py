"""A hub on this machine: the part of the hub's HTTP interface that is used to find, to download and to change repositories.

    with local_hub.serve() as hub:
        hub.put("model", "owner/name", {"config.json": b"..."})        a commit on its main branch
        ... HF_ENDPOINT=hub.url

A fault is ``fault(method, path, headers) -> Reply | None``, asked before every answer.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from commands import ROOT

TOKEN = "hf_sesameopensesameopensesame"


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
        self.private: dict[tuple[str, str], bool] = {}
        self.uploads: dict[str, bytes] = {}  # sha256 -> contents that have arrived, and may be committed
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
        if (reply := self._change(method, path, headers, body)) is not None:
            return reply
        api = re.fullmatch(r"/api/(model|dataset)s/([\w.-]+/[\w.-]+)(?:/(revision|tree|paths-info)/(.+))?", path)
        file = re.fullmatch(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path)
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
        siblings = [{"rfilename": path} for path in files]
        return _json({"id": name, "sha": commit, "private": self.private.get(repo), "siblings": siblings, "tags": []})

    def _change(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Reply | None:
        """The answer to a request that makes or changes a repository of a model; None to others."""
        if method == "PUT" and path.startswith("/upload/"):
            self.uploads[hashlib.sha256(body).hexdigest()] = body
            return Reply()
        api = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(branch|preupload|commit)/(.+)", path)
        batch = re.fullmatch(r"/[\w.-]+/[\w.-]+\.git/info/lfs/objects/batch", path)
        if method != "POST" or not (api or batch or path in ("/api/repos/create", "/api/validate-yaml")):
            return None
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if "authorization" not in headers:
            return refusal(401, "", "Invalid username or password.")
        given = json.loads(body) if not api or api[2] != "commit" else {}
        if batch:
            return _json({"transfer": "basic", "objects": [self._upload(entry) for entry in given["objects"]]})
        if api is None:
            name = f"{given['organization']}/{given['name']}"
            if ("model", name) in self.commits:
                return refusal(409, "", "You already created this model repo")
            self.put("model", name, {".gitattributes": b""})
            self.private["model", name] = given.get("visibility") == "private" or given.get("private") is True
            return _json({"url": f"{self.url}/{name}", "name": name, "id": name})
        name, what, revision = api.groups()
        refs = self.refs["model", name]
        if what == "branch":
            if revision in refs:
                return refusal(409, "", "Reference already exists")
            refs[revision] = refs["main"]
            return _json({})
        if what == "preupload":
            large = (".safetensors", ".model")
            modes = {path: "lfs" if path.endswith(large) else "regular" for path in (f["path"] for f in given["files"])}
            return _json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})
        files = dict(self.commits["model", name][refs[revision]])
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header" and value.get("parentCommit", refs[revision]) != refs[revision]:
                return refusal(412, "", "A commit has happened since. Please refresh and try again.")
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.uploads[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        commit = self.put("model", name, files, revision)
        return _json({"commitUrl": f"{self.url}/{name}/commit/{commit}", "commitOid": commit, "success": True})

    def _upload(self, entry: dict) -> dict:
        """How an object of git's large file storage is to be sent, unless it is there."""
        where = {"upload": {"href": f"{self.url}/upload/{entry['oid']}"}}
        return entry | ({} if entry["oid"] in self.uploads else {"actions": where})


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
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b"".join(iter(self.read_chunk, b""))
            else:
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

        do_HEAD = do_POST = do_PUT = do_GET

        def read_chunk(self) -> bytes:
            chunk = self.rfile.read(int(self.rfile.readline(), 16))
            self.rfile.readline()
            return chunk

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


DRIVER = """
import json, os, sys, time
sys.path.insert(0, "tests")
from commands import call
for words, token in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    os.environ.pop("LIFTDIST_COMMITS", None)
    if token:
        os.environ["HF_TOKEN"] = token
    began = time.monotonic()
    code, said = call(*words)
    print(json.dumps([code, said, time.monotonic() - began]), flush=True)
"""


def run_cases(hub, folder, cases, **environment):
    """Exit code, output and seconds of the command for each ``(words, token)``, in one process."""
    run = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(cases)],
        env={
            **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DOWNLOAD_TIMEOUT": "1", **environment,
        },
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]
