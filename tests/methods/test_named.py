"""Weights that files name: trained, or left alone, matrix by matrix as a dense comparison of two models finds them."""

import shutil
from pathlib import Path

import builders
import pytest
import ranks
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from liftdist import config as configs
from liftdist import preflight
from liftdist.console import Console
from liftdist.deltas import file as delta_file
from liftdist.deltas import of_run
from liftdist.deltas.folder import change_folder
from liftdist.engine.matrices import principal_matrices
from liftdist.errors import UserError
from liftdist.models import weights
from liftdist.runs import changes
from liftdist.runs.context import RunContext
from liftdist.runs.manifest import Provenance, Snapshot
from liftdist.runs.saver import Checkpointer
from liftdist.training import setup

FAMILIES = {
    "llama": {},
    # gate and up of an expert are interleaved columns of one tensor
    "gpt_oss": dict(
        hidden_size=48,
        intermediate_size=24,
        num_local_experts=5,
        num_experts_per_tok=2,
        head_dim=12,
        num_attention_heads=4,
    ),
    "qwen3_moe": dict(
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        hidden_size=48,
        head_dim=12,
        num_attention_heads=4,
    ),
}


def changed_copy(folder, target, seed, base=None):
    """A copy of a model folder with other values at a twentieth of the places of each matrix, where it equals ``base``."""
    shutil.copytree(folder, target)
    chance = torch.Generator().manual_seed(seed)
    tensors, others = load_file(target / "model.safetensors"), load_file((base or folder) / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim > 1 and "_proj" in name and not name.endswith("bias"):
            flat = tensor.view(-1)
            places = torch.randperm(flat.numel(), generator=chance)[: round(0.05 * flat.numel())]
            places = places[flat[places] == others[name].view(-1)[places]]
            flat[places] = flat[places] * 1.5 + 0.01
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def differences(before, after):
    """Flat indices of what differs in each trained matrix of two models."""
    one, two = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (before, after))
    found = {}
    for (name, place), other in zip(principal_matrices(one).items(), principal_matrices(two).values(), strict=True):
        wide = [p.param.detach().reshape(-1, p.param.shape[-1]) for p in (place, other)]
        rows = slice(place.first_row, place.first_row + place.rows)
        columns = slice(place.first_column, place.first_column + place.columns * place.step, place.step)
        found[name] = (wide[0][rows, columns] != wide[1][rows, columns]).flatten().nonzero().squeeze(1).tolist()
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """For each family a model, one that differs from it, the delta between both, and what differs."""
    made = {}
    for family, sizes in FAMILIES.items():
        folder = tmp_path_factory.mktemp(family)
        base = builders.llama(folder / "base", None, family, **sizes)
        after = changed_copy(base, folder / "after", 1)
        delta_file.write(of_run.between(base, after, weights.digest(base, folder / "cache")), folder / "delta")
        made[family] = folder
    return made


def settings(folder, model="base", **selection):
    return builders.config(folder / model, Path("unused"), folder, selection=dict(density=None) | selection)


def attached(mesh, config):
    """What ``liftdist select`` makes, or the error of it, with its lines. Collective."""
    lines = []
    console = Console(True)
    console.say = lines.append
    folder = Path(config.model.path)
    digest = weights.digest(folder, Path(config.cache_dir))
    try:
        _, _, method = setup.model_and_method(RunContext(config, mesh, console), folder, digest)
    except UserError as error:
        return str(error)
    return method, lines


def selected(mesh, configs):
    """The selections of this rank's rows, and the counts; or errors."""
    found = []
    for config in configs:
        made = attached(mesh, config)
        if isinstance(made, str):
            found.append(made)
            continue
        principal = made[0].principal
        pairs = zip(principal.matrices, principal.indices, strict=True)
        rows = {matrix.name: (indices + matrix.offset_local).tolist() for matrix, indices in pairs}
        counts = dict(zip((matrix.name for matrix in principal.matrices), principal.counts, strict=True))
        found.append((rows, counts, str(made[0].selection), made[1]))
        del made, principal
    return found


def run(world_size, configs, replicas=1):
    """For each config the whole selection of every matrix, by name, and what one rank says; or the error."""
    found = ranks.run(world_size, selected, configs, dp_replicate=replicas)
    results = []
    for outcomes in zip(*found, strict=True):
        if isinstance(outcomes[0], str):
            assert all(isinstance(one, str) for one in outcomes)  # each may name a matrix of its own
            results.append(outcomes[0])
            continue
        shards = world_size // replicas
        names = outcomes[0][0]
        whole = [
            {name: sorted(i for part in outcomes[first : first + shards] for i in part[0][name]) for name in names}
            for first in range(0, world_size, shards)
        ]
        assert all(one == whole[0] for one in whole)
        assert {name: len(indices) for name, indices in whole[0].items()} == outcomes[0][1]
        results.append((whole[0], *outcomes[0][2:]))
    return results


