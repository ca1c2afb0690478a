"""transformers' ``Trainer`` on two ranks with FSDP2 against dense LIFT on one process; its checkpoints; what it refuses."""

import builders
import pytest
import ranks
import torch
from trainers import LIFT, REFRESH, STEPS, arguments, dense_lift, logged, model_of, pad, samples, whole
from transformers import TrainerCallback

from liftdist.engine.budgets.half import Half
from liftdist.errors import UserError
from liftdist.integrations.transformers import LiftTrainer


class Look(TrainerCallback):
    """The flat gradient between two micro-batches and before the step, and its norm then."""

    def __init__(self):
        self.substeps, self.norms, self.gradients = [], [], []
        self.trainer = None

    def on_substep_end(self, *_, **__):
        self.substeps.append(self.trainer.principal.values.grad.count_nonzero().item())

    def on_pre_optimizer_step(self, *_, **__):
        self.norms.append(self.trainer.principal.clip_grad_norm_(None).item())
        self.gradients.append(self.trainer.principal.values.grad.clone())


def make(model, folder, look=None, refresh_interval=REFRESH, **settings):
    made = LiftTrainer(
        model,
        arguments(folder, **settings),
        train_dataset=samples(),
        data_collator=pad,
        lift=LIFT,
        refresh_interval=refresh_interval,
    )
    if look is not None:
        look.trainer = made
        made.add_callback(look)
    return made


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def error_of(function):
    try:
        function()
    except UserError as error:
        return str(error)
    return "no error"


def train(base, folder):
    look = Look()
    trainer = make(model_of(base), folder, look)
    trainer.train()
    results = {key: logged(trainer, key) for key in ("loss", "grad_norm", "learning_rate")}
    assert all(param.grad is None for param in trainer.model.parameters())
    assert min(look.substeps) > 0  # the first micro-batch is in the flat vector before the second
    trainer.save_model(str(folder / "model"))
    weights, stored = whole(trainer.model), model_of(folder / "model").state_dict()
    assert same(weights, stored)
    return results | dict(weights=weights, again=error_of(trainer.train))


def on_two_ranks(mesh, base, folder):
    whole_run = train(base, folder / "whole")
    results = dict(run=whole_run)

    look = Look()
    clipped = make(model_of(base), folder / "clipped", look, max_grad_norm=0.1, max_steps=1)
    clipped.train()
    results["clipped"] = logged(clipped, "grad_norm"), look.norms

    saved = make(model_of(base), folder / "saved", save_strategy="steps", save_steps=4)
    saved.train()
    assert same(whole(saved.model), whole_run["weights"])
    checkpoint = folder / "saved" / "checkpoint-4"
    resumed = make(model_of(base), folder / "saved")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same(whole(resumed.model), whole_run["weights"])
    results["resumed"] = logged(resumed, "loss"), logged(resumed, "learning_rate")
    other = make(model_of(checkpoint), folder / "saved")
    results["other base"] = error_of(lambda: other.train(resume_from_checkpoint=str(checkpoint)))

    for key, settings in (("bfloat16", dict(dtype=torch.bfloat16)), ("autocast", dict(bf16=True))):
        look = Look()
        model = model_of(base, settings.pop("dtype", torch.float32))
        make(model, folder / key, look, max_steps=1, gradient_accumulation_steps=1, **settings).train()
        gradient = look.gradients[0]
        results[key] = gradient.norm().item(), (gradient != gradient.bfloat16()).float().mean().item()

    broken = model_of(base)
    broken.get_input_embeddings().weight.data[samples()[-1]["input_ids"]] = torch.nan
    results["nan"] = error_of(make(broken, folder / "nan").train)

    refused = {
        "ddp": dict(fsdp=False),
        "fsdp1": dict(fsdp_config=dict(version=1, sync_module_states=False)),
        "offload": dict(fsdp_config=dict(cpu_offload=True)),
        "checkpointing": dict(fsdp_config=dict(activation_checkpointing=True)),
    }
    results |= {key: error_of(lambda: make(model_of(base), folder, **refused[key])) for key in refused}  # noqa: B023
    return results


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return builders.llama(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trainers")


@pytest.fixture(scope="module")
def results(base, folder):
    return ranks.run(2, on_two_ranks, base, folder)


@pytest.fixture(scope="module")
def reference(base):
    return dense_lift(base)


def check(run, reference):
    assert run["loss"] == pytest.approx(reference["losses"], rel=1e-5)
    assert run["grad_norm"] == pytest.approx(reference["norms"], rel=1e-4)
    assert run["learning_rate"] == pytest.approx([5e-3 * (STEPS - step) / STEPS for step in range(STEPS)])
    for name, weight in run["weights"].items():
        torch.testing.assert_close(weight, reference["weights"][name], rtol=1e-4, atol=1e-6, msg=name)


def test_two_ranks_train_as_dense_lift_does(results, reference):
    for result in results:
        check(result["run"], reference)


def test_one_process_trains_as_dense_lift_does(base, folder, reference):
    check(train(base, folder / "one"), reference)


def test_a_second_training_is_refused(results):
    assert "make a new trainer" in results[0]["run"]["again"]


def test_the_norm_is_clipped_over_all_shards(results, reference):
    for result in results:
        before, after = result["clipped"]
        assert before == pytest.approx(reference["norms"][:1], rel=1e-4)
        assert after == pytest.approx([0.1], rel=1e-4)


def test_a_resumed_run_goes_on_to_the_bit(results):
    for result in results:
        losses, rates = result["resumed"]  # among them those of the run that was resumed
        assert losses == result["run"]["loss"]
        assert rates == result["run"]["learning_rate"]


def test_a_resumed_run_draws_what_was_due(base, tmp_path):
    def make(**settings):
        taken = arguments(tmp_path, fsdp=False, **settings)
        given = dict(train_dataset=samples(), data_collator=pad, lift=dict(budget=Half()), refresh_interval=2)
        return LiftTrainer(model_of(base), taken, **given)

    whole_run, resumed = make(save_strategy="steps", save_steps=4), make()
    whole_run.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert whole_run.principal.selector.refreshes == resumed.principal.selector.refreshes == STEPS // 2
    assert same(whole(resumed.model), whole(whole_run.model))


def test_a_checkpoint_of_another_base_or_world_size_is_refused(results, base, folder):
    assert "trained from another model" in results[0]["other base"]
    assert results[1]["other base"] == results[0]["other base"]
    checkpoint = folder / "saved" / "checkpoint-4"
    with pytest.raises(UserError, match="on as many ranks as saved it"):
        make(model_of(base), folder / "saved").train(resume_from_checkpoint=str(checkpoint))


def test_gradients_are_reduced_in_float32(results):
    for result in results:
        for key in ("bfloat16", "autocast"):
            norm, unrounded = result[key]
            assert norm > 0
            assert unrounded > 0.5, key


def test_a_gradient_that_is_not_finite_ends_the_run_on_all_ranks(results):
    for result in results:
        assert "the norm of the gradient is nan" in result["nan"]


def test_what_would_not_be_honoured_is_refused(results, base, folder):
    for result in results:
        assert "shard with FSDP2" in result["ddp"]
        assert "set version 2" in result["fsdp1"]
        assert "cpu_offload is not supported" in result["offload"]
        assert "activation_checkpointing renames" in result["checkpointing"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(fp16=True), "fp16"),
        (dict(optim="adafactor"), "optim=adafactor"),
        (dict(optim_args="a=1"), "optim_args=a=1"),
        (dict(optim_target_modules="all-linear"), "lift=dict"),
        (dict(torch_compile=True), "torch_compile"),
        (dict(auto_find_batch_size=True), "auto_find_batch_size"),
        (dict(refresh_interval=-1), "refresh_interval"),
        (
            dict(activation_checkpointing=True, activation_checkpointing_kwargs=dict(use_reentrant=True)),
            "use_reentrant",
        ),
        (dict(load_best_model_at_end=True, save_strategy="best", metric_for_best_model="loss"), "load_best_model"),
    ],
)
def test_a_setting_that_would_not_be_honoured_is_refused(base, folder, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        make(model_of(base), folder, **settings)
    assert "\n" not in str(caught.value)


def test_a_misspelt_argument_is_refused(base, folder):
    with pytest.raises(TypeError, match="densty"):
        LiftTrainer(model_of(base), arguments(folder), lift=dict(densty=0.05))
