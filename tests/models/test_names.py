"""The map from tensors of a model to those of its checkpoint: converters that are no map of rows are refused."""

import families
import pytest
import torch
from transformers.core_model_loading import ConversionOps, WeightConverter

from liftdist.errors import UserError
from liftdist.models import names


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
