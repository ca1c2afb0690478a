import os
import signal
import subprocess
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from commands import ROOT

torch.set_num_threads(1)

for number in (
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGTERM,
):  # as ignored by `nohup` or `&`: commands would ignore them, too
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def pytest_collection_modifyitems(config, items):
    for item in items:  # by its marks: its keywords name the folder of the repository, too
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU that torch.cuda finds"))


def pytest_terminal_summary(terminalreporter):
    """Say in the last lines what was not tested here, and what would let it be."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", ())
    )
    if reasons:
        terminalreporter.section("not tested here")
        for reason, count in reasons.most_common():
            terminalreporter.write_line(f"{count} tests: {reason}")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder: a real pretrained model, out of a Python package."""
    import quickstart

    return quickstart.model_folder(ROOT / ".cache" / "quickstart")


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, smollm2) -> Path:
    """A small float32 Llama with tied embeddings and the real tokenizer, whose sizes divide by neither 2, 3 nor 4 ranks."""
    import builders

    return builders.llama(tmp_path_factory.mktemp("tiny"), smollm2)


@pytest.fixture
def records(tmp_path) -> Path:
    """Forty prompt/completion records."""
    import builders

    return builders.write_records(tmp_path / "records.jsonl")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=500", "tmpfs", folder], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"needs to mount a file system: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="session")
def cluster():
    """A SLURM cluster of real daemons on this machine, six nodes with an address each; all tests of a worker share it."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    folder = f"/tmp/liftdist-slurm-tests-{worker}"
    command = [ROOT / "slurm" / "cluster", "--dir", folder, "--network", f"10.78.{worker}"]
    subprocess.run([*command, "down"], check=False, capture_output=True)  # of tests that were killed
    started = subprocess.run(
        [*command, "up", "6", "--slurmd-timeout", "8"], check=False, capture_output=True, text=True
    )
    if started.returncode:
        problem = started.stderr.strip()
        assert "LIFTDIST_TEST_SLURM" not in os.environ, problem
        pytest.skip(f"needs SLURM: {problem}")
    before = os.environ.copy()
    os.environ["SLURM_CONF"] = f"{folder}/slurm.conf"
    yield lambda *words: subprocess.run([*command, *words], check=True, capture_output=True, text=True).stdout
    os.environ.clear()
    os.environ.update(before)
    subprocess.run([*command, "down"], check=True, capture_output=True)
