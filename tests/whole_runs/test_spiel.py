"""SpIEL: what a refresh drops, grows and begins with, against a dense version on one process, on any ranks."""

import copy
from pathlib import Path

import builders
import pytest
import ranks
import torch
from test_by_gradients import BATCHES, WORLDS, batches_of_gradients
from test_world_size import global_masks
from transformers import AutoModelForCausalLM

from liftdist import PrincipalWeights
from liftdist import config as configs
from liftdist.console import Console
from liftdist.distributed.collectives import gather
from liftdist.distributed.sharding import whole_tensor
from liftdist.engine.adamw import PrincipalAdamW
from liftdist.engine.criteria.spiel import Spiel
from liftdist.errors import UserError
from liftdist.model_settings import ModelConfig
from liftdist.models.load import load
from liftdist.training.inputs import prepare_inputs

FRACTION = 0.2 * (1 - 1 / 4)  # of the first refresh of four


def settings_of(folder, correction="step"):
    return builders.config(
        Path(folder) / "dense",
        Path(folder) / "records.jsonl",
        Path(folder) / "run",
        selection=dict(criterion="spiel", refresh_interval=3, gradient_batches=BATCHES, final_refresh=4),
        train=dict(steps=7, batch_size=6, micro_batch_size=4, seed=3),
        optimizer=dict(lr=5e-3, bias_correction=correction),
    )


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    made = tmp_path_factory.mktemp("spiel")
    builders.write_records(made / "records.jsonl")
    builders.llama(made / "dense", tiny_model)
    return made


def whole(principal, vector):
    """``vector [k_local]`` by matrix and flat index, put together from all shards."""
    found = {}
    for matrix, indices, segment in zip(principal.matrices, principal.indices, principal._segments, strict=True):
        places = (indices.long() + matrix.offset_local).tolist()
        found[matrix.name] = dict(zip(places, vector.detach()[segment.span].tolist(), strict=True))
    shares = gather(found)
    return {name: {k: v for share in shares for k, v in share[name].items()} for name in found}


def replaced(mesh, folder, correction):
    made = builders.trainer(mesh, settings_of(folder, correction))
    principal, optimizer = made.method.principal, made.method.optimizer
    first = global_masks(principal)
    made.run_step()
    made.run_step()
    values = whole(principal, principal.values)
    moments = whole(principal, optimizer.state[principal.values]["exp_avg"])
    weights = {name: whole_tensor(param).clone() for name, param in made.model.named_parameters()}
    principal.refresh(optimizer, number=1)
    state = optimizer.state[principal.values]
    later = {name: whole_tensor(param).clone() for name, param in made.model.named_parameters()}
    begun = {key: whole(principal, state[key]) for key in state if key != "step"}
    assert not principal.selector.gathered
    return dict(
        first=first,
        values=values,
        moments=moments,
        weights=weights,
        second=global_masks(principal),
        begun=begun,
        later=later,
    )


