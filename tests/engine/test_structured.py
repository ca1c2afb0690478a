"""Channels, halves and layers: what is trained, how it is drawn anew, on any mesh, and over a refresh."""

import collections
import itertools

import builders
import families
import pytest
import ranks
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from liftdist import PrincipalWeights
from liftdist.engine.budgets.half import Half
from liftdist.engine.budgets.layers import Layers
from liftdist.engine.criteria.channels import Channels
from liftdist.engine.sgd import PrincipalSGD
from liftdist.errors import UserError
from liftdist.model_settings import ModelConfig
from liftdist.models.load import load

LAYERS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return builders.llama(tmp_path_factory.mktemp("six"), num_hidden_layers=LAYERS)


def shapes_of(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {matrix.name: matrix.shape for matrix in PrincipalWeights(model, density=0.1).matrices}


def test_half_of_the_matrices_of_every_module(folder):
    shapes = shapes_of(folder)
    seen = collections.Counter()
    for refreshes in range(40):
        counts = Half(seed=3).allot(shapes, refreshes)
        assert counts == Half(seed=3).allot(dict(reversed(shapes.items())), refreshes)
        assert all(count in (0, m * n) for count, (m, n) in zip(counts.values(), shapes.values(), strict=True))
        modules = collections.Counter(name.rsplit(".", 2)[0] for name, count in counts.items() if count)
        assert {modules[f"model.layers.{i}.self_attn"] for i in range(LAYERS)} == {2}
        assert sorted(modules[f"model.layers.{i}.mlp"] for i in range(LAYERS)) == [1, 1, 1, 2, 2, 2]
        seen.update(name for name, count in counts.items() if count)
    assert set(seen) == set(shapes)
    assert 8 < min(seen.values()) <= max(seen.values()) < 32


def test_layers_are_trained_whole(folder):
    shapes = shapes_of(folder)
    drawn = set()
    for refreshes in range(30):
        counts = Layers(layers=2).allot(shapes, refreshes)
        trained = {name.split(".")[2] for name, count in counts.items() if count}
        assert len(trained) == 2
        assert sum(counts.values()) == sum(m * n for name, (m, n) in shapes.items() if name.split(".")[2] in trained)
        drawn.add(frozenset(trained))
    assert len(drawn) > 5
    with pytest.raises(UserError, match=r"selection.layers: must be at most 6"):
        Layers(layers=7).allot(shapes)


def test_channels_are_whole_and_shared_by_a_module(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    principal = PrincipalWeights(model, density=0.1, criterion=Channels(seed=1))
    found = {}
    for matrix, indices in zip(principal.matrices, principal.indices, strict=True):
        places = torch.zeros(matrix.shape, dtype=torch.bool)
        places.view(-1)[indices.long()] = True
        layer, kind = matrix.name.split(".")[2], matrix.name.split(".")[-2]
        along = places.T if kind in ("down_proj", "o_proj") else places
        assert int(along.any(1).sum()) <= int(along.all(1).sum()) + 1  # one channel in part
        found[layer, kind] = set(along.all(1).nonzero().squeeze(1).tolist())
    assert found["0", "gate_proj"] == found["0", "up_proj"]
    assert found["0", "down_proj"] == found["0", "up_proj"]
    assert found["0", "k_proj"] <= set(range(6))
    assert found["0", "up_proj"] != found["1", "up_proj"]


def test_heads_are_drawn_whole_and_the_same_for_readers(tmp_path):
    """Of grouped queries: q and o have six heads, k and v three."""
    heads = dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=3, head_dim=8, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(builders.llama(tmp_path, **heads))
    principal = PrincipalWeights(model, density=0.4, criterion=Channels(seed=1, block_size=8))
    found = {}
    for matrix, indices in zip(principal.matrices, principal.indices, strict=True):
        places = torch.zeros(matrix.shape, dtype=torch.bool)
        places.view(-1)[indices.long()] = True
        layer, kind = matrix.name.split(".")[2], matrix.name.split(".")[-2]
        along = (places.T if kind in ("down_proj", "o_proj") else places).sum(1)
        found[layer, kind] = along
        if "attn" in matrix.name:
            touched, whole = along.view(-1, 8) > 0, along.view(-1, 8) == places.numel() // len(along)
            assert int(touched.any(1).sum()) == int(whole.all(1).sum()) + 1  # 2.4 or 1.2 heads
            assert (touched.int().diff(dim=1) <= 0).all()  # of the last one the first channels
        else:
            assert (along > 0).int().diff().count_nonzero() > 10  # singly
    for layer in ("0", "1"):
        for one, other in (("q_proj", "o_proj"), ("k_proj", "v_proj"), ("up_proj", "down_proj")):
            assert torch.equal(found[layer, one], found[layer, other])
    assert not torch.equal(found["0", "q_proj"], found["1", "q_proj"])


def test_runs_that_are_no_heads_are_refused(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(UserError, match=r"_proj.weight: selection.block_size must divide its \d+ channels, got 5"):
        PrincipalWeights(model, density=0.1, criterion=Channels(block_size=5))


@pytest.mark.parametrize(
    ("family", "module", "settings"),
    [
        ("gpt2", "*.mlp.*", dict(n_embd=32, n_layer=1, n_head=4)),
        (
            "gpt_oss",
            "*.experts.*",
            dict(hidden_size=32, intermediate_size=24, num_local_experts=2, num_hidden_layers=1),
        ),
    ],
)
def test_channels_are_those_of_hidden_units_where_weights_are_stored_transposed(family, module, settings):
    """What the trained weights of a module write and read is the same hidden units, whole but one."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=64, **settings))
    principal = PrincipalWeights(model, density=0.1, modules=[module], criterion=Channels(seed=1))
    units = collections.defaultdict(list)
    for matrix, indices in zip(principal.matrices, principal.indices, strict=True):
        places = torch.zeros(matrix.shape, dtype=torch.bool)
        places.view(-1)[indices.long()] = True
        of, kind = matrix.name.rsplit(".", 2)[:2]
        along = places if kind in ("c_proj", "down_proj") else places.T  # [hidden units, ...] of a transposed matrix
        assert int(along.any(1).sum()) <= int(along.all(1).sum()) + 1
        units[of].append(set(along.all(1).nonzero().squeeze(1).tolist()))
    assert all(found and all(one == found[0] and len(one) >= 2 for one in found) for found in units.values())


@pytest.mark.parametrize(
    ("family", "refusal"),
    [
        ("phi3", r"self_attn.qkv_proj: makes 64 channels, where 32 are read.*leave it out of selection.modules"),
        ("gpt2", r"attn.c_attn: makes 96 channels, where 32 are read"),
        ("rwkv", r"feed_forward: key, receptance, value: which of them reads the others is not known"),
    ],
)
def test_modules_without_channels_of_their_own_are_refused(tmp_path, family, refusal):
    with pytest.raises(UserError, match=refusal):
        PrincipalWeights(families.plain(families.make(tmp_path, family)), density=0.1, criterion=Channels())


def global_indices(principal):
    """The trained entries of this rank's rows, of each matrix."""
    pairs = zip(principal.matrices, principal.indices, strict=True)
    return [(indices + matrix.offset_local).tolist() for matrix, indices in pairs]


def train(mesh, folder):
    """For each choice: what is trained after each refresh, and the sums of the weights."""
    found = []
    for settings in (
        dict(budget=Half()),
        dict(budget=Layers(layers=1)),
        dict(density=0.1, criterion=Channels(seed=1)),
        dict(density=0.3, criterion=Channels(seed=1, block_size=2)),
    ):
        model, _ = load(folder, ModelConfig(path=str(folder), dtype="float32"), mesh)
        principal = PrincipalWeights(model, replicate_group=mesh.replicate_group, **settings)
        optimizer = PrincipalSGD(principal, lr=0.1)
        drawn = [global_indices(principal)]
        for step in range(3):
            model(input_ids=torch.arange(8)[None] + step, labels=torch.arange(8)[None]).loss.backward()
            principal.reduce_gradients(mesh.world_size)  # load() makes FSDP sum
            optimizer.step()
            principal.refresh(optimizer)
            drawn.append(global_indices(principal))
        weights = [param.full_tensor().detach() for param in model.parameters()]
        found.append((drawn, [float(weight.double().sum()) for weight in weights]))
    return found


def test_they_are_drawn_alike_on_any_mesh(folder):
    alone = ranks.run(1, train, folder)[0]
    for world_size, replicas in ((2, 1), (3, 1), (4, 2)):
        found = ranks.run(world_size, train, folder, dp_replicate=replicas)
        shards = world_size // replicas
        for number, (drawn, sums) in enumerate(alone):
            for replica in range(replicas):
                mine = [rank[number][0] for rank in found[replica * shards : (replica + 1) * shards]]
                whole = [
                    [sorted(itertools.chain(*parts)) for parts in zip(*one, strict=True)]
                    for one in zip(*mine, strict=True)
                ]
                assert whole == drawn
            assert found[0][number][1] == pytest.approx(sums, rel=1e-4)
    for drawn, _ in alone[:2]:
        assert len({tuple(map(len, one)) for one in drawn}) >= 3
    assert all(one == drawn[0] for drawn, _ in alone[2:] for one in drawn)
