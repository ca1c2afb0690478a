"""A delta on a model folder: applied, undone and swapped to the bit, and refused where it does not fit."""

import dataclasses
import errno
import fcntl
import json
import random
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import builders
import pytest
import torch
from commands import liftdist
from safetensors.torch import load_file, save_file

from liftdist import files, safetensors_io
from liftdist.deltas import delta, of_run
from liftdist.deltas import file as delta_file
from liftdist.deltas import folder as model_folders
from liftdist.errors import UserError
from liftdist.models import check, weights


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


def test_several_deltas_come_and_go_in_any_order(folders, deltas, thirds, tmp_path):
    (one, two, cache), (a, b, c) = deltas, thirds
    folder = shutil.copytree(folders[0], tmp_path / "model")

    def apply(given, *words, beside=(), code=0):
        kept = [word for other in beside for word in ("--beside", other)]
        return liftdist("apply", given, folder, *words, *kept, "--cache-dir", cache, code=code)

    apply(b)
    before = builders.contents(folder)
    assert "or keep it with --beside" in apply(a, code=2)
    apply(a, beside=[b])
    apply(c, beside=[a, b])
    assert builders.contents(folder) == builders.contents(folders[1])
    for overlapping, kept in ((two, [a, b, c]), (a, [a, b, c]), (one, [c])):
        said = apply(overlapping, beside=kept, code=2)
        assert "change the same weights of" in said
        assert "`liftdist merge` makes of them" in said
    assert "is not the base model of" in apply(a, "--undo", beside=[b], code=2)
    apply(a, "--undo", beside=[c, b])
    apply(c, "--undo", beside=[b])
    assert builders.contents(folder) == before
    apply(a, "--instead-of", b)
    liftdist(
        "diff", folder, folders[1], "--output", tmp_path / "later", "--cache-dir", cache
    )  # of base and a, together
    apply(tmp_path / "later")
    apply(a, "--undo", beside=[tmp_path / "later"])
    apply(tmp_path / "later", "--undo", beside=[], code=2)  # is of another base: a must come back first
    apply(a, beside=[tmp_path / "later"])
    assert builders.contents(folder) == builders.contents(folders[1])
    apply(tmp_path / "later", "--undo")
    apply(a, "--undo")
    assert builders.contents(folder) == builders.contents(folders[0])


def test_beside_another_delta_its_own_base_model_is_still_asked_for(folders, deltas, thirds, tmp_path):
    """A delta without base values would write its values anywhere."""
    (_, _, cache), (a, b, c) = deltas, thirds
    folder = shutil.copytree(folders[0], tmp_path / "model")
    at = ("--cache-dir", cache)
    liftdist("apply", a, folder, *at)
    alien = delta_file.read(b)
    changes = dataclasses.replace(
        alien, base_digest="f" * 64, get=lambda name: dataclasses.replace(alien.get(name), base=None)
    )
    delta_file.write(changes, tmp_path / "alien", with_base=False)
    out = ("--output", tmp_path / "out")
    assert "is not the base model of" in liftdist("apply", tmp_path / "alien", folder, "--beside", a, *out, *at, code=2)
    liftdist("apply", c, folder, "--beside", a, *at)
    liftdist("diff", folder, folders[1], "--output", tmp_path / "upon", *at)  # trained with a and c applied
    liftdist("apply", c, folder, "--undo", "--beside", a, *at)
    assert "is not the base model of" in liftdist("apply", tmp_path / "upon", folder, "--beside", a, *at, code=2)
    said = liftdist("apply", a, shutil.copytree(folders[1], tmp_path / "whole"), "--undo", *at, code=2)
    assert "name with --beside every other delta that it holds" in said


def test_a_delta_in_float32_beside_one_in_bf16_loses_nothing():
    base = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    fine = delta.Change((3,), torch.bfloat16, torch.tensor([0]), torch.tensor([1.0001]), torch.tensor([1.0]))
    coarse = delta.Change(
        (3,), torch.bfloat16, torch.tensor([2]), torch.tensor([5]).bfloat16(), torch.tensor([3]).bfloat16()
    )
    both = delta.edit("w", base, [], [fine, coarse])
    assert torch.equal(both, torch.tensor([1.0001, 2.0, 5.0]))
    assert torch.equal(delta.edit("w", both, [fine, coarse], [fine]), torch.tensor([1.0001, 2.0, 3.0]))
    for present in (
        [coarse, fine],
        [dataclasses.replace(coarse, stored=torch.float32), fine],
    ):  # trained upon the other
        alone = delta.edit("w", both, present, [coarse])
        assert alone.dtype == torch.bfloat16
    assert (alone.dtype, alone.tolist()) == (torch.bfloat16, [1.0, 2.0, 5.0])


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


