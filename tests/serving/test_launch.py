"""What ``liftdist serve`` is given is checked in one line each, before vLLM starts; there, this package is found alone."""

import os
import subprocess
import sys

import builders
import pytest
from commands import call, liftdist

from liftdist.errors import UserError
from liftdist.serving import launch


@pytest.fixture(scope="module")
def made(tmp_path_factory, smollm2):
    """A base model, another one made from it, and their delta, with and without base values."""
    folder = tmp_path_factory.mktemp("served")
    base = builders.llama(folder / "base", smollm2)
    one = builders.changed_copy(base, folder / "one", 1)
    for name, options in (("one.delta", ()), ("bare.delta", ("--without-base",))):
        liftdist("diff", base, one, "--output", folder / name, "--cache-dir", folder / "cache", *options)
    damaged = bytearray((folder / "one.delta").read_bytes())
    damaged[-100] ^= 1
    (folder / "damaged.delta").write_bytes(damaged)
    return folder


@pytest.fixture
def without_vllm(tmp_path, monkeypatch):
    """A command that is called vllm, of an environment without vLLM."""
    command = tmp_path / "vllm"
    command.write_text(f"#!{sys.executable}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    return command


def refusal(*words):
    code, said = call("serve", *words)
    assert code == 2, said
    assert said.startswith("liftdist: ")
    assert said.count("\n") == 1
    return said


def test_deltas_of_the_base_model_are_given_to_vllm_by_name(made):
    given = [f"one={made}/one.delta", f"a=b={made}/one.delta"]
    with pytest.raises(UserError, match=r"b=.*one\.delta: No such file"):
        launch.check_deltas(str(made / "base"), given, made / "cache")
    folder, digest, modules = launch.check_deltas(str(made / "base"), given[:1], made / "cache")
    assert folder == made / "base"
    assert liftdist("show", made / "one.delta").splitlines()[1] == f"base model: digest {digest[:12]}"
    assert modules == [f'{{"name": "one", "path": "{made}/one.delta"}}']


@pytest.mark.parametrize(
    ("base", "given", "problem"),
    [
        ("one", "a={}/one.delta", "is for another base model than"),
        ("base", "a={}/damaged.delta", "do not match the sha256"),
        ("base", "a={}/bare.delta", "holds no base values"),
        ("base", "a={}/one", "liftdist export"),
        ("base", "a={}/one/model.safetensors", "not a delta"),
        ("base", "a={}/none.delta", "No such file"),
        ("base", "{}/one.delta", "must be NAME=FILE"),
        ("base", "=x", "must be NAME=FILE"),
        ("none", "a={}/one.delta", "no such folder"),
    ],
)
def test_a_delta_that_cannot_be_served_is_refused(made, base, given, problem):
    with pytest.raises(UserError, match=problem):
        launch.check_deltas(str(made / base), [given.format(made)], made / "cache")


def test_two_models_of_one_name_are_refused():
    for given in (["a=x", "a=y"], ["base=x"]):
        with pytest.raises(UserError, match="name of another model"):
            launch.read_names(given, ["base"])


@pytest.mark.parametrize("words", ["--served-model-name one", "--served_model_name=one", "--served-model-name x one"])
def test_a_delta_has_no_name_of_the_base_model(made, words, monkeypatch):
    """vLLM would ask the base model."""
    monkeypatch.setattr(launch, "python_of", lambda vllm: sys.executable)
    given = [made / "base", "--delta", f"one={made}/one.delta", "--cache-dir", made / "cache"]
    assert "one is the name of another model" in refusal(*given, "--", *words.split(), "--seed", "1")


def test_examples_are_of_a_model_under_a_name_that_it_answers_under(made, monkeypatch):
    monkeypatch.setattr(launch, "python_of", lambda vllm: sys.executable)
    given = [
        made / "base",
        "--delta",
        f"one={made}/one.delta",
        "--cache-dir",
        made / "cache",
        "--examples",
        "b=x.jsonl",
    ]
    assert f"no model b is served; name one of {made / 'base'}, one" in refusal(*given)
    assert "no model b is served; name one of c, one" in refusal(*given, "--", "--served-model-name", "c")


def test_the_environment_of_vllm_is_asked_for(made, without_vllm):
    given = [made / "base", "--delta", f"one={made}/one.delta", "--cache-dir", made / "cache"]
    assert "no command vllm in PATH" in refusal(*given)
    assert "--vllm nowhere/vllm: no such command" in refusal(*given, "--vllm", "nowhere/vllm")
    assert f"{sys.executable} holds no vLLM" in refusal(*given, "--vllm", without_vllm)
    without_vllm.write_text("#!/bin/sh\n")  # as installers write it for long paths; its Python lies beside it
    assert "does not work" in refusal(*given, "--vllm", without_vllm)
    (without_vllm.parent / "python3").symlink_to(sys.executable)
    assert "python3 holds no vLLM" in refusal(*given, "--vllm", without_vllm)


@pytest.mark.parametrize(
    "word",
    [
        "--enable-lora",
        "--enable_lora",
        "--lora-modules=x",
        "-dp",
        "--data-parallel-size=2",
        "-asc",
        "--port",
        "--model",
        "--config",
        "--lora-mod",
        "--worker_ext=x",
        "--served-model",
        "--dty",
        "-as",
    ],
)
def test_arguments_of_vllm_that_have_no_place_beside_deltas_are_refused(word):
    assert word in refusal("base", "--", word, "2")


def test_a_turn_is_a_time():
    for text in ("-1", "nan", "inf"):
        assert "--turn" in refusal("base", f"--turn={text}")


def test_only_this_package_is_added_to_the_environment_of_vllm(tmp_path):
    for _ in range(2):  # anew, and again
        folder = launch._package_alone(tmp_path)
    assert [entry.name for entry in folder.iterdir()] == ["liftdist"]
    (folder / "liftdist").unlink()
    (folder / "liftdist").symlink_to(tmp_path)  # another package lay here
    assert launch._package_alone(tmp_path) == folder
    code = (
        "import sys, liftdist.serving.placement, liftdist.serving.turns, liftdist.serving.router, liftdist.deltas.file\n"
        "print(liftdist.__file__)\n"
        "sys.exit(any(name in sys.modules for name in ('transformers', 'torch.distributed.fsdp')))"
    )
    variables = launch.environ(folder)
    assert variables["PYTHONPATH"].split(os.pathsep)[0] == str(folder)
    ended = subprocess.run(
        [sys.executable, "-P", "-c", code], env=variables, cwd="/", capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == str(folder / "liftdist" / "__init__.py")
