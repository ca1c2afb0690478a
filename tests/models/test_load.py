"""Loading: any family, cut by rows over ranks that do not divide them, each rank reading only its own."""

import random
import threading
from pathlib import Path

import builders
import pytest
import ranks
import torch
from transformers import AutoModelForCausalLM

from liftdist.deltas import delta as deltas
from liftdist.deltas.formats import hf
from liftdist.model_settings import ModelConfig
from liftdist.models import build, check, weights
from liftdist.models.fill import verify
from liftdist.models.load import load

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
        model, _ = load(base, config, mesh)
        whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with torch.no_grad():
            equal = torch.equal(model(input_ids=tokens).logits, whole(input_ids=tokens).logits)
        target = folder / f"{name}-on-{mesh.world_size}"
        untouched = deltas.Delta(base, "", [], lambda _: pytest.fail("nothing changed"))
        hf.write(untouched, base, target, torch.float32)
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
    (model, _), peak = anonymous_peak(lambda: load(folder, config, mesh))
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


def misplaced_rows(mesh, folder):
    """A loader that shifts rows must be caught by the comparison with the file."""
    config = ModelConfig(path=str(folder), dtype="float32")
    model, names = load(folder, config, mesh)
    checkpoint = weights.ModelFolder(folder)
    caught = 0
    for param in (model.model.layers[0].mlp.up_proj.weight, model.model.embed_tokens.weight):
        local = param.to_local().detach()
        kept = local.clone()
        local.copy_(kept.roll(1, 0))
        try:
            verify(model, checkpoint, names, random.Random(0))
        except RuntimeError as error:
            caught += "is not what model.safetensors holds" in str(error)
        local.copy_(kept)
    verify(model, checkpoint, names, random.Random(0))
    return caught


def test_rows_in_wrong_places_are_noticed(tmp_path):
    assert ranks.run(2, misplaced_rows, builders.llama(tmp_path / "model")) == [2, 2]
