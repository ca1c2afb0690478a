"""Several principal weights of one model, which leave it and enter it in turn: each as if it had the model to itself."""

import pytest
import ranks
import torch
from plain_models import batch, loss_of, make, mlp
from torch.distributed.fsdp import fully_shard

from liftdist.distributed.sharding import local_tensor
from liftdist.engine.adamw import PrincipalAdamW
from liftdist.engine.criteria.magnitude import Magnitude
from liftdist.engine.sgd import PrincipalSGD

OTHERS = (dict(density=0.1, device="cpu"), dict(density=0.3), dict(density=0.2, criterion=Magnitude()))
STEPS = 6


def sharded(mesh, dtype):
    model = mlp(dtype)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh.shard_mesh)
    return fully_shard(model, mesh=mesh.shard_mesh)


def optimizer_of(number, principal):
    return PrincipalSGD(principal, lr=0.02) if number == 1 else PrincipalAdamW(principal, lr=0.01 * (1 + number))


def micro_batch(model, principal, optimizer, number, step, half):
    """Half a step of the loop ``number``: its own data, and a refresh in each third step."""
    if half == 0:
        if step % 3 == 0:
            principal.refresh(optimizer)
        loss = loss_of(model, 100 * number + step)
        loss.backward()
        return loss.item()
    loss_of(model, 1000 * number + step).backward()
    principal.reduce_gradients()
    principal.clip_grad_norm_(1.0)
    optimizer.step()
    return None


def outcome(model, principal, optimizer, dtype):
    with torch.no_grad():
        logits = model(batch(99, dtype)[0])
    local = [local_tensor(param).detach().clone() for param in model.parameters()]
    return principal.state_dict(optimizer) | dict(enumerate([logits, *local]))


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def in_turn(mesh, dtype):
    shared = dict(keep_base=True, replicate_group=mesh.replicate_group)
    apart = []
    for number, settings in enumerate(OTHERS):
        model = sharded(mesh, dtype)
        principal = make(model, **(settings | shared))
        optimizer = optimizer_of(number, principal)
        losses = [micro_batch(model, principal, optimizer, number, s, half) for s in range(STEPS) for half in (0, 1)]
        apart.append((losses, outcome(model, principal, optimizer, dtype)))
    model = sharded(mesh, dtype)
    start = [local_tensor(param).detach().clone() for param in model.parameters()]
    pairs = []
    for number, settings in enumerate(OTHERS):
        principal = make(model, **(settings | shared))
        pairs.append((principal, optimizer_of(number, principal)))
        principal.leave()
    losses = [[] for _ in OTHERS]
    for step in range(STEPS):
        for half in (0, 1):  # between micro-batches, too
            for number, (principal, optimizer) in enumerate(pairs):
                principal.enter()
                losses[number].append(micro_batch(model, principal, optimizer, number, step, half))
                principal.leave()
    assert all(
        torch.equal(local_tensor(param), before) for param, before in zip(model.parameters(), start, strict=True)
    )
    for number, (principal, optimizer) in enumerate(pairs):
        principal.enter()
        assert losses[number] == apart[number][0]
        assert equal(outcome(model, principal, optimizer, dtype), apart[number][1])
        principal.leave()
    assert len({tuple(found) for found in losses}) == len(OTHERS)


@pytest.mark.parametrize(
    ("world_size", "replicas", "dtype"), [(1, 1, torch.bfloat16), (2, 1, torch.bfloat16), (4, 2, torch.float32)]
)
def test_each_learns_what_it_learns_by_itself(world_size, replicas, dtype):
    ranks.run(world_size, in_turn, dtype, dp_replicate=replicas)


def test_who_has_left_is_refused_and_left_alone():
    model = mlp()
    first = make(model, keep_base=True)
    optimizer = PrincipalAdamW(first)
    loss_of(model, 0).backward()
    gradient = first.values.grad.clone()
    first.leave()
    second = make(model, keep_base=True)
    loss_of(model, 1).backward()
    assert torch.equal(first.values.grad, gradient)
    assert second.values.grad.any()
    refused = [optimizer.step, first.refresh, first.state_dict, first.write_back, first.leave, first.drop_gradients]
    for attempt in refused:
        with pytest.raises(RuntimeError, match=r"have left the model: enter\(\)"):
            attempt()
    with pytest.raises(ValueError, match=r"let them leave\(\)"):
        first.enter()
    second.leave()
    first.enter()
    optimizer.step()
    with pytest.raises(ValueError, match="keep_base=True"):
        make(mlp()).leave()
