"""What a model folder means: what transformers loads from it, or nothing."""

import json
import shutil

import builders
import pytest
from commands import liftdist, write_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from liftdist.models import check

FIRST, SECOND, NORM = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.norm.weight"


def in_two_shards(folder):
    """The model of a folder with one file, in two files and an index beside it."""
    tensors = load_file(folder / check.WEIGHTS)
    names = sorted(tensors)
    parts = {FIRST: names[: len(names) // 2], SECOND: names[len(names) // 2 :]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    write_index(folder, {name: file for file, part in parts.items() for name in part})
    return folder


def write_index(folder, weight_map):
    size = sum(tensor.numel() * 4 for tensor in load_file(folder / check.WEIGHTS).values())
    (folder / check.INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))


def sharded(folder):
    in_two_shards(folder)
    (folder / check.WEIGHTS).unlink()
    return folder


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def edit_index(folder, change):
    index = json.loads((folder / check.INDEX).read_text())
    change(index["weight_map"])
    (folder / check.INDEX).write_text(json.dumps(index))


def settings(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_norm(tensors):
    tensors[NORM] += 1


def both_but_one_lacks(folder):
    in_two_shards(folder)
    edit_index(folder, lambda places: places.pop(NORM))
    edit(folder / SECOND, lambda tensors: tensors.pop(NORM))


def in_both_shards(folder, change):
    sharded(folder)
    tensor = load_file(folder / SECOND)[NORM]
    edit(folder / FIRST, lambda tensors: tensors.update({NORM: change(tensor)}))


REFUSED = {
    "an adapter": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "holds an adapter (adapter_config.json), which transformers adds to the weights: merge it",
    ),
    "a named file": (
        lambda f: settings(f, transformers_weights="other.safetensors"),
        "transformers_weights=other.safetensors makes transformers load that file",
    ),
    "saved by ranks": (
        lambda f: shutil.copy(f / check.WEIGHTS, f / "shard-00000-model-00001-of-00001.safetensors"),
        "holds a distributed checkpoint (shard-00000-model-00001-of-00001.safetensors)",
    ),
    "two models, one lacks a tensor": (
        both_but_one_lacks,
        "which differ in model.norm.weight: transformers loads model.safetensors",
    ),
    "two models, other shapes": (
        lambda f: (in_two_shards(f), edit(f / SECOND, lambda t: t.update({NORM: t[NORM][:-1].clone()}))),
        f"which differ in {NORM}: transformers loads model.safetensors, not {SECOND}; move",
    ),
    "two models, other dtype": (
        lambda f: (in_two_shards(f), edit(f / SECOND, lambda t: t.update({NORM: t[NORM].half()}))),
        f"transformers loads model.safetensors, not {SECOND}",
    ),
    "a shard left over": (
        lambda f: (sharded(f), save_file({"model.old": load_file(f / SECOND)[NORM]}, f / "model-00003-of-00003.safetensors")),
        f"differ in model.old: transformers loads the files that {check.INDEX} names, not model-00003-of-00003.safetensors",
    ),
    "shards without an index": (
        lambda f: (sharded(f), (f / check.INDEX).unlink()),
        f"holds {FIRST}, but no {check.INDEX}, without which transformers loads no shards",
    ),
    "one file, and the index of another": (
        lambda f: (in_two_shards(f), (f / FIRST).unlink(), (f / SECOND).unlink()),
        f"names {FIRST}, which is missing, while transformers loads model.safetensors: remove {check.INDEX} if",
    ),
    "a tensor in two shards": (
        lambda f: in_both_shards(f, lambda tensor: tensor[:-1].clone()),
        f"{FIRST} and {SECOND} hold different tensors {NORM}",
    ),
    "an entry without a tensor": (
        lambda f: (sharded(f), edit_index(f, lambda places: places.update({"model.extra": FIRST}))),
        f"{check.INDEX} places model.extra in {FIRST}, which does not hold it",
    ),
    "a tensor elsewhere": (
        lambda f: (sharded(f), edit_index(f, lambda places: places.update({NORM: FIRST}))),
        f"{check.INDEX} places {NORM} in {FIRST}, but it is in {SECOND}",
    ),
    "a shard is missing": (lambda f: (sharded(f), (f / SECOND).unlink()), f"names {SECOND}, which is missing"),
    "a shard is on its way": (
        lambda f: (sharded(f), (f / SECOND).rename(f / f"{SECOND}.incomplete")),
        f"names {SECOND}, whose download has not ended",
    ),
    "a file outside": (
        lambda f: (sharded(f), edit_index(f, lambda places: places.update({NORM: "../other.safetensors"}))),
        f"{check.INDEX} names ../other.safetensors, outside the folder",
    ),
    "an index without a map": (lambda f: (sharded(f), (f / check.INDEX).write_text("{}")), f"{check.INDEX} has no weight_map"),
    "an index that is a list": (lambda f: (sharded(f), (f / check.INDEX).write_text("[]")), "holds no JSON object"),
    "an index of numbers": (
        lambda f: (sharded(f), edit_index(f, lambda places: places.update({NORM: 1}))),
        f"{check.INDEX} has no weight_map",
    ),
    "a byte order mark": (
        lambda f: (f / "config.json").write_bytes(b"\xef\xbb\xbf" + (f / "config.json").read_bytes()),
        "save it without the byte order mark",
    ),
    "empty": (lambda f: (f / check.WEIGHTS).write_bytes(b""), "model.safetensors is empty or truncated: it has 0 bytes"),
    "cut in its length": (lambda f: (f / check.WEIGHTS).write_bytes(b"abc"), "model.safetensors is empty or truncated"),
    "cut in its data": (
        lambda f: (f / check.WEIGHTS).write_bytes((f / check.WEIGHTS).read_bytes()[:-9]),
        "damaged weights: model.safetensors has",
    ),
    "a cut shard": (
        lambda f: (sharded(f), (f / SECOND).write_bytes((f / SECOND).read_bytes()[:-9])),
        f"damaged weights: {SECOND} has",
    ),
    "a header of nothing": (
        lambda f: (f / check.WEIGHTS).write_bytes((4).to_bytes(8, "little") + b"null"),
        "model.safetensors has a damaged header",
    ),
    "tensors that overlap": (
        lambda f: write_overlapping(f / check.WEIGHTS),
        "model.safetensors has a damaged header: the bytes of b are not where",
    ),
    "a git-lfs pointer": (
        lambda f: (f / check.WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "model.safetensors is a git-lfs pointer, not the file itself, which git lfs pull fetches",
    ),
    "a page": (lambda f: (f / check.WEIGHTS).write_text("<!DOCTYPE html>" * 9), "is not a complete safetensors file"),
    "a broken link": (
        lambda f: ((f / check.WEIGHTS).unlink(), (f / check.WEIGHTS).symlink_to("../blobs/0")),
        "model.safetensors is a link to ../blobs/0, which does not exist",
    ),
    "a folder of that name": (
        lambda f: ((f / check.WEIGHTS).unlink(), (f / check.WEIGHTS).mkdir()),
        "model.safetensors: cannot be read: Is a directory",
    ),
    "saved from flax": (
        lambda f: save_file(load_file(f / check.WEIGHTS), f / check.WEIGHTS, {"format": "flax"}),
        "was saved from flax, whose layout is another",
    ),
    "another format": (
        lambda f: (f / check.WEIGHTS).rename(f / "model.gguf"),
        "holds no model.safetensors, and model.gguf is not loaded",
    ),
}  # fmt: skip


def write_overlapping(path):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    text = json.dumps({"a": entry, "b": entry}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))


@pytest.mark.parametrize("how", REFUSED)
def test_a_folder_that_is_not_one_model_is_refused_before_ranks_start(how, records, tmp_path):
    folder = builders.llama(tmp_path / "model")
    breaks, problem = REFUSED[how]
    breaks(folder)
    said = liftdist("train", write_config(tmp_path, folder, records), code=2)
    assert problem in said
    assert str(folder) in said
    assert len(said.splitlines()) == 1, said
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("how", ["one file and shards", "a shard left over", "two shards"])
def test_files_that_differ_in_one_value_are_refused(how, tmp_path):
    """Their headers are equal: only their bytes tell."""
    folder, other = (builders.llama(tmp_path / name) for name in ("model", "other"))
    if how == "one file and shards":
        edit(in_two_shards(folder) / SECOND, other_norm)
    elif how == "a shard left over":
        save_file({NORM: load_file(sharded(folder) / SECOND)[NORM] + 1}, folder / "model-00003-of-00003.safetensors")
    else:
        in_both_shards(folder, lambda tensor: tensor + 1)
    for before, after in ((folder, other), (other, folder)):
        words = ("diff", before, after, "--output", tmp_path / "delta", "--cache-dir", tmp_path / "cache")
        said = liftdist(*words, code=2)
        assert NORM in said
        assert "differ" in said
        assert not (tmp_path / "delta").exists()


ACCEPTED = {
    "one file": lambda f: f,
    "shards": sharded,
    "one file and equal shards": in_two_shards,
    "equal shards without an index": lambda f: (in_two_shards(f), (f / check.INDEX).unlink()),
    "an index of one file": lambda f: write_index(f, dict.fromkeys(load_file(f / check.WEIGHTS), check.WEIGHTS)),
    "a tensor twice": lambda f: in_both_shards(f, lambda tensor: tensor),
    "a tensor that the index lacks": lambda f: (sharded(f), edit_index(f, lambda places: places.pop(NORM))),
    "other weights": lambda f: save_file({"x": load_file(f / check.WEIGHTS)[NORM]}, f / "consolidated.safetensors"),
    "a variant": lambda f: save_file({NORM: load_file(f / check.WEIGHTS)[NORM] * 2}, f / "model.fp16.safetensors"),
    "saved without a format": lambda f: save_file(load_file(f / check.WEIGHTS), f / check.WEIGHTS),
}  # fmt: skip


@pytest.mark.parametrize("how", ACCEPTED)
def test_what_is_read_is_what_transformers_loads(how, tmp_path):
    from liftdist.models.weights import ModelFolder, digest

    folder = builders.llama(tmp_path / "model")
    expected = digest(folder, tmp_path / "cache")
    ACCEPTED[how](folder)
    assert digest(folder, tmp_path / "cache") == expected
    stored, loaded = ModelFolder(folder), AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(stored.read(name).equal(loaded[name]) for name in stored.file_of)
    assert set(loaded) - set(stored.file_of) <= {"lm_head.weight"}  # tied
