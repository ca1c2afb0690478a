"""TRL's ``SFTTrainer`` and ``DPOTrainer`` on the principal weights.

The reference model of DPO (arXiv 2305.18290) is the base model, which is inside the trained one: with the base values of the
touched weights in their place. Before the policy's forward, the model is the base model for the reference log-probabilities of
that batch, without gradients. 6 B for each weight ever selected, in a bf16 model, instead of a second model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig
from trl import DPOConfig, DPOTrainer, SFTTrainer

from liftdist.errors import UserError
from liftdist.integrations.transformers import LiftTrainer


class LiftSFTTrainer(LiftTrainer, SFTTrainer):
    """TRL's ``SFTTrainer``, see :class:`LiftTrainer`."""


class LiftDPOTrainer(LiftTrainer, DPOTrainer):
    """TRL's ``DPOTrainer``, see :class:`LiftTrainer`.

    Args:
        ref_model: a model of its own, as the reference; by default the base model, inside ``model``.
    """

    def __init__(
        self,
        model: Any,
        ref_model: nn.Module | None = None,
        args: DPOConfig | None = None,
        *rest: Any,
        lift: Mapping[str, Any],
        **kwargs: Any,
    ) -> None:
        given = ref_model
        if given is None:
            for name in ("precompute_ref_log_probs", "sync_ref_model"):
                if getattr(args, name, False):
                    raise UserError(f"{name} needs a model of its own: remove it, or give ref_model")
            lift, ref_model = {**lift, "keep_base": True}, _NoModel()
        super().__init__(model, ref_model, args, *rest, lift=lift, **kwargs)
        self.ref_model = given

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.ref_model is not None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        chosen, rejected = self._of_base(model, inputs)
        inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        self.precompute_ref_logps = True  # so that the loss takes them from the batch
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.precompute_ref_logps = False

    def _of_base(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """``[pairs]`` log-probabilities of the chosen and of the rejected replies, under the base model. Collective."""
        training = model.training
        model.eval()
        with self.principal.at_base() if self.principal is not None else contextlib.nullcontext():
            chosen, rejected = self.compute_ref_log_probs(model, inputs)
        model.train(training)
        return chosen, rejected


class _NoModel(nn.Module):
    """Stands where ``DPOTrainer`` would load a second model, until it is made."""

    config = PretrainedConfig()
