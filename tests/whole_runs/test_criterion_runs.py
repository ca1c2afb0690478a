"""Runs whose number of weights changes at a refresh: continued to the bit, and on another number of ranks."""

import shutil
from pathlib import Path

import builders
import pytest
import ranks
from commands import liftdist

from liftdist import config as configs
from liftdist.deltas import file as delta_file
from liftdist.deltas import of_run
from liftdist.engine.criteria.low_rank import LowRank
from liftdist.engine.gathered import Gathered
from liftdist.errors import UserError
from liftdist.method_settings import SelectionConfig
from liftdist.registry import CRITERIA
from liftdist.runs.saver import Checkpointer

CHOICES = {
    "threshold": dict(criterion="threshold", threshold=0.01, density=None),
    "global": dict(criterion="residual", budget="global_threshold"),
    "pattern": dict(criterion="blocks", budget="by_pattern", shares=["*.down_proj=0.2", "*.q_proj=0"]),
    "shrinking": dict(criterion="residual", budget="sensitivity", final_density=0.02, final_refresh=2),
    "random": dict(criterion="random"),
    "excluding": dict(criterion="magnitude", budget="global_threshold", exclude=["first.delta"]),
    "file": dict(criterion="file", file="first.delta", density=None),
    "off_principal": dict(criterion="off_principal"),
    "smallest": dict(criterion="smallest"),
    "low_rank_smallest": dict(criterion="low_rank_smallest"),
    "channels": dict(criterion="channels"),
    "half": dict(budget="half", density=None),
}
OTHERS = ("off_principal", "smallest", "low_rank_smallest", "channels", "half")  # slow
QUICK = tuple(name for name in CHOICES if name not in OTHERS)
STEPS = 6


def settings_of(name, model, records, folder):
    choice = dict(CHOICES[name])
    if "exclude" in choice:
        choice["exclude"] = [str(Path(folder) / path) for path in choice["exclude"]]
    if "file" in choice:
        choice["file"] = str(Path(folder) / choice["file"])
    return builders.config(
        model,
        records,
        Path(folder) / name,
        selection=dict(refresh_interval=2) | choice,
        train=dict(steps=STEPS, batch_size=6),
        optimizer=dict(lr=5e-3),
    )


def stopped_after_three(mesh, model, records, folder, names):
    """The state after six steps, and a checkpoint of the third."""
    found = {}
    for name in names:
        settings = settings_of(name, model, records, folder)
        made = builders.trainer(mesh, settings)
        attempt = builders.claimed_by_all(mesh, Path(settings.run_dir))
        counts = [made.method.principal.counts]
        for _ in range(STEPS):
            made.run_step()
            counts.append(made.method.principal.counts)
            if made.step == 3:
                builders.save(made, Checkpointer(attempt, mesh, 1, None))
        made.method.principal.check_excluded()
        found[name] = builders.global_digest(made), counts, made.method.principal.selector.refreshes
    return found


def continued(mesh, model, records, folder, names):
    found = {}
    for name in names:
        settings = settings_of(name, model, records, folder)
        saved = builders.newest(mesh, Path(settings.run_dir), builders.accepted_in(Path(settings.run_dir)))
        made = builders.trainer(mesh, settings, saved)
        assert made.step == 3
        counts = [made.method.principal.counts]
        while made.step < STEPS:
            made.run_step()
        principal = made.method.principal
        found[name] = builders.global_digest(made), [*counts, principal.counts], principal.selector.refreshes
    return found


def task(mesh, model, records, folder, name="first", *exclude):
    """A run of two steps, which may be any: its delta names weights."""
    settings = builders.config(
        model, records, Path(folder) / name, train=dict(steps=2), optimizer=dict(lr=5e-3), selection=dict(exclude=[*exclude])
    )  # fmt: skip
    builders.train_and_save(mesh, settings)
    return settings.run_dir


