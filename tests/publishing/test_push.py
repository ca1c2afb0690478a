"""Results that are pushed to a hub on this machine and loaded from there, as their model cards say."""

import argparse
import json
import os
import re
import subprocess
import sys

import builders
import local_hub
import pytest
import ranks
import yaml
from commands import ROOT, liftdist, write_config
from local_hub import TOKEN, refusal, run_cases
from safetensors.torch import load_file

from liftdist import cli_results
from liftdist import config as configs
from liftdist.cli_results import push_arguments
from liftdist.publishing import card

BASE, SECRET = "Owner/Tiny-Model", "sesame-open-sesame"
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "liftdist.json"}
PUSHED = {  # case: what is pushed, with which options; and what the branch then holds besides the card
    "o/hf": (["run", "--revision", "v1"], {"config.json", "model.safetensors", "tokenizer.json", "liftdist.json"}),
    "o/shira": (["run", "--format", "shira", "--step", "1"], ADAPTER),
    "o/delta": (["run", "--format", "delta", "--public", "--base", BASE], {"delta.safetensors"}),
    "o/patch": (["run", "--format", "patch"], {"patch.safetensors"}),
    "o/file": (["my.delta"], {"delta.safetensors"}),
    "o/folder": (["adapter"], ADAPTER),
}  # fmt: skip
REFUSED = {  # case: words, and what is said
    "no token": (["run", "o/new"], "push o/new: there is no token; log in: hf auth login, or set HF_TOKEN"),
    "name": (["run", "new"], "push new: is no name of a repository; give ORG/NAME"),
    "bad name": (["run", "o/a--b"], "push o/a--b: is no name of a repository; give ORG/NAME: "),
    "branch": (["run", "o/new", "--revision", "../x"], "push o/new (revision ../x): is no revision; "),
    "nothing": (["none", "o/new"], "none: no such run directory, delta or exported folder"),
    "no run": (["model", "o/new"], ": is not a run directory (it has no attempts/)"),
    "step": (["my.delta", "o/new", "--step", "1"], "--step 1: "),
    "base": (["my.delta", "o/new", "--format", "hf"], "my.delta: --base must name its base model"),
    "folder": (["adapter", "o/new", "--format", "hf"], "adapter: is an exported folder, pushed as it is; leave --format out"),
    "readme": (["run", "o/foreign"], "push o/foreign: its README.md is not by liftdist push; --keep-readme leaves it as it is"),
    "edited": (["my.delta", "o/edited"], "push o/edited: its README.md was edited since liftdist push wrote it; --keep-readme"),
    "weights": (["my.delta", "o/weights", "--keep-readme"], "push o/weights: also holds other.safetensors; remove what is there"),
    "public": (["run", "o/foreign", "--public"], "push o/foreign: the repository is private, not public; leave --public out"),
    "kind": (["run", "o/delta", "--public"], "push o/delta: holds a delta, and would hold a model, too; give another repository"),
    "denied": (["my.delta", "o/denied"], "push o/denied: the hub denies access (No rights); use a token that may write to "),
    "broken": (["my.delta", "o/broken"], "push o/broken: the hub has failed (500: HTTP status 500); try again later: files that "
               "have arrived are kept; a push is one commit: it is there whole or not at all"),
    "moved": (["my.delta", "o/moved"], "push o/moved: the branch has changed meanwhile; start again; a push is one commit"),
    "no delta": (["apply", "o/edited", "model", "--output", "none"], "DELTA o/edited: the repository holds no delta.safetensors"),
    "no file": (["apply", "o/none", "model", "--output", "none"], "DELTA o/none: no such file, and the hub does not provide it"),
    "in place": (["apply", "my.delta", BASE], f"{BASE}: no such folder; a model of the hub needs --output"),
    "no base": (["export", "run", "--base", f"{BASE}@v9", "--output", "none"], f"--base {BASE} (revision v9): has no "),
}  # fmt: skip


