"""``liftdist submit`` before anything is queued: what it composes, what it refuses, and that no word of it is ever run."""

import contextlib
import json
import os
import re
import shlex
import subprocess

import builders
import pytest
from commands import ROOT, call, write_job_config

from liftdist import config as configs
from liftdist import schema_tree
from liftdist.cluster import history, job, scheduler, submit
from liftdist.errors import UserError
from liftdist.schema import Config


@pytest.fixture
def config(tiny_model, tmp_path):
    return write_job_config(tmp_path, tiny_model, builders.write_records(tmp_path / "records.jsonl"))


def test_the_command_can_be_pasted(config, tmp_path):
    words = ["--nodes=4", "--gpus-per-node=8", "--time=12:00:00", "--partition=gpu", "--exclude=bad[1-3]", "--dry-run"]
    code, said = call("submit", config, "train.seed=7", f"run_dir={tmp_path}/my run", *words)
    assert code == 0
    command = shlex.split(said)
    assert command[0] == "env"
    at = command.index("sbatch")
    script = command.index(str(ROOT / "slurm" / "train.sbatch"))
    assert set(command[at + 1 : script]) == {
        "--parsable", "--requeue", "--job-name=my_run", "--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=8",
        "--time=12:00:00", "--partition=gpu", "--exclude=bad[1-3]", "--export=ALL", "--open-mode=append", "--signal=B:USR1@300",
        f"--output={tmp_path}/my run/logs/slurm-%j.out",
    }  # fmt: skip
    assert command[script + 1 : script + 4] == [str(config), "train.seed=7", f"run_dir={tmp_path}/my run"]
    assert not (tmp_path / "my run").exists()
    again, echoed = call("submit", *command[script + 1 :], "--dry-run")
    assert (again, shlex.split(echoed)) == (0, command)  # the settings say all


def test_a_record_that_the_template_refuses_is_found_before_a_job_waits_for_hours(config, tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "because"}]
    plain = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    lines = [json.dumps({"messages": messages}) for messages in [*[plain] * 700, turns]]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    code, said = call("submit", config, f"data.path={tmp_path}/chats.jsonl")
    assert code == 2
    assert f"{tmp_path}/chats.jsonl:701: the chat template drops reasoning_content of message 2" in said


