"""What the model makes of the tasks of ``eval.tasks``: ``eval/TASK/METRIC``, and every answer in the run directory.

Accuracy and perplexity, and the change of each since the base model, are those of :mod:`liftdist.evaluation.scores`.

kl_to_base   sum over texts of log b(text) - log p(text), divided by their tokens        b: the base model, p: the model

The texts are drawn from the base model, token by token from all of its distribution, before the first step: so this estimates
KL(b, p) in nats a token without bias, needs no values of the base model later, and is 0 before the first step. They stay in
the run directory. Of multiple choice the option of highest log-likelihood after the prompt is taken for the answer, whatever
its length.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from transformers import PreTrainedModel

from liftdist import files
from liftdist.data import content
from liftdist.data.chat import Encoder
from liftdist.data.tokenised import UNREAD
from liftdist.distributed import collectives
from liftdist.errors import UserError
from liftdist.evaluation import generation, scores, statistics
from liftdist.evaluation.generation import Answering
from liftdist.evaluation.questions import Question, questions
from liftdist.evaluation.server import Server
from liftdist.evaluation_settings import GENERATION, OWN_TEXT, PERPLEXITY, TaskConfig
from liftdist.methods.base import Method
from liftdist.models import build
from liftdist.registry import SCORERS
from liftdist.runs import results
from liftdist.runs.context import RunContext
from liftdist.runs.results import Answer, Figure
from liftdist.schema import Config
from liftdist.training.inputs import Inputs, encoding_of

_DRAWN = ("size", "seed", "max_new_tokens")  # settings that say what the base model writes


@dataclass(frozen=True)
class Asked:
    """A task, its questions, and their prompts as the model gets them."""

    task: TaskConfig
    questions: list[Question]
    prompts: list[tuple[str, list[int]]]
    encoder: Encoder
    stops: list[int]  # tokens that end an answer


def run(
    context: RunContext, inputs: Inputs | None, model: PreTrainedModel, method: Method, step: int
) -> dict[str, float]:
    """Ask the model, write what it answered, and return the figures. Collective.

    Raises:
        UserError: questions that cannot be read or asked; no room for the whole model on a rank.
    """
    if not context.config.eval.tasks:
        return {}
    found: list[Asked] = []
    with collectives.together():
        found = prepare(context)
    figures: dict[str, float] = {}
    for asked in found:
        context.cancellation.boundary()
        if asked.task.kind == OWN_TEXT:
            figures |= written(context, _on_own_text(context, model, method, asked, step))
            continue
        figures |= _answered(context, asked, generation.unsharded(model), step)
    return figures


def run_on(context: RunContext, server: Server, step: int) -> dict[str, float]:
    """As :func:`run`, of the model that a server holds. Collective.

    Raises:
        UserError: questions that cannot be read or asked; the server fails.
    """
    found: list[Asked] = []
    with collectives.together():
        found = prepare(context, server.room)
    figures: dict[str, float] = {}
    for asked in found:
        context.cancellation.boundary()
        figures |= _answered(context, asked, contextlib.nullcontext(server), step)
    return figures


def _answered(
    context: RunContext, asked: Asked, opened: contextlib.AbstractContextManager[Answering], step: int
) -> dict[str, float]:
    """Ask a task, write the answers, and return their figures. Collective."""
    mesh, task = context.mesh, asked.task
    mine = range(mesh.rank, len(asked.questions), mesh.world_size)
    answers: list[Answer] = []
    with opened as answering, collectives.together():
        answers = _ask(context, answering, asked, mine, step)
    every = sorted((one for part in collectives.gather(answers) for one in part), key=lambda one: one.id)
    every = [dataclasses.replace(one, how=task.how(asked.questions[one.id].options)) for one in every]
    if late := sum(one.timed_out for one in every):
        context.console.say(
            f"{task.title}: {late} answers took too long to compare, and are taken for wrong (timed_out)"
        )
    figure = scores.figure(step, task.title, task.metric, every)
    figures, changed = written(context, figure, every), since_base(context, figure, every) if step else {}
    if step and not changed:
        context.console.say(
            f"{task.title}: the change since the base model is not known, which was not asked these questions"
        )
    return figures | changed


def since_base(context: RunContext, figure: Figure, answers: Sequence[Answer]) -> dict[str, float]:
    """The change since the base model, by tag, which is written, too; nothing if that was not asked the same. Collective."""
    change: Figure | None = None
    with collectives.together():
        if context.mesh.is_main:
            change = scores.change(Path(context.config.run_dir).expanduser(), figure, answers)
    change = collectives.gather(change)[0]
    return {} if change is None else written(context, change)


def written(context: RunContext, figure: Figure, answers: Sequence[Answer] = ()) -> dict[str, float]:
    """Write a figure and its answers; return it by tag. Collective."""
    with collectives.together():
        if context.mesh.is_main:
            of_run = results.Results(Path(context.config.run_dir).expanduser())
            of_run.add(figure, answers)
            of_run.close()
    tag = f"eval/{figure.task}/{figure.metric}"
    values = {tag: figure.value, f"{tag}/low": figure.low, f"{tag}/high": figure.high}
    return {name: value for name, value in values.items() if value is not None}


@cache
def prepare(context: RunContext, room: float = math.inf) -> list[Asked]:
    """The questions of all tasks. Raises ``UserError`` for one that cannot be asked.

    Args:
        room: tokens of a prompt and its answer, where these are bounded not by the model alone.
    """
    found = [_prepared(context.config, number, room) for number in range(len(context.config.eval.tasks))]
    for asked in found:
        template = asked.encoder.template or ""
        if keys := sorted({key for question in asked.questions for key in content.unread(question.prompt, template)}):
            context.console.say(f"{asked.task.title}: {UNREAD}: {', '.join(keys)}")
    return found


def _prepared(config: Config, number: int, room: float) -> Asked:
    task, section = config.eval.tasks[number], f"eval.tasks.{number}"
    folder, encoder_of, text_config = encoding_of(config)
    encoder = encoder_of(task.source(section))
    stops = _stops(section, folder, encoder)
    own = (encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id, stops[0])
    begin = [next(token for token in own if token is not None)]  # of a text without a prompt
    asked = [] if task.kind == OWN_TEXT else questions(task, section)
    try:
        prompts = [(text, ids or begin) for text, ids in (encoder.prompt(question.prompt) for question in asked)]
    except ValueError as error:
        raise UserError(f"{section}: {error}") from None
    context = getattr(text_config, "max_position_embeddings", None) or math.inf
    if task.kind == OWN_TEXT:
        prompts, needed, longest = [("", begin)], len(begin) + task.max_new_tokens, "a text"
    else:
        lengths = [len(ids) + _longest_answer(task, encoder, one) for (_, ids), one in zip(prompts, asked, strict=True)]
        needed = max(lengths)
        longest = f"the longest prompt with its answer, {asked[lengths.index(needed)].place},"
    if needed > min(context, room):
        bound = (
            f"the model's context is {context}" if context <= room else f"the server takes {room} (its --max-model-len)"
        )
        lower = f"lower {section}.max_new_tokens, or " if task.kind in (GENERATION, OWN_TEXT) else ""
        raise UserError(f"{section}: {longest} needs {needed} tokens, {bound}; {lower}leave it out")
    return Asked(task, asked, prompts, encoder, stops)


def _longest_answer(task: TaskConfig, encoder: Encoder, question: Question) -> int:
    """Tokens."""
    if task.kind == GENERATION:
        return task.max_new_tokens
    replies = question.expected[:1] if task.kind == PERPLEXITY else question.options
    return max(map(len, encoder.tokenizer(list(replies), add_special_tokens=False)["input_ids"]))


def _stops(section: str, folder: Path, encoder: Encoder) -> list[int]:
    own = encoder.tokenizer.eos_token_id
    stops = list(dict.fromkeys([*build.stop_ids(folder), *([own] if own is not None else [])]))
    if not stops:
        raise UserError(
            f"{section}: the tokenizer has no end-of-sequence token, so that answers would not end; set eos_token"
        )
    return stops


def _on_own_text(context: RunContext, model: PreTrainedModel, method: Method, asked: Asked, step: int) -> Figure:
    """How far the model is from the base model on texts that this wrote, which are drawn if they have not been. Collective.

    Raises:
        UserError: training has begun without them, and the values of the base model are not at hand.
    """
    mesh, task = context.mesh, asked.task
    path = Path(context.config.run_dir).expanduser() / results.FOLDER / task.title / "texts.json"
    texts: list[tuple[list[int], float]] | None = None
    with collectives.together():
        if mesh.is_main and path.exists():
            texts = _drawn_before(path, task)
    texts = collectives.gather(texts)[0]
    if texts is None:
        config = context.config
        if step and not (config.keeps_base or (config.method == "lora" and config.lora.variant != "pissa")):
            raise UserError(
                f"eval.tasks: {task.title} needs texts that the base model writes before the first step, and step {step} is "
                f"done; leave it out, or begin a new run"
            )
        with method.at_base() if step else contextlib.nullcontext():
            texts = _draw(context, model, asked)
        with collectives.together():
            if mesh.is_main:
                files.real_folder(files.real_folder(path.parent.parent) / task.title)
                files.write(path, json.dumps({name: getattr(task, name) for name in _DRAWN} | {"texts": texts}))
    mine = texts[mesh.rank :: mesh.world_size]
    begin = asked.prompts[0][1]
    now: list[float] = []
    with generation.unsharded(model) as answering, collectives.together():
        now = answering.log_likelihoods([(begin, ids) for ids, _ in mine], context.cancellation.check)
    differences = [before - after for (_, before), after in zip(mine, now, strict=True)]
    every = [one for part in collectives.gather(differences) for one in part]
    mean_tokens = sum(len(ids) for ids, _ in texts) / len(texts)
    nats = [difference / mean_tokens for difference in every]
    low, high = statistics.bootstrap(nats)
    return Figure(step, task.title, task.metric, sum(nats) / len(nats), low, high, len(nats))


def _drawn_before(path: Path, task: TaskConfig) -> list[tuple[list[int], float]]:
    """The texts in a file. Raises ``UserError`` if the task asks for others."""
    held = json.loads(files.read(path))
    if isinstance(held, list):  # of an earlier version, which kept the texts alone
        held = {"size": len(held), "texts": held}
    if differ := [
        f"{name}={held[name]}" for name in _DRAWN if held.get(name, getattr(task, name)) != getattr(task, name)
    ]:
        raise UserError(
            f"{path}: holds texts that were drawn once, with {' '.join(differ)}; set {'that' if len(differ) == 1 else 'those'}, "
            "or give the task another name"
        )
    texts: list[tuple[list[int], float]] = held["texts"]
    return texts


def _draw(context: RunContext, model: PreTrainedModel, asked: Asked) -> list[tuple[list[int], float]]:
    """Texts of the model as it is, token ids, and their log-likelihoods in nats. Collective."""
    mesh, task, begin = context.mesh, asked.task, asked.prompts[0][1]
    number = len(range(mesh.rank, task.size, mesh.world_size))
    drawn: list[tuple[list[int], float]] = []
    sampling = dataclasses.replace(task, temperature=1.0, top_p=1.0)
    with generation.unsharded(model) as answering, collectives.together():
        check, seed = context.cancellation.check, 1_000_003 * task.seed + 1009 * mesh.rank
        ids = answering.answer([begin] * number, sampling, asked.stops, seed, check, keep_end=True)
        likelihoods = answering.log_likelihoods([(begin, one) for one in ids], check)
        drawn = list(zip(ids, likelihoods, strict=True))
    parts = collectives.gather(drawn)
    return [parts[place % mesh.world_size][place // mesh.world_size] for place in range(task.size)]


def _ask(context: RunContext, answering: Answering, asked: Asked, mine: Sequence[int], step: int) -> list[Answer]:
    """This rank's answers; of a task that measures perplexity the replies themselves."""
    task, tokenizer, beat = asked.task, asked.encoder.tokenizer, context.cancellation.check  # may raise
    chosen = [asked.questions[place] for place in mine]
    prompts = [asked.prompts[place] for place in mine]
    if task.kind == GENERATION:
        seed = 1_000_003 * (context.config.train.seed + step) + context.mesh.rank
        said = answering.answer([ids for _, ids in prompts], task, asked.stops, seed, beat)
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in said]
        scorer = SCORERS.load(task.scored_by).make(task)
        found = [scorer.score(text, one.expected, one.record) for text, one in zip(texts, chosen, strict=True)]
        return [
            Answer(one.id, prompt, text, list(one.expected), scored.extracted, scored.score, timed_out=scored.timed_out)
            for one, (prompt, _), text, scored in zip(chosen, prompts, texts, found, strict=True)
        ]
    replies = [one.expected[:1] if task.kind == PERPLEXITY else one.options for one in chosen]
    pairs = [
        (ids, _continued(asked.encoder, text, ids, reply))
        for (text, ids), options in zip(prompts, replies, strict=True)
        for reply in options
    ]
    likelihoods = answering.log_likelihoods(pairs, beat)
    if task.kind == PERPLEXITY:
        return [
            Answer(one.id, prompt, reply, [reply], None, nats, len(continuation))
            for one, (prompt, _), (reply,), nats, (_, continuation) in zip(
                chosen, prompts, replies, likelihoods, pairs, strict=True
            )
        ]
    answers, begin = [], 0
    for one, (prompt, _) in zip(chosen, prompts, strict=True):
        of_options = likelihoods[begin : begin + len(one.options)]
        begin += len(one.options)
        text = one.options[of_options.index(max(of_options))]
        answers.append(Answer(one.id, prompt, text, list(one.expected), text, float(text in one.expected)))
    return answers


def _continued(encoder: Encoder, text: str, ids: Sequence[int], reply: str) -> list[int]:
    """The tokens of a reply after its prompt."""
    whole = encoder.tokenizer(text + reply, add_special_tokens=False)["input_ids"]
    plain = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    if whole[: len(plain)] == plain and list(ids[-len(plain) :]) == plain:
        return list(whole[len(plain) :])
    return list(encoder.tokenizer(reply, add_special_tokens=False)["input_ids"])
