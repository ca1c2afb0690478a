"""TRL's trainers on two ranks with FSDP2: SFT against dense LIFT, DPO against an explicit second model as the reference."""

import random

import builders
import pytest
import ranks
import torch
from datasets import Dataset
from trainers import BATCH, LIFT, REFRESH, arguments, dense_lift, logged, model_of, samples, tokenizer, whole
from trl import DPOConfig, SFTConfig

from liftdist.errors import UserError
from liftdist.integrations.trl import LiftDPOTrainer, LiftSFTTrainer


def pairs(count):
    draw = random.Random(1)

    def words(number):
        return "".join(f" w{draw.randrange(3, 257)}" for _ in range(number))

    return Dataset.from_list([dict(prompt=words(4), chosen=words(6), rejected=words(3)) for _ in range(count)])


def sft(base, folder, **settings):
    trainer = LiftSFTTrainer(
        model_of(base),
        args=arguments(folder, SFTConfig, max_length=None, **settings),
        train_dataset=Dataset.from_list(samples()),
        processing_class=tokenizer(),
        lift=LIFT,
        refresh_interval=REFRESH,
    )
    trainer.train()
    return dict(losses=logged(trainer, "loss"), norms=logged(trainer, "grad_norm"), weights=whole(trainer.model))


def dpo(base, folder, ref_model=None, **settings):
    return LiftDPOTrainer(
        model_of(base),
        ref_model,
        args=arguments(folder, DPOConfig, beta=0.5, eval_strategy="steps", eval_steps=3, **settings),
        train_dataset=pairs(6 * BATCH),
        eval_dataset=pairs(4),
        processing_class=tokenizer(),
        lift=LIFT,
        refresh_interval=REFRESH,
    )


def trained(trainer):
    trainer.train()
    keys = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "eval_loss", "eval_rewards/margins")
    return {key: logged(trainer, key) for key in keys} | dict(weights=whole(trainer.model))


def run(mesh, base, folder):
    results = dict(sft=sft(base, folder / "sft"))
    within = dpo(base, folder / "within")
    assert within.ref_model is None
    results["within"] = trained(within)
    results["explicit"] = trained(dpo(base, folder / "explicit", model_of(base)))
    if mesh is not None:  # weights that stay gathered from the forward to the backward
        results["kept"] = trained(dpo(base, folder / "kept", fsdp_config=dict(reshard_after_forward=False)))
    return results


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return builders.llama(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module", params=[2, 1], ids=["two ranks", "one"])
def results(request, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    return ranks.run(2, run, base, folder) if request.param == 2 else [run(None, base, folder)]


def test_sft_trains_as_dense_lift_does(results, base):
    reference = dense_lift(base)
    for result in results:
        assert result["sft"]["losses"] == pytest.approx(reference["losses"], rel=1e-5)
        assert result["sft"]["norms"] == pytest.approx(reference["norms"], rel=1e-4)
        for name, weight in result["sft"]["weights"].items():
            torch.testing.assert_close(weight, reference["weights"][name], rtol=1e-4, atol=1e-6, msg=name)


def test_dpo_with_the_base_model_inside_the_trained_one_equals_dpo_with_a_second_model(results):
    for result in results:
        explicit = result["explicit"]
        for within in (result[key] for key in ("within", "kept") if key in result):
            for key in set(explicit) - {"weights"}:
                assert within[key] == pytest.approx(explicit[key], rel=1e-5, abs=1e-6), key
            for name, weight in within["weights"].items():
                torch.testing.assert_close(weight, explicit["weights"][name], rtol=1e-5, atol=1e-7, msg=name)


def test_the_implicit_reward_is_zero_at_first_and_not_later(results):
    for result in results:
        chosen, rejected = result["within"]["rewards/chosen"], result["within"]["rewards/rejected"]
        assert chosen[0] == rejected[0] == 0
        assert min(map(abs, chosen[1:] + rejected[1:])) > 1e-5


@pytest.mark.parametrize("name", ["precompute_ref_log_probs", "sync_ref_model"])
def test_dpo_refuses_what_needs_a_second_model(base, tmp_path, name):
    with pytest.raises(UserError, match=f"{name} needs a model of its own"):
        dpo(base, tmp_path, **{name: True})
