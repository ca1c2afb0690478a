"""A delta on a model in memory, sharded or not."""

import pytest
import ranks
import torch
from transformers import AutoModelForCausalLM

from liftdist.deltas import file as delta_file
from liftdist.deltas.module import change_module
from liftdist.distributed.sharding import whole_tensor
from liftdist.errors import UserError
from liftdist.model_settings import ModelConfig
from liftdist.models.load import load


def on_a_sharded_model(mesh, base, first, second, one, two, thirds):
    model, _ = load(base, ModelConfig(path=str(base)), mesh)

    def equals(folder):
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        return all(
            torch.equal(whole_tensor(param).view(torch.int16), whole.get_parameter(name).view(torch.int16))
            for name, param in model.named_parameters()
        )

    one, two = delta_file.read(one), delta_file.read(two)
    outcomes = [equals(base)]
    export_errors, overlap_errors = [], []
    for apply, undo, expected in ((one, None, first), (two, one, second), (None, two, base)):
        with torch.no_grad():
            model(torch.ones(1, 3, dtype=torch.int64))  # leaves gathered copies of some parameters
        change_module(model, apply, undo)
        outcomes.append(equals(expected))
    for apply, undo in ((None, one), (two, one)):
        try:
            change_module(model, apply, undo)
        except (UserError, RuntimeError) as error:
            export_errors.append(str(error))
    outcomes.append(equals(base))
    a, b, c = map(delta_file.read, thirds)
    change_module(model, c)
    change_module(model, a, beside=[c])
    change_module(model, b, beside=[c, a])
    outcomes.append(equals(first))
    for apply, undo, beside in ((two, None, ()), (a, None, [c, b, a]), (one, b, [c, a])):
        try:
            change_module(model, apply, undo, beside)
        except (UserError, RuntimeError) as error:
            overlap_errors.append(str(error))
    for delta in (a, c, b):
        outcomes.append(equals(base))
        change_module(model, undo=delta)
    outcomes.append(equals(base))
    return outcomes, export_errors, overlap_errors


@pytest.mark.parametrize("world_size", [1, 3])
def test_apply_undo_and_swap_on_a_model_in_memory_are_exact(world_size, folders, deltas, thirds):
    for outcomes, errors, overlaps in ranks.run(world_size, on_a_sharded_model, *folders, *deltas[:2], thirds):
        assert outcomes == [*[True] * 6, *[False] * 3, True]
        assert len(errors) == 2
        assert len(overlaps) == 3
        assert all("`liftdist merge` makes" in error for error in overlaps)
        assert all("does not hold the new values of the delta" in error for error in errors)


def test_a_plain_module_and_one_loaded_in_another_dtype(folders, deltas):
    model = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
    before = {name: param.clone() for name, param in model.named_parameters()}
    one = delta_file.read(deltas[0])
    change_module(model, one)
    after = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32)
    assert all(torch.equal(param, after.get_parameter(name)) for name, param in model.named_parameters())
    change_module(model, undo=one)
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())
    with pytest.raises(UserError, match="the model has no model"):
        change_module(torch.nn.Linear(3, 3), one)