@pytest.mark.parametrize(("world_size", "replicas"), [(1, 1), (2, 1), (3, 1), (4, 2)])
def test_the_weights_of_a_delta_are_trained_or_left_alone(world_size, replicas, models, tmp_path):
    every = []
    for folder in models.values():
        delta = str(folder / "delta")
        for selection in (
            dict(criterion="file", file=delta),
            dict(density=0.3, criterion="magnitude", exclude=[delta]),
            dict(density=0.3, criterion="magnitude", exclude=[delta], modules=["*_proj"]),
            dict(density=0.3, criterion="magnitude", budget="global_threshold", exclude=[delta]),
        ):
            config = settings(folder, **selection)
            config.cache_dir = str(tmp_path / "cache")
            every.append(config)
    found = run(world_size, every, replicas)
    for number, folder in enumerate(models.values()):
        by_file, excluding, again, compared = found[4 * number : 4 * number + 4]
        wanted = differences(folder / "base", folder / "after")
        assert sum(map(len, wanted.values())) > 300
        assert by_file[0] == wanted
        one = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        for name, place in principal_matrices(one).items():
            rows = slice(place.first_row, place.first_row + place.rows)
            columns = slice(place.first_column, place.first_column + place.columns * place.step, place.step)
            matrix = place.param.detach().reshape(-1, place.param.shape[-1])[rows, columns]
            scores = matrix.abs().flatten()
            scores[wanted[name]] = -1
            largest = scores.argsort(descending=True, stable=True)[: round(0.3 * matrix.numel())]
            assert excluding[0][name] == again[0][name] == sorted(largest.tolist())
            assert not set(compared[0][name]) & set(wanted[name])
        assert sum(map(len, compared[0].values())) == sum(map(len, excluding[0].values()))
        left_out = sum(map(len, wanted.values()))
        assert f"left out: {left_out} weights of 1 deltas (selection.exclude)" in excluding[2]


def test_kept_selections_and_runs_name_weights_too(models):
    folder = models["llama"]
    first = run(2, [settings(folder, density=0.1, criterion="random", seed=4)])[0]
    of_cache = settings(folder, criterion="file", file=first[1])
    (of_run_dir,) = ranks.run(1, checkpointed, folder)
    found = run(1, [of_cache, settings(folder, criterion="file", file=str(folder / "trained" / "run"))])
    assert found[0][0] == first[0]
    assert found[1][0] == of_run_dir


def test_a_kept_selection_is_found_by_the_contents_of_files(models, tmp_path):
    folder, other = models["llama"], tmp_path / "elsewhere"
    shutil.copy(folder / "delta", other)
    choices = [
        dict(density=0.1, criterion="magnitude"),
        dict(density=0.1, criterion="magnitude", exclude=[str(folder / "delta")]),
        dict(density=0.1, criterion="magnitude", exclude=[str(other)]),
        dict(criterion="file", file=str(folder / "delta")),
        dict(criterion="file", file=str(other)),
    ]
    found = run(1, [settings(folder, **choice) for choice in choices])
    plain, excluding, copied, by_file, by_copy = [one[1] for one in found]
    assert excluding == copied
    assert by_file == by_copy
    assert len({plain, excluding, by_file}) == 3
    assert found[1][0] == found[2][0]
    assert found[3][0] == found[4][0]


def checkpointed(mesh, folder):
    """Three steps' worth of a checkpoint, with a refresh: every weight that was selected at any time."""
    config = settings(folder, density=0.1, criterion="magnitude")
    config.run_dir = str(folder / "trained" / "run")
    Path(config.run_dir).mkdir(parents=True)
    method = attached(mesh, config)[0]
    principal = method.principal
    ever = [set(indices.tolist()) for indices in principal.indices]
    with torch.no_grad():
        principal.values.mul_(0.01)
    principal.write_back()
    principal.refresh(method.optimizer)
    ever = [one | set(indices.tolist()) for one, indices in zip(ever, principal.indices, strict=True)]
    attempt = builders.claimed_by_all(mesh, Path(config.run_dir))
    writer = Checkpointer(attempt, mesh, 1, None)
    snapshot = Snapshot(3, {}, builders.NOWHERE)
    writer.save(principal.state_dict(method.optimizer), principal.matrices, snapshot)
    writer.wait()
    return {matrix.name: sorted(one) for matrix, one in zip(principal.matrices, ever, strict=True)}