@pytest.mark.parametrize(
    ("world", "correction"),
    [("2", "entry"), *(pytest.param(world, "step", marks=pytest.mark.slow) for world in ("1", "2", "3", "2x2"))],
)
def test_a_refresh_drops_grows_and_begins_like_the_dense_version(world, correction, folder):
    size, replicas = WORLDS[world]
    run, *others = ranks.run(size, replaced, folder, correction, dp_replicate=replicas)
    assert all(other["second"] == run["second"] for other in others)
    settings = settings_of(folder)
    samples = prepare_inputs(settings, Console(False)).samples
    base = AutoModelForCausalLM.from_pretrained(settings.model.path, dtype=torch.float32)
    trained = copy.deepcopy(base)
    trained.load_state_dict(run["weights"], strict=False)
    began = sums_of(samples, base)
    now = sums_of(samples, trained)
    agreed = total = 0
    for name, chosen in run["first"].items():
        number = len(chosen)
        wanted = began[name][0].abs().flatten().topk(number).indices.tolist()
        agreed, total = agreed + len(set(wanted) & set(chosen)), total + number
        before = base.get_parameter(name).detach().flatten()
        moved = sorted((abs(run["values"][name][place] - before[place].item()), -place) for place in chosen)
        dropped = {-place for _, place in moved[: round(FRACTION * number)]}
        kept = set(chosen) - dropped
        assert kept <= set(run["second"][name])
        grown = set(run["second"][name]) - kept
        candidates = now[name][0].abs().flatten()
        candidates[chosen] = 0
        wanted = set(candidates.topk(len(dropped)).indices.tolist())
        agreed, total = agreed + len(wanted & grown), total + len(wanted)
        later = run["later"][name].flatten()
        assert all(later[place] == before[place] for place in dropped)
        mean, square = (part.flatten() / BATCHES for part in now[name])
        steps = 2 if correction == "step" else BATCHES
        for key, gathered, beta in (("exp_avg", mean, 0.9), ("exp_avg_sq", square, 0.95)):
            state = run["begun"][key][name]
            found = torch.tensor([state[place] for place in sorted(grown)])
            torch.testing.assert_close(found, gathered[sorted(grown)] * (1 - beta**steps), rtol=1e-3, atol=1e-9)
        assert all(run["begun"]["exp_avg"][name][place] == run["moments"][name][place] for place in kept)
        if correction == "entry":
            ages = run["begun"]["age"][name]
            assert {ages[place] for place in grown} == {BATCHES}
            assert {ages[place] for place in kept} == {2}
    assert agreed > 0.998 * total


def sums_of(samples, model):
    """The sums of gradients and of their squares, of each matrix."""
    sums = {}
    for gradients in batches_of_gradients(samples, model):
        for name, gradient in gradients.items():
            first, second = sums.get(name, (0.0, 0.0))
            sums[name] = first + gradient, second + gradient**2
    return sums


def three_more(made):
    figures = [made.run_step() for _ in range(3)]
    return [*(f["train/loss"] for f in figures), figures[1]["selection/survived"], builders.global_digest(made)]


def test_it_continues_over_a_refresh(folder):
    settings = settings_of(folder)
    (expected, found), *_ = ranks.run(2, builders.stop_and_continue, settings, 4, three_more)
    assert expected[3] == pytest.approx(1 - 0.2 / 2, abs=0.01)
    assert found == expected
    (on_one,) = ranks.run(1, builders.continued, settings, three_more)
    assert on_one[:4] == pytest.approx(expected[:4], rel=1e-2)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["selection.criterion=spiel"], "selection.final_refresh: must be given with selection.criterion=spiel"),
        (["selection.final_refresh=3"], "selection.final_density: must be given"),
    ],
)
def test_settings(overrides, problem, tmp_path):
    (tmp_path / "config.yaml").write_text("run_dir: r\nmodel: {path: m}\ndata: {path: d}\nselection: {density: 0.1}\n")
    with pytest.raises(UserError) as caught:
        configs.load(tmp_path / "config.yaml", overrides)
    assert problem in str(caught.value)


def moments(mesh, folder):
    """Adam's moments after a refresh, of replicas whose gradients differ."""
    model, _ = load(folder, ModelConfig(path=str(folder), dtype="float32"), mesh)

    def backwards(number):
        for batch in range(number):
            tokens = (torch.arange(8)[None] + batch + mesh.rank) % 16
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            yield loss.detach()

    criterion = Spiel(batches=2, final_refresh=4)
    given = dict(density=0.1, criterion=criterion, backwards=backwards, keep_base=True)
    principal = PrincipalWeights(model, replicate_group=mesh.replicate_group, **given)
    optimizer = PrincipalAdamW(principal, lr=0.1)
    for _ in backwards(1):
        principal.reduce_gradients()
    optimizer.step()
    principal.refresh(optimizer)
    state = optimizer.state[principal.values]
    return [principal.values.tolist(), state["exp_avg"].tolist(), state["exp_avg_sq"].tolist()]


def test_replicas_have_the_same_moments(tmp_path):
    one, other = ranks.run(2, moments, builders.llama(tmp_path), dp_replicate=2)
    assert one == other
    assert any(one[1])
