"""Runs that users share: what they make belongs to the group that the folder belongs to, as far as their umask says."""

import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path

import builders
import pytest
import users
from commands import liftdist, user_error, write_config

from liftdist.registry import EXPORT_FORMATS
from liftdist.runs import claims

ALICE, BOB = 40001, 40002


@pytest.fixture(scope="module")
def place(tiny_model):
    """A folder that all users may enter, with a model and records for all to read, and a home for each user."""
    if problem := users.why_not():
        pytest.skip(problem)
    folder = Path(tempfile.mkdtemp(prefix="liftdist-users-"))  # those of pytest are closed to others
    folder.chmod(0o755)
    shutil.copytree(tiny_model, folder / "model")
    for path in (folder / "model").iterdir():
        path.chmod(0o644)
    (folder / "model").chmod(0o755)
    builders.write_records(folder / "records.jsonl").chmod(0o644)
    for user in (ALICE, BOB):
        (folder / str(user)).mkdir()
        os.chown(folder / str(user), user, user)
    yield folder
    shutil.rmtree(folder)


def shared(place, name):
    """A folder of a group, as its administrator makes it."""
    folder = place / name
    folder.mkdir()
    os.chown(folder, 0, users.GROUP)
    folder.chmod(0o2775)
    settings = dict(
        data=dict(eval_path=None), train=dict(steps=3, eval_interval=0), checkpoint=dict(interval=1, keep=1)
    )
    write_config(folder, place / "model", place / "records.jsonl", **settings).chmod(0o644)
    return folder


def call_as(user, umask, place, *commands):
    return users.call_as(user, umask, place / str(user), *commands)