@pytest.fixture(scope="module")
def pushed(tiny_model, tmp_path_factory):
    """A hub with a model and the results of a run of it, their folder, and what the commands printed, by what they were given."""
    folder = tmp_path_factory.mktemp("push")
    records, questions = folder / "records.jsonl", folder / "questions.jsonl"
    builders.write_records(records)
    questions.write_text("".join(json.dumps({"prompt": "Say", "completion": "x"}) + "\n" for _ in range(3)))
    path = write_config(
        folder, tiny_model, records,
        data=dict(eval_path=None, prompt_template=f"{folder}/notes {{prompt}} {SECRET}"),
        train=dict(steps=2, eval_interval=0, export=False), checkpoint=dict(interval=1),
        eval=dict(tasks=[dict(name="said", path=str(questions), scorer="contains", max_new_tokens=2)]),
    )  # fmt: skip
    assert ranks.run(1, builders.run_once, *configs.load(path, [])) == ["finished"]
    with local_hub.serve() as hub:
        base = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
        hub.put("model", BASE, base | {"README.md": b"---\nlicense: other\nlicense_name: tiny\n---\n"})
        about = {"base_digest": "0" * 64, "liftdist": "0"}
        written = card.write(card.Result("o/earlier", None, "delta", about, {})).encode()
        holds = {
            "foreign": {"README.md": b"# Mine\n"},
            "weights": {"README.md": b"# Mine\n", "other.safetensors": b""},
            "edited": {"README.md": written + b"And more.\n"},
            "moved": {},
            "earlier": {"README.md": written, "old.safetensors": b"", "notes.txt": b""},
        }
        for name, files in holds.items():
            hub.put("model", f"o/{name}", files)
            hub.private["model", f"o/{name}"] = True
        for part, reply in (
            ("o/denied", refusal(403, "", "No rights")),
            ("o/broken/commit", refusal(500)),
        ):
            hub.faults.append(lambda method, path, headers, part=part, reply=reply: reply if part in path else None)

        def moves(method, path, headers):  # while the files are sent
            if "o/moved/preupload" in path:
                hub.put("model", "o/moved", {"README.md": b"# Mine\n"})

        hub.faults.append(moves)
        names = {"run", "my.delta", "adapter", "out", "none"}
        model = str(tiny_model)

        def command(*words):
            cached = ["--cache-dir", str(folder / "cache")]
            return [
                model if word == "model" else str(folder / word) if word in names else word for word in words
            ] + cached

        environment = {"MY_TOKEN": SECRET, "HF_HUB_DISABLE_XET": "1"}

        def run(cases):
            given = [(command(*words), None if case == "no token" else TOKEN) for case, words in cases.items()]
            return dict(zip(cases, run_cases(hub, folder, given, **environment), strict=True))

        first = {
            "delta": ["export", "run", "--format", "delta", "--output", "my.delta"],
            "adapter": ["export", "run", "--format", "shira", "--output", "adapter"],
            "dry": ["push", "run", "o/dry", "--dry-run", "--base", BASE],
            **{name: ["push", source, name, *more] for name, ((source, *more), _) in PUSHED.items()},
            "again": ["push", "my.delta", "o/file"],
            "earlier": ["push", "my.delta", "o/earlier"],
            "kept": ["push", "my.delta", "o/foreign", "--keep-readme"],
            "applied": ["apply", "o/delta", BASE, "--output", "out"],
            **{
                case: words if words[0] in ("apply", "export") else ["push", *words]
                for case, (words, _) in REFUSED.items()
            },
        }
        yield hub, folder, run(first)


def test_there_is_a_card_for_each_format_that_can_be_pushed():
    parser = argparse.ArgumentParser()
    push_arguments(parser)
    (offered,) = (action.choices for action in parser._actions if action.dest == "format")
    assert set(offered) == set(card.KINDS)


def held(hub, name, branch="main"):
    return hub.commits["model", name][hub.refs["model", name][branch]]


@pytest.mark.parametrize("name", PUSHED)
def test_a_push_is_one_commit_with_a_card(name, pushed):
    hub, _, said = pushed
    (_, *options), files = PUSHED[name]
    code, printed, _ = said[name]
    branch = "v1" if "v1" in options else "main"
    assert code == 0, printed
    assert f"{hub.url}/{name} (commit {hub.refs['model', name][branch]})" in printed
    assert files | {"README.md"} <= set(held(hub, name, branch))
    assert hub.private["model", name] == ("--public" not in options)
    assert len(hub.commits["model", name]) == 2  # the one that a new repository begins with


def metadata(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_says_what_the_result_was_made_of(pushed):
    hub, folder, _ = pushed
    text = held(hub, "o/hf", "v1")["README.md"].decode()
    manifest = json.loads((folder / "run" / "checkpoints" / "step-00000002" / "manifest.json").read_text())
    found = metadata(text)
    assert found == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["liftdist", "lift", "liftdist-model"],
    }  # fmt: skip
    assert f"| digest of its weights | `{manifest['base']}` |" in text
    assert f"- `records.jsonl`\n\n40 samples, 12 seen by step 2; digest `{manifest['data']}`." in text
    assert "\nselection.filter_rank: 4\n" in text
    assert "\ndata.prompt_template: notes {prompt} <MY_TOKEN>\n" in text
    assert "run_dir" not in text
    assert "| said | accuracy | 0 | 0 to 0 | 3 |" in text
    assert "Evaluation" not in held(hub, "o/shira")["README.md"].decode()  # of the first step there is none
    assert card.identify(text) == ("model", True)


