"""Every criterion against a few dense lines, and on any number of ranks."""

import importlib

import pytest
import ranks
import torch
from plain_models import seven_layers

from liftdist import PrincipalWeights
from liftdist.engine.selection import seed_of
from liftdist.errors import UserError
from liftdist.method_settings import SelectionConfig
from liftdist.registry import CRITERIA

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
DRAWN = {"random"}
# tests/methods/test_named.py, test_structured.py, tests/whole_runs/test_by_gradients.py
ELSEWHERE = {"file", "channels", "gradient", "sensitivity", "spiel"}
SETTINGS = {"blocks": dict(block_size=3), "threshold": dict(threshold=0.02), "random": dict(seed=5)}


def criterion(name):
    settings = SelectionConfig(density=0.1, filter_rank=RANK, method="exact", criterion=name, **SETTINGS.get(name, {}))
    return CRITERIA.load(name).make(settings)


def test_each_is_what_it_says():
    generator = torch.Generator().manual_seed(0)
    assert set(DENSE) == set(CRITERIA) - DRAWN - ELSEWHERE
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
    for name in set(CRITERIA) - ELSEWHERE - {"threshold"}:
        with pytest.raises(ValueError, match="weight holds NaN or infinity"):
            criterion(name)(weight, 3, 0)


def test_excluded_entries_are_left_out_and_the_next_ones_taken():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(31, 50, generator=generator) / 20
    weight[3] = 0  # ties
    excluded = torch.randperm(1550, generator=generator)[:600].sort().values
    kept = set(range(1550)) - set(excluded.tolist())
    for name in set(DENSE) - {"threshold", "off_principal"}:  # of which the order does not depend on how many are taken
        order = [set(DENSE[name](weight, k).tolist()) & kept for k in range(0, 1551, 5)]
        for k in (1, 155, 949, 950):
            found = set(criterion(name)(weight.clone(), k, 7, excluded).tolist())
            assert len(found) == k
            assert found <= kept
            few, many = (next(part for part in order if len(part) >= least) for least in (k - 5, k))
            rounding = 2 * (name not in ("magnitude", "smallest"))
            assert len(few - found) <= rounding, name
            assert len(found - many) <= rounding, name
        with pytest.raises(ValueError, match="num_selected must be 0 to 950"):
            criterion(name)(weight, 951, 7, excluded)
    principal = set(DENSE["low_rank"](weight, 155).tolist())
    others = criterion("off_principal")(weight, 155, 7, excluded).tolist()
    assert not principal & set(others)
    assert max(weight.flatten()[others].abs()) == sorted(weight.flatten()[list(kept - principal)].abs())[154]


