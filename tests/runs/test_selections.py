"""Selections that are kept for the next run."""

import json

import pytest
import torch
from plain_models import seven_layers

from liftdist import PrincipalWeights
from liftdist.runs import selections


def test_damaged_selections_are_refused(tmp_path):
    kept = {}
    principal = PrincipalWeights(seven_layers(), density=0.1, filter_rank=4, on_selected=kept.__setitem__)
    for name, change, problem in (
        ("short", lambda i: i[:-1], "damaged"),
        ("unsorted", lambda i: i.flip(0).contiguous(), "damaged"),
        ("range", lambda i: torch.cat([i[:-1], torch.tensor([10**6])]), "damaged"),
    ):
        selections.write(tmp_path / name, kept | {"m2.weight": change(kept["m2.weight"])})
        with pytest.raises(ValueError, match=rf"m2\.weight is {problem}"):
            selections.read(tmp_path / name, principal.matrices, principal.counts)
    selections.write(tmp_path / "absent", {k: v for k, v in kept.items() if k != "m2.weight"})
    with pytest.raises(ValueError, match=r"no selection for m2\.weight"):
        selections.read(tmp_path / "absent", principal.matrices, principal.counts)
    file = next((tmp_path / "absent").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="owner-00000-of-00001.safetensors has .* bytes"):
        selections.read(tmp_path / "absent", principal.matrices[:2], principal.counts[:2])
    assert set(json.loads((tmp_path / "short" / "selection.json").read_text())) == set(kept)
