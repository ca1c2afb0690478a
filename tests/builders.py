"""Small models, records, configs and runs for tests: real architectures with few weights."""

import contextlib
import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from liftdist.console import Console
from liftdist.distributed.collectives import gather
from liftdist.distributed.sharding import whole_tensor
from liftdist.errors import Stopped, UserError
from liftdist.models import weights
from liftdist.runs import checkpoint, claims, saver
from liftdist.runs.context import RunContext
from liftdist.runs.manifest import Provenance, Snapshot
from liftdist.runs.stop import StopRequests
from liftdist.schema import Config
from liftdist.training import setup
from liftdist.training.inputs import Inputs, prepare_inputs
from liftdist.training.run import train
from liftdist.training.trainer import Trainer

RECORDS = {  # one of every format that learns a response and that `auto` detects
    "alpaca": {"instruction": "Add.", "input": "1 2", "output": "3"},
    "prompt_completion": {"prompt": "1+2=", "completion": "3"},
    "messages": {"messages": [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "3"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "1+2"}, {"from": "gpt", "value": "3"}]},
    "question_answer": {"question": "1+2", "answer": "3"},
    "instruction_response": {"instruction": "Add.", "context": "1 2", "response": "3"},
    "prompt_response": {"prompt": "1+2", "response": "3"},
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")

NOWHERE = Provenance(config="", from_environment={}, base="", data="")  # where only the state matters

STEPS, REFRESH = 20, 7
BEFORE, AFTER = REFRESH + 1, REFRESH  # steps around a save, each with a refresh among them
SETTINGS = {
    "optimizer": dict(lr=5e-3, warmup_ratio=0.1, max_grad_norm=5.0),
    "selection": dict(refresh_interval=REFRESH),
    "train": dict(steps=STEPS, batch_size=6, micro_batch_size=2, seed=3),  # 40 records: epochs end inside steps
}


def llama(folder: Path, tokenizer_from: Path | None = None, model_type: str = "llama", **sizes) -> Path:
    """Save a randomly initialised model of a transformers architecture, float32 unless ``dtype`` is given."""
    dtype = sizes.pop("dtype", torch.float32)
    settings = dict(
        vocab_size=49152 if tokenizer_from else 257,
        hidden_size=50,
        intermediate_size=93,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=6,
        tie_word_embeddings=True,
        initializer_range=0.08,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(settings | sizes))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES if tokenizer_from else ():
        shutil.copy(tokenizer_from / name, folder / name)
    return folder


def changed_copy(folder, target, seed=0, share=0.05, shift=0.01):
    """A copy of a model folder with other values at a share of the places of every linear weight."""
    shutil.copytree(folder, target)
    chance = torch.Generator().manual_seed(seed)
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if "_proj" in name:
                flat = tensor.view(-1)
                places = torch.randperm(flat.numel(), generator=chance)[: round(share * flat.numel())]
                flat[places] = (flat[places].float() * 1.5 + shift).to(flat.dtype)
        save_file(tensors, file, {"format": "pt"})
    return target


def frozen_model(folder: Path, model_type: str = "llama", **sizes):
    """Such a model in memory, without gradients for its weights."""
    return AutoModelForCausalLM.from_pretrained(llama(folder, None, model_type, **sizes)).requires_grad_(False)


def write_records(path: Path, count: int = 40) -> Path:
    """Up to forty prompt/completion records."""
    lines = [
        {"prompt": f"{a} plus {b} is", "completion": f" {a + b}" * (1 + a % 3)} for a in range(8) for b in range(5)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:count]))
    return path