@pytest.fixture
def small(tmp_path):
    """A model of two files, one changed in both, and the delta."""
    chance, files_of = torch.Generator().manual_seed(0), {}
    for number in (1, 2):
        tensors = {f"{name}{number}": torch.randn(4, 8, generator=chance).bfloat16() for name in "ab"}
        files_of[f"model-0000{number}-of-00002.safetensors"] = tensors
    for name, step in (("base", 0), ("one", 1)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        for file, tensors in files_of.items():
            moved = {key: torch.cat([tensor[:1] + step, tensor[1:]]) for key, tensor in tensors.items()}
            save_file(moved, folder / file, {"format": "pt", "made by": file})
        index = {"metadata": {"total_size": 256}}  # bytes of four tensors
        index["weight_map"] = {key: file for file, tensors in files_of.items() for key in tensors}
        (folder / check.INDEX).write_text(json.dumps(index))
    digest = weights.digest(tmp_path / "base", tmp_path / "cache")
    delta_file.write(of_run.between(tmp_path / "base", tmp_path / "one", digest), tmp_path / "one.delta")
    return tmp_path / "base", delta_file.read(tmp_path / "one.delta"), tmp_path / "cache"


def test_of_two_that_change_a_folder_at_once_the_second_is_refused(small, tmp_path, monkeypatch):
    base, one, cache = small
    folder, flock = shutil.copytree(base, tmp_path / "model"), fcntl.flock
    write = safetensors_io.write

    def meanwhile(*given, **named):
        write(*given, **named)
        files.remove_left_over(folder)  # what is being written is none
        with pytest.raises(UserError, match="model: another process is changing it; try again when that one has ended"):
            model_folders.change_folder(folder, cache, one)

    monkeypatch.setattr(safetensors_io, "write", meanwhile)
    model_folders.change_folder(folder, cache, one)
    monkeypatch.undo()
    assert builders.contents(folder) == builders.contents(tmp_path / "one")

    def late(*given):  # the first has just ended, and the folder that was opened is no more
        folder.rename(tmp_path / "old")
        shutil.copytree(base, folder)
        flock(*given)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UserError, match="another process is changing it"):
        model_folders.change_folder(folder, cache, one)
    assert builders.contents(folder) == builders.contents(base)

    def without(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", without)
    model_folders.change_folder(folder, cache, one)
    assert builders.contents(folder) == builders.contents(tmp_path / "one")


def test_what_else_a_folder_holds_is_there_after_it_was_changed_in_place_and_back(small, tmp_path):
    base, one, cache = small
    (base / "notes").symlink_to("../elsewhere/notes")  # where nothing is now
    (base / "config.json").unlink()
    (base / "config.json").symlink_to("../config.json")
    (tmp_path / "config.json").write_text("{}")
    folder = shutil.copytree(base, tmp_path / "model", symlinks=True)
    for how in ({"apply": one}, {"undo": one}):
        model_folders.change_folder(folder, cache, **how)
        assert (folder / "notes").readlink() == Path("../elsewhere/notes")
        assert (folder / "config.json").read_text() == "{}"
    for file in base.glob("*.safetensors"):
        assert (folder / file.name).read_bytes() == file.read_bytes()  # with what it says of itself
    model_folders.change_folder(base, cache, one, output=tmp_path / "new")
    assert not (tmp_path / "new" / "notes").is_symlink()


@pytest.mark.parametrize("in_place", [True, False])
def test_a_folder_that_changes_while_it_is_read_is_left_as_it_is(small, in_place, tmp_path, monkeypatch):
    base, one, cache = small
    folder, write = shutil.copytree(base, tmp_path / "model"), safetensors_io.write
    first = min(folder.glob("*.safetensors"))

    def meanwhile(*given, **named):
        write(*given, **named)
        first.touch()

    monkeypatch.setattr(safetensors_io, "write", meanwhile)
    with pytest.raises(UserError, match=f"{first}: has changed while it was read"):
        model_folders.change_folder(folder, cache, one, output=None if in_place else tmp_path / "new")
    assert builders.contents(folder) == builders.contents(base)
    assert not (tmp_path / "new").exists()


def test_of_a_file_no_more_is_in_memory_than_is_being_made(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    tensors, alive, most = {f"{number:02}": torch.zeros(4, 4) for number in range(20)}, set(), 0
    (tmp_path / "base").mkdir()
    safetensors_io.save(tensors, tmp_path / "base" / check.WEIGHTS, {"format": "pt"})

    def edit(name, tensor):
        nonlocal most
        made = tensor.double() if name > widened else tensor
        alive.add(name)
        weakref.finalize(made, alive.discard, name)
        most = max(most, len(alive))
        return made

    for widened, fewest, limit in (("99", 2, 6), ("10", 20, 20)):  # of another dtype than is known: the whole file
        most = 0
        target = tmp_path / f"made-{widened}"
        model_folders.rewrite(weights.ModelFolder(tmp_path / "base"), target, edit, lambda _: None)
        assert fewest <= most <= limit
        found = load_file(target / check.WEIGHTS)
        assert {name: tensor.dtype for name, tensor in found.items()} == {
            name: torch.float64 if name > widened else torch.float32 for name in tensors
        }


@pytest.mark.parametrize("kind", safetensors_io.DTYPES)
def test_every_dtype_is_carried_to_the_bit(kind, tmp_path):
    dtype = safetensors_io.DTYPES[kind]
    for place, name in enumerate(("base", "one")):
        bytes_of = torch.zeros(64, dtype=torch.uint8)
        bytes_of[8 * place :: 16] = 1
        (tmp_path / name).mkdir()
        safetensors_io.save({"w": bytes_of.view(dtype).view(2, -1)}, tmp_path / name / check.WEIGHTS, {"format": "pt"})
    base, cache, at = tmp_path / "base", tmp_path / "cache", tmp_path / "one.delta"
    delta_file.write(of_run.between(base, tmp_path / "one", weights.digest(base, cache)), at)
    made = model_folders.change_folder(base, cache, delta_file.read(at), output=tmp_path / "made")
    back = model_folders.change_folder(made, cache, undo=delta_file.read(at), output=tmp_path / "back")
    for found, expected in ((made, tmp_path / "one"), (back, base)):
        assert (found / check.WEIGHTS).read_bytes() == (expected / check.WEIGHTS).read_bytes()


def test_a_dtype_that_is_not_read_is_named(tmp_path):
    save_file({"w": torch.zeros(4, dtype=torch.int64)}, tmp_path / check.WEIGHTS)
    content = (tmp_path / check.WEIGHTS).read_bytes()
    (tmp_path / check.WEIGHTS).write_bytes(content.replace(b'"I64"', b'"C64"'))
    with pytest.raises(UserError, match=f"{check.WEIGHTS}: w is C64; convert it to one of U64, I64"):
        weights.digest(tmp_path, tmp_path / "cache")


def test_folders_of_other_architectures_have_no_difference(folders, tmp_path):
    other = builders.llama(tmp_path / "other", dtype=torch.bfloat16, hidden_size=100, num_hidden_layers=1)
    assert "has no" in liftdist("diff", folders[0], other, "--output", tmp_path / "d", "--cache-dir", tmp_path, code=2)
    assert not (tmp_path / "d").exists()


def test_numbers_of_8_bits_are_carried_to_the_bit_and_not_reckoned_with(tmp_path):
    """Their scales are in other tensors: a mean of both is not the mean of the weights."""
    chance = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.randn(20, 30, generator=chance), "a.weight_scale": torch.rand(20, generator=chance)}
    kinds = {"small": torch.float8_e4m3fn, "wide": torch.bfloat16, "whole": torch.int32}
    for name, kind in kinds.items():
        for place, part in enumerate(("base", "one")):
            moved = base["a.weight"] + place * (base["a.weight"] > 1)
            (tmp_path / f"{part}-{name}").mkdir()
            tensors = base | {"a.weight": moved.to(kind)}
            save_file(tensors, tmp_path / f"{part}-{name}" / "model.safetensors", {"format": "pt"})
    before, after, at = tmp_path / "base-small", tmp_path / "one-small", ("--cache-dir", tmp_path / "cache")
    one, exact = tmp_path / "one.delta", tmp_path / "exact.delta"
    liftdist("diff", before, after, "--output", one, *at)
    liftdist("compress", one, "--output", exact, *at)
    for number, given in enumerate((one, exact)):
        made, back = tmp_path / f"made-{number}", tmp_path / f"back-{number}"
        liftdist("apply", given, before, "--output", made, *at)
        liftdist("apply", given, made, "--undo", "--output", back, *at)
        for found, expected in ((made, after), (back, before)):
            assert (found / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    out = ("--output", tmp_path / "out", *at)
    for words, problem in (
        (("merge", one, "--rule", "sum"), "only weights in floating-point of 16 bits or more can be merged"),
        (("compress", one, "--method", "t_switch", "--alpha", 0.5), "holds float8_e4m3fn; take --method exact"),
        (("export", one, "--base", before, "--format", "importance"), "of which changes are not those of weights"),
        (("diff", tmp_path / "base-wide", after), "a.weight is BF16 in"),
        (("diff", tmp_path / "base-wide", tmp_path / "one-whole"), ": no dtype holds both"),
    ):
        assert problem in liftdist(*words, *out, code=2)
        assert not (tmp_path / "out").exists()
