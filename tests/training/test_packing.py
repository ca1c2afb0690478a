"""Packed samples do not see each other, in any family of models that is accepted; all others are refused."""

import builders
import commands
import pytest
import ranks
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import create_causal_mask

from liftdist.data.batches import pack
from liftdist.data.tokenised import IGNORED
from liftdist.errors import UserError
from liftdist.model_settings import ModelConfig
from liftdist.models import load
from liftdist.models.head import in_chunks, is_plain
from liftdist.training import objective, packing

CPU = torch.device("cpu")
MAX_LENGTH = 200
POSITIONS, MASK, REFUSED = "by positions", "masks", "refused"
BASE = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    initializer_range=0.2,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
GPT = dict(n_embd=32, n_layer=4, n_head=4, n_positions=256)
BART = dict(
    d_model=32, decoder_layers=4, encoder_layers=1, decoder_attention_heads=4, encoder_attention_heads=4,
    decoder_ffn_dim=48, encoder_ffn_dim=48, init_std=0.2,
)  # fmt: skip
MAMBA = dict(
    mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8, state_size=8,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
)  # fmt: skip
ATTENTION = dict(layer_types=["full_attention"] * 4)
#: family -> how its samples are kept apart, and its settings
FAMILIES = {
    "llama": (POSITIONS, {}),
    "qwen2": (POSITIONS, {}),
    "qwen3": (POSITIONS, {}),
    "gemma": (POSITIONS, {}),
    "phi": (POSITIONS, {}),
    "olmo": (POSITIONS, {}),
    "cohere": (POSITIONS, {}),
    "mistral": (POSITIONS, dict(sliding_window=6)),
    "gemma2": (POSITIONS, dict(sliding_window=6)),
    "gemma3_text": (POSITIONS, dict(sliding_window=6)),
    "olmo2": (POSITIONS, {}),
    "cohere2": (POSITIONS, dict(sliding_window=6)),
    "gpt2": (POSITIONS, GPT),
    "gpt_neox": (POSITIONS, {}),
    "phi3": (POSITIONS, {}),
    "stablelm": (POSITIONS, {}),
    "mixtral": (POSITIONS, EXPERTS),
    "qwen3_moe": (POSITIONS, EXPERTS),
    "opt": (MASK, dict(ffn_dim=48, word_embed_proj_dim=32, init_std=0.2)),
    "biogpt": (MASK, {}),
    "xglm": (MASK, dict(d_model=32, num_layers=4, attention_heads=4, ffn_dim=48, init_std=0.2)),
    "mpt": (MASK, dict(d_model=32, n_heads=4, n_layers=4, max_seq_len=256)),
    "gpt_oss": (MASK, dict(sliding_window=6, **EXPERTS)),
    "afmoe": (MASK, dict(sliding_window=6, **EXPERTS)),
    "granitemoehybrid": (MASK, dict(num_local_experts=0, shared_intermediate_size=48, mamba_n_heads=4, **ATTENTION)),
    "bart": (REFUSED, BART),
    "blenderbot-small": (REFUSED, BART),
    "pegasus": (REFUSED, BART),
    "bloom": (REFUSED, GPT),
    "openai-gpt": (REFUSED, GPT),
    "mamba": (REFUSED, MAMBA),
    "falcon_mamba": (REFUSED, MAMBA),
    "bamba": (REFUSED, MAMBA),
    "qwen3_next": (REFUSED, MAMBA | EXPERTS),
    "qwen3_5_text": (REFUSED, MAMBA),
    "rwkv": (REFUSED, dict(attention_hidden_size=32)),
    "recurrent_gemma": (REFUSED, dict(lru_width=32, attention_window_size=6)),
    "lfm2": (REFUSED, dict(layer_types=["conv", "full_attention"] * 2)),
}


def model_of(family, dtype=torch.float32, prepare=lambda model: None):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(BASE | FAMILIES[family][1]))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
    prepare(model)
    if is_plain(model, CPU):
        in_chunks(model)
    return model


