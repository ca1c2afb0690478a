"""Every criterion against a few dense lines, and on any number of ranks."""

import importlib

import pytest
import ranks
import torch
from plain_models import seven_layers

from liftdist import PrincipalWeights
from liftdist.engine.selection import seed_of
from liftdist.registry import CRITERIA
from liftdist.schema import SelectionConfig

RANK = 4


def low_rank(weight):
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return (u[:, :RANK] * s[:RANK]) @ vh[:RANK]


def largest(scores, k):
    return scores.flatten().argsort(descending=True, stable=True)[:k].sort().values


def block_means(scores, b):
    m, n = scores.shape
    means = torch.empty(m, n)
    for row in range(0, m, b):
        for column in range(0, n, b):
            block = scores[row : row + b, column : column + b]
            means[row : row + b, column : column + b] = block.mean()
    return means


def off_principal(weight, k):
    principal = largest(low_rank(weight).abs(), k)
    scores = -weight.abs().flatten()
    scores[principal] = -torch.inf
    return largest(scores, k)


DENSE = {  # (weight [m, n] float32, k) -> sorted flat indices
    "low_rank": lambda weight, k: largest(low_rank(weight).abs(), k),
    "magnitude": lambda weight, k: largest(weight.abs(), k),
    "smallest": lambda weight, k: largest(-weight.abs(), k),
    "low_rank_smallest": lambda weight, k: largest(-low_rank(weight).abs(), k),
    "residual": lambda weight, k: largest((weight - low_rank(weight)).abs(), k),
    "blocks": lambda weight, k: largest(block_means(low_rank(weight).abs(), 3), k),
    "off_principal": off_principal,
    "threshold": lambda weight, k: (weight.abs() < 0.02).flatten().nonzero().squeeze(1),
}
SETTINGS = {"blocks": dict(block_size=3), "threshold": dict(threshold=0.02), "random": dict(seed=5)}


def criterion(name):
    settings = SelectionConfig(density=0.1, filter_rank=RANK, method="exact", criterion=name, **SETTINGS.get(name, {}))
    return CRITERIA.load(name).make(settings)


def test_each_is_what_it_says():
    generator = torch.Generator().manual_seed(0)
    assert set(DENSE) == set(CRITERIA) - {"random"}
    for shape in ((31, 50), (64, 7), (12, 12)):
        weight = torch.randn(shape, generator=generator) / 20
        weight[3] = 0  # ties
        for name, dense in DENSE.items():
            for k in (1, weight.numel() // 10, weight.numel() // 3):
                found = criterion(name)(weight.clone(), k, seed=7)
                wanted = dense(weight, k)
                # scores that differ by rounding alone may change places
                assert len(set(found.tolist()) ^ set(wanted.tolist())) <= 2 * (name not in ("magnitude", "smallest")), (
                    name
                )
                assert found.dtype == torch.int64


def test_random_entries_are_spread_evenly_and_depend_on_the_seeds():
    weight = torch.zeros(100, 80)
    one = criterion("random")
    found = one(weight, 2000, seed=7)
    assert torch.equal(found, one(weight + 1, 2000, seed=7))
    assert not torch.equal(found, one(weight, 2000, seed=8))
    assert not torch.equal(found, type(one)(seed=6)(weight, 2000, seed=7))
    rows = torch.bincount(found // 80, minlength=100)
    assert 5 < rows.min() <= rows.max() < 45
    assert set(one(weight, 500, seed=7).tolist()) < set(found.tolist())


def test_values_that_are_not_finite_are_refused():
    weight = torch.ones(4, 4)
    weight[0, 0] = torch.nan
    for name in set(CRITERIA) - {"threshold"}:
        with pytest.raises(ValueError, match="weight holds NaN or infinity"):
            criterion(name)(weight, 3, 0)


def select_all(mesh):
    found = {}
    for name in CRITERIA:
        model = seven_layers(mesh, torch.bfloat16)
        principal = PrincipalWeights(
            model, density=0.1, criterion=criterion(name), replicate_group=mesh.replicate_group
        )
        found[name] = [
            (matrix.name, matrix.shape, (indices + matrix.offset_local).tolist(), count)
            for matrix, indices, count in zip(principal.matrices, principal.indices, principal.counts, strict=True)
        ]
    return found


@pytest.mark.parametrize(("world_size", "replicas"), [(1, 1), (3, 1), (4, 2)])
def test_sets_are_the_same_on_any_mesh(world_size, replicas):
    whole = {
        matrix.name: matrix for matrix in PrincipalWeights(seven_layers(dtype=torch.bfloat16), density=0.1).matrices
    }
    found = ranks.run(world_size, select_all, dp_replicate=replicas)
    shards = world_size // replicas
    for name in CRITERIA:
        for replica in range(replicas):
            mine = found[replica * shards : (replica + 1) * shards]
            for parts in zip(*(share[name] for share in mine), strict=True):
                matrix, shape, _, count = parts[0]
                indices = sorted(index for part in parts for index in part[2])
                number = round(0.1 * shape[0] * shape[1])
                wanted = criterion(name)(whole[matrix].rows_local.clone(), number, seed_of(matrix))
                assert indices == wanted.tolist(), (name, matrix)
                assert count == len(indices)


def test_modules_say_where_they_come_from():
    for name in CRITERIA:
        module = importlib.import_module(f"liftdist.engine.criteria.{name}")
        assert module.__doc__
        assert "S " in module.__doc__
