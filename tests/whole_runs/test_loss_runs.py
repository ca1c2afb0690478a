"""Losses in runs: the same on any ranks, those of two plain models, and continued to the bit."""

import itertools
import json
from pathlib import Path

import builders
import pytest
import ranks
import torch
from transformers import AutoModelForCausalLM

from liftdist.console import Console
from liftdist.data.tokenised import IGNORED
from liftdist.evaluation import held_out_loss, kl_to_base
from liftdist.runs.context import RunContext
from liftdist.runs.saver import Checkpointer
from liftdist.runs.stop import CancellationPoint, StopRequests
from liftdist.runs.watchdog import Watchdog
from liftdist.training.losses.masked_thought import masked

WORLDS = {"1": (1, 1), "2": (2, 1), "3": (3, 1), "replicas": (4, 2)}
CHOICES = {
    "dft": dict(loss="dft"),
    "asft": dict(loss="asft", kl_weight=0.5, eval_kl=True),
    "masked_thought": dict(
        loss="masked_thought", mask_token="<empty_output>", mask_probability=0.6, label_smoothing=0.1
    ),
    "z_loss": dict(z_loss=0.05),
    "token_weights": {},
}
OTHERS = ("z_loss", "token_weights")  # slow
QUICK = tuple(name for name in CHOICES if name not in OTHERS)
STEPS, FIRST = 6, 3


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Of which three in four give their first characters another weight."""
    path = builders.write_records(tmp_path_factory.mktemp("weighted") / "records.jsonl")
    lines = [json.loads(line) | {"w": [[0, 2, n % 4 / 2]]} for n, line in enumerate(path.read_text().splitlines())]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def settings_of(name, model, records, folder, packing=False):
    return builders.config(
        model,
        records,
        Path(folder) / name,
        data=dict(packing=packing, eval_share=0.2, token_weights="w" if name == "token_weights" else None),
        selection=dict(refresh_interval=2),
        train=dict(steps=STEPS, batch_size=7, micro_batch_size=2, seed=5) | CHOICES[name],
        optimizer=dict(lr=2e-2),
    )


def evaluated(mesh, made):
    cancellation = CancellationPoint(StopRequests(), Watchdog(0, Path("unused"), mesh.rank, mesh.world_size))
    context = RunContext(made.config, mesh, Console(False), cancellation)
    figures = {}
    for evaluation in (held_out_loss, kl_to_base):
        figures |= evaluation.run(context, made.inputs, made.model, made.method, step=0)
    return figures


def plain(folder, weights=None):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    if weights is not None:
        model.load_state_dict(weights, strict=False)
    return model.eval()


def whole_weights(model):
    """Collective."""
    found = {}
    for name, param in model.named_parameters():
        found[name] = (param.full_tensor() if hasattr(param, "full_tensor") else param).detach().double()
    return found


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]


def log_probabilities(model, ids):
    return logits_of(model, ids).log_softmax(-1)


def divergence(log_b, log_p):
    return (log_b.exp() * (log_b - log_p)).sum(-1)


def expected_loss(made, base, trained):
    """The loss of the next step, one sample at a time."""
    name, samples = made.config.train.loss, made.inputs.samples
    total, count, step = 0.0, 0, made.step + 1
    for sample in (sample for sequence in made.order.batch(made.consumed) for sample in sequence):
        row = samples.table[sample]
        ids, targets = row["input_ids"], torch.tensor(row["labels"][1:])
        chosen = targets != IGNORED
        targets = targets[chosen]
        if name == "masked_thought":
            rate = 0.6 * min(1, (step - 1) / STEPS / 0.66)
            given = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([[*row["labels"][1:], IGNORED]])}
            changed = masked(given, [[sample]], samples.lengths, made.inputs.mask_token, rate, 5, step)["input_ids"][0]
            logits = logits_of(trained, changed.tolist())[chosen]
        else:
            logits = logits_of(trained, ids)[chosen]
        log_p = logits.log_softmax(-1)
        log_y = log_p.gather(1, targets[:, None])[:, 0]
        if name == "masked_thought":
            losses = 0.9 * -log_y - 0.1 * log_p.mean(1)
        elif name == "cross_entropy":
            losses = -log_y + made.config.train.z_loss * logits.logsumexp(-1).square()
        else:
            losses = log_y.exp() * -log_y
            if name == "asft":
                losses = losses + 0.5 * divergence(log_probabilities(base, ids)[chosen], log_p)
        weights = torch.ones_like(losses)
        if row.get("weights"):  # None: all are 1
            weights = torch.tensor(row["weights"][1:]).double()[chosen]
        total, count = total + (losses * weights).sum().item(), count + weights.sum().item()
    return total / count


def expected_evaluation(made, base, trained):
    loss = far = count = 0.0
    for samples in made.inputs.held_out.values():
        for row in samples.table:
            targets = torch.tensor(row["labels"][1:])
            chosen = targets != IGNORED
            log_b, log_p = (log_probabilities(model, row["input_ids"])[chosen] for model in (base, trained))
            loss += -log_p.gather(1, targets[chosen][:, None]).sum().item()
            far += divergence(log_b, log_p).sum().item()
            count += int(chosen.sum())
    return loss / count, far / count


def trained(mesh, model, records, folder, names):
    """For each loss: the losses of four steps, what the last is expected to be, and evaluations before and after."""
    found = {}
    for name, packing in itertools.product(names, (False, True)):
        made = builders.trainer(mesh, settings_of(name, model, records, folder, packing))
        before = evaluated(mesh, made)
        losses = [made.run_step()["train/loss"] for _ in range(FIRST)]
        after = evaluated(mesh, made)
        base, now = plain(model), plain(model, whole_weights(made.model))
        expected = expected_loss(made, base, now), expected_evaluation(made, base, now)
        losses.append(made.run_step()["train/loss"])
        found[name, packing] = losses, expected, before, after
    return found


both = pytest.mark.parametrize(
    "names", [QUICK, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["quick", "others"], scope="module"
)


@pytest.fixture(scope="module")
def on_one_rank(tiny_model, records, tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("one")
    return ranks.run(1, trained, tiny_model, records, folder, names)[0]


@both
@pytest.mark.parametrize("world", ["1", "2", pytest.param("3", marks=pytest.mark.slow), "replicas"])
def test_losses_are_those_of_plain_models_on_any_ranks(world, tiny_model, records, tmp_path, names, on_one_rank):
    size, replicas = WORLDS[world]
    results = [on_one_rank]
    if world != "1":
        results = ranks.run(size, trained, tiny_model, records, tmp_path, names, dp_replicate=replicas)
    for found in results:
        for (name, packing), (losses, (expected, (held_out, far)), before, after) in found.items():
            # log probabilities of about -11 in float32, of which a small difference is taken
            accuracy = 1e-4 if name == "asft" else 1e-5
            assert losses == pytest.approx(on_one_rank[name, packing][0], rel=1e-4), name
            assert losses[-1] == pytest.approx(expected, rel=accuracy), name
            assert after["eval/loss"] == pytest.approx(held_out, rel=1e-5), name
            assert ("eval/kl_to_base" in after) == (name == "asft")
            if name == "asft":
                assert before["eval/kl_to_base"] == 0.0
                assert after["eval/kl_to_base"] == pytest.approx(far, rel=1e-3)
                assert far > 1e-3
        for packing in (False, True) if "asft" in names else ():
            asft, dft = found["asft", packing][0], found["dft", packing][0]
            assert asft[0] == dft[0]  # the divergence is 0 in the first step
            assert asft[-1] != pytest.approx(dft[-1], rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Continued runs.


def stopped_after_three(mesh, model, records, folder, names):
    """The state after six steps, and a checkpoint of the third."""
    found = {}
    for name in names:
        settings = settings_of(name, model, records, folder)
        made = builders.trainer(mesh, settings)
        attempt = builders.claimed_by_all(mesh, Path(settings.run_dir))
        losses = []
        while made.step < STEPS:
            losses.append(made.run_step()["train/loss"])
            if made.step == FIRST:
                builders.save(made, Checkpointer(attempt, mesh, 1, None))
        found[name] = builders.global_digest(made), losses[FIRST:], evaluated(mesh, made)
    return found


def continued(mesh, model, records, folder, names):
    found = {}
    for name in names:
        settings = settings_of(name, model, records, folder)
        saved = builders.newest(mesh, Path(settings.run_dir), builders.accepted_in(Path(settings.run_dir)))
        made = builders.trainer(mesh, settings, saved)
        losses = [made.run_step()["train/loss"] for _ in range(STEPS - FIRST)]
        found[name] = builders.global_digest(made), losses, evaluated(mesh, made)
    return found


@both
def test_they_continue(tiny_model, records, tmp_path, names):
    (whole, *others) = ranks.run(2, stopped_after_three, tiny_model, records, tmp_path, names)
    assert all(other == whole for other in others)
    assert ranks.run(2, continued, tiny_model, records, tmp_path, names)[0] == whole
    on_three = ranks.run(3, continued, tiny_model, records, tmp_path, names)[0]
    for name, (_, losses, _) in whole.items():
        assert on_three[name][1] == pytest.approx(losses, rel=1e-4), name