def modes(folder):
    """What each file and folder is: its permissions and its group."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        status = path.lstat()
        found[path] = (stat.S_IMODE(status.st_mode), status.st_gid)
    return found


def check_modes(folder, of_files, of_folders):
    for path, (mode, group) in modes(folder).items():
        expected = of_folders if path.is_dir() else of_files
        assert (oct(mode), group) == (oct(expected), users.GROUP), path


@pytest.fixture(scope="module")
def begun(place):
    """A run that Alice began with umask 002."""
    folder = shared(place, "group")
    ((code, said),) = call_as(ALICE, 0o002, place, ["train", folder / "config.yaml"])
    assert code == 0, said
    check_modes(folder / "run", 0o664, 0o2775)
    check_modes(folder / "cache", 0o664, 0o2775)
    users.copy_as_it_is(folder, place / "begun")
    return place / "begun"


@pytest.fixture(scope="module")
def continued(begun, place):
    """The run, continued by Bob, and what that printed."""
    folder = place / "group"
    (folder / "run" / "stop-requested").touch()  # for an earlier attempt
    os.utime(folder / "run" / "stop-requested", (0, 0))
    words = ["train", folder / "config.yaml", "train.steps=5", "--allow-changes"]
    ((code, said),) = call_as(BOB, 0o002, place, words)
    assert code == 0, said
    return folder, said


def test_another_user_of_the_group_continues_a_run(continued):
    folder, said = continued
    assert "continuing after step 3 of 5" in said
    check_modes(folder / "run", 0o664, 0o2775)
    check_modes(folder / "cache", 0o664, 0o2775)
    run = folder / "run"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000005"]  # Alice's are removed
    assert {path.stat().st_uid for path in (run / "attempts").iterdir()} == {ALICE, BOB}
    assert len((run / "command.txt").read_text().splitlines()) == 2
    assert sorted(path.name for path in run.glob("export*")) == ["export", "export-2"]
    assert not (run / "stop-requested").exists()


def test_what_is_exported_or_applied_belongs_to_the_group(continued, place):
    folder, _ = continued
    formats = set(EXPORT_FORMATS) - {"peft", "as_trained"}  # of adapters, of a quantised base
    targets = {form: folder / f"as-{form}" for form in formats}
    exports = [["export", folder / "run", "--format", form, "--output", path] for form, path in targets.items()]
    targets["applied"] = folder / "applied"
    apply = ["apply", targets["delta"], place / "model", "--output", targets["applied"]]
    for code, said in call_as(BOB, 0o007, place, *exports, apply):
        assert code == 0, said
    for target in targets.values():
        check_modes(target, 0o660, 0o2770)

    model = shutil.copytree(place / "model", folder / "served")  # in place, it stays whose it was
    (model / "notes").mkdir()
    (model / "notes" / "a.md").write_text("kept")
    for path in [model, *model.rglob("*")]:
        os.chown(path, ALICE, users.GROUP)
        path.chmod(0o2770 if path.is_dir() else 0o660)
    (model / "config.json").chmod(0o640)
    before, owners = modes(model), {ALICE}
    liftdist("apply", targets["delta"], model, "--cache-dir", place / "cache")
    assert (modes(model), {path.stat().st_uid for path in before}) == (before, owners)
    undo = ["apply", targets["delta"], model, "--undo"]
    ((code, said),) = call_as(BOB, 0o022, place, undo)
    assert code == 0, said
    assert (modes(model), {path.stat().st_uid for path in before}) == (before, {BOB})  # only root gives files away
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def nth_run(place, number):
    (place / f"refused-{number}").mkdir(exist_ok=True)
    return place / f"refused-{number}" / "run"


def one_users(begun, target):
    """The run as it is if Alice has umask 022."""
    users.copy_as_it_is(begun / "run", target)
    for path in [target, *target.rglob("*")]:
        path.chmod(0o2755 if path.is_dir() else 0o644)
    return target


def all_but(*paths):
    """A run that Bob may continue, but for a few things in it."""

    def protect(run):
        for path in [run, *run.rglob("*")]:
            path.chmod(path.stat().st_mode | 0o020)
        for path in paths:
            (run / path).chmod((run / path).stat().st_mode & ~0o020)

    return protect


REFUSED = {
    "the whole run": (
        lambda run: None,
        f"run belongs to user {ALICE}, and its permissions (drwxr-sr-x) do not let you write: a run that a group shares needs "
        "umask 002 and a folder with the setgid bit from its start; ask its owner for chmod -R g+rwX, or start your own",
    ),
    "the folder": (all_but("."), f"run belongs to user {ALICE}, and its permissions (drwxr-sr-x) do not let you write"),
    "attempts": (all_but("attempts"), f"attempts belongs to user {ALICE}"),
    "checkpoints": (all_but("checkpoints"), f"checkpoints belongs to user {ALICE}"),
    "one checkpoint": (all_but("checkpoints/step-00000003"), f"step-00000003 belongs to user {ALICE}"),
    "metrics": (all_but("metrics.jsonl"), f"metrics.jsonl belongs to user {ALICE}, and its permissions (-rw-r--r--)"),
    "the list of commands": (all_but("command.txt"), f"command.txt belongs to user {ALICE}"),
    "tensorboard": (all_but("tensorboard"), f"tensorboard belongs to user {ALICE}"),
    "a sticky folder": (
        lambda run: (all_but()(run), (run / "checkpoints").chmod(0o3775)),
        f"checkpoints belongs to user {ALICE}, and its sticky bit keeps you from",
    ),
    "a cache": (all_but(), f"cache_dir CACHE: CACHE/tokens belongs to user {ALICE}"),
    "a folder to change": (lambda run: None, f"notes belongs to user {ALICE}"),
    "a closed model": (lambda run: None, "closed: cannot be read: Permission denied"),
    "closed weights": (lambda run: None, "model.safetensors: cannot be read: Permission denied"),
}  # fmt: skip


@pytest.fixture(scope="module")
def answers(begun, place):
    """What Bob is told where he may read, but not write, by case; one process asks for all."""
    commands = {}
    for number, (how, (protect, _)) in enumerate(REFUSED.items()):
        run = one_users(begun, nth_run(place, number))
        protect(run)
        cache = place / str(BOB) / "own"
        if how == "a cache":
            users.copy_as_it_is(begun / "cache", place / "cache-of-alice")
            cache = place / "cache-of-alice"
            (cache / "tokens").chmod(0o755)
        commands[how] = ["train", begun / "config.yaml", f"run_dir={run}", f"cache_dir={cache}"]
    delta, model = place / "nothing", shutil.copytree(place / "model", place / str(BOB) / "model")
    liftdist("diff", model, model, "--output", delta, "--cache-dir", place / "cache")
    (model / "notes").mkdir(mode=0o755)
    os.chown(model, BOB, BOB)
    os.chown(model / "notes", ALICE, ALICE)
    commands["a folder to change"] = ["apply", delta, model, "--cache-dir", place / str(BOB) / "own"]
    for how, closed in (("a closed model", "."), ("closed weights", "model.safetensors")):
        model = shutil.copytree(place / "model", place / how.replace(" ", "-") / "closed")
        (model / closed).chmod(0o700)
        own = [f"{key}={place / str(BOB) / f'of {how}'}" for key in ("run_dir", "cache_dir")]
        commands[how] = ["train", begun / "config.yaml", f"model.path={model}", *own]
    target = place / str(BOB) / "exported"
    export = ["export", nth_run(place, 0), "--output", target, "--cache-dir", place / str(BOB) / "own"]
    *refused, exported = users.call_as(BOB, 0o022, place / str(BOB), *commands.values(), export)
    return dict(zip(commands, refused, strict=True)), exported, target


@pytest.mark.parametrize("how", REFUSED)
def test_what_others_may_not_write_is_refused_to_them_in_one_line(how, answers, place):
    code, said = answers[0][how]
    problem = REFUSED[how][1].replace("CACHE", str(place / "cache-of-alice"))
    assert code == 2, said
    assert said.startswith("liftdist: ")
    assert len(said.splitlines()) == 1
    assert problem in said
    remedy = {"a cache": "(cache_dir=...)", "a folder to change": "give --output for a new folder"}
    remedy |= dict.fromkeys(("a closed model", "closed weights"), "Permission denied")
    assert said.rstrip().endswith(remedy.get(how, "(run_dir=...)"))
    run = nth_run(place, list(REFUSED).index(how))
    assert len(list((run / "attempts").iterdir())) == 1
    assert not [path for path in (place / str(BOB)).iterdir() if path.name.startswith(".model")]


@pytest.mark.parametrize("hidden", [False, True])
def test_a_live_run_of_another_user_is_not_taken_over(hidden, place):
    """Many clusters hide the processes of other users (hidepid): what cannot be seen may be alive."""
    folder = shared(place, f"live-{hidden}")
    claims.claim(folder / "run", lambda _: {})  # by this process
    for path in [folder / "run", *(folder / "run").rglob("*")]:
        path.chmod(0o2775 if path.is_dir() else 0o664)
    hide = "mount -t proc -o hidepid=invisible proc /proc" if hidden else "true"
    words = ["train", folder / "config.yaml", f"cache_dir={place / str(BOB) / 'own'}"]
    command = [sys.executable, "-m", "liftdist", *words]
    line = user_error(users.run_as(BOB, 0o002, place / str(BOB), *command, prepare=hide))
    assert f"in use by process {os.getpid()} on " in line


def test_a_run_that_others_may_read_is_exported_by_them(answers):
    _, (code, said), target = answers
    assert code == 0, said
    assert {path.stat().st_uid for path in [target, *target.iterdir()]} == {BOB}
    assert {stat.S_IMODE(path.stat().st_mode) for path in target.iterdir()} == {0o644}
    assert stat.S_IMODE(target.stat().st_mode) == 0o755
