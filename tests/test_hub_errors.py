"""What the hub refuses, and what goes wrong on the way, as a user meets it: one line that says what to do.

One process runs the command for all cases of a table, against a hub on this machine.
"""

import ssl
import subprocess
from concurrent.futures import ThreadPoolExecutor

import builders
import local_hub
import pytest
from commands import write_config
from local_hub import TOKEN, Reply, refusal, run_cases

LOGIN = "log in: hf auth login, or set HF_TOKEN"
RETRY = "start again: files that have arrived are kept"


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
    "mute": "the connection to {host} broke off (timed out); " + RETRY,
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
        own=words[0], hub=url, host=url.removeprefix("http://"), other=words[1], local=words[2],
    )  # fmt: skip
    lines = [line for line in said.splitlines() if line.startswith("liftdist: ")]
    assert code == 2, said
    assert len(lines) == 1, said
    assert lines[0].startswith(f"liftdist: {'model.path' if kind == 'model' else 'data'} {owner}/{name}: {expected}")
    assert TOKEN not in said
    assert "Traceback" not in said
    assert seconds < 30


# ---------------------------------------------------------------------------------------------------------------------
# What a repository lacks, and what the user asks of it.

CARD = b"---\nconfigs:\n- config_name: a\n  data_files: a.jsonl\n- config_name: b\n  data_files: b.jsonl\n---\n"
REVISION = "give a branch, a tag or the full hash of a commit"

ASKED = {
    "no config": (["model.path=o/gguf"], "model.path o/gguf: the repository holds no config.json"),
    "an adapter": (["model.path=o/adapter"], "model.path o/adapter: the repository holds an adapter; name its base model"),
    "pickled": (["model.path=o/pickled"], "model.path o/pickled: the repository holds no weights in safetensors; "),
    "revision": (["model.path=o/good", "model.revision=v9"],
                 "model.path o/good (revision v9): has no revision v9; " + REVISION + ", see {url}/o/good/commits"),
    "short hash": (["model.path=o/good", "model.revision=abcdef1"],
                   f"model.path o/good (revision abcdef1): has no revision abcdef1; {REVISION}, see "),
    "unknown commit": (["model.path=o/good", f"model.revision={'c' * 40}"],
                       f"model.path o/good (revision {'c' * 40}): has no revision {'c' * 40}; {REVISION}"),
    "no revision": (["model.path=o/good", "model.revision=../../x"],
                    f"model.path o/good (revision ../../x): is no revision; {REVISION}"),
    "local model": (["model.revision=main"], "model.revision=main: model.path {model} is a local folder, which has no revisions"),
    "local data": (["data.revision=main"], "data {data}: is a local file, which has no revision main; leave the revision out"),
    "local held-out data": (["data.eval_path={data}", "data.eval_revision=v1"],
                            "data {data}: is a local file, which has no revision v1; leave the revision out"),
    "no held-out data": (["data.eval_revision=v1"],
                         "override 'data.eval_revision=v1': data.eval_revision: is the revision of data.eval_path, which "),
    "data revision": (["data.path=o/good", "data.revision=v9"], f"data o/good (revision v9): has no revision v9; {REVISION}"),
    "held-out revision": (["data.path=o/good", "data.eval_path=o/subsets", "data.eval_revision=v9"],
                          f"data o/subsets (revision v9): has no revision v9; {REVISION}"),
    "same repository": (["data.path=o/good", "data.eval_path=o/good", "data.revision=v1", "data.eval_split=tset"],
                        "data o/good (revision v1): has no split tset; those it has: train"),
    "other repository": (["data.path=o/good", "data.eval_path=o/subsets", "data.revision=v1"],
                         "data o/subsets: data.subset must name one of its subsets: a, b"),
    "script": (["data.path=o/script"], "data o/script: is made by a script, which is not run; "),
    "no data": (["data.path=o/gguf-data"], "data o/gguf-data: holds no data file of a kind that can be read ("),
    "split": (["data.path=o/good", "data.split=tset"], "data o/good: has no split tset; those it has: train, test"),
    "part of a split": (["data.path=o/good", "'data.split=train[:50%]+tset'"], "data o/good: has no split train[:50%]+tset; "),
    "subset": (["data.path=o/subsets", "data.subset=c"], "data o/subsets: has no subset c; those it has: a, b"),
    "which subset": (["data.path=o/subsets"], "data o/subsets: data.subset must name one of its subsets: a, b"),
    "damaged": (["data.path=o/damaged"], "data o/damaged: cannot be read: "),
    "no name": (["data.path=https://hub/o/good"], "data https://hub/o/good: no such file, and no name on the hub either ("),
}  # fmt: skip


