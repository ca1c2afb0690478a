"""Settings of one optimizer step and of the loop, on one rank."""

import json

import builders
import pytest
import ranks
import torch

from liftdist.console import Console
from liftdist.errors import UserError
from liftdist.training.inputs import prepare_inputs


def losses_of(mesh, config):
    made = builders.trainer(mesh, config)
    figures = [made.run_step() for _ in range(made.steps)]
    return dict(
        losses=[f["train/loss"] for f in figures],
        lrs=[f["train/lr"] for f in figures],
        norms=[f["train/grad_norm"] for f in figures],
        values=made.method.principal.values.detach().clone(),
        sequences=made.consumed,
    )


@pytest.fixture
def run(tiny_model, tmp_path):
    records = builders.write_records(tmp_path / "records.jsonl")

    def run(world_size=1, **sections):
        sections.setdefault("train", {})
        sections["train"] = dict(steps=6) | sections["train"]
        return ranks.run(world_size, losses_of, builders.config(tiny_model, records, tmp_path, **sections))[0]

    return run


def test_schedules(run):
    settings = dict(lr=1.0e-4, warmup_ratio=0.3)
    linear = run(optimizer=settings)["lrs"]
    assert linear == pytest.approx([0, 5e-5, 1e-4, 7.5e-5, 5e-5, 2.5e-5])
    assert run(optimizer=settings | dict(schedule="constant"))["lrs"] == pytest.approx([0, 5e-5] + [1e-4] * 4)
    cosine = run(optimizer=settings | dict(schedule="cosine"))["lrs"]
    assert cosine == pytest.approx([0, 5e-5, 1e-4, 8.5355e-5, 5e-5, 1.46447e-5], rel=1e-4)


WARMUPS = [  # steps, ratio, steps of warm-up by rounding to the nearest and by rounding down
    (6, 0.1, 1, 0),
    (6, 0.3, 2, 1),
    (20, 0.03, 1, 0),
    (100, 0.29, 29, 28),  # 28.999999999999996
    (10, 0.25, 2, 2),  # halves are rounded to even
    (40, 0.1, 4, 4),
    (5, 0.0, 0, 0),
    (3, 1.0, 3, 3),
]


def warmups_of(mesh, config):
    made = builders.trainer(mesh, config)
    found = []
    for steps, ratio, *_ in WARMUPS:
        made.steps, config.optimizer.warmup_ratio = steps, ratio
        factor = made._make_schedule().lr_lambdas[0]
        found.append(next(step for step in range(steps + 1) if factor(step) == 1.0 or step == steps))
    return found


@pytest.mark.parametrize("reference", [False, True])
def test_warm_up_is_rounded_and_rounded_down_as_in_the_authors_code(reference, tiny_model, records, tmp_path):
    config = builders.config(tiny_model, records, tmp_path, optimizer=dict(reference_numerics=reference))
    ((found),) = ranks.run(1, warmups_of, config)
    assert found == [down if reference else nearest for _, _, nearest, down in WARMUPS]


def test_layers_that_stay_gathered_hold_what_training_makes_of_them(run):
    """Also after the forwards of the base model in which they were gathered."""
    settings = dict(train=dict(loss="asft"), selection=dict(refresh_interval=2))
    gathered_again = run(2, **settings)
    for kept in (1, 9):
        found = run(2, model=dict(keep_gathered=kept), **settings)
        assert torch.equal(found.pop("values"), gathered_again["values"])
        assert found == {key: gathered_again[key] for key in found}


def test_what_must_not_change_the_result(run):
    plain = run()
    for same in (
        run(model=dict(activation_checkpointing=True)),
        run(train=dict(micro_batch_size=8)),
        run(train=dict(deterministic=True)),
        run(selection=dict(method="exact")),
        run(optimizer=dict(max_grad_norm=1e9)),
    ):
        assert same["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    packed = run(data=dict(packing=True))
    assert packed["sequences"] == plain["sequences"] == 48  # the batch counts sequences, each of several samples here
    assert packed["losses"][0] == pytest.approx(plain["losses"][0], abs=0.2)
    assert run(optimizer=dict(max_grad_norm=1e-3))["norms"][0] == pytest.approx(plain["norms"][0])


def test_epochs_end_where_the_data_does(run):
    result = run(2, train=dict(steps=None, epochs=2, batch_size=7, micro_batch_size=2))
    assert len(result["losses"]) == 12  # ceil(2 * 40 / 7)
    assert result["sequences"] == 80


def test_reference_numerics_add_epsilon_to_the_uncorrected_denominator(run):
    settings = dict(eps=1e-2, schedule="constant", lr=1e-2)
    stock, reference = (
        run(train=dict(steps=1), optimizer=settings | dict(reference_numerics=r)) for r in (False, True)
    )
    assert not torch.equal(stock["values"], reference["values"])
    # after one step: m = .1 g, v = .05 g^2; ours: g / (|g| + eps), the authors': g / (|g| + eps / sqrt(.05))
    start = run(train=dict(steps=1), optimizer=dict(lr=1e-30))["values"]
    moved, moved_reference = (start - stock["values"]).abs() / 1e-2, (start - reference["values"]).abs() / 1e-2
    gradient = 1e-2 * moved / (1 - moved)
    assert torch.allclose(moved_reference, gradient / (gradient + 1e-2 / 0.05**0.5), atol=2e-4)


def test_samples_beyond_the_context_of_the_model_are_refused(tiny_model, tmp_path):
    records = tmp_path / "long.jsonl"
    records.write_text(json.dumps({"prompt": "a", "completion": " b" * 600}) + "\n")
    config = builders.config(tiny_model, records, tmp_path, data=dict(max_length=1000))
    with pytest.raises(UserError, match=r"data.max_length=1000: .* a sample of 602 tokens, the model's context is 512"):
        prepare_inputs(config, Console(False))
    config.data.max_length = 512
    assert prepare_inputs(config, Console(False)).samples.report.counts == {"truncated to data.max_length": 1}


def diverged(mesh, config):
    try:
        losses_of(mesh, config)
    except UserError as error:
        return str(error)
    return ""


def test_a_run_that_diverges_says_so_on_every_rank(tiny_model, tmp_path):
    records = builders.write_records(tmp_path / "records.jsonl")
    config = builders.config(
        tiny_model,
        records,
        tmp_path,
        optimizer=dict(lr=1e38, schedule="constant"),
        train=dict(steps=6, max_skipped_steps=0),
    )
    assert all("steps in a row were skipped" in text for text in ranks.run(2, diverged, config))


@pytest.mark.slow
def test_compiled_layers_give_the_same_losses(run):
    assert run(model=dict(compile=True))["losses"] == pytest.approx(run()["losses"], rel=1e-5)
