"""Runs of models and data from a hub: at which commit, what is kept of it, and what happens when a branch moves."""

import json
import shutil

import builders
import huggingface_hub
import local_hub
import pytest
import ranks
from commands import liftdist, run_command, user_error, write_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from liftdist import hub as hubs
from liftdist.runs import changes
from liftdist.runs import manifest as manifests
from liftdist.runs.manifest import Provenance
from liftdist.schema_tree import COURSE, NOTHING, STATE
from liftdist.training import inputs

MODEL, DATA = "Owner/Tiny-Model", "Owner/My-Data"
OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def hub(tiny_model, tmp_path_factory):
    """A hub, and a run that trained on it without pinned revisions; then both branches moved, and a start found that."""
    folder = tmp_path_factory.mktemp("revisions")
    records = builders.write_records(folder / "records.jsonl").read_bytes()
    other = shutil.copytree(tiny_model, folder / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with local_hub.serve() as hub:
        hub.folder = folder
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "0"}
        hub.models = [hub.put_model(MODEL, tiny_model)]
        hub.data = [hub.put("dataset", DATA, {"train.jsonl": records})]
        hub.config = write_config(
            folder, MODEL, DATA,
            data=dict(eval_path=DATA, eval_split="train"), train=dict(steps=2, eval_interval=0), checkpoint=dict(interval=1),
        )  # fmt: skip
        first = run_command("train", hub.config, "--nproc", 1, environment=environment)
        assert first.returncode == 0, first.stdout
        hub.asked_by_run = [path for _, path in hub.asked]
        hub.models.append(hub.put_model(MODEL, other))
        hub.data.append(hub.put("dataset", DATA, {"train.jsonl": records * 2}))
        hub.second = run_command("train", hub.config, "--nproc", 1, "--allow-changes", environment=environment)
        yield hub


@pytest.fixture
def offline(hub, monkeypatch):
    """This process, which is offline, with the cache that the runs have left, whose branches are at the second commits."""
    import datasets

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub.folder / "hf" / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", hub.folder / "hf" / "datasets")
    monkeypatch.delenv("LIFTDIST_COMMITS", raising=False)
    yield
    monkeypatch.delenv("LIFTDIST_COMMITS", raising=False)


def test_a_branch_is_looked_up_once_for_all_processes(hub):
    found = [path for path in hub.asked_by_run if path.endswith("/revision/main")]
    assert sorted(found) == [f"/api/datasets/{DATA}/revision/main", f"/api/models/{MODEL}/revision/main"]


def test_the_commit_is_kept_with_the_run_and_with_its_export(hub):
    at_data = f"{DATA}@{hub.data[0]}"
    kept = {"model.path": f"{MODEL}@{hub.models[0]}", "data.path": at_data, "data.eval_path": at_data}
    run = hub.folder / "run"
    manifest = json.loads(max((run / "checkpoints").glob("step-*/manifest.json")).read_text())
    assert json.loads((run / "environment.json").read_text())["hub"] == kept
    assert manifest["commits"] == kept
    about = json.loads((run / "export" / "liftdist.json").read_text())
    version = about.pop("liftdist")
    assert version[0].isdigit()
    made = {"made": {"run": "run", "step": 2}}
    assert about == {"base_model": MODEL, "base_commit": hub.models[0], "base_digest": manifest["base"], **made}


def test_a_run_whose_branch_has_moved_names_both_commits_and_the_remedy(hub):
    line = user_error(hub.second)
    old, new = hub.models
    assert "model.path: the weights have changed" in line
    assert f"the run used commit {old} of {MODEL}, and finds {new} now; model.revision={old} continues" in line


def test_the_card_of_a_push_names_the_commits_of_the_run(hub, offline, tmp_path):
    text = liftdist("push", hub.folder / "run", "o/name", "--dry-run", "--cache-dir", tmp_path)
    assert f"base_model: {MODEL}\nbase_model_relation: finetune\n" in text
    assert f"datasets:\n- {DATA}\n" in text
    assert f"| base model | `{MODEL}` at commit `{hub.models[0]}` |" in text
    assert f"- `{DATA}` at commit `{hub.data[0]}`\n\n40 samples, " in text


