"""The chunked loss: what the model's own logits give, without ever holding them."""

import copy

import builders
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from liftdist.data.tokenised import IGNORED
from liftdist.models import head
from liftdist.models.head import is_plain
from liftdist.training import objective


def batch(rows=2, length=200):
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, 257, (rows, length), generator=generator)
    labels = torch.randint(3, 257, (rows, length), generator=generator)
    labels[:, ::3] = IGNORED
    labels[0, 5:20] = IGNORED
    return {"input_ids": input_ids, "position_ids": torch.arange(length).expand(rows, -1), "labels": labels}


class Largest(TorchDispatchMode):
    """The most elements of a floating-point tensor that any operation returned, views of parameters aside."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not tensor._is_view():
                self.numel = max(self.numel, tensor.numel())
        return result


def gradients(model, given):
    embedded = {}

    def keep(module, arguments, output):
        embedded["output"] = output.requires_grad_()
        embedded["output"].retain_grad()

    hook = model.get_input_embeddings().register_forward_hook(keep)
    largest = Largest()
    with largest:
        total = objective.token_losses(model, given)
        (total / 255).backward()
    hook.remove()
    return total.detach(), embedded["output"].grad, largest.numel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradient_are_those_of_whole_logits(dtype, tied, tmp_path, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_LOGITS", 257 * 10)
    model = builders.frozen_model(tmp_path, dtype=dtype, tie_word_embeddings=tied)
    _, exact, _ = gradients(copy.deepcopy(model).float(), batch())
    whole, gradient, largest = gradients(model, batch())
    assert is_plain(model, torch.device("cpu"))
    head.in_chunks(model)
    chunked, in_chunks, largest_in_chunks = gradients(model, batch())
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert chunked.dtype == torch.float32
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-6)
    assert (in_chunks - gradient).float().norm() <= tolerance * gradient.float().norm()
    scale = (in_chunks.float() * exact).sum() / exact.square().sum()
    assert scale.item() == pytest.approx(1.0, abs=2e-3)  # 1/255 is not rounded to bf16, which is 4e-3 off
    assert largest > 257 * 200  # labelled places of two rows
    assert largest_in_chunks < 257 * 150
    with torch.no_grad():
        assert objective.token_losses(model, batch()).item() == pytest.approx(whole.item(), rel=1e-6)
    nothing = batch() | {"labels": torch.full((2, 200), IGNORED)}
    assert objective.token_losses(model, nothing).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_trained_head_gets_its_gradient(dtype, tied, tmp_path, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_LOGITS", 257 * 10)
    model = builders.frozen_model(tmp_path, dtype=dtype, tie_word_embeddings=tied)
    weight = model.get_output_embeddings().weight.requires_grad_()
    found = []
    for chunked in (False, True):
        if chunked:
            assert is_plain(model, torch.device("cpu"))
            head.in_chunks(model)
        weight.grad = None
        (objective.token_losses(model, batch()) / 255).backward()
        found.append(weight.grad)
    whole, in_chunks = found
    assert in_chunks.dtype == dtype
    assert (in_chunks - whole).float().norm() <= (1e-6 if dtype == torch.float32 else 2e-2) * whole.float().norm()
