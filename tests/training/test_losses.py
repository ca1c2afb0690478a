"""Each loss is what a few dense lines say, and so is its gradient, whole and in chunks."""

import builders
import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from liftdist import config as configs
from liftdist.data.tokenised import IGNORED
from liftdist.errors import UserError
from liftdist.models import head
from liftdist.registry import LOSSES
from liftdist.schema import TrainConfig
from liftdist.training import objective
from liftdist.training.losses import asft, masked_thought

TOKENS, VOCABULARY = 41, 23


def cross_entropy(p, base, y, label_smoothing=0.0, z_loss=0.0, z=None):
    smooth = (1 - label_smoothing) * -p[y].log() + label_smoothing * -p.log().mean()
    return smooth + z_loss * z.exp().sum().log() ** 2


def dft(p, base, y, **_):
    return p[y].detach() * -p[y].log()


def anchored(p, base, y, kl_weight=0.1, **_):
    return dft(p, base, y) + kl_weight * (base * (base / p).log()).sum()


CASES = {
    "cross_entropy": ("cross_entropy", {}, cross_entropy),
    "smoothed": ("cross_entropy", {"label_smoothing": 0.1}, cross_entropy),
    "z-loss": ("cross_entropy", {"z_loss": 0.01}, cross_entropy),
    "both": ("masked_thought", {"label_smoothing": 0.2, "z_loss": 0.003}, cross_entropy),
    "dft": ("dft", {}, dft),
    "asft": ("asft", {}, anchored),
    "asft 2": ("asft", {"kl_weight": 2.0}, anchored),
    "asft 0": ("asft", {"kl_weight": 0.0}, dft),
}


def rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, base = torch.randn(2, TOKENS, 7, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    labels[::4] = IGNORED
    weights = torch.rand(TOKENS, generator=generator, dtype=torch.float64)
    return hidden, base, weight, labels, weights


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk", [1, 6, TOKENS])
def test_losses_are_the_dense_ones(name, chunk, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_LOGITS", VOCABULARY * chunk)
    kind, settings, dense = CASES[name]
    hidden, base, weight, labels, weights = rows()

    def expected(hidden):
        total = 0.0
        for h, b, y, w in zip(hidden, base, labels, weights, strict=True):
            if y != IGNORED:
                z = weight @ h
                total = total + w * dense(z.softmax(0), (weight @ b).softmax(0), y, **settings, z=z)
        return total

    exact = hidden.clone().requires_grad_()
    expected(exact).backward()

    loss = LOSSES.load(kind).make(TrainConfig(loss=kind, **settings))
    assert loss.needs_base == (kind == "asft" and name != "asft 0")
    given = hidden.float().requires_grad_()
    others = (base.float(),) if loss.needs_base else ()
    total = head.ChunkedLoss.apply(given, weight.float(), labels, loss.per_token, head.Terms(weights.float()), *others)
    (3 * total).backward()
    assert total.item() == pytest.approx(expected(hidden).item(), rel=1e-5)
    assert (given.grad / 3 - exact.grad).norm() <= 1e-5 * exact.grad.norm()
    assert not given.grad[labels == IGNORED].any()

    logits = hidden.float() @ weight.float().T
    base_logits = (base.float() @ weight.float().T,) if loss.needs_base else ()
    each = loss.per_token(logits, labels, *base_logits)
    assert each.dtype == torch.float32
    assert not each[labels == IGNORED].any()


def test_divergence_is_that_of_two_distributions():
    hidden, base, weight, labels, _ = rows()
    p, b = (hidden @ weight.T).softmax(-1), (base @ weight.T).softmax(-1)
    expected = torch.distributions.kl_divergence(torch.distributions.Categorical(b), torch.distributions.Categorical(p))
    found = asft.kl_to_base(hidden @ weight.T, labels, base @ weight.T)
    assert torch.allclose(found.double(), expected * (labels != IGNORED), rtol=1e-5)
    assert not asft.kl_to_base(hidden @ weight.T, labels, hidden @ weight.T).any()


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_a_loss_compares_with_the_base_model(model_type, tmp_path, monkeypatch):
    """In chunks and, of a model that caps its logits, with all of them; dropout is off in the base model's forward."""
    monkeypatch.setattr(head, "CHUNK_LOGITS", 257 * 10)
    sizes = {"final_logit_softcapping": 3.0} if model_type == "gemma2" else {}
    model = builders.frozen_model(tmp_path, model_type, attention_dropout=0.5, **sizes)
    batch = {
        "input_ids": torch.randint(3, 257, (2, 30), generator=torch.Generator().manual_seed(0)),
        "position_ids": torch.arange(30).expand(2, -1),
    }
    batch["labels"] = batch["input_ids"].roll(-1, 1)
    batch["labels"][:, :7] = IGNORED
    in_chunks = head.is_plain(model, torch.device("cpu"))
    assert in_chunks == (model_type == "llama")
    if in_chunks:
        head.in_chunks(model)
    weight = model.get_decoder().layers[0].mlp.down_proj.weight.requires_grad_()
    model.train()
    base = objective.base_outputs(model, batch)
    assert model.training
    assert base.shape == (2 * 23, model.config.hidden_size if in_chunks else 257)
    model.eval()
    assert objective.token_losses(model, batch, asft.kl_to_base, base=base).item() == 0.0
    inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
    before = model(**inputs).logits.double()[:, 7:].log_softmax(-1).detach()
    with torch.no_grad():
        weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    after = model(**inputs).logits.double()[:, 7:].log_softmax(-1)
    expected = (before.exp() * (before - after)).sum()
    expected.backward()
    gradient, weight.grad = weight.grad, None
    found = objective.token_losses(model, batch, asft.kl_to_base, base=base)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert found.item() > 1e-2
    assert (weight.grad - gradient).norm() <= 1e-4 * gradient.norm()


# ---------------------------------------------------------------------------------------------------------------------
# Masked thought.


def test_the_probability_rises():
    masking = LOSSES.load("masked_thought").make(TrainConfig(loss="masked_thought")).masking
    assert [masking.rate(step, 100) for step in (1, 34, 67, 68, 100)] == pytest.approx([0, 0.2, 0.4, 0.4, 0.4])
    assert masked_thought.Masking(0.3, 0).rate(1, 100) == 0.3


def test_response_tokens_are_replaced_alike_wherever_they_stand():
    lengths = np.array([400, 300, 200])
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(10, 99, (int(size),), generator=generator) for size in lengths]

    def batch(*sequences):
        longest = max(sum(int(lengths[sample]) for sample in sequence) for sequence in sequences)
        input_ids, labels = torch.zeros(len(sequences), longest).long(), torch.full((len(sequences), longest), IGNORED)
        for row, sequence in enumerate(sequences):
            begin = 0
            for sample in sequence:
                end = begin + int(lengths[sample])
                input_ids[row, begin:end] = samples[sample]
                labels[row, begin + 49 : end - 1] = samples[sample][50:]  # a prompt of 50 tokens
                begin = end
        given = {"input_ids": input_ids, "labels": labels}
        return masked_thought.masked(given, sequences, lengths, 5, 0.4, 7, 3), labels

    apart, labels = batch([0], [1], [2])
    packed, _ = batch([2, 0], [1])
    assert torch.equal(apart["labels"], labels)
    assert torch.equal(packed["input_ids"][0, :600], torch.cat([apart["input_ids"][2, :200], apart["input_ids"][0]]))
    assert torch.equal(packed["input_ids"][1, :300], apart["input_ids"][1, :300])
    replaced = apart["input_ids"] == 5
    assert not replaced[:, :50].any()
    assert replaced[0, 50:].float().mean().item() == pytest.approx(0.4, abs=0.06)
    assert torch.equal(apart["input_ids"][0][~replaced[0]], samples[0][~replaced[0]])
    given = {"input_ids": samples[0][None], "labels": labels[:1]}
    again, later, seeded = (
        masked_thought.masked(given, [[0]], lengths, 5, 0.4, *at) for at in ((7, 3), (7, 4), (8, 3))
    )
    assert torch.equal(again["input_ids"][0], apart["input_ids"][0])
    assert not torch.equal(later["input_ids"], again["input_ids"])
    assert not torch.equal(seeded["input_ids"], again["input_ids"])


def test_the_token_that_replaces_others(tokenizer):
    def found(**settings):
        return masked_thought.token_id(tokenizer, TrainConfig(loss="masked_thought", **settings), 49152)

    assert found(mask_token="<empty_output>") == tokenizer.convert_tokens_to_ids("<empty_output>")
    for settings, problem in (({}, "no mask token; name a token"), ({"mask_token": "<none>"}, "is no token of")):
        with pytest.raises(UserError, match=problem):
            found(**settings)
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, mask_token="<file_sep>")
    assert masked_thought.token_id(own, TrainConfig(), 49152) == tokenizer.convert_tokens_to_ids("<file_sep>")
    with pytest.raises(UserError, match="outside the model's 3 embeddings"):
        masked_thought.token_id(own, TrainConfig(), 3)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["loss=dft", "label_smoothing=0.1"], "train.label_smoothing: is not used by train.loss=dft"),
        (["loss=asft", "z_loss=0.1"], "train.z_loss: is not used by train.loss=asft"),
        (["kl_weight=0.1"], "train.kl_weight: is not used by train.loss=cross_entropy, but by asft alone"),
        (["mask_probability=0.1"], "train.mask_probability: is not used by"),
        (["loss=dft", "mask_warmup=0.5"], "train.mask_warmup: is not used by"),
        (["mask_token=x"], "train.mask_token: is not used by"),
        (["eval_kl=true"], "train.eval_kl: needs held-out data"),
        (["loss=afst"], "did you mean asft"),
        (["label_smoothing=1"], "train.label_smoothing"),
    ],
)  # fmt: skip
def test_settings_that_would_not_be_used_are_refused(overrides, problem, tmp_path):
    (tmp_path / "config.yaml").write_text("run_dir: r\nmodel: {path: m}\ndata: {path: d}\nselection: {density: 0.1}\n")
    with pytest.raises(UserError) as caught:
        configs.load(tmp_path / "config.yaml", [f"train.{override}" for override in overrides])
    assert problem in str(caught.value)
