"""The map from tensors of a model to those of its checkpoint: maps of rows and transposed ones, and others are refused."""

import families
import pytest
import torch
from safetensors.torch import load_file
from transformers.core_model_loading import ConversionOps, Transpose, WeightConverter

from liftdist.deltas.delta import Change, Delta
from liftdist.deltas.module import change_module
from liftdist.engine.matrices import principal_matrices
from liftdist.errors import UserError
from liftdist.models import names
from liftdist.models.part import Part


class Changed(ConversionOps):
    """Concatenates tensors, and then changes the result as a test says."""

    def __init__(self, change):
        self.change = change

    def convert(self, input_dict, source_patterns, target_patterns, **_):
        return {target_patterns[0]: self.change(torch.cat([part for parts in input_dict.values() for part in parts]))}


def joined(monkeypatch, folder, change):
    """The map of a Llama whose value projections come from a converter with the values of ``change``."""
    patterns = [r"self_attn.v_proj.weight", r"self_attn.v_proj.weight"]
    converter = WeightConverter(patterns[:1], patterns[1:], operations=[Changed(change)])
    monkeypatch.setattr(names, "get_model_conversion_mapping", lambda _: [converter])
    return names.of_folder(folder)


def test_a_converter_must_give_each_row_once(monkeypatch, tmp_path):
    folder = families.make(tmp_path / "model", "llama")
    found = joined(monkeypatch, folder, lambda rows: rows.flip(0).flip(0))
    name = "model.layers.1.self_attn.v_proj.weight"
    assert found.pieces[name] == (names.Piece(name, 0, 0, found.pieces[name][0].rows),)
    for change in (lambda rows: rows + 1, lambda rows: rows * 0 + rows[0], lambda rows: rows.float() * 2):
        with pytest.raises(UserError, match=r"v_proj.weight would have to be converted \(Changed\)"):
            joined(monkeypatch, folder, change)


def test_matrices_are_found_in_tensors_that_are_stored_transposed(tmp_path):
    folder = families.make(tmp_path / "model", "qwen3_vl_moe")
    stored, model = load_file(folder / "model.safetensors"), families.plain(folder)
    found = names.of_folder(folder)
    of_experts = {name: place for name, place in principal_matrices(model).items() if ".experts." in name}
    assert len(of_experts) == 4 * 4 * 3
    for name, place in of_experts.items():
        source, part = found.holding(name, place)
        rows = place.param.view(-1, place.width)[place.first_row : place.first_row + place.rows]
        indices = part.indices(torch.arange(place.numel), place.columns)
        assert torch.equal(stored[source].flatten()[indices].view(place.shape), rows)
        everything = torch.arange(stored[source].numel())
        inside, places = part.inside(everything, *place.shape)
        assert torch.equal(everything[inside], indices)
        assert torch.equal(places, torch.arange(place.numel))


@pytest.mark.parametrize("part", [Part(7, 10, 2), Part(7, 2, 10), Part(7, 1, 10), Part(7, 10, 1)])
def test_the_places_of_a_part_are_found_again(part):
    """Of every second index that there is, those of a matrix of 4 rows and 3 columns."""
    given = torch.arange(0, 100, 2)
    expected = {int(index): place for place, index in enumerate(part.indices(torch.arange(12), 3)) if index % 2 == 0}
    inside, places = part.inside(given, 4, 3)
    assert places.tolist() == sorted(expected.values())
    assert [expected[int(index)] for index in given[inside]] == places.tolist()


def test_a_transposition_must_give_the_shape_of_the_model(monkeypatch, tmp_path):
    folder = families.make(tmp_path / "model", "llama")  # its v_proj is [16, 32], and stored as that
    pattern = r"self_attn.v_proj.weight"
    converter = WeightConverter([pattern], [pattern], operations=[Transpose(0, 1)])
    monkeypatch.setattr(names, "get_model_conversion_mapping", lambda _: [converter])
    with pytest.raises(UserError, match=r"v_proj.weight would have to be converted \(Transpose\)"):
        names.of_folder(folder)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "qwen3_vl_moe_resaved"])
def test_a_model_in_memory_has_the_tensors_that_transformers_saves(family, tmp_path):
    folder = families.make(tmp_path / "model", family)
    _, shapes = names.in_memory(families.plain(folder))
    assert shapes == {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}


def test_a_delta_of_transposed_tensors_is_not_applied_in_memory(tmp_path):
    folder = families.make(tmp_path / "model", "qwen3_vl_moe")
    name = "model.language_model.layers.0.mlp.experts.down_proj"
    none = torch.empty(0, dtype=torch.int64)
    delta = Delta(
        folder, "", [name], lambda _: Change((4, 24, 32), torch.float32, none, torch.empty(0), torch.empty(0))
    )
    with pytest.raises(
        UserError, match=r"is \[4, 32, 24\], the delta is for \[4, 24, 32\]; if files hold it transposed, change the"
    ):
        change_module(families.plain(folder), delta)