def test_arrays_and_sweeps(config, tmp_path):
    code, said = call("submit", config, "--sweep=optimizer.lr=1e-3,1e-4", "--sweep=train.seed=1,2", "--dry-run")
    assert code == 0
    assert "--array=0-3" in said
    words = ["--sweep", "optimizer.lr=1e-3,1e-4", "--sweep", "train.seed=1,2", str(config)]
    resolved = [job.of_task(words, index) for index in range(4)]
    assert [words[1:3] for words in resolved] == [
        [f"optimizer.lr={lr}", f"train.seed={seed}"] for lr in ("1e-3", "1e-4") for seed in (1, 2)
    ]
    assert len({words[3] for words in resolved}) == 4  # a run directory each
    with pytest.raises(UserError, match="array index 4: the sweep has 4 values"):
        job.of_task(words, 4)
    with pytest.raises(UserError, match="needs a job array"):
        job.of_task(words, None)
    code, said = call("submit", config, "train.seed=${oc.env:SLURM_ARRAY_TASK_ID}", "--array=1-2", "--dry-run")
    assert (code, "train.seed=${oc.env:SLURM_ARRAY_TASK_ID}" in shlex.split(said)) == (0, True)
    assert submit._indices("0-6:3,9%2") == [0, 3, 6, 9]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--sweep=optimizer.lr"], "expected key=a,b,c"),
        (["--sweep=optimizer.lr=1e-3,"], "expected key=a,b,c"),
        (["--sweep=optimizer.rl=1,2"], "unknown key 'optimizer.rl'"),
        (["--nodes=two"], "slurm.nodes"),
        (["--nodes=0"], "must be at least 1"),
        (["--sweep=slurm.nodes=1,2"], "all tasks of an array are alike in slurm.nodes"),
        (["--sweep=run_dir=a,b"], "all tasks of an array are alike in run_dir"),
        (["--time=5"], "nothing is left for training"),
        (["--time=soon"], "slurm.time: is not of a form that SLURM takes"),
        (["--array=0-99999"], "more than 1000 tasks"),
        (["--nodes=3", "mesh.dp_replicate=2"], "3 ranks cannot be 2 replicas"),
        (["data.path=no-such.jsonl"], "no such file"),
        (["model.path=./no-such"], "no such folder"),
        (["train.stpes=3"], "did you mean 'train.steps'"),
        (['slurm.options=["--wrap=touch x"]'], "is not of a form that SLURM takes"),
        (["slurm.options=[--wra=x]"], "is not of a form that SLURM takes"),
        (
            ["slurm.options=[-C a100]"],
            """is not of a form that SLURM takes, such as ["--mail-type=END"], got '-C a100'""",
        ),
        (["slurm.options=[--comment it's me]"], "is not of a form that SLURM takes"),
        (['slurm.options=["--comment=a\\nb"]'], "is not of a form that SLURM takes"),
        (["--nodes=010"], "slurm.nodes: YAML reads 010 in base 8; write it in base 10"),
        (["--partition="], "--partition: must have a value"),
        (["--dependency="], "--dependency: must have a value"),
        (["--array="], "--array: must have a value"),
        (["--job-name="], "--job-name: must have a value"),
        (["--job-name=null x"], "--job-name 'null x': is not of a form that SLURM takes"),
        (["--dependency=on"], "--dependency 'on': is not of a form that SLURM takes"),
        (["slurm.account=null x"], "is not of a form that SLURM takes"),
    ],
)
def test_mistakes_fail_before_anything_is_queued(words, problem, config):
    code, said = call("submit", config, *words)
    assert code == 2
    assert said.startswith("liftdist: ")
    assert problem in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "text",
    [
        "0012",
        "3090",
        "0042",
        "0x1F",
        "1_000",
        "1e3",
        "on",
        "off",
        "null",
        "None",
        "2026-11-25",
        "1.50",
        ".5",
        "nan",
        "=",
    ],
)
def test_names_reach_slurm_as_they_were_typed(text, config, tmp_path):
    """From the command line, with its short options and without, and from a file."""
    written = "'null'" if text == "null" else text
    name = text.replace("=", "x")  # SLURM's names of jobs are checked
    section = f"slurm:\n  account: {written}\n  qos: {written} # of ours\n"
    config.write_text(config.read_text().replace("slurm: {}\n", section))
    code, said = call("submit", config, f"--partition={text}", f"--job-name={name}", "--dry-run")
    assert code == 0, said
    command = shlex.split(said)
    assert {f"--job-name={name}", f"--partition={text}", f"--account={text}", f"--qos={text}"} <= set(command)
    words = command[command.index(str(ROOT / "slurm" / "train.sbatch")) + 1 :]
    slurm = configs.load(words[0], words[1:])[0].slurm
    assert (slurm.partition, slurm.account, slurm.qos) == (text, text, text)


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("--time", "90:5"), ("--time", "12:00:00"), ("--time", "1-0:0"), ("--time", "UNLIMITED"), ("--time", "infinite"),
        ("--time", "0"), ("--time", "0090"), ("--partition", "gpu,cpu"), ("--partition", "a/b"), ("--account", "a.b"),
        ("--account", "a@v100"), ("--account", "a:b"), ("--qos", "a=b"), ("--exclude", "./bad-nodes"),
        ("--exclude", "node[001-003,07]"),
    ],
)  # fmt: skip
def test_whatever_slurm_takes_is_taken(option, text, config):
    code, said = call("submit", config, option, text, "--dry-run")
    assert code == 0, said
    assert f"{option}={text}" in shlex.split(said)


