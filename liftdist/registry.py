"""Everything that is chosen by name, in a config or on the command line, and where it is implemented.

    entry "low_rank" of CRITERIA  ->  module liftdist/engine/criteria/low_rank.py, imported when the name is chosen

To add one: write the file, add its line here, test it. The settings, their validation, ``--help`` and the reference take the
names from here, without importing the modules.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from liftdist.errors import UserError

#: What the settings must know of a criterion without importing it; a test compares that with its class.
Fact = Literal[
    "factors",  # it factors matrices, by `selection.filter_rank` and `method`
    "magnitudes",  # `are_magnitudes`: scores of two matrices can be compared
    "gradients",  # it is a :class:`liftdist.engine.gathered.Gathered`, and needs data
    "number",  # `decides_number`: a setting of the same name says how many weights are trained
]


@dataclass(frozen=True)
class Registry:
    """Names of one kind, each with a one-line description. A name is also that of the module in ``package``.

    Args:
        entries: a description of each, or a tuple of it and :data:`Fact`\\ s.
    """

    kind: str
    package: str
    entries: Mapping[str, str | tuple[str, *tuple[Fact, ...]]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    @property
    def meanings(self) -> dict[str, str]:
        """The description of each name."""
        return {name: entry if isinstance(entry, str) else entry[0] for name, entry in self.entries.items()}

    def having(self, fact: Fact) -> tuple[str, ...]:
        """The names of which ``fact`` is said."""
        return tuple(name for name, entry in self.entries.items() if not isinstance(entry, str) and fact in entry[1:])

    def load(self, name: str) -> ModuleType:
        """The module that implements ``name``. Raises ``UserError`` for an unknown name."""
        if name not in self.entries:
            near = difflib.get_close_matches(name, self.entries, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{self.kind} {name!r}: must be one of {', '.join(self.entries)}{hint}")
        return importlib.import_module(f"{self.package}.{name}")


#: ``FIELDS``, by which ``data.format: auto`` recognises a record, ``OPTIONAL``, ``RESPONSE``, and ``read(record)``: its content.
FORMATS = Registry(
    "data format",
    "liftdist.data.formats",
    {
        "messages": "`messages`, each with `role` and `content`, by the chat template",
        "sharegpt": "`conversations`, each with `from` and `value`, by the chat template",
        "alpaca": "`instruction`, `input` (optional), `output`, in the Alpaca wording",
        "lift_paper": "the same, in the wording of the LIFT authors; only by name, `auto` takes `alpaca`",
        "prompt_completion": "`prompt`, `completion`, joined as they are; or lists of messages, by the chat template",
        "question_answer": "`question`, `context` (optional), `answer`, as two turns by the chat template",
        "instruction_response": "`instruction`, `input` or `context` (optional), `response`, as two turns by the chat template",
        "prompt_response": "`prompt`, `response`, as two turns by the chat template",
        "text": "`text`, all of which is learned",
    },
)

#: ``extend``, ``places``, ``prepare`` and ``attach``, which returns a :class:`liftdist.methods.base.Method`: see there.
METHODS = Registry(
    "method",
    "liftdist.methods",
    {
        "lift": "the principal weights of each matrix, or those that another `selection.criterion` selects",
        "full": "all weights of the modules that fit `selection.modules`, embedding and head too",
        "lora": "adapters of the linear modules that fit `lora.modules`, by the library peft",
    },
)

#: ``make(settings)``: a :class:`liftdist.engine.selection.Criterion`.
CRITERIA = Registry(
    "criterion",
    "liftdist.engine.criteria",
    {
        "low_rank": (
            "the largest entries after low-rank approximation: the principal weights of LIFT",
            "factors",
            "magnitudes",
        ),
        "magnitude": ("the largest entries", "magnitudes"),
        "random": "entries at random, the same on any number of ranks",
        "residual": ("the entries that low-rank approximation leaves over most of", "factors", "magnitudes"),
        "blocks": ("the blocks of entries that are largest after low-rank approximation", "factors", "magnitudes"),
        "channels": "whole channels at random, the same for all matrices of a module",
        "off_principal": ("the smallest entries outside the principal ones", "factors"),
        "threshold": ("all entries below `threshold`, however many", "number"),
        "file": ("the entries that `file` names: of a delta, another run, or a selection that was kept", "number"),
        "gradient": ("the entries of largest squared gradient, summed over batches", "gradients", "magnitudes"),
        "sensitivity": (
            "the entries to which the loss is most sensitive, averaged over batches",
            "gradients",
            "magnitudes",
        ),
        "spiel": ("those of largest gradient; a refresh replaces the ones that have moved least", "gradients"),
        "smallest": "the smallest entries",
        "low_rank_smallest": ("the smallest entries after low-rank approximation", "factors"),
    },
)

#: ``make(settings)``: a :class:`liftdist.engine.selection.Budget`.
BUDGETS = Registry(
    "budget",
    "liftdist.engine.budgets",
    {
        "per_matrix": "each matrix by its own size, from `density` or `budget_rank`",
        "by_pattern": "the same in all, divided by `shares`",
        "half": "half of the matrices, whole, drawn anew at each refresh",
        "layers": "`layers` of the decoder layers, whole, drawn anew at each refresh",
        "greentrainer": "whole matrices of most importance, for a part of the operations of a backward",
        "ist": "its own size in `layers` of the decoder layers, drawn anew at each refresh by their importance",
        "sensitivity": "the same in all, or less at each refresh, divided by the sums of the scores",
        "global_threshold": "the same in all, divided by one threshold for the scores of all matrices",
    },
)

#: ``make(principal, settings)``: a torch optimizer of ``principal.values`` whose step writes them back;
#: ``element_states(settings)``: the names of its states with one element for each value.
OPTIMIZERS = Registry("optimizer", "liftdist.engine", {"adamw": "AdamW", "sgd": "SGD with momentum"})

#: ``make(settings)``: a :class:`liftdist.training.losses.Loss`.
LOSSES = Registry(
    "loss",
    "liftdist.training.losses",
    {
        "cross_entropy": "negative log-likelihood, also with smoothed labels and z-loss",
        "dft": "the same times the token's own probability, which is held constant",
        "asft": "DFT, and the divergence from the base model",
        "masked_thought": "cross-entropy on responses of whose input some tokens are replaced",
    },
)

#: ``run(context, inputs, model, method, step)``: figures by tag.
EVALUATIONS = Registry(
    "evaluation",
    "liftdist.evaluation",
    {
        "held_out_loss": "mean cross-entropy on the held-out data, and on each set of it",
        "tasks": "answers to the questions of `eval.tasks`, when `eval.interval` says so",
        "kl_to_base": "with `train.eval_kl`, the mean divergence from the base model there",
    },
)

#: ``make(task)``: a :class:`liftdist.evaluation.scorers.Scorer`.
SCORERS = Registry(
    "scorer",
    "liftdist.evaluation.scorers",
    {
        "last_number": "the last number, within `tolerance` of the expected one",
        "option": "the first of `options`",
        "exact": "the whole answer, apart from blanks around it",
        "contains": "whether the expected answer stands in it",
        "regex": "what group 1 of `pattern` matches last",
        "math_verify": "mathematical equality of what is boxed, or of the last formula, by the library math-verify",
        "reasoning_gym": "the score of the generator that made the question",
    },
)

#: ``start(run_dir, after)``: a :class:`liftdist.training.recorder.Tracker`.
TRACKERS = Registry(
    "tracker",
    "liftdist.training.trackers",
    {
        "jsonl": "one line a step in `metrics.jsonl`, always",
        "tensorboard": "curves in `tensorboard/`",
        "wandb": "a run of Weights & Biases, needs `liftdist[wandb]`",
        "mlflow": "a run of MLflow, needs `liftdist[mlflow]`",
        "trackio": "a run of Trackio, needs `liftdist[trackio]`",
    },
)

#: ``write(delta, base_folder, target, dtype)``: exports a delta.
EXPORT_FORMATS = Registry(
    "export format",
    "liftdist.deltas.formats",
    {
        "hf": "the fine-tuned model as a Hugging Face folder",
        "as_trained": "the same of a run with `model.base_dtype`, on the rounded base on which it was trained and evaluated",
        "delta": "changed weights and their base values",
        "shira": "an adapter for peft",
        "peft": "the adapters of a run with `method=lora`, for peft and for servers",
        "patch": "flat indices and absolute values, as vLLM's sparse checkpoint patches have them",
        "importance": "how much each input channel matters, for quantisers (QuantLRM)",
        "sglang": "a version that SGLang's `/pull_weights` applies, as slime publishes them",
    },
)

#: ``merge(differences, *, ...)``: the merged difference, see :mod:`liftdist.deltas.rules`.
MERGE_RULES = Registry(
    "merge rule",
    "liftdist.deltas.rules",
    {
        "sum": "task arithmetic: the sum of all changes, times `--weights`",
        "mean": "model soup: the mean of the models, weighted by `--weights`; also of a run's checkpoints",
        "interpolate": "WiSE-FT: the part `--alpha` of one delta",
        "ties": "TIES: of the largest changes, the mean of those with the sign that prevails",
        "dare": "DARE: the sum of changes drawn at random, rescaled",
        "breadcrumbs": "Model Breadcrumbs: the sum without outliers and small changes",
        "ema": "exponential moving average in the order given; also of a run's checkpoints",
    },
)

#: ``plan(changes, *, ...)``: how a delta is written smaller, see :mod:`liftdist.deltas.compressions`.
COMPRESSIONS = Registry(
    "compression",
    "liftdist.deltas.compressions",
    {
        "exact": "all of it, to the bit",
        "t_switch": "T-Switch: without the smallest changes, the others as signs and one size a tensor",
        "flex_switch": "FlexSwitch: sparsity and bit width by tensor, for least error within `--budget`",
    },
)
