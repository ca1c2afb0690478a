"""Versions in the layout of SGLang and slime, read back as it is described: not by SGLang, whose releases lack the endpoint."""

import json
import shutil

import builders
import numpy as np
import published
import pytest
import torch
import xxhash
import zstandard
from commands import liftdist
from published import state, whole, writer

from liftdist.deltas.delta import bits
from liftdist.models.weights import ModelFolder
from liftdist.safetensors_header import data_begin, header
from liftdist.sync import version


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return builders.llama(tmp_path_factory.mktemp("model") / "base", dtype=torch.bfloat16)


def pull(source, local, applied, target):
    """Apply versions after ``applied`` up to ``target`` to a model folder in place."""
    path = local / "model.safetensors"
    with path.open("rb") as file:
        begin = data_begin(file)
    held = np.memmap(path, np.uint8, "r+")
    for number in range(applied + 1, target + 1):
        folder = source / f"weight_v{number:06d}"
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        about = index["metadata"]
        assert (int(about["version"]), int(about["base_version"])) == (number, number - 1)
        assert (about["delta_encoding"], about["compression_format"]) == ("overwrite", "zstd")
        assert about["checksum_format"] == "xxh3-128"
        for file in folder.glob("*.safetensors"):
            entries, content = header(file), file.read_bytes()
            with file.open("rb") as opened:
                first = data_begin(opened)
            checksums = entries.pop("__metadata__")
            assert entries.keys() == checksums.keys() == index["weight_map"].keys()
            for name, entry in entries.items():
                assert index["weight_map"][name] == file.name
                low, high = entry["data_offsets"]
                packed = zstandard.ZstdDecompressor().decompress(content[first + low : first + high])
                count = int.from_bytes(packed[:4], "little")
                places = np.frombuffer(packed[4 : 4 + 4 * count], "<u4")
                low, high = header(path)[name]["data_offsets"]
                region = held[begin + low : begin + high]
                region[places] = np.frombuffer(packed[4 + 4 * count :], np.uint8)
                assert xxhash.xxh3_128(region.tobytes()).hexdigest() == checksums[name]
    held.flush()


def assert_holds(local, base, step):
    stored = ModelFolder(local)
    for name, tensor in whole(base, step).items():
        assert torch.equal(bits(stored.read(name)), bits(tensor)), name


def test_a_checkpoint_of_sglang_follows_a_run(base, tmp_path):
    source, out, local = tmp_path / "S", tmp_path / "out", tmp_path / "local"
    shutil.copytree(base, local)
    follow = ("follow", source, "--base", base, "--output", out, "--format", "sglang", "--once")
    follow += ("--cache-dir", tmp_path / "cache")
    with writer(source, base) as made:
        for number, step in enumerate((1, 2, 7), 1):
            made.publish(step, state(base, step))
            assert f"version {number}, step {step}" in liftdist(*follow)  # each a process that has not seen the last
            pull(out, local, number - 1, number)
            assert_holds(local, base, step)
        liftdist(*follow)  # nothing new
    assert sorted(path.name for path in out.iterdir()) == [f"weight_v{number:06d}" for number in (1, 2, 3)]
    full = version.path_of(source, 3) / version.FULL
    exported = tmp_path / "exported"
    liftdist(
        "export", full, "--base", base, "--format", "sglang", "--output", exported, "--cache-dir", tmp_path / "cache"
    )
    shutil.rmtree(local)
    shutil.copytree(base, local)
    pull(exported, local, 0, 1)
    assert_holds(local, base, 7)
    other = builders.llama(tmp_path / "other", dtype=torch.bfloat16, hidden_size=40)
    assert "no folder that this command has written" in liftdist(*follow[:2], "--base", other, *follow[4:], code=2)


def test_versions_of_one_stream_alone_follow_each_other(base, tmp_path):
    """What another run has changed would stay, without a checksum that tells."""
    out, cache = tmp_path / "out", ("--cache-dir", tmp_path / "cache")
    for name, steps, of in (
        ("A", (1, 2), "one"),
        ("B", (1,), "one"),
        ("C", (1, 2, 3), "other"),
        ("D", (1, 1, 1), "one"),
    ):
        with writer(tmp_path / name, base, stream=published.stream(base, id=of)) as made:
            for step in steps:
                made.publish(step, state(base, step))
    follow = ("follow", tmp_path / "A", "--base", base, "--output", out, "--format", "sglang", "--once", *cache)
    liftdist(*follow)
    for name in "BCD":
        said = liftdist(follow[0], tmp_path / name, *follow[2:], code=2)
        assert f"{out}: holds version 2 of mine, which version" in said
        assert "does not follow; give another --output, and load the base model again" in said
    with writer(tmp_path / "A", base) as made:
        made.publish(3, state(base, 3))
    assert "version 3, step 3" in liftdist(*follow)
    assert sorted(path.name for path in out.iterdir()) == ["weight_v000001", "weight_v000002"]


def test_what_the_layout_cannot_hold_is_refused(tmp_path):
    base = builders.llama(tmp_path / "base", dtype=torch.float16)  # neither half holds the other
    with writer(tmp_path / "S", base) as made:
        made.publish(1, published.state(base, 1))
    follow = ("follow", tmp_path / "S", "--base", base, "--output", tmp_path / "out", "--format", "sglang", "--once")
    said = liftdist(*follow, "--cache-dir", tmp_path / "cache", code=2)
    assert "the run trained values of torch.float32, and the format sglang keeps" in said
    assert list((tmp_path / "out").iterdir()) == []
