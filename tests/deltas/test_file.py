"""The file of a delta: small, and never believed when something is wrong with it."""

import json
import shutil

import builders
import pytest
import torch
from commands import liftdist
from safetensors.torch import save_file

from liftdist import safetensors_header, safetensors_io
from liftdist.deltas import codec
from liftdist.deltas import file as delta_file
from liftdist.errors import UserError
from liftdist.models import check


def test_a_changed_weight_costs_about_five_bytes(folders, deltas, tmp_path):
    weights_changed = sum(
        delta_file.read(deltas[0]).get(name).indices.numel() for name in delta_file.read(deltas[0]).names
    )
    assert weights_changed > 5000
    overhead = 4000  # names and offsets of 14 matrices
    assert (deltas[0].stat().st_size - overhead) / weights_changed <= 6.4
    liftdist("diff", *folders[:2], "--output", tmp_path / "slim", "--cache-dir", deltas[2], "--without-base")
    assert ((tmp_path / "slim").stat().st_size - overhead) / weights_changed <= 4.4
    out = tmp_path / "out"
    liftdist("apply", tmp_path / "slim", folders[0], "--output", out, "--cache-dir", deltas[2])
    assert builders.contents(out) == builders.contents(folders[1])
    copy = shutil.copytree(folders[0], tmp_path / "copy")
    said = liftdist("apply", tmp_path / "slim", copy, "--cache-dir", deltas[2], code=2)
    assert "holds no base values, so this could not be undone" in said
    assert "give --output" in said
    assert "cannot be undone" in liftdist("apply", tmp_path / "slim", out, "--undo", "--cache-dir", deltas[2], code=2)


def rewrite(path, target, metadata=None, **tensors):
    """A delta with other tensors or metadata, and the hash that goes with them."""
    import safetensors

    with safetensors.safe_open(path, "pt") as file:
        about, kept = dict(file.metadata()), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    kept |= tensors
    about |= {"sha256": safetensors_io.digest_of(sorted(kept.items()))} | (metadata or {})
    save_file(kept, target, about)
    return target


def test_a_delta_that_lacks_what_it_must_say_is_refused_in_one_line(tmp_path):
    tensors = {"a.gaps": torch.zeros(8, dtype=torch.uint8), "a.values": torch.ones(1)}
    tell = {"a": {"shape": [4], "stored": "F32", "count": 1}}
    about = {"format": delta_file.FORMAT, "base": "0" * 64, "tensors": json.dumps(tell)}
    about["sha256"] = safetensors_io.digest_of(sorted(tensors.items()))
    save_file(tensors, tmp_path / "whole", about)
    assert delta_file.read(tmp_path / "whole").names == ["a"]
    for number, damaged in enumerate(({key: about[key] for key in about.keys() - {"base"}}, about | {"tensors": "5"})):
        save_file(tensors, tmp_path / f"{number}", damaged)
        with pytest.raises(UserError, match="damaged, or not a delta: "):
            delta_file.read(tmp_path / f"{number}")
    content = (tmp_path / "whole").read_bytes()
    (tmp_path / "kind").write_bytes(content.replace(b'"F32"', b'"Uxx"', 1))
    with pytest.raises(UserError, match="kind has a damaged header: a.values has the dtype Uxx"):
        delta_file.read(tmp_path / "kind")


def test_what_is_wrong_with_a_delta_is_found_before_anything_is_written(folders, deltas, tmp_path):
    one, _, cache = deltas
    base = shutil.copytree(folders[0], tmp_path / "model")
    before = builders.contents(base)
    name = "model.layers.1.mlp.up_proj.weight"
    change = delta_file.read(one).get(name)
    values = change.values.clone()
    values[3] = torch.nan
    beyond = change.indices.clone()
    beyond[-1] = 100 * 203
    twice = codec.encode(change.indices)
    twice[1] = 0
    (tmp_path / "short").write_bytes(one.read_bytes()[:-1])
    (tmp_path / "empty").touch()
    flipped = bytearray(one.read_bytes())
    flipped[-100] ^= 4
    (tmp_path / "flipped").write_bytes(flipped)
    about = json.loads(safetensors_header.header(one)["__metadata__"]["tensors"])
    other_shape = {"tensors": json.dumps(about | {name: about[name] | {"shape": [100, 203]}})}
    renamed = {"tensors": json.dumps({key.replace("layers.1", "layers.7"): value for key, value in about.items()})}
    one_name = f"{name}.gaps"
    liftdist("compress", one, "--method", "t_switch", "--alpha", 0.5, "--output", tmp_path / "lossy")
    strange = []
    for kind, source in (("whole", one), ("lossy", tmp_path / "lossy")):
        told = json.loads(safetensors_header.header(source)["__metadata__"]["tensors"])
        for key, value in (
            ("shape", "wide"),
            ("shape", [[1], 2]),
            ("shape", [-100, 203]),
            ("shape", [2**40, 2**40]),
            ("stored", "F3"),
            ("stored", None),
            ("count", "all"),
            ("count", -1),
            ("count", 1e99),
            ("count", 2**80),
            ("scale", "x"),
            (None, "x"),
            (None, None),
            (None, {}),
        ):
            entry = value if key is None else told[name] | {key: value}
            if key != "scale" or kind == "lossy":
                text = {"tensors": json.dumps(told | {name: entry})}
                strange.append(rewrite(source, tmp_path / f"{kind}-{len(strange)}", text))
    for problem, path in (
        ("not a safetensors file|damaged|truncated", folders[0] / check.INDEX),
        ("No such file", tmp_path / "none"),
        ("is empty or truncated", tmp_path / "empty"),
        ("is another kind of safetensors file, not a delta", next(folders[0].glob("*.safetensors"))),
        ("short has", tmp_path / "short"),
        ("do not match the sha256", tmp_path / "flipped"),
        ("not finite", rewrite(one, tmp_path / "nan", **{f"{name}.values": values})),
        ("out of range", rewrite(one, tmp_path / "beyond", **{one_name: codec.encode(beyond)})),
        ("do not ascend", rewrite(one, tmp_path / "twice", **{one_name: twice})),
        (
            "number of indices|values for",
            rewrite(one, tmp_path / "few", **{one_name: codec.encode(change.indices[:-9])}),
        ),
        ("the delta is for", rewrite(one, tmp_path / "shape", other_shape)),
        ("damaged|layers.7", rewrite(one, tmp_path / "name", renamed)),
        ("is not the base model of", rewrite(one, tmp_path / "base", {"base": "0" * 64})),
        *((f"damaged, or not a delta: {name}: ", path) for path in strange),
    ):
        said = liftdist("apply", path, base, "--cache-dir", cache, code=2)
        assert any(part in said for part in problem.split("|")), (problem, said)
        assert len(said.splitlines()) == 1, said
        assert builders.contents(base) == before
        assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []
