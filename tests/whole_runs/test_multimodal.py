"""The language model of a multimodal checkpoint, trained by the command on two ranks, with dropout."""

import shutil

import builders
import families
import torch
from commands import run_command, write_config
from safetensors.torch import load_file


def test_a_text_trains_the_language_model_of_a_multimodal_checkpoint(smollm2, records, tmp_path, monkeypatch):
    monkeypatch.setitem(families.SMALL, "vocab_size", 49152)
    monkeypatch.setitem(families.FAMILIES, "gemma3", {"text_config": {"attention_dropout": 0.25}})
    folder = families.make(tmp_path / "model", "gemma3", torch.bfloat16)
    for name in builders.TOKENIZER_FILES:
        shutil.copy(smollm2 / name, folder / name)
    config = write_config(tmp_path, folder, records, train=dict(steps=2, eval_interval=0))
    run = run_command("train", config, "--nproc", 2, "model.dtype=bfloat16")
    assert run.returncode == 0, run.stdout
    assert "with which it is trained: attention_dropout=0.25" in run.stdout
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "run" / "export"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("language_model.model.layers.") for name in changed), changed
    assert families.plain(tmp_path / "run" / "export", torch.bfloat16) is not None