OPTIONS = [
    "--comment=it's me", '--comment=a "b"', "--comment=#1; $(touch canary)", "--comment=null", "--comment=", "--comment=a, b",
    "--comment=a\tb", "--comment=é", "--mail-user=a+b@c.de", "--reservation=r 1", "--constraint=[a|b]*2&c", "--wckey=0012",
    "--export=ALL,X=a b", "--gres=gpu:a100:2", "--exclusive", "--wait-all-nodes=1", "--x11", "--licenses=a:2", "--mem=0",
]  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_options_are_handed_on(option, config):
    code, said = call("submit", config, f"slurm.options=[{json.dumps(option)}]", "--dry-run")
    assert code == 0, said
    assert option in shlex.split(said)


def test_sweeps_and_run_directories_keep_their_characters(config, tmp_path):
    values = ["0012", "on", "1e3", "null", "~", "#x", "a b", "{x}", "2026-11-25", '"q"', "it's", "*.x", "12:30:00"]
    base = f"{tmp_path}/0012 #x/${{oc.env:SLURM_ARRAY_TASK_ID}}".replace("${oc.env:SLURM_ARRAY_TASK_ID}", r"\${y}")
    words = ["--sweep", f"data.subset={','.join(values)}", str(config), f"run_dir={base}"]
    for index, value in enumerate(values):
        path, *overrides = job.of_task(words, index)
        loaded, _ = configs.load(path, overrides)
        assert loaded.data.subset == value
        assert loaded.run_dir.startswith(f"{tmp_path}/0012 #x/${{y}}/{index}-data.subset=")


def test_slurm_is_asked_before_a_job_is_queued(cluster, config, tmp_path):
    for words, problem in (
        (["--nodes=99"], "Requested node configuration is not available"),
        (["--partition=nope"], "invalid partition specified: nope"),
    ):
        code, said = call("submit", config, *words)
        assert code == 2, said
        assert problem in said
    assert not (tmp_path / "run" / "jobs.jsonl").exists()


def hostile(canary):
    """Strings that would run something, or pass for something else, where a word is not taken as a word."""
    commands = [f"touch {canary}", f"touch${{IFS}}{canary}", f">{canary}"]
    frames = [
        "$({})", "`{}`", "; {};", "| {}", "|| {}", "&& {}", "& {} &", "\n{}\n", "'; {}; '", '"; {}; "', "x$({})y", "$(({}))",
        "<({})", ">({})", "x\r\n{}\r\n", "\\$({})", "'$({})'", '"$({})"', "${{x:-$({})}}", "*; {}", "--wrap={}", "-{}",
        "--output=/dev/null;{}", "%j$({})", "../$({})", "~$({})", "!{}", "#SBATCH --wrap={}", "x #{}", "a b;{}", "$'\\n'{}",
        "\t{}", "=$({})", "a=$({})", "{{a,$({})}}", "$IFS$({})", "x\\\n{}",
    ]  # fmt: skip
    plain = [
        "..",
        "../..",
        "-",
        "--",
        "--help",
        "-J",
        "/",
        "",
        " ",
        "%",
        "%j",
        "~",
        "*",
        "?",
        "[",
        "\\",
        "'",
        '"',
        "\u202e",
        "é",
    ]
    return [frame.format(command) for frame in frames for command in commands] + plain


PLACES = {
    "run_dir": "run_dir={}",
    "value": "data.subset={}",
    "key": "{}=1",
    "partition": "--partition={}",
    "container": "--container={}",
    "option": 'slurm.options=["--comment={}"]',
    "config": None,
}


