"""Tasks of the lm-evaluation-harness (Gao et al., https://github.com/EleutherAI/lm-evaluation-harness), asked of a model folder.

    names -> its tasks, with their data sets -> its requests, shared by the ranks -> its scores -> the results of a run

Wording, examples, stop sequences, filters and metrics are the harness's. On every rank it runs as on a single one, and makes
the same requests; of each kind of them a rank answers its share. A score is kept as the task ``harness.TASK.METRIC``, with
``.FILTER`` if the answers went through one:

low, high    percentile bootstrap over questions, 95 %, where the score is the mean of theirs, as of other tasks
             value -/+ 1.96 standard errors by the harness elsewhere; none where it estimates none
METRIC_change of the means alone, after the first step, where the base model was asked the same
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import logging
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from numbers import Real
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import torch
from lm_eval import evaluate
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoConfig

from liftdist import hub
from liftdist.distributed import collectives
from liftdist.errors import UserError
from liftdist.evaluation import generation, statistics, tasks
from liftdist.hub import Repository
from liftdist.models.build import auto_class
from liftdist.models.tokenizer import load_tokenizer
from liftdist.options import Harness
from liftdist.runs.context import RunContext
from liftdist.runs.results import Answer, Figure
from liftdist.training.inputs import chat_template

_LOG = logging.getLogger("lm_eval")
Loaded = dict[str, Any]  # as ``TaskManager.load`` returns it: "tasks" and "groups", each by name
_NUMBER = (Real, np.bool_)
_SIGMAS = 1.96  # of a normal distribution, between which 95 % lie
_RESAMPLES = 1000  # by which the harness estimates errors of what is no mean; on one rank, for which the others wait


def load(asked: Harness) -> dict[str, Loaded]:
    """The tasks by the names that were given, patterns resolved, with their data sets.

    Raises:
        UserError: an unknown name, a data set that cannot be had, or a task that cannot be asked.
    """
    _LOG.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"  # the harness ends its processes by a signal, which ranks do not die of
    manager = _manager(asked)
    if (reason := hub.why_unreachable()) is not None:  # else the library repeats each request for a minute
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    found: dict[str, Loaded] = {}
    for name in chain.from_iterable(_matching(given, manager) for given in asked.names):
        _seed()  # a task may draw as it is loaded
        try:
            found[name] = manager.load([name])
        except Exception as error:  # of the library, of a task's own code, of a file
            cause = Repository("", hub.DATASET, name).cause(error) if reason is None else None
            raise UserError(
                f"--harness {name}: the task or its data set cannot be loaded: {cause or hub.first_line(error)}"
                + (f"; the hub cannot be reached ({reason}), and its cache lacks the data" if _needs_hub(error) else "")
            ) from None
        for title, task in found[name]["tasks"].items():
            if problem := _problem(task, asked):
                raise UserError(f"--harness {title}: {problem}")
    of_names = {name: set(loaded["tasks"]) for name, loaded in found.items()}
    for name in list(found)[::-1]:  # what a group asks is not asked again
        if any(of_names[name] <= of_names[other] for other in found if other != name):
            del found[name]
    return found


def run(context: RunContext, asked: Harness, loaded: Mapping[str, Loaded], folder: Path, step: int) -> dict[str, float]:
    """Ask the model in ``folder``, write what it answered, and return the figures by tag. Collective.

    Raises:
        UserError: the model or its tokenizer cannot be loaded; it has no chat template, and questions are to be worded by it.
    """
    figures: dict[str, float] = {}
    unknown = 0
    model: _Shared | None = None
    with collectives.together():
        model = _Shared(context, folder, asked.chat)
    for found in loaded.values():
        context.cancellation.boundary()
        _seed()
        _set_examples(found["tasks"].values(), asked.fewshot)
        results = evaluate(
            model,
            found,
            limit=asked.limit,
            bootstrap_iters=_RESAMPLES if context.mesh.is_main else 0,
            apply_chat_template=asked.chat,
            fewshot_as_multiturn=asked.chat,
        )
        made: list[tuple[Figure, Sequence[Answer], bool]] = []
        with collectives.together():
            if context.mesh.is_main:
                made = list(_figures(results, found["tasks"], step))
        for number, (figure, is_mean) in enumerate(collectives.gather([(one, mean) for one, _, mean in made])[0]):
            answers = made[number][1] if made else ()
            figures |= tasks.written(context, figure, answers)
            if step and is_mean:
                changed = tasks.since_base(context, figure, answers)
                figures |= changed
                unknown += not changed
    if unknown:
        context.console.say(
            f"the change since the base model is not known of {unknown} scores, whose questions it was not asked: "
            f"`liftdist eval CONFIG` with the same flags asks it before a run begins"
        )
    return figures


def _seed() -> None:
    """As ``lm_eval.simple_evaluate`` does, which besides looks for git repositories and describes the machine."""
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)


def _set_examples(asked: Iterable[Any], fewshot: int | None) -> None:
    """As ``lm_eval.simple_evaluate`` does."""
    for task in asked:
        if fewshot is not None or task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", fewshot or 0)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)


class _Shared(HFLM):
    """A model of which every rank has a copy, and answers its share of requests that all ranks make alike.

    What the library knows of ranks is not used: it needs as many requests on each.
    """

    def __init__(self, context: RunContext, folder: Path, chat: bool) -> None:
        config, self._context = context.config, context
        tokenizer = load_tokenizer(folder, config.model)
        tokenizer.chat_template = chat_template(config.data.chat_template) or tokenizer.chat_template
        if chat and not tokenizer.chat_template:
            raise UserError("--harness-chat: the tokenizer has no chat template; give data.chat_template")
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=config.model.trust_remote_code)
        model = auto_class(settings, config.model.trust_remote_code).from_pretrained(
            folder,
            dtype=config.model.dtype,
            attn_implementation=config.model.attn_implementation,
            trust_remote_code=config.model.trust_remote_code,
        )
        _LOG.setLevel(logging.ERROR)  # it warns of a model that it has not loaded itself
        super().__init__(
            pretrained=model.to(context.mesh.device),
            backend="causal",
            tokenizer=tokenizer,
            batch_size="auto" if context.mesh.device.type == "cuda" else generation.BATCH_SIZE,
            chat_template_args=config.data.template_arguments,
        )
        _LOG.setLevel(logging.WARNING if context.mesh.is_main else logging.ERROR)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return self._share(super().generate_until, requests, disable_tqdm)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._share(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return self._share(super().loglikelihood_rolling, requests, disable_tqdm)

    def _share(self, answer: Callable[..., list[Any]], requests: list[Any], quiet: bool) -> list[Any]:
        """Collective."""
        mesh, number, mine = self._context.mesh, len(requests), []
        digest = hashlib.sha256(repr([one.args for one in requests]).encode()).hexdigest()
        if len(set(collectives.gather(digest))) > 1:
            raise UserError(
                "--harness: ranks ask different questions; let all machines have the same data sets, caches and lm-eval"
            )
        begin, end = (rank * number // mesh.world_size for rank in (mesh.rank, mesh.rank + 1))
        with collectives.together():
            if begin < end:
                mine = answer(requests[begin:end], disable_tqdm=quiet or not mesh.is_main)
        return list(chain.from_iterable(collectives.gather(mine)))

    def _model_call(self, *given: Any, **named: Any) -> Any:
        self._context.cancellation.check()
        return super()._model_call(*given, **named)

    def _model_generate(self, *given: Any, **named: Any) -> Any:
        self._context.cancellation.check()
        return super()._model_generate(*given, **named)


def _manager(asked: Harness) -> TaskManager:
    """Reads the harness's own task files, over ten thousand, only if the folder that was given does not do."""
    if asked.path is not None:
        alone = TaskManager(include_path=str(asked.path), include_defaults=False)
        if set(asked.names) <= set(alone.all_subtasks):
            return alone
    return TaskManager(include_path=None if asked.path is None else str(asked.path))


