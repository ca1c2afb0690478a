"""Every family that loads computes, trains and exports what plain transformers does with the same checkpoint."""

import json
import re

import families
import family_table
import pytest
import ranks
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import is_timm_available

from liftdist import PrincipalWeights
from liftdist.deltas import of_run
from liftdist.deltas.delta import Delta
from liftdist.deltas.formats import hf
from liftdist.distributed.collectives import gather
from liftdist.engine.adamw import PrincipalAdamW
from liftdist.engine.matrices import principal_matrices
from liftdist.errors import UserError
from liftdist.model_settings import ModelConfig
from liftdist.models import build, check
from liftdist.models.head import in_chunks, is_plain, text_inputs
from liftdist.models.load import load
from liftdist.runs import checkpoint, claims
from liftdist.runs.manifest import Provenance, Snapshot
from liftdist.runs.saver import Checkpointer
from liftdist.training.objective import token_losses

SHORT = {  # one of each kind, and on how many ranks; all others are slow together
    **dict.fromkeys(("gpt2", "falcon", "mamba2", "falcon_h1", "lfm2", "apertus", "gemma4", "qwen2_5_vl"), (1,)),
    "llama4": (1,), "mllama": (1,), "qwen3_vl_moe": (2,), "mixtral_of_five": (3,),
    "zamba2": (1, 2), "qwen3_5": (1, 2), "qwen3_moe": (1, 3), "gpt_oss": (1, 3),
}  # fmt: skip
ON_TWO_RANKS = (
    "gpt2",
    "zamba2",
    "qwen3_5",
    "qwen2_vl",
    "gemma3",
    "jamba",
    "nemotron_h",
    "apertus",
    "opt",
    "olmo_hybrid",
    "qwen3_moe",
    "gpt_oss",
    "granitemoe",
    "qwen3_vl_moe",
)
ON_THREE_RANKS = (
    "qwen3_moe",
    "mixtral_of_five",
    "gpt_oss",
    "qwen3_vl_moe",
)  # experts that three ranks do not share evenly, or not all have
LENGTHS = (11, 7)