def some(matrix):
    """A third of a matrix, by its name."""
    generator = torch.Generator().manual_seed(seed_of(matrix.name))
    return torch.randperm(matrix.numel, generator=generator)[: matrix.numel // 3].sort().values


def select_all(mesh):
    found = {}
    for name in set(CRITERIA) - ELSEWHERE:
        model = seven_layers(mesh, torch.bfloat16)
        principal = PrincipalWeights(
            model, density=0.1, criterion=criterion(name), replicate_group=mesh.replicate_group
        )
        found[f"{name}, excluding"] = excluding(mesh, criterion(name))
        found[name] = [
            (matrix.name, matrix.shape, (indices + matrix.offset_local).tolist(), count)
            for matrix, indices, count in zip(principal.matrices, principal.indices, principal.counts, strict=True)
        ]
    return found


def excluding(mesh, rule):
    principal = PrincipalWeights(
        seven_layers(mesh, torch.bfloat16),
        density=0.1,
        criterion=rule,
        excluded=some,
        replicate_group=mesh.replicate_group,
    )
    principal.refresh()
    principal.check_excluded()
    pairs = zip(principal.matrices, principal.indices, strict=True)
    return [(matrix.name, matrix.shape, (indices + matrix.offset_local).tolist(), 0) for matrix, indices in pairs]


@pytest.mark.parametrize(("world_size", "replicas"), [(1, 1), (2, 1), (3, 1), (4, 2)])
def test_sets_are_the_same_on_any_mesh(world_size, replicas):
    whole = {
        matrix.name: matrix for matrix in PrincipalWeights(seven_layers(dtype=torch.bfloat16), density=0.1).matrices
    }
    found = ranks.run(world_size, select_all, dp_replicate=replicas)
    shards = world_size // replicas
    for name in set(CRITERIA) - ELSEWHERE:
        for replica in range(replicas):
            mine = found[replica * shards : (replica + 1) * shards]
            for parts in zip(*(share[name] for share in mine), strict=True):
                matrix, shape, _, count = parts[0]
                indices = sorted(index for part in parts for index in part[2])
                number = round(0.1 * shape[0] * shape[1])
                wanted = criterion(name)(whole[matrix].rows_local.clone(), number, seed_of(matrix))
                assert indices == wanted.tolist(), (name, matrix)
                assert count == len(indices)
            for parts in zip(*(share[f"{name}, excluding"] for share in mine), strict=True):
                matrix, shape, *_ = parts[0]
                indices = sorted(index for part in parts for index in part[2])
                left_out, weight = some(whole[matrix]), whole[matrix].rows_local.clone()
                if name == "threshold":
                    wanted = sorted(set(DENSE[name](weight.float(), 0).tolist()) - set(left_out.tolist()))
                else:
                    number = round(0.1 * shape[0] * shape[1])
                    wanted = criterion(name)(weight, number, seed_of(matrix), left_out).tolist()
                assert indices == wanted, (name, matrix)
                assert not set(indices) & set(left_out.tolist())


def test_too_few_entries_that_are_not_excluded():
    """A matrix trains what is left; a function without scores, and weights that were trained before, are refused."""

    def but_ten(matrix):
        return torch.arange(matrix.numel - 10) if matrix.name == "m1.weight" else torch.empty(0, dtype=torch.int64)

    principal = PrincipalWeights(seven_layers(), density=0.1, criterion=criterion("magnitude"), excluded=but_ten)
    asked = [round(0.1 * matrix.numel) for matrix in principal.matrices]
    assert principal.counts == [10 if number == 1 else count for number, count in enumerate(asked)]
    assert principal.indices[1].tolist() == list(range(principal.matrices[1].numel - 10, principal.matrices[1].numel))
    rule = criterion("magnitude")
    with pytest.raises(UserError, match=r"m1.weight: only a criterion with scores"):
        PrincipalWeights(seven_layers(), density=0.1, criterion=lambda w, k, s: rule(w, k, s), excluded=but_ten)
    first = PrincipalWeights(seven_layers(), density=0.1, criterion=rule)
    first.selector.excluded = lambda matrix: torch.tensor(
        [int(first.indices[2][0])] if matrix.name == "m2.weight" else [0]
    )[:1]
    with pytest.raises(UserError, match="weights that are to be excluded have been trained already"):
        first.check_excluded()


class Turns:
    """Each refresh selects other entries: a criterion of your own that draws anew."""

    def of(self, matrix, refreshes):
        return lambda weight, k, seed: (torch.arange(k) + refreshes * k) % weight.numel()


def test_a_criterion_may_depend_on_the_matrix_and_on_the_refresh():
    principal = PrincipalWeights(seven_layers(), density=0.1, criterion=Turns())
    for number in (1, 2):
        principal.refresh()
        assert [int(found[0]) for found in principal.indices] == [number * count for count in principal.counts]
    principal.refresh(number=7)
    assert principal.indices[0][0] == 7 * principal.counts[0]
    principal.refresh()
    assert principal.indices[0][0] == 8 * principal.counts[0]


def test_modules_say_where_they_come_from():
    for name in CRITERIA:
        module = importlib.import_module(f"liftdist.engine.criteria.{name}")
        assert module.__doc__
        assert "S " in module.__doc__
