"""Budgets that divide a sum: by patterns, and by one threshold for the scores of all matrices."""

import fractions

import pytest
import ranks
import torch
from plain_models import seven_layers

from liftdist import PrincipalWeights
from liftdist.engine.apportion import apportion
from liftdist.engine.budgets.by_pattern import ByPattern
from liftdist.engine.budgets.global_threshold import GlobalThreshold
from liftdist.engine.budgets.sensitivity import Sensitivity
from liftdist.engine.criteria.magnitude import Magnitude
from liftdist.engine.criteria.smallest import Smallest
from liftdist.errors import UserError

SHAPES = {"a.up.weight": (30, 50), "a.down.weight": (50, 30), "b.up.weight": (10, 20), "b.down.weight": (20, 10)}


def test_numbers_are_proportional_and_sum_to_the_whole():
    assert apportion(10, [1, 1, 1], [9, 9, 9]) == [4, 3, 3]
    assert apportion(10, [2, 1, 0], [4, 9, 9]) == [4, 6, 0]
    assert apportion(7, [1, 2, 4], [1, 2, 4]) == [1, 2, 4]
    assert apportion(0, [1, 2], [5, 5]) == [0, 0]
    with pytest.raises(ValueError, match="asked for 5 weights, but only 4 may be taken"):
        apportion(5, [1, 0], [4, 9])
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        weights = torch.rand(6, generator=generator).tolist()
        caps = torch.randint(1, 40, (6,), generator=generator).tolist()
        total = int(torch.randint(0, sum(caps) + 1, (1,), generator=generator))
        found = apportion(total, weights, caps)
        assert sum(found) == total
        assert all(0 <= number <= cap for number, cap in zip(found, caps, strict=True))
        free = [i for i, (number, cap) in enumerate(zip(found, caps, strict=True)) if number < cap]
        for i in free:  # one factor for all that are not at their cap
            for j in free:
                ratio = fractions.Fraction(weights[i]) / fractions.Fraction(weights[j])
                assert abs(found[i] - found[j] * ratio) <= 1 + ratio


def test_shares_by_pattern():
    density = ByPattern(density=0.1, shares=(("*.down", 0.2), ("a.*", 0), ("*", 0.1)))
    counts = density.allot(SHAPES)
    assert sum(counts.values()) == 340
    assert counts == {"a.up.weight": 0, "a.down.weight": 283, "b.up.weight": 19, "b.down.weight": 38}
    # what fits no pattern keeps its share before all are scaled
    assert ByPattern(density=0.1, shares=(("*.down", 0.1),)).allot(SHAPES) == {
        name: round(0.1 * m * n) for name, (m, n) in SHAPES.items()
    }
    # a full matrix gives the rest to the others
    full = ByPattern(density=0.5, shares=(("b.*", 1), ("*", 0.01))).allot(SHAPES)
    assert full["b.up.weight"] == full["b.down.weight"] == 200
    assert sum(full.values()) == 1700
    with pytest.raises(UserError, match=r"selection.shares: \*.gate fits no trained module; one is named a.up"):
        ByPattern(density=0.1, shares=(("*.gate", 1),)).allot(SHAPES)
    with pytest.raises(UserError, match=r"asked for 1700 weights, but only 200 may be taken; raise a share"):
        ByPattern(density=0.5, shares=(("b.up", 1), ("*", 0))).allot(SHAPES)


def model_of_scales(mesh=None):
    """Seven matrices of which some are flat, some have outliers."""
    model = seven_layers(mesh, torch.bfloat16)
    with torch.no_grad():
        for number, param in enumerate(model.parameters()):
            local = param.to_local() if mesh is not None else param
            local.mul_(3.0**number)
            if number % 2:
                local.pow_(3)
    return model


def outliers(matrix):
    """The largest hundred entries of the first matrix, and all but twenty of the second."""
    weight = next(param.detach().float() for name, param in model_of_scales().named_parameters() if name == matrix.name)
    number = {"m0.weight": 100, "m1.weight": matrix.numel - 20}.get(matrix.name, 0)
    return weight.abs().flatten().argsort(descending=True, stable=True)[:number].sort().values


def divided(mesh):
    model = model_of_scales(mesh)
    principal = PrincipalWeights(
        model, criterion=Magnitude(), budget=GlobalThreshold(density=0.1), replicate_group=mesh.replicate_group
    )
    again = PrincipalWeights(
        model_of_scales(mesh), criterion=Magnitude(), density=0.1, replicate_group=mesh.replicate_group
    )
    excluding = PrincipalWeights(
        model_of_scales(mesh),
        criterion=Magnitude(),
        budget=GlobalThreshold(density=0.1),
        excluded=outliers,
        replicate_group=mesh.replicate_group,
    )
    return principal.counts, again.counts, [indices.numel() for indices in principal.indices], excluding.counts


