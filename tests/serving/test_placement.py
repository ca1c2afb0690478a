"""The weights of a delta are found in a model as its own loader lays it out, and exchanged there to the bit."""

import dataclasses
import shutil

import builders
import pytest
import torch
from commands import liftdist
from safetensors.torch import load_file
from torch import nn

from liftdist.deltas import file as delta_file
from liftdist.errors import UserError
from liftdist.serving import placement

PACKED = dict(q_proj=("qkv", 0), k_proj=("qkv", 1), v_proj=("qkv", 2), gate_proj=("gate_up", 0), up_proj=("gate_up", 1))


class Packed(nn.Module):
    """Weights as servers keep them: projections of equal inputs in one matrix, a part of the rows or columns on each rank, some
    transposed; and a loader that writes what lies in a checkpoint there."""

    def __init__(self, tensors, rank=0, ranks=1, dtype=torch.bfloat16):
        super().__init__()
        self.rank, self.ranks = rank, ranks
        sizes = {}
        for name, tensor in tensors.items():
            own, part = self.place(name)
            sizes.setdefault(own, {})[part] = self.share(name, tensor).shape
        self.weights = nn.ParameterDict()
        self.starts = {}
        for own, parts in sizes.items():
            rows = 0
            for part in sorted(parts):
                self.starts[own, part] = rows
                rows += parts[part][0]
            self.weights[own.replace(".", "/")] = nn.Parameter(
                torch.full((rows, *parts[part][1:]), 7.0, dtype=dtype), requires_grad=False
            )
        self.load_weights(tensors.items())

    def place(self, name):
        for kind, (packed, part) in PACKED.items():
            if kind in name:
                return name.replace(kind, packed), part
        return name, 0

    def share(self, name, tensor):
        if "o_proj" in name or "down_proj" in name:
            return tensor.chunk(self.ranks, 1)[self.rank].t()
        return tensor.chunk(self.ranks, 0)[self.rank] if "_proj" in name else tensor

    def parameter(self, name):
        return self.weights[self.place(name)[0].replace(".", "/")]

    def load_weights(self, weights):
        for name, tensor in weights:
            own, part = self.place(name)
            share = self.share(name, tensor)
            start = self.starts[own, part]
            target = self.weights[own.replace(".", "/")].data[start : start + len(share)]
            assert target.shape == share.shape
            if "o_proj" in name:
                target.t().copy_(share.t())
            elif "up_proj" in name:
                target[:] = share
            else:
                target.copy_(share)


class Replicating(Packed):
    """With values that every rank holds, as of few heads on many ranks."""

    def share(self, name, tensor):
        return tensor if "v_proj" in name else super().share(name, tensor)


@pytest.fixture(scope="module")
def made(tmp_path_factory, smollm2):
    """A base model, two others made from it, and their deltas."""
    folder = tmp_path_factory.mktemp("placement")
    base = builders.llama(
        folder / "base", dtype=torch.bfloat16, hidden_size=60, num_attention_heads=6, num_key_value_heads=3
    )
    for seed, name in enumerate(("one", "two")):
        builders.changed_copy(base, folder / name, seed)
        liftdist("diff", base, folder / name, "--output", folder / f"{name}.delta", "--cache-dir", folder / "cache")
    tensors = {name: load_file(folder / name / "model.safetensors") for name in ("base", "one", "two")}
    return folder, tensors, [delta_file.read(folder / f"{name}.delta") for name in ("one", "two")]


def same(model, other):
    return all(torch.equal(own, other.weights[name]) for name, own in model.weights.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_delta_applied_undone_and_swapped_gives_the_model_that_the_loader_makes(made, ranks, dtype):
    _, tensors, (one, two) = made
    found, shares = 0, []
    for rank in range(ranks):
        of = {name: Packed(tensors[name], rank, ranks, dtype) for name in tensors}
        model = Packed(tensors["base"], rank, ranks, dtype)
        (first, counts), (second, _) = placement.place(model, one), placement.place(model, two)
        assert same(model, of["base"])  # finding writes nothing
        assert placement.holds(first, "base")
        assert placement.holds(second, "base")
        assert not placement.holds(first, "values")
        placement.write(first, "values")
        assert same(model, of["one"])
        assert not same(model, of["base"])
        assert placement.holds(first, "values")
        assert not placement.holds(first, "base")
        placement.write(first, "base")
        placement.write(second, "values")
        assert same(model, of["two"])
        placement.write(second, "base")
        assert same(model, of["base"])
        found += sum(len(part.index) for part in first)
        shares.append(counts)
    assert found >= placement.check_found("one", shares) == sum(one.get(name).indices.numel() for name in one.names)
    assert ranks > 1 or found == placement.check_found("one", shares)


def refusal(model, delta):
    before = {name: weight.clone() for name, weight in model.weights.items()}
    with pytest.raises(UserError) as raised:
        placement.place(model, delta)
    assert all(torch.equal(weight, before[name]) for name, weight in model.weights.items())
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    "load",
    [
        lambda target, source: target.fill_(source.nan_to_num().max()),
        lambda target, source: target.add_(source),
        lambda target, source: target.view(-1).index_put_((torch.arange(target.numel()),), source.flatten()),
        lambda target, source: torch.mul(source, 2, out=target),
        lambda target, source: target.copy_(source[:1]),
    ],
)
def test_a_loader_that_writes_in_another_way_is_refused_before_it_writes(made, load):
    _, tensors, (one, _) = made
    model = Packed(tensors["base"])

    def load_weights(weights):
        for name, tensor in weights:
            if "down_proj" in name:
                load(model.parameter(name).data.t(), tensor)

    model.load_weights = load_weights
    assert "liftdist export --format hf" in refusal(model, one)


