"""Whatever stood in a model folder, what is written from it holds one set of weights, and nothing that says otherwise."""

import json
import shutil
import subprocess
import sys

import builders
import pytest
import torch
from commands import liftdist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from liftdist.models import check

MODEL_FILES = {"config.json", "generation_config.json", check.WEIGHTS, check.INDEX}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model, two that were made from it, and the deltas to them."""
    folder = tmp_path_factory.mktemp("models")
    base = builders.llama(folder / "base", dtype=torch.bfloat16)
    for seed, name in enumerate(("one", "two")):
        shutil.copytree(base, folder / name)
        tensors = load_file(base / check.WEIGHTS)
        tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[seed::7] *= 1.5
        save_file(tensors, folder / name / check.WEIGHTS, {"format": "pt"})
        words = ("--output", folder / f"to-{name}", "--cache-dir", folder / "cache")
        liftdist("diff", base, folder / name, *words)
    return folder


def add(*names):
    """A kind of folder that also holds files of these names."""

    def make(folder):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".safetensors"):
                shutil.copy(folder / check.WEIGHTS, folder / name)
            else:
                (folder / name).write_bytes(b"weights of the base model")

    return make


def shards(folder, one_file_too=False):
    tensors = load_file(folder / check.WEIGHTS)
    places = {name: SHARDS["layers.1" in name] for name in tensors}
    for file in SHARDS:
        save_file({name: tensors[name] for name in tensors if places[name] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(t.numel() * 2 for t in tensors.values())}, "weight_map": places}
    (folder / check.INDEX).write_text(json.dumps(index))
    if not one_file_too:
        (folder / check.WEIGHTS).unlink()


def a_tensor_twice(folder):
    norm = load_file(folder / check.WEIGHTS)["model.norm.weight"]
    shards(folder)
    save_file(load_file(folder / SHARDS[1]) | {"model.norm.weight": norm}, folder / SHARDS[1], {"format": "pt"})


def a_snapshot(folder):
    """As the hub's cache lays it out: links to blobs."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../blobs/{number}")


def an_index_of_one_file(folder):
    shards(folder, one_file_too=True)
    for file in SHARDS:
        (folder / file).unlink()
    index = json.loads((folder / check.INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], check.WEIGHTS)
    (folder / check.INDEX).write_text(json.dumps(index))