@pytest.fixture(scope="module")
def asked(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("asked")
    records = builders.write_records(folder / "records.jsonl")
    lines, settings = records.read_bytes(), (tiny_model / "config.json").read_bytes()
    config = write_config(folder, tiny_model, records, data=dict(eval_path=None))
    names = {"model": tiny_model, "data": records}
    with local_hub.serve() as hub:
        hub.put_model("o/good", tiny_model)
        hub.put("model", "o/gguf", {"README.md": b"", "weights.gguf": b""})
        hub.put("model", "o/adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": b""})
        hub.put("model", "o/pickled", {"config.json": settings, "pytorch_model.bin": b""})
        hub.put("dataset", "o/good", {"train.jsonl": lines}, ref="v1")
        hub.put("dataset", "o/good", {"train.jsonl": lines, "test.jsonl": lines})
        hub.put("dataset", "o/script", {"script.py": b"raise SystemExit('was run')"})
        hub.put("dataset", "o/gguf-data", {"README.md": b"", "weights.gguf": b""})
        hub.put("dataset", "o/damaged", {"train.jsonl": b'{"prompt": "a"}\n{"prompt"\n'})
        hub.put("dataset", "o/subsets", {"README.md": CARD, "a.jsonl": lines, "b.jsonl": lines})
        given = [[word.format(**names).strip("'") for word in words] for words, _ in ASKED.values()]
        found = run_cases(hub, folder, [(["train", str(config), *words], None) for words in given])
        yield names | {"url": hub.url}, dict(zip(ASKED, found, strict=True))


@pytest.mark.parametrize("case", ASKED)
def test_what_is_not_there_is_named_with_what_is(case, asked):
    names, found = asked
    code, said, _ = found[case]
    assert code == 2, said
    assert f"liftdist: {ASKED[case][1].format(**names)}" in said
    assert "Traceback" not in said
    assert "was run" not in said


# ---------------------------------------------------------------------------------------------------------------------
# On the way.

CDN = "X-Amz-Signature=5e5a3e"  # what the address of a file is signed with


def elsewhere(where):
    """A file that the hub keeps on another host."""
    headers = {"Location": f"{where}?{CDN}", "ETag": '"1"', "X-Linked-ETag": '"1"', "X-Linked-Size": "2000"}
    return lambda commit: Reply(302, headers=headers | {"X-Repo-Commit": commit})


BROKEN_ON_THE_WAY = {
    "cut": "the connection to {host} broke off (peer closed connection without sending complete message body",
    "mute": "the connection to {host} broke off (timed out); " + RETRY,
    "failing": "the hub has failed (502: HTTP status 502); try again later: files that have arrived are kept",
    "refusing": "the connection to 127.0.0.1:9 broke off ([Errno 111] Connection refused); " + RETRY,
    "filtered": "localhost:{port}, where the hub keeps its files, refuses them (blocked by the firewall); your proxy or firewall "
    "must allow it",
    "gone": "localhost:{port}, where the hub keeps its files, refuses them (HTTP status 404)",
}