def test_weights_that_a_kernel_has_packed_away_are_refused(made):
    _, tensors, (one, _) = made
    model = Packed(tensors["base"])
    for name in list(model.weights):
        if "down_proj" in name:
            model.weights[name] = nn.Parameter(torch.empty(0), requires_grad=False)
    assert "in another form than the checkpoint" in refusal(model, one)


@pytest.mark.parametrize("ranks", [1, 3])
def test_weights_that_the_loader_leaves_out_are_missed(made, ranks, monkeypatch):
    """Also where others, that several ranks hold, are more than those."""
    monkeypatch.setattr(
        placement, "_STAGED", 1
    )  # a group is one tensor, as in models of more than a few million weights
    _, tensors, (one, _) = made
    shares = []
    for rank in range(ranks):
        model = Replicating(tensors["base"], rank, ranks)
        load = model.load_weights
        model.load_weights = lambda weights, load=load: load(
            (name, tensor) for name, tensor in weights if "layers.1.self_attn.k" not in name
        )
        placed, counts = placement.place(model, one)
        assert sum(len(part.index) for part in placed) == sum(count.placed for count in counts)
        shares.append(counts)
    total = sum(count.placed for share in shares for count in share)
    assert (total >= sum(count.weights for count in shares[0])) == (ranks > 1)
    with pytest.raises(UserError, match=r"one: .*layers\.1\.self_attn\.k_proj\.weight: .* places 0 of \d+ weights"):
        placement.check_found("one", shares)


def test_a_model_that_is_given_other_weights_later_is_found_out(made):
    _, tensors, (one, _) = made
    model = Packed(tensors["base"])
    placed, _ = placement.place(model, one)
    placement.check_in_use(model, placed)
    name = next(name for name in model.weights if "qkv" in name)
    model.weights[name] = nn.Parameter(model.weights[name] + 1, requires_grad=False)
    with pytest.raises(UserError, match="restart it"):
        placement.check_in_use(model, placed)
    model = Packed(tensors["two"])
    assert not placement.holds(placement.place(model, one)[0], "base")


def test_values_that_the_engine_would_round_are_refused(made):
    _, tensors, (one, _) = made

    def in_float32(step):
        def get(name):
            change = one.get(name)
            return dataclasses.replace(change, values=change.values.float() * (1 + step), base=change.base.float())

        return dataclasses.replace(one, get=get)

    said = refusal(Packed(tensors["base"]), in_float32(2**-12))
    assert "torch.bfloat16 does not hold the delta's values of torch.float32" in said
    model = Packed(tensors["base"])
    placed, _ = placement.place(model, in_float32(0))  # none needs more digits
    placement.write(placed, "values")
    assert same(model, Packed(tensors["one"]))


def test_what_cannot_be_told_from_unchanged_weights_or_undone_is_refused(made, tmp_path):
    folder, tensors, (one, _) = made
    model = Packed(tensors["base"])

    def altered(alter):
        return dataclasses.replace(one, get=lambda name: alter(one.get(name)))

    nan = altered(lambda change: dataclasses.replace(change, base=change.base * float("nan")))
    whole = altered(lambda change: dataclasses.replace(change, values=change.values.to(torch.int32)))
    for delta in (nan, whole):
        assert "in another form" in refusal(model, delta)
    bare = shutil.copytree(folder / "one", tmp_path / "one") and tmp_path / "bare.delta"
    liftdist(
        "diff", folder / "base", folder / "one", "--output", bare, "--without-base", "--cache-dir", folder / "cache"
    )
    assert "--without-base" in refusal(model, delta_file.read(bare))
