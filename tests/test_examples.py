"""What the documents show is run: the blocks of a page that are marked ``<!-- test: run -->``, in order, in one folder.

The folder holds a small model under the name of a real one, forty records, the configs, and what the README's blocks made.
"""

import contextlib
import doctest
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import builders
import commands
import guide
import pytest

ROOT = Path(__file__).resolve().parent.parent
LLAMA_3_8B = dict(
    model_type="llama",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
    tie_word_embeddings=False,
)


def blocks(path: Path) -> list[guide.Block]:
    return [block for block in guide.parse(path).blocks if block.mark == ("test", "run")]


PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if blocks(path)]


@pytest.fixture(scope="module")
def after_readme(tmp_path_factory, smollm2) -> Path:
    """The folder after the blocks of the README: it holds a finished run."""
    folder = tmp_path_factory.mktemp("readme")
    builders.llama(folder / "Qwen" / "Qwen3-0.6B", smollm2)
    builders.write_records(folder / "my.jsonl")
    (folder / "meta-llama" / "Meta-Llama-3-8B").mkdir(parents=True)
    (folder / "meta-llama" / "Meta-Llama-3-8B" / "config.json").write_text(json.dumps(LLAMA_3_8B))
    (folder / "configs").symlink_to(ROOT / "configs")
    with contextlib.chdir(folder), environment(folder):
        run(blocks(ROOT / "README.md"))
    return folder


def test_readme(after_readme):
    assert (after_readme / "runs" / "mine" / "export" / "model.safetensors").is_file()
    assert (after_readme / "my.delta").is_file()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_page(path, after_readme, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(after_readme, folder, symlinks=True)
    (folder / "my.delta").unlink()
    with contextlib.chdir(folder), environment(folder):
        run(blocks(path))


@contextlib.contextmanager
def environment(home: Path):
    before = os.environ.copy()
    os.environ |= {"HOME": str(home), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def run(found: list[guide.Block]) -> None:
    assert found
    names: dict[str, object] = {}
    code = 0
    for block in found:
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), names)
            continue
        for command, wanted in block.exchanges:
            if command == "echo $?":
                printed = f"{code}\n"
            else:
                code, printed = execute(command)
            if block.language == "console":
                same = doctest.OutputChecker().check_output(wanted, printed, doctest.ELLIPSIS)
                assert same, f"{block}: {command}\n--- documented\n{wanted}--- printed, exit code {code}\n{printed}"
            else:
                assert code == 0, f"{block}: {command}\n{printed}"


def execute(command: str) -> tuple[int, str]:
    """Exit code and output. Commands that start ranks get a process; others of liftdist are spared the imports of torch."""
    words = command.split()
    if words[0] == "liftdist" and (words[1] not in ("train", "select") or "--prefetch" in words):
        return commands.call(*words[1:])
    done = subprocess.run(
        ["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200, check=False
    )
    return done.returncode, done.stdout