def config(model: Path, records: Path, folder: Path, /, **sections) -> Config:
    """A config for small tests; ``sections`` holds dicts of settings by section."""
    made = Config(run_dir=str(folder / "run"), cache_dir=str(folder / "cache"))
    made.model.path, made.model.dtype = str(model), "float32"
    made.data.path, made.data.max_length = str(records), 64
    made.selection.density, made.selection.filter_rank, made.selection.refresh_interval = 0.05, 4, 0
    made.optimizer.lr, made.optimizer.warmup_ratio = 1e-2, 0.0
    made.train.batch_size, made.train.micro_batch_size = 8, 2
    for section, values in sections.items():
        for key, value in values.items():
            assert hasattr(getattr(made, section), key)
            setattr(getattr(made, section), key, value)
    return made


_made: dict[str, Inputs] = {}


def _inputs(settings: Config) -> Inputs:
    key = repr((settings.model.path, settings.data, settings.train, settings.cache_dir))  # what is read of them
    if key not in _made:  # the tokenizer alone takes half a second
        _made[key] = prepare_inputs(settings, Console(False))
    return _made[key]


def trainer(mesh, settings: Config, saved: checkpoint.Step | None = None) -> Trainer:
    """What a run sets up before its first step, from a checkpoint or from the start. Collective."""
    inputs = _inputs(settings)
    base = weights.digest(inputs.folder, Path(settings.cache_dir))
    model, _, method = setup.model_and_method(
        RunContext(settings, mesh, Console(False)),
        inputs.folder,
        base,
        from_checkpoint=saved is not None,
        inputs=inputs,
    )
    model.train()
    made = Trainer(settings, mesh, inputs, model, method)
    if saved is not None:
        made.restore(saved.manifest.snapshot.state, saved.read(method.matrices))
    return made


def save(made: Trainer, checkpointer: saver.Checkpointer, provenance=NOWHERE) -> saver.Saved | Exception | None:
    """Save a trainer's state and wait for the outcome. Collective."""
    begin_to_save(made, checkpointer, provenance)
    checkpointer.wait()
    return checkpointer.take_outcome()


def begin_to_save(made: Trainer, checkpointer: saver.Checkpointer, provenance=NOWHERE) -> None:
    """Hand a trainer's state to the thread that saves it. Collective."""
    snapshot = Snapshot(made.step, made.state(), provenance)
    checkpointer.save(made.method.state_dict(), made.method.matrices, snapshot)


def stop_and_continue(mesh, settings: Config, steps: int, go_on):
    """A run of so many steps is saved: what ``go_on(trainer)`` then finds, and what it finds from the checkpoint. Collective."""
    made = trainer(mesh, settings)
    for _ in range(steps):
        made.run_step()
    attempt = claimed_by_all(mesh, Path(settings.run_dir))
    assert isinstance(save(made, saver.Checkpointer(attempt, mesh, 1, None)), saver.Saved)
    return go_on(made), continued(mesh, settings, go_on)


def continued(mesh, settings: Config, go_on):
    """What ``go_on(trainer)`` finds where a run continues from its newest checkpoint. Collective."""
    run_dir = Path(settings.run_dir)
    return go_on(trainer(mesh, settings, newest(mesh, run_dir, accepted_in(run_dir))))


def save_and_go_on(mesh, config):
    """The state at a save and some steps later, once in one go and once from the checkpoint. Collective."""

    def go_on(made):
        saved = global_digest(made)
        return saved, [made.run_step()["train/loss"] for _ in range(AFTER)], global_digest(made)

    return stop_and_continue(mesh, config, BEFORE, go_on)


def global_digest(made: Trainer) -> str:
    """sha256 of the state of all ranks, in the order of the whole matrices: the same on any world size. Collective."""
    state = {key: tensor for key, tensor in made.method.state_dict().items() if not key.endswith("/first")}
    state |= {f"{m.name}/weights": m.rows_local.reshape(-1) for m in made.method.matrices}
    mine = {key: tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes() for key, tensor in state.items()}
    shards = made.mesh.device_mesh.size(1)
    replicas = gather(mine)
    replicas = [replicas[first : first + shards] for first in range(0, len(replicas), shards)]
    found = set()
    for replica in replicas:
        digest = hashlib.sha256(repr(sorted(made.state().items())).encode())
        for key in sorted(state):
            digest.update(key.encode() + b"".join(shard[key] for shard in replica))
        found.add(digest.hexdigest())
    assert len(found) == 1, "replicas differ"
    return found.pop()