def test_a_model_that_a_delta_was_applied_to(models, tmp_path):
    """The next task of several: what the first has changed is left alone. Another model is refused, and what does not fit."""
    folder = models["llama"]
    first = folder / "delta"
    change_folder(folder / "base", tmp_path / "cache", delta_file.read(first), None, tmp_path / "second")
    digest = weights.digest(tmp_path / "second", tmp_path / "cache")
    third = changed_copy(tmp_path / "second", tmp_path / "third", 2, folder / "base")
    delta_file.write(of_run.between(tmp_path / "second", third, digest), tmp_path / "delta")
    other = builders.llama(tmp_path / "other", None, initializer_range=0.05)
    wide = builders.llama(tmp_path / "wide", None, hidden_size=60)
    deep = builders.llama(tmp_path / "deep", None, num_hidden_layers=1)
    shutil.copytree(folder / "base", tmp_path / "base")
    both = [str(first), str(tmp_path / "delta")]
    (tmp_path / "empty").mkdir()

    def with_file(path):
        return settings(tmp_path, "base", criterion="file", file=str(path))

    found = run(
        2,
        [
            settings(tmp_path, "third", density=0.3, criterion="smallest", exclude=both),
            settings(tmp_path, "base", density=0.3, criterion="smallest", exclude=both),
            *(settings(tmp_path, path.name, density=0.3, exclude=[str(first)]) for path in (other, wide, deep)),
            settings(tmp_path, "base", criterion="file", file=str(first), modules=["*.mlp.*"]),
            *map(with_file, (tmp_path / "absent", tmp_path / "empty", folder / "base" / "model.safetensors")),
            settings(tmp_path, "wide", criterion="file", file=str(first)),
        ],
    )
    one = differences(folder / "base", folder / "after")
    two = differences(tmp_path / "second", third)
    for name, indices in found[0][0].items():
        assert not set(indices) & (set(one[name]) | set(two[name]))
    number = sum(len(set(one[name]) | set(two[name])) for name in one)
    assert f"left out: {number} weights of 2 deltas (selection.exclude)" in found[0][2]
    for outcome, problem in zip(
        found[1:],
        (
            f"selection.exclude {tmp_path}/delta: model.path is neither its base model, nor one that it was applied to: ",
            f"selection.exclude {first}: model.path is neither its base model",
            f"selection.exclude {first}: model.layers.0.",
            "which model.path does not have",
            "which is none of the matrices that are trained; check selection.modules",
            f"{tmp_path}/absent: No such file or directory",
            f"selection.file {tmp_path}/empty: is no delta, no run directory, and no selection of the cache",
            "is another kind of safetensors file, not a delta",
            "is [93, 50] there, [93, 60] in model.path",
        ),
        strict=True,
    ):
        assert problem in outcome


def then_exclude(mesh, folder):
    made, _ = attached(mesh, settings(folder, criterion="file", file=str(folder / "delta")))
    later, _ = attached(mesh, settings(folder, density=0.1, exclude=[str(folder / "delta")]))
    made.principal.selector.excluded = later.principal.selector.excluded
    with pytest.raises(UserError, match="weights that are to be excluded have been trained already"):
        made.reselect(1)


def test_weights_that_were_trained_are_not_excluded_later(models):
    ranks.run(2, then_exclude, models["llama"])


def test_a_delta_that_has_changed_is_a_change_of_the_run():
    before = dict(config="model: {path: m}", from_environment={}, base="1", data="1")

    def between(one, other):
        sides = (Provenance(**before, contents=contents) for contents in (one, other))
        return changes.between(*sides)

    assert between({"selection.exclude": "1"}, {"selection.exclude": "1"}) == []
    assert between({"selection.exclude": "1"}, {"selection.exclude": "2"}) == [
        ("state", "selection.exclude: the contents have changed")
    ]
    assert (
        between({}, {"selection.exclude": "2"}) == []
    )  # the setting itself has changed, or an older version did not know


def test_files_that_do_not_exist_are_refused_before_ranks_start(tmp_path):
    """But a run that has a checkpoint has its own selection, whatever became of the file."""
    for selection, named in (
        (dict(criterion="file", file=f"{tmp_path}/x"), "file"),
        (dict(density=0.1, exclude=[str(tmp_path), f"{tmp_path}/x"]), "exclude"),
    ):
        config = settings(tmp_path, **selection)
        with pytest.raises(UserError, match=f"selection.{named} {tmp_path}/x: no such file or folder"):
            preflight.check_named(config)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    preflight.check_named(settings(tmp_path, criterion="file", file=f"{tmp_path}/x"))


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["criterion=file"], "selection.file: must be given with selection.criterion=file"),
        (["criterion=file", "file=f", "density=0.1"], "selection.density: is not used: selection.file says how many"),
        (["criterion=file", "file=f", "budget=global_threshold"], "selection.budget: is not used: selection.file says"),
        (["density=0.1", "file=f"], "selection.file: is used by selection.criterion=file alone; unset it: selection.file="),
        (["density=0.1", "seed=1"], "selection.seed: is used by what is drawn at random alone"),
    ],
)  # fmt: skip
def test_settings_that_would_not_be_used_are_refused(overrides, problem, tmp_path):
    (tmp_path / "config.yaml").write_text("run_dir: r\nmodel: {path: m}\ndata: {path: d}\n")
    with pytest.raises(UserError) as caught:
        configs.load(tmp_path / "config.yaml", [f"selection.{override}" for override in overrides])
    assert problem in str(caught.value)
