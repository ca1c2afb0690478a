"""What is said of the weights, against the same worked out from whole matrices."""

import shutil
from dataclasses import replace

import builders
import commands
import pytest
import ranks
import torch
from safetensors.torch import load_file

from liftdist import config as configs
from liftdist.errors import UserError
from liftdist.report import page, read, weights
from liftdist.runs import manifest

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def found(reported):
    return weights.of(read.read(reported), None, 600)


def indices_of(run_dir, step, name=NAME):
    """``[k]``, from the files of a checkpoint, by the library that others read them with."""
    files = sorted((run_dir / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))
    return torch.cat([load_file(file)[f"{name}/indices"] for file in files])


@pytest.fixture(scope="module")
def pair(reported, tiny_model, tmp_path_factory):
    """``NAME`` in the base model, and what the exported model has more."""
    target = tmp_path_factory.mktemp("exported") / "hf"
    commands.liftdist("export", reported, "--output", target)
    base, after = (load_file(folder / "model.safetensors")[NAME].float() for folder in (tiny_model, target))
    return base, after - base


def test_where_principal_weights_lie(found, reported, tiny_model):
    indices = indices_of(reported, 8)
    height, width = load_file(tiny_model / "model.safetensors")[NAME].shape
    mask = torch.zeros(height * width)
    mask[indices.long()] = 1
    mask = mask.view(height, width)
    rows, columns = (mask.sum(dim).sort(descending=True).values for dim in (1, 0))
    assert found.share[NAME] == pytest.approx(float(mask.mean()))
    assert found.rows[NAME] == pytest.approx(float(rows[:5].sum() / mask.sum()))  # a tenth of 50
    assert found.columns[NAME] == pytest.approx(float(columns[:9].sum() / mask.sum()))  # of 93
    before = set(indices_of(reported, 2).tolist())
    assert found.since == 2
    assert found.survived[NAME] == pytest.approx(len(before & set(indices.tolist())) / len(before))
    assert min(found.survived.values()) < 1
    assert set(found.rows) == set(found.share) == set(found.magnitude) == set(found.update)
    assert found.notes == []


def test_overlap_with_magnitude(found, reported, pair):
    indices = set(indices_of(reported, 8).tolist())
    largest = pair[0].abs().flatten().argsort(descending=True)[: len(indices)]
    assert 0 < found.magnitude[NAME] < 1
    assert found.magnitude[NAME] == pytest.approx(len(indices & set(largest.tolist())) / len(indices))


def test_size_and_rank_of_an_update(found, pair):
    base, difference = pair
    assert found.update[NAME] == pytest.approx(float(difference.norm() / base.norm()), rel=1e-5)
    values = torch.linalg.svdvals(difference)
    assert found.stable_rank[NAME] == pytest.approx(float((values**2).sum() / values[0] ** 2), rel=1e-3)


def test_singular_values_and_directions(found, pair):
    base, difference = pair
    assert len(found.factored) == 6  # of seven kinds
    one = weights.factored(NAME, base, difference)
    left, values, right = torch.linalg.svd(base)
    assert torch.from_numpy(one.base) == pytest.approx(values, rel=1e-4)
    inside = left[:, :7].T @ difference @ right[:7].T
    assert one.captured[6] == pytest.approx(float(inside.norm() ** 2 / difference.norm() ** 2), rel=1e-4)
    assert one.captured[-1] <= 1


def test_intruder_dimensions():
    """Of a diagonal matrix the singular vectors are the axes. A large update along a diagonal of all 16 axes has a cosine of 1/4
    with each; one along two axes has a cosine of 0.71 with both."""
    base = torch.diag(torch.linspace(1, 2, 16))
    everywhere, two = torch.full((16,), 0.25), torch.zeros(16)
    two[:2] = 2**-0.5
    assert weights.factored("", base, 100 * torch.outer(everywhere, everywhere)).intruders == 1
    assert weights.factored("", base, 100 * torch.outer(two, two)).intruders == 0
    aligned = weights.factored("", base, torch.diag(torch.linspace(0, 1, 16)))
    assert aligned.intruders == 0
    assert aligned.captured[-1] == pytest.approx(1)
    assert aligned.captured[0] == pytest.approx(
        1 / sum((k / 15) ** 2 for k in range(16))
    )  # the largest of W is the last


def test_time_that_is_over_is_noted(reported):
    found = weights.of(read.read(reported), None, 0)
    assert len(found.share) == 14
    assert [*found.rows, *found.update, *found.factored] == []
    assert "Updates: 0 of 14 matrices; --seconds allows more." in found.notes


def test_a_base_model_that_is_not_there_is_said(reported, tiny_model, tmp_path):
    run_dir = shutil.copytree(reported, tmp_path / "run")
    path = run_dir / "checkpoints" / "step-00000008" / "manifest.json"
    saved = manifest.read(path)
    config = saved.provenance.config.replace(str(tiny_model), str(tmp_path / "gone"))
    snapshot = replace(saved.snapshot, provenance=replace(saved.provenance, config=config))
    path.unlink()
    written = replace(saved, snapshot=snapshot).write(path)
    events = run_dir / "attempts" / "attempt-00000001.jsonl"
    events.write_text(events.read_text().replace(saved.sha256, written.sha256))
    moved = shutil.copytree(tiny_model, tmp_path / "base")
    other = builders.llama(tmp_path / "other", num_hidden_layers=1)
    run = read.read(run_dir)
    found = weights.of(run, None, 60)
    assert found.rows
    assert not found.update
    (note,) = found.notes
    assert note.startswith("What needs the base model is left out: model.path")
    assert note.endswith("gone: no such folder; give --base")
    assert weights.of(run, moved, 60).update
    with pytest.raises(UserError, match="its weights are not those that the run started from"):
        weights.of(run, other, 60)


def test_a_run_without_checkpoints_says_so(reported, tmp_path):
    run_dir = shutil.copytree(reported, tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").mkdir()
    path = run_dir / "attempts" / "attempt-00000001.jsonl"
    path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines() if '"commit"' not in line))
    assert "There is no checkpoint." in page.render([read.read(run_dir)], None, 60)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_other_methods_have_updates_alone(method, tiny_model, tmp_path):
    records = builders.write_records(tmp_path / "records.jsonl")
    path = commands.write_config(
        tmp_path, tiny_model, records, train=dict(steps=2, export=False), data=dict(eval_path=None)
    )
    unset = ("selection.density=", "selection.filter_rank=64", "selection.refresh_interval=200")
    assert ranks.run(2, builders.run_once, *configs.load(path, [f"method={method}", *unset])) == [
        "finished",
        "finished",
    ]
    found = weights.of(read.read(tmp_path / "run"), None, 60)
    assert not found.share
    assert found.update[NAME] > 0
    if method == "lora":
        assert 0 < found.stable_rank[NAME] <= 8.01  # lora.rank
    shown = page.render([read.read(tmp_path / "run")], None, 60)
    assert "Stable rank of the update" in shown
    assert "Overlap with magnitude" not in shown


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("model.layers.12.self_attn.q_proj.weight", 12, "self_attn.q_proj"),
        ("model.layers.3.mlp.experts.17.up_proj.weight", 3, "mlp.experts.*.up_proj"),
        ("lm_head.weight", None, "lm_head"),
    ],
)
def test_names_of_matrices(name, layer, kind):
    assert (weights.layer_of(name), weights.kind_of(name)) == (layer, kind)