@pytest.mark.parametrize("share", [pytest.param(1, marks=pytest.mark.slow), len(PLACES)])
@pytest.mark.parametrize("place", PLACES)
def test_no_word_is_ever_run(place, share, cluster, config, tmp_path, monkeypatch):
    """Over a hundred hostile strings, each in one place or all in every place: refused, or handed on as a word, to SLURM too."""
    monkeypatch.chdir(tmp_path)
    strings = hostile("canary")
    assert len(strings) > 100
    strings = strings[[*PLACES].index(place) % share :: share]
    accepted = 0
    for text in strings:
        inside = json.dumps(text)[1:-1] if place == "option" else text
        words = [config, PLACES[place].format(inside)] if PLACES[place] else [f"./{text}"]
        code, said = call("submit", *words, "--dry-run")
        if code == 0 and said.startswith("env "):
            accepted += 1
            assert any(text in word for word in shlex.split(said))
            pasted = said.replace(" sbatch ", " sbatch --test-only ", 1)
            subprocess.run(["bash", "-c", pasted], check=False, capture_output=True, timeout=60)
        else:
            assert code == 2, (text, said)
            assert "Traceback" not in said
    assert not (tmp_path / "canary").exists()
    least = {"run_dir": 40, "value": 60, "container": 80, "option": 80}.get(place, 0)
    assert accepted >= (least if share == 1 else least // 40)


@pytest.mark.parametrize("place", ["name", "array", "dependency"])
def test_names_of_jobs_are_of_a_form_that_slurm_takes(place, cluster, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded, _ = configs.load(config)
    for text in hostile("canary"):
        given = dict(name="x", array=None, dependency=None) | {place: text}
        try:
            command = scheduler.sbatch(loaded, [str(config)], log=tmp_path, **given)
        except UserError:
            continue
        else:
            assert re.fullmatch(r"[A-Za-z0-9_@+.,-]+", text, re.ASCII)
            with contextlib.suppress(UserError):  # SLURM may refuse it
                scheduler.test_only(command, os.environ)
    assert not (tmp_path / "canary").exists()


def test_only_what_slurm_takes_reaches_its_options():
    """The settings that become options of sbatch; two of them are tried through the command above."""
    bounds = {key: leaf.metadata for key, leaf in schema_tree.settings(Config) if key.startswith("slurm.")}
    free = {"slurm.container", "slurm.container_runtime", "slurm.container_mounts"}
    texts = {key for key, bound in bounds.items() if bound["pattern"]}
    numbers = {
        key for key, leaf in schema_tree.settings(Config) if key in bounds and re.search("int|float", str(leaf.type))
    }
    assert texts | numbers | free == set(bounds)
    for text in hostile("canary"):  # a word, of which sbatch makes no command, and a line
        for option in (f"--comment={text}", text):
            taken = configs._problem(option, bounds["slurm.options"]) is None
            assert not taken or re.fullmatch(r"--(?!wrap)[^\x00-\x08\x0a-\x1f\x7f-\x9f]+", option), option
    for key in texts - {"slurm.options"}:
        for text in hostile("canary"):
            taken = configs._problem(text, bounds[key]) is None
            assert not taken or re.fullmatch(r"[A-Za-z0-9_@%+.,:/=\[\]()*&|-]+", text, re.ASCII), (key, text)


def test_a_folder_holds_a_run_or_those_of_an_array(config, tmp_path):
    (tmp_path / "run").mkdir()
    history.note(tmp_path / "run", "submit", job="1", array="0-1", log=str(tmp_path))
    code, said = call("submit", config, f"run_dir={tmp_path}/run")
    assert (code, said) == (2, f"liftdist: run_dir {tmp_path}/run: holds the runs of an array; give another\n")


def test_without_slurm_there_is_one_line(config, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    code, said = call("submit", config)
    assert (code, said) == (2, "liftdist: sbatch: not found; this is no machine of a SLURM cluster\n")


def test_the_lead_of_the_warning_is_what_was_asked(config):
    assert "--signal=B:USR1@90" in call("submit", config, "slurm.signal_lead=90", "--dry-run")[1]
    assert os.environ.get("LIFTDIST_LEAD") is None
