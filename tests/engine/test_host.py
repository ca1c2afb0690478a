"""Values, gradient, moments and positions on the host: what they come to, and on which device everything is."""

import itertools
from pathlib import Path
from unittest import mock

import builders
import pytest
import ranks
import torch
from plain_models import flat, loss_of, make, mlp
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration

from liftdist import PrincipalWeights
from liftdist.engine import adamw, host, sgd
from liftdist.engine.adamw import PrincipalAdamW
from liftdist.engine.flat import Part
from liftdist.engine.quantised import QuantisedRows
from liftdist.method_settings import OptimizerConfig
from liftdist.model_settings import ModelConfig
from liftdist.models.load import load

CASES = {
    "adamw": dict(weight_decay=0.1),
    "adamw in bf16": dict(dtype="bfloat16"),
    "adamw by age, to base": dict(bias_correction="entry", weight_decay=0.1, decay_towards="base"),
    "sgd to base": dict(name="sgd", lr=0.2, weight_decay=0.1, decay_towards="base"),
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_what_is_trained_on_the_host_is_the_same_to_the_bit(settings):
    """Over a refresh, a step that is dropped, and a state that goes from one to the other."""
    settings = OptimizerConfig(**(dict(lr=1e-2) | settings))
    dtype = getattr(torch, settings.dtype)

    def begin(device):
        model = mlp(dtype)
        to_base = settings.decay_towards == "base"
        principal = make(model, method="exact", device=device, dtype=dtype, keep_base=to_base)
        return model, principal, {"adamw": adamw, "sgd": sgd}[settings.name].make(principal, settings)

    def train(model, principal, optimizer, steps):
        for step in steps:
            if step == 3:
                principal.refresh(optimizer)
            for micro in range(2):
                loss_of(model, 2 * step + micro).backward()
            principal.reduce_gradients(2.0)
            principal.clip_grad_norm_(0.1)
            if step == 1:
                principal.drop_gradients()
            else:
                optimizer.step()
        return flat(model), principal.state_dict(optimizer), principal.scalar_states(optimizer)

    weights, state, scalars = train(*begin(None), range(6))
    for first, second in (("cpu", "cpu"), ("cpu", None), (None, "cpu")):
        halfway = train(*begin(first), range(4))
        model, principal, optimizer = begin(second)
        principal.load_state_dict(halfway[1], optimizer, halfway[2])
        found = train(model, principal, optimizer, range(4, 6))
        assert torch.equal(found[0], weights)
        assert found[1].keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in found[1].items())
        assert found[2] == scalars
    assert not torch.equal(weights, flat(mlp(dtype)))


def test_gradients_have_arrived_when_backward_returns():
    gradients = []
    for device in (None, "cpu"):
        model = mlp()
        principal = make(model, device=device)
        for seed in range(3):
            loss_of(model, seed).backward()
        gradients.append(principal.values.grad.clone())
    assert torch.equal(*gradients)
    assert gradients[0].any()


@pytest.mark.parametrize("clear", ["drop_gradients", "zero_grad"])
def test_what_a_backward_that_failed_has_sent_is_not_added(clear):
    model = mlp()
    principal = make(model, device="cpu")
    optimizer = torch.optim.SGD([principal.values])
    loss_of(model, 1).backward()
    expected = principal.values.grad.clone()
    optimizer.zero_grad()

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(_, inputs):
            return inputs.clone()

        @staticmethod
        def backward(*_):
            raise MemoryError

    with pytest.raises(MemoryError):
        nn.Sequential(model[0], _Call(Failing), *model[1:])(torch.ones(2, 30)).sum().backward()
    principal.drop_gradients() if clear == "drop_gradients" else optimizer.zero_grad()
    loss_of(model, 1).backward()
    assert torch.equal(principal.values.grad, expected)


class _Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, inputs):
        return self.function.apply(inputs)


def test_other_devices_and_a_kernel_of_the_gpu_are_refused():
    with pytest.raises(ValueError, match="device must be cpu, or None for that of the model, got cuda"):
        make(mlp(), device="cuda")
    optimizer = PrincipalAdamW(make(mlp(), device="cpu"))
    optimizer.in_one_kernel = True
    with pytest.raises(ValueError, match="in_one_kernel needs values on the GPU"):
        optimizer.step()