def test_the_card_names_a_base_model_of_the_hub_and_its_license(pushed):
    hub, _, said = pushed
    text = held(hub, "o/delta")["README.md"].decode()
    commit = hub.refs["model", BASE]["main"]
    expected = {"license": "other", "license_name": "tiny", "base_model": BASE, "base_model_relation": "finetune"}
    assert metadata(text).items() >= expected.items()
    assert f"\nliftdist apply o/delta {BASE}@{commit} --output tuned\n" in text
    assert said["dry"][0] == 0
    assert f"base_model: {BASE}\n" in said["dry"][1]
    assert "model.safetensors\n" in said["dry"][1]
    assert ("model", "o/dry") not in hub.commits


def test_nothing_that_is_pushed_holds_a_local_path_or_a_secret(pushed, tiny_model):
    hub, folder, said = pushed
    hidden = [str(folder), str(tiny_model), SECRET, TOKEN]
    for name in PUSHED:
        for commit in hub.commits["model", name].values():
            for file, contents in commit.items():
                assert not any(text.encode() in contents for text in hidden), (name, file)
    assert TOKEN not in str(said)


LOAD = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
blocks, weights, target = json.loads(sys.argv[1])
found = {}
for name, code in blocks.items():
    exec(code, names := {})
    if "patched" in names:
        patched = {key: names["patched"](key, tensor) for key, tensor in load_file(weights).items()}
    else:
        with torch.no_grad():
            found[name] = names["model"](torch.arange(20)[None]).logits.contiguous()
save_file(patched | found, target)
"""


def test_results_load_as_their_cards_say(pushed, tiny_model):
    hub, folder, said = pushed
    texts = {name: held(hub, name, branch)["README.md"].decode() for name, branch in
             (("o/hf", "v1"), ("o/folder", "main"), ("o/patch", "main"))}  # fmt: skip
    blocks = {name: re.search(r"```python\n(.*?)```", text, re.DOTALL)[1] for name, text in texts.items()}
    blocks["o/folder"] = blocks["o/folder"].replace('"BASE"', repr(str(tiny_model)))
    target = folder / "loaded.safetensors"
    given = json.dumps([blocks, str(tiny_model / "model.safetensors"), str(target)])
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    subprocess.run([sys.executable, "-c", LOAD, given], env={**os.environ, **environment}, cwd=ROOT, check=True)
    loaded = load_file(target)
    whole, plain = load_file(folder / "out" / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    assert said["applied"][0] == 0
    assert any(not whole[name].equal(plain[name]) for name in plain)
    assert all(whole[name].equal(loaded[name]) for name in plain)
    assert (folder / "out" / "model.safetensors").read_bytes() == held(hub, "o/hf", "v1")["model.safetensors"]
    assert loaded["o/hf"].allclose(loaded["o/folder"], atol=1e-4)


def test_what_a_branch_holds_is_kept_or_replaced_but_never_mixed(pushed):
    hub, _, said = pushed
    assert said["again"][0] == said["kept"][0] == said["earlier"][0] == 0
    assert held(hub, "o/foreign")["README.md"] == b"# Mine\n"
    assert set(held(hub, "o/foreign")) == {"README.md", "delta.safetensors"}
    assert set(held(hub, "o/earlier")) == {"README.md", "delta.safetensors", "notes.txt"}
    assert held(hub, "o/moved") == {"README.md": b"# Mine\n"}
    assert set(held(hub, "o/broken")) == {".gitattributes"}
    assert ("model", "o/new") not in hub.commits


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_pushed_or_fetched_is_one_line(case, pushed):
    _, folder, said = pushed
    code, printed, _ = said[case]
    lines = [line.replace(f"{folder}/", "") for line in printed.splitlines() if line.startswith("liftdist: ")]
    assert code == 2, printed
    assert len(lines) == 1, printed
    assert REFUSED[case][1] in lines[0]
    assert "Traceback" not in printed


def test_without_a_network_nothing_is_pushed_but_the_card_is_shown(pushed, monkeypatch):
    _, folder, _ = pushed
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    line = liftdist("push", folder / "my.delta", "o/new", code=2)
    assert "push o/new: the hub cannot be reached (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set); push where " in line
    assert "liftdist apply o/new BASE --output tuned" in liftdist("push", folder / "my.delta", "o/new", "--dry-run")


def test_every_format_that_is_pushed_has_a_card():
    parser = argparse.ArgumentParser()
    cli_results.push_arguments(parser)
    (formats,) = (action.choices for action in parser._actions if action.dest == "format")
    assert set(formats) == set(card.KINDS)


def test_paths_are_cut_to_their_last_names(tmp_path):
    assert card.public(str(tmp_path)) == tmp_path.name
    assert card.public(["~/a b/c.txt", {"key": "see /home/me/notes.txt, or ../x/y"}]) == [
        "c.txt", {"key": "see notes.txt, or y"},
    ]  # fmt: skip
    for text in ("openai/gsm8k", "https://a.b/c/d", "a / b", "</s>/", "1/2"):
        assert card.public(text) == text
