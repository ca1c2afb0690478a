"""Settings of the training data and the held-out data: where records are, and how they are read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from liftdist.registry import FORMATS
from liftdist.schema_tree import NOTHING, Problem, setting

LEARN = ("all", "last")  # replies of a conversation
TURNS = ("auto", "whole", "split")  # samples of a conversation


@dataclass
class EvalSourceConfig:
    """An entry of ``data.eval_sources``: a set of held-out records."""

    path: str = setting(MISSING, "records, in a form as for `data.path`")
    name: str | None = setting(
        None,
        "its name in the metrics; made from `path` if unset: that of the file, folder or data set",
        changes=NOTHING,
    )
    revision: str | None = setting(None, "commit, tag or branch on the hub; its main branch if unset", changes=NOTHING)
    subset: str | None = setting(None, "configuration name of a data set")
    split: str | None = setting(None, "split of a data set; `data.split`, of held-out data `data.eval_split`, if unset")
    format: str | None = setting(None, "as `data.format`, which holds if unset", choices=("auto", *FORMATS))
    fields: dict[str, str] = setting(
        {}, "as `data.fields`, which hold if there are none", example="{instruction: query, output: answer}"
    )
    prompt_template: str | None = setting(None, "as `data.prompt_template`, which holds if unset")
    response_template: str | None = setting(None, "as `data.response_template`, which holds if unset")
    learn: str | None = setting(None, "as `data.learn`, which holds if unset", choices=LEARN)
    turns: str | None = setting(None, "as `data.turns`, which holds if unset", choices=TURNS)


@dataclass
class SourceConfig(EvalSourceConfig):
    """An entry of ``data.sources``."""

    weight: float | None = setting(
        None,
        "share of an epoch, relative to the weights of the other sources; an epoch has as many samples as all sources "
        "together",
        above=0,
    )
    samples: int | None = setting(None, "samples that an epoch takes of it; each once if unset", at_least=1)
    token_weights: str | None = setting(None, "as `data.token_weights`, which holds if unset")


@dataclass(frozen=True)
class DataSource:
    """Where records are and how they are read: the settings of a source, each that is unset taken from ``data``."""

    key: str  # the setting of its path
    name: str  # in metrics
    path: str
    revision: str | None
    subset: str | None
    split: str
    format: str
    fields: dict[str, str]
    prompt_template: str | None
    response_template: str | None
    learn: str
    turns: str
    weight: float | None = None
    samples: int | None = None
    token_weights: str | None = None

    @property
    def section(self) -> str:
        """The section with the settings of how records are read."""
        return self.key.rpartition(".")[0]

    def problems(self) -> Iterator[Problem]:
        if self.response_template is not None and self.prompt_template is None:
            yield "response_template", "needs {section}.prompt_template, too; it may be {{field}} alone"
        elif self.response_template is not None:  # templates name the fields of records themselves
            for name, is_given in (("format", self.format != "auto"), ("fields", bool(self.fields))):
                if is_given:
                    yield (
                        name,
                        "is not used with {section}.prompt_template and {section}.response_template; leave it out",
                    )


@dataclass
class DataConfig:
    path: str | None = setting(
        None,
        "training data: a file (JSON Lines, JSON, CSV, Parquet, Arrow), a pattern (`data/*.jsonl`), a folder, or the name of "
        "a data set on the hub; or give `data.sources`",
    )
    sources: list[SourceConfig] = setting([], "several sources of training data, in place of `data.path`")
    revision: str | None = setting(
        None, "commit, tag or branch of `data.path` on the hub; its main branch if unset", changes=NOTHING
    )
    eval_path: str | None = setting(
        None, "held-out data for the evaluation loss, in a form as for `data.path`", changes=NOTHING
    )
    eval_sources: list[EvalSourceConfig] = setting(
        [], "several sets of held-out data, in place of `data.eval_path`", changes=NOTHING
    )
    eval_share: float | None = setting(
        None,
        "fraction of the records of each source that is held out for the evaluation loss, in place of `data.eval_path`",
        above=0,
        at_most=0.5,
    )
    eval_revision: str | None = setting(
        None,
        "the same for `data.eval_path`; that of `data.path` if both are one repository",
        changes=NOTHING,
    )
    subset: str | None = setting(None, "configuration name of a data set")
    eval_subset: str | None = setting(
        None, "the same for `data.eval_path`; that of `data.path` if both are one data set", changes=NOTHING
    )
    split: str = setting("train", "split of a data set to train on, on the hub also a part of it: `train[:1000]`")
    eval_split: str = setting("test", "split of a data set to evaluate on", changes=NOTHING)
    format: str = setting(
        "auto",
        "which fields a record has, and how they are put together; `auto` detects it from the fields of the first record",
        choices=("auto", *FORMATS),
    )
    fields: dict[str, str] = setting(
        {},
        "names of the format's fields in your records, where they are others: `data.fields.instruction=query`",
        example="{instruction: query, output: answer}",
    )
    prompt_template: str | None = setting(
        None,
        "your own wording of the prompt, with `{query}` for the text of the record's field `query`, and `{{` and `}}` for braces",
    )
    response_template: str | None = setting(
        None, "the same for the response, which is learned; the format's response field, as it is, if unset"
    )
    token_weights: str | None = setting(
        None,
        "field of the training records with weights of the response's characters: a list of `[begin, end, weight]`; 1 elsewhere",
    )
    learn: str = setting("all", "which replies of a conversation are learned", choices=LEARN)
    turns: str = setting(
        "auto",
        "samples of a conversation: `whole`, one, in which every reply is learned as it stands there; `split`, one for each "
        "reply, as it was when it was asked for; `auto`, `split` only where the template drops a part of an earlier reply",
        choices=TURNS,
    )
    chat_template: str | None = setting(
        None, "chat template in place of the tokenizer's: a file that ends in `.jinja`, or the text itself"
    )
    template_arguments: dict[str, Any] = setting(
        {},
        "arguments of the chat template, such as `data.template_arguments.enable_thinking=false`; those of a record win; `null` "
        "takes one back",
        example="{enable_thinking: false}",
    )
    max_length: int = setting(2048, "longest sequence, in tokens", at_least=2)
    overlong: str = setting(
        "truncate", "what to do with longer samples; their number is reported", choices=("truncate", "drop")
    )
    packing: bool = setting(
        False, "fill sequences up to `max_length` with several samples, which do not attend to each other"
    )

    @property
    def training_sources(self) -> list[DataSource]:
        """The sources to train on: those of ``data.sources``, or the one of ``data.path``."""
        if self.sources:
            return [
                self._resolved(f"data.sources.{number}.path", entry, self.split)
                for number, entry in enumerate(self.sources)
            ]
        only = SourceConfig(path=self.path or "", revision=self.revision, subset=self.subset)
        return [self._resolved("data.path", only, self.split)]

    @property
    def held_out_sources(self) -> list[DataSource]:
        """The sources to evaluate on, if any: those of ``data.eval_sources``, or the one of ``data.eval_path``."""
        entries = [(f"data.eval_sources.{number}.path", entry) for number, entry in enumerate(self.eval_sources)]
        if self.eval_path is not None:
            only = EvalSourceConfig(path=self.eval_path, revision=self.eval_revision, subset=self.eval_subset)
            entries = [("data.eval_path", only)]
        found, training = [], self.training_sources
        for key, entry in entries:
            one = self._resolved(key, entry, self.eval_split)
            of_repository = {s.revision for s in training if _repository(s.path) == _repository(one.path)}
            of_set = {s.subset for s in training if s.path == one.path}
            revision = one.revision or (of_repository.pop() if len(of_repository) == 1 else None)
            subset = one.subset or (of_set.pop() if len(of_set) == 1 else None)
            found.append(dataclasses.replace(one, revision=revision, subset=subset))
        return found

    @property
    def all_sources(self) -> list[DataSource]:
        return [*self.training_sources, *self.held_out_sources]

    def _resolved(self, key: str, given: EvalSourceConfig, split: str) -> DataSource:
        inherited = ("format", "fields", "prompt_template", "response_template", "learn", "turns")
        values = dataclasses.asdict(given) | {name: getattr(given, name) or getattr(self, name) for name in inherited}
        values |= {"name": given.name or _name(given.path), "split": given.split or split}
        if isinstance(given, SourceConfig):  # what is held out is evaluated without weights
            values["token_weights"] = given.token_weights or self.token_weights
        return DataSource(key, **values)

    def problems(self) -> Iterator[Problem]:
        if (self.path is None) == (not self.sources):
            both = "is given, and data.sources, too; unset one of them: data.path= or data.sources=[]"
            yield "path", both if self.sources else "must be given, in the file or as data.path=VALUE; or data.sources"
            return
        held_out = {"eval_path": self.eval_path, "eval_sources": self.eval_sources, "eval_share": self.eval_share}
        given = [name for name, value in held_out.items() if value]
        if len(given) > 1:
            yield given[-1], f"cannot be given together with data.{given[0]}; leave one of them out"
        for name, of, is_used in (
            ("subset", "path", not self.sources),
            ("revision", "path", not self.sources),
            ("eval_subset", "eval_path", self.eval_path is not None),
            ("eval_revision", "eval_path", self.eval_path is not None),
        ):
            if getattr(self, name) is not None and not is_used:
                what = name.removeprefix("eval_")
                yield name, f"is the {what} of data.{of}, which is not set; a source in a list has its own {what}"
        yield from _problems_of_mixture(self.sources)
        for kind, sources in (("sources", self.training_sources), ("eval_sources", self.held_out_sources)):
            yield from _problems_of_names(kind, [*getattr(self, kind)], sources)
            for number, source in enumerate(sources):
                is_own = bool(getattr(self, kind)) and getattr(self, kind)[number].prompt_template is not None
                for name, problem in source.problems():
                    key = f"{source.section}.{name}".removeprefix("data.")
                    yield key, problem.format(section=source.section if is_own else "data")


def _problems_of_mixture(sources: Sequence[SourceConfig]) -> Iterator[Problem]:
    """What is wrong with the weights and numbers of samples."""
    weighted = [source.weight is not None for source in sources]
    if any(weighted):
        for number, source in enumerate(sources):
            if source.samples is not None:
                yield f"sources.{number}.samples", "is not used where sources have a weight; leave one of them out"
            elif source.weight is None:
                known = f"data.sources.{weighted.index(True)}"
                yield (
                    f"sources.{number}.weight",
                    f"must be given, as {known} has one: all sources have a weight, or none",
                )


def _problems_of_names(
    kind: str, entries: Sequence[EvalSourceConfig], sources: Sequence[DataSource]
) -> Iterator[Problem]:
    for number, entry in enumerate(entries):
        if entry.name is not None and not re.fullmatch(_SOURCE_NAME, entry.name):
            yield (
                f"{kind}.{number}.name",
                f"must consist of letters, digits and the characters . - _, got {entry.name!r}",
            )
    first: dict[str, int] = {}
    for number, source in enumerate(sources):
        if (known := first.setdefault(source.name, number)) != number:
            key = f"{kind}.{number}"
            problem = (
                f"{source.name} is also the name of data.{kind}.{known}; give one of them another: data.{key}.name=NAME"
            )
            yield f"{key}.name" if entries[number].name else f"{key}.path", problem


_SOURCE_NAME = r"[\w.-]+"


def _name(path: str) -> str:
    """The name of a source in metrics: that of its file, folder or data set, of a pattern what all its files have."""
    stem = re.sub(r"\.(jsonl|ndjson|json|csv|tsv|parquet|arrow)(\.\w+)?$", "", path)
    parts = re.sub(r"\[.*?\]|[*?]", "", stem).split("/")
    names = [re.sub(r"[^\w.-]+", "_", part).strip("_.-") for part in parts]
    return next((name for name in reversed(names) if name), "data")


def _repository(path: str) -> str:
    """The name on the hub without that of a file (``hf://datasets/OWNER/NAME/FILE``); another path as it is."""
    return "/".join(path.split("/")[3:5]) if path.startswith("hf://") else path
