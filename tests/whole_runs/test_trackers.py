"""Runs recorded by the real clients of trackers, without a network, over a crash and a restart."""

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import builders
import hooks
import pytest
import ranks
from commands import ROOT

from liftdist import config as configs
from liftdist.errors import UserError
from liftdist.runs.stop import StopRequests
from liftdist.training import client, trainer
from liftdist.training.recorder import Recorder
from liftdist.training.run import train

LOSS = "train/loss"
CLIENTS = [name for name in ("wandb", "mlflow", "trackio") if importlib.util.find_spec(name) is not None]


def needs(name):
    if name not in CLIENTS:
        pytest.skip(f"needs the client of {name}: pip install 'liftdist[{name}]'")


def attempt(mesh, file, variables, break_at=None):
    """One attempt at a run, which a bug ends before ``break_at``; which clients this process then has imported."""
    os.environ.update(variables)
    os.chdir(file.parent)  # where MLflow puts texts
    config, text = configs.load(file)

    def fail(trained):
        if trained.step + 1 == break_at:
            raise RuntimeError("a bug")

    ends = pytest.raises(RuntimeError, match="a bug") if break_at else contextlib.nullcontext()
    with hooks.around(trainer.Trainer, "run_step", before=fail), ends:
        train(config, mesh, text, set(), StopRequests())
    return [name for name in CLIENTS if name in sys.modules]


def offline(folder: Path) -> dict[str, str]:
    """The clients' own variables, by which all stays in a folder, and a secret."""
    return {
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "TRACKIO_DIR": str(folder / "trackio"),
        "TRACKIO_STORAGE_MODE": "sqlite",
        "A_SECRET_KEY": "hidden-from-all-of-them",
    }


def settings(folder: Path, model: Path) -> Path:
    file = folder / "config.yaml"
    records = builders.write_records(folder / "records.jsonl")
    file.write_text(
        f"run_dir: {folder}/run\ncache_dir: {folder}/cache\nmodel: {{path: {model}, dtype: float32}}\n"
        f"data: {{path: {records}, max_length: 64}}\nslurm: {{account: hidden-from-all-of-them}}\ncheckpoint: {{interval: 2}}\n"
        "selection: {density: 0.05, filter_rank: 4}\ntrain: {steps: 6, batch_size: 4, export: false}\n"
        f"metrics: {{trackers: [{', '.join(CLIENTS)}]}}\n"
    )
    return file


def log_entries(data: bytes, block: int = 32768) -> Iterator[bytes]:
    """The entries of a log of LevelDB whose file has a header of seven bytes, as long as that of a part of an entry."""
    place, whole = 7, b""
    while place + 7 < len(data):
        if block - place % block < 7:  # too short for a header
            place += block - place % block
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        place += 7
        whole += data[place : place + length]
        place += length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def of_wandb(folder: Path) -> tuple[dict, list, str]:
    """The config, ``(step, loss)`` and everything, of the files that ``wandb sync`` would send, of one run."""
    from wandb.proto.wandb_internal_pb2 import Record

    identity = json.loads((folder / "run/trackers/wandb.json").read_text())["id"]
    config, found, everything = {}, [], ""
    for path in sorted((folder / "run/wandb").glob("offline-run-*/*.wandb")):
        assert path.stem == f"run-{identity}"
        for record in map(Record.FromString, log_entries(path.read_bytes())):
            everything += str(record)
            updates = [*record.run.config.update, *record.config.update]
            config |= {update.key: json.loads(update.value_json) for update in updates if update.key}
            items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            if LOSS in items:
                found.append((record.history.step.num, float(items[LOSS])))
    return config, found, everything


def of_mlflow(folder: Path) -> tuple[dict, list, str]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("liftdist")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    found = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, LOSS)]
    tree: dict = {}
    for key, value in run.data.params.items():
        section, _, name = key.rpartition(".")
        tree.setdefault(section, {})[name] = value
    texts = "".join(path.read_text() for path in folder.glob("mlruns/**/artifacts/*.*"))
    assert "principal" in texts
    return tree, found, texts + str(run)


def of_trackio(folder: Path) -> tuple[dict, list, str]:
    code = (
        "import json, sys\nfrom trackio.sqlite_storage import SQLiteStorage as store\n(run,) = store.get_runs('liftdist')\n"
        "json.dump([store.get_run_config('liftdist', run), store.get_logs('liftdist', run)], sys.stdout)"
    )
    environ = {**os.environ, **offline(folder)}
    read = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environ)
    config, logs = json.loads(read.stdout.splitlines()[-1])
    return config, [(line["step"], line[LOSS]) for line in logs if LOSS in line], read.stdout


