"""The runs of ``python -m bench fidelity``: which there are, on what, and the config of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import frontier
from liftdist.method_settings import FACTORING
from liftdist.report.read import FINISHED

METHODS: dict[str, dict[str, Any]] = {
    "lift": {},
    "full": {"method": "full"},
    "lora": {"method": "lora"},
    "magnitude": {"criterion": "magnitude"},
    "random": {"criterion": "random"},
    "low_rank_smallest": {"criterion": "low_rank_smallest"},
}


@dataclass
class Task:
    """A kind of problem and its arguments, see :func:`bench.problems.write`, and how answers are read."""

    kind: str
    arguments: dict[str, int]
    new_tokens: int = 16  # longest answer
    scorer: str = "exact"


def _sums(terms: int, digits: int, new_tokens: int) -> Task:
    return Task("sums", dict(terms=terms, digits=digits), new_tokens, "last_number")


@dataclass
class Settings:
    """What decides the results of runs; kept in ``--output``, whose runs all have the same."""

    model: str
    tasks: list[Task]
    dtype: str
    steps: int
    format: str = "alpaca"  # or prompt_completion
    rank: int = 0  # of LoRA, and of the filter: the paper finds filter ranks near the budget's best
    density: float = 0.05
    batch_size: int = 16
    micro_batch_size: int = 8
    max_length: int = 256
    training: int = 2000
    development: int = 100
    test: int = 400
    capitals: int = 44
    prose: int = 33  # paragraphs
    own_texts: int = 64
    own_tokens: int = 64
    evaluations: int = 2  # in a run, of which the best counts


@dataclass
class Plan:
    """Which runs there are, and how results are read; may change from call to call."""

    methods: list[str]
    rates: dict[str, list[float]]
    seeds: int = 5
    best: int = 2  # rates of each method that are tested
    limit: float = 0.3  # nats a token up to which forgetting counts


NUMBERS: dict[str, type] = {
    field.name: kind
    for of in (Settings, Plan)
    for field in dataclasses.fields(of)
    if (kind := {"int": int, "float": float}.get(str(field.type))) and field.name != "rank"
}


def preset(name: str, model: str) -> tuple[Settings, Plan, int]:
    """Settings, plan, and how many runs there are at a time."""

    def rates(sparse: float, full: float, lora: float, number: int) -> dict[str, list[float]]:
        """``number`` rates of each method, each twice the one before."""
        least = {"full": full, "lora": lora}
        return {method: [least.get(method, sparse) * 2**step for step in range(number)] for method in METHODS}

    if name == "gpu":
        harder = Task("chain_sum", dict(min_terms=3, max_terms=3, min_digits=3, max_digits=3))
        settings = Settings(model, [_sums(6, 3, 96), harder], "bfloat16", steps=60)
        return settings, Plan([*METHODS], rates(1e-4, 1e-5, 1e-4, 3)), 4
    if name == "tiny":
        small = dict(density=0.1, batch_size=4, micro_batch_size=4, training=40, development=4, test=8)
        small |= dict(capitals=4, prose=4, own_texts=2, own_tokens=4)
        settings = Settings(model, [_sums(4, 2, 2)], "float32", steps=2, **small)
        return settings, Plan(["lift", "full"], rates(1e-3, 1e-4, 1e-3, 2), seeds=2, best=1), 2
    tasks = [
        Task("chain_sum", dict(min_terms=2, max_terms=2, min_digits=2, max_digits=2)),
        _sums(4, 2, 64),
        Task("spell_backward", dict(min_word_len=3, max_word_len=5)),
    ]
    small = dict(batch_size=8, development=64, own_texts=24, own_tokens=48, prose=12, capitals=20, evaluations=1)
    settings = Settings(model, tasks, "float32", steps=40, format="prompt_completion", **small)
    return settings, Plan([*METHODS], rates(5e-4, 5e-5, 5e-4, 3)), 2


@dataclass(frozen=True)
class Trial:
    """A run of the plan."""

    task: str
    method: str
    lr: float
    seed: int
    stage: str

    def folder(self, output: Path) -> Path:
        return output / "runs" / f"{self.task}-{self.method}-lr{self.lr:g}-{self.stage}-seed{self.seed}"


def trials(settings: Settings, plan: Plan, stage: str, done: list[dict[str, Any]]) -> Iterator[Trial]:
    """The runs of a stage: methods side by side, so that a part of them is a comparison, too."""
    tasks = [task.kind for task in settings.tasks]
    rates = {(task, method): plan.rates[method] for task in tasks for method in plan.methods}
    if stage == "test":
        rates = {(task, method): _chosen(plan, task, method, done) for task, method in rates}
    for seed in (
        range(1, 1 + plan.seeds) if stage == "test" else [0]
    ):  # rates are not tested on the runs that chose them
        for task in tasks:
            for number in range(max(len(rates[task, method]) for method in plan.methods)):
                for method in plan.methods:
                    if number < len(rates[task, method]):
                        yield Trial(task, method, rates[task, method][number], seed, stage)


def _chosen(plan: Plan, task: str, method: str, done: list[dict[str, Any]]) -> list[float]:
    swept = frontier.sweep(done, task, method)
    base = next((run["base_scores"] for run in done if run["task"] == task and run["status"] == FINISHED), "0")
    return frontier.chosen(swept, base.count("1") / len(base), plan.limit, plan.best)


def config(trial: Trial, settings: Settings, output: Path) -> dict[str, Any]:
    """The settings of a run of `liftdist train`."""
    data, given = output / "problems" / trial.task, METHODS[trial.method]
    known = output / "problems"
    method = given.get("method", "lift")
    chosen: dict[str, Any] = {
        "lift": {
            "selection": {
                "density": settings.density,
                "refresh_interval": max(1, settings.steps // 5),  # the paper's 400 of some 1900 steps
                "criterion": given.get("criterion", "low_rank"),
            }
        },
        "lora": {"lora": {"rank": settings.rank, "alpha": 2 * settings.rank}},
        "full": {},
    }[method]
    if method == "lift" and chosen["selection"]["criterion"] in FACTORING:
        chosen["selection"]["filter_rank"] = settings.rank
    if given.get("criterion") == "random":
        chosen["selection"]["seed"] = trial.seed
    task = next(task for task in settings.tasks if task.kind == trial.task)
    target = {"name": "target", "path": str(data / f"{trial.stage}.jsonl"), "expected": "answer"}
    capitals = {"name": "capitals", "path": str(known / "capitals.jsonl"), "scorer": "contains"}
    prose = {"name": "prose", "path": str(known / "prose.jsonl"), "kind": "perplexity", "limit": settings.prose}
    own_text = {"task": "own_text", "size": settings.own_texts, "max_new_tokens": settings.own_tokens}
    interval = settings.steps // settings.evaluations
    return {
        "run_dir": str(trial.folder(output)),
        "cache_dir": str(output / "cache"),
        "method": method,
        "model": {"path": settings.model, "dtype": settings.dtype},
        "data": {
            "path": str(data / "training.jsonl"),
            "eval_path": str(data / "development.jsonl"),
            "format": settings.format,
            "max_length": settings.max_length,
        },
        **chosen,
        "optimizer": {
            "lr": trial.lr,
            "betas": [0.9, 0.95],
            "eps": 1e-6,
            "reference_numerics": True,
            "schedule": "linear",
            "warmup_ratio": 0.03,
        },
        "train": {
            "loss_reduction": "sequence",
            "steps": settings.steps,
            "batch_size": settings.batch_size,
            "micro_batch_size": settings.micro_batch_size,
            "seed": trial.seed,
            "eval_interval": interval,
            "export": False,
        },
        "eval": {
            "interval": interval,
            "tasks": [
                target | {"format": settings.format, "scorer": task.scorer, "max_new_tokens": task.new_tokens},
                capitals | {"format": settings.format, "max_new_tokens": 16, "limit": settings.capitals},
                prose,
                own_text,
            ],
        },
        "metrics": {"trackers": []},
        "checkpoint": {"interval": 0, "keep": 1, "best": "eval/loss"},
    }
