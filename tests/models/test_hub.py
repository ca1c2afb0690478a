"""Models by their names on the hub, where there is no hub: none that answers, none but its cache, none but through a proxy."""

import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest
from commands import run_command, user_error, write_config

NAME = "somebody/some-model"
REMEDY = "give a local folder, or fetch it where there is a network: liftdist select CONFIG --prefetch"


@pytest.fixture
def environment(tmp_path):
    """A hub cache of its own, and no word of being offline."""
    return {
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hf"),
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture
def silent():
    """Address of a socket that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def refusing():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{closed.getsockname()[1]}"


@pytest.fixture
def config(records, tmp_path):
    return write_config(tmp_path, NAME, records)


def in_cache(folder, model):
    """Put a model into the cache of the hub, as the library lays it out."""
    repository = folder / "hub" / f"models--{NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return shutil.copytree(model, repository / "snapshots" / ("0" * 40))


@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.parametrize("kind", ["refusing", "silent"])
def test_a_hub_that_cannot_be_reached_is_said_at_once(command, kind, config, environment, request):
    """The library repeats its requests for over a minute before it gives up."""
    host = request.getfixturevalue(kind)
    began = time.monotonic()
    run = run_command(command, config, environment=environment | {"HF_ENDPOINT": f"http://{host}"})
    line = user_error(run)
    assert line.startswith(f"liftdist: model.path {NAME}: the hub cannot be reached ({host}: ")
    assert line.endswith(f"); {REMEDY}")
    assert time.monotonic() - began < (10 if command == "train" else 40)  # the planner imports torch before


def test_offline_mode_is_named(config, environment):
    line = user_error(run_command("train", config, environment=environment | {"HF_HUB_OFFLINE": "1"}))
    assert "the hub cannot be reached (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set)" in line
    assert line.endswith(REMEDY)


def test_what_the_cache_holds_needs_no_network(config, environment, silent, tiny_model, tmp_path):
    snapshot = in_cache(tmp_path / "hf", tiny_model)
    nowhere = {**os.environ, **environment, "HF_ENDPOINT": f"http://{silent}"}
    find = f"from liftdist.models.hub import resolve_model; print(resolve_model({NAME!r}))"
    for offline in ("0", "1"):
        command = [sys.executable, "-c", find]
        found = subprocess.run(command, env=nowhere | {"HF_HUB_OFFLINE": offline}, capture_output=True, text=True)
        assert (found.returncode, found.stdout.strip()) == (0, str(snapshot)), found.stderr
    said = run_command("plan", config, environment=nowhere)
    assert (said.returncode, "14 matrices" in said.stdout) == (0, True), said.stdout


def test_a_hub_is_reached_through_a_proxy(config, environment):
    """A proxy that knows no model: what the line says is the hub's answer, whose name cannot be looked up from here."""
    asked = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        proxy = f"http://127.0.0.1:{server.server_port}"
        run = run_command(
            "train", config, environment=environment | {"HF_ENDPOINT": "http://hub.invalid", "HTTP_PROXY": proxy}
        )
        server.shutdown()
    line = user_error(run)
    assert "no such folder, and the hub does not provide it: " in line
    assert "404" in line
    assert len(asked) > 1
    assert {path.split("/")[2] for path in asked} == {"hub.invalid"}
