"""The base model inside a trained one: its weights and its outputs to the bit, and the trained ones afterwards."""

import pytest
import ranks
import torch
from plain_models import batch, loss_of, make, mlp
from torch.distributed.fsdp import fully_shard

from liftdist.distributed.sharding import local_tensor
from liftdist.engine.adamw import PrincipalAdamW
from liftdist.engine.sgd import PrincipalSGD
from liftdist.planning.live_bytes import LiveBytes


def sharded(mesh, dtype):
    model = mlp(dtype)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh.shard_mesh)
    return fully_shard(model, mesh=mesh.shard_mesh)


def local(model):
    return [local_tensor(param).detach().clone() for param in model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def output(model, dtype):
    with torch.no_grad():
        return model(batch(99, dtype)[0])


def train(mesh, dtype):
    model = sharded(mesh, dtype)
    start = local(model)
    expected = output(mlp(dtype), dtype)
    settings = dict(keep_base=True, replicate_group=mesh.replicate_group)
    principal = make(model, **settings)
    optimizer = PrincipalAdamW(principal, lr=0.05)
    survived = []
    for step in range(1, 7):
        if step % 2 == 0:
            survived.append(principal.refresh(optimizer))
        loss_of(model, step).backward()
        gradient, trained = principal.values.grad.clone(), local(model)
        with principal.at_base():
            assert same(local(model), start)
            assert torch.equal(output(model, dtype), expected)
        assert same(local(model), trained)
        assert torch.equal(principal.values.grad, gradient)
        loss_of(model, 100 + step).backward()  # another micro-batch
        principal.reduce_gradients()
        optimizer.step()
    assert not same(local(model), start)
    assert min(survived) < 1  # some were dropped, and some selected again
    for matrix, indices, base in zip(
        principal.matrices,
        principal.indices,
        principal.base_values.split([i.numel() for i in principal.indices]),
        strict=True,
    ):
        number = [id(param) for param in model.parameters()].index(id(matrix.param))
        assert torch.equal(start[number].flatten()[indices.long()], base)

    state, scalars = principal.state_dict(optimizer), principal.scalar_states(optimizer)
    other = sharded(mesh, dtype)
    again = make(other, **settings)
    loaded = PrincipalAdamW(again, lr=0.05)
    again.load_state_dict(state, loaded, scalars)
    assert same(local(other), local(model))
    assert torch.equal(again.base_values, principal.base_values)
    with again.at_base():
        assert same(local(other), start)
        with pytest.raises(RuntimeError, match="at_base"), again.at_base():
            pass
    assert same(local(other), local(model))
    with pytest.raises(KeyError), again.at_base():  # restored after an error, too
        raise KeyError
    assert same(local(other), local(model))
    return survived


@pytest.mark.parametrize(("world_size", "replicas"), [(1, 1), (2, 1), (3, 1), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_model_is_there_at_any_time(world_size, replicas, dtype):
    ranks.run(world_size, train, dtype, dp_replicate=replicas)


def test_what_trains_or_saves_is_refused_at_the_base_model_and_changes_nothing():
    model = mlp()
    principal = make(model, keep_base=True)
    optimizers = [PrincipalAdamW(principal), PrincipalSGD(principal)]
    for number in range(2):
        loss_of(model, number).backward()
        optimizers[number].step()
    loss_of(model, 2).backward()
    state, gradient = principal.state_dict(optimizers[0]), principal.values.grad.clone()
    trained = local(model)
    refused = [optimizer.step for optimizer in optimizers]
    refused += [principal.refresh, principal.state_dict, principal.write_back, lambda: principal.load_state_dict(state)]
    refused += [principal.reduce_gradients, principal.drop_gradients, lambda: principal.clip_grad_norm_(1e-9)]
    refused += [lambda: loss_of(model, 3).backward(), lambda: principal.base_values]
    with principal.at_base():
        for attempt in refused:
            with pytest.raises(RuntimeError, match=r"within at_base\(\)"):
                attempt()
        assert same(local(model), local(mlp()))
    assert same(local(model), trained)
    assert torch.equal(principal.values.grad, gradient)
    after = principal.state_dict(optimizers[0])
    assert all(torch.equal(tensor, after[key]) for key, tensor in state.items())
    assert all(param.grad is None for param in (model[0].weight, model[2].weight))
    loss_of(model, 3).backward()  # it goes on
    optimizers[0].step()
    assert not same(local(model), trained)


def test_no_third_copy_is_held():
    """Base values and trained values change places."""
    principal = make(mlp(torch.bfloat16), keep_base=True)
    with LiveBytes() as live:
        for held in (*(local_tensor(part.param) for part in principal.parts), *principal._base._values):
            live.add(held)
        before = live.now
        with principal.at_base():
            assert live.now == before > 0


def test_it_must_be_asked_for():
    principal = make(mlp())
    with pytest.raises(ValueError, match="keep_base=True"), principal.at_base():
        pass