def assert_they_continue(names, model, records, folder):
    """What runs of two ranks were at the end, with all their counts, by name."""
    (whole, *others) = ranks.run(2, stopped_after_three, model, records, folder, names)
    assert all(other == whole for other in others)
    same = ranks.run(2, continued, model, records, folder, names)[0]
    more = ranks.run(3, continued, model, records, folder, names)[0]
    for name, (digest, counts, refreshes) in whole.items():
        assert refreshes == (0 if name == "file" else 3)
        assert same[name] == (digest, [counts[3], counts[-1]], refreshes), name
        assert more[name][1][0] == counts[3], name
        assert all(sum(one) > 0 for one in counts)
    return whole


def test_they_continue(tiny_model, records, tmp_path):
    (run_dir,) = ranks.run(1, task, tiny_model, records, tmp_path)
    delta_file.write(of_run.of_run_dir(Path(run_dir), None, tiny_model)[0], tmp_path / "first.delta")
    whole = assert_they_continue(QUICK, tiny_model, records, tmp_path)
    changing = {name for name, (_, counts, _) in whole.items() if counts[0] != counts[-1]}
    assert {"threshold", "global", "shrinking"} <= changing <= {"threshold", "global", "shrinking", "excluding"}
    totals = [sum(one) for one in whole["shrinking"][1]]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] == pytest.approx(0.4 * totals[0], rel=0.01)
    assert {sum(one) for one in whole["global"][1]} == {sum(whole["random"][1][0])}


@pytest.mark.slow
def test_others_continue(tiny_model, records, tmp_path):
    whole = assert_they_continue(OTHERS, tiny_model, records, tmp_path)
    changing = {name for name, (_, counts, _) in whole.items() if any(one != counts[0] for one in counts)}
    assert changing == {"half"}


def test_tasks_that_exclude_each_other_s_weights_come_and_go_one_by_one(tiny_model, records, tmp_path):
    first, second = (tmp_path / f"{name}.delta" for name in ("first", "second"))
    for delta, exclude in ((first, ()), (second, (str(first),))):
        (run_dir,) = ranks.run(1, task, tiny_model, records, tmp_path, delta.stem, *exclude)
        delta_file.write(of_run.of_run_dir(Path(run_dir), None, tiny_model)[0], delta)
    at = "--cache-dir", tmp_path / "cache"
    alone = {}
    for delta in (first, second):
        liftdist("apply", delta, tiny_model, "--output", tmp_path / delta.stem / "alone", *at)
        alone[delta] = builders.contents(tmp_path / delta.stem / "alone")
    folder, base = shutil.copytree(tiny_model, tmp_path / "model"), builders.contents(tiny_model)
    for one, other in ((first, second), (second, first)):
        liftdist("apply", one, folder, *at)
        liftdist("apply", other, folder, "--beside", one, *at)
        liftdist("apply", one, folder, "--undo", "--beside", other, *at)
        assert builders.contents(folder) == alone[other] != base
        liftdist("apply", other, folder, "--undo", *at)
        assert builders.contents(folder) == base


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["criterion=threshold"], "selection.threshold: must be given with selection.criterion=threshold"),
        (["criterion=threshold", "threshold=0.1", "density=0.1"], "selection.density: is not used: selection.threshold says"),
        (["density=0.1", "threshold=0.1"], "selection.threshold: is used by selection.criterion=threshold alone"),
        (["density=0.1", "block_size=2"], "selection.block_size: is used by selection.criterion=blocks and channels alone"),
        (["density=0.1", "budget=by_pattern"], "selection.shares: must be given with selection.budget=by_pattern"),
        (["density=0.1", "budget=by_pattern", "shares=['*=-1']"], "selection.shares: is not of a form that this setting takes"),
        (["density=0.1", "criterion=lowrank"], "did you mean low_rank"),
        (["density=0.1", "budget=half"], "selection.density: is not used: selection.budget=half trains whole matrices"),
        (["density=0.1", "final_density=0.1"], "selection.final_density: is used by selection.budget=sensitivity alone"),
        (["density=0.1", "budget=sensitivity", "final_density=0.1"], "selection.final_refresh: must be given"),
        (["budget=layers"], "selection.layers: must be given with selection.budget=layers and ist"),
        (["budget=half", "criterion=random"], "selection.criterion: is not used: selection.budget=half trains"),
        (["density=0.1", "criterion=spiel", "final_refresh=2", "budget=ist", "layers=1"], "budget: cannot be ist with"),
        (["density=0.1", "criterion=random", "budget=sensitivity"], "criteria that fit are low_rank, magnitude, residual"),
    ],
)  # fmt: skip
def test_settings_that_would_not_be_used_are_refused(overrides, problem, tmp_path):
    (tmp_path / "config.yaml").write_text("run_dir: r\nmodel: {path: m}\ndata: {path: d}\n")
    with pytest.raises(UserError) as caught:
        configs.load(tmp_path / "config.yaml", [f"selection.{override}" for override in overrides])
    assert problem in str(caught.value)


