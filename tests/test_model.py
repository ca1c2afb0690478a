"""Loading: any family, cut by rows over ranks that do not divide them, each rank reading only its own."""

import json
import random
import shutil
import threading
from pathlib import Path

import builders
import pytest
import ranks
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from liftdist.deltas import delta as deltas
from liftdist.deltas.export import export_merged
from liftdist.errors import UserError
from liftdist.models import build, check, weights
from liftdist.models.load import _verify, load
from liftdist.models.names import match
from liftdist.schema import ModelConfig

FAMILIES = {
    "llama": dict(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
    "qwen2": dict(tie_word_embeddings=False),
    "qwen3": dict(),
    "mistral": dict(tie_word_embeddings=False, sliding_window=4),
    "gemma": dict(),
    "gemma2": dict(sliding_window=4),
    "gemma3_text": dict(sliding_window=4),
}  # fmt: skip


def family_folder(folder, name):
    path = builders.llama(folder / name, None, name, **FAMILIES[name])
    if name == "mistral":  # several files with an index
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).save_pretrained(path, max_shard_size="50KB")
        (path / "model.safetensors").unlink()
        assert (path / check.INDEX).exists()
    return path


def logits_and_export(mesh, folder):
    """For each family: do sharded logits equal the whole model's, and the exported folder the one that was loaded?"""
    outcome = {}
    tokens = torch.randint(0, 257, (2, 12), generator=torch.Generator().manual_seed(1))
    for name in FAMILIES:
        base = folder / name
        config = ModelConfig(path=str(base), dtype="float32", activation_checkpointing=name == "llama")
        model = load(base, config, mesh)
        whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with torch.no_grad():
            equal = torch.equal(model(input_ids=tokens).logits, whole(input_ids=tokens).logits)
        target = folder / f"{name}-on-{mesh.world_size}"
        untouched = deltas.Delta(base, "", [], lambda _: pytest.fail("nothing changed"))
        export_merged(untouched, base, target, torch.float32)
        exported = AutoModelForCausalLM.from_pretrained(target)
        same = all(torch.equal(a, b) for a, b in zip(exported.parameters(), whole.parameters(), strict=True))
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        outcome[name] = dict(equal=equal, same=same, tied=tied == bool(whole.config.tie_word_embeddings))
    return outcome


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_every_family_is_loaded_and_exported_exactly(world_size, tmp_path):
    for name in FAMILIES:
        family_folder(tmp_path, name)
    for rank in ranks.run(world_size, logits_and_export, tmp_path):
        for name, outcome in rank.items():
            assert all(outcome.values()), (name, outcome)


def anonymous_peak(work):
    """Growth of this process's anonymous memory at its peak during ``work()``, in bytes."""
    done, samples = threading.Event(), []

    def anonymous():
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    def sample():
        while not done.wait(0.002):
            samples.append(anonymous())

    before, thread = anonymous(), threading.Thread(target=sample)
    thread.start()
    result = work()
    done.set()
    thread.join()
    return result, max([*samples, anonymous()]) - before


def load_large(mesh, folder, warm_up):
    config = ModelConfig(path=str(folder), dtype="bfloat16")
    load(warm_up, ModelConfig(path=str(warm_up), dtype="bfloat16"), mesh)  # libraries and pools
    model, peak = anonymous_peak(lambda: load(folder, config, mesh))
    share = sum(t.to_local().numel() * 2 for t in model.parameters())
    layer = sum(p.numel() * 2 for p in build.decoder_layers(model)[0].parameters())
    return dict(peak=peak, share=share, layer=layer, whole=sum(p.numel() * 2 for p in model.parameters()))


def test_a_rank_needs_little_more_memory_than_its_share(tmp_path):
    sizes = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8, head_dim=128)
    folder = builders.llama(tmp_path / "large", vocab_size=8000, dtype=torch.bfloat16, num_key_value_heads=8, **sizes)
    warm_up = builders.llama(tmp_path / "warm-up")
    for rank in ranks.run(3, load_large, folder, warm_up):
        print(rank)
        assert rank["peak"] < 1.3 * rank["share"] + rank["layer"] < 0.6 * rank["whole"]