def how(model, rows=1, max_length=MAX_LENGTH):
    """How a model keeps samples apart, by the check."""
    try:
        packing.keep_apart(model, CPU, max_length, rows)
    except UserError as error:
        return f"{REFUSED}: {error}"
    return model.separating.func.__name__ if hasattr(model, "separating") else POSITIONS


def rows_of(*lengths, seed=5):
    """Sequences of samples of these lengths, and the same samples one by one."""
    generator = torch.Generator().manual_seed(seed)
    samples = [[torch.randint(3, 97, (n,), generator=generator).tolist() for n in row] for row in lengths]
    packed = [{"input_ids": row, "labels": row} for row in samples]
    return packed, [{"input_ids": [ids], "labels": [ids]} for row in samples for ids in row]


def losses_and_gradient(model, batches):
    """The loss of each labelled token, and the gradient of their sum by the token embeddings."""
    found = []

    def keep(logits, labels):
        losses = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")
        found.append(losses[labels != IGNORED].detach())
        return losses

    embedding = model.get_input_embeddings().weight.requires_grad_()
    for rows in batches:
        objective.token_losses(model, pack(rows), keep).backward()
    gradient, embedding.grad = embedding.grad, None
    embedding.requires_grad_(False)
    return torch.cat(found), gradient


def off(model, rows, apart):
    """How far losses and gradient of a micro-batch are from those of its samples one by one, relative to the largest."""
    model.train()
    for module in model.modules():  # the same function of its inputs each time
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for part in model.modules():
        for name in ("dropout", "attention_dropout", "activation_dropout", "attn_pdrop"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
    together, one_by_one = losses_and_gradient(model, [rows]), losses_and_gradient(model, [[row] for row in apart])
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(together, one_by_one, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_packs_exactly_or_is_refused(family):
    expected, _ = FAMILIES[family]
    packed, apart = rows_of((17, 5, 30), (9, 2, 21))
    model = model_of(family)
    assert how(model, rows=2).split(":")[0] == expected
    difference = off(model, packed, apart)
    if expected == REFUSED:
        assert not hasattr(model, "separating")
        assert difference > 1e-4  # it would have learned something else
    else:
        assert difference < 1e-5


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if not family.endswith("mamba")]
)  # they fail in bf16 here
def test_rounding_changes_no_verdict(family, rows):
    verdict = how(model_of(family, torch.bfloat16), rows)
    assert verdict.split(":")[0] == FAMILIES[family][0]
    assert "\n" not in verdict


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_right_changes_nothing(family):
    rows, _ = rows_of((17,), (5,), (30,))
    assert off(model_of(family), rows, rows) < 1e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "family", ["llama", "mistral", "gemma3_text", "mixtral", "opt", "biogpt", "afmoe", "granitemoehybrid"]
)
def test_with_each_attention_kernel(family, attention):
    model = model_of(family)
    model.set_attn_implementation(attention)
    assert how(model, rows=2) == FAMILIES[family][0]
    assert off(model, *rows_of((17, 5, 30), (9, 2, 21))) < 1e-5


@pytest.mark.parametrize("max_length", [1, 8, 16, 40, 70])
@pytest.mark.parametrize("family", ["llama", "opt", "bart"])
def test_short_sequences(family, max_length):
    model = model_of(family)
    assert how(model, max_length=max_length).split(":")[0] == FAMILIES[family][0]


@pytest.mark.parametrize(("window", "verdict"), [(6, MASK), (150, MASK), (170, REFUSED), (MAX_LENGTH, MASK)])
def test_a_mask_is_used_only_if_it_is_seen_to_keep_the_window(window, verdict, monkeypatch):
    monkeypatch.setitem(FAMILIES, "gpt_oss", (MASK, dict(sliding_window=window, **EXPERTS)))
    model = model_of("gpt_oss")
    assert how(model).split(":")[0] == verdict


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt_oss", "afmoe"])
def test_a_mask_that_undoes_the_window_is_refused(family, dtype, monkeypatch):
    def of_all_before(config, *arguments):
        return create_causal_mask(config, *arguments)  # whatever config.sliding_window is

    monkeypatch.setattr(packing, "create_masks_for_generate", of_all_before)
    assert how(model_of(family, dtype)).startswith(REFUSED)