@pytest.mark.parametrize(("world_size", "replicas"), [(1, 1), (2, 1), (3, 1), (4, 2)])
def test_one_threshold_for_all_matrices(world_size, replicas):
    """The same numbers on any mesh: those of the largest entries of all matrices, each in units of its root mean square."""
    matrices = [param.detach().float() for param in model_of_scales().parameters()]
    scores = [matrix.abs() / matrix.double().square().mean().sqrt().float() for matrix in matrices]
    total = sum(round(0.1 * matrix.numel()) for matrix in matrices)
    kept = [matrix.flatten().abs().sort().values for matrix in matrices]
    kept[:2] = kept[0][:-100], kept[1][:20]
    kept = [matrix / matrix.double().square().mean().sqrt().float() for matrix in kept]
    least = torch.cat(kept).sort(descending=True).values[total - 1]
    threshold = torch.cat([score.flatten() for score in scores]).sort(descending=True).values[total - 1]
    wanted = [int((score >= threshold).sum()) for score in scores]
    found = ranks.run(world_size, divided, dp_replicate=replicas)
    for counts, own, _, excluding in found:
        assert sum(excluding) == total
        assert excluding[1] <= 20
        beside = [int(((part / least).log2().abs() < 2**-7).sum()) for part in kept]
        assert all(abs(a - int((part >= least).sum())) <= b for a, part, b in zip(excluding, kept, beside, strict=True))
        assert sum(counts) == total
        assert own == [round(0.1 * matrix.numel()) for matrix in matrices]
        inside = [
            int(((score / threshold).log2().abs() < 2**-7).sum()) for score in scores
        ]  # in the bucket, or beside it
        assert all(abs(a - b) <= c for a, b, c in zip(counts, wanted, inside, strict=True))
        assert max(counts) > 1.5 * min(own)
    shards = world_size // replicas
    assert [sum(local) for local in zip(*(one[2] for one in found[:shards]), strict=True)] == found[0][0]


def test_scores_that_cannot_be_compared_are_refused():
    with pytest.raises(UserError, match=r"the scores of Smallest\(\) are no magnitudes"):
        PrincipalWeights(seven_layers(), criterion=Smallest(), budget=GlobalThreshold(density=0.1))


def in_proportion(mesh):
    found = []
    for excluded in (None, outliers):
        principal = PrincipalWeights(
            model_of_scales(mesh),
            criterion=Magnitude(),
            budget=Sensitivity(density=0.1, final_density=0.02, final_refresh=2),
            excluded=excluded,
            replicate_group=mesh.replicate_group,
        )
        counts = [principal.counts]
        for _ in range(3):
            principal.refresh()
            counts.append(principal.counts)
        found.append(counts)
    return found


def test_matrices_without_scores_take_what_others_cannot():
    divide = Sensitivity(density=0.1).divide
    assert divide([80, 80], [1, 0], [100, 100]) == [100, 60]
    assert divide([80, 80], [0, 0], [100, 60]) == [100, 60]
    assert divide([50, 50, 50], [0, 2, 0], [90, 60, 180]) == [30, 60, 60]
    assert divide([20, 20], [1, 0], [100, 100]) == [40, 0]
    assert divide([80, 80], [0, 0], [100, 100]) == [80, 80]
    assert divide([80, 80], [1, 0], [100, 20]) == [100, 20]  # of which more are excluded


@pytest.mark.parametrize(("world_size", "replicas"), [(1, 1), (2, 1), (3, 1), (4, 2)])
def test_in_proportion_to_sums_of_scores(world_size, replicas):
    matrices = [param.detach().float().abs() for param in model_of_scales().parameters()]
    sizes = [matrix.numel() for matrix in matrices]
    first, last = (sum(round(density * size) for size in sizes) for density in (0.1, 0.02))
    totals = [first, round(last + (first - last) / 8), last, last]
    left_out = [100, sizes[1] - 20, *[0] * 5]
    kept = [
        m.double().flatten().sort().values[: size - out] for m, size, out in zip(matrices, sizes, left_out, strict=True)
    ]
    for plain, excluding in ranks.run(world_size, in_proportion, dp_replicate=replicas):
        assert [sum(counts) for counts in plain] == [sum(counts) for counts in excluding] == totals
        for total, counts, others in zip(totals, plain, excluding, strict=True):
            expected = apportion(total, [matrix.double().sum().item() for matrix in matrices], sizes)
            assert all(abs(a - b) <= 1 for a, b in zip(counts, expected, strict=True))
            expected = apportion(total, [part.sum().item() for part in kept], [len(part) for part in kept])
            assert all(abs(a - b) <= 1 for a, b in zip(others, expected, strict=True))
        assert max(plain[0]) > 10 * min(plain[0])