def test_the_registry_says_what_the_settings_must_know_of_each_criterion():
    made = SelectionConfig(threshold=0.1, file="first.delta", gradient_batches=1, final_refresh=1)
    for name in CRITERIA:
        rule = CRITERIA.load(name).make(made)
        facts = {
            "factors": isinstance(rule, LowRank),
            "magnitudes": getattr(rule, "are_magnitudes", False),
            "gradients": isinstance(rule, Gathered),
            "number": getattr(rule, "decides_number", False),
        }
        assert {fact: name in CRITERIA.having(fact) for fact in facts} == facts, name


OPTIMIZERS = {
    "sgd": dict(name="sgd", lr=0.5),
    "entry": dict(bias_correction="entry"),
    "base": dict(weight_decay=0.1, decay_towards="base"),
}


def with_optimizers(mesh, model, records, folder, saving):
    """The state after six steps: at once, with a checkpoint of the third, or from that one."""
    found = {}
    for name, optimizer in OPTIMIZERS.items():
        settings = settings_of("random", model, records, Path(folder) / name)
        settings.selection.criterion = "magnitude"
        for key, value in optimizer.items():
            setattr(settings.optimizer, key, value)
        run_dir = Path(settings.run_dir)
        saved = None if saving else builders.newest(mesh, run_dir, builders.accepted_in(run_dir))
        made = builders.trainer(mesh, settings, saved)
        attempt = builders.claimed_by_all(mesh, run_dir) if saving else None
        while made.step < STEPS:
            made.run_step()
            if attempt and made.step == 3:
                builders.save(made, Checkpointer(attempt, mesh, 1, None))
        found[name] = builders.global_digest(made)
    return found


def test_optimizers_continue(tiny_model, records, tmp_path):
    whole = ranks.run(2, with_optimizers, tiny_model, records, tmp_path, True)[0]
    assert ranks.run(2, with_optimizers, tiny_model, records, tmp_path, False)[0] == whole
    assert len(set(whole.values())) == 3
    ranks.run(3, with_optimizers, tiny_model, records, tmp_path, False)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["name=muon"], "optimizer.name: must be one of adamw, sgd: muon works on whole matrices"),
        (["name=sgd", "betas=[0.9,0.999]"], "optimizer.betas: is not used by optimizer.name=sgd"),
        (["momentum=0.9"], "optimizer.momentum: is not used by optimizer.name=adamw"),
        (["bias_correction=entry", "dtype=bfloat16"], "optimizer.bias_correction: entry needs optimizer.dtype=float32"),
        (["decay_towards=base"], "optimizer.decay_towards: base has no effect without optimizer.weight_decay"),
    ],
)  # fmt: skip
def test_settings_of_other_optimizers_are_refused(overrides, problem, tmp_path):
    (tmp_path / "config.yaml").write_text("run_dir: r\nmodel: {path: m}\ndata: {path: d}\nselection: {density: 0.1}\n")
    with pytest.raises(UserError) as caught:
        configs.load(tmp_path / "config.yaml", [f"optimizer.{override}" for override in overrides])
    assert problem in str(caught.value)
