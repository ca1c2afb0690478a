"""What the hub refuses, and what goes wrong on the way, as a user meets it: one line that says what to do.

One process runs the command for all cases of a table, against a hub on this machine.
"""

import json
import os
import subprocess
import sys

import builders
import local_hub
import pytest
from commands import ROOT, write_config
from local_hub import Reply, refusal

LOGIN = "log in: hf auth login, or set HF_TOKEN"
TOKEN = "hf_sesameopensesameopensesame"
BROKEN = "the connection broke off ("
RETRY = "start again: files that have arrived are kept"

DRIVER = """
import json, os, sys, time
sys.path.insert(0, "tests")
from commands import call
for words, token in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
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


def at(part, reply, method=None):
    """A fault of the requests whose path contains ``part``."""
    return lambda asked, path, headers: reply if part in path and method in (None, asked) else None


def files_only(name, reply):
    """A fault of a repository whose description anyone may read, but not its files."""
    return at(f"{name}/resolve/", reply)


RESTRICTED = (
    "Access to model x is restricted. You must have access to it and be authenticated to access it. Please log in."
)
UNLISTED = "Access to model x is restricted and you are not in the authorized list. Visit x to ask for access."
WAITING = "Your request to access model x is awaiting a review from the repo authors."
EXPIRED = "Invalid credentials in Authorization header"

FAULTS = {  # by the name of the repository
    "gated": (files_only, refusal(401, "GatedRepo", RESTRICTED), None),
    "unlisted": (files_only, refusal(403, "GatedRepo", UNLISTED), TOKEN),
    "waiting": (files_only, refusal(403, "GatedRepo", WAITING), TOKEN),
    "gated-whole": (at, refusal(401, "GatedRepo", RESTRICTED), None),
    "expired": (at, refusal(401, "", EXPIRED), TOKEN),
    "forbidden": (at, refusal(403, "", "Enable access to public gated repositories in your token's settings"), TOKEN),
    "disabled": (at, refusal(403, "", "Access to this resource is disabled."), TOKEN),
    "limited": (at, refusal(429, "", "Too Many Requests", **{"Retry-After": "17"}), None),
    "broken": (at, Reply(503, b"upstream"), None),
    "not-json": (at, Reply(200, b"<html>Sign in to the guest network</html>", {"Content-Type": "text/html"}), None),
    "nameless": (at, Reply(200, b'{"id": "o/nameless"}', {"Content-Type": "application/json"}), None),
    "mute": (at, Reply(wait=20), None),
}
SAID = {
    "gated": "is gated: ask for access at {page}, then " + LOGIN,
    "unlisted": "is gated, and the user of your token has no access: ask for it at {page}",
    "waiting": "is gated, and your request for access waits for its owners, see {page}: " + WAITING,
    "gated-whole": "is gated: ask for access at {page}, then " + LOGIN,
    "expired": f"the hub refuses the token ({EXPIRED}); {LOGIN} to one that is valid",
    "forbidden": "the hub denies access (Enable access to public gated repositories in your token's settings); "
    "use a token that may read {page}",
    "disabled": "the hub denies access (Access to this resource is disabled.); use a token that may read {page}",
    "limited": "the hub limits the rate of requests (Too Many Requests); try again in 17 s, or log in, which raises the limit",
    "broken": "the hub has failed (503: upstream); try again later: files that have arrived are kept",
    "missing": "no such {local}, and the hub does not provide it: not found; if it is private, " + LOGIN,
    "of-another-kind": "is a {other} on the hub, not a {own}",
    "not-json": "what answers at {hub} is no hub; look at HF_ENDPOINT and at the proxies of your site",
    "nameless": "the hub names no commit of it; does HF_ENDPOINT name a hub?",
    "mute": f"the connection broke off (timed out); {RETRY}",
}  # fmt: skip


@pytest.fixture(scope="module")
def answers(tiny_model, tmp_path_factory):
    """The output for each case and kind of repository."""
    folder = tmp_path_factory.mktemp("answers")
    records = builders.write_records(folder / "records.jsonl")
    config = write_config(folder, tiny_model, records, data=dict(eval_path=None))
    cases = {}
    with local_hub.serve() as hub:
        for name, (where, reply, _) in FAULTS.items():
            hub.put_model(f"o/{name}", tiny_model)
            hub.put("dataset", f"o/{name}", {"train.jsonl": records.read_bytes()})
            hub.faults.append(where(f"o/{name}", reply))
        hub.put("dataset", "m/of-another-kind", {"train.jsonl": records.read_bytes()})
        hub.put_model("d/of-another-kind", tiny_model)
        for name in SAID:
            for kind, key in (("model", "model.path"), ("dataset", "data.path")):
                owner = kind[0] if name == "of-another-kind" else "o"
                cases[name, kind] = (["train", str(config), f"{key}={owner}/{name}"], FAULTS.get(name, (0, 0, None))[2])
        found = run_cases(hub, folder, list(cases.values()))
        yield hub.url, dict(zip(cases, found, strict=True))


@pytest.mark.parametrize("kind", ["model", "dataset"])
@pytest.mark.parametrize("name", SAID)
def test_what_the_hub_refuses_is_one_line_with_the_remedy(name, kind, answers):
    url, found = answers
    code, said, seconds = found[name, kind]
    owner = kind[0] if name == "of-another-kind" else "o"
    words = {"model": ("model", "data set", "folder"), "dataset": ("data set", "model", "file")}[kind]
    expected = SAID[name].format(
        page=f"{url}/{'datasets/' if kind == 'dataset' else ''}{owner}/{name}",
        own=words[0], hub=url, other=words[1], local=words[2],
    )  # fmt: skip
    lines = [line for line in said.splitlines() if line.startswith("liftdist: ")]
    assert code == 2, said
    assert len(lines) == 1, said
    assert lines[0].startswith(f"liftdist: {'model.path' if kind == 'model' else 'data'} {owner}/{name}: {expected}")
    assert TOKEN not in said
    assert "Traceback" not in said
    assert seconds < 30
