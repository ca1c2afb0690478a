"""Which step was the best so far, by a figure of the evaluations, and whether it is worth going on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from liftdist.errors import UserError
from liftdist.runs.results import CHANGE
from liftdist.schema import Config

# words in the names of figures of which less is better
_LOWER = {"loss", "perplexity", "kl", "error", "bits", "brier", "ter"}


def less_is_better(metric: str) -> bool:
    """Whether that is so of a figure of this name, or of its change."""
    return bool(_LOWER & set(metric.lower().split("_")))


def _without_bound(tag: str) -> str:
    """The figure that a bound of an interval of confidence belongs to, or the figure itself."""
    return tag.removesuffix("/low").removesuffix("/high")


class Best:
    """The best step of ``checkpoint.best``. Figures are equal on all ranks, and so is this."""

    def __init__(self, config: Config) -> None:
        self.tag, self._patience = config.checkpoint.best, config.train.patience
        of, metric = config.checkpoint.best_of, _without_bound(self.tag or "").rpartition("/")[2]
        self._sign = -1 if of == "min" or (of == "auto" and less_is_better(metric)) else 1
        self.step: int | None = None  # None: no step has been evaluated yet
        self.value = math.nan
        self.worse = 0  # evaluations since

    def compare(self, step: int, figures: Mapping[str, float]) -> bool:
        """Whether a step is the best so far; the base model, step 0, is not compared.

        Raises:
            UserError: before the first step, when all evaluations are made, none gives this figure.
        """
        if self.tag is None:
            return False
        # there is no change since the base model yet
        if not step and _without_bound(self.tag).removesuffix(CHANGE) not in figures:
            known = ", ".join(figures) or "none: give data.eval_path or eval.tasks"
            raise UserError(f"checkpoint.best={self.tag}: no evaluation has this figure; there are {known}")
        if self.tag not in figures or not step:
            return False
        value = figures[self.tag]
        if math.isfinite(value) and (self.step is None or self._sign * (value - self.value) > 0):
            self.step, self.value, self.worse = step, value, 0
            return True
        self.worse += 1
        return False

    def reason_to_stop(self) -> str | None:
        """Why training ends here, if ``train.patience`` says so."""
        if self._patience is None or self.worse < self._patience:
            return None
        since = "yet" if self.step is None else f"than {self.value:.4f} after step {self.step}"
        return f"{self.tag} has not been better {since} in {self.worse} evaluations (train.patience)"

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain numbers."""
        return {
            "tag": self.tag,
            "sign": self._sign,
            "step": self.step,
            "value": None if self.step is None else self.value,
            "worse": self.worse,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state`; from nothing, if another figure counts now, or the least where the greatest did."""
        same = (state.get("tag"), state.get("sign", self._sign)) == (self.tag, self._sign)
        if same and self.tag is not None:
            self.step, self.worse = state["step"], state["worse"]
            self.value = math.nan if state["value"] is None else state["value"]
