"""Plain torch models, for tests of the engine by itself."""

from collections import OrderedDict

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from liftdist import PrincipalWeights


def mlp(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(30, 50), nn.ReLU(), nn.Linear(50, 7, bias=False)).to(dtype)


def batch(seed, dtype=torch.float32, size=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 30, generator=generator).to(dtype), torch.randn(size, 7, generator=generator).to(dtype)


def loss_of(model, seed):
    inputs, targets = batch(seed, next(model.parameters()).dtype)
    return nn.functional.mse_loss(model(inputs), targets)


def make(model, **settings):
    return PrincipalWeights(model, **({"density": 0.1, "filter_rank": 4} | settings))


def flat(model):
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


def seven_layers(mesh=None, dtype=torch.float32):
    """Seven matrices ``m0`` to ``m6`` of different shapes, sharded over a mesh if one is given."""
    torch.manual_seed(0)
    layers = {f"m{i}": nn.Linear(40 + 7 * i, 61 - 5 * i, bias=False) for i in range(7)}
    model = nn.Sequential(OrderedDict(layers)).to(dtype)
    if mesh is not None:
        fully_shard(model, mesh=mesh.shard_mesh)
    return model