def _matching(given: str, manager: TaskManager) -> list[str]:
    found = [given] if given in manager.all_tasks else fnmatch.filter(manager.all_tasks, given)
    if not found:
        near = difflib.get_close_matches(given, manager.all_tasks, n=1)
        hint = f"did you mean {near[0]}?" if near else "`lm-eval ls tasks` lists them, --harness-path adds your own"
        raise UserError(f"--harness {given}: the harness has no such task; {hint}")
    return found


def _needs_hub(error: Exception) -> bool:
    return any(isinstance(link, ConnectionError) for link in hub.chain(error))


def _problem(task: Any, asked: Harness) -> str | None:
    """Why a task cannot be asked as it was meant; None if it can."""
    if getattr(task, "UNSAFE_CODE", False):
        return "runs code that the model writes, and there is no sandbox for it here; run lm-eval in one"
    if getattr(task, "MULTIMODAL", False):
        return "asks about images, and only text can be asked"
    if asked.fewshot and task.get_config("num_fewshot") == 0:
        return f"is asked without examples, always; leave out the task, or --harness-fewshot {asked.fewshot}"
    return None


def _figures(
    results: Mapping[str, Any], asked: Mapping[str, Any], step: int
) -> Iterator[tuple[Figure, Sequence[Answer], bool]]:
    """What the harness has found of tasks and groups; of a task's questions each, if the metric scores them one by one; whether
    it is the mean of these."""
    for name, found in results["results"].items():
        for key, value in found.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            samples = [one for one in results["samples"].get(name, ()) if one["filter"] == filtered and metric in one]
            answers = [
                _answer(asked[name], one, metric)
                for one in sorted(samples, key=lambda one: one["doc_id"])
                if isinstance(one[metric], _NUMBER)
            ]
            scores, error = [answer.score for answer in answers], found.get(f"{metric}_stderr,{filtered}")
            low, high = None, None
            is_mean = bool(scores) and math.isclose(float(value), sum(scores) / len(scores), rel_tol=1e-9)
            if is_mean:
                low, high = statistics.bootstrap(scores)
            elif isinstance(error, Real):
                low, high = (float(value) + sigmas * float(error) for sigmas in (-_SIGMAS, _SIGMAS))
            title = ".".join(["harness", name.replace("/", "_"), metric, *([filtered] if filtered != "none" else [])])
            number = found.get("sample_count", {}).get(key) or len(samples) or found["sample_len"]
            yield Figure(step, title, metric, float(value), low, high, number), answers, is_mean