def an_incomplete_index(folder):
    shards(folder)
    index = json.loads((folder / check.INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / check.INDEX).write_text(json.dumps(index))


#: What makes a folder of the kind, and what of it is other weights.
KINDS = {
    "one file": (lambda folder: None, ()),
    "shards": (shards, ()),
    "an index of one file": (an_index_of_one_file, ()),
    "an incomplete index": (an_incomplete_index, ()),
    "a tensor twice": (a_tensor_twice, ()),
    "a snapshot of the hub": (a_snapshot, ()),
    "a download's notes": (add(".cache/huggingface/download/model.safetensors.metadata", "notes/a.md"), ()),
    "equal shards": (lambda folder: shards(folder, one_file_too=True), (*SHARDS, check.INDEX)),
    "consolidated": (add("consolidated.safetensors", "params.json"), ("consolidated.safetensors",)),
    "original": (add("original/consolidated.00.pth", "original/params.json"), ("original/",)),
    "pickled": (add("pytorch_model.bin"), ("pytorch_model.bin",)),
    "pickled shards": (
        add("pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"),
        ("pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"),
    ),
    "of other libraries": (
        add("tf_model.h5", "flax_model.msgpack", "rust_model.ot", "flax_model.msgpack.index.json"),
        ("flax_model.msgpack", "flax_model.msgpack.index.json", "rust_model.ot", "tf_model.h5"),
    ),
    "for other engines": (
        add("model.Q4_K_M.gguf", "model.onnx", "model.onnx_data", "model.llamafile", "m.mlpackage/Data/weights"),
        ("m.mlpackage/", "model.Q4_K_M.gguf", "model.llamafile", "model.onnx", "model.onnx_data"),
    ),
    "folders of engines": (
        add("onnx/model_fp16.onnx", "openvino/openvino_model.xml", "openvino/openvino_model.bin", "coreml/a/b/c.mlmodel"),
        ("coreml/", "onnx/", "openvino/"),
    ),
    "a variant": (
        add("model.fp16.safetensors", "model.safetensors.index.fp16.json"),
        ("model.fp16.safetensors", "model.safetensors.index.fp16.json"),
    ),
    "copies kept": (
        add("model.safetensors.bak", "old/model.safetensors"),
        ("model.safetensors.bak", "old/"),
    ),
    "of a trainer": (add("optimizer.pt", "training_args.bin"), ("optimizer.pt", "training_args.bin")),
    "checkpoints": (add("checkpoint-5/model.safetensors", "a.ckpt"), ("a.ckpt", "checkpoint-5/")),
    "an adapter's weights": (add("adapter_model.safetensors"), ("adapter_model.safetensors",)),
}  # fmt: skip

LOOKS_LIKE_WEIGHTS = (
    ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".ot", ".mlmodel", ".mlpackage",
    ".llamafile", ".bak", ".xml", ".fp16.json",
)  # fmt: skip


def check_holds_only(folder, expected):
    """The folder is the model ``expected``, to whoever reads it."""
    same = load_file(expected / check.WEIGHTS)
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in same.items())
    found = {}
    for path in folder.rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert torch.equal(tensor, same[name]), (path, name)
            assert name not in found, (path, name)
            found[name] = path.name
    assert set(found) == set(same)
    if (folder / check.INDEX).exists():
        assert json.loads((folder / check.INDEX).read_text())["weight_map"] == found
    assert not [path for path in folder.rglob("*") if path.name.endswith(LOOKS_LIKE_WEIGHTS)]
    assert {path.name for path in folder.glob("*.index.json")} <= {check.INDEX}


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_one_model(kind, models, tmp_path):
    make, others = KINDS[kind]
    base, one, two = (models / name for name in ("base", "one", "two"))
    folder = shutil.copytree(base, tmp_path / "folder")
    make(folder)
    to_one, to_two = models / "to-one", models / "to-two"
    before, cache = names_in(folder), ("--cache-dir", tmp_path / "cache")
    hidden = tuple(f"{path.name}/" for path in folder.glob(".*"))

    def check_said(said):
        lines = [line for line in said.splitlines() if line.startswith("not copied from")]
        named = ", ".join((*sorted(others), *hidden))
        assert lines == ([f"not copied from {folder}, so that there is one set of weights: {named}"] if named else [])

    check_said(liftdist("export", to_one, "--base", folder, "--output", tmp_path / "hf", *cache))
    check_holds_only(tmp_path / "hf", one)
    assert {path.name for path in (tmp_path / "hf").iterdir()} <= MODEL_FILES | {
        *SHARDS,
        "params.json",
        "liftdist.json",
    }
    check_said(liftdist("apply", to_one, folder, "--output", tmp_path / "applied", *cache))
    check_holds_only(tmp_path / "applied", one)
    assert names_in(folder) == before

    if others:
        said = liftdist("apply", to_one, folder, *cache, code=2)
        assert f"{folder}: also holds {', '.join(sorted(others))}: other weights" in said
        assert "give --output, or move them elsewhere" in said
        assert names_in(folder) == before
        folder = tmp_path / "applied"
    else:
        liftdist("apply", to_one, folder, *cache)
        check_holds_only(folder, one)
        assert names_in(folder) == before
    liftdist("apply", to_two, folder, "--instead-of", to_one, "--output", tmp_path / "swapped", *cache)
    check_holds_only(tmp_path / "swapped", two)
    liftdist("apply", to_two, folder, "--instead-of", to_one, *cache)
    check_holds_only(folder, two)
    liftdist("apply", to_two, folder, "--undo", "--output", tmp_path / "undone", *cache)
    check_holds_only(tmp_path / "undone", base)
    liftdist("apply", to_two, folder, "--undo", *cache)
    check_holds_only(folder, base)


