"""A delta on a model folder: applied, undone and swapped to the bit, and refused where it does not fit."""

import json
import random
import shutil
import subprocess
import sys

import builders
import torch
from commands import liftdist
from safetensors.torch import load_file, save_file

from liftdist.models import check


def test_apply_undo_and_swap_on_a_folder_are_exact(folders, deltas, tmp_path):
    base, first, second = folders
    one, two, cache = deltas
    folder = shutil.copytree(base, tmp_path / "model")
    at = ("--cache-dir", cache)
    liftdist("apply", one, folder, *at)
    assert builders.contents(folder) == builders.contents(first)
    assert "does not hold the new values of the delta" in liftdist("apply", two, folder, "--undo", *at, code=2)
    assert builders.contents(folder) == builders.contents(first)
    liftdist("apply", two, folder, "--instead-of", one, *at)
    assert builders.contents(folder) == builders.contents(second)
    liftdist("apply", two, folder, "--undo", "--output", tmp_path / "undone", *at)
    assert builders.contents(tmp_path / "undone") == builders.contents(base)
    assert builders.contents(folder) == builders.contents(second)
    liftdist("apply", two, folder, "--undo", *at)
    assert builders.contents(folder) == builders.contents(base)
    index = json.loads((folder / check.INDEX).read_text())
    files = list(folder.glob("*.safetensors"))
    assert len(files) > 1
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for file in files for t in load_file(file).values())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_folder_that_differs_elsewhere_is_refused(folders, deltas, tmp_path):
    one, two, cache = deltas
    for source, arguments in (
        (folders[0], [one]),
        (folders[1], [one, "--undo"]),
        (folders[1], [two, "--instead-of", one]),
    ):
        folder = shutil.copytree(source, tmp_path / f"model-{len(list(tmp_path.iterdir()))}")
        file = next(iter(sorted(folder.glob("*.safetensors"))))
        tensors = load_file(file)
        next(t for name, t in tensors.items() if "norm" in name or "embed" in name).view(-1)[0] += 1
        save_file(tensors, file, {"format": "pt"})
        before = builders.contents(folder)
        said = liftdist("apply", arguments[0], folder, *arguments[1:], "--cache-dir", cache, code=2)
        assert "is not the base model of" in said
        assert builders.contents(folder) == before


def test_a_process_killed_while_it_applies_leaves_the_old_folder(folders, deltas, tmp_path):
    """Whenever it is killed, the folder is the old model or the new one."""
    one, _, cache = deltas
    folder = shutil.copytree(folders[0], tmp_path / "model")
    old, new = builders.contents(folders[0]), builders.contents(folders[1])
    chance = random.Random(1)
    seen = set()
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-m", "liftdist", "apply", one, folder, "--cache-dir", cache],
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(1 + 2 * chance.random())
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        now = builders.contents(folder)
        assert now in (old, new)
        seen.add("new" if now == new else "old")
        if now == new:
            shutil.rmtree(folder)
            shutil.copytree(folders[0], folder)
    print(seen)


def test_folders_of_other_architectures_have_no_difference(folders, tmp_path):
    other = builders.llama(tmp_path / "other", dtype=torch.bfloat16, hidden_size=100, num_hidden_layers=1)
    assert "has no" in liftdist("diff", folders[0], other, "--output", tmp_path / "d", "--cache-dir", tmp_path, code=2)
    assert not (tmp_path / "d").exists()