def _answer(task: Any, sample: Mapping[str, Any], metric: str) -> Answer:
    """One question, with the option taken by the rule of the metric, or the text, or else the likelihoods as JSON."""
    prompt, target, doc = sample["arguments"][0][0], sample["target"], sample["doc"]
    replies, extracted = [reply[0] for reply in sample["resps"]], sample["filtered_resps"][0]
    if task.OUTPUT_TYPE == "multiple_choice" and task.multiple_input:  # prompts to choose from, before one continuation
        target = task.doc_to_text(doc)
    expected = target if isinstance(target, list) else [target]
    if task.OUTPUT_TYPE == "multiple_choice":
        options = task.doc_to_choice(doc)
        units = {"acc_norm": len, "acc_bytes": lambda option: len(option.encode())}.get(metric, lambda _: 1)
        nats = [likelihood / max(units(option), 1) for (likelihood, _), option in zip(replies, options, strict=False)]
        replies = [options[nats.index(max(nats))]]
        extracted = replies[0]
        expected = [options[one] if isinstance(one, int) and 0 <= one < len(options) else one for one in expected]
    answer = replies[0] if isinstance(replies[0], str) else json.dumps(replies)
    text = extracted if isinstance(extracted, str) else None
    return Answer(sample["doc_id"], prompt, answer, list(map(str, expected)), text, float(sample[metric]))