TOKENIZER = {  # in the base, and in the export
    "of transformers 5": ({"tokenizer_class": "TokenizersBackend"}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
    "a class of its own": ({"tokenizer_class": "GPT2Tokenizer"}, {"tokenizer_class": "GPT2Tokenizer"}),
    "further tokens": (
        {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|im_start|>"]},
        {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<|im_start|>"]},
    ),
    "further tokens by name": (
        {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": {"image_token": "<file_sep>"}},
        {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": {"image_token": "<file_sep>"}},
    ),
    "of transformers 4": (
        {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<|im_start|>"]},
        {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<|im_start|>"]},
    ),
}

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PLAIN = {"rope_type": "default"}
ROPE = {  # model type, rope_parameters, and the older settings that say the same
    "theta": ("llama", PLAIN | {"rope_theta": 77777.0}, {"rope_theta": 77777.0}),
    "llama 3": ("llama", LLAMA3 | {"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "yarn": (
        "qwen3",
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128},
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
    ),
    "a part of a head": (
        "stablelm",
        PLAIN | {"rope_theta": 77777.0, "partial_rotary_factor": 0.5},
        {"rope_theta": 77777.0, "partial_rotary_factor": 0.5},
    ),
    "by type of layer": (
        "gemma3_text",
        {"full_attention": PLAIN | {"rope_theta": 3e5}, "sliding_attention": PLAIN | {"rope_theta": 2e4}},
        {"rope_theta": 3e5, "rope_local_base_freq": 2e4},
    ),
}  # fmt: skip


def exported(base, target, tmp_path):
    """A model exported unchanged."""
    cache = ("--cache-dir", tmp_path / "cache")
    liftdist("diff", base, base, "--output", tmp_path / "nothing", *cache)
    liftdist("export", tmp_path / "nothing", "--base", base, "--output", target, *cache)
    (tmp_path / "nothing").unlink()
    return target


@pytest.mark.parametrize("how", TOKENIZER)
def test_the_tokenizer_of_an_export_has_the_names_that_transformers_4_reads(how, models, smollm2, tmp_path):
    given, written = TOKENIZER[how]
    base = shutil.copytree(models / "base", tmp_path / "base")
    shutil.copy(smollm2 / "tokenizer.json", base)
    common = {"eos_token": "<|im_end|>", "model_max_length": 8192}
    (base / "tokenizer_config.json").write_text(json.dumps(common | given))
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    target = exported(base, tmp_path / "hf", tmp_path)
    assert json.loads((target / "tokenizer_config.json").read_text()) == common | written
    assert json.loads((base / "tokenizer_config.json").read_text()) == common | given
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (base, target))
    text = "<|im_start|>user\nAdd 1 + 2, hé<|im_end|> <file_sep>"
    assert before(text).input_ids == after(text).input_ids
    assert (type(before), before.all_special_tokens) == (type(after), after.all_special_tokens)
    assert before.chat_template == after.chat_template == {"tools": "{{ messages }}"}


@pytest.mark.parametrize("how", ROPE)
def test_the_config_of_an_export_has_the_names_that_transformers_4_reads(how, tmp_path):
    model_type, rope, written = ROPE[how]
    base = builders.llama(tmp_path / "base", None, model_type, rope_parameters=rope, **of_heads(model_type))
    before = json.loads((base / "config.json").read_text())
    assert not {"rope_theta", "rope_scaling"} & set(before)
    target = exported(base, tmp_path / "hf", tmp_path)
    assert json.loads((target / "config.json").read_text()) == before | written
    tokens = torch.randint(0, 257, (2, 90), generator=torch.Generator().manual_seed(1))
    logits = [AutoModelForCausalLM.from_pretrained(folder)(input_ids=tokens).logits for folder in (base, target)]
    assert torch.equal(*logits)
    again = exported(target, tmp_path / "again", tmp_path)
    assert (again / "config.json").read_bytes() == (target / "config.json").read_bytes()


def of_heads(model_type):
    return dict(hidden_size=60, head_dim=12) if model_type == "stablelm" else {}


OLDER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {}
for folder in sys.argv[1:]:
    ids = AutoTokenizer.from_pretrained(folder)("<|im_start|>user\\nAdd 1 + 2, h\\u00e9<|im_end|>").input_ids
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    with torch.no_grad():
        found[folder] = [ids, model(input_ids=torch.tensor([[i % 257 for i in ids * 9]])).logits.double().sum(1).tolist()]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_transformers_4_computes_the_same_from_an_export(smollm2, tmp_path):
    """In an environment of its own, which borrows torch from this one."""
    exports = [exported(smollm2, tmp_path / "smollm2", tmp_path)]
    for how, (model_type, rope, _) in ROPE.items():
        base = builders.llama(tmp_path / "base" / how, None, model_type, rope_parameters=rope, **of_heads(model_type))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(smollm2 / name, base)
        exports.append(exported(base, tmp_path / how, tmp_path))
    python = tmp_path / "older" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    made = subprocess.run(
        [python, "-m", "pip", "install", "-q", "transformers==4.56.2"], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip("needs a package index that has transformers 4.56.2")
    borrowed = tmp_path / "borrowed"
    borrowed.mkdir()
    for name in ("torch", "torchgen", "functorch", "sympy", "mpmath", "networkx", "jinja2", "markupsafe"):
        source = find(name)
        if source is not None:
            (borrowed / name).symlink_to(source)
    for metadata in find("torch").parent.glob("torch-*.dist-info"):
        (borrowed / metadata.name).symlink_to(metadata)
    outcomes = []
    for interpreter, path in ((sys.executable, None), (python, borrowed)):
        environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"} | (
            {"PYTHONPATH": str(path)} if path else {}
        )
        run = subprocess.run([interpreter, "-c", OLDER, *exports], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        outcomes.append(json.loads(run.stdout.splitlines()[-1]))
    for folder, (ids, sums) in outcomes[0].items():
        older_ids, older_sums = outcomes[1][folder]
        assert ids == older_ids, folder
        torch.testing.assert_close(torch.tensor(sums), torch.tensor(older_sums), rtol=1e-4, atol=1e-3)


def find(package):
    import importlib.util
    from pathlib import Path

    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None