class Leak(nn.Module):
    """What a layer puts out, plus a little of what other tokens put out."""

    def __init__(self, strength, mix):
        super().__init__()
        self.strength, self.mix, self.samples = strength, mix, None

    def attach(self, model, layer=-1):
        def before(module, arguments, others):
            self.samples = others.pop("seq_idx", None)
            return arguments, others

        def after(module, arguments, output):
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = hidden + self.strength * self.mix(hidden, self.samples)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        model.get_decoder().register_forward_pre_hook(before, with_kwargs=True)
        model.get_decoder().layers[layer].register_forward_hook(after)
        return model


def convolution(hidden, samples, width=1):
    return F.pad(hidden, (0, 0, width, 0))[:, : hidden.shape[1]]


def wide(hidden, samples):
    return convolution(hidden, samples, 4)


def state(hidden, samples):
    return hidden.cumsum(1)


def block(hidden, samples):
    """The mean of the block of 64 tokens before a token's own, as compressed attention sees it."""
    means = F.pad(hidden, (0, 0, 0, -hidden.shape[1] % 64)).unflatten(1, (-1, 64)).mean(2)
    return F.pad(means, (0, 0, 1, 0))[:, :-1].repeat_interleave(64, 1)[:, : hidden.shape[1]]


def sink(hidden, samples):
    return hidden[:, :1].expand_as(hidden)


def whole_batch(hidden, samples):
    return hidden.mean((0, 1), keepdim=True).expand_as(hidden)


def from_behind(hidden, samples):
    return F.pad(hidden, (0, 0, 0, 4))[:, 4:]


MIXTURES = (convolution, wide, state, block, sink, whole_batch, from_behind)


@pytest.mark.parametrize("layer", [pytest.param(0, marks=pytest.mark.slow), -1])
@pytest.mark.parametrize("mix", MIXTURES)
@pytest.mark.parametrize(
    ("family", "dtype", "strength"),
    [
        ("llama", torch.float32, 1.0),
        ("llama", torch.float32, 1e-4),
        ("llama", torch.bfloat16, 0.05),
        ("mixtral", torch.float32, 1e-2),
        ("mixtral", torch.bfloat16, 2.0),
        ("opt", torch.float32, 1e-3),
    ],
)
def test_a_leak_is_noticed(family, dtype, strength, mix, layer):
    model = Leak(strength, mix).attach(model_of(family, dtype), layer)
    assert how(model).startswith(REFUSED)


def test_without_a_leak_nothing_is_noticed():
    for mix in MIXTURES:
        assert how(Leak(0.0, mix).attach(model_of("llama"))) == POSITIONS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_that_run_on_are_noticed(dtype):
    model = model_of("gpt2", dtype)

    def run_on(module, positions):
        return (torch.arange(positions[0].shape[1]).expand_as(positions[0]),)

    model.transformer.wpe.register_forward_pre_hook(run_on)
    assert "by itself" in how(model)


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_a_layer_that_separates_by_numbers_of_samples_gets_them(family):
    def within(hidden, samples):
        before = convolution(hidden, samples)
        return (
            before if samples is None else before * (samples == F.pad(samples, (1, 0), value=-1)[:, :-1]).unsqueeze(2)
        )

    model = Leak(1.0, within).attach(model_of(family))
    assert how(model, rows=2) == "masks_and_bounds"
    assert off(model, *rows_of((17, 5, 30), (9, 2, 21))) < 1e-5
    assert off(model, *rows_of((17,), (5,), (30,))) < 1e-5  # nothing is packed


