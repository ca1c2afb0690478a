"""Optimizers of the flat vector, beside the same arithmetic on whole matrices under masks."""

import pytest
import ranks
import torch
from plain_models import batch, loss_of, make, mlp
from torch.distributed.fsdp import fully_shard

from liftdist.engine import adamw, sgd
from liftdist.engine.criteria.magnitude import Magnitude
from liftdist.method_settings import OptimizerConfig

LR, DECAY, STEPS, REFRESH = 0.03, 0.1, 7, 3
CASES = {
    "sgd": dict(name="sgd", lr=0.2, momentum=0.8),
    "sgd without momentum": dict(name="sgd", lr=0.2, momentum=0.0, weight_decay=DECAY),
    "sgd to base": dict(name="sgd", lr=0.2, weight_decay=DECAY, decay_towards="base"),
    "adamw": dict(weight_decay=DECAY),
    "adamw to base": dict(weight_decay=DECAY, decay_towards="base"),
    "adamw by age": dict(bias_correction="entry", weight_decay=DECAY, betas=[0.9, 0.999]),
    "adamw by age, to base": dict(bias_correction="entry", weight_decay=DECAY, decay_towards="base"),
}


MODULES = {"adamw": adamw, "sgd": sgd}


def settings_of(case):
    return OptimizerConfig(**(dict(lr=LR, eps=1e-6) | CASES[case]))


class Dense:
    """The same on one process, with a mask for each matrix, every formula written out, in float64."""

    def __init__(self, settings):
        self.settings, self.model = settings, mlp().double()
        self.weights = [self.model[0].weight, self.model[2].weight]
        self.base = [weight.detach().clone() for weight in self.weights]
        zeros = lambda: [torch.zeros_like(weight) for weight in self.weights]  # noqa: E731
        self.first, self.second, self.age = zeros(), zeros(), zeros()
        self.masks = self.select()

    def select(self):
        masks = []
        for weight in self.weights:
            mask = torch.zeros(weight.numel(), dtype=torch.bool)
            mask[
                weight.detach().float().abs().flatten().argsort(descending=True, stable=True)[: weight.numel() // 10]
            ] = True
            masks.append(mask.view_as(weight))
        return masks

    @torch.no_grad()
    def refresh(self):
        old, self.masks = self.masks, self.select()
        for state in (self.first, self.second, self.age):
            for number, mask in enumerate(self.masks):
                state[number] *= mask & old[number]

    def step(self, number):
        s = self.settings
        self.model.zero_grad()
        loss = torch.nn.functional.mse_loss
        inputs, targets = (part.double() for part in batch(number))
        loss(self.model(inputs), targets).backward()
        with torch.no_grad():
            for i, (weight, mask) in enumerate(zip(self.weights, self.masks, strict=True)):
                grad = weight.grad * mask
                towards = self.base[i] if s.decay_towards == "base" else 0
                new = weight - s.lr * s.weight_decay * (weight - towards)
                self.age[i] += mask
                if s.name == "sgd":
                    momentum = 0.9 if s.momentum is None else s.momentum
                    self.first[i] = momentum * self.first[i] + grad
                    new = new - s.lr * self.first[i]
                else:
                    beta1, beta2 = s.betas
                    self.first[i] = beta1 * self.first[i] + (1 - beta1) * grad
                    self.second[i] = beta2 * self.second[i] + (1 - beta2) * grad**2
                    t = self.age[i].clamp_min(1) if s.bias_correction == "entry" else number
                    root = (self.second[i] / (1 - beta2**t)).sqrt() + s.eps
                    new = new - s.lr * self.first[i] / (1 - beta1**t) / root
                weight.copy_(torch.where(mask, new, weight))


def prepared(mesh, settings):
    model = mlp()
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh.shard_mesh)
    fully_shard(model, mesh=mesh.shard_mesh)
    principal = make(
        model, criterion=Magnitude(), keep_base=settings.decay_towards == "base", replicate_group=mesh.replicate_group
    )
    return model, principal, MODULES[settings.name].make(principal, settings)


def train(mesh):
    found = {}
    for case in CASES:
        settings = settings_of(case)
        model, principal, optimizer = prepared(mesh, settings)
        for number in range(1, STEPS + 1):
            if number % REFRESH == 0:
                principal.refresh(optimizer)
            if number == 5:  # another process goes on
                state, scalars = principal.state_dict(optimizer), principal.scalar_states(optimizer)
                model, principal, optimizer = prepared(mesh, settings)
                keys = {key.partition("/optimizer.")[2] for key in state if "/optimizer." in key}
                assert keys == MODULES[settings.name].element_states(settings)
                principal.load_state_dict(state, optimizer, scalars)
            loss_of(model, number).backward()
            principal.reduce_gradients()
            optimizer.step()
        found[case] = [param.full_tensor().detach() for param in model.parameters() if param.ndim == 2]
    return found