def test_an_export_is_made_from_the_commit_of_the_run(hub, offline):
    """Not from what the branch is now."""
    liftdist("export", hub.folder / "run", "--format", "delta", "--output", hub.folder / "delta")
    with safe_open(hub.folder / "delta", framework="pt") as file:
        assert (file.metadata()["base_model"], file.metadata()["base_commit"]) == (MODEL, hub.models[0])
    liftdist("export", hub.folder / "run", "--output", hub.folder / "made")
    made, by_run = (load_file(hub.folder / path / "model.safetensors") for path in ("made", "run/export"))
    assert all((made[name] == tensor).all() for name, tensor in by_run.items())
    liftdist("export", hub.folder / "run", "--format", "shira", "--output", hub.folder / "adapter")
    adapter = json.loads((hub.folder / "adapter" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (MODEL, hub.models[0])


@pytest.mark.parametrize("pinned", [False, True], ids=["branch", "commit"])
@pytest.mark.parametrize("command", ["prefetch", "plan"])
def test_every_command_takes_the_revision(command, pinned, hub, offline, monkeypatch, capfd):
    """Offline, the library itself takes the newest copy of a data set whatever its revision."""
    revisions = [f"model.revision={hub.models[0]}", f"data.revision={hub.data[0]}"] if pinned else []
    if command == "plan":
        (hub.folder / "hf" / "hub" / "models--Owner--Tiny-Model" / "refs" / "main").rename(hub.folder / "main")
        try:
            said = liftdist("plan", hub.config, *revisions, code=0 if pinned else 2)
        finally:
            (hub.folder / "main").rename(hub.folder / "hf" / "hub" / "models--Owner--Tiny-Model" / "refs" / "main")
        assert "14 matrices" in said if pinned else "the hub cannot be reached" in said
        return
    if not pinned:  # the run that found the branches moved stopped before its data were read in this process
        revisions = [f"model.revision={hub.models[1]}"]
    said = liftdist("select", hub.config, "--prefetch", *revisions)
    assert f"/snapshots/{hub.models[0 if pinned else 1]}" in said
    assert f"data {DATA}, train: {40 if pinned else 80} samples" in said


@pytest.mark.parametrize("setting", ["model.revision", "data.revision"])
@pytest.mark.parametrize("revision", ["v9", "0123abc", "c" * 40])
def test_a_revision_that_the_cache_does_not_know_is_never_another_one(setting, revision, hub, offline):
    said = liftdist("select", hub.config, "--prefetch", f"{setting}={revision}", code=2)
    assert f"(revision {revision}): the hub cannot be reached (HF_HUB_OFFLINE" in said


def adopted(mesh, config):
    """What a rank finds that was told another commit than rank 0 was. Collective."""
    hubs.adopt({f"model {MODEL}@main": str(mesh.rank) * 40, f"dataset {DATA}@main": OLD})
    inputs.agree_on_commits(config, mesh)
    return inputs.commits(config)


def test_all_ranks_take_the_commits_of_rank_0(tmp_path):
    config = builders.config(MODEL, DATA, tmp_path)
    expected = {"model.path": f"{MODEL}@{'0' * 40}", "data.path": f"{DATA}@{OLD}"}
    assert ranks.run(2, adopted, config) == [expected, expected]


SETTINGS = "model: {path: O/m, revision: null}\ndata: {path: O/d, revision: null, eval_path: null}\n"
AT = {"model.path": f"O/m@{OLD}", "data.path": f"O/d@{OLD}", "data.eval_path": f"O/e@{OLD}"}
MOVED = {key: value.replace(OLD, NEW) for key, value in AT.items()}


def used(name, key):
    return f"the run used commit {OLD} of O/{name}, and finds {NEW} now; {key}={OLD} continues with the earlier one"


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (dict(), []),
        (dict(base="2", commits=MOVED | {"data.path": AT["data.path"], "data.eval_path": AT["data.eval_path"]}),
         [(STATE, f"model.path: the weights have changed (1 -> 2): {used('m', 'model.revision')}")]),
        (dict(base="2"), [(STATE, "model.path: the weights have changed (1 -> 2)")]),
        (dict(commits=AT | {"model.path": MOVED["model.path"]}),
         [(NOTHING, f"model.path: the weights are equal, other files may differ: {used('m', 'model.revision')}")]),
        (dict(data="2", commits=AT | {"data.path": MOVED["data.path"]}),
         [(COURSE, f"data.path: the contents have changed: {used('d', 'data.revision')}")]),
        (dict(commits=AT | {"data.eval_path": MOVED["data.eval_path"]}),
         [(NOTHING, f"data.eval_path: of another commit: {used('e', 'data.eval_revision')}")]),
        (dict(commits={}), []),
        (dict(config=SETTINGS.replace("revision: null}", f"revision: {OLD}}}", 1)),
         [(NOTHING, f"model.revision: None -> {OLD}")]),
        (dict(data="2", config=SETTINGS.replace("eval_path: null", "eval_path: O/e")),
         [(NOTHING, "data.eval_path: None -> O/e"), (COURSE, "data.path: the contents have changed")]),
        (dict(data="2", config=SETTINGS.replace("O/d", "O/x")), [(COURSE, "data.path: O/d -> O/x")]),
    ],
    ids=["same", "weights", "unknown", "readme", "data", "eval", "local-now", "pinned", "eval-too", "other-name"],
)  # fmt: skip
def test_what_a_move_of_a_branch_changes(after, expected):
    before = dict(config=SETTINGS, from_environment={}, base="1", data="1", commits=AT)
    assert changes.between(Provenance(**before), Provenance(**before | after)) == expected


def test_a_checkpoint_of_an_older_version_is_read(hub):
    """Its manifest knows no commits."""
    file = max((hub.folder / "run" / "checkpoints").glob("step-*/manifest.json"))
    tree = json.loads(file.read_text())
    del tree["commits"], tree["sha256"]
    older = hub.folder / "older.json"
    older.write_text(json.dumps(tree | {"sha256": manifests._digest(tree)}))
    assert manifests.read(older).provenance.commits == {}