def test_bounds_are_those_of_the_samples():
    rows, _ = rows_of((3, 2), (4, 1, 2))
    given = packing.masks_and_bounds(model_of("opt"), pack(rows)["position_ids"])
    assert given["cu_seq_lens_q"].tolist() == given["cu_seq_lens_k"].tolist() == [0, 3, 7, 11, 12, 14]  # with padding
    assert given["max_length_q"] == given["max_length_k"] == 4
    assert given["seq_idx"].tolist() == [[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 2, 2]]


@pytest.mark.parametrize("family", ["bamba", "qwen3_next"])
def test_a_missing_kernel_is_named(family):
    assert "set data.packing=false, or: `causal_conv1d_fn`" in how(model_of(family))


@pytest.mark.parametrize(
    ("dtype", "layers"),
    [
        (torch.bfloat16, 3),
        pytest.param(torch.bfloat16, 30, marks=pytest.mark.slow),  # minutes where bfloat16 is emulated
        pytest.param(torch.float32, 30, marks=pytest.mark.slow),
    ],
)
def test_a_pretrained_model_is_not_refused_for_its_rounding(dtype, layers, smollm2):
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=dtype, num_hidden_layers=layers).requires_grad_(False)
    in_chunks(model)
    assert how(model, rows=2, max_length=300 if layers == 30 else 100) == POSITIONS


def test_training_goes_on_in_training_mode():
    model = model_of("opt").train()
    model.get_decoder().layers[0].eval()
    assert how(model) == MASK
    assert model.training
    assert not model.get_decoder().layers[0].training


def sharded(mesh):
    """The verdict on families, and the loss of packed samples in two forwards after it. Collective."""
    found = []
    for family in ("llama", "opt", "bart", "falcon_mamba"):  # by positions, by a mask, neither, state
        model = model_of(family, prepare=lambda model: load.shard(model, ModelConfig(dtype="float32"), mesh)).eval()
        verdict = how(model, rows=2)
        packed, apart = rows_of((17, 5, 30), (9, 2, 21))
        with torch.no_grad():
            together = objective.token_losses(model, pack(packed)).item()
            one_by_one = sum(objective.token_losses(model, pack([row])).item() for row in apart)
        found.append((family, verdict, abs(together / one_by_one - 1)))
    return found


def test_ranks_agree():
    one, two = ranks.run(2, sharded)
    assert one == two
    for family, verdict, difference in one:
        assert verdict.split(":")[0] == FAMILIES[family][0], verdict
        assert (difference < 1e-5) == (FAMILIES[family][0] != REFUSED), family


SIZES = dict(d_model=50, decoder_attention_heads=5, encoder_attention_heads=5, decoder_layers=2, encoder_layers=1)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_user_is_refused_before_the_first_step(processes, tmp_path, smollm2, records):
    model = builders.llama(tmp_path / "model", smollm2, "bart", decoder_ffn_dim=93, encoder_ffn_dim=93, **SIZES)
    config = commands.write_config(tmp_path, model, records, data=dict(packing=True))
    run = commands.run_command("train", config, "--nproc", processes)
    line = commands.user_error(run)
    assert line.startswith("liftdist: data.packing=true: BartForCausalLM does not keep packed samples apart: ")
    assert line.endswith("; set data.packing=false")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_user_packs_with_a_mask(tmp_path, smollm2, records):
    model = builders.llama(tmp_path / "model", smollm2, "opt", ffn_dim=48, word_embed_proj_dim=50)
    config = commands.write_config(
        tmp_path, model, records, data=dict(packing=True, eval_path=None), train=dict(steps=2, eval_interval=0)
    )
    run = commands.run_command("train", config)
    assert run.returncode == 0, run.stdout


@pytest.mark.slow
def test_the_remedy_helps(tmp_path, smollm2, records):
    model = builders.llama(tmp_path / "model", smollm2, "bart", decoder_ffn_dim=93, encoder_ffn_dim=93, **SIZES)
    config = commands.write_config(tmp_path, model, records)
    run = commands.run_command("train", config, "data.packing=false")
    assert run.returncode == 0, run.stdout