def on_another_device(_, settings):
    """Steps of a model on a device that is not the host, of fake tensors, which refuse an operation on two devices.

    Returns the kinds of devices on which there is: what is to be on the host, what of the model, gradients as they are collected.
    """
    backend_registration._setup_privateuseone_for_python_backend("elsewhere")
    settings = OptimizerConfig(**settings)
    dtype, device = getattr(torch, settings.dtype), torch.device("elsewhere:0")
    arrived, add = set(), host.Arrivals.add

    def adding(self, target, vector):
        arrived.add((target.device.type, vector.device.type))
        add(self, target, vector)

    with FakeTensorMode(allow_non_fake_inputs=True), mock.patch.object(host.Arrivals, "add", adding):
        layers = (nn.Linear(*sizes, device=device, dtype=dtype) for sizes in ((30, 50), (50, 7)))
        model = nn.Sequential(*layers)
        principal = PrincipalWeights(
            model,
            density=0.1,
            device="cpu",
            dtype=dtype,
            initial_indices=lambda made: [torch.zeros(count, dtype=torch.int32) for count in made.counts],
        )
        optimizer = {"adamw": adamw, "sgd": sgd}[settings.name].make(principal, settings)
        for _ in range(2):
            model(torch.ones(16, 30, dtype=dtype, device=device)).square().mean().backward()
            principal.reduce_gradients(torch.ones((), device=device))
            norm = principal.clip_grad_norm_(1.0)
            optimizer.step()
        principal.drop_gradients()
        states = [state for state in optimizer.state[principal.values].values() if state.ndim]
        on_host = [principal.values, principal.values.grad, *states, *(part.kept for part in principal.parts)]
        elsewhere = [norm, *model.parameters(), *(part.positions for part in principal.parts)]
    return *({tensor.device.type for tensor in found} for found in (on_host, elsewhere)), arrived


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="needs a newer torch"
)
@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16"}, {"bias_correction": "entry"}, {"name": "sgd"}])
def test_every_tensor_is_on_its_device(settings):
    [(on_host, elsewhere, arrived)] = ranks.run(1, on_another_device, settings)
    assert on_host == {"cpu"}
    assert elsewhere == {"elsewhere"}
    assert arrived == {("cpu", "elsewhere")}


def trained(mesh, folder):
    """What five steps with a refresh leave on a base, as it is and quantised, in two parts, each with values here or there."""
    return [_trained(mesh, ModelConfig(path=str(folder), base_dtype=kind)) for kind in (None, "nf4")]


def _trained(mesh, config):

    def train(device, steps, state=None, scalars=None):
        model, _ = load(Path(config.path), config, mesh)
        group = mesh.replicate_group
        principal = PrincipalWeights(model, density=0.1, filter_rank=4, device=device, replicate_group=group)
        optimizer = PrincipalAdamW(principal, lr=1e-2)
        if state is not None:
            principal.load_state_dict(state, optimizer, scalars)
        for step in steps:
            if step == 2:
                principal.refresh(optimizer)
            tokens = torch.randint(3, 257, (2, 24), generator=torch.Generator().manual_seed(10 * step + mesh.rank))
            model(input_ids=tokens, labels=tokens).loss.backward()
            principal.reduce_gradients(mesh.world_size)
            principal.clip_grad_norm_(1.0)
            optimizer.step()
        rows = {f"{matrix.name}/rows": matrix.rows_local.clone() for matrix in principal.matrices}
        return principal.state_dict(optimizer), principal.scalar_states(optimizer), rows

    found = []
    for first, second in ((None, None), ("cpu", "cpu"), (None, "cpu"), ("cpu", None)):
        state, scalars, _ = train(first, range(3))
        state, _, rows = train(second, range(3, 5), state, scalars)
        found.append(state | rows)
    return found


def test_ranks_train_the_same_on_the_host(tmp_path):
    folder = builders.llama(tmp_path / "model", dtype=torch.bfloat16)
    for first, *others in itertools.chain(*ranks.run(4, trained, folder, dp_replicate=2)):
        assert any(value.numel() for key, value in first.items() if key.endswith("dropped_values"))
        for other in others:
            assert other.keys() == first.keys()
            assert all(torch.equal(value, first[key]) for key, value in other.items())


def written(mesh, folder):
    """What is read after a write of values on the host, whose positions are another tensor each time they are at the model."""
    model, _ = load(folder, ModelConfig(path=str(folder), base_dtype="nf4"), mesh)
    with mock.patch.object(Part, "positions", property(lambda part: part.kept.clone())):
        principal = PrincipalWeights(model, density=0.1, filter_rank=4, device="cpu")
        principal.values.data.normal_(generator=torch.Generator().manual_seed(1))
        with mock.patch.object(QuantisedRows, "_places", side_effect=AssertionError("positions were searched")):
            principal.write_back()
        held = torch.cat([part.read(part.positions) for part in principal.parts])
    return torch.equal(held, principal.values.to(held.dtype))


def test_positions_neither_travel_nor_are_searched_where_the_base_is_quantised(tmp_path):
    assert ranks.run(1, written, builders.llama(tmp_path / "model", dtype=torch.bfloat16)) == [True]
