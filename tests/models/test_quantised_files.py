"""Checkpoints that come quantised are read as the weights that they stand for, by rows, on any number of ranks."""

import hashlib
import json
import shutil

import builders
import pytest
import quantised_folders
import ranks
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from liftdist.deltas import delta as deltas
from liftdist.deltas.formats import hf
from liftdist.engine.quantisation import NF4
from liftdist.errors import UserError
from liftdist.model_settings import ModelConfig
from liftdist.models import check, names, quantised_files, weights
from liftdist.models.load import load
from liftdist.models.weights import ModelFolder
from liftdist.safetensors_io import bytes_of

GPT_OSS = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_local_experts=3, num_experts_per_tok=2)
LLAMA = dict(hidden_size=96, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2, head_dim=24)
EXPERTS = dict(LLAMA, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=48)
ODD = dict(hidden_size=90, intermediate_size=186, num_attention_heads=5, num_key_value_heads=5, head_dim=18)

#: What is saved, and how it is quantised: rows cut blocks on two ranks.
FORMS = {
    "mxfp4": ("gpt_oss", GPT_OSS, quantised_folders.mxfp4),
    "fp8": ("llama", LLAMA, lambda folder: quantised_folders.fp8(folder, (24, 48))),
    "fp8 experts": ("qwen3_moe", EXPERTS, lambda folder: quantised_folders.fp8(folder, (12, 24))),
    "fp8 whole": ("llama", LLAMA, lambda folder: quantised_folders.fp8(folder, None)),
    "fp8 cut": ("llama", ODD, lambda folder: quantised_folders.fp8(folder, (64, 32))),
    "mxfp8": ("llama", LLAMA, lambda folder: quantised_folders.fp8(folder, (1, 32), quant_method="mxfp8")),
    "nf4": ("llama", ODD, lambda folder: quantised_folders.nf4(folder, nested=False)),
    "nf4 nested": ("llama", LLAMA, lambda folder: quantised_folders.nf4(folder, nested=True)),
    "nf4 in bfloat16": ("llama", LLAMA, lambda folder: quantised_folders.nf4(folder, True, torch.bfloat16)),
    "tensor": ("llama", ODD, lambda folder: quantised_folders.compressed(folder, "tensor")),
    "channel": ("llama", ODD, lambda folder: quantised_folders.compressed(folder, "channel")),
    "block": ("llama", ODD, lambda folder: quantised_folders.compressed(folder, "block")),
}
BY_TRANSFORMERS = "mxfp4", "fp8", "fp8 experts", "fp8 whole", "mxfp8"  # which it dequantises here, of these sizes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in each form, and the weights that it stands for."""
    root = tmp_path_factory.mktemp("forms")
    found = {}
    for name, (kind, sizes, quantise) in FORMS.items():
        folder = builders.llama(root / name, None, kind, dtype=torch.bfloat16, **sizes)
        found[name] = folder, quantise(folder)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_those_of_the_weights_that_are_meant(form, made, monkeypatch):
    """Also where they begin and end inside blocks, and are made in several pieces."""
    monkeypatch.setattr(quantised_files, "AT_ONCE", 2000)
    folder, meant = made[form]
    files, stored = ModelFolder(folder), load_file(folder / "model.safetensors")
    names.of_folder(folder)  # they are those of the model
    assert set(files.quantised) == set(meant)
    for name in files.file_of:
        assert torch.equal(files.read(name), meant[name] if name in meant else stored[name]), name
    for name, whole in meant.items():
        assert files.info(name) == {"dtype": "BF16", "shape": list(whole.shape)}
        assert b"".join(files.data(name)) == bytes_of(whole)
        rows = whole.flatten(0, -2)
        assert len(list(files.quantised[name].pieces(0, len(rows)))) > 1
        for begin, end in ((0, 1), (5, 40), (31, len(rows)), (len(rows) - 1, len(rows)), (7, 7)):
            assert torch.equal(files.rows(name, begin, end), rows[begin:end])
        assert torch.equal(files.row(name, 33), rows[33])
        assert torch.equal(files.column(name, 2, 3, 20), rows[3:23, 2])


def loaded(mesh, folders, dtype):
    """Digests of all tensors of each model as it is loaded."""
    found = {}
    for name, folder in folders.items():
        model, _ = load(folder, ModelConfig(path=str(folder), dtype=dtype), mesh)
        state = {key: getattr(t, "full_tensor", lambda t=t: t)() for key, t in model.state_dict().items()}
        found[name] = digests(state)
    return found


def digests(state):
    return {key: hashlib.sha256(bytes_of(tensor)).hexdigest() for key, tensor in state.items()}


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_model_is_loaded_as_transformers_dequantises_it(world_size, made):
    folders = {name: made[name][0] for name in BY_TRANSFORMERS}
    expected = {name: AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for name, folder in folders.items()}
    assert {model.dtype for model in expected.values()} == {torch.bfloat16}
    wanted = {name: digests(model.state_dict()) for name, model in expected.items()}
    for found in ranks.run(world_size, loaded, folders, "bfloat16"):
        assert found == wanted


def test_an_export_holds_what_is_meant_and_has_the_same_digest(made, tmp_path):
    """So that a delta is for both. A loader finds nothing quantised in it."""
    for name in BY_TRANSFORMERS:
        base, target = made[name][0], tmp_path / name
        hf.write(deltas.Delta(base, "", [], lambda _: pytest.fail("nothing changed")), base, target)
        assert not ModelFolder(target).quantised
        assert weights.digest(target, tmp_path / "cache") == weights.digest(base, tmp_path / "cache")
        exported, dequantised = (AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (target, base))
        assert not hasattr(exported.config, "quantization_config")
        assert digests(exported.state_dict()) == digests(dequantised.state_dict())