@pytest.mark.parametrize(("world_size", "replicas"), [(1, 1), (2, 1), (3, 1), (4, 2)])
def test_they_are_what_they_say(world_size, replicas):
    found = ranks.run(world_size, train, dp_replicate=replicas)[0]
    for case in CASES:
        dense = Dense(settings_of(case))
        for number in range(1, STEPS + 1):
            if number % REFRESH == 0:
                dense.refresh()
            dense.step(number)
        for weight, own, start in zip(dense.weights, found[case], dense.base, strict=True):
            assert (weight - start).abs().max() > 0.01
            assert torch.allclose(weight.float(), own, atol=2e-5), case


@pytest.mark.parametrize(
    ("beta2", "by_age", "first"), [(0.95, False, 0.447), (0.999, False, 3.16), (0.95, True, 1.0), (0.999, True, 1.0)]
)
def test_the_first_step_of_an_entry_that_a_refresh_selects(beta2, by_age, first):
    """Late in a run: 0.1 / sqrt(1 - beta2) times the learning rate, or the learning rate."""
    offset = 0
    principal = make(mlp(), criterion=lambda weight, count, seed: torch.arange(count) + offset)
    optimizer = adamw.PrincipalAdamW(principal, lr=1e-4, betas=(0.9, beta2), eps=1e-12, by_age=by_age)
    for number in range(1, 10001):
        principal.values.grad.fill_(1.0)
        if number == 10000:
            offset = 10
            principal.refresh(optimizer)
            principal.values.grad.fill_(1.0)
            before = principal.values.detach().clone()
        optimizer.step()
    moved = (before - principal.values.detach()) / 1e-4
    count = principal.counts[0]
    assert moved[: count - 10].sub(1).abs().max() < 0.01  # selected all the time
    assert moved[count - 10 : count].sub(first).abs().max() < 0.01 * first


def test_decay_alone_leads_back_to_the_base_model():
    model = mlp()
    principal = make(model, keep_base=True)
    start = principal.base_values.clone()
    with torch.no_grad():
        principal.values.add_(1.0)
    principal.write_back()
    optimizer = sgd.PrincipalSGD(principal, lr=0.5, momentum=0.0, weight_decay=0.5, decay_to_base=True)
    for step in range(1, 6):
        optimizer.step()
        assert torch.allclose(principal.values - start, torch.full_like(start, 0.75**step), atol=1e-6)
    with pytest.raises(ValueError, match="keep_base=True"):
        sgd.PrincipalSGD(make(mlp()), decay_to_base=True)
    with pytest.raises(ValueError, match="by_age needs values in float32"):
        adamw.PrincipalAdamW(make(mlp(torch.bfloat16), dtype=torch.bfloat16), by_age=True)


@pytest.mark.parametrize("to_base", [False, True])
@pytest.mark.parametrize("make_optimizer", [sgd.PrincipalSGD, adamw.PrincipalAdamW])
def test_decay_and_update_of_bf16_values_are_rounded_together(make_optimizer, to_base):
    """Each is less than half of the last digit of a value, and would be lost by itself."""
    model = mlp(torch.bfloat16)
    for layer in (model[0], model[2]):
        torch.nn.init.constant_(layer.weight, 0.25)
    everywhere = lambda weight, count, seed: torch.arange(count)  # noqa: E731
    principal = make(model, criterion=everywhere, dtype=torch.bfloat16, keep_base=True)
    torch.nn.init.constant_(principal.values, 1.25)
    principal.write_back()
    digit, distance = 2**-7, 1.0 if to_base else 1.25
    lr = 0.3 * digit
    optimizer = make_optimizer(principal, lr=lr, weight_decay=1 / distance, decay_to_base=to_base)
    principal.values.grad.fill_(1.0)
    optimizer.step()
    assert (principal.values == 1.25 - digit).all()


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.99999, 1 - 1e-7])
def test_the_first_steps_of_an_entry_have_the_length_of_the_learning_rate(beta):
    """Of gradients that do not change, with moments corrected by entry, for any beta2."""
    principal = make(mlp())
    optimizer = adamw.PrincipalAdamW(principal, lr=1.0, betas=(0.9, beta), eps=1e-30, by_age=True)
    principal.values.data.zero_()
    for step in range(1, 4):
        principal.values.grad.fill_(1e-3)
        optimizer.step()
        assert torch.allclose(principal.values, torch.tensor(-float(step)), rtol=2e-6, atol=0)


def test_a_setting_of_torch_that_own_arithmetic_lacks_is_refused():
    optimizer = adamw.PrincipalAdamW(make(mlp()), by_age=True)
    optimizer.param_groups[0]["maximize"] = True
    with pytest.raises(ValueError, match="not with amsgrad, maximize"):
        optimizer.step()