def fill(disk: Path) -> Path:
    """Leave no space on a small disk; returns the file to remove."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


def claimed(run_dir):
    return claims.claim(run_dir, lambda history: checkpoint.accepted(run_dir, history))


def claimed_by_all(mesh, run_dir):
    return gather(claimed(run_dir) if mesh.is_main else None)[0]


def first_attempt(run_dir):
    """Attempt 1, as the process that claimed it would hold it."""
    return claims.Attempt(run_dir, 1, claims.attempts(run_dir)[1][0]["nonce"], {})


def last_end(run_dir):
    """How the newest attempt ended, by its own word."""
    attempts = claims.attempts(run_dir)
    return next(event for event in attempts[max(attempts)] if event["event"] == "end")


def newest(mesh, run_dir, accepts, say=print):
    shards = mesh.device_mesh.size(1)
    return checkpoint.newest(run_dir, accepts, mesh.rank % shards, shards, say)


def accepted_in(run_dir):
    return checkpoint.accepted(run_dir, claims.attempts(run_dir))


def verified(folder):
    step = checkpoint.open_step(folder)
    step.verify(step.manifest.files)
    return step


def run_once(mesh, config, text="train: {}", allowed=(), stop=None):
    """One attempt at a run, and how it ended. Collective."""
    stop = stop or StopRequests()
    stop.catch(config.train.stop_signals)
    try:
        train(config, mesh, text, set(allowed), stop)
        return "finished"
    except (Stopped, UserError) as end:
        return f"{type(end).__name__}: {end}"


def files_of(run_dir):
    """Hashes of what the newest checkpoint holds, and its step."""
    steps = accepted_in(run_dir)
    if not steps:
        return 0, {}
    manifest = checkpoint.open_step(run_dir / "checkpoints" / max(steps)).manifest
    return manifest.step, {name: file.sha256 for name, file in manifest.files.items()}


def train_and_save(mesh, settings: Config, last: int = 1) -> dict[str, torch.Tensor]:
    """A run without its loop: all of its steps and checkpoints of the last ones. The weights it ended with. Collective."""
    attempt = claimed_by_all(mesh, Path(settings.run_dir))
    made = trainer(mesh, settings)
    base = weights.digest(made.inputs.folder, Path(settings.run_dir).parent / "cache")
    text = json.dumps({"model": {"path": settings.model.path, "dtype": settings.model.dtype}})
    writer = saver.Checkpointer(attempt, mesh, last, None)
    while made.step < settings.train.steps:
        made.run_step()
        if made.step > settings.train.steps - last:
            save(made, writer, Provenance(config=text, from_environment={}, base=base, data=""))
    return {name: whole_tensor(param).clone() for name, param in made.model.named_parameters()}


def keep_two_of_five(mesh, config, run_dir):
    """Save after each of five steps, keep two and the marked second; which were there each time, and at the end. Collective."""
    attempt = claimed_by_all(mesh, run_dir)
    made = trainer(mesh, config)
    checkpointer = saver.Checkpointer(attempt, mesh, 2, None)
    left = []
    for _ in range(5):
        made.run_step()
        name = save(made, checkpointer).name
        if made.step == 2 and mesh.is_main:
            (run_dir / "checkpoints" / name / "keep").touch()
        left.append(sorted(p.name[-1] for p in (run_dir / "checkpoints").glob("step-*")))
    return left, sorted(p.name for p in (run_dir / "checkpoints").iterdir())


def contents(folder):
    """Every file of a model folder; weights by tensor."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.suffix == ".safetensors":
            found |= {name: t.view(torch.uint8).numpy().tobytes() for name, t in load_file(path).items() if t.ndim}
        else:
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found
