"""Tasks that a run asks its model: the answers of one process, on any ranks; training goes on as if nobody had asked."""

import json
import math
from pathlib import Path

import builders
import commands
import hooks
import pytest
import ranks
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.traffic import Traffic
from liftdist import config as configs
from liftdist.console import Console
from liftdist.distributed.sharding import whole_tensor
from liftdist.errors import Stopped, UserError
from liftdist.evaluation import generation, tasks
from liftdist.evaluation.evaluate import evaluate
from liftdist.evaluation_settings import TaskConfig
from liftdist.models import build
from liftdist.runs import results
from liftdist.runs.context import RunContext
from liftdist.runs.stop import CancellationPoint, StopRequests

NEW = 12
WORLDS = {"1": (1, 1), "2": (2, 1), "3": (3, 1), "2x2": (4, 2)}
WORDS = ["red", "a much longer green answer", "blue", "seven"]


@pytest.fixture(scope="module")
def folder(tiny_model, smollm2, tmp_path_factory):
    made = tmp_path_factory.mktemp("tasks")
    builders.write_records(made / "records.jsonl")
    builders.llama(made / "tied", tiny_model)
    builders.llama(made / "untied", tiny_model, tie_word_embeddings=False)
    builders.llama(made / "bfloat16", tiny_model, dtype=torch.bfloat16)
    questions = [
        {"prompt": "Say something " + "really " * (n % 5), "completion": WORDS[n % 4], "options": WORDS}
        for n in range(11)
    ]
    (made / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    return made


def asked(folder):
    of = dict(path=str(Path(folder) / "questions.jsonl"))
    return [
        TaskConfig(name="said", scorer="contains", max_new_tokens=NEW, **of),
        TaskConfig(name="chosen", kind="multiple_choice", options_field="options", **of),
        TaskConfig(name="likely", kind="perplexity", **of),
    ]


def settings_of(folder, kind, name="run"):
    made = builders.config(
        Path(folder) / kind,
        Path(folder) / "records.jsonl",
        Path(folder) / f"{name}-{kind}",
        eval=dict(tasks=asked(folder)),
        selection=dict(refresh_interval=2),
    )
    made.model.dtype = "bfloat16" if kind == "bfloat16" else "float32"
    return made


def answered(mesh, folder, kind, world):
    settings = settings_of(folder, kind, f"asked-{world}")
    if mesh.is_main:
        Path(settings.run_dir).mkdir(parents=True)
    made = builders.trainer(mesh, settings)
    context = RunContext(settings, mesh, Console(False))
    return tasks.run(context, made.inputs, made.model, made.method, 0)


def plainly(folder, kind):
    """By transformers, one question after the other."""
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder / kind, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / kind)
    stops = {*build.stop_ids(folder / kind), tokenizer.eos_token_id}
    said, chosen, nats, tokens = [], [], 0.0, 0
    for line in (folder / "questions.jsonl").read_text().splitlines():
        record = json.loads(line)
        ids = tokenizer(record["prompt"])["input_ids"]
        row = list(ids)
        with torch.no_grad():
            while len(row) < len(ids) + NEW:
                token = int(model(input_ids=torch.tensor([row])).logits[0, -1].argmax())
                if token in stops:
                    break
                row.append(token)
            said.append(tokenizer.decode(row[len(ids) :], skip_special_tokens=True))
            found = []
            for option in record["options"]:
                more = tokenizer(option)["input_ids"]
                logits = model(input_ids=torch.tensor([ids + more])).logits[0, len(ids) - 1 : -1].float()
                found.append(logits.log_softmax(-1).gather(1, torch.tensor(more)[:, None]).double().sum().item())
                if option == record["completion"]:
                    nats, tokens = nats + found[-1], tokens + len(more)
        chosen.append(record["options"][found.index(max(found))])
    return said, chosen, math.exp(-nats / tokens)


@pytest.fixture(scope="module")
def expected(folder):
    return {kind: plainly(folder, kind) for kind in ("tied", "untied", "bfloat16")}


