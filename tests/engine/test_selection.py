"""The selection of a sharded model is that of a whole one."""

from unittest import mock

import pytest
import ranks
import torch
from plain_models import seven_layers
from torch import nn
from torch.distributed.tensor import Shard

from liftdist import PrincipalWeights
from liftdist.distributed.collectives import gather, together
from liftdist.engine import selection
from liftdist.engine.matrices import Matrix
from liftdist.errors import UserError
from liftdist.runs import selections


def whole_selection(mesh, folder):
    model = seven_layers(mesh, torch.bfloat16)
    kept = {}
    principal = PrincipalWeights(
        model, density=0.1, filter_rank=4, replicate_group=mesh.replicate_group, on_selected=kept.__setitem__
    )
    target = folder / f"{mesh.world_size}-{mesh.device_mesh.size(0)}"
    selections.write(target, kept)
    read_back = selections.read(target, principal.matrices, principal.counts)
    assert all(torch.equal(a, b) for a, b in zip(read_back, principal.indices, strict=True))
    assert all(indices.dtype == torch.int32 for indices in principal.indices)
    gather("read")
    with together():  # a damaged selection is replaced
        if mesh.is_main:
            (target / "selection.json").write_text("{}")
    assert selections.write(target, kept)
    read_back = selections.read(target, principal.matrices, principal.counts)
    assert all(torch.equal(a, b) for a, b in zip(read_back, principal.indices, strict=True))
    files = sorted(path.name for path in target.parent.iterdir() if path.name.startswith("."))
    return {
        m.name: (i + m.offset_local).tolist() for m, i in zip(principal.matrices, principal.indices, strict=True)
    }, files


@pytest.mark.parametrize(("world_size", "replicas"), [(1, 1), (2, 1), (3, 1), (4, 1), (4, 2), (2, 2), (3, 3)])
def test_selection_is_the_same_on_any_mesh(world_size, replicas, tmp_path):
    alone = PrincipalWeights(seven_layers(dtype=torch.bfloat16), density=0.1, filter_rank=4)
    expected = {m.name: i.tolist() for m, i in zip(alone.matrices, alone.indices, strict=True)}
    found = ranks.run(world_size, whole_selection, tmp_path, dp_replicate=replicas)
    shards = world_size // replicas
    for replica in range(replicas):
        mine = [found[replica * shards + shard][0] for shard in range(shards)]
        assert {name: sorted(index for share in mine for index in share[name]) for name in expected} == expected
    assert all(not left for _, left in found)  # no temporary folder stays
    # what one world size wrote, another reads
    folder = tmp_path / f"{world_size}-{replicas}"
    assert [i.tolist() for i in selections.read(folder, alone.matrices, alone.counts)] == list(expected.values())


def not_finite(mesh):
    model = seven_layers(mesh)
    with torch.no_grad():
        rows = model.m3.weight.to_local()
        if mesh.rank == mesh.world_size - 1:
            rows[-1, -1] = torch.inf
    try:
        PrincipalWeights(model, density=0.1, filter_rank=4)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def test_weights_that_are_not_finite_are_named_on_every_rank():
    outcomes = ranks.run(3, not_finite)
    assert all("m3.weight: weight holds NaN or infinity" in text for _, text in outcomes)
    assert {kind for kind, _ in outcomes} == {"UserError"}


def lacking_memory(mesh):
    model, received = seven_layers(mesh), Matrix.received

    def lacks(matrix, *given):
        if mesh.rank == 1:
            raise torch.OutOfMemoryError("no room for a matrix")
        return received(matrix, *given)

    with mock.patch.object(Matrix, "received", lacks):
        try:
            PrincipalWeights(model, density=0.1, filter_rank=4)
        except Exception as error:
            return str(error)
    return None


def test_one_that_has_no_room_for_a_matrix_leaves_no_one_waiting():
    assert all("no room for a matrix" in text for text in ranks.run(3, lacking_memory, timeout=60))


@pytest.mark.parametrize("ranks_", [1, 2, 3, 8, 64])
def test_dealing_is_balanced(ranks_):
    costs = [3.0, 1.0, 1.0, 3.0, 0.5, 2.0, 2.0] * 32
    owners = selection.assign_owners(costs, ranks_)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in range(ranks_)]
    if len(costs) >= 4 * ranks_:
        assert max(loads) <= 1.1 * max(sum(costs) / ranks_, max(costs))
    assert selection.assign_owners([], 3) == []


def columns(mesh):
    from torch.distributed.tensor import distribute_tensor

    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh.shard_mesh, [Shard(1)]))
    try:
        PrincipalWeights(model, density=0.1)
    except ValueError as error:
        return str(error)
    return ""


def test_sharding_by_columns_is_refused():
    assert all("0.weight: must be sharded by rows" in text for text in ranks.run(2, columns))


def test_a_criterion_needs_neither_cost_nor_workspace():
    """The rest has defaults: a plain function selects, is planned for, and is not asked about weights that are not finite."""

    def first(weight, num_selected, seed):
        return torch.arange(num_selected)

    model = torch.nn.Sequential(torch.nn.Linear(10, 6, bias=False), torch.nn.Linear(6, 8, bias=False))
    principal = PrincipalWeights(model, density=0.1, criterion=first)
    assert [indices.tolist() for indices in principal.indices] == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4]]
    assert selection.workspace_of(first, 10, 6, 6) == 16 * 60
    broken = torch.nn.Sequential(torch.nn.Linear(10, 6, bias=False))
    with torch.no_grad():
        broken[0].weight[2, 3] = torch.nan
    with pytest.raises(UserError, match=r"0\.weight: weight holds NaN or infinity"):
        PrincipalWeights(broken, density=0.1, criterion=first)