@pytest.fixture(scope="module")
def broken(tiny_model, tmp_path_factory):
    """Downloads that break, all at once, each in a process of its own: the library tries each several times."""
    folder = tmp_path_factory.mktemp("broken")
    records = builders.write_records(folder / "records.jsonl")
    contents, settings = records.read_bytes(), (tiny_model / "config.json").read_bytes()
    config = write_config(folder, tiny_model, records, data=dict(eval_path=None))
    with local_hub.serve() as hub:
        port = hub.url.rpartition(":")[2]
        storage = f"http://localhost:{port}/storage"
        replies = {
            "cut": lambda _: Reply(200, contents, {"ETag": '"1"'}, cut=100),
            "mute": lambda _: Reply(wait=8),
            "failing": lambda _: Reply(502),
            "refusing": elsewhere("http://127.0.0.1:9/storage"),
            "filtered": elsewhere(f"{storage}/filtered"),
            "gone": elsewhere(f"{storage}/gone"),
        }
        hub.faults.append(
            at("/storage/filtered", Reply(403, b"blocked by the firewall", {"Content-Type": "text/plain"}))
        )

        def fault(method, path, headers):
            file = path.rpartition("/")[2]
            if "/resolve/" not in path or file not in ("model.safetensors", "train.jsonl"):
                return None
            name, commit = path.split("/")[-4], path.split("/")[-2]
            reply = replies[name](commit)
            return reply if method == "GET" or reply.status == 302 else None

        hub.faults.append(fault)
        for name in replies:
            hub.put(
                "model",
                f"o/{name}",
                {"config.json": settings, "model.safetensors": contents},
            )
            hub.put("dataset", f"o/{name}", {"train.jsonl": contents})
        cases = [
            (["train", str(config), f"{key}=o/{name}"], None) for key in ("model.path", "data.path") for name in replies
        ]
        with ThreadPoolExecutor(3) as pool:
            parts = list(pool.map(lambda part: run_cases(hub, folder / str(part), cases[part::3]), range(3)))
        yield port, {tuple(words[2:]): parts[number % 3][number // 3] for number, (words, _) in enumerate(cases)}


@pytest.mark.slow  # the library tries each file again
@pytest.mark.parametrize("key", ["model.path", "data.path"])
@pytest.mark.parametrize("name", BROKEN_ON_THE_WAY)
def test_a_download_that_breaks_is_said_in_bounded_time(name, key, broken):
    port, found = broken
    code, said, seconds = found[(f"{key}=o/{name}",)]
    expected = BROKEN_ON_THE_WAY[name].format(host=f"127.0.0.1:{port}", port=port)
    assert code == 2, said
    assert f"liftdist: {'model.path' if key == 'model.path' else 'data'} o/{name}: {expected}" in said
    assert CDN not in said
    assert "Traceback" not in said
    assert seconds < 60


@pytest.mark.parametrize("key", ["model.path", pytest.param("data.path", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["full", "read-only", "a file"])
def test_a_cache_that_takes_no_file_is_named(kind, key, tiny_model, small_disk, tmp_path):
    records = builders.write_records(tmp_path / "records.jsonl")
    config = write_config(tmp_path, tiny_model, records, data=dict(eval_path=None))
    home = small_disk / "hf"
    if kind == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    elif kind == "a file":
        home.write_text("")
    with local_hub.serve() as hub:
        hub.put_model("o/name", tiny_model)
        hub.put("dataset", "o/name", {"train.jsonl": records.read_bytes() * 2000})
        [(code, said, _)] = run_cases(
            hub, tmp_path, [(["train", str(config), f"{key}=o/name"], None)], HF_HOME=str(home)
        )
    assert code == 2, said
    expected = "no space left in the hub's cache" if kind == "full" else "the hub's cache cannot be written ("
    assert f" o/name: {expected}" in said
    assert "HF_HOME" in said
    assert "Traceback" not in said


# ---------------------------------------------------------------------------------------------------------------------
# No way to the hub.


@pytest.fixture(scope="module")
def cut_off(tiny_model, tmp_path_factory):
    """What is said where there is no hub, for each reason, in processes of their own."""
    folder = tmp_path_factory.mktemp("cut-off")
    records = builders.write_records(folder / "records.jsonl")
    config = write_config(folder, tiny_model, records, data=dict(eval_path=None))
    certificate = [folder / "key.pem", folder / "certificate.pem"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", certificate[0], "-out", certificate[1]],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate[1], certificate[0])
    with local_hub.serve() as hub, local_hub.serve(context) as secure:
        for served in (hub, secure):
            served.put_model("o/name", tiny_model)
        port = hub.url.rpartition(":")[2]
        secure_url = f"https://localhost:{secure.url.rpartition(':')[2]}"
        reasons = {
            "offline": {"HF_HUB_OFFLINE": "1"},
            "name": {"HF_ENDPOINT": "http://hub.invalid"},
            "proxy": {
                "HF_ENDPOINT": "https://hub.invalid",
                "HTTPS_PROXY": "http://me:sesame-open@127.0.0.1:9",
                "NO_PROXY": "",
            },
            "certificate": {"HF_ENDPOINT": secure_url, "NO_PROXY": "localhost"},
            "no TLS": {"HF_ENDPOINT": f"https://me:sesame-open@127.0.0.1:{port}", "NO_PROXY": "127.0.0.1"},
        }
        cases = [(["train", str(config), f"{key}=o/name"], None) for key in ("model.path", "data.path")]
        with ThreadPoolExecutor(3) as pool:
            found = pool.map(lambda given: run_cases(hub, folder, cases, **given), reasons.values())
            yield dict(zip(reasons, found, strict=True))


@pytest.mark.parametrize("key", ["model.path", "data.path"])
@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("offline", "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"),
        ("name", "hub.invalid: "),
        ("proxy", "hub.invalid: "),
        ("certificate", "SSL_CERT_FILE may name the certificates of your site"),
        ("no TLS", "SSL"),
    ],
)
def test_no_way_to_the_hub_is_said_with_the_reason(reason, expected, key, cut_off):
    code, said, seconds = cut_off[reason][key == "data.path"]
    label, local = ("model.path", "folder") if key == "model.path" else ("data", "file")
    remedy = f"); give a local {local}, or fetch it where there is a network: liftdist select CONFIG --prefetch\n"
    assert code == 2, said
    assert f"liftdist: {label} o/name: the hub cannot be reached (" in said
    assert expected in said
    assert said.endswith(remedy)
    assert "sesame" not in said
    assert seconds < 30


@pytest.mark.slow
def test_a_hub_that_fails_leaves_the_copy_in_the_cache_and_its_commit_is_said(tiny_model, tmp_path):
    records = builders.write_records(tmp_path / "records.jsonl")
    config = write_config(tmp_path, "o/name", "o/name", data=dict(eval_path=None))
    with local_hub.serve() as hub:
        commits = (
            hub.put_model("o/name", tiny_model),
            hub.put("dataset", "o/name", {"train.jsonl": records.read_bytes()}),
        )

        def fails_later(method, path, headers):
            return Reply(503) if path.endswith("/revision/main") and ("GET", path) in hub.asked[:-1] else None

        hub.faults.append(fails_later)
        words = ["select", str(config), "--prefetch"]
        (first, _, _), (again, said, _) = run_cases(hub, tmp_path, [(words, None), (words, None)])
    assert (first, again) == (0, 0), said
    for label, commit in zip(("model.path", "data"), commits, strict=True):
        assert f"{label} o/name: commit {commit} is taken, which the cache knows: the hub has failed (503: " in said
