"""Settings of what a model is evaluated on: tasks, each with its questions, how they are answered, and how answers are scored.

Imports no torch.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from liftdist import files
from liftdist.data_settings import DataSource
from liftdist.registry import FORMATS, SCORERS
from liftdist.schema_tree import NOTHING, Problem, setting

GENERATION, MULTIPLE_CHOICE, PERPLEXITY, OWN_TEXT = "generation", "multiple_choice", "perplexity", "own_text"
GENERATED = "reasoning_gym"  # begins the name of a shipped task whose questions are generated
_SHIPPED = "configs/tasks"


@dataclass
class TaskConfig:
    """An entry of ``eval.tasks``; the name of a shipped task, alone or as ``task``, stands for the settings in its file."""

    task: str | None = setting(
        None, "a shipped task, such as `gsm8k`; what is set here besides takes the place of its settings"
    )
    name: str | None = setting(
        None,
        "its name in results; that of the shipped task if unset, with `_` for `/`",
        pattern=r"\w[\w.-]*",
        example="arithmetic_gsm8k",
    )
    kind: str = setting(
        GENERATION,
        "what is measured: answers that are generated and scored, the likeliest of several options, the perplexity of answers, "
        "or how far the model is from its base model on what that writes by itself",
        choices=(GENERATION, MULTIPLE_CHOICE, PERPLEXITY, OWN_TEXT),
    )
    path: str | None = setting(None, "records, in a form as for `data.path`; or give `generator`")
    revision: str | None = setting(None, "commit, tag or branch on the hub; its main branch if unset")
    subset: str | None = setting(None, "configuration name of a data set")
    split: str = setting("test", "split of a data set")
    format: str = setting("auto", "as `data.format`: how a record's prompt is worded", choices=("auto", *FORMATS))
    fields: dict[str, str] = setting({}, "as `data.fields`", example="{question: problem, answer: solution}")
    prompt_template: str | None = setting(None, "as `data.prompt_template`, in place of a format; needs `expected`")
    expected: str | None = setting(
        None, "field with the right answer, a text, a number, or a list of right ones; the response if unset"
    )
    generator: str | None = setting(None, "generator of reasoning-gym that makes the questions, in place of `path`")
    arguments: dict[str, Any] = setting({}, "its arguments, besides seed and size", example="{min_terms: 2}")
    seed: int = setting(0, "its seed, or that of `kind=own_text`", at_least=0, at_most=2**32 - 1)
    size: int = setting(100, "questions that it makes, or texts of `kind=own_text`", at_least=1)
    limit: int | None = setting(None, "questions at most, the first ones; all if unset", at_least=1)
    scorer: str | None = setting(
        None, "how a generated answer is scored; `reasoning_gym` with a generator if unset", choices=tuple(SCORERS)
    )
    tolerance: float = setting(1e-3, "difference up to which `scorer=last_number` takes numbers for equal", at_least=0)
    pattern: str | None = setting(None, "regular expression of `scorer=regex`, whose group 1 is the answer")
    options: list[str] = setting(
        [], "the answers that there are, of `scorer=option` and `kind=multiple_choice`", example="[A, B]"
    )
    options_field: str | None = setting(None, "field with the options of `kind=multiple_choice`, where records differ")
    inside_words: bool = setting(False, "let `scorer=option` find options inside words, too")
    max_new_tokens: int = setting(256, "longest answer, in tokens", at_least=1)
    temperature: float = setting(0.0, "of sampling; 0 takes the likeliest token", at_least=0)
    top_p: float = setting(1.0, "sample among the likeliest tokens of this probability together", above=0, at_most=1)
    num_beams: int = setting(1, "beams; 1, as there is no beam search", at_least=1)

    @staticmethod
    def shipped(name: str) -> str:
        """The settings of a shipped task, as YAML. Raises ``ValueError`` for an unknown name."""
        library, _, generator = name.partition("/")
        if library == GENERATED and re.fullmatch(r"\w+", generator):
            return f"generator: {generator}\n"
        if name not in (known := shipped_tasks()):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}, and {GENERATED}/GENERATOR"
            raise ValueError(f"no task of this name is shipped; {hint}")
        return (files.shipped(_SHIPPED) / f"{name}.yaml").read_text(encoding="utf-8")

    @property
    def scored_by(self) -> str:
        return self.scorer or "reasoning_gym"

    @property
    def metric(self) -> str:
        """Its figure in results."""
        return {PERPLEXITY: "perplexity", OWN_TEXT: "kl_to_base"}.get(self.kind, "accuracy")

    def figures(self) -> list[str]:
        """The tags of its figures in a run, beside the bounds of each."""
        own = f"eval/{self.title}/{self.metric}"
        return [own] if self.kind == OWN_TEXT else [own, f"{own}_change"]

    def how(self, options: Sequence[str]) -> str:
        """A digest of what besides a question's prompt decides an answer and its score.

        Args:
            options: of the question.
        """
        names = (
            "kind",
            "scorer",
            "tolerance",
            "pattern",
            "options",
            "inside_words",
            "max_new_tokens",
            "temperature",
            "top_p",
        )
        values = [getattr(self, name) for name in names] + ([options] if self.options_field else [])
        return hashlib.sha256(repr(values).encode()).hexdigest()[:12]

    @property
    def title(self) -> str:
        """Its name in results."""
        return self.name or (self.task or self.generator or "task").replace("/", "_")

    def source(self, section: str) -> DataSource:
        """Where its records are, and how they are read; ``section`` is that of its settings."""
        return DataSource(
            key=f"{section}.path",
            name=self.title,
            path=self.path or f"{GENERATED}/{self.generator}",
            revision=self.revision,
            subset=self.subset,
            split=self.split,
            format=self.format,
            fields=self.fields,
            prompt_template=self.prompt_template,
            response_template=None,
            learn="last",
            turns="auto",
        )

    def problems(self) -> Iterator[Problem]:
        if self.name is None and self.task is None:
            yield "name", "must be given: results are kept under it"
        if self.kind == OWN_TEXT:
            for name in ("path", "generator", "prompt_template", "expected", "limit"):
                if getattr(self, name) is not None:
                    yield name, f"is not used with kind={OWN_TEXT}: the base model writes the texts; leave it out"
        elif (self.path is None) == (self.generator is None):
            is_both = self.path is not None
            yield (
                "path",
                "is given, and generator, too; leave one of them out" if is_both else "must be given, or generator",
            )
        if self.num_beams != 1:
            yield "num_beams", f"must be 1, got {self.num_beams}: there is no beam search, only sampling; leave it out"
        yield from self._problems_of_scorer()
        if self.prompt_template is not None and self.expected is None:
            yield "expected", "must be given with prompt_template, which words the prompt alone"
        for names, is_used, what in (
            (("arguments",), self.generator is not None, "with a generator"),
            (("seed", "size"), self.generator is not None or self.kind == OWN_TEXT, "with a generator"),
            (("revision", "subset", "split"), self.path is not None, "with path"),
            (("format", "fields"), self.prompt_template is None, "without prompt_template"),
            (("format", "fields"), self.kind != OWN_TEXT, "with path"),
            (("tolerance",), self.scorer == "last_number", "with scorer=last_number"),
            (("pattern",), self.scorer == "regex", "with scorer=regex"),
            (("inside_words",), self.scorer == "option", "with scorer=option"),
            (("options",), self.scorer == "option" or self.kind == MULTIPLE_CHOICE, "with options to choose from"),
            (("options_field",), self.kind == MULTIPLE_CHOICE, f"with kind={MULTIPLE_CHOICE}"),
            (("scorer", "temperature"), self.kind == GENERATION, f"with kind={GENERATION}"),
            (("max_new_tokens",), self.kind in (GENERATION, OWN_TEXT), f"with kind={GENERATION}"),
            (
                ("top_p",),
                self.kind == GENERATION and self.temperature > 0,
                "in sampling: set temperature, or leave it out",
            ),
        ):
            for name in names:
                if not is_used and getattr(self, name) != getattr(_DEFAULTS, name):
                    yield name, f"is only used {what}{'' if ':' in what else '; leave it out'}"

    def _problems_of_scorer(self) -> Iterator[Problem]:
        if self.kind == GENERATION and self.scorer is None and self.generator is None:
            yield "scorer", f"must be given, one of {', '.join(SCORERS)}"
        if self.scorer == "reasoning_gym" and self.generator is None:
            yield "scorer", "needs the question's own generator: give generator in place of path"
        if self.scorer == "option" and not self.options:
            yield "options", "must be given with scorer=option, such as [A, B, C, D]"
        if self.kind == MULTIPLE_CHOICE and bool(self.options) == (self.options_field is not None):
            yield "options", f"or options_field must be given with kind={MULTIPLE_CHOICE}, one of the two"
        if self.scorer == "regex":
            yield from self._problems_of_pattern()
        for library, is_used in (
            ("math_verify", self.scorer == "math_verify"),
            ("reasoning_gym", self.generator is not None),
        ):
            if is_used and importlib.util.find_spec(library) is None:
                key = "generator" if library == "reasoning_gym" else "scorer"
                yield key, f"needs the library {library.replace('_', '-')}: pip install 'liftdist[eval]'"

    def _problems_of_pattern(self) -> Iterator[Problem]:
        try:
            if self.pattern is None:
                yield "pattern", "must be given with scorer=regex"
            elif re.compile(self.pattern).groups == 0:
                yield "pattern", "has no group, which is the answer: put it in parentheses"
        except re.error as error:
            yield "pattern", f"is no regular expression: {error}"


_DEFAULTS = TaskConfig()


@dataclass
class EvalConfig:
    tasks: list[TaskConfig] = setting([], "what the model is asked", changes=NOTHING)
    interval: int = setting(
        0, "steps between evaluations on the tasks; 0: only before and after training", at_least=0, changes=NOTHING
    )
    server: str | None = setting(
        None,
        "a vLLM server that `liftdist eval` asks in place of loading the model: the address of its API",
        pattern=r"https?://[^\s/]\S*",
        example="http://localhost:8000/v1",
        changes=NOTHING,
    )
    server_model: str | None = setting(
        None, "what the server calls the model; if unset it must serve one, whose folder is known here", changes=NOTHING
    )

    def problems(self) -> Iterator[Problem]:
        if self.server_model is not None and self.server is None:
            yield "server_model", "is only used with eval.server; leave it out"
        first: dict[str, int] = {}
        for number, task in enumerate(self.tasks):
            if self.server is not None and task.kind == OWN_TEXT:
                yield (
                    f"tasks.{number}.kind",
                    f"{OWN_TEXT} needs the base model, too, which eval.server lacks: ask it without",
                )
            if (known := first.setdefault(task.title, number)) != number:
                problem = f"{task.title} is also the name of eval.tasks.{known}; give one of them another"
                yield f"tasks.{number}.name", problem


def shipped_tasks() -> list[str]:
    """The names of the shipped tasks whose records are read."""
    folder = files.shipped(_SHIPPED)
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