def broken(folder, how):
    """A copy of a good model, broken in one way."""
    file, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    tensors = load_file(file)
    if how == "no config":
        (folder / "config.json").unlink()
    elif how == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif how == "not json":
        (folder / "config.json").write_text("{")
    elif how == "unknown type":
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "wonder"}))
    elif how == "no type":
        (folder / "config.json").write_text("{}")
    elif how == "quantised":
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    elif how == "no weights":
        file.unlink()
    elif how == "pickled":
        file.unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "garbage":
        file.write_bytes(b"garbage" * 100)
    elif how == "absent tensor":
        del tensors["model.norm.weight"]
        save_file(tensors, file)
    elif how == "left over":
        save_file(tensors | {"model.layers.9.extra": torch.ones(2)}, file)
    elif how == "wrong shape":
        save_file(tensors | {"model.norm.weight": torch.ones(3)}, file)
    elif how == "integer weights":
        name = "model.layers.0.mlp.up_proj.weight"
        save_file(tensors | {name: tensors[name].to(torch.int8)}, file)
    elif how == "missing shard":
        index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
        (folder / check.INDEX).write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("how", "problem"),
    {
        "no config": "holds no config.json",
        "empty": "holds no config.json (it is empty)",
        "not json": "config.json: Expecting",
        "unknown type": "model_type 'wonder' is no causal language model that transformers knows",
        "no type": "names no model_type",
        "quantised": "quantised weights (gptq) cannot be trained",
        "no weights": "holds no model.safetensors",
        "pickled": "pickled weights (pytorch_model.bin) are not loaded",
        "truncated": "damaged weights: model.safetensors has",
        "garbage": "damaged weights: model.safetensors is not a complete safetensors file",
        "absent tensor": "model.norm.weight is not in the checkpoint",
        "left over": "model.layers.9.extra of the checkpoint is not in the model",
        "wrong shape": "model.norm.weight is [3] in the checkpoint, [50] in the model",
        "integer weights": "model.layers.0.mlp.up_proj.weight has dtype I8: quantised weights are not supported",
        "missing shard": "damaged weights: ",
    }.items(),
)
def test_what_is_not_supported_is_refused_by_name(how, problem, tmp_path):
    folder = broken(builders.llama(tmp_path / "model"), how)
    config = ModelConfig(path=str(folder))
    with pytest.raises(UserError) as caught:
        match(build.build(build.check_type(folder, config), config), weights.ModelFolder(folder))
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fused_experts_are_refused(tmp_path):
    folder = builders.llama(
        tmp_path / "moe", None, "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=10
    )
    config = ModelConfig(path=str(folder))
    with pytest.raises(UserError, match=r"experts.* fused experts are not supported"):
        build.build(build.check_type(folder, config), config)


def misplaced_rows(mesh, folder):
    """A loader that shifts rows must be caught by the comparison with the file."""
    config = ModelConfig(path=str(folder), dtype="float32")
    model = load(folder, config, mesh)
    checkpoint = weights.ModelFolder(folder)
    names = match(model, checkpoint)
    caught = 0
    for param in (model.model.layers[0].mlp.up_proj.weight, model.model.embed_tokens.weight):
        local = param.to_local().detach()
        kept = local.clone()
        local.copy_(kept.roll(1, 0))
        try:
            _verify(model, checkpoint, names, random.Random(0))
        except RuntimeError as error:
            caught += "is not what model.safetensors holds" in str(error)
        local.copy_(kept)
    _verify(model, checkpoint, names, random.Random(0))
    return caught


def test_rows_in_wrong_places_are_noticed(tmp_path):
    assert ranks.run(2, misplaced_rows, builders.llama(tmp_path / "model")) == [2, 2]


def digest_of(mesh, folder, cache):
    return weights.digest(folder, cache)


def test_the_digest_follows_the_weights_alone(tmp_path):
    folder = builders.llama(tmp_path / "model")
    first = weights.digest(folder, tmp_path / "cache")
    assert weights.digest(folder, tmp_path / "cache") == first
    assert ranks.run(3, digest_of, folder, tmp_path / "other-cache") == [first] * 3
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert weights.digest(moved, tmp_path / "cache") == first
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(moved, max_shard_size="20KB")
    (moved / "model.safetensors").unlink()
    assert weights.digest(moved, tmp_path / "cache") == first  # other files, same tensors
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, folder / "model.safetensors")
    assert weights.digest(folder, tmp_path / "cache") != first


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_is_apart_where_the_head_is(tied):
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    model = build.build(AutoConfig.for_model("llama", **shape, tie_word_embeddings=tied), ModelConfig())
    assert build.own_embedding(model) is (None if tied else model.model.embed_tokens)
    model.get_output_embeddings = lambda: None  # it may multiply by the embedding itself
    assert build.own_embedding(model) is None