def batch():
    """Two samples of different lengths, padded."""
    generator = torch.Generator().manual_seed(3)
    shape = (len(LENGTHS), max(LENGTHS))
    input_ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -100)
    for row, length in enumerate(LENGTHS):
        tokens = torch.randint(3, 90, (length,), generator=generator)
        input_ids[row, :length], labels[row, : length - 1] = tokens, tokens[1:]
    return {"input_ids": input_ids, "labels": labels, "position_ids": torch.arange(shape[1]).repeat(shape[0], 1)}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def same_tensors(model, plain):
    """Names of parameters and buffers that differ in dtype or in any value."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    expected = [*plain.named_parameters(), *plain.named_buffers()]
    shared = {name for name, _ in plain.named_parameters(remove_duplicate=False)} - set(own)
    return [
        name
        for name, tensor in expected
        if name not in shared and (own[name].dtype != tensor.dtype or not torch.equal(whole(own[name]), tensor))
    ]


def bytes_of(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def block(place, tensor):
    """The entries of a matrix in a parameter, or in its gradient."""
    rows = tensor.reshape(-1, tensor.shape[-1])[place.first_row : place.first_row + place.rows, place.first_column :]
    return rows[:, :: place.step][:, : place.columns]


def loaded_in_bfloat16(mesh, folder):
    model, _ = load(folder, ModelConfig(path=str(folder), dtype="bfloat16"), mesh)
    plain = families.plain(folder, torch.bfloat16)
    model.requires_grad_(False)
    differ = same_tensors(model, plain)
    inputs = text_inputs(model, model.config, batch()["input_ids"], batch()["position_ids"])
    with torch.no_grad():
        return differ, torch.equal(model.eval()(**inputs).logits, plain.eval()(**inputs).logits)


def trained_and_exported(mesh, folder, run_dir):
    """One step of training against plain transformers; what its checkpoint exports. Raises on any difference. Collective."""
    model, names = load(folder, ModelConfig(path=str(folder), dtype="float32"), mesh)
    plain = families.plain(folder)
    assert same_tensors(model, plain) == []
    principal = PrincipalWeights(model, density=0.1, filter_rank=4)
    if is_plain(model, mesh.device):
        in_chunks(model)

    tokens = batch()
    losses = token_losses(model.train(), tokens)
    expected = torch.zeros(())
    for row, length in enumerate(LENGTHS):
        sample = tokens["input_ids"][row : row + 1, :length]
        logits = plain.train()(input_ids=sample, use_cache=False).logits
        expected = expected + F.cross_entropy(logits[0, :-1].float(), sample[0, 1:], reduction="sum")
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)

    losses.backward()
    expected.backward()
    principal.reduce_gradients(mesh.world_size)
    weights = dict(plain.named_parameters(remove_duplicate=False))
    begin = 0
    for matrix, indices in zip(principal.matrices, principal.indices, strict=True):
        gradient = principal.values.grad[begin : begin + indices.numel()]
        begin += indices.numel()
        dense = weights[matrix.place.parameter].grad
        assert dense is not None, f"{matrix.name} is trained, but takes no part in the loss"
        dense = block(matrix.place, dense).flatten()[indices.long() + matrix.offset_local]
        torch.testing.assert_close(gradient, dense, rtol=1e-3, atol=1e-5 * expected.item())

    optimizer = PrincipalAdamW(principal, lr=1e-2)
    optimizer.step()
    held = {matrix.name: names.holding(matrix.name, matrix.place) for matrix in principal.matrices}
    trained, parts = (
        {name: stored for name, (stored, _) in held.items()},
        {name: part for name, (_, part) in held.items()},
    )
    attempt = gather(claims.claim(run_dir, lambda _: {}) if mesh.is_main else None)[0]
    saver = Checkpointer(attempt, mesh, 1, None)
    provenance = Provenance(config="", from_environment={}, base="", data="")
    saver.save(principal.state_dict(optimizer), principal.matrices, Snapshot(1, {}, provenance, trained, parts))
    saver.wait()
    delta = of_run.of_run(checkpoint.open_step(run_dir / "checkpoints" / "step-00000001"), folder)
    hf.write(delta, folder, run_dir / "export")

    exported = families.plain(run_dir / "export")
    assert same_tensors(model, exported) == []
    before, after = (load_file(path / "model.safetensors") for path in (folder, run_dir / "export"))
    assert set(before) == set(after)
    touched = set(trained.values())
    changed = {name for name in before if not torch.equal(bytes_of(before[name]), bytes_of(after[name]))}
    assert changed <= touched
    assert len(changed) > 0.8 * len(touched), touched - changed


def cases():
    for name in families.FAMILIES:
        marks = []
        if name in families.OF_TIMM:
            marks.append(pytest.mark.skipif(not is_timm_available(), reason="needs timm and torchvision"))
        elif name in families.NOT_HERE:
            continue
        sizes = [1, *[2] * (name in ON_TWO_RANKS), *[3] * (name in ON_THREE_RANKS)]
        assert set(SHORT.get(name, ())) <= set(sizes)
        for size in sizes:
            slow = [] if size in SHORT.get(name, ()) else [pytest.mark.slow]
            yield pytest.param(size, name, id=f"{name}-{size}", marks=marks + slow)


@pytest.mark.parametrize(("world_size", "family"), cases())
def test_a_family_trains_and_exports_as_plain_transformers_does(world_size, family, tmp_path):
    folder = families.make(tmp_path / "model", family)
    ranks.run(world_size, trained_and_exported, folder, tmp_path / "run")
    if world_size == 1:
        assert ranks.run(1, loaded_in_bfloat16, folder) == [([], True)]


def test_what_the_base_holds_in_float32_is_exported_in_float32(tmp_path):
    """Of a checkpoint in bfloat16, some tensors are published in float32."""
    folder = families.make(tmp_path / "model", "qwen3_5_text", torch.bfloat16)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    kept = [name for name in tensors if name.endswith("A_log")]
    tensors |= {name: tensors[name].float() + 1e-6 for name in kept}
    save_file(tensors, file, {"format": "pt"})
    hf.write(Delta(folder, "", [], lambda _: None), folder, tmp_path / "export", torch.bfloat16)
    after = load_file(tmp_path / "export" / "model.safetensors")
    assert kept
    assert all(torch.equal(bytes_of(tensors[name]), bytes_of(after[name])) for name in tensors)


REFUSED = {
    "an encoder and a decoder": (
        lambda: AutoConfig.for_model("bart", **SIZES, encoder_layers=1, decoder_layers=1),
        "model type bart: has an encoder and a decoder; only decoders can be trained",
    ),
    "layers left out at random": (
        lambda: AutoConfig.for_model("opt", **SIZES, ffn_dim=16, layerdrop=0.1),
        "config.json: layerdrop=0.1: each rank would leave out other layers",
    ),
    "no text without an image": (lambda: AutoConfig.for_model("blip"), "takes no text without pixel_values"),
    "a decoder of several models": (lambda: AutoConfig.for_model("blt"), "has no decoder with a list of layers"),
    "a library that is absent": (
        lambda: AutoConfig.for_model("gemma3n"),
        "the model cannot be built: TimmWrapperModel requires the timm library but it was not found in your environment. You can "
        "install it with pip: `pip install timm`",
    ),
}
SIZES = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)


@pytest.mark.parametrize("how", REFUSED)
def test_an_architecture_that_no_text_trains_is_refused(how):
    settings, problem = REFUSED[how]
    if how == "a library that is absent" and is_timm_available():
        pytest.skip("timm is installed")
    with pytest.raises(UserError) as caught:
        build.build(settings(), ModelConfig())
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "hint"), [("t5", "models of this type do not continue texts"), ("wonder", "update")]
)
def test_a_type_of_another_kind_is_not_called_unknown(model_type, hint, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UserError, match=hint):
        check.check_model_folder(tmp_path, trust_remote_code=False)


@pytest.mark.parametrize("family", ["paligemma", "bert"])
def test_a_model_that_reads_ahead_is_refused(family, tmp_path):
    if family == "bert":
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **SIZES, intermediate_size=16))
    else:
        model = families.plain(families.make(tmp_path, family))
    with pytest.raises(UserError, match="its predictions depend on later tokens; only causal models can be trained"):
        is_plain(model.requires_grad_(False), torch.device("cpu"))


@pytest.mark.parametrize(
    ("family", "overrides", "said"),
    [
        ("gpt2", {"embd_pdrop": 0.1}, {"embd_pdrop": 0.1}),
        ("llama", {"attention_dropout": 0.2}, {"attention_dropout": 0.2}),
        ("gpt2", {"summary_first_dropout": 0.3}, {}),
        ("llama", {}, {}),
        ("qwen2_vl", {}, {}),
    ],
)
def test_dropout_is_said_by_its_key(family, overrides, said):
    settings = families.config(family)
    for key, rate in overrides.items():
        setattr(settings, key, rate)
    assert build.dropout(settings) == said


@pytest.mark.parametrize(
    "family", ["gemma3", "mllama", "phi4_multimodal", "fuyu", "qwen3_5", "llama4", "ernie4_5_vl_moe"]
)
def test_what_encodes_images_and_sound_is_not_trained(family):
    settings = families.config(family)
    model = build.build(settings, ModelConfig())
    trained = list(principal_matrices(model))
    assert trained
    words = ("vision", "visual", "audio", "image", "projector", "cross_attn", "lm_head")
    assert not [name for name in trained if any(word in name for word in words)]
    layers = settings.get_text_config(decoder=True).num_hidden_layers
    if family != "mllama":
        assert len({name.partition("layers.")[2].partition(".")[0] for name in trained}) == layers


def test_the_guide_has_a_row_for_every_family():
    types = {families.config(name).model_type for name in families.FAMILIES if name not in families.NOT_HERE}
    shown = re.findall(r"^\| `(\w[\w-]*)` \| `", family_table.PAGE.read_text(), re.MULTILINE)
    assert set(shown) == types


@pytest.mark.slow
def test_the_table_in_the_guide_is_up_to_date():
    assert family_table.page() == family_table.PAGE.read_text()