@pytest.fixture(scope="module")
def recorded(tiny_model, tmp_path_factory):
    """The folder of one run over a crash, by all clients at once."""
    if not CLIENTS:
        pytest.skip("needs a client of trackers: pip install 'liftdist[wandb,mlflow,trackio]'")
    folder = tmp_path_factory.mktemp("recorded")
    file = settings(folder, tiny_model)
    assert ranks.run(1, attempt, file, offline(folder), 6) == [[]]  # after the checkpoint of step 4
    assert ranks.run(1, attempt, file, offline(folder)) == [[]]
    return folder


@pytest.mark.parametrize(("name", "contents"), [("wandb", of_wandb), ("mlflow", of_mlflow), ("trackio", of_trackio)])
def test_one_run_over_a_crash_with_each_step_once(name, contents, recorded):
    needs(name)
    config, losses, everything = contents(recorded)
    lines = [json.loads(line) for line in (recorded / "run/metrics.jsonl").read_text().splitlines()]
    assert losses == [(line["step"], pytest.approx(line[LOSS])) for line in lines if LOSS in line]
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]
    assert float(config["selection"]["density"]) == 0.05
    assert "<A_SECRET_KEY>" in str(config)
    assert "hidden-from-all-of-them" not in everything
    assert not (recorded / "run" / "tensorboard").exists()


@pytest.fixture
def recorder(tmp_path):
    """Records one step with trackers and closes; what was said, and the seconds that it took."""

    def record(*names):
        said: list[str] = []
        began = time.monotonic()
        made = Recorder(tmp_path, names, None, said.append)
        made.text("config", "train: {steps: 1}")
        made.scalars(1, {LOSS: 2.0})
        made.close()
        assert json.loads((tmp_path / "metrics.jsonl").read_text())[LOSS] == 2.0
        return said, time.monotonic() - began

    return record


def test_a_client_that_fails_is_named_once_with_its_reason(recorder, monkeypatch):
    needs("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://x")
    (said,), _ = recorder("mlflow")
    assert said.startswith("metrics cannot be recorded, training continues: mlflow ")
    assert "URIException: " in said


def test_a_service_that_does_not_answer_delays_the_end_by_a_bounded_time(recorder, monkeypatch):
    needs("mlflow")
    monkeypatch.setattr(client, "CLOSE", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and says nothing
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        (said,), seconds = recorder("mlflow")
    assert "mlflow has not ended within 2 s" in said
    assert seconds < 20


def test_a_client_that_is_not_installed_is_refused_with_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # as the client makes it, in the folder of a command
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(ROOT)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)  # another library may have looked for it
    file = tmp_path / "config.yaml"
    file.write_text(
        "run_dir: a\nmodel: {path: b}\ndata: {path: c}\nselection: {density: 0.1}\nmetrics: {trackers: [wandb]}\n"
    )
    with pytest.raises(
        UserError, match=r"config.yaml:5: metrics.trackers: wandb needs .* pip install 'liftdist\[wandb\]'"
    ):
        configs.load(file)
    with pytest.raises(UserError, match="names one twice"):
        configs.load(file, ["metrics.trackers=[tensorboard, tensorboard]"])


def test_a_folder_that_is_something_else_is_refused_before_the_first_record(tmp_path):
    """Where all ranks hear of it: what is recorded later is recorded by one."""
    (tmp_path / "trackers").symlink_to("elsewhere")
    with pytest.raises(UserError, match="trackers: is not a folder"):
        Recorder(tmp_path, ["wandb"])


def test_another_run_directory_is_another_run(tmp_path, monkeypatch):
    needs("trackio")
    for name, value in offline(tmp_path).items():
        monkeypatch.setenv(name, value)
    for folder in (tmp_path / "first/run", tmp_path / "second/run", tmp_path / "second/run"):
        folder.mkdir(parents=True, exist_ok=True)
        recorder = Recorder(folder, ["trackio"])
        recorder.scalars(1, {LOSS: 2.0})
        recorder.close()
    code = "from trackio.sqlite_storage import SQLiteStorage as store\nprint(*store.get_runs('liftdist'))"
    read = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    found = sorted(read.stdout.splitlines()[-1].split())
    ids = [
        json.loads((tmp_path / name / "run/trackers/trackio.json").read_text())["id"] for name in ("first", "second")
    ]
    assert found == sorted(f"run-{one[:8]}" for one in ids)
    assert len(set(found)) == 2