def test_sampling_may_take_kernels_that_are_not_deterministic(tiny_model):
    """``top_p`` has no others on GPUs: they warn within, and what was demanded is demanded after."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    task = TaskConfig(name="said", scorer="contains", path="-", max_new_tokens=2, temperature=1.0, top_p=0.9)
    seen = {}
    try:
        for mode in ("default", "warn", "error"):
            torch.set_deterministic_debug_mode(mode)
            demanded, within = torch.get_deterministic_debug_mode(), seen.setdefault(mode, set())
            generation.Unsharded(model).answer(
                [[1, 17]], task, [2], 0, lambda within=within: within.add(torch.get_deterministic_debug_mode())
            )
            assert torch.get_deterministic_debug_mode() == demanded
    finally:
        torch.set_deterministic_debug_mode("default")
    assert seen == {"default": {0}, "warn": {1}, "error": {1}}


def test_what_has_no_room_together_is_asked_in_halves(tiny_model):
    model = generation.Unsharded(AutoModelForCausalLM.from_pretrained(tiny_model))
    task = TaskConfig(name="said", scorer="contains", path="-", max_new_tokens=3)
    prompts = [[1, *range(17, 17 + number)] for number in range(7)]
    pairs = [(prompt, [5, 6]) for prompt in prompts]

    def both():
        said = model.answer(prompts, task, [2], 0, lambda: None)
        return said, model.log_likelihoods(pairs, lambda: None)

    together, sizes = both(), []

    def no_room(*arguments, **_):
        sizes.append(len(arguments[1]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError

    with (
        hooks.around(generation, "_generate", before=no_room),
        hooks.around(generation.Unsharded, "_likelihoods", before=no_room),
    ):
        said, nats = both()
    assert said == together[0]
    assert nats == pytest.approx(together[1], rel=1e-4)
    assert sizes == 2 * [7, 3, 1, 2, 4, 2, 2]

    def none_at_all(*_):
        raise torch.OutOfMemoryError

    with hooks.around(generation, "_generate", before=none_at_all), pytest.raises(torch.OutOfMemoryError):
        both()


ALL = [(world, kind) for world in WORLDS for kind in ("tied", "untied", "bfloat16")]
BY_DEFAULT = {("1", "tied"), ("2", "bfloat16"), ("3", "untied"), ("2x2", "tied")}


@pytest.mark.parametrize(
    ("world", "kind"), [pytest.param(*one, marks=[] if one in BY_DEFAULT else pytest.mark.slow) for one in ALL]
)
def test_answers_are_those_of_one_process(world, kind, folder, expected):
    size, replicas = WORLDS[world]
    first, *others = ranks.run(size, answered, folder, kind, world, dp_replicate=replicas)
    assert all(other == first for other in others)
    run_dir = Path(settings_of(folder, kind, f"asked-{world}").run_dir)
    said, chosen, perplexity = expected[kind]
    assert len(set(said)) > 3
    found = results.read_answers(run_dir, "said", 0)
    assert [answer.id for answer in found] == list(range(11))
    assert [answer.answer for answer in found] == said
    assert [answer.answer for answer in results.read_answers(run_dir, "chosen", 0)] == chosen
    figures = {figure.task: figure for figure in results.read(run_dir)}
    assert figures["likely"].value == pytest.approx(perplexity, rel=2e-2 if kind == "bfloat16" else 1e-5)
    assert figures["chosen"].value == sum(one == WORDS[n % 4] for n, one in enumerate(chosen)) / 11
    assert figures["chosen"].low <= figures["chosen"].value <= figures["chosen"].high
    assert first["eval/chosen/accuracy"] == figures["chosen"].value


def trained(mesh, folder, kind):
    """The state after four steps, without questions and with them before each step."""
    found = []
    for name in ("quiet", "asked"):
        settings = settings_of(folder, kind, f"{name}-trained")
        if mesh.is_main:
            Path(settings.run_dir).mkdir(parents=True)
        made = builders.trainer(mesh, settings)
        losses = []
        for step in range(4):
            if name == "asked":
                tasks.run(RunContext(settings, mesh, Console(False)), made.inputs, made.model, made.method, step)
            with (sent := Traffic()):
                losses.append(made.run_step()["train/loss"])
        found.append((losses, builders.global_digest(made), made.model.training, sent.by_group))
    return found


@pytest.mark.parametrize("kind", ["tied", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_training_goes_on_to_the_bit(kind, folder):
    (quiet, asked), *_ = ranks.run(2, trained, folder, kind)
    assert asked == quiet
    assert quiet[2]


def of_a_text(mesh, folder):
    (Path(folder) / "text.jsonl").write_text(json.dumps({"text": "Once upon a time"}))
    settings = settings_of(folder, "tied", "text")
    settings.eval.tasks = [TaskConfig(name="text", kind="perplexity", path=str(Path(folder) / "text.jsonl"))]
    Path(settings.run_dir).mkdir(parents=True)
    made = builders.trainer(mesh, settings)
    return tasks.run(RunContext(settings, mesh, Console(False)), made.inputs, made.model, made.method, 0)


def test_a_text_without_a_prompt_begins_as_documents_do(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "tied", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tied")
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("Once upon a time")["input_ids"]]])
    assert ids.shape[1] > 3
    (found,) = ranks.run(1, of_a_text, folder)
    assert found["eval/text/perplexity"] == pytest.approx(model(input_ids=ids, labels=ids).loss.exp().item(), rel=1e-5)


def drifted(mesh, folder, kind, world):
    """The divergence before training, and after three steps; the weights then."""
    settings = settings_of(folder, kind, f"drifted-{world}")
    settings.optimizer.lr = 0.2
    settings.eval.tasks = [TaskConfig(name="own", kind="own_text", size=7, max_new_tokens=20)]
    if mesh.is_main:
        Path(settings.run_dir).mkdir(parents=True)
    made = builders.trainer(mesh, settings)
    context = RunContext(settings, mesh, Console(False))
    figures = [tasks.run(context, made.inputs, made.model, made.method, 0)]
    for _ in range(3):
        made.run_step()
    figures.append(tasks.run(context, made.inputs, made.model, made.method, 3))
    return figures, {name: whole_tensor(param) for name, param in made.model.named_parameters()}


@pytest.mark.parametrize("world", ["2", *(pytest.param(world, marks=pytest.mark.slow) for world in ("1", "3", "2x2"))])
def test_divergence_on_texts_of_the_base_model(world, folder):
    size, replicas = WORLDS[world]
    ((before, after), weights), *others = ranks.run(size, drifted, folder, "tied", world, dp_replicate=replicas)
    assert all(other[0] == [before, after] for other in others)
    assert before["eval/own/kl_to_base"] == before["eval/own/kl_to_base/low"] == 0
    texts = json.loads(
        (Path(settings_of(folder, "tied", f"drifted-{world}").run_dir) / "eval/own/texts.json").read_text()
    )["texts"]
    assert len({tuple(ids) for ids, _ in texts}) == 7
    models = {}
    for name in ("base", "trained"):
        models[name] = AutoModelForCausalLM.from_pretrained(folder / "tied", dtype=torch.float32).eval()
    models["trained"].load_state_dict(weights, strict=False)
    nats = tokens = 0
    for ids, likelihood in texts:
        row = torch.tensor([[1, *ids]])
        of = {}
        for name, model in models.items():
            with torch.no_grad():
                logits = model(input_ids=row).logits[0, :-1].log_softmax(-1)
            of[name] = logits.gather(1, row[0, 1:, None]).double().sum().item()
        assert of["base"] == pytest.approx(likelihood, rel=1e-5)
        nats, tokens = nats + of["base"] - of["trained"], tokens + len(ids)
    assert after["eval/own/kl_to_base"] == pytest.approx(nats / tokens, rel=1e-3)
    assert after["eval/own/kl_to_base"] > 0.05
    assert after["eval/own/kl_to_base/low"] < after["eval/own/kl_to_base"] < after["eval/own/kl_to_base/high"]


def stopped(mesh, folder):
    """One rank is asked to stop while it answers."""
    settings = settings_of(folder, "tied", "stopped")
    if mesh.is_main:
        Path(settings.run_dir).mkdir(parents=True)
    made = builders.trainer(mesh, settings)
    stop = StopRequests()
    context = RunContext(settings, mesh, Console(False), CancellationPoint(stop))

    def asked(*_):
        stop.reason = "SIGTERM" if mesh.rank == 1 else None

    with hooks.around(generation, "_generate", before=asked), pytest.raises(Stopped, match="SIGTERM"):
        tasks.run(context, made.inputs, made.model, made.method, 0)
    stop.reason = None
    return made.run_step()["train/loss"]


def test_a_stop_is_heeded_between_two_tokens(folder):
    first, second = ranks.run(2, stopped, folder)
    assert first == second
    assert not (Path(settings_of(folder, "tied", "stopped").run_dir) / "eval.jsonl").exists()


def test_a_run_asks_when_it_is_told_to(tiny_model, records, folder, tmp_path):
    """Also one that is killed and goes on: its answers are compared with those from before its first step."""
    said = dict(name="said", scorer="contains", path=str(folder / "questions.jsonl"), max_new_tokens=4, limit=3)
    likely = dict(name="likely", kind="perplexity", path=str(folder / "questions.jsonl"))
    config = commands.write_config(
        tmp_path, tiny_model, records, eval=dict(tasks=[said, likely], interval=2), checkpoint=dict(interval=2)
    )
    killed = commands.run_command(
        "train", config, environment={"PYTHONPATH": str(commands.INJECT), "FAULT": "0:4:kill"}
    )
    assert killed.returncode, killed.stdout
    run_dir = tmp_path / "run"
    late = dict(said, name="late")
    run = commands.run_command("train", config, f"eval.tasks={json.dumps([said, likely, late])}")
    assert run.returncode == 0, run.stdout
    assert run.stdout.count("the change since the base model is not known") == 2  # of `late`, at steps 4 and 5
    figures = results.read(run_dir)
    assert [figure.step for figure in figures if (figure.task, figure.metric) == ("said", "accuracy")] == [0, 2, 4, 5]
    assert [figure.step for figure in figures if figure.metric == "perplexity_change"] == [2, 4, 5]
    assert len(results.read_answers(run_dir, "said", 5)) == 3
    values = {(figure.step, figure.metric): figure.value for figure in figures if figure.task == "likely"}
    change = values[5, "perplexity"] - values[0, "perplexity"]
    assert values[5, "perplexity_change"] == pytest.approx(change)
    assert change != 0
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/said/accuracy" in line] == [0, 2, 4, 5]
    found = {
        line["step"]: line["eval/likely/perplexity_change"] for line in lines if "eval/likely/perplexity_change" in line
    }
    assert found == {step: values[step, "perplexity_change"] for step in (2, 4, 5)}


def test_a_run_is_asked_afterwards(tiny_model, records, folder, tmp_path):
    """The command gives the answers that the run has given after its last step, on another number of ranks."""
    task = dict(name="said", scorer="contains", path=str(folder / "questions.jsonl"), max_new_tokens=6)
    config = commands.write_config(tmp_path, tiny_model, records, eval=dict(tasks=[task]), optimizer=dict(lr=0.05))
    assert commands.run_command("train", config).returncode == 0
    run_dir = tmp_path / "run"
    before, trained = (results.read_answers(run_dir, "said", step) for step in (0, 5))
    assert before != trained
    for step in (0, 5):
        (run_dir / "eval" / "said" / f"step-{step:08d}.jsonl").unlink()
    run = commands.run_command("eval", run_dir, "--nproc", "2")
    assert run.returncode == 0, run.stdout
    assert "said/accuracy" in run.stdout
    assert results.steps(run_dir, "said") == [5]
    assert results.read_answers(run_dir, "said", 5) == trained
    exported = commands.run_command("eval", config, f"model.path={run_dir / 'export'}", f"run_dir={tmp_path / 'other'}")
    assert exported.returncode == 0, exported.stdout
    assert results.read_answers(tmp_path / "other", "said", 0) == trained
    again = commands.run_command("eval", config, f"run_dir={tmp_path / 'other'}")
    other = "other/eval: holds answers of another model than model.path, or of another model.base_dtype; give another run_dir"
    assert other in commands.user_error(again)
    wrong = commands.run_command("eval", run_dir, f"model.path={run_dir / 'export'}")
    assert "is of another base model than model.path" in commands.user_error(wrong)
    nothing = commands.run_command("eval", run_dir, "eval.tasks=[]")
    assert "eval.tasks: say what the model is to be asked" in commands.user_error(nothing)


def refused_with(mesh, path, cases):
    """A run, and what asking it with other settings ends with."""
    assert builders.run_once(mesh, *configs.load(path)) == "finished"
    found = []
    for overrides in cases:
        config, text = configs.load(path, overrides)
        with pytest.raises(UserError) as caught:
            evaluate(RunContext(config, mesh, Console(False)), text)
        found.append(str(caught.value))
    return found


@pytest.mark.parametrize(
    ("own", "cases"),
    [
        (
            dict(method="lift"),
            {
                "method: lift -> full": ["method=full"],
                "selection.density: 0.05 -> 0.1; ": ["selection.density=0.1"],
                "model.dtype: float32 -> bfloat16; ": ["model.dtype=bfloat16"],
            },
        ),
        (
            dict(method="lora", selection={"modules": ["*.q_proj"]}),
            {"lora.alpha: 8 -> 64; ask it with those": ["lora.alpha=64", "lora.dropout=0.1"]},
        ),
    ],
)
def test_a_run_is_asked_with_the_settings_that_make_its_model(own, cases, tiny_model, records, folder, tmp_path):
    task = dict(name="said", scorer="contains", path=str(folder / "questions.jsonl"), max_new_tokens=2, limit=2)
    train = dict(steps=1, export=False, eval_interval=0)
    path = commands.write_config(
        tmp_path, tiny_model, records, eval=dict(tasks=[task]), data=dict(eval_path=None), train=train
    )
    settings = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(settings | own))
    for found, problem in zip(ranks.run(1, refused_with, path, [*cases.values()])[0], cases, strict=True):
        assert f"step-00000001: was trained with other settings: {problem}" in found
    assert [figure.step for figure in results.read(tmp_path / "run")] == [0, 1, 1]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (dict(path="absent.jsonl"), "data absent.jsonl: no such file"),
        pytest.param(dict(max_new_tokens=600), "lower eval.tasks.0.max_new_tokens", marks=pytest.mark.slow),
        (
            dict(path="long.jsonl", kind="perplexity", scorer=None),
            "long.jsonl:1, needs 601 tokens, the model's context is 512; leave it out",
        ),
        (
            dict(path=None, kind="own_text", scorer=None, max_new_tokens=512),
            "a text needs 513 tokens, the model's context is 512; lower eval.tasks.0.max_new_tokens, or leave it out",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_model_is_loaded(
    settings, problem, tiny_model, records, folder, tmp_path
):
    task = dict(name="said", scorer="contains", path=str(folder / "questions.jsonl")) | settings
    if task["path"] == "long.jsonl":
        task["path"] = str(tmp_path / "long.jsonl")
        (tmp_path / "long.jsonl").write_text(json.dumps({"text": " a" * 600}))
    config = commands.write_config(tmp_path, tiny_model, records, eval=dict(tasks=[task]))
    run = commands.run_command("train", config)
    assert problem in commands.user_error(run)
    assert "selecting" not in run.stdout