@pytest.mark.parametrize(
    ("packed", "scales", "nested", "expected"),
    [
        (
            "667677666767787766878778875677679776777777779687677787bd8a65c405756567b757556685675946778659568c9a95b55ab9771423b5db88"
            "a5f67e1e89a19c61a411aafae123da95a2988dee4f962532cd9ee05277cdaf2865f59e8d5d5ad692055a4926a7bb5c8ddc3dd584dee562dd9979c2"
            "e0398cd44667944c726222c467e6c0539d",
            [3.0, 4.09375, 4.1875, 7.09375, 5.75],
            None,
            "4330358852d8715f3e0bdb9c091c424898192d6f2b2845a141929a5b56b1d02e",
        ),
        (
            "687487457b97a89a56967c69887977a3858576a8b5985569996667d8c7abff9c7489935438973916756a745966b676983967b495456c77448c9137"
            "68fd4ca5384b68696255728879989bb737569776649978886b72a83d0936bc9ab6cc656585da5744bbc6142d09d7186d85afdcbb4981be676bb47e"
            "08a91da3be9ecc37e3129832b307bb4739",
            [0, 56, 243, 196, 198],
            {0: -0.992968738079071, 56: -0.20546874403953552, 196: 0.17734375596046448, 198: 0.20546874403953552,
             243: 0.8382812738418579},
            "a0c3443eba6295dbc375b9b9cc2411704ef71e2797e22d226d95b5ac4e373a65",
        ),
    ],
    ids=["plain", "nested"],
)  # fmt: skip
def test_what_bitsandbytes_has_quantised_is_what_it_dequantises(packed, scales, nested, expected, tmp_path):
    """bitsandbytes 0.50.2, of [5, 54] weights in bfloat16; blocks span rows."""
    about = dict(quant_type="nf4", blocksize=64, dtype="bfloat16", shape=[5, 54])
    tensors = {
        "w": torch.tensor(list(bytes.fromhex(packed)), dtype=torch.uint8).view(-1, 1),
        "w.absmax": torch.tensor(scales),
        "w.quant_map": torch.tensor(NF4),
    }
    if nested:
        levels = torch.full((256,), torch.nan)
        levels[list(nested)] = torch.tensor(list(nested.values()))
        tensors |= {"w.absmax": torch.tensor(scales, dtype=torch.uint8), "w.nested_quant_map": levels}
        tensors |= {"w.nested_absmax": torch.tensor([3.4656248092651367])}
        about |= dict(nested_blocksize=256, nested_dtype="float32", nested_offset=4.621874809265137)
    state = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    save_file(tensors | {"w.quant_state.bitsandbytes__nf4": state}, tmp_path / "model.safetensors")
    settings = dict(quant_method="bitsandbytes", load_in_4bit=True)
    (tmp_path / "config.json").write_text(json.dumps(dict(quantization_config=settings)))
    assert hashlib.sha256(bytes_of(ModelFolder(tmp_path).read("w"))).hexdigest() == expected


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (dict(quant_method="awq", bits=4), "awq"),
        (dict(quant_method="hqq"), "hqq"),
        (dict(bits=4), "unknown method"),
        (dict(quant_method="bitsandbytes", load_in_8bit=True), "bitsandbytes, 8 bits"),
        (dict(quant_method="compressed-tensors", format="pack-quantized"), "compressed-tensors, pack-quantized"),
    ],
)
def test_what_is_not_read_is_refused_by_name(settings, named, tmp_path):
    for place in ({"quantization_config": settings}, {"text_config": {"quantization_config": settings}}):
        (tmp_path / "config.json").write_text(json.dumps(dict(model_type="llama", **place)))
        with pytest.raises(UserError) as caught:
            check.check_model_folder(tmp_path, trust_remote_code=False)
        assert str(caught.value).endswith(f"quantised weights ({named}) cannot be read; use the unquantised model")


def test_parts_that_do_not_fit_are_refused(made, tmp_path):
    def broken(form, edit, said):
        folder = tmp_path / form
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made[form][0], folder)
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=said) as caught:
            names.of_folder(folder)
        assert "\n" not in str(caught.value)

    experts, matrix = "model.layers.1.mlp.experts.down_proj", "model.layers.0.mlp.up_proj.weight"
    damaged = "its parts do not fit each other .*take the unquantised model"
    broken("mxfp4", lambda t: t.update({f"{experts}_scales": t[f"{experts}_scales"][:2].clone()}), damaged)
    broken("mxfp4", lambda t: t.pop(f"{experts}_scales"), "down_proj_blocks of the checkpoint is not in the model")
    broken("fp8", lambda t: t.update({f"{matrix}_scale_inv": torch.ones(3, 4)}), damaged)
    broken("fp8", lambda t: t.pop(f"{matrix}_scale_inv"), f"{matrix} has dtype F8_E4M3: quantised weights are not")
    broken("nf4", lambda t: t.pop(f"{matrix}.absmax"), damaged)
    broken("nf4 nested", lambda t: t.update({matrix: t[matrix][1:].clone()}), damaged)

    folder = builders.llama(tmp_path / "plain", dtype=torch.bfloat16)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"names quantised weights \(fp8\), of which the files hold none; remove its"):
        ModelFolder(folder)

    twice = shutil.copytree(made["fp8"][0], tmp_path / "twice")
    shard = "model-00001-of-00001.safetensors"
    shutil.copy(twice / "model.safetensors", twice / shard)
    held = dict.fromkeys(load_file(twice / shard), shard)
    (twice / check.INDEX).write_text(json.dumps({"weight_map": held}))
    with pytest.raises(UserError, match=f"model.safetensors, {shard} hold the same quantised weights"):
        ModelFolder(twice)
